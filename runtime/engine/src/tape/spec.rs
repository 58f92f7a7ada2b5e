//! What a decoder-only transformer is made of, as data: sizes, switches and the names of its tensors.
//!
//! A family in `kinglet-models` fills a [`Spec`] from the keys of a GGUF file; everything that differs between
//! families is a field here, so that the engine knows none of them by name.

use std::ops::Range;

/// A weight tensor, or some rows of one (families that store Q, K and V stacked in one matrix).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightRef {
    /// Name in the GGUF file, such as `blk.0.attn_q.weight`.
    pub tensor: String,
    /// The rows that are meant; all of them when `None`.
    pub rows: Option<Range<usize>>,
}

impl WeightRef {
    /// The whole tensor.
    pub fn whole(tensor: impl Into<String>) -> WeightRef {
        WeightRef { tensor: tensor.into(), rows: None }
    }

    /// What the weight is called: by its tensor, with the rows where it is a part of one.
    pub fn name(&self) -> String {
        match &self.rows {
            None => self.tensor.clone(),
            Some(rows) => format!("{}[{}..{}]", self.tensor, rows.start, rows.end),
        }
    }
}

/// A linear map `y = x·Wᵀ + b`; `W` is `[out, in]`, in GGUF order `shape = [in, out]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// The matrix.
    pub weight: WeightRef,
    /// The bias, `[out]`, F32.
    pub bias: Option<WeightRef>,
}

/// How rotary position embedding pairs the components of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// Component `i` turns with `i + rot/2` (NeoX).
    Halves,
    /// Component `2i` turns with `2i + 1`.
    Interleaved,
}

/// Rotary position embedding of one kind of layer: `θ = position · scale · base^(−2i/dims) / factor_i`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Pairing of components.
    pub style: RopeStyle,
    /// Components of a head that turn; the rest pass through.
    pub dims: usize,
    /// The base of the frequencies.
    pub base: f32,
    /// Factor on the position (linear scaling); 1 for none.
    pub scale: f32,
    /// Divisors of the frequencies, one per pair, as some long-context models store them.
    pub factors: Option<Vec<f32>>,
    /// YaRN instead of plain interpolation.
    pub yarn: Option<Yarn>,
}

impl RopeSpec {
    /// Rotation without any scaling.
    pub fn plain(style: RopeStyle, base: f32, dims: usize) -> RopeSpec {
        RopeSpec { style, dims, base, scale: 1.0, factors: None, yarn: None }
    }
}

/// YaRN's parameters: fast pairs extrapolate, slow ones interpolate, those between are mixed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// Turns over the original context above which a pair extrapolates; usually 32.
    pub beta_fast: f32,
    /// Turns below which a pair interpolates; usually 1.
    pub beta_slow: f32,
    /// Factor on cosine and sine besides YaRN's own `1 + 0.1·ln(1/scale)`.
    pub attention_factor: f32,
    /// Positions the model was first trained for.
    pub original_context: usize,
}

/// The activation of a gated feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gate {
    /// `a·σ(a)·b`.
    Silu,
    /// `gelu_tanh(a)·b`.
    GeluTanh,
}

/// One decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// RMS norm before attention.
    pub attention_norm: WeightRef,
    /// Query, key, value and output maps.
    pub q: LinearSpec,
    /// Keys: `[kv_heads · head_dim, width]`.
    pub k: LinearSpec,
    /// Values: `[kv_heads · head_dim, width]`.
    pub v: LinearSpec,
    /// Output: `[width, heads · head_dim]`.
    pub o: LinearSpec,
    /// RMS norm of each query head, before the rotation.
    pub q_norm: Option<WeightRef>,
    /// RMS norm of each key head, before the rotation.
    pub k_norm: Option<WeightRef>,
    /// RMS norm of the attention's output, before it is added to the residual.
    pub post_attention_norm: Option<WeightRef>,
    /// RMS norm before the feed-forward part.
    pub ffn_norm: WeightRef,
    /// The gated half of the feed-forward map.
    pub gate: LinearSpec,
    /// The linear half.
    pub up: LinearSpec,
    /// Back to the model's width.
    pub down: LinearSpec,
    /// RMS norm of the feed-forward output, before it is added to the residual.
    pub post_ffn_norm: Option<WeightRef>,
    /// Index into [`Spec::ropes`]; `None` for layers without rotation.
    pub rope: Option<usize>,
    /// Sliding window: a token sees itself and the `window − 1` before it.
    pub window: Option<usize>,
}

impl LayerSpec {
    /// Its linear maps, in the order in which they are computed.
    pub fn maps(&self) -> [&LinearSpec; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }
}

/// A whole model. See the module's text.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// The family's name, for people (`inspect`, messages): the engine never compares it.
    pub family: String,
    /// Rows of the embedding and of the head.
    pub vocab: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width between the feed-forward maps.
    pub ffn: usize,
    /// Positions the model was trained for.
    pub context: usize,
    /// ε of every RMS norm.
    pub norm_eps: f32,
    /// Factor on the embedded tokens; 1 for most.
    pub embed_scale: f32,
    /// Factor on `q·k`; `1/√head_dim` for most.
    pub attention_scale: f32,
    /// `c·tanh(s/c)` on attention scores.
    pub attention_softcap: Option<f32>,
    /// `c·tanh(z/c)` on logits.
    pub logit_softcap: Option<f32>,
    /// Slopes of ALiBi, one per query head, for families without rotation.
    pub alibi: Option<Vec<f32>>,
    /// The feed-forward activation.
    pub gate: Gate,
    /// The kinds of rotation in use.
    pub ropes: Vec<RopeSpec>,
    /// Token embedding, `[vocab, width]`.
    pub embedding: WeightRef,
    /// The norm before the head.
    pub output_norm: WeightRef,
    /// The head, `[vocab, width]`; the embedding itself when tied.
    pub head: WeightRef,
    /// The layers, first to last.
    pub layers: Vec<LayerSpec>,
}

impl Spec {
    /// The model with these of its layers only, which must exist.
    pub fn with_layers(&self, layers: Range<usize>) -> Spec {
        Spec { layers: self.layers[layers].to_vec(), ..self.clone() }
    }

    /// Floats per position that a layer keeps in the KV cache: keys and values of all heads.
    pub fn kv_width(&self) -> usize {
        2 * self.kv_heads * self.head_dim
    }
}
