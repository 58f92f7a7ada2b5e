//! Adapters in learning that are computed by the ops beside them, so that what they add to is in a cache.
//!
//! By itself an adapter reads its map's input and result from memory again and writes the result, which takes longer than its few
//! products. So the op of the linear map computes `h = x·Aᵀ` for all adapters of its parts on the way and adds `h·Bᵀ` to the columns
//! that a thread has just written; the adapters' own ops only put `h` where the tape wants it. And the op of the map's gradient begins
//! its columns with `e·A`, all adapters' in turn, and adds to them; their own ops compute `e` and the gradients of `A` and `B`.
//! The tape stays what it is, and so do the sums, term by term.

use std::ops::Range;

use super::executor::Context;
use super::kernels::gemm;
use super::kernels::linear::OutMut;
use super::matrix::Matrix;
use super::ops_learn::{product_to, rows_mut};
use super::pool::Team;
use crate::tape::{Linear, Lora, LoraBackward, Op, Plan, Tape, Value};

/// Which adapters of a tape are computed by other ops.
#[derive(Debug)]
pub(super) struct Fusion {
    /// By the number of a map's result: its adapter, and the first of its columns among those of all adapters of the op.
    forward: Vec<Option<(Lora, usize)>>,
    /// By the number of the result of a map's gradient: its adapters, the first of the tape in front.
    backward: Vec<Vec<LoraBackward>>,
    /// By the number of an adapter's `e`: whether it is one of them.
    later: Vec<bool>,
    /// Most columns of `h` of an op.
    pub ranks: usize,
}

/// The ops that add to `out` before op `at` does, and nothing else: adapters of the same input.
fn chain(tape: &Tape, at: usize) -> Vec<LoraBackward> {
    let Op::LinearBackward { dx: mut before, .. } = tape.ops[at] else { return Vec::new() };
    let mut found = Vec::new();
    for op in tape.ops[..at].iter().rev() {
        let Op::LoraBackward(op) = op else { break };
        if op.out.is_none() || op.out != before {
            break;
        }
        found.push(*op);
        before = op.dx;
    }
    found.reverse();
    found
}

/// Values that op `at` reads for adapters before it: what a plan has to keep until then.
pub(super) fn more_reads(tape: &Tape, at: usize) -> Vec<Value> {
    chain(tape, at).iter().map(|op| op.e).collect()
}

impl Fusion {
    /// What can be done of a tape whose plan keeps [`more_reads`]: results must lie in place.
    pub fn new(tape: &Tape, plan: &Plan) -> Fusion {
        let n = tape.values.len();
        let place = |v: Value| plan.place(v).offset;
        let mut fusion =
            Fusion { forward: vec![None; n], backward: vec![Vec::new(); n], later: vec![false; n], ranks: 0 };
        for (at, op) in tape.ops.iter().enumerate() {
            match op {
                Op::Linear(map) => {
                    let mut ranks = 0;
                    for op in &tape.ops[at + 1..] {
                        let Op::Lora(op) = op else { break };
                        let of_map = op.x == map.x && map.parts.iter().any(|part| part.out == op.y);
                        if of_map && place(op.out) == place(op.y) {
                            fusion.forward[op.y.0 as usize] = Some((*op, ranks));
                            ranks += tape.info(op.h).width;
                        }
                    }
                    fusion.ranks = fusion.ranks.max(ranks);
                }
                Op::LinearBackward { out, .. } => {
                    let adapters = chain(tape, at);
                    let before = adapters.first().and_then(|op| op.dx);
                    let values = adapters.iter().filter_map(|op| op.out).chain(before);
                    if values.map(place).all(|p| p == place(*out)) {
                        adapters.iter().for_each(|op| fusion.later[op.e.0 as usize] = true);
                        fusion.backward[out.0 as usize] = adapters;
                    }
                }
                _ => {}
            }
        }
        fusion
    }

    /// Whether the op of the map's gradient adds what this adapter would add to it.
    pub fn is_added_later(&self, op: &LoraBackward) -> bool {
        self.later[op.e.0 as usize]
    }

    /// What is there already before the op of a map's gradient with this result: the gradient before its adapters.
    pub fn before(&self, dx: Option<Value>, out: Value) -> Option<Value> {
        self.backward[out.0 as usize].first().map_or(dx, |op| op.dx)
    }
}

