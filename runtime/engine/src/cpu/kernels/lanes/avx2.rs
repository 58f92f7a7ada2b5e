//! AVX2, with FMA and F16C: one register.

use std::arch::x86_64::*;

/// Eight lanes.
pub(crate) type F32x8 = __m256;

/// Some of eight lanes.
pub(crate) type Mask = __m256;

/// Declares functions of registers.
macro_rules! lanes {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty { $body:expr })*) => { $(
        $(#[$doc])*
        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        pub(crate) fn $name($($arg: $ty),*) -> $ret {
            $body
        }
    )* };
}

lanes! {
    /// Zeros.
    fn zero() -> F32x8 { _mm256_setzero_ps() }
    /// x in all lanes.
    fn splat(x: f32) -> F32x8 { _mm256_set1_ps(x) }
    /// The f16 of these bits in all lanes.
    fn splat_f16(bits: u16) -> F32x8 { _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))) }
    /// from, from + 1, … from + 7.
    fn ramp(from: i32) -> F32x8 { _mm256_cvtepi32_ps(indices(from)) }
    /// a + b.
    fn add(a: F32x8, b: F32x8) -> F32x8 { _mm256_add_ps(a, b) }
    /// a − b.
    fn sub(a: F32x8, b: F32x8) -> F32x8 { _mm256_sub_ps(a, b) }
    /// a·b.
    fn mul(a: F32x8, b: F32x8) -> F32x8 { _mm256_mul_ps(a, b) }
    /// a / b.
    fn div(a: F32x8, b: F32x8) -> F32x8 { _mm256_div_ps(a, b) }
    /// a·b + c, rounded once.
    fn fma(a: F32x8, b: F32x8, c: F32x8) -> F32x8 { _mm256_fmadd_ps(a, b, c) }
    /// c − a·b, rounded once.
    fn fnma(a: F32x8, b: F32x8, c: F32x8) -> F32x8 { _mm256_fnmadd_ps(a, b, c) }
    /// The larger of a and b; a NaN in b stays.
    fn larger(a: F32x8, b: F32x8) -> F32x8 { _mm256_max_ps(a, b) }
    /// The smaller of a and b; a NaN in b stays.
    fn smaller(a: F32x8, b: F32x8) -> F32x8 { _mm256_min_ps(a, b) }
    /// The low eight bits of each lane's representation as those of an exponent, which makes powers of two of them.
    fn low_bits_as_exponent(x: F32x8) -> F32x8 {
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(x)))
    }
    /// first, first + 1, … first + 7 as integers.
    fn indices(first: i32) -> __m256i {
        _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first))
    }
    /// The lanes i with first + i outside `from..to`.
    fn outside(first: i32, from: i32, to: i32) -> Mask {
        _mm256_castsi256_ps(_mm256_or_si256(
            _mm256_cmpgt_epi32(_mm256_set1_epi32(from), indices(first)),
            _mm256_cmpgt_epi32(indices(first), _mm256_set1_epi32(to - 1)),
        ))
    }
    /// y in the lanes of the mask, else x.
    fn replace(mask: Mask, x: F32x8, y: F32x8) -> F32x8 { _mm256_blendv_ps(x, y, mask) }
    /// 0 in the lanes of the mask, else x.
    fn clear(mask: Mask, x: F32x8) -> F32x8 { _mm256_andnot_ps(mask, x) }
    /// The sum of eight lanes, as the tree of [`sum_lanes`](crate::cpu::kernels::vector::sum_lanes).
    fn sum(x: F32x8) -> f32 {{
        let q = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let d = _mm_add_ps(q, _mm_movehl_ps(q, q));
        _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)))
    }}
    /// The largest of eight lanes.
    fn max(x: F32x8) -> f32 {{
        let q = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let d = _mm_max_ps(q, _mm_movehl_ps(q, q));
        _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)))
    }}
}

/// Eight values at `p`.
///
/// # Safety
/// They must be readable; no alignment is needed.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) unsafe fn load(p: *const f32) -> F32x8 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_loadu_ps(p) }
}

