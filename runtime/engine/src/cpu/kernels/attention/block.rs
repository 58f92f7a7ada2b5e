//! The prefill path in lanes: two register-tiled f32 matrix products with a softmax between them, block by block.
//!
//! A tile is up to 96 query vectors (rows × the query heads of one cache head). For each block of 64 positions:
//!   1. keys are unpacked and transposed into panels `kt` [64/16][head_dim][16], values into `v` [width/16][64][16];
//!   2. S = Q·Kᵀ for six query vectors × 16 positions at a time, twelve accumulators, one step per head dimension;
//!   3. softmax on S, row by row: running maximum, 2^(s − max), running sum kept in eight lanes;
//!   4. O ← O·shrink + P·V, six query vectors × 16 dimensions at a time, one step per position.
//!
//! Queries are packed [6 vectors] with the scale and log₂ e multiplied in, so that the softmax runs in base 2.
//!
//! Every accumulator adds in the order of dimensions or positions whatever the tile, and masked positions add exact
//! zeros: the split into tiles and tasks does not show in the result. `width` is `head_dim` rounded up to 16; what lies
//! in the padding is never read back.

use super::super::lanes::{
    F32x8, add, exp2, fma, larger, load, max, mul, outside, ramp, replace, splat, store, sub, sum, tanh_of_exp2,
    transpose, zero,
};
use super::kv::unpack_eights;
use super::{AttentionTask, BLOCK, Pieces, TILE, aligned};
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

/// Query vectors per register tile.
const ROWS: usize = 6;

/// Where the pieces of the scratch lie, and the sizes they were cut by.
#[derive(Clone, Copy)]
struct Scratch {
    dim: usize,
    width: usize,
    /// Packed queries [TILE/6][dim][6].
    q: *mut f32,
    /// Accumulated output [TILE][width].
    o: *mut f32,
    /// Keys [64/16][width][16].
    kt: *mut f32,
    /// Values [width/16][64][16]; first used for the keys before they are transposed.
    v: *mut f32,
    /// Scores, then probabilities [TILE][64].
    s: *mut f32,
    /// Running maxima [TILE], in base 2.
    most: *mut f32,
    /// Running sums [TILE][8].
    sums: *mut f32,
}

impl Scratch {
    /// From `base` on, where there must be room for what [`attention_scratch_len`](super::attention_scratch_len) counts for this path.
    fn cut(base: *mut f32, dim: usize) -> Scratch {
        let width = dim.next_multiple_of(16);
        let mut pieces = Pieces(base);
        Scratch {
            dim,
            width,
            q: pieces.take(TILE * dim),
            o: pieces.take(TILE * width),
            kt: pieces.take(BLOCK * width),
            v: pieces.take(BLOCK * width),
            s: pieces.take(TILE * BLOCK),
            most: pieces.take(TILE),
            sums: pieces.take(TILE * 8),
        }
    }
}

/// What happens to a score besides its scale; all in base 2.
#[derive(Clone, Copy)]
pub(super) struct Bend {
    /// Factor on q that makes q·k the exponent to base 2, or, with a cap, 2·log₂e·s/c.
    pub q_scale: f32,
    /// c·log₂e.
    pub cap: Option<f32>,
    /// Whether slopes apply.
    pub alibi: bool,
}

impl Bend {
    pub fn new(task: &AttentionTask<'_>) -> Bend {
        Bend::of(task.scale, task.softcap, task.alibi.is_some())
    }

    pub fn of(scale: f32, softcap: Option<f32>, alibi: bool) -> Bend {
        match softcap {
            Some(c) => Bend { q_scale: scale * LOG2_E * 2.0 / c, cap: Some(c * LOG2_E), alibi },
            None => Bend { q_scale: scale * LOG2_E, cap: None, alibi },
        }
    }
}

