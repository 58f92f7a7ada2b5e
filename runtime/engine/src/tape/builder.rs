//! Appends ops to a tape. The calls read like eager code: `let h = b.rms_norm(x, &layer.ffn_norm)`.

use std::collections::HashMap;

use super::op::{
    Attention, Epilogue, KvSource, Linear, Op, Param, ParamId, Part, Rope, Rows, Tape, Value, ValueInfo, WeightId,
};
use super::op_learn::{Dropout, EmbedLora, HeadLora, Lora, LoraHidden, Rescale};
use super::spec::{Gate, LayerSpec, LinearSpec, Spec, WeightRef};
use super::weights::Weights;
use crate::quant::DType;
use crate::random;

/// Which matrices get a trained low-rank adapter, and of what size.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoraSpec {
    /// Rank of every adapter.
    pub rank: usize,
    /// Factor on the adapter's output: `α/r`, or `α/√r`.
    pub scale: f32,
    /// Names of the adapted weights: linear maps such as `blk.0.attn_q.weight`, the embedding, the head. A matrix that is
    /// both is adapted as the embedding.
    pub weights: Vec<String>,
    /// Share of the adapters' inputs that are zeroed in a run for learning; scoring leaves none out.
    pub dropout: f32,
    /// Whether the lengths of the adapted matrices' rows are learned apart from their directions (DoRA). Together with
    /// dropout, what falls is missing from the low-rank product only; PEFT leaves it out of the matrix' own rescaled part too.
    pub dora: bool,
}

/// What a training changes.
#[derive(Clone, Debug, PartialEq)]
pub enum Trained {
    /// Low-rank adapters; the weights stay as they are.
    Adapters(LoraSpec),
    /// All weights, in f32: matrices, biases, norms, the embedding, the head.
    All,
}

impl Trained {
    /// The adapters, if it is them.
    pub fn lora(&self) -> Option<&LoraSpec> {
        match self {
            Trained::Adapters(lora) => Some(lora),
            Trained::All => None,
        }
    }
}

impl From<LoraSpec> for Trained {
    fn from(lora: LoraSpec) -> Trained {
        Trained::Adapters(lora)
    }
}

/// Writes a tape for one model.
pub struct Builder<'a> {
    /// The model's description.
    pub spec: &'a Spec,
    weights: &'a Weights,
    /// Set for training: then attention reads keys and values of the run itself.
    trained: Option<&'a Trained>,
    /// Whether adapters lose some of their input.
    drops: bool,
    pub(super) ops: Vec<Op>,
    values: Vec<ValueInfo>,
    params: Vec<Param>,
    /// Lengths of adapted matrices' rows: computed once, also where a layer is computed twice.
    norms: HashMap<WeightId, Value>,
    prefix: String,
}

