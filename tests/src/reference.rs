//! A decoder in double precision, written for being read: the specification that gradients are measured against.
//!
//! It computes cross-entropies from a [`Spec`], the dequantized weights and a vector of trained parameters, sequence by
//! sequence, with loops over rows. Its central differences ([`Reference::slope`]) are exact to nine digits, so the
//! distance to an analytic gradient is that gradient's own error. Trained parameters are found by name: a weight's own
//! name replaces the weight, `.lora_a`, `.lora_b` and `.lora_magnitude` behind it adapt it.

use std::collections::HashMap;

use kinglet_engine::cpu::isa::Isa;
use kinglet_engine::cpu::kernels::dropout::{Mask, dropout_inplace};
use kinglet_engine::quant::dequantize;
use kinglet_engine::random::{splitmix64, stream};
use kinglet_engine::session::{LearnBatch, Model};
use kinglet_engine::tape::{
    Frequencies, Gate, LayerSpec, LinearSpec, LoraSpec, Param, RopeSpec, RopeStyle, Spec, WeightRef,
};

/// Rows of equal width, one after the other.
type Rows = Vec<f64>;

/// See the module's text.
pub struct Reference {
    spec: Spec,
    weights: HashMap<String, Vec<f64>>,
    params: Vec<Param>,
    lora: LoraSpec,
}

/// Trained parameters at one point.
struct Point<'a> {
    reference: &'a Reference,
    values: &'a [f64],
    /// The values that the lengths of DoRA's rows are taken at: they count as constants in its gradient.
    fixed: &'a [f64],
    /// Seed of the dropout, and the first row of the sequence in its run; none when scoring.
    dropout: Option<(u64, usize)>,
}

impl Reference {
    /// The decoder of `model` with these trained parameters, those of `lora` where it has adapters.
    ///
    /// # Panics
    /// Where a weight cannot be dequantized.
    pub fn new(model: &Model, params: &[Param], lora: &LoraSpec) -> Reference {
        let weights = model.weights();
        let weights = weights.iter().map(|(id, w)| {
            let mut values = vec![0.0f32; w.rows * w.width];
            dequantize(w.dtype, weights.data(id), &mut values).expect("a weight");
            (w.name.clone(), values.into_iter().map(f64::from).collect())
        });
        Reference {
            spec: model.spec().clone(),
            weights: weights.collect(),
            params: params.to_vec(),
            lora: lora.clone(),
        }
    }

    /// `Σ weight · −ln p` over the batch's targets, with dropout.
    pub fn loss(&self, batch: &LearnBatch, values: &[f64]) -> f64 {
        self.loss_beside(batch, values, values)
    }

    fn loss_beside(&self, batch: &LearnBatch, values: &[f64], fixed: &[f64]) -> f64 {
        let mut first = 0;
        let mut loss = 0.0;
        for length in &batch.lengths {
            let tokens = &batch.tokens[first..first + length];
            let dropout = (self.lora.dropout > 0.0).then_some((batch.dropout_seed, first));
            let point = Point { reference: self, values, fixed, dropout };
            let hidden = point.hidden(tokens);
            for (output, (target, weight)) in batch.outputs.iter().zip(batch.targets.iter().zip(&batch.weights)) {
                let row = (*output as usize).wrapping_sub(first);
                if row < *length {
                    let width = self.spec.width;
                    loss += f64::from(*weight) * point.nll(&hidden[row * width..][..width], row, *target as usize);
                }
            }
            first += length;
        }
        loss
    }

