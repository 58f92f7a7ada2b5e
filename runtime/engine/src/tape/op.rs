//! Values and operations.
//!
//! A value is a matrix of f32 with a run-time number of rows and a fixed width; it is written by exactly one op.
//! Shapes in the comments are `[rows, width]`, T the rows of a run (tokens), S the rows whose logits are wanted. What the
//! larger ops of learning consist of is in `op_learn`.

use std::collections::BTreeSet;

use super::op_learn::{AttentionBackward, Dropout, EmbedLora, HeadLora, Lora, LoraBackward, LoraHidden, Rescale};
use super::spec::Spec;

/// A value of the tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(pub u32);

/// A weight of the model: an index into the table of [`Weights`](super::Weights).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightId(pub u32);

/// A trained matrix: an index into the tape's [`Tape::params`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(pub u32);

/// A trained matrix, f32, row-major, in one flat vector with all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// The weight it adapts, with `.lora_a`, `.lora_b` or `.lora_magnitude` behind it; or the weight that it is.
    pub name: String,
    /// `[rows, width]`.
    pub rows: usize,
    /// Elements per row.
    pub width: usize,
    /// First element in the flat vector.
    pub offset: usize,
}

impl Param {
    /// Where the next matrix begins in the flat vector.
    pub fn end(&self) -> usize {
        self.offset + self.rows * self.width
    }
}

/// What the number of rows of a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rows {
    /// One per token of the run.
    Tokens,
    /// One per token whose logits were asked for.
    Outputs,
    /// A single one: what belongs to a weight and not to tokens.
    One,
}

/// Shape and name of a value.
#[derive(Clone, Debug)]
pub struct ValueInfo {
    /// Number of rows.
    pub rows: Rows,
    /// Floats per row.
    pub width: usize,
    /// For tables and messages, such as `blk.3 ffn`.
    pub name: String,
    /// Whether a quantized linear map reads it, so that backends with integer kernels keep an 8-bit form beside it.
    pub quantized: bool,
}

/// One of the matrices that share a linear op's input.
#[derive(Clone, Debug)]
pub struct Part {
    /// `[out, in]`.
    pub weight: WeightId,
    /// `[out]`.
    pub bias: Option<WeightId>,
    /// `[rows, out]`.
    pub out: Value,
}

/// What is done with a linear op's results while they are at hand.
#[derive(Clone, Debug)]
pub enum Epilogue {
    /// Nothing.
    None,
    /// `out = residual + W·x` (one part).
    Add(Value),
    /// `out = act(part 0) ∘ part 1` (two parts of equal width).
    Gated(super::Gate, Value),
}

/// One or several linear maps of the same input: `part.out = x·Wᵀ + b`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[rows, in]`.
    pub x: Value,
    /// The matrices.
    pub parts: Vec<Part>,
    /// The epilogue.
    pub epilogue: Epilogue,
}

/// Head norm and rotation of queries and keys; keys and values then enter the cache.
#[derive(Clone, Copy, Debug)]
pub struct Rope {
    /// `[T, heads·D]`, in.
    pub q: Value,
    /// `[T, kv_heads·D]`, in.
    pub k: Value,
    /// `[T, kv_heads·D]`, in.
    pub v: Value,
    /// Rotated queries, out.
    pub q_out: Value,
    /// Rotated keys, out.
    pub k_out: Value,
    /// Norm of each query head, `[D]`.
    pub q_norm: Option<WeightId>,
    /// Norm of each key head, `[D]`.
    pub k_norm: Option<WeightId>,
    /// Index into the spec's rotations.
    pub rope: Option<usize>,
    /// The layer whose cache receives keys and values; none in training, where attention reads the values themselves.
    pub cache: Option<usize>,
}

/// Where attention finds keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvSource {
    /// In the cache of a layer: all positions of the sequence up to the row's own.
    Cache(usize),
    /// In the run itself: `[T, kv_heads·D]` each.
    Rows(Value, Value),
}

