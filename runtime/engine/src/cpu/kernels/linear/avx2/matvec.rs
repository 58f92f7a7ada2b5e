//! One to four tokens against rows read straight from their blocks: the shape of decoding, bound by memory.
//!
//! A unit of 256 weights at a time: its eight scales are made at once, multiplied by the activations' eight, and
//! stored; then eight times 32 bytes are unpacked, multiplied with the tokens' bytes, and added under their scale. Rows
//! lie one after the other and are computed one after the other, so a thread's share is one stream. Two rows at a time would
//! share the loads of the activations, but long rows then come from memory at half the rate: the hardware prefetches one
//! stream of whole pages better than two that jump.

// Registers are numbered: `for t in 0..T` says what happens better than zipped iterators do.
#![allow(clippy::needless_range_loop)]

use super::super::tile::XRow;
use super::unpack::Block;
use crate::cpu::kernels::{ask_ahead, asks_ahead};
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

/// `Σ u8 · i8` over 4 bytes, in 8 lanes: what differs between AVX2 and VNNI.
pub(crate) trait Dot {
    /// # Safety
    /// The caller has the instructions.
    unsafe fn dot(u: __m256i, s: __m256i) -> __m256i;
}

/// AVX2: by pairs in 16 bits, which the values' ranges keep from saturating, then in 32.
pub(crate) struct Maddubs;

impl Dot for Maddubs {
    #[inline(always)]
    unsafe fn dot(u: __m256i, s: __m256i) -> __m256i {
        // SAFETY: register arithmetic.
        unsafe { _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)) }
    }
}

/// Rows `rows` of the matrix at `weight` times `T` tokens: `write(t, row, value)`.
///
/// # Safety
/// The caller has AVX2, FMA, F16C and what `D` needs; every row is `row_bytes` of whole blocks for `k` values; `x`
/// points at rows of `k` values with padded scales.
#[inline(always)]
pub(crate) unsafe fn matvec<B: Block, D: Dot, const T: usize>(
    weight: *const u8,
    row_bytes: usize,
    k: usize,
    rows: std::ops::Range<usize>,
    x: [XRow; T],
    mut write: impl FnMut(usize, usize, f32),
) {
    // A count the compiler cannot see keeps it from unrolling `unit` into more values than there are registers.
    let steps = std::hint::black_box(8 / B::STEP);
    let asks = asks_ahead();
    for row in rows {
        // SAFETY: the row lies in the matrix; units and their tail stay within it.
        unsafe {
            let mut p = weight.add(row * row_bytes);
            let mut sums = [[_mm256_setzero_ps(); PARTS]; T];
            for u in 0..k / 256 {
                if asks {
                    ask_ahead(p, B::BYTES);
                }
                unit::<B, D, T>(p, u, 8, steps, &x, &mut sums);
                p = p.add(B::BYTES);
            }
            if !k.is_multiple_of(256) {
                let groups = k % 256 / 32;
                if asks {
                    ask_ahead(p, groups * B::BYTES / 8);
                }
                unit::<B, D, T>(p, k / 256, groups, groups / B::STEP, &x, &mut sums);
            }
            for (t, [a, b]) in sums.iter().enumerate() {
                write(t, row, horizontal(_mm256_add_ps(*a, *b)));
            }
        }
    }
}

/// Partial sums of a row and token, so that additions wait less for each other.
const PARTS: usize = 2;

/// The sum of eight lanes.
#[inline(always)]
pub(crate) unsafe fn horizontal(v: __m256) -> f32 {
    // SAFETY: register arithmetic.
    unsafe {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
    }
}

/// The products of a unit's scales with a token's, in memory.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Products {
    _values: [f32; 16],
}

/// Unit `u` of a row, which lies at `p` and has `groups` groups, in `steps` steps of `B::STEP`.
#[inline(always)]
unsafe fn unit<B: Block, D: Dot, const T: usize>(
    p: *const u8,
    u: usize,
    groups: usize,
    steps: usize,
    x: &[XRow; T],
    sums: &mut [[__m256; PARTS]; T],
) {
    // SAFETY: by `matvec`'s contract; activation scales are padded to a multiple of eight.
    unsafe {
        let mut products = [const { MaybeUninit::<Products>::uninit() }; T];
        let (d, m) = B::scales(p, groups);
        for t in 0..T {
            let dx = _mm256_loadu_ps(x[t].d.add(8 * u));
            let to = products[t].as_mut_ptr().cast::<f32>();
            let part = &mut sums[t];
            if B::HALVES {
                let low = _mm256_permutevar8x32_ps(dx, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
                let high = _mm256_permutevar8x32_ps(dx, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
                _mm256_store_ps(to, _mm256_mul_ps(d[0], low));
                _mm256_store_ps(to.add(8), _mm256_mul_ps(d[1], high));
                part[0] = _mm256_fmadd_ps(m[0], _mm256_loadu_ps(x[t].s16.add(16 * u)), part[0]);
                part[1] = _mm256_fmadd_ps(m[1], _mm256_loadu_ps(x[t].s16.add(16 * u + 8)), part[1]);
            } else {
                _mm256_store_ps(to, _mm256_mul_ps(d[0], dx));
                if !B::SIGNED {
                    part[1] = _mm256_fmadd_ps(m[0], _mm256_loadu_ps(x[t].s.add(8 * u)), part[1]);
                }
            }
        }
        // Keeps the products in memory, from where a broadcast is a plain load: in registers each takes two shuffles.
        std::arch::asm!("/* {0} */", in(reg) products.as_mut_ptr(), options(nostack, preserves_flags));
        // Where shifts depend on the group it must be a constant, and there is no loop.
        if B::STEP == 8 {
            for g in 0..8 {
                group::<B, D, T>(p, u, g, g, x, &products, sums);
            }
        } else {
            for step in 0..steps {
                for j in 0..B::STEP {
                    group::<B, D, T>(p, u, step * B::STEP + j, j, x, &products, sums);
                }
            }
        }
    }
}

/// Group `g` of unit `u`, into partial sum `part` (modulo their number).
#[inline(always)]
unsafe fn group<B: Block, D: Dot, const T: usize>(
    p: *const u8,
    u: usize,
    g: usize,
    part: usize,
    x: &[XRow; T],
    products: &[MaybeUninit<Products>; T],
    sums: &mut [[__m256; PARTS]; T],
) {
    // SAFETY: the unit has the group, and its products have been written.
    unsafe {
        let w = B::group(p, g);
        let size = if B::SIGNED { _mm256_abs_epi8(w) } else { w };
        for t in 0..T {
            let q = _mm256_loadu_si256(x[t].q.add(256 * u + 32 * g).cast());
            let q = if B::SIGNED { _mm256_sign_epi8(q, w) } else { q };
            let dot = _mm256_cvtepi32_ps(D::dot(size, q));
            let from = products[t].as_ptr().cast::<f32>();
            let scale = if B::HALVES {
                // Lanes 0 to 3 hold the first 16 values, 4 to 7 the others.
                let pair = _mm256_castpd_ps(_mm256_broadcast_sd(&*from.add(2 * g).cast()));
                _mm256_permutevar_ps(pair, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1))
            } else {
                _mm256_broadcast_ss(&*from.add(g))
            };
            let sum = &mut sums[t][part % PARTS];
            *sum = _mm256_fmadd_ps(dot, scale, *sum);
        }
    }
}
