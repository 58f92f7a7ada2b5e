//! Reverse mode: appends, for a stretch of ops, the ops that compute their gradients, one rule per op.
//!
//! Gradients exist for values and for what is trained: adapters, through [`Op::Lora`], or the weights themselves, which
//! get ops of their own. A value's gradient that has several sources is passed from rule to rule as `dx` and added to;
//! where it is not needed (nothing that learns lies before it) the work is left out.

use std::collections::{HashMap, HashSet};

use super::builder::Builder;
use super::op::{Epilogue, KvSource, Op, Rows, Value, WeightId};
use super::op_learn::{AttentionBackward, LoraBackward};

/// Gradients by value, and which values need one.
struct Gradients {
    of: HashMap<Value, Value>,
    needed: HashSet<Value>,
}

impl Gradients {
    fn take(&mut self, value: Value) -> Option<Value> {
        self.of.remove(&value)
    }

    /// Hands on a gradient that passes through an op unchanged.
    fn pass(&mut self, value: Value, gradient: Value) {
        if self.needed.contains(&value) {
            let before = self.of.insert(value, gradient);
            debug_assert!(before.is_none(), "the decoder reads a residual last where it adds to it");
        }
    }
}

/// Appends the gradients of `ops`, a stretch of the tape: from `gradient`, that of `out`, down to that of `input`, which
/// is returned. Without `input` nothing before the stretch learns, and only its own adapters get gradients.
pub(super) fn backward(
    b: &mut Builder<'_>,
    ops: &[Op],
    out: Value,
    gradient: Value,
    input: Option<Value>,
) -> Option<Value> {
    let mut needed: HashSet<Value> = input.into_iter().collect();
    for op in ops {
        if b.trains_weights() || matches!(op, Op::Lora(_)) || op.reads().iter().any(|v| needed.contains(v)) {
            needed.extend(op.writes());
        }
    }
    let mut g = Gradients { of: HashMap::from([(out, gradient)]), needed };
    for op in ops.iter().rev() {
        rule(b, op, &mut g);
    }
    g.take(input?)
}

/// The gradient of a norm's weight, if it is trained.
fn norm_weight(b: &mut Builder<'_>, x: Value, weight: WeightId, dy: Value) {
    if b.trains_weights() {
        b.ops.push(Op::RmsNormWeightBackward { x, weight, dy });
    }
}

