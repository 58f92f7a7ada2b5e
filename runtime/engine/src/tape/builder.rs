//! Appends ops to a tape. The calls read like eager code: `let h = b.rms_norm(x, &layer.ffn_norm)`.

use super::op::{
    Attention, Epilogue, KvSource, Linear, Lora, Op, Param, ParamId, Part, Rope, Rows, Tape, Value, ValueInfo,
};
use super::spec::{Gate, LayerSpec, LinearSpec, Spec, WeightRef};
use super::weights::Weights;
use crate::quant::DType;

/// Which linear maps get a trained low-rank adapter, and of what size.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSpec {
    /// Rank of every adapter.
    pub rank: usize,
    /// Factor on the adapter's output: `α/r`, or `α/√r`.
    pub scale: f32,
    /// Names of the adapted weights, such as `blk.0.attn_q.weight`.
    pub weights: Vec<String>,
}

/// Writes a tape for one model.
pub struct Builder<'a> {
    /// The model's description.
    pub spec: &'a Spec,
    weights: &'a Weights,
    /// Set for training: adapters behind linear maps, keys and values of the run itself.
    lora: Option<&'a LoraSpec>,
    pub(super) ops: Vec<Op>,
    values: Vec<ValueInfo>,
    params: Vec<Param>,
    prefix: String,
}

