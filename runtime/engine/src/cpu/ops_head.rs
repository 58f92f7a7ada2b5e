//! The end of a learning tape where the head learns: the cross-entropy's gradient in two passes, and the head's adapter,
//! whose second half is part of both. (Where the head does not learn, `ops_loss` does it in one.)
//!
//! What the head learns is a sum over rows of finished probabilities, so the logits are computed once for their sums and
//! once for their gradients; they are never whole. Each pass goes chunk by chunk of the vocabulary, and what the adapter adds to a chunk,
//! `scale·h·Bᵀ` and the learned lengths of DoRA, is added while the chunk is at hand.

use std::ops::Range;

use super::executor::{Context, Scratch, VOCAB_CHUNK};
use super::kernels::{activation, gemm, linear, vector};
use super::matrix::Matrix;
use super::ops_learn::{begin, linear_backward, product, product_to, rows_mut};
use super::pool::Team;
use super::{ops, ops_weights};
use crate::tape::{HeadLora, Op, Value, WeightId, magnitude_ratio};

/// Executes this thread's part of an op of the head's adapter.
///
/// # Safety
/// As for [`ops::run`].
pub(super) unsafe fn run(c: &Context<'_>, op: &Op, team: &Team<'_>) {
    // SAFETY: as in `ops::run`: each thread writes rows of its own share, of values and of parameters.
    unsafe {
        match op {
            Op::LoraHidden(op) => {
                let (x, h) = (c.matrix(op.x), c.matrix(op.h));
                let rows = team.share(x.rows, 1);
                if rows.is_empty() {
                    return;
                }
                let sizes = (rows.len(), h.width, x.width);
                let (x, a) = ((x.all(rows.clone()), x.width), (c.param(op.a), x.width));
                product(c, gemm::gemm_nt, sizes, 1.0, x, a, rows_mut(&h, rows), false);
            }
            Op::LoraHiddenBackward { forward, e, dx, out } => {
                let (x, e, y) = (c.matrix(forward.x), c.matrix(*e), c.matrix(*out));
                let rows = team.share(x.rows, 1);
                if !rows.is_empty() {
                    begin(c, *dx, *out, rows.clone());
                    let sizes = (rows.len(), y.width, e.width);
                    let (e, a) = ((e.all(rows.clone()), e.width), (c.param(forward.a), y.width));
                    product(c, gemm::gemm_nn, sizes, 1.0, e, a, rows_mut(&y, rows), dx.is_some());
                }
                ops_weights::add_product(c, forward.a, 0..e.width, 1.0, &e, &x, team);
            }
            _ => unreachable!("{} is no op of the head", op.name()),
        }
    }
}

/// Adds `scale·h·Bᵀ` to the logits of some tokens, which lie in `out` from its column `at` on.
///
/// # Safety
/// `h` is complete; this thread alone uses those columns.
pub(super) unsafe fn add(c: &Context<'_>, adapter: &HeadLora, tokens: Range<usize>, out: &Matrix, at: usize) {
    let h = c.matrix(adapter.h);
    if tokens.is_empty() || h.rows == 0 {
        return;
    }
    debug_assert!(at + tokens.len() <= out.width && h.rows <= out.rows);
    let sizes = (h.rows, tokens.len(), h.width);
    let b = &c.param(adapter.b)[tokens.start * h.width..tokens.end * h.width];
    // SAFETY: within the matrix, whose elements from `at` on remain; exclusive by the caller's promise.
    let (h, to) = unsafe {
        let to = linear::OutMut::new(out.row_ptr(0).add(at), out.width, out.rows * out.width - at);
        (h.all(0..h.rows), to)
    };
    product_to(c, gemm::gemm_nt, sizes, adapter.scale, (h, sizes.2), (b, sizes.2), to, true);
}

/// Factors on the logits of some tokens.
///
/// # Safety
/// The norms are complete.
unsafe fn ratios(c: &Context<'_>, adapter: &HeadLora, tokens: Range<usize>) -> Option<Vec<f32>> {
    let (magnitude, norms) = adapter.rescale?;
    // SAFETY: by the caller's promise.
    let norms = unsafe { &c.matrix(norms).row(0)[tokens.clone()] };
    Some(c.param(magnitude)[tokens].iter().zip(norms).map(|(m, n)| magnitude_ratio(*m, *n)).collect())
}

/// Gives the logits of some tokens their learned lengths.
///
/// # Safety
/// As for [`add`].
pub(super) unsafe fn rescale(c: &Context<'_>, adapter: &HeadLora, tokens: Range<usize>, out: &Matrix, at: usize) {
    // SAFETY: by the caller's promise.
    unsafe {
        let Some(ratios) = ratios(c, adapter, tokens.clone()) else { return };
        for row in 0..out.rows {
            let z = out.columns_mut(row, at..at + tokens.len());
            z.iter_mut().zip(&ratios).for_each(|(z, ratio)| *z *= ratio);
        }
    }
}

