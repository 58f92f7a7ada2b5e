//! The linear map and its gradient with both factors rounded to integers: the arithmetic of training.
//!
//! f32 is more than training needs, and slower by half or three quarters. A [`Level`] is how far values are rounded:
//!
//! | | activations | weights | products | error |
//! | --- | --- | --- | --- | --- |
//! | `i16` | 13 bits, a scale per token and group of 64 | 14 bits, once unpacked, a scale per lane of a block | 2 in a lane of 32 bits (`vpmaddwd`, `vpdpwssd`), or one (`smlal`) | 2⁻¹³ of the largest value of a group, 2⁻¹⁴ of the largest weight of a block |
//! | `u8` | 8 bits, likewise, with 128 added | 8 bits, a scale per lane and group of 64 | 4 (`vpdpbusd`, `sdot`) | 2⁻⁸ of the largest value, or weight, of a group |
//!
//! Products and their sums over a group are exact in 32 bits, sums of groups are f32. The forward map runs at `i16`, or with
//! 8-bit activations as [`linear`](super::linear) does, which reads most weights as they are; its gradient at either.
//!
//! | | lanes | block of weights | sums run over |
//! | --- | --- | --- | --- |
//! | forward, [`linear_wide`] | rows of W | 64 rows × 512 columns | columns |
//! | backward, [`linear_backward_rounded`] | columns of W | 384 rows × 128 columns | rows |
//!
//! A block is unpacked to f32 and rounded in place, once for all tokens, so what it costs hardly depends on the type.
//! Rows of activations are rounded once ([`round_rows`]) for all maps and all threads that read them. In memory (each
//! section on 64 bytes):
//!
//! | section | type | shape |
//! | --- | --- | --- |
//! | `q` | the level's | `[tokens][groups · 64]`, zeros behind the last value |
//! | `d` | f32 | `[tokens][groups]`, `groups` = k / 64 rounded up |
//!
//! The order of a sum depends neither on the tokens nor on the share of the task, nor on the width of the vectors: any
//! split over threads gives the same bits, and so do AVX2 and AVX-512.
//!
//! | file | what |
//! | --- | --- |
//! | `blocks` | the loops over blocks, tokens and slabs of a block, for any width of vectors |
//! | `avx2`, `avx512`, `neon` | rounding and multiplying a slab |

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod blocks;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod blocks {
    /// Nothing is computed by vectors here.
    pub trait Kernels {}
    impl<Q> Kernels for Q {}
}
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(test)]
mod tests;

#[cfg(target_arch = "x86_64")]
use avx2 as native;
use blocks::Kernels;
#[cfg(target_arch = "aarch64")]
use neon as native;

use super::activations::SMALLEST;
use super::{LinearTask, OutMut, Scratch, UNIT, check_sizes, matrix_fault};
use crate::cpu::isa::Isa;
use crate::cpu::kernels::gemm;
use crate::quant::{DType, dequantize};
use crate::{Error, Result};
use std::ops::Range;

/// Values that share a scale, and whose products are summed exactly.
const GROUP: usize = 64;

/// How far values are rounded, and the type that holds an activation.
pub trait Level: bytemuck::Pod + Kernels {
    /// Largest size of a rounded activation.
    const MOST: f32;
    /// Largest size of a rounded weight: `GROUP` products of the two fit an i32.
    const MOST_WEIGHT: f32;
    /// Rows of a block of weights whose scale is one, in the backward pass.
    const SHARED: usize;

    /// Holds a rounded activation.
    fn hold(value: i32) -> Self;
    /// The activation that is held.
    fn value(self) -> i32;
}

impl Level for i16 {
    const MOST: f32 = 4095.0;
    const MOST_WEIGHT: f32 = 8191.0;
    const SHARED: usize = BACKWARD_ROWS;

    fn hold(value: i32) -> i16 {
        value as i16
    }

    fn value(self) -> i32 {
        self.into()
    }
}