/// One row of 64 raw scores: caps, slopes and masks it in place and returns its maximum.
///
/// `from..to` are the visible positions within the block, `slope` is in base 2 and `ahead` is the query's position less
/// the block's first.
///
/// # Safety
/// 64 floats at `s`.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
#[inline]
pub(super) unsafe fn mask_and_max(s: *mut f32, from: usize, to: usize, bend: &Bend, slope: f32, ahead: f32) -> f32 {
    let whole = from == 0 && to == BLOCK;
    let mut x = [zero(); 8];
    for (j, x) in x.iter_mut().enumerate() {
        // SAFETY: within the row.
        *x = unsafe { load(s.add(8 * j)) };
    }
    if !(whole && bend.cap.is_none() && !bend.alibi) {
        for (j, x) in x.iter_mut().enumerate() {
            let first = 8 * j as i32;
            if let Some(cap) = bend.cap {
                *x = mul(splat(cap), tanh_of_exp2(*x));
            }
            if bend.alibi {
                let back = sub(ramp(first), splat(ahead));
                *x = fma(splat(slope), back, *x);
            }
            if !whole {
                *x = replace(outside(first, from as i32, to as i32), *x, splat(f32::NEG_INFINITY));
            }
            // SAFETY: within the row.
            unsafe { store(s.add(8 * j), *x) };
        }
    }
    let m = [larger(x[0], x[1]), larger(x[2], x[3]), larger(x[4], x[5]), larger(x[6], x[7])];
    max(larger(larger(m[0], m[1]), larger(m[2], m[3])))
}

/// One row of 64 masked scores to probabilities 2^(s − most); returns the eight lanes' sums.
///
/// # Safety
/// 64 floats at `s`.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
#[inline]
pub(super) unsafe fn exponentiate(s: *mut f32, most: f32) -> F32x8 {
    let most = splat(most);
    let mut p = [zero(); 8];
    for (j, p) in p.iter_mut().enumerate() {
        // SAFETY: within the row.
        unsafe {
            *p = exp2(sub(load(s.add(8 * j)), most));
            store(s.add(8 * j), *p);
        }
    }
    let q = [add(p[0], p[1]), add(p[2], p[3]), add(p[4], p[5]), add(p[6], p[7])];
    add(add(q[0], q[1]), add(q[2], q[3]))
}

/// What is subtracted from the scores: their maximum, or 0 while nothing was visible (−∞ − −∞ is no number).
#[inline(always)]
pub(super) fn base_of(most: f32) -> f32 {
    if most == f32::NEG_INFINITY { 0.0 } else { most }
}

/// The query vectors of a tile: some rows × some heads, the heads of a row side by side.
#[derive(Clone, Copy)]
pub(super) struct Vectors {
    pub heads: (usize, usize),
    pub rows: (usize, usize),
}

impl Vectors {
    pub fn count(self) -> usize {
        (self.rows.1 - self.rows.0) * (self.heads.1 - self.heads.0)
    }

    /// Row and head of vector `m`.
    #[inline(always)]
    pub fn owner(self, m: usize) -> (usize, usize) {
        let per_row = self.heads.1 - self.heads.0;
        (self.rows.0 + m / per_row, self.heads.0 + m % per_row)
    }

    /// The positions from the first to the last that any of them sees.
    pub fn span(self, task: &AttentionTask<'_>) -> Range<usize> {
        let start = (self.rows.0..self.rows.1).map(|r| task.visible(r).start).min().unwrap_or(0);
        start..task.visible(self.rows.1 - 1).end
    }

    /// The positions of a block that each of the vectors `m` .. `m` + N sees, and from the first to the last of any of them.
    #[inline(always)]
    pub fn seen<const N: usize>(
        self,
        task: &AttentionTask<'_>,
        m: usize,
        block: usize,
    ) -> ([(usize, usize); N], (usize, usize)) {
        let mut seen = [(0, 0); N];
        let mut any = (BLOCK, 0);
        for (i, seen) in seen[..N.min(self.count() - m)].iter_mut().enumerate() {
            *seen = task.visible_in_block(self.owner(m + i).0, block);
            if seen.0 < seen.1 {
                any = (any.0.min(seen.0), any.1.max(seen.1));
            }
        }
        (seen, any)
    }
}

/// Masks the scores of the vectors from `m` on, at most 8, one row each at `s`, of which `seen` are visible, and moves their
/// running maxima. Returns what is subtracted from the scores, and the factors of what was summed before.
///
/// # Safety
/// As many rows of 64 floats at `s`, and maxima at `most`.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
#[inline]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn mask_rows(
    task: &AttentionTask<'_>,
    vectors: Vectors,
    m: usize,
    block: usize,
    seen: &[(usize, usize)],
    bend: &Bend,
    s: *mut f32,
    most: *mut f32,
) -> ([f32; 8], [f32; 8]) {
    let mut old = [0.0; 8];
    let mut new = [0.0; 8];
    // SAFETY: the caller's promise.
    unsafe {
        for (i, &(from, to)) in seen.iter().enumerate() {
            let (row, head) = vectors.owner(m + i);
            let ahead = (task.first_position + row) as f32 - block as f32;
            let row_max = mask_and_max(s.add(i * BLOCK), from, to, bend, task.slope(head) * LOG2_E, ahead);
            let most = most.add(i);
            old[i] = *most;
            *most = if row_max > *most { row_max } else { *most };
            new[i] = base_of(*most);
        }
        let shrinks = exp2(sub(load(old.as_ptr()), load(new.as_ptr())));
        let mut shrink = [0.0; 8];
        store(shrink.as_mut_ptr(), shrinks);
        (new, shrink)
    }
}