/// Eight values to `p`.
///
/// # Safety
/// They must be writable; no alignment is needed.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) unsafe fn store(p: *mut f32, x: F32x8) {
    // SAFETY: the caller's promise.
    unsafe { _mm256_storeu_ps(p, x) }
}

/// The first `n` ≤ 8 values at `p`, and zeros.
///
/// # Safety
/// They must be readable; no alignment is needed.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) unsafe fn load_some(p: *const f32, n: usize) -> F32x8 {
    // SAFETY: the caller's promise; the other lanes are not read.
    unsafe { _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), indices(0))) }
}

/// The first `n` ≤ 8 lanes to `p`.
///
/// # Safety
/// They must be writable; no alignment is needed.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) unsafe fn store_some(p: *mut f32, n: usize, x: F32x8) {
    // SAFETY: the caller's promise; the other lanes are not written.
    unsafe { _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), indices(0)), x) }
}

/// The four sums of four values' eight lanes to `p`, each as a fixed tree.
///
/// # Safety
/// Four floats must be writable at `p`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) unsafe fn store_sums(p: *mut f32, [a, b, c, d]: [F32x8; 4]) {
    let s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    // SAFETY: the caller's promise.
    unsafe { _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps::<1>(s))) }
}

/// Eight consecutive f16 as f32.
///
/// # Safety
/// 16 bytes must be readable at `p`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) unsafe fn load_f16(p: *const u8) -> F32x8 {
    // SAFETY: the caller's promise; the load needs no alignment.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(p.cast()) })
}

/// Eight f32 as consecutive f16, rounded to the nearest.
///
/// # Safety
/// 16 bytes must be writable at `p`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) unsafe fn store_f16(p: *mut u8, x: F32x8) {
    let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
    // SAFETY: the caller's promise; the store needs no alignment.
    unsafe { _mm_storeu_si128(p.cast(), halves) }
}

/// Eight consecutive signed bytes as f32.
///
/// # Safety
/// 8 bytes must be readable at `p`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) unsafe fn load_i8(p: *const u8) -> F32x8 {
    // SAFETY: the caller's promise; the load needs no alignment.
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(unsafe { _mm_loadl_epi64(p.cast()) }))
}

/// Transposes an 8 × 8 tile held in eight values.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(crate) fn transpose(r: [F32x8; 8]) -> [F32x8; 8] {
    let t0 = _mm256_unpacklo_ps(r[0], r[1]);
    let t1 = _mm256_unpackhi_ps(r[0], r[1]);
    let t2 = _mm256_unpacklo_ps(r[2], r[3]);
    let t3 = _mm256_unpackhi_ps(r[2], r[3]);
    let t4 = _mm256_unpacklo_ps(r[4], r[5]);
    let t5 = _mm256_unpackhi_ps(r[4], r[5]);
    let t6 = _mm256_unpacklo_ps(r[6], r[7]);
    let t7 = _mm256_unpackhi_ps(r[6], r[7]);
    let s0 = _mm256_shuffle_ps::<0x44>(t0, t2);
    let s1 = _mm256_shuffle_ps::<0xEE>(t0, t2);
    let s2 = _mm256_shuffle_ps::<0x44>(t1, t3);
    let s3 = _mm256_shuffle_ps::<0xEE>(t1, t3);
    let s4 = _mm256_shuffle_ps::<0x44>(t4, t6);
    let s5 = _mm256_shuffle_ps::<0xEE>(t4, t6);
    let s6 = _mm256_shuffle_ps::<0x44>(t5, t7);
    let s7 = _mm256_shuffle_ps::<0xEE>(t5, t7);
    [
        _mm256_permute2f128_ps::<0x20>(s0, s4),
        _mm256_permute2f128_ps::<0x20>(s1, s5),
        _mm256_permute2f128_ps::<0x20>(s2, s6),
        _mm256_permute2f128_ps::<0x20>(s3, s7),
        _mm256_permute2f128_ps::<0x31>(s0, s4),
        _mm256_permute2f128_ps::<0x31>(s1, s5),
        _mm256_permute2f128_ps::<0x31>(s2, s6),
        _mm256_permute2f128_ps::<0x31>(s3, s7),
    ]
}
