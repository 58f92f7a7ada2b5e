//! Quantized rows as f32 (see [`source`](super::super::source)): bytes to eight f32 at a time, times their scale.

use super::unpack::Block;
use std::arch::x86_64::*;

/// Scales and minima of a unit's first `groups` groups.
///
/// # Safety
/// As for [`Block::scales`].
#[inline(always)]
pub(in super::super) unsafe fn scales<B: Block>(unit: *const u8, groups: usize) -> ([f32; 16], [f32; 16]) {
    let (mut scales, mut minima) = ([0.0; 16], [0.0; 16]);
    // SAFETY: by the contract; 16 floats in each.
    unsafe {
        let (d, m) = B::scales(unit, groups);
        for h in 0..2 {
            _mm256_storeu_ps(scales.as_mut_ptr().add(8 * h), d[h]);
            _mm256_storeu_ps(minima.as_mut_ptr().add(8 * h), m[h]);
        }
    }
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
        let bytes = B::group(unit, g);
        let halves = [_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes)];
        for (h, bytes) in halves.into_iter().enumerate() {
            let at = if B::HALVES { 2 * g + h } else { g };
            let (d, m) = (_mm256_set1_ps(scales[at]), _mm256_set1_ps(minima[at]));
            for (i, bytes) in [bytes, _mm_unpackhi_epi64(bytes, bytes)].into_iter().enumerate() {
                let q = if B::SIGNED { _mm256_cvtepi8_epi32(bytes) } else { _mm256_cvtepu8_epi32(bytes) };
                let q = _mm256_cvtepi32_ps(q);
                let w = if B::SIGNED { _mm256_mul_ps(d, q) } else { _mm256_fmadd_ps(d, q, m) };
                _mm256_storeu_ps(to.add(h * step + 8 * i), w);
            }
        }
    }
}