impl<'a> Builder<'a> {
    /// An empty tape over `weights`, which were resolved from `spec`.
    pub fn new(spec: &'a Spec, weights: &'a Weights) -> Builder<'a> {
        Builder {
            spec,
            weights,
            lora: None,
            ops: Vec::new(),
            values: Vec::new(),
            params: Vec::new(),
            prefix: String::new(),
        }
    }

    /// An empty tape for training the adapters of `lora`: every linear map it names gets one, and attention reads the
    /// keys and values of the run itself.
    pub fn learning(spec: &'a Spec, weights: &'a Weights, lora: &'a LoraSpec) -> Builder<'a> {
        Builder { lora: Some(lora), ..Builder::new(spec, weights) }
    }

    /// Names given to values from here on start with `prefix`.
    pub fn section(&mut self, prefix: impl Into<String>) {
        self.prefix = prefix.into();
    }

    pub(super) fn value(&mut self, rows: Rows, width: usize, name: &str) -> Value {
        self.values.push(ValueInfo { rows, width, name: format!("{}{name}", self.prefix), quantized: false });
        Value(self.values.len() as u32 - 1)
    }

    pub(super) fn shape(&self, value: Value) -> (Rows, usize) {
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

    /// The adapter's pair of matrices for a weight, made at its first use.
    fn param(&mut self, weight: &str, half: &str, rows: usize, width: usize) -> ParamId {
        let name = format!("{weight}.{half}");
        let at = self.params.iter().position(|p| p.name == name).unwrap_or_else(|| {
            let offset = self.params.last().map_or(0, Param::end);
            self.params.push(Param { name, rows, width, offset });
            self.params.len() - 1
        });
        ParamId(at as u32)
    }

    /// `y` with the adapter of `linear`, if it has one.
    fn adapt(&mut self, x: Value, linear: &LinearSpec, y: Value) -> Value {
        let weight = self.weights.get(self.weights.id(&linear.weight)).name.as_str();
        let Some(lora) = self.lora.filter(|l| l.weights.iter().any(|w| w == weight)) else { return y };
        let ((rows, width), out_width) = (self.shape(x), self.shape(y).1);
        let a = self.param(weight, "lora_a", lora.rank, width);
        let b = self.param(weight, "lora_b", out_width, lora.rank);
        let (h, out) = (self.value(rows, lora.rank, "lora"), self.value(rows, out_width, "adapted"));
        self.ops.push(Op::Lora(Lora { x, y, a, b, scale: lora.scale, h, out }));
        out
    }

    /// One linear map.
    pub fn linear(&mut self, x: Value, linear: &LinearSpec, name: &str) -> Value {
        let part = self.part(x, linear, name);
        let out = part.out;
        self.ops.push(Op::Linear(Linear { x, parts: vec![part], epilogue: Epilogue::None }));
        self.adapt(x, linear, out)
    }

    /// `residual + linear(x)`.
    pub fn linear_add(&mut self, x: Value, linear: &LinearSpec, residual: Value) -> Value {
        let part = self.part(x, linear, "residual");
        let out = part.out;
        self.ops.push(Op::Linear(Linear { x, parts: vec![part], epilogue: Epilogue::Add(residual) }));
        self.adapt(x, linear, out)
    }

    /// Queries, keys and values of one input in one op.
    pub fn qkv(&mut self, x: Value, layer: &LayerSpec) -> [Value; 3] {
        let parts = vec![self.part(x, &layer.q, "q"), self.part(x, &layer.k, "k"), self.part(x, &layer.v, "v")];
        let [q, k, v] = [parts[0].out, parts[1].out, parts[2].out];
        self.ops.push(Op::Linear(Linear { x, parts, epilogue: Epilogue::None }));
        [self.adapt(x, &layer.q, q), self.adapt(x, &layer.k, k), self.adapt(x, &layer.v, v)]
    }

    /// `act(gate(x)) ∘ up(x)`.
    pub fn gated(&mut self, x: Value, gate: &LinearSpec, up: &LinearSpec, kind: Gate) -> Value {
        let parts = vec![self.part(x, gate, "gate"), self.part(x, up, "up")];
        let (rows, width) = self.shape(parts[0].out);
        let out = self.value(rows, width, "ffn");
        if self.lora.is_none() {
            self.ops.push(Op::Linear(Linear { x, parts, epilogue: Epilogue::Gated(kind, out) }));
            return out;
        }
        let [g, u] = [parts[0].out, parts[1].out];
        self.ops.push(Op::Linear(Linear { x, parts, epilogue: Epilogue::None }));
        let (gate, up) = (self.adapt(x, gate, g), self.adapt(x, up, u));
        self.ops.push(Op::Gated { kind, gate, up, out });
        out
    }

    /// Head norms, rotation and cache write of a layer, then attention over the cache.
    pub fn attention(&mut self, [q, k, v]: [Value; 3], layer: &LayerSpec, index: usize) -> Value {
        let (q_width, k_width) = (self.shape(q).1, self.shape(k).1);
        let q_out = self.value(Rows::Tokens, q_width, "q rotated");
        let k_out = self.value(Rows::Tokens, k_width, "k rotated");
        let norm = |w: &Option<WeightRef>| w.as_ref().map(|w| self.weights.id(w));
        let (q_norm, k_norm) = (norm(&layer.q_norm), norm(&layer.k_norm));
        let learning = self.lora.is_some();
        let cache = (!learning).then_some(index);
        self.ops.push(Op::Rope(Rope { q, k, v, q_out, k_out, q_norm, k_norm, rope: layer.rope, cache }));
        let out = self.value(Rows::Tokens, q_width, "attention");
        let lse = learning.then(|| self.value(Rows::Tokens, self.spec.heads, "lse"));
        let kv = if learning { KvSource::Rows(k_out, v) } else { KvSource::Cache(index) };
        self.ops.push(Op::Attention(Attention { q: q_out, out, kv, lse, window: layer.window }));
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

    /// As [`Builder::cross_entropy`], with the gradient of `x` scaled by the run's weight of each row.
    pub fn cross_entropy_grad(&mut self, x: Value) -> (Value, Value) {
        let weight = self.weights.id(&self.spec.head);
        self.mark_quantized(x, self.weights.get(weight).dtype);
        let out = self.value(Rows::Outputs, 1, "cross-entropy");
        let dx = self.value(Rows::Outputs, self.spec.width, "cross-entropy gradient");
        self.ops.push(Op::CrossEntropyGrad { x, weight, out, dx });
        (out, dx)
    }

    /// The finished tape; `result` is what a caller reads.
    pub fn finish(self, result: Value) -> Tape {
        Tape { spec: self.spec.clone(), ops: self.ops, values: self.values, result, params: self.params }
    }
}
