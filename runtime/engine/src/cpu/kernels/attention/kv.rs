//! One head's vector of keys or values in the cache: how it is written and how it is unpacked.
//!
//! F32 and F16 are dense. Q8_0 is ggml's: per 32 elements an f16 scale d = max|x| / 127 and 32 signed bytes
//! round(x / d), 34 bytes. Writing happens once per token, so only F16 has a form in lanes; unpacking is hot and has one
//! for every type.

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::super::lanes::{self, F32x8};
use super::super::vector::f16_to_f32;
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
                #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
                if lanes::runs(isa) {
                    return store_f16(src, dst);
                }
                let _ = isa;
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

/// See [`store_kv`].
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
unsafe fn store_f16(src: &[f32], dst: *mut u8) {
    let (x8, tail) = src.as_chunks::<8>();
    // SAFETY: 16 bytes per eight elements and 2 per element of the tail, all within the vector at `dst`.
    unsafe {
        for (i, x) in x8.iter().enumerate() {
            lanes::store_f16(dst.add(16 * i), lanes::load(x.as_ptr()));
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
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
#[inline]
pub(super) unsafe fn unpack_eights(dtype: DType, src: *const u8, head_dim: usize, mut put: impl FnMut(usize, F32x8)) {
    let whole = head_dim & !7;
    // SAFETY: each load reads eight elements below `whole`; the tail is read element by element.
    unsafe {
        match dtype {
            DType::F32 => {
                for d in (0..whole).step_by(8) {
                    put(d, lanes::load(src.cast::<f32>().add(d)));
                }
            }
            DType::F16 => {
                for d in (0..whole).step_by(8) {
                    put(d, lanes::load_f16(src.add(2 * d)));
                }
            }
            _ => {
                for d in (0..whole).step_by(32) {
                    let block = src.add(d / 32 * 34);
                    let scale = lanes::splat_f16(u16::from_le_bytes(block.cast::<[u8; 2]>().read()));
                    for i in (0..32).step_by(8) {
                        put(d + i, lanes::mul(scale, lanes::load_i8(block.add(2 + i))));
                    }
                }
            }
        }
        if whole < head_dim {
            let mut last = [0.0f32; 8];
            let width = dtype.block_bytes();
            unpack(dtype, src.add(whole * width), &mut last[..head_dim - whole]);
            put(whole, lanes::load(last.as_ptr()));
        }
    }
}
