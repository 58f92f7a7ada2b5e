//! The prefill path in a matrix unit: [`block`](super::block) with its two products in [`split`](crate::cpu::kernels::amx::split).
//!
//! A tile is up to 256 query vectors, taken by 32. Scores stand with a position in a row, so that the softmax runs down columns,
//! sixteen queries at a time, and no factor but the queries and the values is turned: those once for a tile, these once for a block.
//!   1. keys, as they come, are left factors [64 positions][width], values turned ones [width][64 positions];
//!   2. S = K·Qᵀ, [64 positions][32 queries];
//!   3. softmax down the columns, whose probabilities are a right factor as they are;
//!   4. O ← O·shrink + Vᵀ·P, [width][32 queries].
//!
//! A query's column is computed by itself, in the order of positions, and masked positions add exact zeros: the split into tiles
//! and tasks does not show in the result.

use super::super::amx::split::{Factor, PAIR_BYTES, across, along, put, turn, write_columns};
use super::super::amx::{TILE_ROWS, TILE_VALUES, Unit};
use super::super::vector::avx512::{exp2, tanh_of_exp2};
use super::block::{Bend, Vectors};
use super::kv::unpack_eights;
use super::seen::Seen;
use super::{AttentionTask, BLOCK, Pieces, aligned};
use std::arch::x86_64::*;
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// Query vectors (row × head) that share one block: a task's, up to eight heads that share their keys.
const TILE: usize = 256;

/// Query vectors of a product.
const COLUMNS: usize = 2 * TILE_ROWS;

/// Floats of scratch, for heads of `head_dim` elements.
pub(super) fn scratch_len(head_dim: usize) -> usize {
    let width = head_dim.next_multiple_of(TILE_VALUES);
    2 * TILE * width + 3 * BLOCK * width + 2 * BLOCK * COLUMNS + 6 * TILE
}

/// Where the pieces of the scratch lie, and the sizes they were cut by.
#[derive(Clone, Copy)]
struct Scratch {
    dim: usize,
    /// `dim` rounded up to a tile's values; elements beyond `dim` are zeros.
    width: usize,
    /// Queries, right factors [TILE/16][width/32].
    q: *mut u8,
    /// Accumulated output [TILE/32][width][32].
    o: *mut f32,
    /// Keys, left factors [64/16][width/32].
    k: *mut u8,
    /// Values, left factors [width/16][64/32].
    v: *mut u8,
    /// Vectors as they come [64][width].
    rows: *mut f32,
    /// Scores [64][32].
    s: *mut f32,
    /// Probabilities, right factors [64/32][2].
    p: *mut u8,
    /// Running maxima [TILE], in base 2.
    most: *mut f32,
    /// Running sums [TILE].
    sums: *mut f32,
    /// The positions that each query sees [TILE].
    seen: Seen,
    /// Its own [TILE].
    position: *mut f32,
    /// Slopes in base 2 [TILE].
    slope: *mut f32,
}

impl Scratch {
    /// From `base` on, where there must be room for [`scratch_len`] floats: the lengths add up to it.
    fn cut(base: *mut f32, dim: usize) -> Scratch {
        let width = dim.next_multiple_of(TILE_VALUES);
        let mut pieces = Pieces(base);
        Scratch {
            dim,
            width,
            q: pieces.take(TILE * width),
            o: pieces.take(TILE * width),
            k: pieces.take(BLOCK * width),
            v: pieces.take(BLOCK * width),
            rows: pieces.take(BLOCK * width),
            s: pieces.take(BLOCK * COLUMNS),
            p: pieces.take(BLOCK * COLUMNS),
            most: pieces.take(TILE),
            sums: pieces.take(TILE),
            seen: Seen { from: pieces.take(TILE), to: pieces.take(TILE) },
            position: pieces.take(TILE),
            slope: pieces.take(TILE),
        }
    }

    /// Pairs of tiles across a vector.
    fn steps(&self) -> usize {
        self.width / TILE_VALUES
    }
}