/// The second pass of a cross-entropy: chunk by chunk of the vocabulary all threads compute `g·(softmax − onehot)`, then
/// each multiplies it with the chunk's weights for its own rows.
///
/// # Safety
/// As for [`ops::run`].
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn cross_entropy_gradient(
    c: &Context<'_>,
    x: Value,
    weight: WeightId,
    nll: Value,
    dx: Value,
    adapter: Option<&(HeadLora, Value)>,
    team: &Team<'_>,
    scratch: &mut Scratch,
) {
    let rows = c.outputs.len();
    if rows == 0 {
        return;
    }
    team.wait();
    let vocab = c.weights.get(weight).rows;
    let (nll, dx, input) = (c.matrix(nll), c.matrix(dx), c.matrix(x));
    // SAFETY: the input was finished long before; the partial sums' and target logits' places as in `cross_entropy`,
    // and the probabilities' place behind them.
    let (x, targets, probabilities) = unsafe {
        let targets = c.arena.add(c.tables.partial).cast::<f32>().add(2 * vocab.div_ceil(VOCAB_CHUNK) * rows);
        let probabilities = Matrix::new(c.arena.add(c.tables.probabilities).cast(), rows, VOCAB_CHUNK);
        (c.linear_input(x, std::iter::once(weight), team), targets, probabilities)
    };
    let (mut capped, mut unscaled) = (Vec::new(), Vec::new());
    for start in (0..vocab).step_by(VOCAB_CHUNK) {
        let chunk = start..(start + VOCAB_CHUNK).min(vocab);
        let mine = team.share(chunk.len(), ops::ROW_UNIT);
        let tokens = start + mine.start..start + mine.end;
        if !mine.is_empty() {
            c.linear_rows(weight, chunk.start, mine.clone(), &x, &probabilities, false, &mut scratch.linear);
        }
        let mut ratio = None;
        if let Some((adapter, _)) = adapter {
            // SAFETY: this thread's columns; hidden values and norms were computed before.
            unsafe {
                add(c, adapter, tokens.clone(), &probabilities, mine.start);
                ratio = ratios(c, adapter, tokens.clone());
            }
        }
        let mut sums = vec![0.0f64; if ratio.is_some() { mine.len() } else { 0 }];
        for row in 0..rows {
            // SAFETY: this thread's columns.
            unsafe {
                let z = probabilities.columns_mut(row, mine.clone());
                if let Some(ratio) = &ratio {
                    unscaled.clear();
                    unscaled.extend_from_slice(z);
                    z.iter_mut().zip(ratio).for_each(|(z, ratio)| *z *= ratio);
                }
                // Log-sum-exp is what the cross-entropy adds to the target's logit.
                let lse = *targets.add(row) + nll.row(row)[0];
                let g = c.row_weights[row];
                let at = (c.targets[row] as usize).checked_sub(tokens.start).filter(|t| *t < mine.len());
                if let Some(cap) = c.tape.spec.logit_softcap {
                    activation::softcap(c.isa, z, cap);
                    capped.clear();
                    capped.extend_from_slice(z);
                    vector::cross_entropy_backward(c.isa, z, lse, at, g);
                    activation::softcap_backward(c.isa, &capped, cap, z);
                } else {
                    vector::cross_entropy_backward(c.isa, z, lse, at, g);
                }
                if let Some(ratio) = &ratio {
                    for (((d, y), ratio), sum) in z.iter_mut().zip(&unscaled).zip(ratio).zip(&mut sums) {
                        *sum += f64::from(*d) * f64::from(*y);
                        *d *= ratio;
                    }
                }
            }
        }
        if let Some((magnitude, norms)) = adapter.and_then(|(adapter, _)| adapter.rescale) {
            // SAFETY: this thread's columns of the magnitude's one row; the norms are complete.
            unsafe {
                let norms = &c.matrix(norms).row(0)[tokens.clone()];
                let gradient = c.gradient_columns(magnitude, 0, tokens.clone());
                for ((gradient, norm), sum) in gradient.iter_mut().zip(norms).zip(sums) {
                    *gradient += magnitude_ratio(sum as f32, *norm);
                }
            }
        }
        team.wait();
        let mine = team.share(rows, 1);
        // SAFETY: this thread's rows of the gradients; the chunk's probabilities are complete until the next barrier, and
        // threads divide the rows of the parameters.
        unsafe {
            linear_backward(c, weight, chunk.clone(), &probabilities, mine.clone(), &dx, start > 0, scratch);
            if let Some(head) = c.trained(weight) {
                ops_weights::add_product(c, head, chunk.clone(), 1.0, &probabilities, &input, team);
            }
            if let Some((adapter, e)) = adapter {
                let (h, e) = (c.matrix(adapter.h), c.matrix(*e));
                if !mine.is_empty() {
                    let sizes = (mine.len(), e.width, chunk.len());
                    let b = &c.param(adapter.b)[chunk.start * e.width..chunk.end * e.width];
                    let dz = (probabilities.all(mine.clone()), probabilities.width);
                    let out = rows_mut(&e, mine);
                    product(c, gemm::gemm_nn, sizes, adapter.scale, dz, (b, e.width), out, start > 0);
                }
                ops_weights::add_product(c, adapter.b, chunk, adapter.scale, &probabilities, &h, team);
            }
        }
        team.wait();
    }
}
