//! All linear kernels as data: what `kinglet bench kernels` lists, and what the dispatcher chooses from.

use super::{Form, LinearTask, Scratch, dense, needs_tiles, scalar};
use crate::cpu::isa::Isa;
use crate::quant::DType;
use std::sync::LazyLock;

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
    /// What it reads of the activations.
    pub reads: Form,
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
        super::check_sizes(task, self.reads)?;
        let runs =
            ISAS.iter().any(|(name, runs)| *name == isa.name() && (runs.contains(&self.isa) || self.isa == "scalar"));
        if !runs || task.dtype != self.dtype {
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
        reads: if super::needs_q8(DType::$dtype) { Form::Q8 } else { Form::F32 },
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

/// Applies an instruction set's macro to all types that are read as groups: the type, its reader, its name.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! each_quantized {
    ($apply:ident) => {
        $apply!(
            Q4_0 Q4_0 "q4_0", Q4_1 Q4_1 "q4_1", Q5_0 Q5_0 "q5_0", Q5_1 Q5_1 "q5_1", Q8_0 Q8_0 "q8_0", Q2_K Q2K "q2_k",
            Q3_K Q3K "q3_k", Q4_K Q4K "q4_k", Q5_K Q5K "q5_k", Q6_K Q6K "q6_k", Q8_K Q8K "q8_k", IQ4_NL Iq4Nl "iq4_nl",
            IQ4_XS Iq4Xs "iq4_xs", MXFP4 Mxfp4 "mxfp4"
        )
    };
}

/// The same for the types that are numbers one by one.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! each_dense {
    ($apply:ident) => {
        $apply!(F32 F32 "f32", F16 F16 "f16", BF16 Bf16 "bf16")
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::{amx, avx2, avx2::unpack, avx512, dense};
    use super::{DType, Form, Isa, KernelInfo, Shape};
    use crate::cpu::isa::Avx2;

    fn avx2_of(isa: Isa) -> Option<Avx2> {
        match isa {
            Isa::Avx2(token) => Some(token),
            Isa::Avx512(token) => Some(token.avx2()),
            _ => None,
        }
    }

    macro_rules! quantized {
        ($($dtype:ident $block:ident $name:literal),*) => { [$(
            KernelInfo {
                name: concat!("matvec_", $name, "_avx2"), dtype: DType::$dtype, isa: "avx2", shape: Shape::Matvec, reads: Form::Q8,
                run: |isa, task, _| if let Some(token) = avx2_of(isa) { avx2::run_matvec::<unpack::$block>(token, task) },
            },
            KernelInfo {
                name: concat!("tile_", $name, "_avx2"), dtype: DType::$dtype, isa: "avx2", shape: Shape::Tile, reads: Form::Q8,
                run: |isa, task, scratch| if let Some(token) = avx2_of(isa) {
                    avx2::run_tile::<unpack::$block>(token, task, scratch)
                },
            },
            KernelInfo {
                name: concat!("matvec_", $name, "_avx512"), dtype: DType::$dtype, isa: "avx512", shape: Shape::Matvec, reads: Form::Q8,
                run: |isa, task, scratch| if let Isa::Avx512(token) = isa {
                    avx512::run_matvec::<unpack::$block>(token, task, scratch)
                },
            },
            KernelInfo {
                name: concat!("tile_", $name, "_avx512"), dtype: DType::$dtype, isa: "avx512", shape: Shape::Tile, reads: Form::Q8,
                run: |isa, task, scratch| if let Isa::Avx512(token) = isa {
                    avx512::run_tile::<unpack::$block>(token, task, scratch)
                },
            },
            KernelInfo {
                name: concat!("tile_", $name, "_amx"), dtype: DType::$dtype, isa: "amx", shape: Shape::Tile, reads: Form::Tiled,
                run: |isa, task, scratch| if let Isa::Avx512(token) = isa {
                    amx::run_tile::<unpack::$block>(token, task, scratch)
                },
            },
        )*] };
    }
    pub(super) const QUANTIZED: [KernelInfo; 70] = each_quantized!(quantized);

    macro_rules! dense {
        ($($dtype:ident $dense:ident $name:literal),*) => { [$(
            KernelInfo {
                name: concat!("matvec_", $name, "_avx2"), dtype: DType::$dtype, isa: "avx2", shape: Shape::Matvec, reads: Form::F32,
                run: |isa, task, _| if let Some(token) = avx2_of(isa) { dense::avx2::run::<dense::avx2::$dense>(token, task) },
            },
        )*] };
    }
    pub(super) const DENSE: [KernelInfo; 3] = each_dense!(dense);
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::super::{dense, neon, neon::unpack};
    use super::{DType, Form, Isa, KernelInfo, Shape};

    macro_rules! quantized {
        ($($dtype:ident $block:ident $name:literal),*) => { [$(
            KernelInfo {
                name: concat!("matvec_", $name, "_neon"), dtype: DType::$dtype, isa: "neon", shape: Shape::Matvec, reads: Form::Q8,
                run: |isa, task, _| if let Isa::Neon(token) = isa { neon::run_matvec::<unpack::$block>(token, task) },
            },
            KernelInfo {
                name: concat!("tile_", $name, "_neon"), dtype: DType::$dtype, isa: "neon", shape: Shape::Tile, reads: Form::Q8,
                run: |isa, task, scratch| if let Isa::Neon(token) = isa {
                    neon::run_tile::<unpack::$block>(token, task, scratch)
                },
            },
        )*] };
    }
    pub(super) const QUANTIZED: [KernelInfo; 28] = each_quantized!(quantized);

    macro_rules! dense {
        ($($dtype:ident $dense:ident $name:literal),*) => { [$(
            KernelInfo {
                name: concat!("matvec_", $name, "_neon"), dtype: DType::$dtype, isa: "neon", shape: Shape::Matvec, reads: Form::F32,
                run: |isa, task, _| if let Isa::Neon(token) = isa { dense::neon::run::<dense::neon::$dense>(token, task) },
            },
        )*] };
    }
    pub(super) const DENSE: [KernelInfo; 3] = each_dense!(dense);
}

