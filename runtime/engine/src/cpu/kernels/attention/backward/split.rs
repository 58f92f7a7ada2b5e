//! In a matrix unit, with the five products in [`split`](crate::cpu::kernels::amx::split).
//!
//! Some queries of a head, up to 256, are laid down once in the four ways that the products read them, and meet all blocks of 64
//! keys. Scores stand with a key in a row, [64 keys][32 queries], so that what belongs to a query goes by columns, and probabilities
//! and their gradients are factors of the next products as they are:
//!   1. S = K·Qᵀ and dP = V·dOᵀ, for 32 queries;
//!   2. P and dS from them, and dQ ← dQ + Kᵀ·dS, [width][32 queries];
//!   3. behind the last queries, dV = P·dO and dK = dS·Q, [64 keys][width], each in one sum over all of them.

use super::super::super::amx::split::{Factor, PAIR_BYTES, across, along, put, turn, write_columns};
use super::super::super::amx::{TILE_ROWS, TILE_VALUES, Unit};
use super::super::super::vector::avx512::{exp2, tanh_of_exp2};
use super::super::block::Bend;
use super::super::seen::Seen;
use super::super::{Pieces, aligned};
use super::{AttentionBackwardTask, TILE};
use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Queries of a product.
const COLUMNS: usize = 2 * TILE_ROWS;

/// Keys that are one step of a sum, half a block.
const HALF: usize = TILE_VALUES;

/// Queries that are laid down at a time: whole blocks, of which the second cache has room for a head's `width`.
fn queries_at_once(width: usize) -> usize {
    (16_384 / width / TILE * TILE).clamp(TILE, 4 * TILE)
}

/// Floats of scratch, for heads of `head_dim` elements.
pub(super) fn scratch_len(head_dim: usize) -> usize {
    let width = head_dim.next_multiple_of(TILE_VALUES);
    let queries = queries_at_once(width);
    5 * queries * width + 6 * TILE * width + 3 * TILE * COLUMNS + 2 * TILE * queries + 4 * queries
}

/// Where the pieces of the scratch lie, and the sizes they were cut by.
struct Scratch {
    dim: usize,
    /// `dim` rounded up to a tile's values; elements beyond `dim` are zeros.
    width: usize,
    /// Most queries at once.
    queries: usize,
    /// Queries and the gradients of their outputs, right factors of the first products [queries/16][width/32].
    q: *mut u8,
    d_out: *mut u8,
    /// The same, right factors of the last products [queries/32][width/16].
    q_sum: *mut u8,
    d_out_sum: *mut u8,
    /// Gradient of the queries [queries/32][width][32].
    dq: *mut f32,
    /// Keys and values, left factors [64/16][width/32].
    k: *mut u8,
    v: *mut u8,
    /// Keys, left factors of dQ [width/16][64/32].
    k_sum: *mut u8,
    /// Gradients of the block's keys and values [64][width].
    dk: *mut f32,
    dv: *mut f32,
    /// Vectors as they come [64][width], where they have to be filled up.
    rows: *mut f32,
    /// Scores, and gradients of the probabilities [64][32].
    s: *mut f32,
    dp: *mut f32,
    /// Gradients of the scores, right factors of dQ [64/32][2].
    ds: *mut u8,
    /// Probabilities, and gradients of the scores, left factors of the last products [64/16][queries/32].
    p_sum: *mut u8,
    ds_sum: *mut u8,
    /// In base 2.
    lse: *mut f32,
    delta: *mut f32,
    /// The keys that each query sees.
    seen: Seen,
}