/// See [`attention`](super::attention), whose promises are those of the caller here, which has AMX, too.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn attention_split(task: &AttentionTask<'_>, scratch: &mut [f32]) {
    let at = Scratch::cut(aligned(scratch), task.head_dim);
    // SAFETY: by the contract.
    let unit = unsafe { Unit::open() };
    let bend = Bend::new(task);
    // SAFETY: the place is the scratch's. What lies between `dim` and `width` stays zero.
    unsafe { at.rows.write_bytes(0, BLOCK * at.width) };
    task.for_tiles(TILE, |kv_head, heads, rows| {
        // SAFETY: rows and heads are the task's; the CPU has the instructions, for this function runs.
        unsafe { tile(task, &at, &unit, &bend, kv_head, Vectors { heads, rows }) };
    });
}

/// All blocks for some query vectors, at most [`TILE`] of them.
///
/// # Safety
/// As for [`attention_split`]; rows and heads are the task's.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn tile(task: &AttentionTask<'_>, at: &Scratch, unit: &Unit, bend: &Bend, kv_head: usize, vectors: Vectors) {
    let count = vectors.count();
    let padded = count.next_multiple_of(COLUMNS);
    // SAFETY: indices into the scratch stay below the tile's, the block's and the head's sizes, by which it was cut;
    // pointers into the task are those of its own rows and heads and of positions up to its last row's.
    unsafe {
        queries(task, at, bend, vectors);
        for m in (0..padded).step_by(16) {
            _mm512_storeu_ps(at.most.add(m), _mm512_set1_ps(f32::NEG_INFINITY));
            _mm512_storeu_ps(at.sums.add(m), _mm512_setzero_ps());
        }
        at.o.write_bytes(0, padded * at.width);

        let Range { start, end } = vectors.span(task);
        for block in (start / BLOCK * BLOCK..end).step_by(BLOCK) {
            let stored = start.saturating_sub(block)..BLOCK.min(end - block);
            keys(task, at, kv_head, block, stored.clone());
            values(task, at, kv_head, block, stored);
            for m in (0..count).step_by(COLUMNS) {
                // Positions by 32, as many as are one step of the second product.
                let first = |half: usize| block + half * TILE_VALUES;
                let sees = |half: usize| at.seen.any_of_32(m, first(half)..first(half + 1));
                let halves = usize::from(!sees(0))..1 + usize::from(sees(1));
                if halves.is_empty() {
                    continue;
                }
                let q = Factor { at: at.q.add(m * 4 * at.width), step: PAIR_BYTES, other: at.steps() * PAIR_BYTES };
                for half in halves.clone() {
                    let k = Factor { at: at.k.add(half * TILE_VALUES * 4 * at.width), ..q };
                    unit.multiply_split(k, q, at.steps(), at.s.add(half * TILE_VALUES * COLUMNS), COLUMNS, false);
                }
                let o = at.o.add(m * at.width);
                for column in (0..COLUMNS).step_by(16) {
                    let shrink = softmax(at, bend, m + column, column, block, halves.clone());
                    if _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(shrink, _mm512_set1_ps(1.0)) != 0 {
                        for d in 0..at.width {
                            let o = o.add(d * COLUMNS + column);
                            _mm512_storeu_ps(o, _mm512_mul_ps(_mm512_loadu_ps(o), shrink));
                        }
                    }
                }
                let p = Factor { at: at.p.add(halves.start * 2 * PAIR_BYTES), step: 2 * PAIR_BYTES, other: PAIR_BYTES };
                for d in (0..at.width).step_by(2 * TILE_ROWS) {
                    let v = at.v.add((d / TILE_ROWS * 2 + halves.start) * PAIR_BYTES);
                    let v = Factor { at: v, step: PAIR_BYTES, other: 2 * PAIR_BYTES };
                    unit.multiply_split(v, p, halves.len(), o.add(d * COLUMNS), COLUMNS, true);
                }
            }
        }
        for m in (0..count).step_by(16) {
            finish(task, at, vectors, m);
        }
    }
}

