//! NEON: two registers, the first four lanes and the last.

use crate::cpu::kernels::vector::neon as halves;
use std::arch::aarch64::*;

/// Eight lanes.
pub(crate) type F32x8 = [float32x4_t; 2];

/// Some of eight lanes.
pub(crate) type Mask = [uint32x4_t; 2];

/// Declares functions of registers.
macro_rules! lanes {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty { $body:expr })*) => { $(
        $(#[$doc])*
        #[inline(always)]
        pub(crate) fn $name($($arg: $ty),*) -> $ret {
            // SAFETY: registers only, and NEON is part of the target.
            unsafe { $body }
        }
    )* };
}

lanes! {
    /// Zeros.
    fn zero() -> F32x8 { [vdupq_n_f32(0.0); 2] }
    /// x in all lanes.
    fn splat(x: f32) -> F32x8 { [vdupq_n_f32(x); 2] }
    /// The f16 of these bits in all lanes.
    fn splat_f16(bits: u16) -> F32x8 { [halves::widen(vdup_n_u16(bits)); 2] }
    /// from, from + 1, … from + 7.
    fn ramp(from: i32) -> F32x8 { indices(from).map(|i| vcvtq_f32_s32(i)) }
    /// a + b.
    fn add(a: F32x8, b: F32x8) -> F32x8 { [vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1])] }
    /// a − b.
    fn sub(a: F32x8, b: F32x8) -> F32x8 { [vsubq_f32(a[0], b[0]), vsubq_f32(a[1], b[1])] }
    /// a·b.
    fn mul(a: F32x8, b: F32x8) -> F32x8 { [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1])] }
    /// a / b.
    fn div(a: F32x8, b: F32x8) -> F32x8 { [vdivq_f32(a[0], b[0]), vdivq_f32(a[1], b[1])] }
    /// a·b + c, rounded once.
    fn fma(a: F32x8, b: F32x8, c: F32x8) -> F32x8 { [vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])] }
    /// c − a·b, rounded once.
    fn fnma(a: F32x8, b: F32x8, c: F32x8) -> F32x8 { [vfmsq_f32(c[0], a[0], b[0]), vfmsq_f32(c[1], a[1], b[1])] }
    /// The larger of a and b; a NaN stays.
    fn larger(a: F32x8, b: F32x8) -> F32x8 { [vmaxq_f32(a[0], b[0]), vmaxq_f32(a[1], b[1])] }
    /// The smaller of a and b; a NaN stays.
    fn smaller(a: F32x8, b: F32x8) -> F32x8 { [vminq_f32(a[0], b[0]), vminq_f32(a[1], b[1])] }
    /// The low eight bits of each lane's representation as those of an exponent, which makes powers of two of them.
    fn low_bits_as_exponent(x: F32x8) -> F32x8 {
        x.map(|x| vreinterpretq_f32_u32(vshlq_n_u32::<23>(vreinterpretq_u32_f32(x))))
    }
    /// first, first + 1, … first + 7 as integers.
    fn indices(first: i32) -> [int32x4_t; 2] {{
        let i = vaddq_s32(vld1q_s32([0, 1, 2, 3].as_ptr()), vdupq_n_s32(first));
        [i, vaddq_s32(i, vdupq_n_s32(4))]
    }}
    /// The lanes i with first + i outside `from..to`.
    fn outside(first: i32, from: i32, to: i32) -> Mask {
        indices(first).map(|i| vorrq_u32(vcltq_s32(i, vdupq_n_s32(from)), vcgeq_s32(i, vdupq_n_s32(to))))
    }
    /// y in the lanes of the mask, else x.
    fn replace(mask: Mask, x: F32x8, y: F32x8) -> F32x8 {
        [vbslq_f32(mask[0], y[0], x[0]), vbslq_f32(mask[1], y[1], x[1])]
    }
    /// 0 in the lanes of the mask, else x.
    fn clear(mask: Mask, x: F32x8) -> F32x8 {
        [0, 1].map(|i| vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x[i]), mask[i])))
    }
    /// The sum of eight lanes, as the tree of [`sum_lanes`](crate::cpu::kernels::vector::sum_lanes).
    fn sum(x: F32x8) -> f32 {{
        let q = vaddq_f32(x[0], x[1]);
        vpadds_f32(vadd_f32(vget_low_f32(q), vget_high_f32(q)))
    }}
    /// The largest of eight lanes.
    fn max(x: F32x8) -> f32 { vmaxvq_f32(vmaxq_f32(x[0], x[1])) }
    /// Transposes a 4 × 4 tile.
    fn transpose_4(r: [float32x4_t; 4]) -> [float32x4_t; 4] {{
        let wide = |x| vreinterpretq_f64_f32(x);
        let (even, odd) = (vtrn1q_f32(r[0], r[1]), vtrn2q_f32(r[0], r[1]));
        let (even_2, odd_2) = (vtrn1q_f32(r[2], r[3]), vtrn2q_f32(r[2], r[3]));
        [
            vreinterpretq_f32_f64(vtrn1q_f64(wide(even), wide(even_2))),
            vreinterpretq_f32_f64(vtrn1q_f64(wide(odd), wide(odd_2))),
            vreinterpretq_f32_f64(vtrn2q_f64(wide(even), wide(even_2))),
            vreinterpretq_f32_f64(vtrn2q_f64(wide(odd), wide(odd_2))),
        ]
    }}
}

