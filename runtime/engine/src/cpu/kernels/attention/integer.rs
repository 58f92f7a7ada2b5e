//! The prefill path in 16-bit integers for AVX-512 with VNNI: [`block`](super::block) with its two products by `vpdpwssd`, which
//! does twice as many multiplications as an f32 `fma` of the same width.
//!
//! Scales make each vector fit, and no sum overflow:
//!   * a query and a key have the Euclidean norm 32,767 as integers, so that a product is below 2³⁰ (Cauchy and Schwarz) and an
//!     element off by 1.5·10⁻⁵ of the norm at most, no more than f16 is;
//!   * a value has elements up to 4,095, and probabilities, each times its value's scale, go up to 8,190: 64·8,190·4,095 < 2³¹.
//!
//! A scale is that of one vector, or of one row of a block's probabilities: what other rows and positions there are does not
//! show, as in the f32 path.

use super::super::lanes::transpose;
use super::super::vector::avx512::exp2;
use super::block::{Bend, Vectors, finish, mask_rows};
use super::kv::unpack_eights;
use super::{AttentionTask, BLOCK, Pieces, aligned};
use std::arch::x86_64::*;
use std::ops::Range;

/// Query vectors per register tile.
const ROWS: usize = 8;

/// Query vectors (row × head) that share one rounded block: a task's, up to eight heads that share their keys.
const TILE: usize = 256;

/// Positions of a register tile of scores, and dimensions of one of the output.
const PANEL: usize = 32;

/// Norm of a query or key.
const NORM: f32 = 32_767.0;

/// Largest element of a value.
const MOST_VALUE: f32 = 4_095.0;

/// Largest probability, times its value's scale.
const MOST_SHARE: f32 = 8_190.0;

/// Floats of scratch, for heads of `head_dim` elements.
pub(super) fn scratch_len(head_dim: usize) -> usize {
    let width = head_dim.next_multiple_of(PANEL);
    TILE * width / 2
        + TILE * width
        + BLOCK * width
        + ROWS * (width / 2 + BLOCK + BLOCK / 2)
        + width
        + 11 * TILE
        + 2 * BLOCK
}

/// Where the pieces of the scratch lie, and the sizes they were cut by. Pairs are two 16-bit integers, the first one low.
#[derive(Clone, Copy)]
struct Scratch {
    dim: usize,
    /// `dim` rounded up to a panel; elements beyond `dim` are zeros.
    width: usize,
    /// Queries in pairs of dimensions [TILE/8][width/2][8].
    q: *mut i32,
    /// Factors of the queries [TILE], with what [`Bend`] asks for.
    q_scale: *mut f32,
    /// Accumulated output [TILE][width].
    o: *mut f32,
    /// Keys in pairs of dimensions [width/2][64].
    k: *mut i32,
    /// Factors of the keys [64].
    k_scale: *mut f32,
    /// Values in pairs of positions [64/2][width].
    v: *mut i32,
    /// Factors of the values [64]; 0 where none is stored.
    v_scale: *mut f32,
    /// Scores [8][64].
    s: *mut f32,
    /// Probabilities in pairs of positions [8][64/2].
    p: *mut i32,
    /// A vector as it comes from the cache [width].
    row: *mut f32,
    /// Vectors as integers [8][width], before they find their place.
    words: *mut i16,
    /// Running maxima [TILE], in base 2.
    most: *mut f32,
    /// Running sums [TILE][8].
    sums: *mut f32,
}

impl Scratch {
    /// From `base` on, where there must be room for [`scratch_len`] floats: the lengths add up to it.
    fn cut(base: *mut f32, dim: usize) -> Scratch {
        let width = dim.next_multiple_of(PANEL);
        let mut pieces = Pieces(base);
        Scratch {
            dim,
            width,
            q: pieces.take(TILE * width / 2),
            o: pieces.take(TILE * width),
            k: pieces.take(BLOCK * width / 2),
            v: pieces.take(BLOCK * width / 2),
            s: pieces.take(ROWS * BLOCK),
            p: pieces.take(ROWS * BLOCK / 2),
            row: pieces.take(width),
            words: pieces.take(ROWS * width / 2),
            k_scale: pieces.take(BLOCK),
            v_scale: pieces.take(BLOCK),
            q_scale: pieces.take(TILE),
            most: pieces.take(TILE),
            sums: pieces.take(TILE * 8),
        }
    }
}

