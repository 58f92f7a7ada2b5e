//! The cross-entropy with its gradient in one pass over the vocabulary, for a head that is not trained.
//!
//! Logits of a whole batch would not fit: a chunk of the vocabulary at a time they are computed and turned into `e^(z − M)`,
//! with M the largest logit of the row so far, and multiplied with the chunk's weights into the gradient of the input. When
//! M grows, what was added up before shrinks by `e^(M − M')`, as in attention (Milakov and Gimelshein 2018,
//! arXiv:1805.02867). At the end
//!
//!   −ln p = M + ln S − z_target,   dx = g · (Σᵥ e^(zᵥ − M)·Wᵥ / S − W_target),
//!
//! with S the sum of the exponentials. A target that is a distribution puts its mean over z and W in place of those of the one
//! token. So the logits, a quarter of a small model's forward pass, are computed once only.
//! Three phases a chunk: logits, divided by rows of the head; exponentials, divided by rows of the batch; the gradient.

use super::executor::{Arithmetic, Context, Scratch, VOCAB_CHUNK};
use super::kernels::{activation, vector};
use super::matrix::Matrix;
use super::pool::Team;
use super::{ops, ops_learn};
use crate::quant;
use crate::tape::{Value, WeightId};

/// What is known of a row of logits after some chunks.
#[derive(Clone, Copy)]
struct Row {
    /// The largest logit.
    max: f32,
    /// Σ e^(z − max).
    sum: f32,
}

/// What a row's target consists of: one token, or several with their shares.
struct Wanted {
    token: usize,
    share: f32,
    /// Its logit, once its chunk has been seen.
    logit: f32,
}

/// The targets of an output row.
fn wanted(c: &Context<'_>, row: usize) -> Vec<Wanted> {
    let (tokens, shares) = match c.soft_targets.of(row) {
        ([], _) => (&c.targets[row..row + 1], [1.0].as_slice()),
        soft => soft,
    };
    let one = |(token, share): (&u32, &f32)| Wanted { token: *token as usize, share: *share, logit: 0.0 };
    tokens.iter().zip(shares).map(one).collect()
}

/// Executes this thread's part: cross-entropies to the first of the outputs, gradients to the second.
///
/// # Safety
/// As for [`ops::run`].
pub(super) unsafe fn cross_entropy_grad(
    c: &Context<'_>,
    (x, weight): (Value, WeightId),
    (out, dx): (Value, Value),
    team: &Team<'_>,
    scratch: &mut Scratch,
) {
    let rows = c.outputs.len();
    if rows == 0 {
        return;
    }
    let vocab = c.weights.get(weight).rows;
    let (nll, dx) = (c.matrix(out), c.matrix(dx));
    // SAFETY: the input was finished before the last barrier; places of the arena that were reserved for this.
    let (x, states, probabilities) = unsafe {
        let states = c.arena.add(c.tables.partial).cast::<Row>();
        let probabilities = Matrix::new(c.arena.add(c.tables.probabilities).cast(), rows, VOCAB_CHUNK);
        (c.linear_input(x, std::iter::once(weight), team), states, probabilities)
    };
    let mine = team.share(rows, 1);
    let mut targets: Vec<Vec<Wanted>> = mine.clone().map(|row| wanted(c, row)).collect();
    let mut capped = Vec::new();
    for start in (0..vocab).step_by(VOCAB_CHUNK) {
        let chunk = start..(start + VOCAB_CHUNK).min(vocab);
        let columns = team.share(chunk.len(), ops::ROW_UNIT);
        if !columns.is_empty() {
            c.linear_rows(weight, start, columns, &x, &probabilities, false, &mut scratch.linear);
        }
        team.wait();
        for (row, targets) in mine.clone().zip(&mut targets) {
            // SAFETY: the chunk's logits are complete; this thread's rows of everything.
            unsafe {
                let z = probabilities.columns_mut(row, 0..chunk.len());
                let state = &mut *states.add(row);
                if start == 0 {
                    *state = Row { max: f32::NEG_INFINITY, sum: 0.0 };
                }
                if let Some(shrink) = soften(c, z, start, targets, state, &mut capped).filter(|_| start > 0) {
                    vector::scale(c.isa, shrink, dx.row_mut(row));
                }
            }
        }
        // SAFETY: this thread's rows, or columns once all rows are complete.
        unsafe {
            if c.arithmetic != Arithmetic::Exact {
                let place = c.tables.rounded[1];
                ops_learn::round(c, weight, &probabilities, chunk.len(), mine.clone(), place);
                team.wait();
                let dy = (rows, chunk.len(), place);
                let columns = team.share(dx.width, ops::ROW_UNIT);
                ops_learn::rounded_columns(c, weight, chunk, dy, columns, &dx, start > 0, scratch);
            } else {
                ops_learn::linear_backward(c, weight, chunk, &probabilities, mine.clone(), &dx, start > 0, scratch);
            }
        }
        team.wait();
    }
    let mut target_weights = vec![0.0; dx.width];
    for (row, targets) in mine.zip(&targets) {
        // SAFETY: this thread's rows.
        unsafe {
            let (state, dx, g) = (*states.add(row), dx.row_mut(row), c.row_weights[row]);
            let logit: f64 = targets.iter().map(|t| f64::from(t.share) * f64::from(t.logit)).sum();
            nll.row_mut(row)[0] = (f64::from(state.max) + f64::from(state.sum).ln() - logit) as f32;
            vector::scale(c.isa, g / state.sum, dx);
            for target in targets {
                let (dtype, bytes) = c.weight_rows(weight, target.token..target.token + 1);
                // The sizes were checked when the weights were resolved.
                if let Err(e) = quant::dequantize(dtype, bytes, &mut target_weights) {
                    unreachable!("{}: {e}", c.weights.get(weight).name);
                }
                let mut slope = [g * target.share];
                if let Some(cap) = c.tape.spec.logit_softcap {
                    activation::softcap_backward(c.isa, &[target.logit], cap, &mut slope);
                }
                vector::axpy(c.isa, -slope[0], &target_weights, dx);
            }
        }
    }
}

/// Turns a chunk of a row's logits into what its weights are multiplied with, but for the factor g / S: e^(z − M), times the
/// slope of the soft cap where there is one. Gives the factor on everything before, when M has grown. The chunk begins with
/// token `start`.
fn soften(
    c: &Context<'_>,
    z: &mut [f32],
    start: usize,
    targets: &mut [Wanted],
    state: &mut Row,
    capped: &mut Vec<f32>,
) -> Option<f32> {
    let cap = c.tape.spec.logit_softcap;
    if let Some(cap) = cap {
        activation::softcap(c.isa, z, cap);
        capped.clear();
        capped.extend_from_slice(z);
    }
    for target in targets {
        if let Some(z) = target.token.checked_sub(start).and_then(|t| z.get(t)) {
            target.logit = *z;
        }
    }
    let max = vector::max(c.isa, z);
    let mut shrink = None;
    if max > state.max {
        let factor = (state.max - max).exp();
        state.sum *= factor;
        state.max = max;
        shrink = Some(factor);
    }
    state.sum += vector::exp_shifted(c.isa, state.max, z) as f32;
    if let Some(cap) = cap {
        activation::softcap_backward(c.isa, capped, cap, z);
    }
    shrink
}