/// Causal attention, online softmax.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Rotated queries `[T, heads·D]`.
    pub q: Value,
    /// `[T, heads·D]`.
    pub out: Value,
    /// Keys and values.
    pub kv: KvSource,
    /// Log-sum-exp of the scores, `[T, heads]`, for the gradient.
    pub lse: Option<Value>,
    /// Sliding window.
    pub window: Option<usize>,
}

/// An operation.
#[derive(Clone, Debug)]
pub enum Op {
    /// `out` is what the run is given: the residual stream, where a tape does not begin with tokens.
    Input {
        /// `[T, width]`.
        out: Value,
    },
    /// `out[t] = scale · E[token t]`.
    Embed {
        /// `[vocab, width]`.
        table: WeightId,
        /// Factor.
        scale: f32,
        /// `[T, width]`.
        out: Value,
    },
    /// `out = x/√(mean x² + ε) ∘ w`, row by row.
    RmsNorm {
        /// Input.
        x: Value,
        /// `[width]`.
        weight: WeightId,
        /// Output.
        out: Value,
    },
    /// `out = x + y/√(mean y² + ε) ∘ w`.
    AddRmsNorm {
        /// The residual.
        x: Value,
        /// What is normed and added.
        y: Value,
        /// `[width]`.
        weight: WeightId,
        /// Output.
        out: Value,
    },
    /// Linear maps.
    Linear(Linear),
    /// Rotation and cache write.
    Rope(Rope),
    /// Attention.
    Attention(Attention),
    /// `out[s] = x[output row s]`.
    GatherOutputs {
        /// `[T, width]`.
        x: Value,
        /// `[S, width]`.
        out: Value,
    },
    /// `logits = cap(x·Wᵀ)`, `[S, vocab]`.
    Head {
        /// `[S, width]`.
        x: Value,
        /// `[vocab, width]`.
        weight: WeightId,
        /// `[S, vocab]`.
        out: Value,
    },
    /// `out = act(gate) ∘ up`.
    Gated {
        /// Activation.
        kind: super::Gate,
        /// `[T, ffn]`.
        gate: Value,
        /// `[T, ffn]`.
        up: Value,
        /// `[T, ffn]`.
        out: Value,
    },
    /// A low-rank adapter.
    Lora(Lora),
    /// Gradient of a low-rank adapter.
    LoraBackward(LoraBackward),
    /// A low-rank adapter of the embedding.
    EmbedLora(EmbedLora),
    /// Gradient of [`Op::EmbedLora`]: `e = scale·dy·Aᵀ`, `dB[token t] += e[t]`, `dA += scale·Σ B[token t]ᵀ·dy[t]`.
    EmbedLoraBackward {
        /// The forward op.
        forward: EmbedLora,
        /// `[T, width]`.
        dy: Value,
        /// `[T, r]`, out.
        e: Value,
    },
    /// First half of the head's adapter.
    LoraHidden(LoraHidden),
    /// Its gradient: `out = dx + e·A`, `dA += eᵀ·x`.
    LoraHiddenBackward {
        /// The forward op.
        forward: LoraHidden,
        /// Gradient of `h`, `[S, r]`.
        e: Value,
        /// Gradient of the input so far.
        dx: Option<Value>,
        /// Gradient of the input.
        out: Value,
    },
    /// Random zeros in an adapter's input.
    Dropout(Dropout),
    /// Gradient of dropout: `out = dx + mask ∘ dy / (1 − rate)`.
    DropoutBackward {
        /// The forward op.
        forward: Dropout,
        /// Gradient of its output.
        dy: Value,
        /// Gradient of its input so far.
        dx: Option<Value>,
        /// Gradient of its input.
        out: Value,
    },
    /// `out[o] = ‖W[o] + scale·B[o]·A‖`.
    RowNorms {
        /// `[out, in]`.
        weight: WeightId,
        /// `[r, in]`.
        a: ParamId,
        /// `[out, r]`.
        b: ParamId,
        /// `α/r`.
        scale: f32,
        /// `[1, out]`.
        out: Value,
    },
    /// Learned lengths of a matrix' rows.
    Rescale(Rescale),
    /// Gradient of [`Op::Rescale`]: `out = magnitude/norms ∘ dy`, `d magnitude += Σ dy ∘ y/norms`.
    RescaleBackward {
        /// The forward op.
        forward: Rescale,
        /// Gradient of its output.
        dy: Value,
        /// Gradient of `y`, out.
        out: Value,
    },
    /// Gradient of linear maps with respect to their common input: `out = dx + Σ dy·W`.
    LinearBackward {
        /// Gradients of the outputs, with the matrices.
        parts: Vec<(Value, WeightId)>,
        /// Gradient of the input so far.
        dx: Option<Value>,
        /// `[T, in]`.
        out: Value,
    },
    /// Gradient of linear maps with respect to trained matrices and biases: `dW += dyᵀ·x`, `db += Σ dy`.
    LinearWeightBackward {
        /// The maps' input, `[rows, in]`.
        x: Value,
        /// Gradients of the outputs, with the matrices and biases.
        parts: Vec<(Value, WeightId, Option<WeightId>)>,
    },
    /// Gradient of an RMS norm with respect to its trained weight: `dw += Σ dy ∘ x/√(mean x² + ε)`.
    RmsNormWeightBackward {
        /// The norm's input.
        x: Value,
        /// Its weight.
        weight: WeightId,
        /// Gradient of its output.
        dy: Value,
    },
    /// Gradient of trained head norms.
    HeadNormWeightBackward {
        /// The forward op.
        forward: Rope,
        /// Gradients of the rotated queries and keys.
        d: [Value; 2],
    },
    /// Gradient of a trained embedding: `dE[token t] += scale · dy[t]`.
    EmbedBackward {
        /// `[vocab, width]`.
        table: WeightId,
        /// Factor.
        scale: f32,
        /// `[T, width]`.
        dy: Value,
    },
    /// Gradient of an RMS norm: `out = dx + …`.
    RmsNormBackward {
        /// The norm's input.
        x: Value,
        /// Its weight.
        weight: WeightId,
        /// Gradient of its output.
        dy: Value,
        /// Gradient of its input so far.
        dx: Option<Value>,
        /// Gradient of its input, with the norm's part.
        out: Value,
    },
    /// Gradient of a gated activation.
    GatedBackward {
        /// Activation.
        kind: super::Gate,
        /// `[T, ffn]`.
        gate: Value,
        /// `[T, ffn]`.
        up: Value,
        /// Gradient of the output.
        dy: Value,
        /// Gradient of the gate, out.
        d_gate: Value,
        /// Gradient of the other half, out.
        d_up: Value,
    },
    /// Gradient of attention.
    AttentionBackward(AttentionBackward),
    /// Gradient of the rotation and the head norms: turns `dq` and `dk` back.
    RopeBackward {
        /// The forward op.
        forward: Rope,
        /// Gradients of the rotated queries and keys.
        d: [Value; 2],
        /// Gradients of the queries and keys, out.
        out: [Value; 2],
    },
    /// `out[output row s] = x[s]`, zero elsewhere.
    ScatterOutputs {
        /// `[S, width]`.
        x: Value,
        /// `[T, width]`.
        out: Value,
    },
    /// Cross-entropy and its gradient in one: `out` as in [`Op::CrossEntropy`], and `dx[s] = dz[s]·W` with
    /// `dz[s] = g[s]·(softmax(z) − onehot(target s))`, `g` being the run's weight of the row. A target may be a distribution
    /// in place of the one token ([`SoftTargets`](super::SoftTargets)), unless the head is trained. Where it is,
    /// `dW += dzᵀ·x`; with an adapter `e = scale·dz·B` and `dB += scale·dzᵀ·h`.
    CrossEntropyGrad {
        /// `[S, width]`.
        x: Value,
        /// `[vocab, width]`.
        weight: WeightId,
        /// `[S, 1]`.
        out: Value,
        /// `[S, width]`, out.
        dx: Value,
        /// The head's adapter, and the gradient of its hidden values, `[S, r]`, out.
        lora: Option<(HeadLora, Value)>,
    },
    /// `out[s] = log-sum-exp(z) − z[target s]` with `z = cap(x[s]·Wᵀ)`, without keeping the logits.
    CrossEntropy {
        /// `[S, width]`.
        x: Value,
        /// `[vocab, width]`.
        weight: WeightId,
        /// `[S, 1]`: nats.
        out: Value,
        /// The head's adapter.
        lora: Option<HeadLora>,
    },
}