/// Every kernel built into this binary.
pub static KERNELS: &[&[KernelInfo]] = &[
    &SCALAR,
    #[cfg(target_arch = "x86_64")]
    &x86::QUANTIZED,
    #[cfg(target_arch = "x86_64")]
    &x86::DENSE,
    #[cfg(target_arch = "aarch64")]
    &arm::QUANTIZED,
    #[cfg(target_arch = "aarch64")]
    &arm::DENSE,
];

/// From how many tokens on a tile is faster than rows one by one; earlier where unpacking costs more. Measured on AVX2; AVX-512 has
/// no kernel for more than two tokens but those that its tiles take.
fn tile_from(isa: Isa, dtype: DType) -> usize {
    if matches!(isa, Isa::Avx512(_)) || dtype.block_len() == 256 { 3 } else { 4 }
}

/// The kernel that [`linear`](super::linear) runs: of the CPU's best instruction set, by the number of tokens. Where an
/// instruction set has no kernel of its own, the next one's serves.
pub fn pick(isa: Isa, dtype: DType, tokens: usize) -> &'static KernelInfo {
    static PICKS: LazyLock<Vec<&'static KernelInfo>> = LazyLock::new(|| {
        let each = ISAS.iter().flat_map(|isa| (0..TYPES).flat_map(move |id| [(isa, id, false), (isa, id, true)]));
        each.map(|(isa, id, many)| find(isa, id as u32, many)).collect()
    });
    let name = match isa {
        Isa::Avx512(_) if !needs_tiles(isa, tokens) => "avx512",
        _ => isa.name(),
    };
    let row = ISAS.iter().position(|(of, _)| *of == name).unwrap_or(0);
    PICKS[(row * TYPES + dtype.ggml() as usize % TYPES) * 2 + usize::from(tokens >= tile_from(isa, dtype))]
}

/// More than the largest of ggml's type numbers.
const TYPES: usize = 40;

/// Instruction sets, each with those whose kernels it can run besides the scalar ones, best first.
const ISAS: [(&str, &[&str]); 5] = [
    ("scalar", &[]),
    ("neon", &["neon"]),
    ("avx2", &["avx2"]),
    ("avx512", &["avx512", "avx2"]),
    ("amx", &["amx", "avx512", "avx2"]),
];

fn find((_, runs): &(&str, &[&str]), id: u32, many: bool) -> &'static KernelInfo {
    let of = |name: &str, shape: Shape| {
        let all = KERNELS.iter().copied().flatten();
        all.into_iter().find(|k| k.isa == name && k.dtype.ggml() == id && k.shape == shape)
    };
    let tile = runs.iter().find_map(|name| of(name, Shape::Tile)).filter(|_| many);
    let matvec = || runs.iter().chain(&["scalar"]).find_map(|name| of(name, Shape::Matvec));
    tile.or_else(matvec).unwrap_or(&SCALAR[0])
}