/// With 128 added, as `vpdpbusd` wants it.
impl Level for u8 {
    const MOST: f32 = 127.0;
    const MOST_WEIGHT: f32 = 127.0;
    const SHARED: usize = GROUP;

    fn hold(value: i32) -> u8 {
        (value + 128) as u8
    }

    fn value(self) -> i32 {
        i32::from(self) - 128
    }
}

const fn fits<Q: Level>() -> bool {
    GROUP as f64 * Q::MOST as f64 * Q::MOST_WEIGHT as f64 <= i32::MAX as f64
}
const _: () = assert!(fits::<i16>() && fits::<u8>() && BACKWARD_ROWS.is_multiple_of(GROUP));
/// Threads divide the columns of a matrix at multiples of this.
const COLUMNS: usize = 32;
/// Rows of a block of the backward pass, a multiple of [`GROUP`].
const BACKWARD_ROWS: usize = 384;
/// Its columns, a part of a unit.
const BACKWARD_COLUMNS: usize = 128;
/// Columns of a block of the forward map, at most: whole units.
const FORWARD_COLUMNS: usize = 512;
/// Bytes of scratch for a block.
pub(super) const BLOCK_BYTES: usize = 4 * BACKWARD_ROWS * BACKWARD_COLUMNS;

/// Rows of rounded values, laid out as the module describes.
#[derive(Clone, Copy, Debug)]
pub struct Rounded<'a, Q> {
    q: &'a [Q],
    d: &'a [f32],
    /// Rows.
    pub tokens: usize,
    /// Values in a row.
    pub k: usize,
}

/// Byte offset of the scales, and bytes in all.
const fn layout<Q>(tokens: usize, k: usize) -> (usize, usize) {
    let groups = k.div_ceil(GROUP);
    let d = (tokens * groups * GROUP * size_of::<Q>()).next_multiple_of(64);
    (d, d + (tokens * groups * 4).next_multiple_of(64))
}

/// Bytes of the buffer that [`round_rows`] fills for `tokens` rows of `k` values: what a planner reserves.
pub const fn rounded_bytes<Q: Level>(tokens: usize, k: usize) -> usize {
    layout::<Q>(tokens, k).1
}