impl Scratch {
    /// From `base` on, where there must be room for [`scratch_len`] floats: the lengths add up to it.
    fn cut(base: *mut f32, dim: usize) -> Scratch {
        let width = dim.next_multiple_of(TILE_VALUES);
        let queries = queries_at_once(width);
        let mut pieces = Pieces(base);
        Scratch {
            dim,
            width,
            queries,
            q: pieces.take(queries * width),
            d_out: pieces.take(queries * width),
            q_sum: pieces.take(queries * width),
            d_out_sum: pieces.take(queries * width),
            dq: pieces.take(queries * width),
            k: pieces.take(TILE * width),
            v: pieces.take(TILE * width),
            k_sum: pieces.take(TILE * width),
            dk: pieces.take(TILE * width),
            dv: pieces.take(TILE * width),
            rows: pieces.take(TILE * width),
            s: pieces.take(TILE * COLUMNS),
            dp: pieces.take(TILE * COLUMNS),
            ds: pieces.take(TILE * COLUMNS),
            p_sum: pieces.take(TILE * queries),
            ds_sum: pieces.take(TILE * queries),
            lse: pieces.take(queries),
            delta: pieces.take(queries),
            seen: Seen { from: pieces.take(queries), to: pieces.take(queries) },
        }
    }

    /// Pairs of tiles across a vector.
    fn steps(&self) -> usize {
        self.width / TILE_VALUES
    }

    /// `count` vectors, `stride` apart, as `rows` of whole width: where they are, or copied, with zeros around them.
    ///
    /// # Safety
    /// They can be read; `rows` is at most 64.
    unsafe fn filled(&self, from: *const f32, stride: usize, count: usize, rows: usize) -> (*const f32, usize) {
        if count >= rows && self.dim == self.width {
            return (from, stride);
        }
        // SAFETY: the scratch has 64 rows.
        unsafe {
            self.rows.write_bytes(0, rows * self.width);
            for i in 0..count.min(rows) {
                self.rows.add(i * self.width).copy_from_nonoverlapping(from.add(i * stride), self.dim);
            }
        }
        (self.rows, self.width)
    }
}

/// What is the same for all scores of a head.
struct Shape<'a> {
    task: &'a AttentionBackwardTask<'a>,
    bend: Bend,
    head: usize,
}

/// See [`attention_backward`](super::attention_backward), whose promises are those of the caller here, which has AMX, too.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn backward(task: &AttentionBackwardTask<'_>, scratch: &mut [f32]) {
    let (first, last) = task.rows;
    // SAFETY: the scratch's length was checked; rows and heads are the task's.
    unsafe {
        let at = Scratch::cut(aligned(scratch), task.head_dim);
        let unit = Unit::open();
        for head in task.heads() {
            let shape = Shape { task, bend: Bend::of(task.scale, task.softcap, task.alibi.is_some()), head };
            for from in (first..last).step_by(at.queries) {
                let rows = from..last.min(from + at.queries);
                queries(&shape, &at, rows.clone());
                at.dq.write_bytes(0, rows.len().next_multiple_of(COLUMNS) * at.width);
                let start = rows.clone().map(|row| task.visible(row).start).min().unwrap_or(from);
                for block in (first + (start - first) / TILE * TILE..rows.end).step_by(TILE) {
                    // Where the queries are those of the keys is the first time that these have a gradient.
                    let begins = head == task.heads.0 && block >= from;
                    keys(&shape, &at, &unit, block, rows.clone(), begins);
                }
                finish_queries(&shape, &at, rows);
            }
        }
    }
}