/// Where the op of a map keeps `h` of an adapter, `[T, r]`: in an op's own place, for the tape's may still be in use.
fn hidden(c: &Context<'_>, op: &Lora, first: usize) -> Matrix {
    let (rows, rank) = (c.matrix(op.h).rows, c.param_shape(op.a).0);
    // SAFETY: reserved for all columns of an op.
    unsafe { Matrix::new(c.arena.add(c.tables.hidden).cast::<f32>().add(first * rows), rows, rank) }
}

/// Computes `h` of all adapters of a map's op and waits for it. Gives whether there are any.
///
/// # Safety
/// All threads of the team come here; the input is complete.
pub(super) unsafe fn hidden_of(c: &Context<'_>, map: &Linear, team: &Team<'_>) -> bool {
    let adapters = || map.parts.iter().filter_map(|part| c.fusion.forward[part.out.0 as usize].as_ref());
    if adapters().next().is_none() {
        return false;
    }
    let x = c.matrix(map.x);
    let mine = team.share(x.rows, 1);
    // A few rows at a time, which stay in the first cache for all adapters.
    const ROWS: usize = 12;
    for first in mine.clone().step_by(ROWS) {
        let rows = first..(first + ROWS).min(mine.end);
        for (op, at) in adapters() {
            let h = hidden(c, op, *at);
            // SAFETY: this thread's rows.
            unsafe {
                let to = rows_mut(&h, rows.clone());
                let out = OutMut::new(to.as_mut_ptr(), h.width, to.len());
                let (x, a) = ((x.all(rows.clone()), x.width), (c.param(op.a), x.width));
                product_to(c, gemm::gemm_nt, (rows.len(), h.width, x.1), 1.0, x, a, out, false);
            }
        }
    }
    team.wait();
    true
}

/// Adds `scale·h·Bᵀ` to columns `columns` of a map's result.
///
/// # Safety
/// [`hidden_of`] has run; this thread alone uses these columns.
pub(super) unsafe fn add(c: &Context<'_>, y: Value, columns: Range<usize>) {
    let Some((op, at)) = &c.fusion.forward[y.0 as usize] else { return };
    let (h, y) = (hidden(c, op, *at), c.matrix(y));
    let (n, rank) = (columns.len(), h.width);
    // SAFETY: `h` is complete; columns of the matrix, which are this thread's.
    unsafe {
        let out = OutMut::new(y.row_ptr(0).add(columns.start), y.width, y.rows * y.width - columns.start);
        let b = &c.param(op.b)[columns.start * rank..columns.end * rank];
        product_to(c, gemm::gemm_nt, (y.rows, n, rank), op.scale, (h.all(0..h.rows), rank), (b, rank), out, true);
    }
}

/// Puts `h`, if the op of the map has computed it, where the tape wants it. Gives whether it has, and the adapter is done with that.
///
/// # Safety
/// All threads of the team come here.
pub(super) unsafe fn store_hidden(c: &Context<'_>, op: &Lora, team: &Team<'_>) -> bool {
    let Some((_, at)) = &c.fusion.forward[op.y.0 as usize] else { return false };
    let (from, to) = (hidden(c, op, *at), c.matrix(op.h));
    let rows = team.share(to.rows, 1);
    if !rows.is_empty() {
        // SAFETY: this thread's rows.
        unsafe { rows_mut(&to, rows.clone()).copy_from_slice(from.all(rows)) };
    }
    true
}

/// Begins some rows and columns of a map's gradient with `e·A` of all its adapters, added to what is there if `accumulate`. Gives
/// whether something is there now, to which the map's own part is added: the order of the tape.
///
/// # Safety
/// This thread alone uses them.
pub(super) unsafe fn begin_backward(
    c: &Context<'_>,
    out: Value,
    rows: Range<usize>,
    columns: Range<usize>,
    mut accumulate: bool,
) -> bool {
    let y = c.matrix(out);
    if rows.is_empty() || columns.is_empty() {
        return accumulate;
    }
    for op in &c.fusion.backward[out.0 as usize] {
        let (e, (rank, width)) = (c.matrix(op.e), c.param_shape(op.forward.a));
        // SAFETY: `e` was complete at an earlier barrier; by the caller's promise.
        unsafe {
            let at = columns.start;
            let to = OutMut::new(y.row_ptr(rows.start).add(at), y.width, rows.len() * y.width - at);
            let a = (&c.param(op.forward.a)[at..], width);
            let sizes = (rows.len(), columns.len(), rank);
            product_to(c, gemm::gemm_nn, sizes, 1.0, (e.all(rows.clone()), rank), a, to, accumulate);
        }
        accumulate = true;
    }
    accumulate
}