impl<'a, Q: Level> Rounded<'a, Q> {
    /// Reads `buffer`, which [`round_rows`] has filled under the same `tokens` and `k`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a buffer that is too short or not aligned for f32.
    pub fn new(buffer: &'a [u8], tokens: usize, k: usize) -> Result<Rounded<'a, Q>> {
        let groups = k.div_ceil(GROUP);
        let (d, bytes) = layout::<Q>(tokens, k);
        let misfit = || {
            Error::argument(format!(
                "rounded activations: {bytes} bytes at an address aligned to 4 are needed for {tokens} rows of {k}, got {}",
                buffer.len()
            ))
        };
        let buffer = buffer.get(..bytes).ok_or_else(misfit)?;
        let values = &buffer[..tokens * groups * GROUP * size_of::<Q>()];
        Ok(Rounded {
            q: bytemuck::try_cast_slice(values).map_err(|_| misfit())?,
            d: bytemuck::try_cast_slice(&buffer[d..d + tokens * groups * 4]).map_err(|_| misfit())?,
            tokens,
            k,
        })
    }

    /// Groups of a row.
    fn groups(&self) -> usize {
        self.k.div_ceil(GROUP)
    }
}

/// Where [`round_rows`] writes: a buffer that several threads may share, each writing its own rows.
#[derive(Clone, Copy, Debug)]
pub struct RoundedMut {
    base: *mut u8,
    tokens: usize,
    k: usize,
}

// SAFETY: a plain address; `RoundedMut::new` makes the caller vouch for the memory and for disjoint rows.
unsafe impl Send for RoundedMut {}
// SAFETY: as above.
unsafe impl Sync for RoundedMut {}

impl RoundedMut {
    /// A destination at `base`.
    ///
    /// # Safety
    /// `base` must be aligned for f32 and valid for writes of `rounded_bytes(tokens, k)` bytes of the level, for as long as
    /// the value is used, and no two threads may round the same row at the same time.
    pub const unsafe fn new(base: *mut u8, tokens: usize, k: usize) -> RoundedMut {
        RoundedMut { base, tokens, k }
    }
}

/// Rounds rows `rows` of `x` (row `t` is `x[t * stride ..][.. k]`) into `dst`, to nearest, ties to even. A group that holds a
/// NaN or an infinity gets a NaN scale, so that whatever is computed from it is NaN; a group whose values are all below 2⁻¹¹⁰
/// counts as zero.
///
/// # Errors
/// [`Error::Argument`] before anything is written, when a size does not fit.
pub fn round_rows<Q: Level>(isa: Isa, x: &[f32], stride: usize, rows: Range<usize>, dst: &RoundedMut) -> Result<()> {
    let k = dst.k;
    let enough = rows.is_empty() || gemm::fits(rows.end, k, stride, x.len());
    if rows.end > dst.tokens || !enough {
        return Err(Error::argument(format!(
            "rows {rows:?} of {k} values to be rounded: the input has {} values at stride {stride}, the output {} rows",
            x.len(),
            dst.tokens
        )));
    }
    let groups = k.div_ceil(GROUP);
    for t in rows {
        // SAFETY: the row lies in the buffer, by `layout` and the caller of `RoundedMut::new`, who vouched for it being ours.
        let (q, d) = unsafe {
            let q = dst.base.cast::<Q>().add(t * groups * GROUP);
            let d = dst.base.add(layout::<Q>(dst.tokens, k).0).cast::<f32>().add(t * groups);
            (std::slice::from_raw_parts_mut(q, groups * GROUP), std::slice::from_raw_parts_mut(d, groups))
        };
        let x = &x[t * stride..t * stride + k];
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        if crate::cpu::kernels::lanes::runs(isa) {
            for ((x, q), d) in x.chunks(GROUP).zip(q.chunks_exact_mut(GROUP)).zip(d) {
                let whole = match x.try_into() {
                    Ok(x) => x,
                    // Zeros behind the last.
                    Err(_) => &std::array::from_fn(|i| x.get(i).copied().unwrap_or(0.0)),
                };
                // SAFETY: the token in `isa` proves the instructions.
                *d = unsafe { native::round_group(whole, q.as_mut_ptr()) };
            }
            continue;
        }
        round_row(x, q, d);
    }
    let _ = isa;
    Ok(())
}

/// The specification of [`round_rows`]: one row.
fn round_row<Q: Level>(x: &[f32], q: &mut [Q], d: &mut [f32]) {
    for ((x, q), d) in x.chunks(GROUP).zip(q.chunks_exact_mut(GROUP)).zip(d) {
        let (scale, inverse) = scale_of(x.iter().copied(), Q::MOST);
        q.fill(Q::hold(0));
        q.iter_mut().zip(x).for_each(|(q, x)| *q = Q::hold(round(*x, inverse)));
        *d = scale;
    }
}

/// Scale and inverse scale with which the largest of some values becomes `to`; the inverse is 0 where all become 0.
fn scale_of(values: impl Iterator<Item = f32>, to: f32) -> (f32, f32) {
    // Absolute values compare as their bit patterns do, with infinities and NaNs on top.
    scale_of_most(f32::from_bits(values.fold(0, |top, v| (v.to_bits() & 0x7fff_ffff).max(top))), to)
}

/// The same of the largest size.
#[inline(always)]
fn scale_of_most(most: f32, to: f32) -> (f32, f32) {
    match most {
        _ if !most.is_finite() => (f32::NAN, 0.0),
        _ if most < SMALLEST => (0.0, 0.0),
        _ => (most / to, to / most),
    }
}

fn round(x: f32, inverse: f32) -> i32 {
    if inverse == 0.0 { 0 } else { (x * inverse).round_ties_even() as i32 }
}

/// As [`linear`](super::linear), in 16 bits, reading [`Activations::wide`](super::Activations::wide) for every type.
///
/// # Errors
/// [`Error::Argument`] before anything is written, when a size does not fit.
pub fn linear_wide(isa: Isa, task: &LinearTask<'_>, scratch: &mut Scratch) -> Result<()> {
    check_sizes(task, super::Form::Wide)?;
    let Some(x) = task.x.wide else { return Ok(()) };
    if task.rows.is_empty() || task.x.tokens == 0 {
        return Ok(());
    }
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    if task.k > 0
        && let Some(forward) = blocks::forward_of(isa, task.dtype)
    {
        // SAFETY: the token in `isa` proves the instructions; everything is in bounds.
        unsafe { forward(task, &x, scratch) };
        return Ok(());
    }
    let _ = (isa, scratch);
    forward_scalar(task, &x)
}

/// One thread's share of the backward pass of a linear map, with gradients of the output in the form `D`: [`Rounded`] or
/// [`Tiled`](super::Tiled).
#[derive(Clone, Debug)]
pub struct RoundedBackwardTask<'a, D> {
    /// Type of the weights.
    pub dtype: DType,
    /// The whole matrix: `dy.k` rows of `dtype.row_bytes(k)` bytes, one after the other.
    pub weight: &'a [u8],
    /// Values in a row, which is the width of dx; a multiple of `dtype.block_len()`.
    pub k: usize,
    /// The columns of dx to compute; threads divide these, at multiples of 32.
    pub columns: Range<usize>,
    /// The gradient of the output.
    pub dy: &'a D,
    /// The gradient of the input, `dx[t][c]`, for all tokens of `dy`.
    pub dx: OutMut,
    /// Add to `dx` instead of overwriting it.
    pub accumulate: bool,
}