/// See [`attention`](super::attention), whose promises are those of the caller here.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn attention_avx512(task: &AttentionTask<'_>, scratch: &mut [f32]) {
    let at = Scratch::cut(aligned(scratch), task.head_dim);
    let bend = Bend::new(task);
    task.for_tiles(TILE, |kv_head, heads, rows| {
        // SAFETY: rows and heads are the task's; the CPU has AVX-512, for this function runs.
        unsafe { tile(task, &at, &bend, kv_head, Vectors { heads, rows }) };
    });
}

/// All blocks for some query vectors, at most [`TILE`] of them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn tile(task: &AttentionTask<'_>, at: &Scratch, bend: &Bend, kv_head: usize, vectors: Vectors) {
    let count = vectors.count();
    // SAFETY: indices into the scratch stay below the tile's, the block's and the head's sizes, by which it was cut;
    // pointers into the task are those of its own rows and heads and of positions up to its last row's.
    unsafe {
        at.row.write_bytes(0, at.width);
        for m in 0..count {
            let (row, head) = vectors.owner(m);
            let q = task.q.add(row * task.q_stride + head * at.dim);
            at.row.copy_from_nonoverlapping(q, at.dim);
            let norm = norm(at.row, at.width);
            to_words(at.row, at.width, scale_of(NORM, norm), at.words);
            let pairs = at.words.cast::<i32>();
            let packed = at.q.add(m / ROWS * (ROWS * at.width / 2) + m % ROWS);
            for d in 0..at.width / 2 {
                *packed.add(d * ROWS) = *pairs.add(d);
            }
            *at.q_scale.add(m) = norm / NORM * bend.q_scale;
            *at.most.add(m) = f32::NEG_INFINITY;
            _mm256_storeu_ps(at.sums.add(8 * m), _mm256_setzero_ps());
        }
        // The last register tile may have rows that nobody asked for: whatever they hold, they must be numbers.
        let padded = count.next_multiple_of(ROWS);
        at.q_scale.add(count).write_bytes(0, padded - count);
        at.o.write_bytes(0, padded * at.width);

        let Range { start, end } = vectors.span(task);
        for block in (start / BLOCK * BLOCK..end).step_by(BLOCK) {
            let stored = start.saturating_sub(block)..BLOCK.min(end - block);
            keys(task, at, kv_head, block, stored.clone());
            values(task, at, kv_head, block, stored);
            for m in (0..count).step_by(ROWS) {
                let n = ROWS.min(count - m);
                let (seen, any) = vectors.seen::<ROWS>(task, m, block);
                if any.0 >= any.1 {
                    continue;
                }
                scores(at, m, any);
                let (new, shrink) = mask_rows(task, vectors, m, block, &seen[..n], bend, at.s, at.most.add(m));
                let mut factor = [0.0; ROWS];
                for i in 0..n {
                    let (added, scale) = probabilities(at, i, new[i]);
                    factor[i] = scale;
                    let lanes = at.sums.add(8 * (m + i));
                    _mm256_storeu_ps(lanes, _mm256_fmadd_ps(_mm256_loadu_ps(lanes), _mm256_set1_ps(shrink[i]), added));
                }
                weigh(at, m, any, &shrink, &factor);
            }
        }
        for m in 0..count {
            let (row, head) = vectors.owner(m);
            let sums = _mm256_loadu_ps(at.sums.add(8 * m));
            finish(task, row, head, at.o.add(m * at.width), *at.most.add(m), sums);
        }
    }
}

/// The factor that makes `size` into `wanted`; 0 for a vector of zeros.
fn scale_of(wanted: f32, size: f32) -> f32 {
    if size == 0.0 { 0.0 } else { wanted / size }
}

/// The Euclidean norm of `width` elements, a multiple of 16.
///
/// # Safety
/// They must be readable.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn norm(x: *const f32, width: usize) -> f32 {
    let mut squares = _mm512_setzero_ps();
    for d in (0..width).step_by(16) {
        // SAFETY: the caller's promise.
        let x = unsafe { _mm512_loadu_ps(x.add(d)) };
        squares = _mm512_fmadd_ps(x, x, squares);
    }
    _mm512_reduce_add_ps(squares).sqrt()
}