impl Op {
    /// Name in tables.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Input { .. } => "input",
            Op::Embed { .. } => "embed",
            Op::RmsNorm { .. } => "rms_norm",
            Op::AddRmsNorm { .. } => "add_rms_norm",
            Op::Linear(_) => "linear",
            Op::Rope(_) => "rope",
            Op::Attention(_) => "attention",
            Op::GatherOutputs { .. } => "gather_outputs",
            Op::Head { .. } => "head",
            Op::CrossEntropy { .. } => "cross_entropy",
            Op::Gated { .. } => "gated",
            Op::Lora(_) => "lora",
            Op::LoraBackward(_) => "lora_backward",
            Op::EmbedLora(_) => "embed_lora",
            Op::EmbedLoraBackward { .. } => "embed_lora_backward",
            Op::LoraHidden(_) => "lora_hidden",
            Op::LoraHiddenBackward { .. } => "lora_hidden_backward",
            Op::Dropout(_) => "dropout",
            Op::DropoutBackward { .. } => "dropout_backward",
            Op::RowNorms { .. } => "row_norms",
            Op::Rescale(_) => "rescale",
            Op::RescaleBackward { .. } => "rescale_backward",
            Op::LinearBackward { .. } => "linear_backward",
            Op::LinearWeightBackward { .. } => "linear_weight_backward",
            Op::RmsNormWeightBackward { .. } => "rms_norm_weight_backward",
            Op::HeadNormWeightBackward { .. } => "head_norm_weight_backward",
            Op::EmbedBackward { .. } => "embed_backward",
            Op::RmsNormBackward { .. } => "rms_norm_backward",
            Op::GatedBackward { .. } => "gated_backward",
            Op::AttentionBackward(_) => "attention_backward",
            Op::RopeBackward { .. } => "rope_backward",
            Op::ScatterOutputs { .. } => "scatter_outputs",
            Op::CrossEntropyGrad { .. } => "cross_entropy_grad",
        }
    }

    /// Whether its work comes in pieces, which threads claim instead of sharing them evenly: because pieces differ in size, or
    /// because there are so many that some thread would be late.
    pub fn is_claimed(&self) -> bool {
        matches!(
            self,
            Op::Attention(_)
                | Op::AttentionBackward(_)
                | Op::CrossEntropy { .. }
                | Op::CrossEntropyGrad { .. }
                | Op::Head { .. }
        )
    }

    /// Values the op reads.
    pub fn reads(&self) -> Vec<Value> {
        match self {
            Op::Input { .. } | Op::Embed { .. } | Op::RowNorms { .. } => vec![],
            Op::Dropout(d) => vec![d.x],
            Op::DropoutBackward { dy, dx, .. } => [*dy].into_iter().chain(*dx).collect(),
            Op::Rescale(r) => [r.y, r.norms].into_iter().chain(r.residual).collect(),
            Op::RescaleBackward { forward, dy, .. } => vec![forward.y, forward.norms, *dy],
            Op::RmsNorm { x, .. } | Op::GatherOutputs { x, .. } | Op::ScatterOutputs { x, .. } | Op::Head { x, .. } => {
                vec![*x]
            }
            Op::CrossEntropy { x, lora, .. } => [*x].into_iter().chain(lora.iter().flat_map(HeadLora::reads)).collect(),
            Op::CrossEntropyGrad { x, lora, .. } => {
                [*x].into_iter().chain(lora.iter().flat_map(|(lora, _)| lora.reads())).collect()
            }
            Op::EmbedLora(l) => vec![l.x],
            Op::EmbedLoraBackward { dy, .. } => vec![*dy],
            Op::LoraHidden(l) => vec![l.x],
            Op::LoraHiddenBackward { forward, e, dx, .. } => [forward.x, *e].into_iter().chain(*dx).collect(),
            Op::Gated { gate, up, .. } => vec![*gate, *up],
            Op::Lora(l) => vec![l.x, l.y],
            Op::LoraBackward(l) => [l.forward.x, l.forward.h, l.dy].into_iter().chain(l.dx).collect(),
            Op::LinearBackward { parts, dx, .. } => parts.iter().map(|(dy, _)| *dy).chain(*dx).collect(),
            Op::RmsNormBackward { x, dy, dx, .. } => [*x, *dy].into_iter().chain(*dx).collect(),
            Op::GatedBackward { gate, up, dy, .. } => vec![*gate, *up, *dy],
            Op::AttentionBackward(a) => a.qkv.into_iter().chain([a.out, a.lse, a.d_out]).collect(),
            // A rotation alone does not need what it turned.
            Op::RopeBackward { forward, d, .. } | Op::HeadNormWeightBackward { forward, d } => {
                let normed = |norm: Option<WeightId>, value| norm.map(|_| value);
                let inputs = [normed(forward.q_norm, forward.q), normed(forward.k_norm, forward.k)];
                d.iter().copied().chain(inputs.into_iter().flatten()).collect()
            }
            Op::LinearWeightBackward { x, parts } => [*x].into_iter().chain(parts.iter().map(|(dy, ..)| *dy)).collect(),
            Op::RmsNormWeightBackward { x, dy, .. } => vec![*x, *dy],
            Op::EmbedBackward { dy, .. } => vec![*dy],
            Op::AddRmsNorm { x, y, .. } => vec![*x, *y],
            Op::Linear(l) => {
                let mut all = vec![l.x];
                if let Epilogue::Add(residual) = l.epilogue {
                    all.push(residual);
                }
                all
            }
            Op::Rope(r) => vec![r.q, r.k, r.v],
            Op::Attention(a) => match a.kv {
                KvSource::Cache(_) => vec![a.q],
                KvSource::Rows(k, v) => vec![a.q, k, v],
            },
        }
    }

    /// Values the op writes.
    pub fn writes(&self) -> Vec<Value> {
        match self {
            Op::Input { out }
            | Op::Embed { out, .. }
            | Op::RmsNorm { out, .. }
            | Op::AddRmsNorm { out, .. }
            | Op::GatherOutputs { out, .. }
            | Op::ScatterOutputs { out, .. }
            | Op::Head { out, .. }
            | Op::Gated { out, .. }
            | Op::LinearBackward { out, .. }
            | Op::RmsNormBackward { out, .. }
            | Op::DropoutBackward { out, .. }
            | Op::RowNorms { out, .. }
            | Op::LoraHiddenBackward { out, .. }
            | Op::RescaleBackward { out, .. }
            | Op::CrossEntropy { out, .. } => vec![*out],
            // They add to gradients of parameters only.
            Op::LinearWeightBackward { .. }
            | Op::RmsNormWeightBackward { .. }
            | Op::HeadNormWeightBackward { .. }
            | Op::EmbedBackward { .. } => vec![],
            Op::Dropout(d) => vec![d.out],
            Op::Rescale(r) => vec![r.out],
            Op::CrossEntropyGrad { out, dx, lora, .. } => [*out, *dx].into_iter().chain(lora.map(|(_, e)| e)).collect(),
            Op::EmbedLora(l) => vec![l.out],
            Op::EmbedLoraBackward { e, .. } => vec![*e],
            Op::LoraHidden(l) => vec![l.h],
            Op::Lora(l) => vec![l.h, l.out],
            Op::LoraBackward(l) => [l.e].into_iter().chain(l.out).collect(),
            Op::GatedBackward { d_gate, d_up, .. } => vec![*d_gate, *d_up],
            Op::AttentionBackward(a) => a.d_qkv.to_vec(),
            Op::RopeBackward { out, .. } => out.to_vec(),
            Op::Linear(l) => {
                let mut all: Vec<Value> = l.parts.iter().map(|p| p.out).collect();
                if let Epilogue::Gated(_, out) = l.epilogue {
                    all.push(out);
                }
                all
            }
            Op::Rope(r) => vec![r.q_out, r.k_out],
            Op::Attention(a) => [a.out].into_iter().chain(a.lse).collect(),
        }
    }

    /// Matrices of the model that the op reads; norms and biases apart.
    pub fn matrices(&self) -> Vec<WeightId> {
        match self {
            Op::Embed { table, .. } => vec![*table],
            Op::Linear(l) => l.parts.iter().map(|p| p.weight).collect(),
            Op::Head { weight, .. }
            | Op::CrossEntropy { weight, .. }
            | Op::CrossEntropyGrad { weight, .. }
            | Op::RowNorms { weight, .. } => vec![*weight],
            Op::LinearBackward { parts, .. } => parts.iter().map(|(_, weight)| *weight).collect(),
            _ => vec![],
        }
    }

    /// Pairs (read, written) that may share memory when the read value is not used afterwards: each element of the
    /// written value depends on the same element of the read one only.
    pub fn in_place(&self) -> Vec<(Value, Value)> {
        match self {
            Op::AddRmsNorm { x, out, .. } => vec![(*x, *out)],
            Op::Linear(l) => match l.epilogue {
                Epilogue::Add(residual) => vec![(residual, l.parts[0].out)],
                _ => vec![],
            },
            Op::Rope(r) => vec![(r.q, r.q_out), (r.k, r.k_out)],
            Op::Gated { gate, out, .. } => vec![(*gate, *out)],
            Op::Lora(l) => vec![(l.y, l.out)],
            Op::LoraBackward(LoraBackward { dx: Some(dx), out: Some(out), .. }) => vec![(*dx, *out)],
            Op::LinearBackward { dx: Some(dx), out, .. }
            | Op::RmsNormBackward { dx: Some(dx), out, .. }
            | Op::LoraHiddenBackward { dx: Some(dx), out, .. }
            | Op::DropoutBackward { dx: Some(dx), out, .. } => {
                vec![(*dx, *out)]
            }
            Op::EmbedLora(l) => vec![(l.x, l.out)],
            Op::Dropout(d) => vec![(d.x, d.out)],
            Op::Rescale(r) => vec![(r.y, r.out)],
            Op::RescaleBackward { dy, out, .. } => vec![(*dy, *out)],
            Op::RopeBackward { d, out, .. } => vec![(d[0], out[0]), (d[1], out[1])],
            _ => vec![],
        }
    }
}