/// Writes a finished output vector and its log-sum-exp.
///
/// # Safety
/// `o` holds `task.head_dim` floats, and row and head are the task's own.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
#[inline]
pub(super) unsafe fn finish(task: &AttentionTask<'_>, row: usize, head: usize, o: *const f32, most: f32, sums: F32x8) {
    let total = sum(sums);
    let inverse = if total > 0.0 || total.is_nan() { 1.0 / total } else { 0.0 };
    // SAFETY: the caller's promise.
    unsafe {
        let out = task.out.add(row * task.out_stride + head * task.head_dim);
        for d in 0..task.head_dim {
            *out.add(d) = *o.add(d) * inverse;
        }
        if let Some(lse) = task.lse {
            *lse.add(row * task.lse_stride + head) = (most + total.log2()) * LN_2;
        }
    }
}

/// See [`attention`](super::attention), whose promises are those of the caller here.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
pub(super) unsafe fn attention_lanes(task: &AttentionTask<'_>, scratch: &mut [f32]) {
    let at = Scratch::cut(aligned(scratch), task.head_dim);
    let bend = Bend::new(task);
    task.for_tiles(TILE, |kv_head, heads, rows| {
        // SAFETY: rows and heads are the task's; the CPU has the instructions, for this function runs.
        unsafe { tile(task, &at, &bend, kv_head, Vectors { heads, rows }) };
    });
}

/// All blocks for some query vectors, at most [`TILE`] of them.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
unsafe fn tile(task: &AttentionTask<'_>, at: &Scratch, bend: &Bend, kv_head: usize, vectors: Vectors) {
    let count = vectors.count();
    // SAFETY: indices into the scratch stay below the tile's, the block's and the head's sizes, by which it was cut;
    // pointers into the task are those of its own rows and heads and of positions up to its last row's.
    unsafe {
        for m in 0..count {
            let (row, head) = vectors.owner(m);
            let q = task.q.add(row * task.q_stride + head * at.dim);
            let packed = at.q.add(m / ROWS * (ROWS * at.dim) + m % ROWS);
            for d in 0..at.dim {
                *packed.add(d * ROWS) = *q.add(d) * bend.q_scale;
            }
            *at.most.add(m) = f32::NEG_INFINITY;
            store(at.sums.add(8 * m), zero());
        }
        at.o.write_bytes(0, count * at.width);

        let Range { start, end } = vectors.span(task);
        for block in (start / BLOCK * BLOCK..end).step_by(BLOCK) {
            let stored = start.saturating_sub(block)..BLOCK.min(end - block);
            unpack_block(task, at, kv_head, block, stored.clone(), task.kv.k_offset);
            transpose_keys(at, stored.clone());
            unpack_block(task, at, kv_head, block, stored, task.kv.v_offset);
            for m in (0..count).step_by(ROWS) {
                let n = ROWS.min(count - m);
                let (seen, any) = vectors.seen::<ROWS>(task, m, block);
                if any.0 >= any.1 {
                    continue;
                }
                match n {
                    6 => scores::<6>(at, m, any),
                    5 => scores::<5>(at, m, any),
                    4 => scores::<4>(at, m, any),
                    3 => scores::<3>(at, m, any),
                    2 => scores::<2>(at, m, any),
                    _ => scores::<1>(at, m, any),
                }
                let s = at.s.add(m * BLOCK);
                let (new, shrink) = mask_rows(task, vectors, m, block, &seen[..n], bend, s, at.most.add(m));
                for i in 0..n {
                    let added = exponentiate(s.add(i * BLOCK), new[i]);
                    let lanes = at.sums.add(8 * (m + i));
                    store(lanes, fma(load(lanes), splat(shrink[i]), added));
                }
                match n {
                    6 => weigh::<6>(at, m, any, &shrink),
                    5 => weigh::<5>(at, m, any, &shrink),
                    4 => weigh::<4>(at, m, any, &shrink),
                    3 => weigh::<3>(at, m, any, &shrink),
                    2 => weigh::<2>(at, m, any, &shrink),
                    _ => weigh::<1>(at, m, any, &shrink),
                }
            }
        }
        for m in 0..count {
            let (row, head) = vectors.owner(m);
            let sums = load(at.sums.add(8 * m));
            finish(task, row, head, at.o.add(m * at.width), *at.most.add(m), sums);
        }
    }
}