/// Lays down the queries `rows`, up to as many as there is room for, and what belongs to them.
///
/// # Safety
/// As for [`backward`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn queries(shape: &Shape<'_>, at: &Scratch, rows: Range<usize>) {
    let (task, inner) = (shape.task, shape.head * at.dim);
    // SAFETY: rows and head are the task's; places are the scratch's.
    unsafe {
        for m in (0..rows.len()).step_by(COLUMNS) {
            let (row, count) = (rows.start + m, rows.len() - m);
            for (from, stride, turned, sum) in
                [(task.q, task.q_stride, at.q, at.q_sum), (task.d_out, task.out_stride, at.d_out, at.d_out_sum)]
            {
                let (from, stride) = at.filled(from.add(row * stride + inner), stride, count, COLUMNS);
                for i in 0..2 {
                    for step in 0..at.steps() {
                        let to = turned.add(((m / TILE_ROWS + i) * at.steps() + step) * PAIR_BYTES);
                        along(from.add(i * TILE_ROWS * stride + step * TILE_VALUES), stride, to);
                        turn(to);
                    }
                }
                let sum = sum.add(m / COLUMNS * (at.width / TILE_ROWS) * PAIR_BYTES);
                for d in 0..at.width / TILE_ROWS {
                    across(from.add(d * TILE_ROWS), stride, sum.add(d * PAIR_BYTES));
                }
            }
            for i in m..m + COLUMNS {
                let (mut lse, mut delta, mut seen) = (0.0, 0.0, 0..0);
                if i < rows.len() {
                    let row = rows.start + i;
                    seen = task.visible(row);
                    let place = row * task.out_stride + inner;
                    delta = dot(task.out.add(place), task.d_out.add(place), at.dim);
                    lse = *task.lse.add(row * task.lse_stride + shape.head) * LOG2_E;
                }
                *at.lse.add(i) = lse;
                *at.delta.add(i) = delta;
                at.seen.set(i, seen);
            }
        }
    }
}

/// The keys from `block` on with the queries `rows`. Their gradients are written where they `begin`, else added.
///
/// # Safety
/// As for [`backward`]; the queries have been laid down.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn keys(shape: &Shape<'_>, at: &Scratch, unit: &Unit, block: usize, rows: Range<usize>, begins: bool) {
    let task = shape.task;
    let count = TILE.min(task.rows.1 - block);
    // Of each half of the keys, the queries that see any of it, by 32.
    let mut seen = [(usize::MAX, 0); 2];
    for m in 0..rows.len().div_ceil(COLUMNS) {
        for (half, seen) in seen.iter_mut().enumerate() {
            let first = block + half * HALF;
            // SAFETY: the queries have been laid down, by 32.
            if unsafe { at.seen.any_of_32(m * COLUMNS, first..first + HALF) } {
                *seen = (seen.0.min(m), m + 1);
            }
        }
    }
    let groups = seen[0].0.min(seen[1].0)..seen[0].1.max(seen[1].1);
    if groups.is_empty() {
        return;
    }
    let (steps, tiles) = (at.steps(), at.width / TILE_ROWS);
    // SAFETY: indices stay below the sizes by which the scratch was cut.
    unsafe {
        let place = task.kv_head * at.dim;
        let (v, stride) = at.filled(task.v.add(block * task.v_stride + place), task.v_stride, count, TILE);
        lay_along(at, v, stride, at.v);
        let (k, stride) = at.filled(task.k.add(block * task.k_stride + place), task.k_stride, count, TILE);
        lay_along(at, k, stride, at.k);
        for d in 0..tiles {
            for half in 0..2 {
                let to = at.k_sum.add((2 * d + half) * PAIR_BYTES);
                across(k.add(half * HALF * stride + d * TILE_ROWS), stride, to);
                turn(to);
            }
        }
        for m in groups {
            let sees = |half: usize| (seen[half].0..seen[half].1).contains(&m);
            let halves = usize::from(!sees(0))..1 + usize::from(sees(1));
            let right = |from: *mut u8| Factor {
                at: from.add(2 * m * steps * PAIR_BYTES),
                step: PAIR_BYTES,
                other: steps * PAIR_BYTES,
            };
            for half in halves.clone() {
                let left = |from: *mut u8| Factor { at: from.add(2 * half * steps * PAIR_BYTES), ..right(from) };
                let to = half * HALF * COLUMNS;
                unit.multiply_split(left(at.k), right(at.q), steps, at.s.add(to), COLUMNS, false);
                unit.multiply_split(left(at.v), right(at.d_out), steps, at.dp.add(to), COLUMNS, false);
            }
            score_gradients(shape, at, block, rows.start, m, halves.clone());
            let ds = at.ds.add(halves.start * 2 * PAIR_BYTES);
            let ds = Factor { at: ds, step: 2 * PAIR_BYTES, other: PAIR_BYTES };
            for d in (0..tiles).step_by(2) {
                let k = at.k_sum.add((2 * d + halves.start) * PAIR_BYTES);
                let k = Factor { at: k, step: PAIR_BYTES, other: 2 * PAIR_BYTES };
                let dq = at.dq.add((m * at.width + d * TILE_ROWS) * COLUMNS);
                unit.multiply_split(k, ds, halves.len(), dq, COLUMNS, true);
            }
        }
        for (half, &(first, last)) in seen.iter().enumerate() {
            if first >= last {
                continue;
            }
            let across = at.queries / COLUMNS;
            for d in (0..tiles).step_by(2) {
                for (left, right, to) in [(at.p_sum, at.d_out_sum, at.dv), (at.ds_sum, at.q_sum, at.dk)] {
                    let left = left.add((2 * half * across + first) * PAIR_BYTES);
                    let left = Factor { at: left, step: PAIR_BYTES, other: across * PAIR_BYTES };
                    let right = right.add((first * tiles + d) * PAIR_BYTES);
                    let right = Factor { at: right, step: tiles * PAIR_BYTES, other: PAIR_BYTES };
                    let to = to.add(half * HALF * at.width + d * TILE_ROWS);
                    unit.multiply_split(left, right, last - first, to, at.width, false);
                }
            }
            for j in half * HALF..((half + 1) * HALF).min(count) {
                let place = task.d_head * at.dim;
                let dk = task.dk.add((block + j) * task.dk_stride + place);
                let dv = task.dv.add((block + j) * task.dv_stride + place);
                hand_over(at.dk.add(j * at.width), dk, at.dim, begins);
                hand_over(at.dv.add(j * at.width), dv, at.dim, begins);
            }
        }
    }
}

