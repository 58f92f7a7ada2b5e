//! A decoder-only transformer, written down once for every family.
//!
//! Pre-norm residual blocks: attention with grouped heads, then a gated feed-forward part; optional norms of query and
//! key heads and of each branch's output. Everything else is in the [`Spec`](super::Spec).

use super::builder::Builder;
use super::op::Tape;
use super::spec::Spec;
use super::weights::Weights;

/// What a run of the tape is to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Logits of the output rows.
    Generate,
    /// Cross-entropy of a target at each output row.
    Score,
}

/// Writes the tape of `spec` for `purpose`.
pub fn build(spec: &Spec, weights: &Weights, purpose: Purpose) -> Tape {
    let mut b = Builder::new(spec, weights);
    let mut x = b.embed();
    for (index, layer) in spec.layers.iter().enumerate() {
        b.section(format!("blk.{index} "));
        let h = b.rms_norm(x, &layer.attention_norm);
        let qkv = b.qkv(h, layer);
        let mut attended = b.attention(qkv, layer, index);
        if index + 1 == spec.layers.len() {
            // Only rows whose result is wanted go on: the rest of a prompt has done its work in the cache.
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
        x = match &layer.post_ffn_norm {
            Some(norm) => {
                let branch = b.linear(h, &layer.down, "ffn out");
                b.add_rms_norm(x, branch, norm)
            }
            None => b.linear_add(h, &layer.down, x),
        };
    }
    b.section("");
    let h = b.rms_norm(x, &spec.output_norm);
    let result = match purpose {
        Purpose::Generate => b.head(h),
        Purpose::Score => b.cross_entropy(h),
    };
    b.finish(result)
}