/// Unpacks positions `stored` of the block that starts at `block` into `v`, [width/16][64][16].
///
/// # Safety
/// These positions must be stored in the cache.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
unsafe fn unpack_block(
    task: &AttentionTask<'_>,
    at: &Scratch,
    kv_head: usize,
    block: usize,
    stored: Range<usize>,
    offset: usize,
) {
    for j in stored {
        // SAFETY: the position is stored; panels hold `width` ≥ d + 8 dimensions of 64 positions.
        unsafe {
            let vector = task.kv.at(offset, kv_head, block + j);
            unpack_eights(task.kv.dtype, vector, at.dim, |d, x| {
                store(at.v.add(d / 16 * (16 * BLOCK) + 16 * j + d % 16), x);
            });
        }
    }
}

/// Transposes the keys in `v` into `kt`, for the 16-position panels that hold any of `stored`.
///
/// # Safety
/// The scratch was cut for this width.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
unsafe fn transpose_keys(at: &Scratch, stored: Range<usize>) {
    for j in (stored.start / 8 * 8..stored.end).step_by(8) {
        for d in (0..at.dim).step_by(8) {
            // SAFETY: an 8 × 8 tile within both panels.
            unsafe {
                let from = at.v.add(d / 16 * (16 * BLOCK) + 16 * j + d % 16);
                let to = at.kt.add(j / 16 * (16 * at.width) + 16 * d + j % 16);
                let mut r = [zero(); 8];
                for (i, r) in r.iter_mut().enumerate() {
                    *r = load(from.add(16 * i));
                }
                for (i, r) in transpose(r).into_iter().enumerate() {
                    store(to.add(16 * i), r);
                }
            }
        }
    }
}

/// S[m .. m + N, panels of `any`] = Q · Kᵀ.
///
/// # Safety
/// `m` is the first of N query vectors of one group of six.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
unsafe fn scores<const N: usize>(at: &Scratch, m: usize, any: (usize, usize)) {
    for panel in any.0 / 16..any.1.div_ceil(16) {
        // SAFETY: one group of packed queries, one panel of keys, N rows of scores, all within the scratch.
        unsafe {
            let mut q = at.q.add(m * at.dim).cast_const();
            let mut k = at.kt.add(panel * (16 * at.width)).cast_const();
            let mut acc = [[zero(); 2]; N];
            for _ in 0..at.dim {
                let (k0, k1) = (load(k), load(k.add(8)));
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = splat(*q.add(i));
                    acc[0] = fma(x, k0, acc[0]);
                    acc[1] = fma(x, k1, acc[1]);
                }
                q = q.add(ROWS);
                k = k.add(16);
            }
            for (i, acc) in acc.iter().enumerate() {
                let s = at.s.add((m + i) * BLOCK + 16 * panel);
                store(s, acc[0]);
                store(s.add(8), acc[1]);
            }
        }
    }
}

/// O[m .. m + N] ← O · shrink + P · V over the positions `any`.
///
/// # Safety
/// As for [`scores`].
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
unsafe fn weigh<const N: usize>(at: &Scratch, m: usize, any: (usize, usize), shrink: &[f32; 8]) {
    for panel in 0..at.width / 16 {
        // SAFETY: N rows of probabilities and of output, one panel of values, all within the scratch.
        unsafe {
            let o = at.o.add(m * at.width + 16 * panel);
            let mut acc = [[zero(); 2]; N];
            for (i, acc) in acc.iter_mut().enumerate() {
                let c = splat(shrink[i]);
                acc[0] = mul(c, load(o.add(i * at.width)));
                acc[1] = mul(c, load(o.add(i * at.width + 8)));
            }
            let mut p = at.s.add(m * BLOCK + any.0).cast_const();
            let mut v = at.v.add(panel * (16 * BLOCK) + 16 * any.0).cast_const();
            for _ in any.0..any.1 {
                let (v0, v1) = (load(v), load(v.add(8)));
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = splat(*p.add(i * BLOCK));
                    acc[0] = fma(x, v0, acc[0]);
                    acc[1] = fma(x, v1, acc[1]);
                }
                p = p.add(1);
                v = v.add(16);
            }
            for (i, acc) in acc.iter().enumerate() {
                store(o.add(i * at.width), acc[0]);
                store(o.add(i * at.width + 8), acc[1]);
            }
        }
    }
}
