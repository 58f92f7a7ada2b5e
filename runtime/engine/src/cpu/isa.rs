//! Capability tokens. A token can only be built on a CPU that has the instructions, so holding one is the proof that a
//! `#[target_feature]` function may be called.

/// An instruction set family that kernels are written for; the order is the order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust: the specification.
    Scalar,
    /// AArch64 with dot products where present.
    Neon(Neon),
    /// AVX2 with FMA and F16C.
    Avx2(Avx2),
    /// AVX-512 F, BW, VL and VNNI, over AVX2, with a matrix unit (AMX) where present.
    Avx512(Avx512),
}

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Avx2(());

/// Proof that the CPU has AVX-512 F, BW, DQ, VL and VNNI besides AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(clippy::manual_non_exhaustive, reason = "a proof must not be made outside this file, in the crate either")]
pub struct Avx512 {
    /// Whether it also has AVX-512 BF16 (`vdpbf16ps`).
    pub bf16: bool,
    /// Whether it also permutes bytes and multiplies bits by matrices (VBMI and GFNI): all but the first with VNNI do.
    pub bytes: bool,
    /// Whether it also has AMX with bf16 (`tdpbf16ps`), besides AVX-512 BF16, and the system lets this process use it.
    pub amx: bool,
    _proof: (),
}

/// Proof that the code runs on AArch64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(clippy::manual_non_exhaustive, reason = "a proof must not be made outside this file, in the crate either")]
pub struct Neon {
    /// `sdot`.
    pub dotprod: bool,
    /// `smmla`.
    pub i8mm: bool,
    _proof: (),
}

impl Avx2 {
    /// The token, if this CPU has the instructions.
    pub fn detect() -> Option<Avx2> {
        #[cfg(target_arch = "x86_64")]
        if std::is_x86_feature_detected!("avx2")
            && std::is_x86_feature_detected!("fma")
            && std::is_x86_feature_detected!("f16c")
        {
            return Some(Avx2(()));
        }
        None
    }
}

impl Avx512 {
    /// The token, if this CPU has the instructions.
    pub fn detect() -> Option<Avx512> {
        #[cfg(target_arch = "x86_64")]
        if Avx2::detect().is_some()
            && std::is_x86_feature_detected!("avx512f")
            && std::is_x86_feature_detected!("avx512bw")
            && std::is_x86_feature_detected!("avx512dq")
            && std::is_x86_feature_detected!("avx512vl")
            && std::is_x86_feature_detected!("avx512vnni")
        {
            let bf16 = std::is_x86_feature_detected!("avx512bf16");
            let bytes = std::is_x86_feature_detected!("avx512vbmi") && std::is_x86_feature_detected!("gfni");
            return Some(Avx512 { bf16, bytes, amx: bf16 && amx(), _proof: () });
        }
        None
    }

    /// Every AVX-512 CPU has AVX2.
    pub fn avx2(self) -> Avx2 {
        Avx2(())
    }

    /// The tokens for less than this CPU has, up to all of it.
    fn levels(self) -> Vec<Avx512> {
        let vectors = Avx512 { amx: false, ..self };
        let mut levels = vec![Avx512 { bytes: false, ..vectors }, vectors, self];
        levels.dedup();
        levels
    }
}

/// Whether AMX is there. Linux gives a process the tiles' 8 KiB of state for each thread only when it asks, and refuses where a
/// thread has a signal stack that is too small for them; no other system is asked.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn amx() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    use std::sync::OnceLock;
    const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    static AMX: OnceLock<bool> = OnceLock::new();
    *AMX.get_or_init(|| {
        if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & BF16_AND_TILES != BF16_AND_TILES {
            return false;
        }
        // SAFETY: the call takes two numbers and touches no memory of the process.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    })
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn amx() -> bool {
    false
}

impl Neon {
    /// The token, if this is an AArch64 CPU.
    pub fn detect() -> Option<Neon> {
        #[cfg(target_arch = "aarch64")]
        {
            return Some(Neon {
                dotprod: std::arch::is_aarch64_feature_detected!("dotprod"),
                i8mm: std::arch::is_aarch64_feature_detected!("i8mm"),
                _proof: (),
            });
        }
        #[allow(unreachable_code)]
        None
    }
}

impl Neon {
    /// The tokens for less than this CPU has, up to all of it.
    fn levels(self) -> Vec<Neon> {
        let baseline = Neon { dotprod: false, i8mm: false, ..self };
        let mut levels = vec![baseline, Neon { dotprod: self.dotprod, ..baseline }, self];
        levels.dedup();
        levels
    }
}

impl Isa {
    /// The best set this CPU has.
    pub fn detect() -> Isa {
        if let Some(t) = Avx512::detect() {
            return Isa::Avx512(t);
        }
        if let Some(t) = Avx2::detect() {
            return Isa::Avx2(t);
        }
        if let Some(t) = Neon::detect() {
            return Isa::Neon(t);
        }
        Isa::Scalar
    }

    /// Every set this CPU can run, the scalar one first, NEON and AVX-512 with and without what the CPU has beyond them: what
    /// the tests iterate over.
    pub fn available() -> Vec<Isa> {
        let mut all = vec![Isa::Scalar];
        all.extend(Neon::detect().into_iter().flat_map(Neon::levels).map(Isa::Neon));
        all.extend(Avx2::detect().map(Isa::Avx2));
        all.extend(Avx512::detect().into_iter().flat_map(Avx512::levels).map(Isa::Avx512));
        all
    }

    /// Short name for tables: `scalar`, `neon`, `avx2`, `avx512`, `amx`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Neon(_) => "neon",
            Isa::Avx2(_) => "avx2",
            Isa::Avx512(Avx512 { amx: true, .. }) => "amx",
            Isa::Avx512(_) => "avx512",
        }
    }
}