/// Adds the gradient with respect to the input of a linear map to `dx`, or stores it there.
///
/// # Errors
/// [`Error::Argument`] before anything is written, when a size does not fit.
pub fn linear_backward_rounded<Q: Level>(
    isa: Isa,
    task: &RoundedBackwardTask<'_, Rounded<'_, Q>>,
    scratch: &mut Scratch,
) -> Result<()> {
    check_backward(task, (task.dy.tokens, task.dy.k))?;
    if task.columns.is_empty() || task.dy.tokens == 0 {
        return Ok(());
    }
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    if task.dy.k > 0
        && let Some(backward) = Q::backward_of(isa, task.dtype)
    {
        // SAFETY: the token in `isa` proves the instructions; everything is in bounds.
        unsafe { backward(task, scratch) };
        return Ok(());
    }
    let _ = (isa, scratch);
    backward_scalar(task)
}

/// Whether gradients at a level have kernels of their own for an instruction set; else they are computed as specified, slowly.
pub fn has_backward<Q: Level>(isa: Isa) -> bool {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    return Q::backward_of(isa, DType::Q8_0).is_some();
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return {
        let _ = isa;
        false
    };
}

/// Whether all sizes fit for gradients of so many tokens and rows of the matrix.
pub(super) fn check_backward<D>(task: &RoundedBackwardTask<'_, D>, (tokens, rows): (usize, usize)) -> Result<()> {
    let RoundedBackwardTask { dtype, weight, k, columns, dx, .. } = task;
    let misfit = |what: String| {
        Err(Error::argument(format!(
            "linear map backward, {rows} {dtype} rows of {k} values, columns {columns:?}: {what}"
        )))
    };
    if let Some(fault) = matrix_fault(*dtype, weight, rows, *k) {
        return misfit(fault);
    }
    let whole = |c: usize| c.is_multiple_of(COLUMNS) || c == *k;
    if columns.start > columns.end || columns.end > *k || !whole(columns.start) || !whole(columns.end) {
        return misfit("they are no groups of 32".into());
    }
    let reach = tokens.saturating_sub(1).checked_mul(dx.stride).and_then(|n| n.checked_add(*k));
    if tokens > 0 && (reach.is_none_or(|n| n > dx.len) || dx.stride < *k) {
        return misfit(format!("dx has {} values at stride {}", dx.len, dx.stride));
    }
    Ok(())
}