/// Transposes an 8 × 8 tile held in eight values.
#[inline(always)]
pub(crate) fn transpose(r: [F32x8; 8]) -> [F32x8; 8] {
    let [a, b, c, d] = transpose_4([r[0][0], r[1][0], r[2][0], r[3][0]]);
    let [e, f, g, h] = transpose_4([r[0][1], r[1][1], r[2][1], r[3][1]]);
    let [i, j, k, l] = transpose_4([r[4][0], r[5][0], r[6][0], r[7][0]]);
    let [m, n, o, p] = transpose_4([r[4][1], r[5][1], r[6][1], r[7][1]]);
    [[a, i], [b, j], [c, k], [d, l], [e, m], [f, n], [g, o], [h, p]]
}

/// Eight values at `p`.
///
/// # Safety
/// They must be readable; no more alignment is needed than theirs.
#[inline(always)]
pub(crate) unsafe fn load(p: *const f32) -> F32x8 {
    // SAFETY: the caller's promise.
    unsafe { [vld1q_f32(p), vld1q_f32(p.add(4))] }
}

/// Eight values to `p`.
///
/// # Safety
/// They must be writable; no more alignment is needed than theirs.
#[inline(always)]
pub(crate) unsafe fn store(p: *mut f32, x: F32x8) {
    // SAFETY: the caller's promise.
    unsafe {
        vst1q_f32(p, x[0]);
        vst1q_f32(p.add(4), x[1]);
    }
}

/// The first `n` ≤ 8 values at `p`, and zeros.
///
/// # Safety
/// They must be readable.
#[inline(always)]
pub(crate) unsafe fn load_some(p: *const f32, n: usize) -> F32x8 {
    let mut lanes = [0.0; 8];
    // SAFETY: the caller's promise, and eight lanes at least.
    unsafe {
        p.copy_to_nonoverlapping(lanes.as_mut_ptr(), n);
        load(lanes.as_ptr())
    }
}

/// The first `n` ≤ 8 lanes to `p`.
///
/// # Safety
/// They must be writable.
#[inline(always)]
pub(crate) unsafe fn store_some(p: *mut f32, n: usize, x: F32x8) {
    let mut lanes = [0.0; 8];
    // SAFETY: the caller's promise, and eight lanes at least.
    unsafe {
        store(lanes.as_mut_ptr(), x);
        p.copy_from_nonoverlapping(lanes.as_ptr(), n);
    }
}

/// The four sums of four values' eight lanes to `p`, each as a fixed tree.
///
/// # Safety
/// Four floats must be writable at `p`.
#[inline(always)]
pub(crate) unsafe fn store_sums(p: *mut f32, [a, b, c, d]: [F32x8; 4]) {
    // SAFETY: the caller's promise.
    unsafe {
        let low = vpaddq_f32(vpaddq_f32(a[0], b[0]), vpaddq_f32(c[0], d[0]));
        let high = vpaddq_f32(vpaddq_f32(a[1], b[1]), vpaddq_f32(c[1], d[1]));
        vst1q_f32(p, vaddq_f32(low, high));
    }
}

/// Eight consecutive f16 as f32.
///
/// # Safety
/// 16 bytes must be readable at `p`.
#[inline(always)]
pub(crate) unsafe fn load_f16(p: *const u8) -> F32x8 {
    // SAFETY: the caller's promise.
    unsafe { halves::load_f16(p) }
}

/// Eight f32 as consecutive f16, rounded to the nearest.
///
/// # Safety
/// 16 bytes must be writable at `p`.
#[inline(always)]
pub(crate) unsafe fn store_f16(p: *mut u8, x: F32x8) {
    // SAFETY: the caller's promise; bytes need no alignment.
    unsafe {
        let [low, high] = x.map(|x| vreinterpret_u8_f16(vcvt_f16_f32(x)));
        vst1q_u8(p, vcombine_u8(low, high));
    }
}

/// Eight consecutive signed bytes as f32.
///
/// # Safety
/// 8 bytes must be readable at `p`.
#[inline(always)]
pub(crate) unsafe fn load_i8(p: *const u8) -> F32x8 {
    // SAFETY: the caller's promise; bytes need no alignment.
    unsafe {
        let x = vmovl_s8(vld1_s8(p.cast()));
        [vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(x)))]
    }
}