fn rule(b: &mut Builder<'_>, op: &Op, g: &mut Gradients) {
    // An output that a rule writes: a new value of the same shape as the one it is the gradient of.
    let like = |b: &mut Builder<'_>, value: Value, name: &str| {
        let (rows, width) = b.shape(value);
        b.value(rows, width, name)
    };
    match op {
        Op::RmsNorm { x, weight, out } => {
            let Some(dy) = g.take(*out) else { return };
            norm_weight(b, *x, *weight, dy);
            if g.needed.contains(x) {
                let dx = g.take(*x);
                let out = like(b, *x, "d norm");
                b.ops.push(Op::RmsNormBackward { x: *x, weight: *weight, dy, dx, out });
                g.of.insert(*x, out);
            }
        }
        Op::AddRmsNorm { x, y, weight, out } => {
            let Some(dy) = g.take(*out) else { return };
            g.pass(*x, dy);
            norm_weight(b, *y, *weight, dy);
            let d_branch = like(b, *y, "d branch");
            b.ops.push(Op::RmsNormBackward { x: *y, weight: *weight, dy, dx: None, out: d_branch });
            g.of.insert(*y, d_branch);
        }
        Op::Linear(l) => {
            let mut parts = Vec::new();
            for part in &l.parts {
                if let Some(dy) = g.take(part.out) {
                    parts.push((dy, part.weight));
                }
            }
            if let (Epilogue::Add(residual), Some((dy, _))) = (&l.epilogue, parts.first()) {
                g.pass(*residual, *dy);
            }
            if !parts.is_empty() && b.trains_weights() {
                let bias = |id: WeightId| l.parts.iter().find(|p| p.weight == id).and_then(|p| p.bias);
                let parts = parts.iter().map(|(dy, id)| (*dy, *id, bias(*id))).collect();
                b.ops.push(Op::LinearWeightBackward { x: l.x, parts });
            }
            if !parts.is_empty() && g.needed.contains(&l.x) {
                let dx = g.take(l.x);
                let out = like(b, l.x, "d linear");
                b.ops.push(Op::LinearBackward { parts, dx, out });
                g.of.insert(l.x, out);
            }
        }
        Op::Lora(l) => {
            let Some(dy) = g.take(l.out) else { return };
            let e = like(b, l.h, "d lora");
            let (mut dx, mut out) = (None, None);
            if g.needed.contains(&l.x) {
                dx = g.take(l.x);
                out = Some(like(b, l.x, "d lora input"));
            }
            b.ops.push(Op::LoraBackward(LoraBackward { forward: *l, dy, dx, e, out }));
            if let Some(out) = out {
                g.of.insert(l.x, out);
            }
            // The map itself, unlike the adapter, may lie behind nothing that learns; its rule decides.
            g.of.insert(l.y, dy);
        }
        Op::Dropout(d) => {
            let Some(dy) = g.take(d.out) else { return };
            let dx = g.take(d.x);
            let out = like(b, d.x, "d dropout");
            b.ops.push(Op::DropoutBackward { forward: *d, dy, dx, out });
            g.of.insert(d.x, out);
        }
        Op::Rescale(r) => {
            let Some(dy) = g.take(r.out) else { return };
            if let Some(residual) = r.residual {
                g.pass(residual, dy);
            }
            let out = like(b, r.y, "d rescaled");
            b.ops.push(Op::RescaleBackward { forward: *r, dy, out });
            g.of.insert(r.y, out);
        }
        Op::Gated { kind, gate, up, out } => {
            let Some(dy) = g.take(*out) else { return };
            let (d_gate, d_up) = (like(b, *gate, "d gate"), like(b, *up, "d up"));
            b.ops.push(Op::GatedBackward { kind: *kind, gate: *gate, up: *up, dy, d_gate, d_up });
            g.of.insert(*gate, d_gate);
            g.of.insert(*up, d_up);
        }
        Op::Attention(a) => {
            let (Some(d_out), KvSource::Rows(k, v), Some(lse)) = (g.take(a.out), a.kv, a.lse) else { return };
            let d_qkv = [like(b, a.q, "d q"), like(b, k, "d k"), like(b, v, "d v")];
            b.ops.push(Op::AttentionBackward(AttentionBackward {
                qkv: [a.q, k, v],
                out: a.out,
                lse,
                d_out,
                d_qkv,
                window: a.window,
            }));
            for (value, gradient) in [a.q, k, v].into_iter().zip(d_qkv) {
                g.of.insert(value, gradient);
            }
        }
        Op::Rope(r) => {
            let (Some(dq), Some(dk)) = (g.take(r.q_out), g.take(r.k_out)) else { return };
            if b.trains_weights() && (r.q_norm.is_some() || r.k_norm.is_some()) {
                b.ops.push(Op::HeadNormWeightBackward { forward: *r, d: [dq, dk] });
            }
            let out = [like(b, r.q, "d q turned back"), like(b, r.k, "d k turned back")];
            b.ops.push(Op::RopeBackward { forward: *r, d: [dq, dk], out });
            g.of.insert(r.q, out[0]);
            g.of.insert(r.k, out[1]);
        }
        Op::GatherOutputs { x, out } => {
            let Some(dy) = g.take(*out) else { return };
            if g.needed.contains(x) {
                let width = b.shape(*x).1;
                let out = b.value(Rows::Tokens, width, "d outputs");
                b.ops.push(Op::ScatterOutputs { x: dy, out });
                g.of.insert(*x, out);
            }
        }
        // The first of a tape, the ends of others, and gradients themselves, which have no gradient here.
        Op::Input { .. }
        | Op::Embed { .. }
        | Op::Head { .. }
        | Op::CrossEntropy { .. }
        | Op::CrossEntropyGrad { .. }
        | Op::EmbedLora(_)
        | Op::EmbedLoraBackward { .. }
        | Op::LoraHidden(_)
        | Op::LoraHiddenBackward { .. }
        | Op::RowNorms { .. }
        | Op::LoraBackward(_)
        | Op::DropoutBackward { .. }
        | Op::RescaleBackward { .. }
        | Op::LinearBackward { .. }
        | Op::LinearWeightBackward { .. }
        | Op::RmsNormWeightBackward { .. }
        | Op::HeadNormWeightBackward { .. }
        | Op::EmbedBackward { .. }
        | Op::RmsNormBackward { .. }
        | Op::GatedBackward { .. }
        | Op::AttentionBackward(_)
        | Op::RopeBackward { .. }
        | Op::ScatterOutputs { .. } => {}
    }
}
