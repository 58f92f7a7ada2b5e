//! The linear map: `y[t][r] = Σₖ W[r][k] · x[t][k]`, with `W` of any type of [`DType::WEIGHTS`] read where it lies in
//! the mapped file. Nearly all time of inference is spent here.
//!
//! Every thread calls [`linear`] with its own range of rows; a row's result does not depend on the range it is in.
//! Quantized weights meet activations of 8 bits ([`Activations`], prepared once for all maps that share an input), in
//! exact integer arithmetic within groups of 32 or 16 values; dense weights meet the f32 activations.
//!
//! Two shapes: *matvec* for a few tokens, bound by memory, reads each row once straight from its blocks; *tile* for
//! many tokens, bound by arithmetic, unpacks some rows into scratch in the first cache and multiplies them there with
//! all tokens (AVX-512 multiplies up to eight tokens from registers). Which one runs depends on the type and the number of tokens only.
//!
//! | file | what |
//! | --- | --- |
//! | `activations` | 8-bit activations: layout, quantization |
//! | `tiled` | activations of a matrix unit: layout, rounding |
//! | `blocks` | all formats in one common form: the specification of unpacking |
//! | `scalar` | the specification of the products |
//! | `dense` | F32, F16, BF16 |
//! | `tile` | what instruction sets share: the memory of a tile, the loops around a tile kernel |
//! | `source` | rows of any type as f32, for the two that follow |
//! | `transpose` | the gradient with respect to the input, and the map with exact activations |
//! | `rounded` | the same two with both factors rounded to 16 bits, the gradient also to 8: what training runs on |
//! | `avx2/`, `avx512/`, `amx/`, `neon/` | the instruction sets |
//! | `table` | all kernels as data |

mod activations;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod dense;
#[cfg(target_arch = "aarch64")]
pub(super) mod neon;
mod rounded;
mod scalar;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod source;
mod table;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod tile;
mod tiled;
mod transpose;

#[cfg(test)]
mod tests;

pub use activations::{Activations, GROUP, Q8, Q8Layout, Q8Mut, activation_bytes, quantize_columns, quantize_rows};
pub use rounded::{
    Level, Rounded, RoundedBackwardTask, RoundedMut, has_backward, linear_backward_rounded, linear_wide, round_rows,
    rounded_bytes,
};
pub use table::{KERNELS, KernelInfo, Shape, pick};
pub use tiled::{Tiled, TiledMut, linear_backward_tiled, tile_columns, tile_rests, tile_rows, tiled_bytes};
pub use transpose::{LinearBackwardTask, linear_backward, linear_exact};

use crate::cpu::isa::Isa;
use crate::quant::DType;
use crate::{Error, Result};
use std::ops::Range;

/// Whether maps with weights of `dtype` read [`Activations::q8`], or [`Activations::tiled`] where [`needs_tiles`] says so; dense
/// types read the f32 rows.
pub const fn needs_q8(dtype: DType) -> bool {
    dtype.is_quantized()
}

/// Whether there is a matrix unit, which reads activations and gradients in tiles.
pub const fn has_tiles(isa: Isa) -> bool {
    matches!(isa, Isa::Avx512(token) if token.amx)
}

/// Whether maps with quantized weights read so many tokens in tiles: fewer do not pay for panels.
pub const fn needs_tiles(isa: Isa, tokens: usize) -> bool {
    has_tiles(isa) && tokens >= 16
}

/// Where results go: `y[t][r]` at `base[t * stride + r]`, with `r` the row's number in the whole matrix. A copyable
/// address, so that threads can write disjoint rows of one output.
#[derive(Clone, Copy, Debug)]
pub struct OutMut {
    pub(in crate::cpu::kernels) base: *mut f32,
    pub(in crate::cpu::kernels) stride: usize,
    pub(in crate::cpu::kernels) len: usize,
}

// SAFETY: a plain address; `OutMut::new` makes the caller vouch for the memory and for disjoint rows.
unsafe impl Send for OutMut {}
// SAFETY: as above.
unsafe impl Sync for OutMut {}

impl OutMut {
    /// An output of `len` values at `base`, tokens `stride` apart.
    ///
    /// # Safety
    /// `base` must be valid for reads and writes of `len` f32 for as long as the value is used, and calls that run at
    /// the same time must have disjoint row ranges.
    pub const unsafe fn new(base: *mut f32, stride: usize, len: usize) -> OutMut {
        OutMut { base, stride, len }
    }

    /// Writes, or adds to, row `r` of token `t`.
    ///
    /// # Safety
    /// `linear` has checked that the place is inside.
    #[inline(always)]
    unsafe fn write(&self, t: usize, r: usize, value: f32, accumulate: bool) {
        debug_assert!(t * self.stride + r < self.len);
        // SAFETY: inside by the contract.
        unsafe {
            let at = self.base.add(t * self.stride + r);
            *at = if accumulate { *at + value } else { value };
        }
    }
}

