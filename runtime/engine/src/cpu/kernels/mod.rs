//! Kernels, one operation a file. Each has a scalar form, which is its specification, and forms by instruction set;
//! all work on plain slices for one thread, and know nothing of tapes or threads.

pub mod activation;
pub(in crate::cpu) mod amx;
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

/// Asks for what follows `bytes` bytes of a stream that are read at `p`: far ahead for the second cache, and a little ahead for the
/// first.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(in crate::cpu) fn ask_ahead(p: *const u8, bytes: usize) {
    const FAR: usize = 4096;
    const NEAR: usize = 1024;
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for at in (0..bytes).step_by(64) {
        prefetch(p.wrapping_add(FAR + at));
        // SAFETY: a hint, which does nothing where the address is none.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(NEAR + at).cast()) };
    }
}

/// Whether kernels that read a stream gain by [`ask_ahead`]: on Intel's processors, whose own requests fall short where there is
/// something to compute for every line. AMD's keep up, and lose by it.
#[cfg(target_arch = "x86_64")]
pub(in crate::cpu) fn asks_ahead() -> bool {
    use std::arch::x86_64::__cpuid;
    use std::sync::LazyLock;
    static ASKS: LazyLock<bool> = LazyLock::new(|| {
        let of = __cpuid(0);
        [of.ebx, of.edx, of.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
    });
    *ASKS
}

/// As on AMD's processors: nobody has measured others.
#[cfg(target_arch = "aarch64")]
pub(in crate::cpu) fn asks_ahead() -> bool {
    false
}

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
