//! A decoder-only transformer, written down once for every family and for every purpose.
//!
//! Pre-norm residual blocks: attention with grouped heads, then a gated feed-forward part; optional norms of query and
//! key heads and of each branch's output. Everything else is in the [`Spec`]. For learning, the gradient
//! follows behind: see [`backward`](super::backward).

use std::ops::Range;

use super::backward::backward;
use super::builder::{Builder, Trained};
use super::op::{Op, Tape, Value};
use super::recompute::again;
use super::spec::Spec;
use super::weights::Weights;

/// What a run of the tape is to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Logits of the output rows.
    Generate,
    /// The states that the head would read, of the output rows: `[outputs, width]`.
    Embed,
    /// Cross-entropy of a target at each output row.
    Score,
    /// As `Score`, and the gradients of what is trained.
    Learn,
}

/// Which part of a model a tape computes, where a model is divided between two executors. The spec has the layers of that
/// part only ([`Spec::with_layers`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// From tokens to the result.
    #[default]
    Whole,
    /// From tokens to the residual stream behind the part's last layer, `[T, width]`, whatever the purpose.
    First,
    /// From the residual stream before the part's first layer, which the run is given, to the result.
    Last,
}

/// Writes the tape of `spec` for generating or scoring.
pub fn build(spec: &Spec, weights: &Weights, purpose: Purpose, stage: Stage) -> Tape {
    let mut b = Builder::new(spec, weights);
    let mut x = match stage {
        Stage::Whole | Stage::First => b.embed(),
        Stage::Last => b.input(),
    };
    for index in 0..spec.layers.len() {
        let narrows = stage != Stage::First && index + 1 == spec.layers.len();
        x = layer(&mut b, x, index, narrows);
    }
    b.section("");
    if stage == Stage::First {
        return b.finish(x);
    }
    let h = b.rms_norm(x, &spec.output_norm);
    let result = match purpose {
        Purpose::Generate => b.head(h),
        Purpose::Embed => h,
        Purpose::Score | Purpose::Learn => b.cross_entropy(h),
    };
    b.finish(result)
}

/// Writes the tape that scores sequences with what is trained and, for [`Purpose::Learn`], adds up its gradients.
///
/// A layer's input is kept and the layer computed again when its gradient is due, but for the last `kept` layers, whose
/// values stay, all that are not cheap to compute: more memory, less work.
pub fn build_learning(spec: &Spec, weights: &Weights, trained: &Trained, purpose: Purpose, kept: usize) -> Tape {
    let mut b = Builder::learning(spec, weights, trained, purpose == Purpose::Learn);
    let mut x = b.embed();
    let embed = b.ops.clone();
    let mut inputs = Vec::new();
    let mut ranges = Vec::new();
    for index in 0..spec.layers.len() {
        inputs.push(x);
        let start = b.ops.len();
        x = layer(&mut b, x, index, index + 1 == spec.layers.len());
        ranges.push(start..b.ops.len());
    }
    b.section("");
    let start = b.ops.len();
    let h = b.rms_norm(x, &spec.output_norm);
    if purpose != Purpose::Learn {
        let result = b.cross_entropy(h);
        return b.finish(result);
    }
    let norm = b.ops[start..].to_vec();
    let (result, dh) = b.cross_entropy_grad(h);
    // Nothing below the first layer that learns needs a gradient, unless the embedding learns.
    let learns = |range: &Range<usize>| b.ops[range.clone()].iter().any(|op| matches!(op, Op::Lora(_)));
    let lowest = match b.trains_embedding() {
        true => None,
        false => Some(ranges.iter().position(learns).unwrap_or(ranges.len())),
    };
    let needed = |index: usize| lowest.is_none_or(|lowest| index > lowest);
    let mut dx = backward(&mut b, &norm, h, dh, needed(ranges.len()).then_some(x));
    let first_kept = spec.layers.len().saturating_sub(kept.max(1));
    for (index, range) in ranges.into_iter().enumerate().rev() {
        let Some(gradient) = dx else { break };
        let (ops, out) = if index >= first_kept {
            b.section(format!("blk.{index} "));
            let kept = b.ops[range].to_vec();
            (again(&mut b, &kept), x)
        } else {
            let start = b.ops.len();
            let out = layer(&mut b, inputs[index], index, index + 1 == spec.layers.len());
            (b.ops[start..].to_vec(), out)
        };
        b.section(format!("blk.{index} gradient "));
        dx = backward(&mut b, &ops, out, gradient, needed(index).then_some(inputs[index]));
        x = inputs[index];
    }
    if let Some(gradient) = dx {
        b.section("");
        b.embed_backward(&embed, gradient);
    }
    b.finish(result)
}

/// One decoder layer; where it `narrows`, only rows whose result is wanted leave it.
fn layer(b: &mut Builder<'_>, mut x: Value, index: usize, narrows: bool) -> Value {
    let spec = b.spec;
    let layer = &spec.layers[index];
    b.section(format!("blk.{index} "));
    let h = b.rms_norm(x, &layer.attention_norm);
    let qkv = b.qkv(h, layer);
    let mut attended = b.attention(qkv, layer, index);
    if narrows {
        // The rest of a prompt has done its work in the cache.
        attended = b.gather_outputs(attended);
        x = b.gather_outputs(x);
    }
    x = match &layer.post_attention_norm {
        Some(norm) => {
            let branch = b.linear(attended, &layer.o, "attention out");
            b.add_rms_norm(x, branch, norm)
        }
        None => b.linear_add(attended, &layer.o, x),
    };
    let h = b.rms_norm(x, &layer.ffn_norm);
    let h = b.gated(h, &layer.gate, &layer.up, spec.gate);
    match &layer.post_ffn_norm {
        Some(norm) => {
            let branch = b.linear(h, &layer.down, "ffn out");
            b.add_rms_norm(x, branch, norm)
        }
        None => b.linear_add(h, &layer.down, x),
    }
}
