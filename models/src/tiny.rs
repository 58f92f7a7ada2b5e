//! Tiny models with random weights, of every architecture and tensor type, for tests that may need no download.
//!
//! A tiny model is a valid GGUF file: it has the metadata and the tensors that converters write for its architecture,
//! so llama.cpp loads it too and logits can be compared where no real weights are at hand. What distinguishes
//! architectures here is data ([`Family`]), kept apart from `families`, which reads models: a test that writes and reads
//! with the same table would prove nothing.
//!
//! The weights follow from the seed and the tensor's name alone, by integer arithmetic and a few exactly rounded
//! operations, so a model is the same on every machine, whatever else it contains. Linear maps are scaled by
//! `1 / sqrt(inputs)`, so that activations keep their size through any number of layers.

use std::path::Path;

use kinglet_engine::gguf::{TensorWriter, Value, Writer};
use kinglet_engine::quant::{DType, quantize};
use kinglet_engine::{Error, Result};

mod tokens;

/// What vocabulary the model has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TinyTokenizer {
    /// None: token ids only.
    #[default]
    NoVocab,
    /// Byte-level BPE with a few merges, ChatML's special tokens and a ChatML template: any text can be encoded, chats
    /// can be rendered.
    Bpe,
}

/// The shape of a tiny model. [`TinyConfig::new`] gives one that is right for the architecture.
#[derive(Clone, Debug)]
pub struct TinyConfig {
    /// The architecture's name in GGUF, one of [`TinyConfig::architectures`].
    pub arch: String,
    /// Decoder layers.
    pub layers: u32,
    /// Elements of the residual stream.
    pub width: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Elements of a head; even.
    pub head_dim: u32,
    /// Inner elements of the feed-forward part.
    pub ffn: u32,
    /// Tokens. With [`TinyTokenizer::Bpe`] those that have no meaning are marked unused.
    pub vocab: u32,
    /// Longest context, in tokens.
    pub context: u32,
    /// Window of the sliding-window layers, in tokens, where the architecture has them.
    pub sliding_window: u32,
    /// Whether the embedding serves as the output layer too.
    pub tied: bool,
    /// Type of the linear maps.
    pub dtype: DType,
    /// Type of the embedding and the output layer.
    pub embedding: DType,
    /// Determines the weights.
    pub seed: u64,
    /// The vocabulary.
    pub tokenizer: TinyTokenizer,
}

/// How query, key and value are stored.
#[derive(Clone, Copy, PartialEq)]
enum Qkv {
    Separate,
    /// One matrix with the rows of all three.
    Fused,
}

/// How the gate of the feed-forward part is stored.
#[derive(Clone, Copy, PartialEq)]
enum Gate {
    Separate,
    /// In the first rows of `ffn_up`.
    Fused,
}

/// What a converter writes for an architecture.
struct Family {
    arch: &'static str,
    qkv: Qkv,
    qkv_bias: bool,
    /// Norms of each query and key head.
    qk_norm: bool,
    /// Norms after attention and after the feed-forward part.
    post_norms: bool,
    gate: Gate,
    tied: bool,
    /// Whether it may be the other way round.
    tied_is_fixed: bool,
    /// Whether `heads × head_dim` may differ from the width; then the head's size is in the metadata.
    free_head_dim: bool,
    sliding_window: bool,
    /// The part of a head that is rotated, in halves.
    rope_halves: u32,
    rope_base: f32,
    layers: u32,
    /// Further keys, after the architecture's name.
    keys: &'static [(&'static str, f32)],
}

const PLAIN: Family = Family {
    arch: "llama",
    qkv: Qkv::Separate,
    qkv_bias: false,
    qk_norm: false,
    post_norms: false,
    gate: Gate::Separate,
    tied: false,
    tied_is_fixed: false,
    free_head_dim: true,
    sliding_window: false,
    rope_halves: 2,
    rope_base: 10_000.0,
    layers: 2,
    keys: &[],
};

