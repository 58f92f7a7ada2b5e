//! AVX2 and FMA. Functions marked `inline(always)` are inlined into those with the features.

use super::super::source::{Source, by_type};
use super::super::{LinearTask, Scratch};
use super::blocks::{self, Backward, Forward, Rows, Slabs, Target, Vectors, scales_at};
use super::{GROUP, Level, Rounded, RoundedBackwardTask, SMALLEST, scale_of_most};
use crate::quant::DType;
use std::arch::x86_64::*;

/// Tokens of a register tile.
const TILE: usize = 4;
/// Steps of a turn of the innermost loop.
const UNROLL: usize = 4;

/// The forward map for a type; to be called with AVX2, FMA and F16C, and a task that has been checked.
pub(super) fn forward_of(dtype: DType) -> Forward {
    by_type!(dtype, forward)
}

/// The backward pass for a type, likewise.
pub(super) fn backward_of(dtype: DType) -> Backward<i16> {
    by_type!(dtype, backward)
}

/// # Safety
/// As for [`blocks::forward`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn forward<S: Source>(task: &LinearTask<'_>, x: &Rounded<'_, i16>, scratch: &mut Scratch) {
    // SAFETY: the caller's promise.
    unsafe { blocks::forward::<S, Avx2>(task, x, scratch) }
}

/// # Safety
/// As for [`blocks::backward`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn backward<S: Source>(task: &RoundedBackwardTask<'_, Rounded<'_, i16>>, scratch: &mut Scratch) {
    // SAFETY: the caller's promise.
    unsafe { blocks::backward::<S, i16, Avx2>(task, scratch) }
}

struct Avx2;

impl Vectors<i16> for Avx2 {
    const SLABS: usize = 1;

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline(never)]
    unsafe fn fix(slab: *mut f32, rows: usize) {
        // SAFETY: rows of 16 values; a pair of rows is read before it is written over.
        unsafe {
            let mut top = [_mm256_setzero_si256(); 2];
            for r in 0..rows {
                for (h, top) in top.iter_mut().enumerate() {
                    *top = _mm256_max_epi32(*top, size_of_bits(_mm256_loadu_ps(slab.add(16 * r + 8 * h))));
                }
            }
            let (mut scales, mut by, mut keep) = ([_mm256_setzero_ps(); 2], [_mm256_setzero_ps(); 2], top);
            for h in 0..2 {
                let most = _mm256_castsi256_ps(top[h]);
                let infinite = _mm256_cmpgt_epi32(top[h], _mm256_set1_epi32(0x7f7f_ffff));
                let tiny = _mm256_cmp_ps::<_CMP_LT_OQ>(most, _mm256_set1_ps(SMALLEST));
                let finite =
                    _mm256_andnot_si256(_mm256_or_si256(infinite, _mm256_castps_si256(tiny)), _mm256_set1_epi32(-1));
                let scale =
                    _mm256_and_ps(_mm256_div_ps(most, _mm256_set1_ps(i16::MOST_WEIGHT)), _mm256_castsi256_ps(finite));
                scales[h] = _mm256_blendv_ps(scale, _mm256_set1_ps(f32::NAN), _mm256_castsi256_ps(infinite));
                by[h] =
                    _mm256_and_ps(_mm256_div_ps(_mm256_set1_ps(i16::MOST_WEIGHT), most), _mm256_castsi256_ps(finite));
                keep[h] = finite;
            }
            let int = |r: usize, h: usize| {
                let v = _mm256_and_ps(_mm256_loadu_ps(slab.add(16 * r + 8 * h)), _mm256_castsi256_ps(keep[h]));
                _mm256_cvtps_epi32(_mm256_mul_ps(v, by[h]))
            };
            let pairs = rows / 2;
            for p in 0..pairs {
                let (a, b) = ([int(2 * p, 0), int(2 * p, 1)], [int(2 * p + 1, 0), int(2 * p + 1, 1)]);
                for h in 0..2 {
                    let pair = _mm256_blend_epi16::<0b1010_1010>(a[h], _mm256_slli_epi32::<16>(b[h]));
                    _mm256_storeu_si256(slab.add(16 * p + 8 * h).cast(), pair);
                }
            }
            let mut p = pairs;
            if rows % 2 == 1 {
                let a = [int(2 * p, 0), int(2 * p, 1)];
                for (h, a) in a.into_iter().enumerate() {
                    let pair = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
                    _mm256_storeu_si256(slab.add(16 * p + 8 * h).cast(), pair);
                }
                p += 1;
            }
            for p in p..rows.div_ceil(GROUP) * GROUP / 2 {
                for h in 0..2 {
                    _mm256_storeu_si256(slab.add(16 * p + 8 * h).cast(), _mm256_setzero_si256());
                }
            }
            for (h, scales) in scales.into_iter().enumerate() {
                _mm256_storeu_ps(slab.add(scales_at(rows.div_ceil(GROUP)) + 8 * h), scales);
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline(never)]
    unsafe fn multiply(slabs: Slabs, x: Rows<i16>, to: Target) {
        for t in (0..x.tokens).step_by(TILE) {
            let (x, to) = (x.from(t, TILE.min(x.tokens - t)), to.from(t));
            // SAFETY: the caller's promise.
            unsafe {
                match x.tokens {
                    1 => tile::<1>(slabs, x, to),
                    2 => tile::<2>(slabs, x, to),
                    3 => tile::<3>(slabs, x, to),
                    _ => tile::<4>(slabs, x, to),
                }
            }
        }
    }
}

/// One group of activations, and its scale.
///
/// # Safety
/// The caller has AVX2; `q` has room for a group.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn round_group<Q: Level>(x: &[f32; GROUP], q: *mut Q) -> f32 {
    // SAFETY: whole groups in both.
    unsafe {
        let mut v = [_mm256_setzero_ps(); GROUP / 8];
        let mut top = _mm256_setzero_si256();
        for (i, v) in v.iter_mut().enumerate() {
            *v = _mm256_loadu_ps(x.as_ptr().add(8 * i));
            top = _mm256_max_epi32(top, size_of_bits(*v));
        }
        let top = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256::<1>(top));
        let top = _mm_max_epi32(top, _mm_unpackhi_epi64(top, top));
        let top = _mm_max_epi32(top, _mm_shuffle_epi32::<1>(top));
        let (scale, inverse) = scale_of_most(f32::from_bits(_mm_cvtsi128_si32(top) as u32), Q::MOST);
        // Nothing of a NaN may be multiplied, not even by zero.
        let keep = _mm256_castsi256_ps(_mm256_set1_epi32(-i32::from(inverse > 0.0)));
        let by = _mm256_set1_ps(inverse);
        let mut int = [_mm256_setzero_si256(); GROUP / 8];
        for (int, v) in int.iter_mut().zip(v) {
            *int = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_and_ps(v, keep), by));
        }
        Q::pack(int, q);
        scale
    }
}

