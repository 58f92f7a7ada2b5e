//! 16 bits, in the arithmetic of the AVX2 form, to the bit: integer sums are exact in either, and f32 sums go in the same
//! order.
//!
//! A pair of steps of a slab is one vector, and `vpdpwssd` multiplies and adds in one instruction. A register tile is 12
//! tokens × 2 slabs: 24 sums, enough for two units of latency 5, with 14 loads for 24 products. Two slabs of 512 steps are
//! 32 KiB, which with the tokens' activations fit a first cache of 48.

use super::super::GROUP;
use super::super::blocks::{LANES, Rows, Slabs, Target, Vectors, scales_at};
use super::{Avx512, in_tiles, scales_of, write};
use std::arch::x86_64::*;

/// Tokens of a register tile.
const TILE: usize = 12;
/// Steps of a turn of the innermost loop.
const UNROLL: usize = 4;

impl Vectors<i16> for Avx512 {
    const SLABS: usize = 2;

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    #[inline(never)]
    unsafe fn fix(slab: *mut f32, steps: usize) {
        // SAFETY: steps of 16 values; a pair of them is read before it is written over.
        unsafe {
            let scales = scales_of::<i16>(|i| _mm512_loadu_ps(slab.add(LANES * i)), steps);
            let (keep, by) = (scales.keep, scales.inverse);

            // Nothing of a NaN may be multiplied, not even by zero.
            let int =
                |i: usize| _mm512_cvtps_epi32(_mm512_maskz_mul_ps(keep, _mm512_loadu_ps(slab.add(LANES * i)), by));
            let pairs = steps / 2;
            for p in 0..pairs {
                let (a, b) = (int(2 * p), int(2 * p + 1));
                let pair = _mm512_mask_blend_epi16(0xaaaa_aaaa, a, _mm512_slli_epi32::<16>(b));
                _mm512_storeu_si512(slab.add(LANES * p).cast(), pair);
            }
            if steps % 2 == 1 {
                let pair = _mm512_and_si512(int(2 * pairs), _mm512_set1_epi32(0xffff));
                _mm512_storeu_si512(slab.add(LANES * pairs).cast(), pair);
            }
            for p in steps.div_ceil(2)..steps.div_ceil(GROUP) * GROUP / 2 {
                _mm512_storeu_si512(slab.add(LANES * p).cast(), _mm512_setzero_si512());
            }
            _mm512_storeu_ps(slab.add(scales_at(steps.div_ceil(GROUP))), scales.scale);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    #[inline(never)]
    unsafe fn multiply(slabs: Slabs, x: Rows<i16>, to: Target) {
        for (x, to) in in_tiles(x, to, TILE) {
            // SAFETY: the caller's promise.
            unsafe { if slabs.count == 2 { some::<2>(slabs, x, to) } else { some::<1>(slabs, x, to) } }
        }
    }
}

/// S slabs times at most [`TILE`] tokens.
///
/// # Safety
/// As for [`Vectors::multiply`].
#[inline(always)]
unsafe fn some<const S: usize>(slabs: Slabs, x: Rows<i16>, to: Target) {
    // SAFETY: the caller's promise.
    unsafe {
        match x.tokens {
            1 => tile::<1, S>(slabs, x, to),
            2 => tile::<2, S>(slabs, x, to),
            3 => tile::<3, S>(slabs, x, to),
            4 => tile::<4, S>(slabs, x, to),
            5 => tile::<5, S>(slabs, x, to),
            6 => tile::<6, S>(slabs, x, to),
            7 => tile::<7, S>(slabs, x, to),
            8 => tile::<8, S>(slabs, x, to),
            9 => tile::<9, S>(slabs, x, to),
            10 => tile::<10, S>(slabs, x, to),
            11 => tile::<11, S>(slabs, x, to),
            _ => tile::<12, S>(slabs, x, to),
        }
    }
}

/// T tokens × S slabs.
///
/// The inner loop counts to a number the compiler cannot see, for the reason given at the AVX2 form.
///
/// # Safety
/// As for [`Vectors::multiply`], with T tokens and S slabs.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn tile<const T: usize, const S: usize>(slabs: Slabs, x: Rows<i16>, to: Target) {
    // SAFETY: by the contract.
    unsafe {
        let steps = std::hint::black_box(GROUP / 2 / UNROLL);
        let mut acc = [[_mm512_setzero_ps(); S]; T];
        let mut w = slabs.at;
        // One pointer for three tokens: the addresses then need no more registers than there are.
        let mut q: [*const i32; 4] = std::array::from_fn(|i| x.q.wrapping_add(3 * i * x.row * GROUP).cast());
        let row = x.row * GROUP / 2;
        for g in 0..slabs.groups {
            let mut sums = [[_mm512_setzero_si512(); S]; T];
            for _ in 0..steps {
                for i in 0..UNROLL {
                    let mut weights = [_mm512_setzero_si512(); S];
                    for (s, weights) in weights.iter_mut().enumerate() {
                        *weights = _mm512_loadu_si512(w.add(s * slabs.step + LANES * i).cast());
                    }
                    for (t, sums) in sums.iter_mut().enumerate() {
                        let pair = _mm512_set1_epi32(q[t / 3].add(t % 3 * row + i).read_unaligned());
                        for (sum, weights) in sums.iter_mut().zip(weights) {
                            *sum = _mm512_dpwssd_epi32(*sum, weights, pair);
                        }
                    }
                    // Keeps the steps apart: reordered, they drown in spills. By number: iterators are inlined too late, or not.
                    #[allow(clippy::needless_range_loop)]
                    for t in 0..T {
                        for s in 0..S {
                            std::arch::asm!("/* {0} */", inout(zmm_reg) sums[t][s], options(nomem, nostack, preserves_flags));
                        }
                    }
                }
                w = w.add(LANES * UNROLL);
                for q in &mut q[..T.div_ceil(3)] {
                    *q = q.add(UNROLL);
                }
            }
            for (t, (acc, sums)) in acc.iter_mut().zip(sums).enumerate() {
                let scale = _mm512_set1_ps(*x.d.add(t * x.row + g));
                for (acc, sum) in acc.iter_mut().zip(sums) {
                    *acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, *acc);
                }
            }
        }
        for (t, acc) in acc.into_iter().enumerate() {
            for (s, acc) in acc.into_iter().enumerate() {
                let scale = _mm512_loadu_ps(slabs.at.add(s * slabs.step + scales_at(slabs.groups)));
                write(to, t, s, acc, scale);
            }
        }
    }
}