const FAMILIES: &[Family] = &[
    PLAIN,
    Family { arch: "qwen2", qkv_bias: true, free_head_dim: false, rope_base: 1e6, ..PLAIN },
    Family { arch: "qwen3", qk_norm: true, rope_base: 1e6, ..PLAIN },
    Family { arch: "gemma", tied: true, tied_is_fixed: true, ..PLAIN },
    Family {
        arch: "gemma2",
        post_norms: true,
        tied: true,
        tied_is_fixed: true,
        sliding_window: true,
        keys: &[("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)],
        ..PLAIN
    },
    // Every sixth layer sees all of the context.
    Family {
        arch: "gemma3",
        qk_norm: true,
        post_norms: true,
        tied: true,
        sliding_window: true,
        rope_base: 1e6,
        layers: 6,
        ..PLAIN
    },
    // llama.cpp rotates Baichuan's heads where there are 32 layers (7B) and uses ALiBi where there are 40 (13B).
    Family { arch: "baichuan", tied_is_fixed: true, free_head_dim: false, layers: 32, ..PLAIN },
    Family { arch: "internlm2", tied_is_fixed: true, free_head_dim: false, rope_base: 1e6, ..PLAIN },
    Family {
        arch: "chatglm",
        qkv: Qkv::Fused,
        qkv_bias: true,
        gate: Gate::Fused,
        free_head_dim: false,
        rope_halves: 1,
        ..PLAIN
    },
    Family { arch: "glm4", qkv_bias: true, post_norms: true, gate: Gate::Fused, rope_halves: 1, ..PLAIN },
    Family { arch: "phi3", qkv: Qkv::Fused, gate: Gate::Fused, free_head_dim: false, ..PLAIN },
];

impl TinyConfig {
    /// A model of architecture `arch` of about half a megabyte in `F32`: width 64, 4 heads, 256 tokens. An unknown `arch` is
    /// refused by [`write_tiny`].
    pub fn new(arch: &str) -> TinyConfig {
        let family = FAMILIES.iter().find(|f| f.arch == arch).unwrap_or(&PLAIN);
        TinyConfig {
            arch: arch.into(),
            layers: family.layers,
            width: 64,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            ffn: 128,
            vocab: 256,
            context: 512,
            sliding_window: 8,
            tied: family.tied,
            dtype: DType::F32,
            embedding: DType::F32,
            seed: 1,
            tokenizer: TinyTokenizer::NoVocab,
        }
    }

    /// The same with all matrices of type `dtype`; where its blocks are longer than the rows, the model grows until
    /// they fit.
    pub fn with_dtype(mut self, dtype: DType) -> TinyConfig {
        (self.dtype, self.embedding) = (dtype, dtype);
        let block = dtype.block_len() as u32;
        if !self.width.is_multiple_of(block) {
            self.width = self.width.next_multiple_of(block);
            self.head_dim = self.width / self.heads.max(1);
        }
        self.ffn = self.ffn.next_multiple_of(block);
        self
    }

    /// The same with a byte-level vocabulary and a chat template.
    pub fn with_bpe(mut self) -> TinyConfig {
        self.tokenizer = TinyTokenizer::Bpe;
        self.vocab = self.vocab.max(tokens::COUNT.next_multiple_of(64));
        self
    }

    /// The architectures that can be written.
    pub fn architectures() -> impl Iterator<Item = &'static str> {
        FAMILIES.iter().map(|f| f.arch)
    }

    fn family(&self) -> Result<&'static Family> {
        FAMILIES.iter().find(|f| f.arch == self.arch).ok_or_else(|| {
            let known: Vec<_> = TinyConfig::architectures().collect();
            Error::argument(format!("no tiny model of architecture {:?}; known: {}", self.arch, known.join(", ")))
        })
    }

    /// Checks what the tensor table does not.
    fn check(&self, family: &Family) -> Result<()> {
        let rules = [
            (self.layers > 0 && self.vocab > 0 && self.context > 0, "layers, vocab and context are at least 1"),
            (self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads), "kv_heads divides heads"),
            (self.head_dim > 0 && self.head_dim.is_multiple_of(4), "head_dim is a multiple of 4"),
            (
                family.free_head_dim || self.heads.checked_mul(self.head_dim) == Some(self.width),
                "heads × head_dim is the width in this architecture",
            ),
            (
                !family.tied_is_fixed || self.tied == family.tied,
                "whether the output is tied is fixed in this architecture",
            ),
            (!family.sliding_window || self.sliding_window > 0, "sliding_window is at least 1"),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            Some((_, rule)) => Err(Error::argument(format!("tiny {} model: {rule}", self.arch))),
            None => Ok(()),
        }
    }
}

