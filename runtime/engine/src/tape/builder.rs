//! Appends ops to a tape. The calls read like eager code: `let h = b.rms_norm(x, &layer.ffn_norm)`.

use super::op::{Attention, Epilogue, Linear, Op, Part, Rope, Rows, Tape, Value, ValueInfo};
use super::spec::{Gate, LayerSpec, LinearSpec, Spec, WeightRef};
use super::weights::Weights;
use crate::quant::DType;

/// Writes a tape for one model.
pub struct Builder<'a> {
    /// The model's description.
    pub spec: &'a Spec,
    weights: &'a Weights,
    ops: Vec<Op>,
    values: Vec<ValueInfo>,
    prefix: String,
}

impl<'a> Builder<'a> {
    /// An empty tape over `weights`, which were resolved from `spec`.
    pub fn new(spec: &'a Spec, weights: &'a Weights) -> Builder<'a> {
        Builder { spec, weights, ops: Vec::new(), values: Vec::new(), prefix: String::new() }
    }

    /// Names given to values from here on start with `prefix`.
    pub fn section(&mut self, prefix: impl Into<String>) {
        self.prefix = prefix.into();
    }

    fn value(&mut self, rows: Rows, width: usize, name: &str) -> Value {
        self.values.push(ValueInfo { rows, width, name: format!("{}{name}", self.prefix), quantized: false });
        Value(self.values.len() as u32 - 1)
    }

    fn shape(&self, value: Value) -> (Rows, usize) {
        let info = &self.values[value.0 as usize];
        (info.rows, info.width)
    }

    fn mark_quantized(&mut self, value: Value, dtype: DType) {
        self.values[value.0 as usize].quantized |= dtype.is_quantized();
    }

    /// Token embedding, `[T, width]`.
    pub fn embed(&mut self) -> Value {
        let out = self.value(Rows::Tokens, self.spec.width, "embedding");
        let table = self.weights.id(&self.spec.embedding);
        self.ops.push(Op::Embed { table, scale: self.spec.embed_scale, out });
        out
    }

    /// RMS norm with a weight, same shape as `x`.
    pub fn rms_norm(&mut self, x: Value, weight: &WeightRef) -> Value {
        let (rows, width) = self.shape(x);
        let out = self.value(rows, width, "norm");
        self.ops.push(Op::RmsNorm { x, weight: self.weights.id(weight), out });
        out
    }

    /// `x + rms_norm(y)`.
    pub fn add_rms_norm(&mut self, x: Value, y: Value, weight: &WeightRef) -> Value {
        let (rows, width) = self.shape(x);
        let out = self.value(rows, width, "residual");
        self.ops.push(Op::AddRmsNorm { x, y, weight: self.weights.id(weight), out });
        out
    }

    fn part(&mut self, x: Value, linear: &LinearSpec, name: &str) -> Part {
        let weight = self.weights.id(&linear.weight);
        let (dtype, width) = (self.weights.get(weight).dtype, self.weights.get(weight).rows);
        self.mark_quantized(x, dtype);
        let rows = self.shape(x).0;
        Part { weight, bias: linear.bias.as_ref().map(|b| self.weights.id(b)), out: self.value(rows, width, name) }
    }

    /// One linear map.
    pub fn linear(&mut self, x: Value, linear: &LinearSpec, name: &str) -> Value {
        let part = self.part(x, linear, name);
        let out = part.out;
        self.ops.push(Op::Linear(Linear { x, parts: vec![part], epilogue: Epilogue::None }));
        out
    }

    /// `residual + linear(x)`.
    pub fn linear_add(&mut self, x: Value, linear: &LinearSpec, residual: Value) -> Value {
        let part = self.part(x, linear, "residual");
        let out = part.out;
        self.ops.push(Op::Linear(Linear { x, parts: vec![part], epilogue: Epilogue::Add(residual) }));
        out
    }

    /// Queries, keys and values of one input in one op.
    pub fn qkv(&mut self, x: Value, layer: &LayerSpec) -> [Value; 3] {
        let parts = vec![self.part(x, &layer.q, "q"), self.part(x, &layer.k, "k"), self.part(x, &layer.v, "v")];
        let outs = [parts[0].out, parts[1].out, parts[2].out];
        self.ops.push(Op::Linear(Linear { x, parts, epilogue: Epilogue::None }));
        outs
    }

    /// `act(gate(x)) ∘ up(x)`.
    pub fn gated(&mut self, x: Value, gate: &LinearSpec, up: &LinearSpec, kind: Gate) -> Value {
        let parts = vec![self.part(x, gate, "gate"), self.part(x, up, "up")];
        let (rows, width) = self.shape(parts[0].out);
        let out = self.value(rows, width, "ffn");
        self.ops.push(Op::Linear(Linear { x, parts, epilogue: Epilogue::Gated(kind, out) }));
        out
    }

    /// Head norms, rotation and cache write of a layer, then attention over the cache.
    pub fn attention(&mut self, [q, k, v]: [Value; 3], layer: &LayerSpec, index: usize) -> Value {
        let (q_width, k_width) = (self.shape(q).1, self.shape(k).1);
        let q_out = self.value(Rows::Tokens, q_width, "q rotated");
        let k_out = self.value(Rows::Tokens, k_width, "k rotated");
        let norm = |w: &Option<WeightRef>| w.as_ref().map(|w| self.weights.id(w));
        let (q_norm, k_norm) = (norm(&layer.q_norm), norm(&layer.k_norm));
        self.ops.push(Op::Rope(Rope { q, k, v, q_out, k_out, q_norm, k_norm, rope: layer.rope, layer: index }));
        let out = self.value(Rows::Tokens, q_width, "attention");
        self.ops.push(Op::Attention(Attention { q: q_out, out, layer: index, window: layer.window }));
        out
    }

    /// The rows whose logits are wanted, `[S, width]`.
    pub fn gather_outputs(&mut self, x: Value) -> Value {
        let out = self.value(Rows::Outputs, self.shape(x).1, "outputs");
        self.ops.push(Op::GatherOutputs { x, out });
        out
    }

    /// Logits, `[S, vocab]`.
    pub fn head(&mut self, x: Value) -> Value {
        let weight = self.weights.id(&self.spec.head);
        self.mark_quantized(x, self.weights.get(weight).dtype);
        let out = self.value(Rows::Outputs, self.spec.vocab, "logits");
        self.ops.push(Op::Head { x, weight, out });
        out
    }

    /// Negative log-likelihood of the target of each output row, `[S, 1]`.
    pub fn cross_entropy(&mut self, x: Value) -> Value {
        let weight = self.weights.id(&self.spec.head);
        self.mark_quantized(x, self.weights.get(weight).dtype);
        let out = self.value(Rows::Outputs, 1, "cross-entropy");
        self.ops.push(Op::CrossEntropy { x, weight, out });
        out
    }

    /// The finished tape; `result` is what a caller reads.
    pub fn finish(self, result: Value) -> Tape {
        Tape { spec: self.spec.clone(), ops: self.ops, values: self.values, result }
    }
}
