//! What is not worth keeping of a kept layer: values that take a pass over memory to compute again, and a third of the
//! layer's memory to keep.
//!
//! Norms, activated products and dropped inputs are read by the gradients of adapters and weights only, once, a whole
//! forward pass later. Their ops are written down a second time, right before the layer's gradient, with new outputs, and
//! the layer's other ops are made to read those: the old values then die in the forward pass.

use std::collections::HashMap;

use super::builder::Builder;
use super::op::{Op, Value};

/// Appends the cheap ones among `ops`, a stretch of the tape, once more; gives the stretch with their new outputs in place
/// of the old ones, for [`backward`](super::backward).
pub(super) fn again(b: &mut Builder<'_>, ops: &[Op]) -> Vec<Op> {
    let mut new: HashMap<Value, Value> = HashMap::new();
    let mut stretch = Vec::with_capacity(ops.len());
    for op in ops {
        let mut op = op.clone();
        match &mut op {
            Op::RmsNorm { out, .. } | Op::Gated { out, .. } => {
                *out = renew(b, *out, &mut new);
                b.ops.push(op.clone());
            }
            Op::Dropout(d) => {
                read(&mut d.x, &new);
                d.out = renew(b, d.out, &mut new);
                b.ops.push(op.clone());
            }
            Op::Linear(l) => read(&mut l.x, &new),
            Op::Lora(l) => read(&mut l.x, &new),
            _ => {}
        }
        stretch.push(op);
    }
    stretch
}

/// A new value of the shape of `old`, which stands for it from here on.
fn renew(b: &mut Builder<'_>, old: Value, new: &mut HashMap<Value, Value>) -> Value {
    let (rows, width) = b.shape(old);
    let value = b.value(rows, width, "again");
    new.insert(old, value);
    value
}

fn read(value: &mut Value, new: &HashMap<Value, Value>) {
    if let Some(new) = new.get(value) {
        *value = *new;
    }
}
