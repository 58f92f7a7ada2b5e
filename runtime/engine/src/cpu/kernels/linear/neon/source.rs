//! Quantized rows as f32 (see [`source`](super::super::source)): bytes to eight f32 at a time, times their scale.

use super::unpack::Block;
use crate::cpu::kernels::lanes::{fma, mul, splat, store};
use std::arch::aarch64::*;

/// Scales and minima of a unit's first `groups` groups.
///
/// # Safety
/// As for [`Block::scales`].
#[inline(always)]
pub(in super::super) unsafe fn scales<B: Block>(unit: *const u8, groups: usize) -> ([f32; 16], [f32; 16]) {
    let (mut scales, mut minima) = ([0.0; 16], [0.0; 16]);
    // SAFETY: by the contract.
    unsafe { B::scales(unit, groups, &mut scales, &mut minima) };
    (scales, minima)
}

/// The 32 values of group `g`.
///
/// # Safety
/// As for [`Source::unpack`](super::super::source::Source::unpack).
#[inline(always)]
pub(in super::super) unsafe fn expand<B: Block>(
    unit: *const u8,
    g: usize,
    scales: &[f32; 16],
    minima: &[f32; 16],
    to: *mut f32,
    step: usize,
) {
    // SAFETY: by the contract.
    unsafe {
        for (h, bytes) in B::group(unit, g).into_iter().enumerate() {
            let at = if B::HALVES { 2 * g + h } else { g };
            let (d, m) = (splat(scales[at]), splat(minima[at]));
            for (i, words) in [vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)].into_iter().enumerate() {
                let q = [vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words))];
                store(to.add(h * step + 8 * i), if B::MINIMA { fma(d, q, m) } else { mul(d, q) });
            }
        }
    }
}
