//! Values and operations.
//!
//! A value is a matrix of f32 with a run-time number of rows and a fixed width; it is written by exactly one op.
//! Shapes in the comments are `[rows, width]`, T the rows of a run (tokens), S the rows whose logits are wanted.

use super::spec::Spec;

/// A value of the tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(pub u32);

/// A weight of the model: an index into the table that the tape's [`Tape::weights`] lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightId(pub u32);

/// What the number of rows of a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rows {
    /// One per token of the run.
    Tokens,
    /// One per token whose logits were asked for.
    Outputs,
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
#[derive(Clone, Debug)]
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
    /// The layer whose cache receives keys and values.
    pub layer: usize,
}

/// Causal attention over the cache of `layer`, online softmax.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Rotated queries `[T, heads·D]`.
    pub q: Value,
    /// `[T, heads·D]`.
    pub out: Value,
    /// The layer whose cache is read.
    pub layer: usize,
    /// Sliding window.
    pub window: Option<usize>,
}

/// An operation.
#[derive(Clone, Debug)]
pub enum Op {
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
    /// `out[s] = log-sum-exp(z) − z[target s]` with `z = cap(x[s]·Wᵀ)`, without keeping the logits.
    CrossEntropy {
        /// `[S, width]`.
        x: Value,
        /// `[vocab, width]`.
        weight: WeightId,
        /// `[S, 1]`: nats.
        out: Value,
    },
}

impl Op {
    /// Name in tables.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embed { .. } => "embed",
            Op::RmsNorm { .. } => "rms_norm",
            Op::AddRmsNorm { .. } => "add_rms_norm",
            Op::Linear(_) => "linear",
            Op::Rope(_) => "rope",
            Op::Attention(_) => "attention",
            Op::GatherOutputs { .. } => "gather_outputs",
            Op::Head { .. } => "head",
            Op::CrossEntropy { .. } => "cross_entropy",
        }
    }

    /// Values the op reads.
    pub fn reads(&self) -> Vec<Value> {
        match self {
            Op::Embed { .. } => vec![],
            Op::RmsNorm { x, .. } | Op::GatherOutputs { x, .. } | Op::Head { x, .. } | Op::CrossEntropy { x, .. } => {
                vec![*x]
            }
            Op::AddRmsNorm { x, y, .. } => vec![*x, *y],
            Op::Linear(l) => {
                let mut all = vec![l.x];
                if let Epilogue::Add(residual) = l.epilogue {
                    all.push(residual);
                }
                all
            }
            Op::Rope(r) => vec![r.q, r.k, r.v],
            Op::Attention(a) => vec![a.q],
        }
    }

    /// Values the op writes.
    pub fn writes(&self) -> Vec<Value> {
        match self {
            Op::Embed { out, .. }
            | Op::RmsNorm { out, .. }
            | Op::AddRmsNorm { out, .. }
            | Op::GatherOutputs { out, .. }
            | Op::Head { out, .. }
            | Op::CrossEntropy { out, .. } => vec![*out],
            Op::Linear(l) => {
                let mut all: Vec<Value> = l.parts.iter().map(|p| p.out).collect();
                if let Epilogue::Gated(_, out) = l.epilogue {
                    all.push(out);
                }
                all
            }
            Op::Rope(r) => vec![r.q_out, r.k_out],
            Op::Attention(a) => vec![a.out],
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
}

impl Tape {
    /// Shape of a value.
    pub fn info(&self, value: Value) -> &ValueInfo {
        &self.values[value.0 as usize]
    }
}
