//! Integer products, which differ between processors: `sdot` where there is one, and its equal of four instructions from the
//! baseline. Both are exact, so results have the same bits on all of them.
//!
//! The intrinsics of `sdot` and `smmla` are unstable (rust-lang/rust #117224, #117223); the instructions stand in assembly.

use std::arch::aarch64::*;
use std::arch::asm;

/// `Σ i8 · i8` over 4 bytes, added to 4 lanes.
pub(crate) trait Dot {
    /// # Safety
    /// The caller has the instructions; no two neighbours of the products are both 2¹⁴ (activations stop at ±127).
    unsafe fn dot(sum: int32x4_t, w: int8x16_t, q: int8x16_t) -> int32x4_t;

    /// As `dot`, with the same four bytes of `q` in all lanes: its `LANE`th.
    ///
    /// # Safety
    /// As for `dot`.
    unsafe fn dot_lane<const LANE: i32>(sum: int32x4_t, w: int8x16_t, q: int8x16_t) -> int32x4_t;
}

/// The baseline: products in 16 bits, of which two are added there and two in 32.
pub(crate) struct Widening;

impl Dot for Widening {
    #[inline(always)]
    unsafe fn dot(sum: int32x4_t, w: int8x16_t, q: int8x16_t) -> int32x4_t {
        // SAFETY: NEON is part of the target.
        unsafe {
            let low = vmull_s8(vget_low_s8(w), vget_low_s8(q));
            vpadalq_s16(sum, vpaddq_s16(low, vmull_high_s8(w, q)))
        }
    }

    #[inline(always)]
    unsafe fn dot_lane<const LANE: i32>(sum: int32x4_t, w: int8x16_t, q: int8x16_t) -> int32x4_t {
        // SAFETY: by the contract; NEON is part of the target.
        unsafe { Self::dot(sum, w, vreinterpretq_s8_s32(vdupq_laneq_s32::<LANE>(vreinterpretq_s32_s8(q)))) }
    }
}

/// Armv8.2's dot products.
pub(crate) struct Sdot;

impl Dot for Sdot {
    #[inline(always)]
    unsafe fn dot(sum: int32x4_t, w: int8x16_t, q: int8x16_t) -> int32x4_t {
        // SAFETY: by the contract.
        unsafe { sdot(sum, w, q) }
    }

    #[inline(always)]
    unsafe fn dot_lane<const LANE: i32>(sum: int32x4_t, w: int8x16_t, q: int8x16_t) -> int32x4_t {
        // SAFETY: by the contract.
        unsafe { sdot_lane::<LANE>(sum, w, q) }
    }
}

#[target_feature(enable = "dotprod")]
#[inline]
fn sdot(mut sum: int32x4_t, w: int8x16_t, q: int8x16_t) -> int32x4_t {
    // SAFETY: registers only; the feature is enabled.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sum, in(vreg) w, in(vreg) q,
             options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

#[target_feature(enable = "dotprod")]
#[inline]
fn sdot_lane<const LANE: i32>(mut sum: int32x4_t, w: int8x16_t, q: int8x16_t) -> int32x4_t {
    // SAFETY: registers only; the feature is enabled.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]", inout(vreg) sum, in(vreg) w, in(vreg) q, const LANE,
             options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// Two rows of eight bytes times two tokens of eight: `[r0·t0, r0·t1, r1·t0, r1·t1]`, added to `sum`.
#[target_feature(enable = "i8mm")]
#[inline]
pub(super) fn smmla(mut sum: int32x4_t, rows: int8x16_t, tokens: int8x16_t) -> int32x4_t {
    // SAFETY: registers only; the feature is enabled.
    unsafe {
        asm!("smmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sum, in(vreg) rows, in(vreg) tokens,
             options(pure, nomem, nostack, preserves_flags));
    }
    sum
}
