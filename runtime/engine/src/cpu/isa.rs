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
    /// AVX-512 F, BW, VL and VNNI, over AVX2.
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
            return Some(Avx512 { bf16: std::is_x86_feature_detected!("avx512bf16"), _proof: () });
        }
        None
    }

    /// Every AVX-512 CPU has AVX2.
    pub fn avx2(self) -> Avx2 {
        Avx2(())
    }
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

    /// Every set this CPU can run, the scalar one first, NEON with and without what it has beyond the baseline: what the
    /// tests iterate over.
    pub fn available() -> Vec<Isa> {
        let mut all = vec![Isa::Scalar];
        all.extend(Neon::detect().into_iter().flat_map(Neon::levels).map(Isa::Neon));
        all.extend(Avx2::detect().map(Isa::Avx2));
        all.extend(Avx512::detect().map(Isa::Avx512));
        all
    }

    /// Short name for tables: `scalar`, `neon`, `avx2`, `avx512`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Neon(_) => "neon",
            Isa::Avx2(_) => "avx2",
            Isa::Avx512(_) => "avx512",
        }
    }
}