/// 64 rows as left factors of sums over their values.
///
/// # Safety
/// They can be read; `to` is of the scratch.
#[target_feature(enable = "avx512f")]
unsafe fn lay_along(at: &Scratch, from: *const f32, stride: usize, to: *mut u8) {
    for tile in 0..TILE / TILE_ROWS {
        for step in 0..at.steps() {
            // SAFETY: by the contract.
            unsafe {
                let from = from.add(tile * TILE_ROWS * stride + step * TILE_VALUES);
                along(from, stride, to.add((tile * at.steps() + step) * PAIR_BYTES));
            }
        }
    }
}

/// Makes raw scores and raw gradients of the 32 queries of group `m`, counted from `row`, probabilities and gradients of q·k, for the keys `halves`, and
/// lays them down as factors. Where a query does not see a key they are 0, whatever was there.
///
/// # Safety
/// As for [`keys`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
unsafe fn score_gradients(shape: &Shape<'_>, at: &Scratch, block: usize, row: usize, m: usize, halves: Range<usize>) {
    let (task, bend) = (shape.task, &shape.bend);
    let slope = task.slope(shape.head) * LOG2_E;
    let first = (row + m * COLUMNS) as f32 - block as f32;
    let (cap, tiles) = (bend.cap.unwrap_or_default(), at.queries / COLUMNS);
    // SAFETY: rows of the scratch; places of the factors' rows.
    unsafe {
        let (q_scale, scale) = (_mm512_set1_ps(bend.q_scale), _mm512_set1_ps(task.scale));
        let ramp = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
        let seen = [at.seen.sixteen(m * COLUMNS), at.seen.sixteen(m * COLUMNS + 16)];
        let mut rows = [(_mm512_setzero_ps(), _mm512_setzero_ps()); 2];
        let mut whole = true;
        for c in 0..2 {
            let i = m * COLUMNS + 16 * c;
            rows[c] = (_mm512_loadu_ps(at.lse.add(i)), _mm512_loadu_ps(at.delta.add(i)));
            whole &= seen[c].all(block..block + TILE);
        }
        for half in halves {
            for i in 0..16 {
                // Rows of keys 16 apart, each with two times 16 queries.
                let mut ds = [[_mm512_setzero_ps(); 2]; 2];
                for (other, ds) in ds.iter_mut().enumerate() {
                    let j = half * HALF + 16 * other + i;
                    let mut p = [_mm512_setzero_ps(); 2];
                    for c in 0..2 {
                        let (lse, delta) = rows[c];
                        let place = j * COLUMNS + 16 * c;
                        let mut x = _mm512_mul_ps(_mm512_loadu_ps(at.s.add(place)), q_scale);
                        let mut factor = scale;
                        if bend.cap.is_some() {
                            let t = tanh_of_exp2(x);
                            x = _mm512_mul_ps(_mm512_set1_ps(cap), t);
                            factor = _mm512_mul_ps(factor, _mm512_fnmadd_ps(t, t, _mm512_set1_ps(1.0)));
                        }
                        if bend.alibi {
                            let ahead = _mm512_add_ps(_mm512_set1_ps(first + (16 * c) as f32), ramp);
                            let back = _mm512_sub_ps(_mm512_set1_ps(j as f32), ahead);
                            x = _mm512_fmadd_ps(_mm512_set1_ps(slope), back, x);
                        }
                        let e = exp2(_mm512_sub_ps(x, lse));
                        let d = _mm512_sub_ps(_mm512_loadu_ps(at.dp.add(place)), delta);
                        let d = _mm512_mul_ps(_mm512_mul_ps(e, d), factor);
                        (p[c], ds[c]) = (e, d);
                        if !whole {
                            let visible = seen[c].of(block + j);
                            p[c] = _mm512_maskz_mov_ps(visible, e);
                            ds[c] = _mm512_maskz_mov_ps(visible, d);
                        }
                    }
                    let place = ((2 * half + other) * tiles + m) * PAIR_BYTES + 64 * i;
                    put(p[0], p[1], at.p_sum.add(place));
                    put(ds[0], ds[1], at.ds_sum.add(place));
                }
                let [low, high] = ds;
                for (c, (low, high)) in low.into_iter().zip(high).enumerate() {
                    put(low, high, at.ds.add((2 * half + c) * PAIR_BYTES + 64 * i));
                }
            }
        }
    }
}

