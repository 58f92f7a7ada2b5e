//! Gradients of the weights themselves, where all of a model is trained: matrices and biases of linear maps, norms, the
//! embedding, the head. And the embedding's adapter, which is like an embedding in its one half.
//!
//! Each is a sum over the rows of a run. Threads divide the elements of the parameter and add up all rows in order, so
//! that a run gives the same bits for any number of threads, also where a token occurs twice and its row of the embedding
//! is added to twice.

use std::ops::Range;

use super::executor::Context;
use super::kernels::{gemm, norm, vector};
use super::matrix::Matrix;
use super::pool::Team;
use super::{ops, ops_learn};
use crate::tape::{EmbedLora, Op, ParamId, Rope, Value, WeightId};

/// Executes this thread's part of an op that computes gradients of weights.
///
/// # Safety
/// As for [`ops::run`].
pub(super) unsafe fn run(c: &Context<'_>, op: &Op, team: &Team<'_>) {
    // SAFETY: as in `ops::run`: each arm writes elements of this thread's share only.
    unsafe {
        match op {
            Op::LinearWeightBackward { x, parts } => {
                let x = c.matrix(*x);
                for (dy, weight, bias) in parts {
                    let dy = c.matrix(*dy);
                    if let Some(id) = c.trained(*weight) {
                        add_product(c, id, 0..dy.width, 1.0, &dy, &x, team);
                    }
                    if let Some(id) = bias.and_then(|bias| c.trained(bias)) {
                        let columns = team.share(dy.width, ops::ROW_UNIT);
                        let sum = c.gradient_columns(id, 0, columns.clone());
                        for row in 0..dy.rows {
                            vector::add(c.isa, &dy.row(row)[columns.clone()], sum);
                        }
                    }
                }
            }
            Op::RmsNormWeightBackward { x, weight, dy } => {
                let (Some(id), x, dy) = (c.trained(*weight), c.matrix(*x), c.matrix(*dy)) else { return };
                let columns = team.share(x.width, ops::ROW_UNIT);
                let sum = c.gradient_columns(id, 0, columns.clone());
                for row in 0..x.rows {
                    let (x, dy) = (x.row(row), &dy.row(row)[columns.clone()]);
                    let inv_rms = norm::inverse_rms(c.isa, x, c.tape.spec.norm_eps);
                    norm::rms_norm_backward_weight(c.isa, &x[columns.clone()], dy, inv_rms, sum);
                }
            }
            Op::HeadNormWeightBackward { forward, d } => head_norms(c, forward, *d, team),
            Op::EmbedBackward { table, scale, dy } => {
                let (Some(id), dy) = (c.trained(*table), c.matrix(*dy)) else { return };
                let columns = team.share(dy.width, ops::ROW_UNIT);
                for (row, token) in c.tokens.iter().enumerate() {
                    let sum = c.gradient_columns(id, *token as usize, columns.clone());
                    vector::axpy(c.isa, *scale, &dy.row(row)[columns.clone()], sum);
                }
            }
            Op::EmbedLora(op) => embed_lora(c, op, team),
            Op::EmbedLoraBackward { forward, dy, e } => embed_lora_backward(c, forward, *dy, *e, team),
            _ => unreachable!("{} is no op of learning", op.name()),
        }
    }
}

/// Adds `alpha·dyᵀ·x` to rows `part` of a matrix' gradient, which belong to the first columns of `dy`.
///
/// # Safety
/// All threads of the team come here, with `dy` and `x` complete; nobody else uses these rows.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn add_product(
    c: &Context<'_>,
    id: ParamId,
    part: Range<usize>,
    alpha: f32,
    dy: &Matrix,
    x: &Matrix,
    team: &Team<'_>,
) {
    let mine = team.share(part.len(), 8);
    if mine.is_empty() || x.rows == 0 {
        return;
    }
    // SAFETY: complete by the caller's promise; this thread's rows of the gradient.
    unsafe {
        let out = c.gradient(id, part.start + mine.start..part.start + mine.end);
        let dy = (&dy.all(0..x.rows)[mine.start..], dy.width);
        let sizes = (mine.len(), x.width, x.rows);
        ops_learn::product(c, gemm::gemm_tn, sizes, alpha, dy, (x.all(0..x.rows), x.width), out, true);
    }
}

unsafe fn embed_lora(c: &Context<'_>, op: &EmbedLora, team: &Team<'_>) {
    let (x, out) = (c.matrix(op.x), c.matrix(op.out));
    let (a, b, rank) = (c.param(op.a), c.param(op.b), c.param_shape(op.a).0);
    for row in team.share(out.rows, 1) {
        // SAFETY: this thread's row; input and output are the same memory or apart.
        unsafe {
            out.begin_from(&x, row, 0..out.width);
            let y = out.row_mut(row);
            for (b, a) in b[c.tokens[row] as usize * rank..][..rank].iter().zip(a.chunks_exact(out.width)) {
                vector::axpy(c.isa, op.scale * b, a, y);
            }
        }
    }
}

unsafe fn embed_lora_backward(c: &Context<'_>, op: &EmbedLora, dy: Value, e: Value, team: &Team<'_>) {
    let (dy, e) = (c.matrix(dy), c.matrix(e));
    let (a, b, rank) = (c.param(op.a), c.param(op.b), e.width);
    // SAFETY: this thread's rows first; then its ranks, which are rows of `A` and columns of `B`.
    unsafe {
        for row in team.share(dy.rows, 1) {
            for (e, a) in e.row_mut(row).iter_mut().zip(a.chunks_exact(dy.width)) {
                *e = op.scale * vector::dot(c.isa, a, dy.row(row));
            }
        }
        team.wait();
        for r in team.share(rank, 1) {
            let of_a = c.gradient_columns(op.a, r, 0..dy.width);
            for (row, token) in c.tokens.iter().enumerate() {
                c.gradient_columns(op.b, *token as usize, r..r + 1)[0] += e.row(row)[r];
                vector::axpy(c.isa, op.scale * b[*token as usize * rank + r], dy.row(row), of_a);
            }
        }
    }
}

/// Gradients of the norms of query and key heads, each by one thread: they have the width of one head.
unsafe fn head_norms(c: &Context<'_>, op: &Rope, [dq, dk]: [Value; 2], team: &Team<'_>) {
    let spec = &c.tape.spec;
    let trained = |weight: Option<WeightId>| weight.and_then(|weight| c.trained(weight));
    let parts = [(op.q, dq, trained(op.q_norm)), (op.k, dk, trained(op.k_norm))];
    let mut turned = vec![0.0; spec.head_dim];
    for (input, gradient, id) in &parts[team.share(2, 1)] {
        let (Some(id), x, d) = (*id, c.matrix(*input), c.matrix(*gradient)) else { continue };
        // SAFETY: this thread's norm; the values are complete.
        unsafe {
            let sum = c.gradient_columns(id, 0, 0..spec.head_dim);
            for row in 0..x.rows {
                for (x, d) in x.row(row).chunks_exact(spec.head_dim).zip(d.row(row).chunks_exact(spec.head_dim)) {
                    turned.copy_from_slice(d);
                    ops_learn::turn_back(c, op, row, &mut turned);
                    let inv_rms = norm::inverse_rms(c.isa, x, spec.norm_eps);
                    norm::rms_norm_backward_weight(c.isa, x, &turned, inv_rms, sum);
                }
            }
        }
    }
}