/// How a level's activations lie.
pub trait Pack: Copy {
    /// Packs the rounded activations of a group.
    ///
    /// # Safety
    /// `to` has room for them; the caller has AVX2.
    unsafe fn pack(group: [__m256i; GROUP / 8], to: *mut Self);
}

/// 16 in a vector.
impl Pack for i16 {
    #[inline(always)]
    unsafe fn pack(group: [__m256i; GROUP / 8], to: *mut i16) {
        // SAFETY: the caller's promise.
        unsafe {
            for h in 0..GROUP / 16 {
                let words = _mm256_packs_epi32(group[2 * h], group[2 * h + 1]);
                let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
                _mm256_storeu_si256(to.add(16 * h).cast(), words);
            }
        }
    }
}

/// 32 in a vector, with 128 added.
impl Pack for u8 {
    #[inline(always)]
    unsafe fn pack(group: [__m256i; GROUP / 8], to: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe {
            for h in 0..GROUP / 32 {
                let [a, b, c, d] = [group[4 * h], group[4 * h + 1], group[4 * h + 2], group[4 * h + 3]];
                let bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
                let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
                _mm256_storeu_si256(to.add(32 * h).cast(), _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)));
            }
        }
    }
}

#[inline(always)]
unsafe fn size_of_bits(v: __m256) -> __m256i {
    // SAFETY: register arithmetic.
    unsafe { _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fff_ffff)) }
}

/// T tokens × 16 lanes.
///
/// The inner loop counts to a number the compiler cannot see: unrolled, it is reordered and drowns in spills.
///
/// # Safety
/// As for [`Vectors::multiply`], with T rows of activations and one slab.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<const T: usize>(slab: Slabs, x: Rows<i16>, to: Target) {
    let Rows { q, d, row: wide, .. } = x;
    let mut w = slab.at.cast::<__m256i>();
    // SAFETY: by the contract.
    unsafe {
        let steps = std::hint::black_box(GROUP / 2 / UNROLL);
        let mut acc = [[_mm256_setzero_ps(); 2]; T];
        for g in 0..slab.groups {
            let mut sums = [[_mm256_setzero_si256(); 2]; T];
            let mut x: [*const i32; T] = [std::ptr::null(); T];
            for (t, x) in x.iter_mut().enumerate() {
                *x = q.add((t * wide + g) * GROUP).cast();
            }
            for s in 0..steps {
                for i in 0..UNROLL {
                    let (w0, w1) = (_mm256_loadu_si256(w.add(2 * i)), _mm256_loadu_si256(w.add(2 * i + 1)));
                    for (sums, x) in sums.iter_mut().zip(x) {
                        let pair = _mm256_set1_epi32(x.add(UNROLL * s + i).read_unaligned());
                        sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(w0, pair));
                        sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(w1, pair));
                    }
                    // Keeps the steps apart: reordered, they drown in spills.
                    for sum in sums.as_flattened_mut() {
                        std::arch::asm!("/* {0} */", inout(ymm_reg) * sum, options(nomem, nostack, preserves_flags));
                    }
                }
                w = w.add(2 * UNROLL);
            }
            for (t, acc) in acc.iter_mut().enumerate() {
                let scale = _mm256_broadcast_ss(&*d.add(t * wide + g));
                for (acc, sum) in acc.iter_mut().zip(sums[t]) {
                    *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, *acc);
                }
            }
        }
        let scales = slab.at.add(scales_at(slab.groups));
        let scales = [_mm256_loadu_ps(scales), _mm256_loadu_ps(scales.add(8))];
        for (t, acc) in acc.into_iter().enumerate() {
            to.write(t, acc, scales);
        }
    }
}