/// Writes a tiny model to `path`, atomically.
///
/// # Errors
/// [`Error::Argument`] where the shape is impossible: an unknown architecture, heads that do not divide, rows that are
/// no whole number of blocks, a vocabulary too small for the tokenizer. [`Error::Io`].
pub fn write_tiny(path: impl AsRef<Path>, config: &TinyConfig) -> Result<()> {
    let mut writer = Writer::new();
    for (key, value) in metadata_of(config)? {
        writer.set(&key, value);
    }
    match config.tokenizer {
        TinyTokenizer::NoVocab => {
            writer.set("tokenizer.ggml.model", "no_vocab");
        }
        TinyTokenizer::Bpe => tokens::write(&mut writer, config)?,
    }
    write_tensors(writer, config, First::Test, path)
}

/// The keys of a model of this shape, which is checked; without those of a tokenizer.
pub(crate) fn metadata_of(config: &TinyConfig) -> Result<Vec<(String, Value)>> {
    let family = config.family()?;
    config.check(family)?;
    Ok(metadata(config, family))
}

/// Writes the file whose keys are in `writer`, with random tensors.
pub(crate) fn write_tensors(
    mut writer: Writer,
    config: &TinyConfig,
    first: First,
    path: impl AsRef<Path>,
) -> Result<()> {
    let tensors = tensors(config, config.family()?);
    for t in &tensors {
        writer.tensor(&t.name, t.dtype, &t.shape)?;
    }
    let mut file = writer.create(path)?;
    for t in &tensors {
        t.write(&mut file, config.seed, first)?;
    }
    file.finish()?;
    Ok(())
}

/// The keys of the architecture.
fn metadata(c: &TinyConfig, f: &Family) -> Vec<(String, Value)> {
    // The name leaves the architecture out: llama.cpp treats tokens differently where the name says "phi3".
    let mut keys: Vec<(String, Value)> = vec![
        ("general.architecture".into(), f.arch.into()),
        ("general.name".into(), format!("tiny random {}", c.dtype).into()),
        ("general.quantization_version".into(), 2u32.into()),
    ];
    let mut own = |key: &str, value: Value| keys.push((format!("{}.{key}", f.arch), value));
    own("block_count", c.layers.into());
    own("context_length", c.context.into());
    own("embedding_length", c.width.into());
    own("feed_forward_length", c.ffn.into());
    own("attention.head_count", c.heads.into());
    own("attention.head_count_kv", c.kv_heads.into());
    own("attention.layer_norm_rms_epsilon", 1e-5f32.into());
    own("vocab_size", c.vocab.into());
    own("rope.freq_base", f.rope_base.into());
    own("rope.dimension_count", (c.head_dim / 2 * f.rope_halves).into());
    if f.free_head_dim {
        own("attention.key_length", c.head_dim.into());
        own("attention.value_length", c.head_dim.into());
    }
    if f.sliding_window {
        own("attention.sliding_window", c.sliding_window.into());
    }
    for &(key, value) in f.keys {
        own(key, value.into());
    }
    if f.arch == "phi3" {
        own("rope.scaling.original_context_length", c.context.into());
    }
    keys
}

/// What first values are for.
#[derive(Clone, Copy)]
pub(crate) enum First {
    /// Tests: nothing is 0 or 1, so that nothing can be forgotten without being noticed.
    Test,
    /// Training: matrices of one deviation, norms of 1, no biases.
    Training { deviation: f32 },
}

/// What a tensor's values are drawn from.
#[derive(Clone, Copy)]
enum Init {
    /// Normal around 0.
    Normal { deviation: f32 },
    /// Normal around 1: a norm's gain.
    Gain,
}

struct Tensor {
    name: String,
    dtype: DType,
    shape: Vec<u64>,
    init: Init,
}