/// The columns of the forward map's blocks: whole units but for the last, as few and as equal as can be.
fn chunks(k: usize) -> impl Iterator<Item = Range<usize>> {
    let (units, count) = (k.div_ceil(UNIT), k.div_ceil(FORWARD_COLUMNS));
    let cut = move |i: usize| (units * i / count * UNIT).min(k);
    (0..count).map(move |i| cut(i)..cut(i + 1))
}

/// The specification of [`linear_wide`].
fn forward_scalar(task: &LinearTask<'_>, x: &Rounded<'_, i16>) -> Result<()> {
    let (dtype, groups) = (task.dtype, x.groups());
    let row_bytes = dtype.row_bytes(task.k).unwrap_or(0);
    let mut values = vec![0.0; task.k];
    for r in task.rows.clone() {
        dequantize(dtype, &task.weight[r * row_bytes..(r + 1) * row_bytes], &mut values)?;
        for t in 0..task.x.tokens {
            // SAFETY: the check has found the place in bounds.
            let add = |value, accumulate| unsafe { task.out.write(t, r, value, accumulate) };
            if task.k == 0 {
                add(0.0, task.accumulate);
            }
            for chunk in chunks(task.k) {
                let block = &values[chunk.clone()];
                let (d, inverse) = scale_of(block.iter().copied(), i16::MOST_WEIGHT);
                let mut sum = 0.0f32;
                for (g, w) in block.chunks(GROUP).enumerate() {
                    let at = t * groups + chunk.start / GROUP + g;
                    let q = &x.q[at * GROUP..][..w.len()];
                    let dot: i32 = w.iter().zip(q).map(|(w, q)| round(*w, inverse) * q.value()).sum();
                    sum += dot as f32 * x.d[at];
                }
                add(d * sum, task.accumulate || chunk.start > 0);
            }
        }
    }
    Ok(())
}

/// The specification of [`linear_backward_rounded`].
fn backward_scalar<Q: Level>(task: &RoundedBackwardTask<'_, Rounded<'_, Q>>) -> Result<()> {
    let RoundedBackwardTask { dtype, weight, k, dy, .. } = task;
    let groups = dy.groups();
    let mut decoded = vec![0.0; dy.k * k];
    dequantize(*dtype, &weight[..dy.k * dtype.row_bytes(*k).unwrap_or(0)], &mut decoded)?;
    for t in 0..dy.tokens {
        for c in task.columns.clone() {
            // SAFETY: the check has found the place in bounds.
            let add = |value, accumulate| unsafe { task.dx.write(t, c, value, accumulate) };
            if dy.k == 0 {
                add(0.0, task.accumulate);
            }
            for r in (0..dy.k).step_by(BACKWARD_ROWS) {
                let block = r..(r + BACKWARD_ROWS).min(dy.k);
                let mut sum = 0.0f32;
                for shared in block.clone().step_by(Q::SHARED) {
                    let shared = shared..(shared + Q::SHARED).min(block.end);
                    let (d, inverse) = scale_of(shared.clone().map(|r| decoded[r * k + c]), Q::MOST_WEIGHT);
                    let mut part = 0.0f32;
                    for r in shared.clone().step_by(GROUP) {
                        let rows = r..(r + GROUP).min(shared.end);
                        let q = |r: usize| dy.q[t * groups * GROUP + r].value();
                        let dot: i32 = rows.map(|r| round(decoded[r * k + c], inverse) * q(r)).sum();
                        part += dot as f32 * dy.d[t * groups + r / GROUP];
                    }
                    sum += d * part;
                }
                add(sum, task.accumulate || r > 0);
            }
        }
    }
    Ok(())
}