/// Lays the queries down as right factors, with what [`Bend`] asks for; those up to the next multiple of 32 are zeros.
///
/// # Safety
/// As for [`tile`].
#[target_feature(enable = "avx512f")]
unsafe fn queries(task: &AttentionTask<'_>, at: &Scratch, bend: &Bend, vectors: Vectors) {
    let count = vectors.count();
    for m in (0..count.next_multiple_of(COLUMNS)).step_by(TILE_ROWS) {
        // SAFETY: sixteen rows of the scratch; vectors that the task has.
        unsafe {
            for i in 0..TILE_ROWS {
                let to = at.rows.add(i * at.width);
                let mut seen = 0..0;
                if m + i < count {
                    let (row, head) = vectors.owner(m + i);
                    seen = task.visible(row);
                    *at.position.add(m + i) = (task.first_position + row) as f32;
                    *at.slope.add(m + i) = task.slope(head) * LOG2_E;
                    let q = task.q.add(row * task.q_stride + head * at.dim);
                    for d in 0..at.dim {
                        *to.add(d) = *q.add(d) * bend.q_scale;
                    }
                } else {
                    to.write_bytes(0, at.width);
                }
                at.seen.set(m + i, seen);
            }
            for step in 0..at.steps() {
                let to = at.q.add((m / TILE_ROWS * at.steps() + step) * PAIR_BYTES);
                along(at.rows.add(step * TILE_VALUES), at.width, to);
                turn(to);
            }
        }
    }
}

/// Unpacks a vector of the cache to row `row` of `at.rows`, whose padding stays as it is.
///
/// # Safety
/// The position must be stored.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn fetch(task: &AttentionTask<'_>, at: &Scratch, offset: usize, kv_head: usize, position: usize, row: usize) {
    // SAFETY: the position is stored; the row holds `dim` elements rounded up to 8 at least.
    unsafe {
        let vector = task.kv.at(offset, kv_head, position);
        let to = at.rows.add(row * at.width);
        unpack_eights(task.kv.dtype, vector, at.dim, |d, x| _mm256_storeu_ps(to.add(d), x));
    }
}

/// Lays down the keys at the positions `stored` of the block that starts at `block`.
///
/// # Safety
/// These positions must be stored in the cache.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn keys(task: &AttentionTask<'_>, at: &Scratch, kv_head: usize, block: usize, stored: Range<usize>) {
    // SAFETY: rows of the scratch, a tile's rows of it; what is not stored is masked as a score.
    unsafe {
        for j in stored {
            fetch(task, at, task.kv.k_offset, kv_head, block + j, j);
            let from = at.rows.add(j * at.width);
            for step in 0..at.steps() {
                let to = at.k.add((j / TILE_ROWS * at.steps() + step) * PAIR_BYTES + 64 * (j % TILE_ROWS));
                let from = from.add(step * TILE_VALUES);
                put(_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16)), to);
            }
        }
    }
}

/// Turns the values at the positions `stored` of the block that starts at `block`; others are zeros.
///
/// # Safety
/// As for [`keys`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn values(task: &AttentionTask<'_>, at: &Scratch, kv_head: usize, block: usize, stored: Range<usize>) {
    // SAFETY: 64 rows of the scratch, `width` rows of 64 positions.
    unsafe {
        at.rows.write_bytes(0, stored.start * at.width);
        at.rows.add(stored.end * at.width).write_bytes(0, (BLOCK - stored.end) * at.width);
        for j in stored {
            fetch(task, at, task.kv.v_offset, kv_head, block + j, j);
        }
        for d in (0..at.width).step_by(TILE_ROWS) {
            for half in 0..2 {
                let to = at.v.add((d / TILE_ROWS * 2 + half) * PAIR_BYTES);
                across(at.rows.add(half * TILE_VALUES * at.width + d), at.width, to);
                turn(to);
            }
        }
    }
}