impl<'a> Builder<'a> {
    /// An empty tape over `weights`, which were resolved from `spec`.
    pub fn new(spec: &'a Spec, weights: &'a Weights) -> Builder<'a> {
        Builder {
            spec,
            weights,
            trained: None,
            drops: false,
            ops: Vec::new(),
            values: Vec::new(),
            params: Vec::new(),
            norms: HashMap::new(),
            prefix: String::new(),
        }
    }

    /// An empty tape for training: every linear map that adapters are for gets one, or every weight becomes a parameter;
    /// attention reads the keys and values of the run itself. With `drops` the adapters' dropout is in force.
    pub fn learning(spec: &'a Spec, weights: &'a Weights, trained: &'a Trained, drops: bool) -> Builder<'a> {
        let mut b = Builder { trained: Some(trained), drops, ..Builder::new(spec, weights) };
        if b.trains_weights() {
            for (_, w) in weights.iter() {
                b.add_param(w.name.clone(), w.rows, w.width);
            }
        }
        b
    }

    /// Whether all weights are trained.
    pub(super) fn trains_weights(&self) -> bool {
        self.trained == Some(&Trained::All)
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
        // Trained weights are f32, whatever they were before.
        self.values[value.0 as usize].quantized |= dtype.is_quantized() && !self.trains_weights();
    }

    /// The residual stream that a run is given, `[T, width]`.
    pub fn input(&mut self) -> Value {
        let out = self.value(Rows::Tokens, self.spec.width, "input");
        self.ops.push(Op::Input { out });
        out
    }

    /// Token embedding, `[T, width]`.
    pub fn embed(&mut self) -> Value {
        let out = self.value(Rows::Tokens, self.spec.width, "embedding");
        let table = self.weights.id(&self.spec.embedding);
        let scale = self.spec.embed_scale;
        self.ops.push(Op::Embed { table, scale, out });
        let Some(lora) = self.adapter(&self.spec.embedding) else { return out };
        let (weight, x) = (self.weights.get(table).name.as_str(), out);
        let a = self.param(weight, "lora_a", lora.rank, self.spec.width);
        let b = self.param(weight, "lora_b", self.spec.vocab, lora.rank);
        let out = self.value(Rows::Tokens, self.spec.width, "adapted embedding");
        self.ops.push(Op::EmbedLora(EmbedLora { x, a, b, scale: scale * lora.scale, out }));
        out
    }

    /// Gradients of what is trained about the embedding: `forward` are the ops of [`Builder::embed`].
    pub(super) fn embed_backward(&mut self, forward: &[Op], dy: Value) {
        for op in forward {
            match op {
                Op::Embed { table, scale, .. } if self.trains_weights() => {
                    self.ops.push(Op::EmbedBackward { table: *table, scale: *scale, dy });
                }
                Op::EmbedLora(lora) => {
                    let e = self.value(Rows::Tokens, self.params[lora.a.0 as usize].rows, "d lora");
                    self.ops.push(Op::EmbedLoraBackward { forward: *lora, dy, e });
                }
                _ => {}
            }
        }
    }

    /// Whether anything about the embedding is trained.
    pub(super) fn trains_embedding(&self) -> bool {
        self.trains_weights() || self.adapter(&self.spec.embedding).is_some()
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
        let bias = linear.bias.as_ref().filter(|_| !self.adds_later(linear)).map(|b| self.weights.id(b));
        Part { weight, bias, out: self.value(rows, width, name) }
    }

    /// A trained matrix that belongs to a weight, made at its first use.
    fn param(&mut self, weight: &str, half: &str, rows: usize, width: usize) -> ParamId {
        let name = format!("{weight}.{half}");
        let at = self.params.iter().position(|p| p.name == name).unwrap_or_else(|| {
            self.add_param(name, rows, width);
            self.params.len() - 1
        });
        ParamId(at as u32)
    }

    fn add_param(&mut self, name: String, rows: usize, width: usize) {
        let offset = self.params.last().map_or(0, Param::end);
        self.params.push(Param { name, rows, width, offset });
    }

    /// The adapters' settings, if this matrix gets one.
    fn adapter(&self, matrix: &WeightRef) -> Option<&'a LoraSpec> {
        let weight = &self.weights.get(self.weights.id(matrix)).name;
        self.trained?.lora().filter(|lora| lora.weights.contains(weight))
    }

    /// Whether bias and residual are added behind the map's adapter, which rescales its rows.
    fn adds_later(&self, linear: &LinearSpec) -> bool {
        self.adapter(&linear.weight).is_some_and(|lora| lora.dora)
    }

    /// The input of a weight's adapter, with the op in which some of it falls.
    fn adapter_input(&mut self, x: Value, weight: &str, lora: &LoraSpec) -> (Value, Option<Dropout>) {
        if lora.dropout <= 0.0 || !self.drops {
            return (x, None);
        }
        let (rows, width) = self.shape(x);
        let out = self.value(rows, width, "dropped out");
        let dropout = Dropout { x, stream: random::stream(weight, 0), rate: lora.dropout, out };
        self.ops.push(Op::Dropout(dropout));
        (out, Some(dropout))
    }

    /// Magnitude and lengths of the rows of an adapted weight.
    fn rescaling(&mut self, id: WeightId, a: ParamId, b: ParamId, scale: f32) -> (ParamId, Value) {
        let (name, rows) = (self.weights.get(id).name.as_str(), self.weights.get(id).rows);
        let magnitude = self.param(name, "lora_magnitude", 1, rows);
        if let Some(norms) = self.norms.get(&id) {
            return (magnitude, *norms);
        }
        let out = self.value(Rows::One, rows, "row norms");
        self.ops.push(Op::RowNorms { weight: id, a, b, scale, out });
        self.norms.insert(id, out);
        (magnitude, out)
    }

    /// `y` with the adapter of `linear`, if it has one; the residual is added if the map has left it to the adapter.
    fn adapt(&mut self, x: Value, linear: &LinearSpec, y: Value, residual: Option<Value>) -> Value {
        let Some(lora) = self.adapter(&linear.weight) else { return y };
        let id = self.weights.id(&linear.weight);
        let weight = self.weights.get(id).name.as_str();
        let ((rows, width), out_width) = (self.shape(x), self.shape(y).1);
        let a = self.param(weight, "lora_a", lora.rank, width);
        let b = self.param(weight, "lora_b", out_width, lora.rank);
        let scale = lora.scale;
        let (input, _) = self.adapter_input(x, weight, lora);
        let (h, adapted) = (self.value(rows, lora.rank, "lora"), self.value(rows, out_width, "adapted"));
        self.ops.push(Op::Lora(Lora { x: input, y, a, b, scale, h, out: adapted }));
        if !lora.dora {
            return adapted;
        }
        let (magnitude, norms) = self.rescaling(id, a, b, scale);
        let bias = linear.bias.as_ref().map(|bias| self.weights.id(bias));
        let out = self.value(rows, out_width, "rescaled");
        self.ops.push(Op::Rescale(Rescale { y: adapted, magnitude, norms, bias, residual, out }));
        out
    }

    /// The adapter of the head, with its first half and the op in which some of its input falls. A head that is the
    /// embedding has none: there an adapter corrects the embedding.
    fn adapt_head(&mut self, x: Value) -> Option<(HeadLora, LoraHidden, Option<Dropout>)> {
        let spec = self.spec;
        let lora = self.adapter(&spec.head).filter(|_| spec.head != spec.embedding)?;
        let id = self.weights.id(&spec.head);
        let weight = self.weights.get(id).name.as_str();
        let a = self.param(weight, "lora_a", lora.rank, spec.width);
        let b = self.param(weight, "lora_b", spec.vocab, lora.rank);
        let (input, dropout) = self.adapter_input(x, weight, lora);
        let hidden = LoraHidden { x: input, a, h: self.value(Rows::Outputs, lora.rank, "lora") };
        self.ops.push(Op::LoraHidden(hidden));
        let rescale = lora.dora.then(|| self.rescaling(id, a, b, lora.scale));
        Some((HeadLora { h: hidden.h, b, scale: lora.scale, rescale }, hidden, dropout))
    }

    /// One linear map.
    pub fn linear(&mut self, x: Value, linear: &LinearSpec, name: &str) -> Value {
        let part = self.part(x, linear, name);
        let out = part.out;
        self.ops.push(Op::Linear(Linear { x, parts: vec![part], epilogue: Epilogue::None }));
        self.adapt(x, linear, out, None)
    }

    /// `residual + linear(x)`.
    pub fn linear_add(&mut self, x: Value, linear: &LinearSpec, residual: Value) -> Value {
        let part = self.part(x, linear, "residual");
        let out = part.out;
        let later = self.adds_later(linear);
        let epilogue = if later { Epilogue::None } else { Epilogue::Add(residual) };
        self.ops.push(Op::Linear(Linear { x, parts: vec![part], epilogue }));
        self.adapt(x, linear, out, later.then_some(residual))
    }

    /// Queries, keys and values of one input in one op.
    pub fn qkv(&mut self, x: Value, layer: &LayerSpec) -> [Value; 3] {
        let parts = vec![self.part(x, &layer.q, "q"), self.part(x, &layer.k, "k"), self.part(x, &layer.v, "v")];
        let [q, k, v] = [parts[0].out, parts[1].out, parts[2].out];
        self.ops.push(Op::Linear(Linear { x, parts, epilogue: Epilogue::None }));
        [(&layer.q, q), (&layer.k, k), (&layer.v, v)].map(|(linear, y)| self.adapt(x, linear, y, None))
    }

    /// `act(gate(x)) ∘ up(x)`.
    pub fn gated(&mut self, x: Value, gate: &LinearSpec, up: &LinearSpec, kind: Gate) -> Value {
        let parts = vec![self.part(x, gate, "gate"), self.part(x, up, "up")];
        let (rows, width) = self.shape(parts[0].out);
        let out = self.value(rows, width, "ffn");
        if self.trained.is_none() {
            self.ops.push(Op::Linear(Linear { x, parts, epilogue: Epilogue::Gated(kind, out) }));
            return out;
        }
        let [g, u] = [parts[0].out, parts[1].out];
        self.ops.push(Op::Linear(Linear { x, parts, epilogue: Epilogue::None }));
        let (gate, up) = (self.adapt(x, gate, g, None), self.adapt(x, up, u, None));
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
        let learning = self.trained.is_some();
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
        let lora = self.adapt_head(x).map(|(lora, ..)| lora);
        let out = self.value(Rows::Outputs, 1, "cross-entropy");
        self.ops.push(Op::CrossEntropy { x, weight, out, lora });
        out
    }

    /// As [`Builder::cross_entropy`], with the gradient of `x` scaled by the run's weight of each row.
    pub fn cross_entropy_grad(&mut self, x: Value) -> (Value, Value) {
        let weight = self.weights.id(&self.spec.head);
        self.mark_quantized(x, self.weights.get(weight).dtype);
        let adapter = self.adapt_head(x);
        let out = self.value(Rows::Outputs, 1, "cross-entropy");
        let gradient = |b: &mut Self| b.value(Rows::Outputs, b.spec.width, "cross-entropy gradient");
        let dx = gradient(self);
        let Some((lora, hidden, dropout)) = adapter else {
            self.ops.push(Op::CrossEntropyGrad { x, weight, out, dx, lora: None });
            return (out, dx);
        };
        let e = self.value(Rows::Outputs, self.shape(lora.h).1, "d lora");
        self.ops.push(Op::CrossEntropyGrad { x, weight, out, dx, lora: Some((lora, e)) });
        let all = gradient(self);
        match dropout {
            None => self.ops.push(Op::LoraHiddenBackward { forward: hidden, e, dx: Some(dx), out: all }),
            Some(dropout) => {
                let dy = gradient(self);
                self.ops.push(Op::LoraHiddenBackward { forward: hidden, e, dx: None, out: dy });
                self.ops.push(Op::DropoutBackward { forward: dropout, dy, dx: Some(dx), out: all });
            }
        }
        (out, all)
    }

    /// The finished tape; `result` is what a caller reads.
    pub fn finish(self, result: Value) -> Tape {
        let trains_weights = self.trains_weights();
        Tape {
            spec: self.spec.clone(),
            ops: self.ops,
            values: self.values,
            result,
            params: self.params,
            trains_weights,
        }
    }
}
