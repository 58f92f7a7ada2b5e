//! What all families share: the keys of the sizes and the usual tensor names.
//!
//! Some converters stack matrices that share an input: queries, keys and values in `attn_qkv`, the gate above the other half
//! of the feed-forward map in `ffn_up`. Each part is then described as rows of the one tensor, which stays as it lies in the
//! file; any family may have stored its layers either way.

use kinglet_engine::gguf::{Gguf, TensorInfo};
use kinglet_engine::tape::{Gate, LayerSpec, LinearSpec, RopeSpec, RopeStyle, Spec, WeightRef};
use kinglet_engine::{Error, Result};

/// Limits beyond which a size is a damaged file rather than a model.
const MAX_LAYERS: u32 = 1_024;
const MAX_WIDTH: u32 = 1 << 20;
const MAX_VOCAB: usize = 1 << 24;

/// Keys of one architecture.
pub struct Keys<'a> {
    pub gguf: &'a Gguf,
    arch: &'a str,
}

impl<'a> Keys<'a> {
    pub fn new(gguf: &'a Gguf) -> Result<Keys<'a>> {
        Ok(Keys { gguf, arch: gguf.metadata().str("general.architecture")? })
    }

    /// The full name of a key of this architecture.
    pub fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    pub fn opt_f32(&self, name: &str) -> Result<Option<f32>> {
        let key = self.key(name);
        let value = self.gguf.metadata().opt_f32(&key)?;
        match value {
            Some(v) if !v.is_finite() => Err(self.absurd(&key, v)),
            value => Ok(value),
        }
    }

    pub fn opt_u32(&self, name: &str) -> Result<Option<u32>> {
        self.gguf.metadata().opt_u32(&self.key(name))
    }

    /// A size that must be at least 1 and at most `max`.
    fn size(&self, name: &str, max: u32) -> Result<usize> {
        let key = self.key(name);
        match self.gguf.metadata().u32(&key)? {
            n if (1..=max).contains(&n) => Ok(n as usize),
            n => Err(self.absurd(&key, n)),
        }
    }

    pub fn absurd(&self, key: &str, value: impl std::fmt::Display) -> Error {
        Error::Format {
            file: self.gguf.name().to_string(),
            at: format!("key {key}"),
            what: format!("{value} is not possible here; the file is damaged or of an unknown variant"),
        }
    }

    /// The tensor, if the file has it.
    pub fn opt_tensor(&self, name: &str) -> Option<WeightRef> {
        self.gguf.tensor(name).map(|_| WeightRef::whole(name))
    }

    /// `{name}.weight` with `{name}.bias` where the file has one.
    pub fn linear(&self, name: &str) -> LinearSpec {
        LinearSpec {
            weight: WeightRef::whole(format!("{name}.weight")),
            bias: self.opt_tensor(&format!("{name}.bias")),
        }
    }

    /// Maps of one input: the matrices called `names` or, where the file has not the first of them, the rows of the one
    /// called `stack`, `rows` of it for each.
    fn maps<const N: usize>(
        &self,
        block: &str,
        names: [&str; N],
        stack: &str,
        rows: [usize; N],
    ) -> Result<[LinearSpec; N]> {
        let tensor = |name: &str, kind: &str| format!("{block}.{name}.{kind}");
        let matrix = tensor(stack, "weight");
        let stacked = self.gguf.tensor(&matrix).filter(|_| self.gguf.tensor(&tensor(names[0], "weight")).is_none());
        let Some(info) = stacked else { return Ok(names.map(|name| self.linear(&format!("{block}.{name}")))) };
        let bias = tensor(stack, "bias");
        let bias_len = self.gguf.tensor(&bias).map(TensorInfo::elements);
        let all: usize = rows.iter().sum();
        for (name, found) in [(&matrix, Some(info.rows())), (&bias, bias_len)] {
            if let Some(found) = found.filter(|n| *n != all) {
                return Err(Error::Format {
                    file: self.gguf.name().to_string(),
                    at: format!("tensor {name}"),
                    what: format!("has {found} outputs where {} need {all} together", names.join(", ")),
                });
            }
        }
        let mut first = 0;
        let mut maps = names.map(|name| self.linear(&format!("{block}.{name}")));
        for (map, rows) in maps.iter_mut().zip(rows) {
            let part = |tensor: &str| WeightRef { tensor: tensor.to_string(), rows: Some(first..first + rows) };
            map.weight = part(&matrix);
            if bias_len.is_some() {
                map.bias = Some(part(&bias));
            }
            first += rows;
        }
        Ok(maps)
    }

    /// Rotation by the usual keys.
    pub fn rope(&self, style: RopeStyle, head_dim: usize) -> Result<RopeSpec> {
        let dims = self.opt_u32("rope.dimension_count")?.map_or(head_dim, |n| n as usize);
        if dims == 0 || dims > head_dim || dims % 2 != 0 {
            return Err(self.absurd(&self.key("rope.dimension_count"), dims));
        }
        let base = self.opt_f32("rope.freq_base")?.unwrap_or(10_000.0);
        if base <= 0.0 {
            return Err(self.absurd(&self.key("rope.freq_base"), base));
        }
        Ok(RopeSpec { style, dims, base, scale: self.rope_scale()?, factors: self.rope_factors(dims)?, yarn: None })
    }

    /// Factor on positions of linear scaling. Other kinds of scaling change the attention too and are refused.
    fn rope_scale(&self) -> Result<f32> {
        let key = self.key("rope.scaling.type");
        let factor = match self.opt_f32("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.opt_f32("rope.scale_linear")?,
        };
        match self.gguf.metadata().opt_str(&key)? {
            None | Some("linear") => match factor {
                None => Ok(1.0),
                Some(f) if f > 0.0 => Ok(1.0 / f),
                Some(f) => Err(self.absurd(&self.key("rope.scaling.factor"), f)),
            },
            Some("none") => Ok(1.0),
            Some(other) => Err(Error::Unsupported(format!(
                "{}: key {key}: rotation scaled by {other:?}; known are \"none\" and \"linear\"",
                self.gguf.name()
            ))),
        }
    }

    /// Divisors of the frequencies that some long-context models store as a tensor.
    fn rope_factors(&self, dims: usize) -> Result<Option<Vec<f32>>> {
        let Some(info) = self.gguf.tensor("rope_freqs.weight") else { return Ok(None) };
        let mut factors = vec![0.0; info.width()];
        kinglet_engine::quant::dequantize(info.dtype, self.gguf.data(info), &mut factors)?;
        if factors.len() != dims / 2 || factors.iter().any(|f| !(f.is_finite() && *f > 0.0)) {
            return Err(Error::Format {
                file: self.gguf.name().to_string(),
                at: "tensor rope_freqs.weight".into(),
                what: format!("needs {} positive factors, one per pair of rotated components", dims / 2),
            });
        }
        Ok(Some(factors))
    }

    /// The plain pre-norm decoder that most families are, with tensor names as GGUF files have them.
    pub fn decoder(&self, style: RopeStyle) -> Result<Spec> {
        let width = self.size("embedding_length", MAX_WIDTH)?;
        let layers = self.size("block_count", MAX_LAYERS)?;
        let heads = self.size("attention.head_count", MAX_WIDTH)?;
        let kv_heads = match self.opt_u32("attention.head_count_kv")? {
            None => heads,
            Some(_) => self.size("attention.head_count_kv", MAX_WIDTH)?,
        };
        if heads % kv_heads != 0 {
            return Err(self.absurd(&self.key("attention.head_count_kv"), kv_heads));
        }
        let head_dim = match self.opt_u32("attention.key_length")? {
            Some(_) => self.size("attention.key_length", MAX_WIDTH)?,
            None if width % heads == 0 => width / heads,
            None => return Err(self.absurd(&self.key("attention.head_count"), heads)),
        };
        if let Some(n) = self.opt_u32("attention.value_length")?
            && n as usize != head_dim
        {
            return Err(Error::Unsupported(format!(
                "{}: values of {n} elements per head beside keys of {head_dim}",
                self.gguf.name()
            )));
        }
        let ffn = self.size("feed_forward_length", MAX_WIDTH)?;
        let embedding = "token_embd.weight";
        let vocab = self.gguf.tensor(embedding).map_or(0, |t| t.rows());
        if !(1..=MAX_VOCAB).contains(&vocab) {
            return Err(Error::Format {
                file: self.gguf.name().to_string(),
                at: format!("tensor {embedding}"),
                what: "is missing or has an absurd number of rows; the file is incomplete".into(),
            });
        }
        let norm_eps = self.gguf.metadata().f32(&self.key("attention.layer_norm_rms_epsilon"))?;
        if !(norm_eps.is_finite() && norm_eps >= 0.0) {
            return Err(self.absurd(&self.key("attention.layer_norm_rms_epsilon"), norm_eps));
        }
        Ok(Spec {
            family: self.arch.to_string(),
            vocab,
            width,
            heads,
            kv_heads,
            head_dim,
            ffn,
            context: self.size("context_length", u32::MAX)?,
            norm_eps,
            embed_scale: 1.0,
            attention_scale: 1.0 / (head_dim as f32).sqrt(),
            attention_softcap: None,
            logit_softcap: None,
            alibi: None,
            gate: Gate::Silu,
            ropes: vec![self.rope(style, head_dim)?],
            embedding: WeightRef::whole(embedding),
            output_norm: WeightRef::whole("output_norm.weight"),
            head: self.opt_tensor("output.weight").unwrap_or_else(|| WeightRef::whole(embedding)),
            layers: (0..layers)
                .map(|i| self.layer(i, [heads * head_dim, kv_heads * head_dim], ffn))
                .collect::<Result<_>>()?,
        })
    }

    /// Layer `index`, whose queries and keys have `outputs` elements together.
    fn layer(&self, index: usize, outputs: [usize; 2], ffn: usize) -> Result<LayerSpec> {
        let block = format!("blk.{index}");
        let norm = |part: &str| WeightRef::whole(format!("{block}.{part}.weight"));
        let [q_rows, kv_rows] = outputs;
        let [q, k, v] = self.maps(&block, ["attn_q", "attn_k", "attn_v"], "attn_qkv", [q_rows, kv_rows, kv_rows])?;
        let [gate, up] = self.maps(&block, ["ffn_gate", "ffn_up"], "ffn_up", [ffn, ffn])?;
        Ok(LayerSpec {
            attention_norm: norm("attn_norm"),
            q,
            k,
            v,
            o: self.linear(&format!("{block}.attn_output")),
            q_norm: None,
            k_norm: None,
            post_attention_norm: None,
            ffn_norm: norm("ffn_norm"),
            gate,
            up,
            down: self.linear(&format!("{block}.ffn_down")),
            post_ffn_norm: None,
            rope: Some(0),
            window: None,
        })
    }
}

/// Adds the norms of query and key heads that some families have.
pub fn with_head_norms(spec: &mut Spec) {
    for (i, layer) in spec.layers.iter_mut().enumerate() {
        layer.q_norm = Some(WeightRef::whole(format!("blk.{i}.attn_q_norm.weight")));
        layer.k_norm = Some(WeightRef::whole(format!("blk.{i}.attn_k_norm.weight")));
    }
}

/// Adds the norms behind attention and feed-forward part that some families have.
pub fn with_post_norms(spec: &mut Spec) {
    for (i, layer) in spec.layers.iter_mut().enumerate() {
        layer.post_attention_norm = Some(WeightRef::whole(format!("blk.{i}.post_attention_norm.weight")));
        layer.post_ffn_norm = Some(WeightRef::whole(format!("blk.{i}.post_ffw_norm.weight")));
    }
}