/// Scores of the sixteen query vectors from `m` on, in columns `column` and on, to probabilities 2^(s − most). Moves the running
/// maxima and sums; gives the factors of what was summed before.
///
/// # Safety
/// The rows `halves` of the scores are there, by 32; the vectors have been laid down.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
unsafe fn softmax(at: &Scratch, bend: &Bend, m: usize, column: usize, block: usize, halves: Range<usize>) -> __m512 {
    let rows = halves.start * TILE_VALUES..halves.end * TILE_VALUES;
    // SAFETY: rows of the scores, maxima and sums of the tile, the probabilities' places.
    unsafe {
        let seen = at.seen.sixteen(m);
        let whole = seen.all(block + rows.start..block + rows.end);
        let (slope, position) = (_mm512_loadu_ps(at.slope.add(m)), _mm512_loadu_ps(at.position.add(m)));
        let s = at.s.add(column);
        let old = _mm512_loadu_ps(at.most.add(m));
        let mut most = old;
        for j in rows {
            let s = s.add(j * COLUMNS);
            let mut x = _mm512_loadu_ps(s);
            if !(whole && bend.cap.is_none() && !bend.alibi) {
                if let Some(cap) = bend.cap {
                    x = _mm512_mul_ps(_mm512_set1_ps(cap), tanh_of_exp2(x));
                }
                if bend.alibi {
                    x = _mm512_fmadd_ps(slope, _mm512_sub_ps(_mm512_set1_ps((block + j) as f32), position), x);
                }
                x = _mm512_mask_blend_ps(seen.of(block + j), _mm512_set1_ps(f32::NEG_INFINITY), x);
                _mm512_storeu_ps(s, x);
            }
            most = _mm512_max_ps(most, x);
        }
        _mm512_storeu_ps(at.most.add(m), most);
        // What is subtracted: 0 while nothing was visible (−∞ − −∞ is no number).
        let nothing = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(most, _mm512_set1_ps(f32::NEG_INFINITY));
        let base = _mm512_mask_blend_ps(nothing, most, _mm512_setzero_ps());
        let shrink = exp2(_mm512_sub_ps(old, base));
        let mut sum = _mm512_setzero_ps();
        for half in halves {
            for i in 0..16 {
                let s = s.add((half * TILE_VALUES + i) * COLUMNS);
                let x = exp2(_mm512_sub_ps(_mm512_loadu_ps(s), base));
                let y = exp2(_mm512_sub_ps(_mm512_loadu_ps(s.add(16 * COLUMNS)), base));
                sum = _mm512_add_ps(sum, _mm512_add_ps(x, y));
                put(x, y, at.p.add((half * 2 + column / 16) * PAIR_BYTES + 64 * i));
            }
        }
        let sums = at.sums.add(m);
        _mm512_storeu_ps(sums, _mm512_fmadd_ps(_mm512_loadu_ps(sums), shrink, sum));
        shrink
    }
}

/// Writes the finished output vectors from `m` on, up to sixteen, and their log-sum-exps.
///
/// # Safety
/// As for [`tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn finish(task: &AttentionTask<'_>, at: &Scratch, vectors: Vectors, m: usize) {
    let count = (vectors.count() - m).min(16);
    // SAFETY: the tile's columns; rows and heads are the task's own.
    unsafe {
        let sums = _mm512_loadu_ps(at.sums.add(m));
        let positive = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(sums, _mm512_setzero_ps());
        let inverse = _mm512_maskz_div_ps(positive, _mm512_set1_ps(1.0), sums);
        let o = at.o.add(m / COLUMNS * COLUMNS * at.width + m % COLUMNS);
        write_columns(o, COLUMNS, at.dim, count, inverse, |i| {
            let (row, head) = vectors.owner(m + i);
            task.out.add(row * task.out_stride + head * at.dim)
        });
        if let Some(lse) = task.lse {
            for i in m..m + count {
                let (row, head) = vectors.owner(i);
                *lse.add(row * task.lse_stride + head) = (*at.most.add(i) + (*at.sums.add(i)).log2()) * LN_2;
            }
        }
    }
}