/// The largest magnitude of `width` elements, a multiple of 16.
///
/// # Safety
/// They must be readable.
#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
unsafe fn most(x: *const f32, width: usize) -> f32 {
    let mut most = _mm512_setzero_ps();
    for d in (0..width).step_by(16) {
        // SAFETY: the caller's promise. `max` returns its second operand when one is NaN, so a NaN stays.
        let x = unsafe { _mm512_loadu_ps(x.add(d)) };
        most = _mm512_max_ps(most, _mm512_abs_ps(x));
    }
    _mm512_reduce_max_ps(most)
}

/// Rounds `scale`·x to 16-bit integers, `width` elements, a multiple of 16.
///
/// # Safety
/// They must be readable and writable.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn to_words(x: *const f32, width: usize, scale: f32, out: *mut i16) {
    for d in (0..width).step_by(16) {
        // SAFETY: the caller's promise.
        unsafe {
            let x = _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_loadu_ps(x.add(d)));
            _mm256_storeu_si256(out.add(d).cast(), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
        }
    }
}

/// Unpacks a vector of the cache to `at.row`, whose padding stays as it is.
///
/// # Safety
/// The position must be stored.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn fetch(task: &AttentionTask<'_>, at: &Scratch, offset: usize, kv_head: usize, position: usize) {
    // SAFETY: the position is stored; the row holds `dim` elements rounded up to 8 at least.
    unsafe {
        let vector = task.kv.at(offset, kv_head, position);
        unpack_eights(task.kv.dtype, vector, at.dim, |d, x| _mm256_storeu_ps(at.row.add(d), x));
    }
}

/// Rounds the keys at the positions `stored` of the block that starts at `block`, and turns them.
///
/// # Safety
/// These positions must be stored in the cache.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn keys(task: &AttentionTask<'_>, at: &Scratch, kv_head: usize, block: usize, stored: Range<usize>) {
    for first in (stored.start / 8 * 8..stored.end).step_by(8) {
        // SAFETY: 8 vectors of `width` words, 8 columns of pairs; what is not stored is masked as a score.
        unsafe {
            for j in first.max(stored.start)..(first + 8).min(stored.end) {
                fetch(task, at, task.kv.k_offset, kv_head, block + j);
                let norm = norm(at.row, at.width);
                to_words(at.row, at.width, scale_of(NORM, norm), at.words.add((j - first) * at.width));
                *at.k_scale.add(j) = norm / NORM;
            }
            for d in (0..at.width / 2).step_by(8) {
                let mut r = [_mm256_setzero_ps(); 8];
                for (i, r) in r.iter_mut().enumerate() {
                    *r = _mm256_loadu_ps(at.words.add(i * at.width + 2 * d).cast());
                }
                for (i, r) in transpose(r).into_iter().enumerate() {
                    _mm256_storeu_ps(at.k.add((d + i) * BLOCK + first).cast(), r);
                }
            }
        }
    }
}

/// Rounds the values at the positions `stored` of the block that starts at `block`, two side by side.
///
/// # Safety
/// As for [`keys`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn values(task: &AttentionTask<'_>, at: &Scratch, kv_head: usize, block: usize, stored: Range<usize>) {
    // SAFETY: `width` words of two vectors, `width` pairs.
    unsafe {
        at.v_scale.write_bytes(0, BLOCK);
        for first in (stored.start / 2 * 2..stored.end).step_by(2) {
            for j in first.max(stored.start)..(first + 2).min(stored.end) {
                fetch(task, at, task.kv.v_offset, kv_head, block + j);
                let most = most(at.row, at.width);
                to_words(at.row, at.width, scale_of(MOST_VALUE, most), at.words.add((j - first) * at.width));
                *at.v_scale.add(j) = most / MOST_VALUE;
            }
            for d in (0..at.width).step_by(16) {
                let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.words.add(d).cast()));
                let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.words.add(at.width + d).cast()));
                let pairs = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
                _mm512_storeu_si512(at.v.add(first / 2 * at.width + d).cast(), pairs);
            }
        }
    }
}

