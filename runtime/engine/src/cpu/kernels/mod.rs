//! Kernels, one operation a file. Each has a scalar form, which is its specification, and forms by instruction set;
//! all work on plain slices for one thread, and know nothing of tapes or threads.

pub mod activation;
pub mod attention;
pub mod dropout;
pub mod embed;
pub mod gemm;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod lanes;
pub mod linear;
pub mod lora;
pub mod norm;
pub mod rope;
pub mod vector;

/// Asks for the line at `p`, which may be any address.
#[inline(always)]
fn prefetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which does nothing where the address is none.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
