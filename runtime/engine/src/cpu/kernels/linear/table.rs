//! All linear kernels as data: what `kinglet bench kernels` lists, and what the dispatcher chooses from.

use super::{LinearTask, Scratch, dense, scalar};
use crate::cpu::isa::Isa;
use crate::quant::DType;

/// What a kernel is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A few tokens, rows read once: decoding.
    Matvec,
    /// Many tokens, rows unpacked once for all: prefill.
    Tile,
}

/// A kernel of the table.
#[derive(Clone, Copy)]
pub struct KernelInfo {
    /// `{op}_{type}_{isa}`, such as `matvec_q4_1_avx2`.
    pub name: &'static str,
    /// Type of the weights.
    pub dtype: DType,
    /// The instruction set's [`Isa::name`].
    pub isa: &'static str,
    /// What it is for.
    pub shape: Shape,
    /// Runs a task that has been checked; does nothing if the token is of another instruction set.
    pub(super) run: fn(Isa, &LinearTask<'_>, &mut Scratch),
}

impl std::fmt::Debug for KernelInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl KernelInfo {
    /// Runs `task` with this kernel, whatever [`pick`] would choose: for measuring and testing. Fails as
    /// [`linear`](super::linear) does, or if the kernel is for another type or instruction set.
    pub fn run(&self, isa: Isa, task: &LinearTask<'_>, scratch: &mut Scratch) -> crate::Result<()> {
        super::check(task)?;
        if isa.name() != self.isa || task.dtype != self.dtype {
            return Err(crate::Error::argument(format!("{} cannot run {} on {}", self.name, task.dtype, isa.name())));
        }
        if !task.rows.is_empty() && task.x.tokens > 0 {
            (self.run)(isa, task, scratch);
        }
        Ok(())
    }
}

macro_rules! scalar_kernels {
    ($($dtype:ident $name:literal),*) => { [$(KernelInfo {
        name: concat!("matvec_", $name, "_scalar"), dtype: DType::$dtype, isa: "scalar", shape: Shape::Matvec,
        run: |_, task, scratch| match super::needs_q8(DType::$dtype) {
            true => scalar::matvec(task, scratch),
            false => dense::scalar(task),
        },
    }),*] };
}

const SCALAR: [KernelInfo; 17] = scalar_kernels!(
    F32 "f32", F16 "f16", BF16 "bf16", Q4_0 "q4_0", Q4_1 "q4_1", Q5_0 "q5_0", Q5_1 "q5_1", Q8_0 "q8_0", Q2_K "q2_k",
    Q3_K "q3_k", Q4_K "q4_k", Q5_K "q5_k", Q6_K "q6_k", Q8_K "q8_k", IQ4_NL "iq4_nl", IQ4_XS "iq4_xs", MXFP4 "mxfp4"
);

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::{avx2, avx2::unpack, dense};
    use super::{DType, Isa, KernelInfo, Shape};

    macro_rules! quantized {
        ($($dtype:ident $block:ident $name:literal),*) => { [$(
            KernelInfo {
                name: concat!("matvec_", $name, "_avx2"), dtype: DType::$dtype, isa: "avx2", shape: Shape::Matvec,
                run: |isa, task, _| if let Isa::Avx2(token) = isa { avx2::run_matvec::<unpack::$block>(token, task) },
            },
            KernelInfo {
                name: concat!("tile_", $name, "_avx2"), dtype: DType::$dtype, isa: "avx2", shape: Shape::Tile,
                run: |isa, task, scratch| if let Isa::Avx2(token) = isa {
                    avx2::run_tile::<unpack::$block>(token, task, scratch)
                },
            },
        )*] };
    }
    pub(super) const AVX2: [KernelInfo; 28] = quantized!(
        Q4_0 Q4_0 "q4_0", Q4_1 Q4_1 "q4_1", Q5_0 Q5_0 "q5_0", Q5_1 Q5_1 "q5_1", Q8_0 Q8_0 "q8_0", Q2_K Q2K "q2_k",
        Q3_K Q3K "q3_k", Q4_K Q4K "q4_k", Q5_K Q5K "q5_k", Q6_K Q6K "q6_k", Q8_K Q8K "q8_k", IQ4_NL Iq4Nl "iq4_nl",
        IQ4_XS Iq4Xs "iq4_xs", MXFP4 Mxfp4 "mxfp4"
    );

    macro_rules! dense {
        ($($dtype:ident $dense:ident $name:literal),*) => { [$(
            KernelInfo {
                name: concat!("matvec_", $name, "_avx2"), dtype: DType::$dtype, isa: "avx2", shape: Shape::Matvec,
                run: |isa, task, _| if let Isa::Avx2(token) = isa { dense::avx2::run::<dense::avx2::$dense>(token, task) },
            },
        )*] };
    }
    pub(super) const AVX2_DENSE: [KernelInfo; 3] = dense!(F32 F32 "f32", F16 F16 "f16", BF16 Bf16 "bf16");
}

/// Every kernel built into this binary, by instruction set.
pub static KERNELS: &[&[KernelInfo]] = &[
    &SCALAR,
    #[cfg(target_arch = "x86_64")]
    &x86::AVX2,
    #[cfg(target_arch = "x86_64")]
    &x86::AVX2_DENSE,
];

/// From how many tokens on a tile is faster than rows one by one.
const TILE_FROM: usize = 4;

/// The kernel that [`linear`](super::linear) runs: of the CPU's best instruction set, by the number of tokens.
pub fn pick(isa: Isa, dtype: DType, tokens: usize) -> &'static KernelInfo {
    let shape = if tokens >= TILE_FROM { Shape::Tile } else { Shape::Matvec };
    let of = |name: &str, shape: Shape| {
        KERNELS.iter().copied().flatten().find(|k| k.isa == name && k.dtype == dtype && k.shape == shape)
    };
    of(isa.name(), shape)
        .or_else(|| of(isa.name(), Shape::Matvec))
        .or_else(|| of("scalar", Shape::Matvec))
        .unwrap_or(&SCALAR[0])
}
