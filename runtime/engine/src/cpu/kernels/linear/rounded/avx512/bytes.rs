//! 8 bits: four steps of a slab are one vector, and `vpdpbusd` multiplies and adds them in one instruction, activations
//! without a sign (128 is added) and weights with theirs. What the 128 comes to is the same for all tokens: their sums begin
//! with it, taken off.
//!
//! A group of rounded weights lies as `[16][lane][4]` bytes, then the lanes' scales, then the beginnings of their sums. A
//! register tile is 6 tokens × 2 slabs: 12 sums of a group and 12 of f32, all in registers, since a group is 16 instructions
//! for each sum only.

use super::super::GROUP;
use super::super::blocks::{LANES, Rows, Slabs, Target, Vectors};
use super::{Avx512, in_tiles, scales_of, write};
use std::arch::x86_64::*;

/// Tokens of a register tile.
const TILE: usize = 6;
/// Vectors of a turn of the innermost loop.
const UNROLL: usize = 4;
/// Vectors of a group.
const VECTORS: usize = GROUP / 4;
/// Floats of a rounded group, scales and beginnings included.
const STRIDE: usize = (VECTORS + 2) * LANES;

impl Vectors<u8> for Avx512 {
    const SLABS: usize = 2;

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    #[inline(never)]
    unsafe fn fix(slab: *mut f32, steps: usize) {
        for g in 0..steps.div_ceil(GROUP) {
            let some = (steps - g * GROUP).min(GROUP);
            // SAFETY: whole groups have room. What is written lies before what is read later: of the group by vectors, four
            // steps each, and between groups, since a rounded one is smaller.
            unsafe {
                let (from, to) = (slab.add(g * GROUP * LANES).cast_const(), slab.add(g * STRIDE));
                let step = |i: usize| _mm512_loadu_ps(from.add(LANES * i));
                let scales = scales_of::<u8>(step, some);
                // Nothing of a NaN may be multiplied, not even by zero.
                let int = |i: usize| match i < some {
                    true => _mm512_cvtps_epi32(_mm512_maskz_mul_ps(scales.keep, step(i), scales.inverse)),
                    false => _mm512_setzero_si512(),
                };
                let low = _mm512_set1_epi32(0xff);
                let mut begin = _mm512_setzero_si512();
                for v in 0..VECTORS {
                    let [a, b, c, d] = [int(4 * v), int(4 * v + 1), int(4 * v + 2), int(4 * v + 3)];
                    let words =
                        _mm512_or_si512(_mm512_and_si512(a, low), _mm512_slli_epi32::<8>(_mm512_and_si512(b, low)));
                    let more = _mm512_or_si512(_mm512_and_si512(c, low), _mm512_slli_epi32::<8>(d));
                    let packed = _mm512_or_si512(words, _mm512_slli_epi32::<16>(more));
                    begin = _mm512_dpbusd_epi32(begin, _mm512_set1_epi8(-128), packed);
                    _mm512_storeu_si512(to.add(LANES * v).cast(), packed);
                }
                _mm512_storeu_ps(to.add(LANES * VECTORS), scales.scale);
                let begin = _mm512_sub_epi32(_mm512_setzero_si512(), begin);
                _mm512_storeu_si512(to.add(LANES * (VECTORS + 1)).cast(), begin);
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    #[inline(never)]
    unsafe fn multiply(slabs: Slabs, x: Rows<u8>, to: Target) {
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
unsafe fn some<const S: usize>(slabs: Slabs, x: Rows<u8>, to: Target) {
    // SAFETY: the caller's promise.
    unsafe {
        match x.tokens {
            1 => tile::<1, S>(slabs, x, to),
            2 => tile::<2, S>(slabs, x, to),
            3 => tile::<3, S>(slabs, x, to),
            4 => tile::<4, S>(slabs, x, to),
            5 => tile::<5, S>(slabs, x, to),
            _ => tile::<6, S>(slabs, x, to),
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
unsafe fn tile<const T: usize, const S: usize>(slabs: Slabs, x: Rows<u8>, to: Target) {
    // SAFETY: by the contract.
    unsafe {
        let turns = std::hint::black_box(VECTORS / UNROLL);
        let mut acc = [[_mm512_setzero_ps(); S]; T];
        let mut w = slabs.at;
        // One pointer for three tokens: the addresses then need no more registers than there are.
        let mut q: [*const i32; 2] = std::array::from_fn(|i| x.q.wrapping_add(3 * i * x.row * GROUP).cast());
        let row = x.row * GROUP / 4;
        for g in 0..slabs.groups {
            let mut begin = [_mm512_setzero_si512(); S];
            for (s, begin) in begin.iter_mut().enumerate() {
                *begin = _mm512_loadu_si512(w.add(s * slabs.step + LANES * (VECTORS + 1)).cast());
            }
            let mut sums = [begin; T];
            for _ in 0..turns {
                for i in 0..UNROLL {
                    let mut weights = [_mm512_setzero_si512(); S];
                    for (s, weights) in weights.iter_mut().enumerate() {
                        *weights = _mm512_loadu_si512(w.add(s * slabs.step + LANES * i).cast());
                    }
                    for (t, sums) in sums.iter_mut().enumerate() {
                        let four = _mm512_set1_epi32(q[t / 3].add(t % 3 * row + i).read_unaligned());
                        for (sum, weights) in sums.iter_mut().zip(weights) {
                            *sum = _mm512_dpbusd_epi32(*sum, four, weights);
                        }
                    }
                }
                w = w.add(LANES * UNROLL);
                for q in &mut q[..T.div_ceil(3)] {
                    *q = q.add(UNROLL);
                }
            }
            let mut scales = [_mm512_setzero_ps(); S];
            for (s, scales) in scales.iter_mut().enumerate() {
                *scales = _mm512_loadu_ps(w.add(s * slabs.step));
            }
            w = w.add(2 * LANES);
            for (t, (acc, sums)) in acc.iter_mut().zip(sums).enumerate() {
                let d = _mm512_set1_ps(*x.d.add(t * x.row + g));
                for ((acc, sum), scale) in acc.iter_mut().zip(sums).zip(scales) {
                    *acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, d), *acc);
                }
            }
        }
        for (t, acc) in acc.into_iter().enumerate() {
            for (s, acc) in acc.into_iter().enumerate() {
                write(to, t, s, acc, _mm512_set1_ps(1.0));
            }
        }
    }
}
