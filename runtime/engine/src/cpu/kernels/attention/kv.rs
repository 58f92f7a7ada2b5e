//! One head's vector of keys or values in the cache: how it is written and how it is unpacked.
//!
//! F32 and F16 are dense. Q8_0 is ggml's: per 32 elements an f16 scale d = max|x| / 127 and 32 signed bytes
//! round(x / d), 34 bytes. Writing happens once per token, so only F16 has an AVX2 form; unpacking is hot and has one
//! for every type.

use super::super::vector::{f16_to_f32, has_avx2};
use crate::cpu::isa::Isa;
use crate::quant::DType;

/// Bytes of one head's vector, or `None` where the cache cannot hold this type or width.
pub fn kv_row_bytes(dtype: DType, head_dim: usize) -> Option<usize> {
    match dtype {
        DType::F32 | DType::F16 | DType::Q8_0 => dtype.row_bytes(head_dim),
        _ => None,
    }
}

/// Writes one head's vector `src` to `dst` in the cache's type. Types the cache cannot hold write nothing.
///
/// # Safety
/// [`kv_row_bytes`] bytes must be writable at `dst`, with no other access meanwhile. No alignment is needed.
pub unsafe fn store_kv(isa: Isa, dtype: DType, src: &[f32], dst: *mut u8) {
    debug_assert!(kv_row_bytes(dtype, src.len()).is_some());
    // SAFETY: every write below stays within `kv_row_bytes(dtype, src.len())` bytes of `dst`.
    unsafe {
        match dtype {
            DType::F32 => std::ptr::copy_nonoverlapping(src.as_ptr().cast::<u8>(), dst, size_of_val(src)),
            DType::F16 => {
                #[cfg(target_arch = "x86_64")]
                if has_avx2(isa) {
                    return avx2::store_f16(src, dst);
                }
                let _ = (isa, has_avx2);
                for (i, &x) in src.iter().enumerate() {
                    dst.add(2 * i).cast::<[u8; 2]>().write(half::f16::from_f32(x).to_le_bytes());
                }
            }
            DType::Q8_0 => {
                for (b, block) in src.as_chunks::<32>().0.iter().enumerate() {
                    dst.add(34 * b).cast::<[u8; 34]>().write(q8_0_block(block));
                }
            }
            _ => {}
        }
    }
}

/// One block of Q8_0, rounded as ggml's `quantize_row_q8_0_ref` does (halves away from zero).
fn q8_0_block(x: &[f32; 32]) -> [u8; 34] {
    let most = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let d = most / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let mut out = [0; 34];
    out[..2].copy_from_slice(&half::f16::from_f32(d).to_le_bytes());
    for (o, x) in out[2..].iter_mut().zip(x) {
        *o = (x * inverse).round() as i8 as u8;
    }
    out
}

/// Unpacks one head's vector into `dst`.
///
/// # Safety
/// `kv_row_bytes(dtype, dst.len())` bytes must be readable at `src`.
#[inline(always)]
pub(super) unsafe fn unpack(dtype: DType, src: *const u8, dst: &mut [f32]) {
    // SAFETY: every read below stays within `kv_row_bytes(dtype, dst.len())` bytes of `src`.
    unsafe {
        match dtype {
            DType::F32 => std::ptr::copy_nonoverlapping(src, dst.as_mut_ptr().cast::<u8>(), size_of_val(dst)),
            DType::F16 => {
                #[cfg(target_arch = "aarch64")]
                let (src, dst) = {
                    let (eights, tail) = dst.as_chunks_mut::<8>();
                    for (i, x) in eights.iter_mut().enumerate() {
                        let [low, high] = super::super::vector::neon::load_f16(src.add(16 * i));
                        std::arch::aarch64::vst1q_f32(x.as_mut_ptr(), low);
                        std::arch::aarch64::vst1q_f32(x.as_mut_ptr().add(4), high);
                    }
                    (src.add(16 * eights.len()), tail)
                };
                for (i, x) in dst.iter_mut().enumerate() {
                    *x = f16_to_f32(u16::from_le_bytes(src.add(2 * i).cast::<[u8; 2]>().read()));
                }
            }
            DType::Q8_0 => {
                for (b, block) in dst.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    let packed = src.add(34 * b).cast::<[u8; 34]>().read();
                    let d = f16_to_f32(u16::from_le_bytes([packed[0], packed[1]]));
                    for (x, q) in block.iter_mut().zip(&packed[2..]) {
                        *x = d * f32::from(*q as i8);
                    }
                }
            }
            _ => dst.fill(0.0),
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2 {
    use super::super::super::vector::avx2::load_f16;
    use crate::quant::DType;
    use std::arch::x86_64::*;

    /// See [`super::store_kv`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn store_f16(src: &[f32], dst: *mut u8) {
        let (x8, tail) = src.as_chunks::<8>();
        // SAFETY: 16 bytes per eight elements and 2 per element of the tail, all within the vector at `dst`.
        unsafe {
            for (i, x) in x8.iter().enumerate() {
                let h = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(x.as_ptr()));
                _mm_storeu_si128(dst.add(16 * i).cast(), h);
            }
            for (i, &x) in tail.iter().enumerate() {
                dst.add(16 * x8.len() + 2 * i).cast::<[u8; 2]>().write(half::f16::from_f32(x).to_le_bytes());
            }
        }
    }

    /// Unpacks the vector at `src`, `head_dim` wide, and hands over eight elements at a time as
    /// `put(d, elements d .. d + 8)`; elements beyond `head_dim` are 0, up to the next multiple of 8.
    ///
    /// # Safety
    /// `kv_row_bytes(dtype, head_dim)` bytes must be readable at `src`.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    pub unsafe fn unpack(dtype: DType, src: *const u8, head_dim: usize, mut put: impl FnMut(usize, __m256)) {
        let whole = head_dim & !7;
        // SAFETY: each load reads eight elements below `whole`; the tail is read element by element.
        unsafe {
            match dtype {
                DType::F32 => {
                    for d in (0..whole).step_by(8) {
                        put(d, _mm256_loadu_ps(src.cast::<f32>().add(d)));
                    }
                }
                DType::F16 => {
                    for d in (0..whole).step_by(8) {
                        put(d, load_f16(src.add(2 * d)));
                    }
                }
                _ => {
                    for d in (0..whole).step_by(32) {
                        let block = src.add(d / 32 * 34);
                        let bits = i32::from(u16::from_le_bytes(block.cast::<[u8; 2]>().read()));
                        let scale = _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
                        for i in (0..32).step_by(8) {
                            let q = _mm_loadl_epi64(block.add(2 + i).cast());
                            put(d + i, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q))));
                        }
                    }
                }
            }
            if whole < head_dim {
                let mut last = [0.0f32; 8];
                let width = dtype.block_bytes();
                super::unpack(dtype, src.add(whole * width), &mut last[..head_dim - whole]);
                put(whole, _mm256_loadu_ps(last.as_ptr()));
            }
        }
    }
}