/// The tensors in the order in which converters write them.
fn tensors(c: &TinyConfig, f: &Family) -> Vec<Tensor> {
    let (width, head, ffn, vocab) = (u64::from(c.width), u64::from(c.head_dim), u64::from(c.ffn), u64::from(c.vocab));
    let (q, kv) = (head * u64::from(c.heads), head * u64::from(c.kv_heads));
    let fan_in = |inputs: u64| 1.0 / (inputs as f32).sqrt();
    let matrix = |name: &str, dtype: DType, inputs: u64, outputs: u64, deviation: f32| Tensor {
        name: format!("{name}.weight"),
        dtype,
        shape: vec![inputs, outputs],
        init: Init::Normal { deviation },
    };
    let norm = |name: &str, len: u64| Tensor {
        name: format!("{name}.weight"),
        dtype: DType::F32,
        shape: vec![len],
        init: Init::Gain,
    };
    let bias = |name: &str, len: u64| Tensor {
        name: format!("{name}.bias"),
        dtype: DType::F32,
        shape: vec![len],
        init: Init::Normal { deviation: 0.25 },
    };

    // A tied embedding is also a linear map with `width` inputs. Every norm that follows hides the difference.
    let mut all = vec![matrix("token_embd", c.embedding, width, vocab, if c.tied { fan_in(width) } else { 1.0 })];
    for layer in 0..c.layers {
        let own = |name: &str| format!("blk.{layer}.{name}");
        let linear =
            |name: &str, inputs: u64, outputs: u64| matrix(&own(name), c.dtype, inputs, outputs, fan_in(inputs));
        all.push(norm(&own("attn_norm"), width));
        let projections: &[(&str, u64)] = match f.qkv {
            Qkv::Separate => &[("attn_q", q), ("attn_k", kv), ("attn_v", kv)],
            Qkv::Fused => &[("attn_qkv", q + 2 * kv)],
        };
        for &(name, outputs) in projections {
            all.push(linear(name, width, outputs));
            if f.qkv_bias {
                all.push(bias(&own(name), outputs));
            }
        }
        if f.qk_norm {
            all.extend([norm(&own("attn_q_norm"), head), norm(&own("attn_k_norm"), head)]);
        }
        all.push(linear("attn_output", q, width));
        if f.post_norms {
            all.push(norm(&own("post_attention_norm"), width));
        }
        all.push(norm(&own("ffn_norm"), width));
        match f.gate {
            Gate::Separate => all.extend([linear("ffn_gate", width, ffn), linear("ffn_up", width, ffn)]),
            Gate::Fused => all.push(linear("ffn_up", width, 2 * ffn)),
        }
        all.push(linear("ffn_down", ffn, width));
        if f.post_norms {
            all.push(norm(&own("post_ffw_norm"), width));
        }
    }
    all.push(norm("output_norm", width));
    if !c.tied {
        all.push(matrix("output", c.embedding, width, vocab, fan_in(width)));
    }
    all
}

impl Tensor {
    fn write(&self, file: &mut TensorWriter, seed: u64, first: First) -> Result<()> {
        let mut random = Random::new(seed, &self.name);
        let width = self.shape.first().copied().unwrap_or(1) as usize;
        let mut row = vec![0.0f32; width];
        for _ in 0..self.shape.iter().skip(1).product::<u64>() {
            row.iter_mut().for_each(|x| {
                *x = match (first, self.init) {
                    (First::Test, Init::Normal { deviation }) => deviation * random.normal(),
                    (First::Test, Init::Gain) => 1.0 + 0.1 * random.normal(),
                    (First::Training { .. }, Init::Gain) => 1.0,
                    (First::Training { .. }, Init::Normal { .. }) if self.shape.len() == 1 => 0.0,
                    (First::Training { deviation }, Init::Normal { .. }) => deviation * random.normal(),
                }
            });
            file.write(&self.name, &quantize(self.dtype, &row)?)?;
        }
        Ok(())
    }
}

/// Random numbers of one tensor: SplitMix64 (Steele, Lea and Flood 2014), started from the seed and the name (FNV-1a).
struct Random(u64);

impl Random {
    fn new(seed: u64, name: &str) -> Random {
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let mut random = Random(hash ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        random.next();
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Nearly normal with deviation 1: the sum of four uniform numbers. It needs no library function, whose last bit
    /// differs from system to system.
    fn normal(&mut self) -> f32 {
        let z = self.next();
        let sum: i64 = [0, 16, 32, 48].into_iter().map(|shift| (z >> shift & 0xffff) as i64).sum();
        // Each has the mean 32767.5 and the variance 65536² / 12.
        (sum - 131_070) as f32 * (1.732_050_8 / 65_536.0)
    }
}

#[cfg(test)]
mod tests;