    /// The derivative of [`Reference::loss`] at `values` along `direction`, by central differences.
    pub fn slope(&self, batch: &LearnBatch, values: &[f64], direction: &[f64]) -> f64 {
        let longest = direction.iter().fold(0.0f64, |m, d| m.max(d.abs())).max(1e-30);
        let step = 1e-5 / longest;
        let at = |by: f64| {
            let moved: Vec<f64> = values.iter().zip(direction).map(|(v, d)| v + by * d).collect();
            self.loss_beside(batch, &moved, values)
        };
        (at(step) - at(-step)) / (2.0 * step)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `x·Wᵀ` for rows of `x`, `W` being `[_, width]`.
fn product(x: &[f64], w: &[f64], width: usize) -> Rows {
    x.chunks_exact(width).flat_map(|x| w.chunks_exact(width).map(move |w| dot(x, w))).collect()
}

impl Point<'_> {
    fn param(&self, name: &str) -> Option<&[f64]> {
        let param = self.reference.params.iter().find(|p| p.name == name)?;
        self.values.get(param.offset..param.end())
    }

    fn weight(&self, reference: &WeightRef) -> &[f64] {
        let name = reference.name();
        self.param(&name).unwrap_or_else(|| &self.reference.weights[&name])
    }

    fn rms_norm(&self, x: &[f64], weight: &WeightRef) -> Rows {
        let (w, eps) = (self.weight(weight), f64::from(self.reference.spec.norm_eps));
        let norm = |x: &[f64]| {
            let rms = (dot(x, x) / x.len() as f64 + eps).sqrt();
            x.iter().zip(w).map(|(x, w)| x * w / rms).collect::<Vec<f64>>()
        };
        x.chunks_exact(w.len()).flat_map(norm).collect()
    }

    fn linear(&self, x: &[f64], width: usize, linear: &LinearSpec) -> Rows {
        let weight = self.weight(&linear.weight);
        let mut y = product(x, weight, width);
        let outputs = weight.len() / width;
        let name = linear.weight.name();
        let adapter = |part: &str| self.param(&format!("{name}.{part}"));
        let scale = f64::from(self.reference.lora.scale);
        if let (Some(a), Some(b)) = (adapter("lora_a"), adapter("lora_b")) {
            let rank = a.len() / width;
            let h = product(&self.drop(x, width, &name), a, width);
            y.iter_mut().zip(product(&h, b, rank)).for_each(|(y, d)| *y += scale * d);
        }
        if let Some(magnitude) = adapter("lora_magnitude") {
            let fixed = Point { values: self.fixed, ..*self };
            let fixed = |part: &str| fixed.param(&format!("{name}.{part}")).expect("both halves").to_vec();
            let (a, b) = (fixed("lora_a"), fixed("lora_b"));
            let rank = a.len() / width;
            let norm = |o: usize| {
                let entry = |i: usize| {
                    let product: f64 = (0..rank).map(|r| b[o * rank + r] * a[r * width + i]).sum();
                    weight[o * width + i] + scale * product
                };
                (0..width).map(|i| entry(i).powi(2)).sum::<f64>().sqrt()
            };
            let ratios: Vec<f64> = (0..outputs).map(|o| magnitude[o] / norm(o)).collect();
            y.chunks_exact_mut(outputs).for_each(|y| y.iter_mut().zip(&ratios).for_each(|(y, r)| *y *= r));
        }
        if let Some(bias) = &linear.bias {
            let bias = self.weight(bias);
            y.chunks_exact_mut(outputs).for_each(|y| y.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
        }
        y
    }

    /// An adapter's input without what falls.
    fn drop(&self, x: &[f64], width: usize, weight: &str) -> Rows {
        let Some((seed, first)) = self.dropout else { return x.to_vec() };
        let mask = Mask::new(stream(weight, 0) ^ splitmix64(seed, 0), self.reference.lora.dropout);
        let drop = |(row, x): (usize, &[f64])| {
            let mut factors = vec![1.0f32; width];
            dropout_inplace(Isa::detect(), &mask, first + row, &mut factors);
            x.iter().zip(factors).map(|(x, f)| x * f64::from(f)).collect::<Vec<f64>>()
        };
        x.chunks_exact(width).enumerate().flat_map(drop).collect()
    }

    fn rotate(&self, x: &mut [f64], position: usize, rope: &RopeSpec) {
        let pairs = rope.dims / 2;
        // Scaled frequencies have their own test, beside them; here they are given.
        let mut table = (rope.yarn.is_some() || rope.factors.is_some()).then(|| (vec![0.0; pairs], vec![0.0; pairs]));
        if let Some((cos, sin)) = &mut table {
            Frequencies::new(rope).table(position, cos, sin);
        }
        for i in 0..pairs {
            let frequency = f64::from(rope.base).powf(-2.0 * i as f64 / rope.dims as f64);
            let (sin, cos) = match &table {
                Some((cos, sin)) => (f64::from(sin[i]), f64::from(cos[i])),
                None => (position as f64 * f64::from(rope.scale) * frequency).sin_cos(),
            };
            let (p, q) = match rope.style {
                RopeStyle::Halves => (i, i + pairs),
                RopeStyle::Interleaved => (2 * i, 2 * i + 1),
            };
            (x[p], x[q]) = (x[p] * cos - x[q] * sin, x[p] * sin + x[q] * cos);
        }
    }

    /// Head norms and rotation of one layer's queries or keys.
    fn turn(&self, mut x: Rows, heads: usize, norm: Option<&WeightRef>, layer: &LayerSpec) -> Rows {
        let spec = &self.reference.spec;
        if let Some(norm) = norm {
            x = self.rms_norm(&x, norm);
        }
        if let Some(rope) = layer.rope {
            for (i, head) in x.chunks_exact_mut(spec.head_dim).enumerate() {
                self.rotate(head, i / heads, &spec.ropes[rope]);
            }
        }
        x
    }

    fn attention(&self, x: &[f64], layer: &LayerSpec) -> Rows {
        let spec = &self.reference.spec;
        let (dim, heads, kv_heads) = (spec.head_dim, spec.heads, spec.kv_heads);
        let q = self.turn(self.linear(x, spec.width, &layer.q), heads, layer.q_norm.as_ref(), layer);
        let k = self.turn(self.linear(x, spec.width, &layer.k), kv_heads, layer.k_norm.as_ref(), layer);
        let v = self.linear(x, spec.width, &layer.v);
        let tokens = x.len() / spec.width;
        let mut out = vec![0.0; tokens * heads * dim];
        for t in 0..tokens {
            let first = layer.window.map_or(0, |w| (t + 1).saturating_sub(w));
            for h in 0..heads {
                let at = |s: usize| (s * kv_heads + h * kv_heads / heads) * dim;
                let query = &q[(t * heads + h) * dim..][..dim];
                let score = |s: usize| {
                    let mut score = f64::from(spec.attention_scale) * dot(query, &k[at(s)..][..dim]);
                    if let Some(cap) = spec.attention_softcap.map(f64::from) {
                        score = cap * (score / cap).tanh();
                    }
                    score - spec.alibi.as_ref().map_or(0.0, |m| f64::from(m[h]) * (t - s) as f64)
                };
                let scores: Vec<f64> = (first..=t).map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                let out = &mut out[(t * heads + h) * dim..][..dim];
                for (s, score) in (first..=t).zip(&scores) {
                    let p = (score - max).exp() / sum;
                    out.iter_mut().zip(&v[at(s)..][..dim]).for_each(|(o, v)| *o += p * v);
                }
            }
        }
        out
    }

    fn branch(&self, x: &mut [f64], mut y: Rows, norm: Option<&WeightRef>) {
        if let Some(norm) = norm {
            y = self.rms_norm(&y, norm);
        }
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }

    /// The normed outputs of the last layer.
    fn hidden(&self, tokens: &[u32]) -> Rows {
        let spec = &self.reference.spec;
        let table = self.weight(&spec.embedding);
        let embed = |t: &u32| table[*t as usize * spec.width..][..spec.width].iter();
        let mut x: Rows = tokens.iter().flat_map(embed).copied().collect();
        let adapter = |part: &str| self.param(&format!("{}.{part}", spec.embedding.name()));
        if let (Some(a), Some(b)) = (adapter("lora_a"), adapter("lora_b")) {
            let rank = a.len() / spec.width;
            for (x, token) in x.chunks_exact_mut(spec.width).zip(tokens) {
                for r in 0..rank {
                    let factor = f64::from(self.reference.lora.scale) * b[*token as usize * rank + r];
                    x.iter_mut().zip(&a[r * spec.width..][..spec.width]).for_each(|(x, a)| *x += factor * a);
                }
            }
        }
        x.iter_mut().for_each(|x| *x *= f64::from(spec.embed_scale));
        for layer in &spec.layers {
            let h = self.rms_norm(&x, &layer.attention_norm);
            let y = self.linear(&self.attention(&h, layer), spec.heads * spec.head_dim, &layer.o);
            self.branch(&mut x, y, layer.post_attention_norm.as_ref());
            let h = self.rms_norm(&x, &layer.ffn_norm);
            let (gate, up) = (self.linear(&h, spec.width, &layer.gate), self.linear(&h, spec.width, &layer.up));
            let h: Rows = gate.iter().zip(up).map(|(g, u)| activation(spec.gate, *g) * u).collect();
            let y = self.linear(&h, spec.ffn, &layer.down);
            self.branch(&mut x, y, layer.post_ffn_norm.as_ref());
        }
        self.rms_norm(&x, &spec.output_norm)
    }

    /// `−ln p` behind one row, number `row` of the sequence.
    fn nll(&self, hidden: &[f64], row: usize, target: usize) -> f64 {
        let spec = &self.reference.spec;
        let head = LinearSpec { weight: spec.head.clone(), bias: None };
        let mut z = match spec.head == spec.embedding {
            // What adapts a shared matrix adapts the embedding.
            true => product(hidden, self.weight(&spec.head), spec.width),
            false => {
                let dropout = self.dropout.map(|(seed, first)| (seed, first + row));
                Point { dropout, ..*self }.linear(hidden, spec.width, &head)
            }
        };
        if let Some(cap) = spec.logit_softcap.map(f64::from) {
            z.iter_mut().for_each(|z| *z = cap * (*z / cap).tanh());
        }
        let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln() - z[target]
    }
}

fn activation(kind: Gate, x: f64) -> f64 {
    match kind {
        Gate::Silu => x / (1.0 + (-x).exp()),
        Gate::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
    }
}