/// One thread's share of a linear map.
#[derive(Clone, Debug)]
pub struct LinearTask<'a> {
    /// Type of the weights.
    pub dtype: DType,
    /// The whole matrix: rows of `dtype.row_bytes(k)` bytes, one after the other.
    pub weight: &'a [u8],
    /// Values in a row; a multiple of `dtype.block_len()`.
    pub k: usize,
    /// The rows to compute.
    pub rows: Range<usize>,
    /// The input, `[tokens][k]`.
    pub x: &'a Activations<'a>,
    /// The output.
    pub out: OutMut,
    /// Add to the output instead of overwriting it.
    pub accumulate: bool,
}

/// Values of a unit: a whole number of blocks of every format.
const UNIT: usize = 256;
/// Rows of a tile, at most (AVX-512: 32, AVX2: 16, NEON: 8).
const TILE_ROWS_MAX: usize = 32;
/// Values of a row that are unpacked at a time; a multiple of 256.
const TILE_CHUNK: usize = 768;
/// Tokens whose sums are kept while the chunks of a row tile go by.
const TILE_TOKENS: usize = 512;

/// A thread's working memory for [`linear`]; made once, used for every call.
#[derive(Debug)]
pub struct Scratch {
    lines: Vec<Line>,
}

#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

impl Scratch {
    /// Scratch that serves every task.
    pub fn new() -> Scratch {
        Scratch { lines: vec![Line([0.0; 16]); scratch_bytes() / size_of::<Line>()] }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Scratch::new()
    }
}

/// Bytes of a [`Scratch`]: what a planner counts for each thread.
pub const fn scratch_bytes() -> usize {
    let tile = TILE_ROWS_MAX * (TILE_CHUNK + 2 * TILE_CHUNK / 16 * 4 + TILE_TOKENS * 4);
    if tile > rounded::BLOCK_BYTES { tile } else { rounded::BLOCK_BYTES }
}

/// Computes the task's rows for all tokens of its input, with the kernel that [`pick`] names.
///
/// Fails, before anything is written, when a size does not fit: the weight slice, the activations or the output.
pub fn linear(isa: Isa, task: &LinearTask<'_>, scratch: &mut Scratch) -> Result<()> {
    let kernel = pick(isa, task.dtype, task.x.tokens);
    check_sizes(task, kernel.reads)?;
    if !task.rows.is_empty() && task.x.tokens > 0 {
        (kernel.run)(isa, task, scratch);
    }
    Ok(())
}

/// The forms of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// [`Activations::f32s`].
    F32,
    /// [`Activations::q8`].
    Q8,
    /// [`Activations::tiled`].
    Tiled,
    /// [`Activations::wide`].
    Wide,
}

/// What is wrong with `weight` as a matrix of at least `rows` rows of `k` values, if anything.
fn matrix_fault(dtype: DType, weight: &[u8], rows: usize, k: usize) -> Option<String> {
    if !DType::WEIGHTS.contains(&dtype) {
        return Some("the type cannot be multiplied with".into());
    }
    let Some(row_bytes) = dtype.row_bytes(k) else {
        return Some(format!("rows are no multiple of {}", dtype.block_len()));
    };
    let fits = rows.checked_mul(row_bytes).is_some_and(|n| n <= weight.len());
    (!fits).then(|| format!("the matrix has {} bytes", weight.len()))
}

/// Whether all sizes fit, those of the form of the input that is read among them.
fn check_sizes(task: &LinearTask<'_>, reads: Form) -> Result<()> {
    let LinearTask { dtype, weight, k, rows, x, out, .. } = task;
    let misfit = |what: String| {
        Err(Error::argument(format!("linear map, {dtype} rows {rows:?} of {k} values, {} tokens: {what}", x.tokens)))
    };
    if let Some(fault) = matrix_fault(*dtype, weight, rows.end, *k) {
        return misfit(fault);
    }
    if rows.start > rows.end {
        return misfit("the range is reversed".into());
    }
    if x.k != *k {
        return misfit(format!("the activations have {} values", x.k));
    }
    if x.tokens == 0 {
        return Ok(());
    }
    let reach = |stride: usize, last: usize| (x.tokens - 1).checked_mul(stride).and_then(|n| n.checked_add(last));
    if reach(out.stride, rows.end).is_none_or(|n| n > out.len) || out.stride < rows.end {
        return misfit(format!("the output has {} values at stride {}", out.len, out.stride));
    }
    let (name, sizes) = match reads {
        Form::F32 => {
            return match reach(x.stride, *k) {
                Some(n) if n <= x.f32s.len() => Ok(()),
                _ => misfit(format!("the input has {} values at stride {}", x.f32s.len(), x.stride)),
            };
        }
        Form::Q8 => ("quantized", x.q8.map(|x| (x.layout.tokens, x.layout.k))),
        Form::Tiled => ("in tiles", x.tiled.map(|x| (x.tokens, x.k))),
        Form::Wide => ("in 16 bits", x.wide.map(|x| (x.tokens, x.k))),
    };
    match sizes {
        Some((tokens, width)) if width == *k && tokens >= x.tokens => Ok(()),
        Some((tokens, width)) => misfit(format!("the input {name} has {tokens} rows of {width}")),
        None => misfit(format!("the input is not there {name}")),
    }
}