/// The list, with the tables its indices point into.
#[derive(Clone, Debug)]
pub struct Tape {
    /// The model it computes.
    pub spec: Spec,
    /// Operations in execution order.
    pub ops: Vec<Op>,
    /// Shapes of the values.
    pub values: Vec<ValueInfo>,
    /// The value a caller reads after a run: logits or cross-entropies, `[S, …]`.
    pub result: Value,
    /// The trained matrices; empty but for [`Purpose::Learn`](super::Purpose::Learn) and its scoring.
    pub params: Vec<Param>,
    /// Whether the model's weights are trained: each is the parameter of the same number then, and is read there.
    pub trains_weights: bool,
}

impl Tape {
    /// Length of the flat vector of trained parameters.
    pub fn param_count(&self) -> usize {
        self.params.last().map_or(0, Param::end)
    }

    /// Whether the output layer learns, by itself or with an adapter.
    pub fn learns_head(&self) -> bool {
        self.trains_weights || self.ops.iter().any(|op| matches!(op, Op::CrossEntropyGrad { lora: Some(_), .. }))
    }

    /// The matrices of the model that it reads.
    pub fn matrices(&self) -> BTreeSet<WeightId> {
        self.ops.iter().flat_map(Op::matrices).collect()
    }

    /// The residual stream that a run is given, if the tape begins with it.
    pub fn input(&self) -> Option<Value> {
        match self.ops.first() {
            Some(Op::Input { out }) => Some(*out),
            _ => None,
        }
    }

    /// Shape of a value.
    pub fn info(&self, value: Value) -> &ValueInfo {
        &self.values[value.0 as usize]
    }
}