/// Scores of the query vectors `m` .. `m` + 8, over the panels that hold any of the positions `any`.
///
/// # Safety
/// `m` is the first vector of a register tile.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn scores(at: &Scratch, m: usize, any: (usize, usize)) {
    for panel in any.0 / PANEL..any.1.div_ceil(PANEL) {
        // SAFETY: one tile of packed queries, one panel of keys, 8 rows of scores, all within the scratch.
        unsafe {
            let mut q = at.q.add(m * (at.width / 2)).cast_const();
            let mut k = at.k.add(panel * PANEL).cast_const();
            let mut acc = [[_mm512_setzero_si512(); 2]; ROWS];
            for _ in 0..at.width / 2 {
                let (k0, k1) = (_mm512_loadu_si512(k.cast()), _mm512_loadu_si512(k.add(16).cast()));
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = _mm512_set1_epi32(*q.add(i));
                    acc[0] = _mm512_dpwssd_epi32(acc[0], x, k0);
                    acc[1] = _mm512_dpwssd_epi32(acc[1], x, k1);
                }
                q = q.add(ROWS);
                k = k.add(BLOCK);
            }
            let scale = at.k_scale.add(panel * PANEL);
            let scale = [_mm512_loadu_ps(scale), _mm512_loadu_ps(scale.add(16))];
            for (i, acc) in acc.iter().enumerate() {
                let own = _mm512_set1_ps(*at.q_scale.add(m + i));
                let s = at.s.add(i * BLOCK + panel * PANEL);
                for (half, acc) in acc.iter().enumerate() {
                    let score = _mm512_mul_ps(_mm512_cvtepi32_ps(*acc), _mm512_mul_ps(own, scale[half]));
                    _mm512_storeu_ps(s.add(16 * half), score);
                }
            }
        }
    }
}

/// Row `i` of the masked scores to probabilities 2^(s − most), times their values' scales as integers. Returns the sum of
/// the probabilities in eight lanes, and the integers' factor.
///
/// # Safety
/// `i` is below 8.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
unsafe fn probabilities(at: &Scratch, i: usize, most: f32) -> (__m256, f32) {
    // SAFETY: within the row.
    unsafe {
        let s = at.s.add(i * BLOCK);
        let mut sum = _mm512_setzero_ps();
        let mut largest = _mm512_setzero_ps();
        let mut shares = [_mm512_setzero_ps(); BLOCK / 16];
        for (j, share) in shares.iter_mut().enumerate() {
            let p = exp2(_mm512_sub_ps(_mm512_loadu_ps(s.add(16 * j)), _mm512_set1_ps(most)));
            sum = _mm512_add_ps(sum, p);
            *share = _mm512_mul_ps(p, _mm512_loadu_ps(at.v_scale.add(16 * j)));
            largest = _mm512_max_ps(largest, *share);
        }
        let largest = _mm512_reduce_max_ps(largest);
        let scale = _mm512_set1_ps(scale_of(MOST_SHARE, largest));
        for (j, share) in shares.iter().enumerate() {
            let words = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(*share, scale)));
            _mm256_storeu_si256(at.p.add(i * (BLOCK / 2) + 8 * j).cast(), words);
        }
        let sum = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps::<1>(sum));
        (sum, largest / MOST_SHARE)
    }
}

/// O[m .. m + 8] ← O · shrink + factor · P · V over the positions `any`.
///
/// # Safety
/// As for [`scores`].
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn weigh(at: &Scratch, m: usize, any: (usize, usize), shrink: &[f32; ROWS], factor: &[f32; ROWS]) {
    let pairs = any.0 / 2..any.1.div_ceil(2);
    for panel in (0..at.width).step_by(PANEL) {
        // SAFETY: 8 rows of probabilities and of output, one panel of values, all within the scratch.
        unsafe {
            let mut p = at.p.add(pairs.start).cast_const();
            let mut v = at.v.add(pairs.start * at.width + panel).cast_const();
            let mut acc = [[_mm512_setzero_si512(); 2]; ROWS];
            for _ in pairs.clone() {
                let (v0, v1) = (_mm512_loadu_si512(v.cast()), _mm512_loadu_si512(v.add(16).cast()));
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = _mm512_set1_epi32(*p.add(i * (BLOCK / 2)));
                    acc[0] = _mm512_dpwssd_epi32(acc[0], x, v0);
                    acc[1] = _mm512_dpwssd_epi32(acc[1], x, v1);
                }
                p = p.add(1);
                v = v.add(at.width);
            }
            for (i, acc) in acc.iter().enumerate() {
                let (shrink, factor) = (_mm512_set1_ps(shrink[i]), _mm512_set1_ps(factor[i]));
                let o = at.o.add((m + i) * at.width + panel);
                for (half, acc) in acc.iter().enumerate() {
                    let o = o.add(16 * half);
                    let old = _mm512_mul_ps(_mm512_loadu_ps(o), shrink);
                    _mm512_storeu_ps(o, _mm512_fmadd_ps(_mm512_cvtepi32_ps(*acc), factor, old));
                }
            }
        }
    }
}