/// Writes the finished gradients of the queries `rows`.
///
/// # Safety
/// As for [`backward`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn finish_queries(shape: &Shape<'_>, at: &Scratch, rows: Range<usize>) {
    let task = shape.task;
    for m in (0..rows.len()).step_by(16) {
        // SAFETY: columns of the scratch; rows and head are the task's own.
        unsafe {
            let from = at.dq.add(m / COLUMNS * COLUMNS * at.width + m % COLUMNS);
            write_columns(from, COLUMNS, at.dim, rows.len() - m, _mm512_set1_ps(1.0), |i| {
                task.dq.add((rows.start + m + i) * task.dq_stride + shape.head * at.dim)
            });
        }
    }
}

/// Copies `n` elements, or adds them.
///
/// # Safety
/// `n` floats at each.
#[target_feature(enable = "avx512f")]
unsafe fn hand_over(from: *const f32, to: *mut f32, n: usize, copies: bool) {
    for d in (0..n).step_by(16) {
        let there = 0xffff_u16 >> (16 - (n - d).min(16));
        // SAFETY: by the contract; masked lanes are not touched.
        unsafe {
            let mut x = _mm512_maskz_loadu_ps(there, from.add(d));
            if !copies {
                x = _mm512_add_ps(_mm512_maskz_loadu_ps(there, to.add(d)), x);
            }
            _mm512_mask_storeu_ps(to.add(d), there, x);
        }
    }
}

/// Σ a·b over `n` elements.
///
/// # Safety
/// `n` floats at each.
#[target_feature(enable = "avx512f")]
unsafe fn dot(a: *const f32, b: *const f32, n: usize) -> f32 {
    let mut sums = _mm512_setzero_ps();
    for d in (0..n).step_by(16) {
        let there = 0xffff_u16 >> (16 - (n - d).min(16));
        // SAFETY: by the contract; masked lanes are not touched.
        unsafe {
            sums =
                _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, a.add(d)), _mm512_maskz_loadu_ps(there, b.add(d)), sums);
        }
    }
    _mm512_reduce_add_ps(sums)
}
