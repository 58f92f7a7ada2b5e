//! Operands of the larger ops of learning: adapters, their dropout and learned lengths, and what attention's gradient
//! needs. Shapes as in [`op`](super::op).

use super::op::{ParamId, Value, WeightId};

/// `out = mask ∘ x / (1 − rate)`, the mask drawn anew for each run: an adapter's input in training (Srivastava et al.
/// 2014). Which elements fall follows from the run's seed, the map and the element's place, so that a layer which is
/// computed again loses the same ones.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// `[T, in]`.
    pub x: Value,
    /// Hash of the adapted weight's name.
    pub stream: u64,
    /// Share of the elements that become zero.
    pub rate: f32,
    /// `[T, in]`.
    pub out: Value,
}

/// `out = magnitude/norms ∘ y + bias + residual`: what gives the rows of an adapted matrix the lengths that are learned
/// (DoRA, arXiv:2402.09353). The norms count as constants in the gradient, as they do in the paper (§4.3).
#[derive(Clone, Copy, Debug)]
pub struct Rescale {
    /// The map's output with the adapter and without bias, `[T, out]`.
    pub y: Value,
    /// `[1, out]`.
    pub magnitude: ParamId,
    /// Lengths of the matrix' rows before, `[1, out]`; where one is 0, so is the result.
    pub norms: Value,
    /// `[out]`.
    pub bias: Option<WeightId>,
    /// `[T, out]`.
    pub residual: Option<Value>,
    /// `[T, out]`.
    pub out: Value,
}

/// `out = y + scale·h·Bᵀ` with `h = x·Aᵀ`: a low-rank adapter behind a linear map.
#[derive(Clone, Copy, Debug)]
pub struct Lora {
    /// Input of the map, `[T, in]`.
    pub x: Value,
    /// Its output without the adapter, `[T, out]`.
    pub y: Value,
    /// `[r, in]`.
    pub a: ParamId,
    /// `[out, r]`.
    pub b: ParamId,
    /// `α/r`.
    pub scale: f32,
    /// `[T, r]`, out.
    pub h: Value,
    /// `[T, out]`, out.
    pub out: Value,
}

/// `out = x + scale·B[token]·A`: a low-rank adapter of the embedding.
#[derive(Clone, Copy, Debug)]
pub struct EmbedLora {
    /// The embedded tokens, `[T, width]`.
    pub x: Value,
    /// `[r, width]`.
    pub a: ParamId,
    /// `[vocab, r]`.
    pub b: ParamId,
    /// `α/r`, times the embedding's own factor.
    pub scale: f32,
    /// `[T, width]`.
    pub out: Value,
}

/// `h = x·Aᵀ`: the first half of the head's adapter. The second half is computed with the logits, chunk by chunk.
#[derive(Clone, Copy, Debug)]
pub struct LoraHidden {
    /// `[S, width]`.
    pub x: Value,
    /// `[r, width]`.
    pub a: ParamId,
    /// `[S, r]`.
    pub h: Value,
}

/// What the head's adapter does to logits: `z = ratio ∘ (z + scale·h·Bᵀ)`, with `ratio` as in [`Rescale`] if there is one.
#[derive(Clone, Copy, Debug)]
pub struct HeadLora {
    /// `[S, r]`.
    pub h: Value,
    /// `[vocab, r]`.
    pub b: ParamId,
    /// `α/r`.
    pub scale: f32,
    /// Magnitude and norms, `[1, vocab]` each.
    pub rescale: Option<(ParamId, Value)>,
}

impl HeadLora {
    pub(super) fn reads(&self) -> impl Iterator<Item = Value> + use<> {
        [self.h].into_iter().chain(self.rescale.map(|(_, norms)| norms))
    }
}

/// Gradient of [`Lora`]: `e = scale·dy·B`, `out = dx + e·A`, `dB += scale·dyᵀ·h`, `dA += eᵀ·x`.
#[derive(Clone, Copy, Debug)]
pub struct LoraBackward {
    /// The forward op.
    pub forward: Lora,
    /// Gradient of the output, `[T, out]`.
    pub dy: Value,
    /// Gradient of the input so far, `[T, in]`.
    pub dx: Option<Value>,
    /// `[T, r]`, out.
    pub e: Value,
    /// Gradient of the input with the adapter's part, out; none when nobody needs it.
    pub out: Option<Value>,
}

/// Gradient of [`Attention`](super::op::Attention) over the run's own keys and values.
#[derive(Clone, Copy, Debug)]
pub struct AttentionBackward {
    /// Rotated queries, keys, and values.
    pub qkv: [Value; 3],
    /// The attention's output.
    pub out: Value,
    /// Log-sum-exp of the scores.
    pub lse: Value,
    /// Gradient of the output.
    pub d_out: Value,
    /// Gradients of queries, keys and values, out.
    pub d_qkv: [Value; 3],
    /// Sliding window.
    pub window: Option<usize>,
}
