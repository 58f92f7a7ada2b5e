//! The linear map and its gradient in 16-bit integers: the arithmetic of training.
//!
//! 8-bit activations are good enough to generate with, not to take gradients of; f32 is more than is needed, and slower by
//! half. In between, an activation is rounded to 13 bits by a scale per token and group of 64, a weight, once unpacked, to
//! 14 bits by a scale per lane of a block. Products and their sums over a group are exact in 32 bits (64 · 4095 · 8191 <
//! 2³¹), sums of groups are f32. The error is that of the two roundings, 2⁻¹³ of the largest value of a group and 2⁻¹⁴
//! of the largest weight of a block (whose error stays the same from token to token, so it gets the more bits), at twice
//! the operations per instruction of f32 (`vpmaddwd`).
//!
//! | | lanes | block of weights | sums run over |
//! | --- | --- | --- | --- |
//! | forward, [`linear_wide`] | rows of W | 64 rows × 512 columns | columns |
//! | backward, [`linear_backward_wide`] | columns of W | 384 rows × 128 columns | rows |
//!
//! A block is unpacked to f32 and rounded in place, once for all tokens, so what it costs hardly depends on the type.
//! Rows of activations are rounded once ([`widen_rows`]) for all maps and all threads that read them. In memory (each
//! section on 64 bytes):
//!
//! | section | type | shape |
//! | --- | --- | --- |
//! | `q` | i16 | `[tokens][groups · 64]`, zeros behind the last value |
//! | `d` | f32 | `[tokens][groups]`, `groups` = k / 64 rounded up |
//!
//! The order of a sum depends neither on the tokens nor on the share of the task: any split over threads gives the same
//! bits.

use super::activations::SMALLEST;
use super::{LinearTask, OutMut, Scratch, check_sizes, matrix_fault};
use crate::cpu::isa::Isa;
use crate::quant::{DType, dequantize};
use crate::{Error, Result};
use std::ops::Range;

/// Values that share a scale, and whose products are summed exactly.
const GROUP: usize = 64;
/// Largest size of a rounded activation, and of a rounded weight: `GROUP` products of the two fit an i32.
const MOST: f32 = 4095.0;
/// See [`MOST`].
const MOST_WEIGHT: f32 = 8191.0;
const _: () = assert!(GROUP as f64 * MOST as f64 * MOST_WEIGHT as f64 <= i32::MAX as f64);
/// Columns of a block: a unit of every format.
const UNIT: usize = 256;
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

/// Rows of 16-bit values, laid out as the module describes.
#[derive(Clone, Copy, Debug)]
pub struct Wide<'a> {
    q: &'a [i16],
    d: &'a [f32],
    /// Rows.
    pub tokens: usize,
    /// Values in a row.
    pub k: usize,
}

/// Byte offset of the scales, and bytes in all.
const fn layout(tokens: usize, k: usize) -> (usize, usize) {
    let groups = k.div_ceil(GROUP);
    let d = (tokens * groups * GROUP * 2).next_multiple_of(64);
    (d, d + (tokens * groups * 4).next_multiple_of(64))
}

/// Bytes of the buffer that [`widen_rows`] fills for `tokens` rows of `k` values: what a planner reserves.
pub const fn wide_bytes(tokens: usize, k: usize) -> usize {
    layout(tokens, k).1
}

impl<'a> Wide<'a> {
    /// Reads `buffer`, which [`widen_rows`] has filled under the same `tokens` and `k`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a buffer that is too short or not aligned for f32.
    pub fn new(buffer: &'a [u8], tokens: usize, k: usize) -> Result<Wide<'a>> {
        let groups = k.div_ceil(GROUP);
        let (d, bytes) = layout(tokens, k);
        let misfit = || {
            Error::argument(format!(
                "16-bit activations: {bytes} bytes at an address aligned to 4 are needed for {tokens} rows of {k}, got {}",
                buffer.len()
            ))
        };
        let buffer = buffer.get(..bytes).ok_or_else(misfit)?;
        Ok(Wide {
            q: bytemuck::try_cast_slice(&buffer[..tokens * groups * GROUP * 2]).map_err(|_| misfit())?,
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

/// Where [`widen_rows`] writes: a buffer that several threads may share, each writing its own rows.
#[derive(Clone, Copy, Debug)]
pub struct WideMut {
    base: *mut u8,
    tokens: usize,
    k: usize,
}

// SAFETY: a plain address; `WideMut::new` makes the caller vouch for the memory and for disjoint rows.
unsafe impl Send for WideMut {}
// SAFETY: as above.
unsafe impl Sync for WideMut {}

impl WideMut {
    /// A destination at `base`.
    ///
    /// # Safety
    /// `base` must be aligned for f32 and valid for writes of `wide_bytes(tokens, k)` bytes for as long as the value is
    /// used, and no two threads may round the same row at the same time.
    pub const unsafe fn new(base: *mut u8, tokens: usize, k: usize) -> WideMut {
        WideMut { base, tokens, k }
    }
}

/// Rounds rows `rows` of `x` (row `t` is `x[t * stride ..][.. k]`) to 16 bits into `dst`, to nearest, ties to even. A
/// group that holds a NaN or an infinity gets a NaN scale, so that whatever is computed from it is NaN; a group whose
/// values are all below 2⁻¹¹⁰ counts as zero.
///
/// # Errors
/// [`Error::Argument`] before anything is written, when a size does not fit.
pub fn widen_rows(isa: Isa, x: &[f32], stride: usize, rows: Range<usize>, dst: &WideMut) -> Result<()> {
    let k = dst.k;
    let enough = rows.is_empty() || x.len() >= (rows.end - 1).saturating_mul(stride).saturating_add(k);
    if rows.end > dst.tokens || !enough {
        return Err(Error::argument(format!(
            "rows {rows:?} of {k} values in 16 bits: the input has {} values at stride {stride}, the output {} rows",
            x.len(),
            dst.tokens
        )));
    }
    let groups = k.div_ceil(GROUP);
    for t in rows {
        // SAFETY: the row lies in the buffer, by `layout` and the caller of `WideMut::new`, who vouched for it being ours.
        let (q, d) = unsafe {
            let q = dst.base.cast::<i16>().add(t * groups * GROUP);
            let d = dst.base.add(layout(dst.tokens, k).0).cast::<f32>().add(t * groups);
            (std::slice::from_raw_parts_mut(q, groups * GROUP), std::slice::from_raw_parts_mut(d, groups))
        };
        let x = &x[t * stride..t * stride + k];
        #[cfg(target_arch = "x86_64")]
        if crate::cpu::kernels::vector::has_avx2(isa) {
            // SAFETY: the token in `isa` proves the instructions; the slices fit each other.
            unsafe { avx2::widen_row(x, q, d) };
            continue;
        }
        widen_row(x, q, d);
    }
    let _ = isa;
    Ok(())
}

/// The specification of [`widen_rows`]: one row.
fn widen_row(x: &[f32], q: &mut [i16], d: &mut [f32]) {
    for ((x, q), d) in x.chunks(GROUP).zip(q.chunks_exact_mut(GROUP)).zip(d) {
        let (scale, inverse) = scale_of(x.iter().copied(), MOST);
        q.fill(0);
        q.iter_mut().zip(x).for_each(|(q, x)| *q = round(*x, inverse));
        *d = scale;
    }
}

/// Scale and inverse scale with which the largest of some values becomes `to`; the inverse is 0 where all become 0.
fn scale_of(values: impl Iterator<Item = f32>, to: f32) -> (f32, f32) {
    // Absolute values compare as their bit patterns do, with infinities and NaNs on top.
    let most = f32::from_bits(values.fold(0, |top, v| (v.to_bits() & 0x7fff_ffff).max(top)));
    match most {
        _ if !most.is_finite() => (f32::NAN, 0.0),
        _ if most < SMALLEST => (0.0, 0.0),
        _ => (most / to, to / most),
    }
}

fn round(x: f32, inverse: f32) -> i16 {
    if inverse == 0.0 { 0 } else { (x * inverse).round_ties_even() as i16 }
}

/// As [`linear`](super::linear), reading [`Activations::wide`](super::Activations::wide) for every type.
///
/// # Errors
/// [`Error::Argument`] before anything is written, when a size does not fit.
pub fn linear_wide(isa: Isa, task: &LinearTask<'_>, scratch: &mut Scratch) -> Result<()> {
    check_sizes(task, super::Form::Wide)?;
    let Some(x) = task.x.wide else { return Ok(()) };
    if task.rows.is_empty() || task.x.tokens == 0 {
        return Ok(());
    }
    #[cfg(target_arch = "x86_64")]
    if crate::cpu::kernels::vector::has_avx2(isa) && task.k > 0 {
        // SAFETY: the token in `isa` proves the instructions; everything is in bounds.
        unsafe { avx2::forward_of(task.dtype)(task, &x, scratch) };
        return Ok(());
    }
    let _ = (isa, scratch);
    forward_scalar(task, &x)
}

/// One thread's share of the backward pass of a linear map.
#[derive(Clone, Debug)]
pub struct WideBackwardTask<'a> {
    /// Type of the weights.
    pub dtype: DType,
    /// The whole matrix: `dy.k` rows of `dtype.row_bytes(k)` bytes, one after the other.
    pub weight: &'a [u8],
    /// Values in a row, which is the width of dx; a multiple of `dtype.block_len()`.
    pub k: usize,
    /// The columns of dx to compute; threads divide these, at multiples of 32.
    pub columns: Range<usize>,
    /// The gradient of the output.
    pub dy: &'a Wide<'a>,
    /// The gradient of the input, `dx[t][c]`, for all tokens of `dy`.
    pub dx: OutMut,
    /// Add to `dx` instead of overwriting it.
    pub accumulate: bool,
}

/// Adds the gradient with respect to the input of a linear map to `dx`, or stores it there.
///
/// # Errors
/// [`Error::Argument`] before anything is written, when a size does not fit.
pub fn linear_backward_wide(isa: Isa, task: &WideBackwardTask<'_>, scratch: &mut Scratch) -> Result<()> {
    check_backward(task)?;
    if task.columns.is_empty() || task.dy.tokens == 0 {
        return Ok(());
    }
    #[cfg(target_arch = "x86_64")]
    if crate::cpu::kernels::vector::has_avx2(isa) && task.dy.k > 0 {
        // SAFETY: the token in `isa` proves the instructions; everything is in bounds.
        unsafe { avx2::backward_of(task.dtype)(task, scratch) };
        return Ok(());
    }
    let _ = (isa, scratch);
    backward_scalar(task)
}

fn check_backward(task: &WideBackwardTask<'_>) -> Result<()> {
    let WideBackwardTask { dtype, weight, k, columns, dy, dx, .. } = task;
    let rows = dy.k;
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
    let reach = dy.tokens.saturating_sub(1).checked_mul(dx.stride).and_then(|n| n.checked_add(*k));
    if dy.tokens > 0 && (reach.is_none_or(|n| n > dx.len) || dx.stride < *k) {
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
fn forward_scalar(task: &LinearTask<'_>, x: &Wide<'_>) -> Result<()> {
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
                let (d, inverse) = scale_of(block.iter().copied(), MOST_WEIGHT);
                let mut sum = 0.0f32;
                for (g, w) in block.chunks(GROUP).enumerate() {
                    let at = t * groups + chunk.start / GROUP + g;
                    let q = &x.q[at * GROUP..][..w.len()];
                    let dot: i32 = w.iter().zip(q).map(|(w, q)| i32::from(round(*w, inverse)) * i32::from(*q)).sum();
                    sum += dot as f32 * x.d[at];
                }
                add(d * sum, task.accumulate || chunk.start > 0);
            }
        }
    }
    Ok(())
}

/// The specification of [`linear_backward_wide`].
fn backward_scalar(task: &WideBackwardTask<'_>) -> Result<()> {
    let WideBackwardTask { dtype, weight, k, dy, .. } = task;
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
                let (d, inverse) = scale_of(block.clone().map(|r| decoded[r * k + c]), MOST_WEIGHT);
                let mut sum = 0.0f32;
                for r in block.clone().step_by(GROUP) {
                    let rows = r..(r + GROUP).min(block.end);
                    let q = |r: usize| i32::from(dy.q[t * groups * GROUP + r]);
                    let dot: i32 = rows.map(|r| i32::from(round(decoded[r * k + c], inverse)) * q(r)).sum();
                    sum += dot as f32 * dy.d[t * groups + r / GROUP];
                }
                add(d * sum, task.accumulate || r > 0);
            }
        }
    }
    Ok(())
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    //! AVX2 and FMA. Functions marked `inline(always)` are inlined into those with the features.
    use super::super::avx2::source::{Source, by_type, unpack_turned};
    use super::super::{LinearTask, Scratch, scratch_bytes};
    use super::{
        BACKWARD_COLUMNS, BACKWARD_ROWS, FORWARD_COLUMNS, GROUP, MOST, MOST_WEIGHT, SMALLEST, UNIT, Wide,
        WideBackwardTask,
    };
    use crate::quant::DType;
    use std::arch::x86_64::*;

    /// Rows of a block of the forward map.
    const FORWARD_ROWS: usize = 64;
    /// Tokens that go by between two looks at the same part of the output.
    const TOKENS: usize = 256;
    /// Tokens of a register tile.
    const TILE: usize = 4;
    /// Steps of a turn of the innermost loop.
    const UNROLL: usize = 4;

    const _: () = assert!(4 * BACKWARD_ROWS * BACKWARD_COLUMNS <= scratch_bytes());
    const _: () = assert!(4 * (FORWARD_ROWS * FORWARD_COLUMNS + 8 * UNIT) <= scratch_bytes());

    type Forward = unsafe fn(&LinearTask<'_>, &Wide<'_>, &mut Scratch);
    type Backward = unsafe fn(&WideBackwardTask<'_>, &mut Scratch);

    /// The forward map for a type; to be called with AVX2, FMA and F16C, and a task that has been checked.
    pub(super) fn forward_of(dtype: DType) -> Forward {
        by_type!(dtype, forward)
    }

    /// The backward pass for a type, likewise.
    pub(super) fn backward_of(dtype: DType) -> Backward {
        by_type!(dtype, backward)
    }

    /// One row of activations.
    ///
    /// # Safety
    /// The caller has AVX2; `q` and `d` hold whole groups for `x`.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn widen_row(x: &[f32], q: &mut [i16], d: &mut [f32]) {
        let mut last = [0.0f32; GROUP];
        for (g, d) in d.iter_mut().enumerate() {
            let x = &x[g * GROUP..];
            let x = if x.len() >= GROUP {
                x
            } else {
                last[..x.len()].copy_from_slice(x);
                &last
            };
            // SAFETY: whole groups in both.
            unsafe {
                let mut v = [_mm256_setzero_ps(); GROUP / 8];
                let mut top = _mm256_setzero_si256();
                for (i, v) in v.iter_mut().enumerate() {
                    *v = _mm256_loadu_ps(x.as_ptr().add(8 * i));
                    top = _mm256_max_epi32(top, size_of_bits(*v));
                }
                let top = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256::<1>(top));
                let top = _mm_max_epi32(top, _mm_unpackhi_epi64(top, top));
                let top = _mm_max_epi32(top, _mm_shuffle_epi32::<1>(top));
                let most = f32::from_bits(_mm_cvtsi128_si32(top) as u32);
                let inverse = match most {
                    _ if !most.is_finite() => 0.0,
                    _ if most < SMALLEST => 0.0,
                    _ => MOST / most,
                };
                *d = if most.is_finite() { f32::from(u8::from(inverse > 0.0)) * (most / MOST) } else { f32::NAN };
                // Nothing of a NaN may be multiplied, not even by zero.
                let keep = _mm256_castsi256_ps(_mm256_set1_epi32(-i32::from(inverse > 0.0)));
                let by = _mm256_set1_ps(inverse);
                let mut int = [_mm256_setzero_si256(); GROUP / 8];
                for (int, v) in int.iter_mut().zip(v) {
                    *int = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_and_ps(v, keep), by));
                }
                for h in 0..GROUP / 16 {
                    let words = _mm256_packs_epi32(int[2 * h], int[2 * h + 1]);
                    let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
                    _mm256_storeu_si256(q.as_mut_ptr().add(g * GROUP + 16 * h).cast(), words);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn size_of_bits(v: __m256) -> __m256i {
        // SAFETY: register arithmetic.
        unsafe { _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fff_ffff)) }
    }

    /// Rounds a slab of `rows` × 16 weights in place: as `q[row / 2][lane][row % 2]`, i16, whole groups of rows with
    /// zeros behind the last, by one scale for each lane, which is returned.
    ///
    /// # Safety
    /// The slab holds the rows, filled up to a group, as f32; the caller has AVX2.
    #[inline(always)]
    unsafe fn fix(slab: *mut f32, rows: usize) -> [__m256; 2] {
        // SAFETY: rows of 16 values; a pair of rows is read before it is written over.
        unsafe {
            let mut top = [_mm256_setzero_si256(); 2];
            for r in 0..rows {
                for (h, top) in top.iter_mut().enumerate() {
                    *top = _mm256_max_epi32(*top, size_of_bits(_mm256_loadu_ps(slab.add(16 * r + 8 * h))));
                }
            }
            let (mut scales, mut by, mut keep) = ([_mm256_setzero_ps(); 2], [_mm256_setzero_ps(); 2], top);
            for h in 0..2 {
                let most = _mm256_castsi256_ps(top[h]);
                let infinite = _mm256_cmpgt_epi32(top[h], _mm256_set1_epi32(0x7f7f_ffff));
                let tiny = _mm256_cmp_ps::<_CMP_LT_OQ>(most, _mm256_set1_ps(SMALLEST));
                let finite =
                    _mm256_andnot_si256(_mm256_or_si256(infinite, _mm256_castps_si256(tiny)), _mm256_set1_epi32(-1));
                let scale =
                    _mm256_and_ps(_mm256_div_ps(most, _mm256_set1_ps(MOST_WEIGHT)), _mm256_castsi256_ps(finite));
                scales[h] = _mm256_blendv_ps(scale, _mm256_set1_ps(f32::NAN), _mm256_castsi256_ps(infinite));
                by[h] = _mm256_and_ps(_mm256_div_ps(_mm256_set1_ps(MOST_WEIGHT), most), _mm256_castsi256_ps(finite));
                keep[h] = finite;
            }
            let int = |r: usize, h: usize| {
                let v = _mm256_and_ps(_mm256_loadu_ps(slab.add(16 * r + 8 * h)), _mm256_castsi256_ps(keep[h]));
                _mm256_cvtps_epi32(_mm256_mul_ps(v, by[h]))
            };
            let pairs = rows / 2;
            for p in 0..pairs {
                let (a, b) = ([int(2 * p, 0), int(2 * p, 1)], [int(2 * p + 1, 0), int(2 * p + 1, 1)]);
                for h in 0..2 {
                    let pair = _mm256_blend_epi16::<0b1010_1010>(a[h], _mm256_slli_epi32::<16>(b[h]));
                    _mm256_storeu_si256(slab.add(16 * p + 8 * h).cast(), pair);
                }
            }
            let mut p = pairs;
            if rows % 2 == 1 {
                let a = [int(2 * p, 0), int(2 * p, 1)];
                for (h, a) in a.into_iter().enumerate() {
                    let pair = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
                    _mm256_storeu_si256(slab.add(16 * p + 8 * h).cast(), pair);
                }
                p += 1;
            }
            for p in p..rows.div_ceil(GROUP) * GROUP / 2 {
                for h in 0..2 {
                    _mm256_storeu_si256(slab.add(16 * p + 8 * h).cast(), _mm256_setzero_si256());
                }
            }
            scales
        }
    }

    /// Where results of a slab go: token t's 16 lanes at `at[t · row]`, the first `columns` of them.
    #[derive(Clone, Copy)]
    struct Target {
        at: *mut f32,
        row: usize,
        columns: usize,
        add: bool,
    }

    /// `tokens` rows of `x`, from token `first` and group `group` on, times a slab of `groups` groups.
    ///
    /// # Safety
    /// All of them exist; the target has room; the caller has AVX2 and FMA.
    #[inline(always)]
    unsafe fn multiply(
        slab: *const f32,
        scales: [__m256; 2],
        groups: usize,
        x: &Wide<'_>,
        (first, tokens, group): (usize, usize, usize),
        to: Target,
    ) {
        let wide = x.groups();
        let mut t = 0;
        while t < tokens {
            let n = (tokens - t).min(TILE);
            // SAFETY: by the contract.
            unsafe {
                let at = (first + t) * wide + group;
                let q = x.q.as_ptr().add(at * GROUP);
                let d = x.d.as_ptr().add(at);
                let to = Target { at: to.at.add(t * to.row), ..to };
                match n {
                    1 => tile::<1>(slab.cast(), scales, groups, q, d, wide, to),
                    2 => tile::<2>(slab.cast(), scales, groups, q, d, wide, to),
                    3 => tile::<3>(slab.cast(), scales, groups, q, d, wide, to),
                    _ => tile::<4>(slab.cast(), scales, groups, q, d, wide, to),
                }
            }
            t += n;
        }
    }

    /// T tokens × 16 lanes.
    ///
    /// The inner loop counts to a number the compiler cannot see: unrolled, it is reordered and drowns in spills.
    ///
    /// # Safety
    /// As for [`multiply`].
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile<const T: usize>(
        mut w: *const __m256i,
        scales: [__m256; 2],
        groups: usize,
        q: *const i16,
        d: *const f32,
        wide: usize,
        to: Target,
    ) {
        // SAFETY: by the contract.
        unsafe {
            let steps = std::hint::black_box(GROUP / 2 / UNROLL);
            let mut acc = [[_mm256_setzero_ps(); 2]; T];
            for g in 0..groups {
                let mut sums = [[_mm256_setzero_si256(); 2]; T];
                let mut x: [*const i32; T] = [std::ptr::null(); T];
                for (t, x) in x.iter_mut().enumerate() {
                    *x = q.add((t * wide + g) * GROUP).cast();
                }
                for s in 0..steps {
                    for i in 0..UNROLL {
                        let (w0, w1) = (_mm256_loadu_si256(w.add(2 * i)), _mm256_loadu_si256(w.add(2 * i + 1)));
                        for (sums, x) in sums.iter_mut().zip(x) {
                            let pair = _mm256_set1_epi32(x.add(UNROLL * s + i).read_unaligned());
                            sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(w0, pair));
                            sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(w1, pair));
                        }
                        // Keeps the steps apart: reordered, they drown in spills.
                        for sum in sums.as_flattened_mut() {
                            std::arch::asm!(
                                "/* {0} */",
                                inout(ymm_reg) * sum,
                                options(nomem, nostack, preserves_flags)
                            );
                        }
                    }
                    w = w.add(2 * UNROLL);
                }
                for (t, acc) in acc.iter_mut().enumerate() {
                    let scale = _mm256_broadcast_ss(&*d.add(t * wide + g));
                    for (acc, sum) in acc.iter_mut().zip(sums[t]) {
                        *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, *acc);
                    }
                }
            }
            for (t, acc) in acc.iter().enumerate() {
                for h in 0..2 {
                    let at = to.at.wrapping_add(t * to.row + 8 * h);
                    let columns = to.columns.saturating_sub(8 * h);
                    if columns >= 8 {
                        let old = if to.add { _mm256_loadu_ps(at) } else { _mm256_setzero_ps() };
                        _mm256_storeu_ps(at, _mm256_fmadd_ps(acc[h], scales[h], old));
                    } else if columns > 0 {
                        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
                        let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(columns as i32), lanes);
                        let old = if to.add { _mm256_maskload_ps(at, mask) } else { _mm256_setzero_ps() };
                        _mm256_maskstore_ps(at, mask, _mm256_fmadd_ps(acc[h], scales[h], old));
                    }
                }
            }
        }
    }

    /// # Safety
    /// The task has been checked and has rows and columns.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn forward<S: Source>(task: &LinearTask<'_>, x: &Wide<'_>, scratch: &mut Scratch) {
        let Some(row_bytes) = task.dtype.row_bytes(task.k) else { return };
        let panel = scratch.lines.as_mut_ptr().cast::<f32>();
        // SAFETY: within the scratch, as asserted above.
        let eight = unsafe { panel.add(FORWARD_ROWS * FORWARD_COLUMNS) };
        for r in task.rows.clone().step_by(FORWARD_ROWS) {
            let rows = FORWARD_ROWS.min(task.rows.end - r);
            for chunk in super::chunks(task.k) {
                let (columns, slabs) = (chunk.len(), rows.div_ceil(16));
                let mut scales = [[_mm256_setzero_ps(); 2]; FORWARD_ROWS / 16];
                // SAFETY: rows of the matrix from units' beginnings; both parts of the scratch have room.
                unsafe {
                    for u in (0..columns).step_by(UNIT) {
                        let offset = (chunk.start + u) / UNIT * S::UNIT_BYTES;
                        let at = |i: usize| task.weight.as_ptr().add((r + i) * row_bytes + offset);
                        let to = (panel.add(16 * u), 16 * FORWARD_COLUMNS);
                        unpack_turned::<S>(at, rows, UNIT.min(columns - u), to, eight);
                    }
                    for (i, scales) in scales[..slabs].iter_mut().enumerate() {
                        *scales = fix(panel.add(i * 16 * FORWARD_COLUMNS), columns);
                    }
                }
                for t in (0..task.x.tokens).step_by(TOKENS) {
                    let tokens = TOKENS.min(task.x.tokens - t);
                    for (i, scales) in scales[..slabs].iter().enumerate() {
                        // SAFETY: the check has found tokens, rows and columns in bounds of x and y.
                        unsafe {
                            let to = Target {
                                at: task.out.base.add(t * task.out.stride + r + 16 * i),
                                row: task.out.stride,
                                columns: 16.min(rows - 16 * i),
                                add: task.accumulate || chunk.start > 0,
                            };
                            let from = (t, tokens, chunk.start / GROUP);
                            let slab = panel.add(i * 16 * FORWARD_COLUMNS);
                            multiply(slab, *scales, columns.div_ceil(GROUP), x, from, to);
                        }
                    }
                }
            }
        }
    }

    /// # Safety
    /// The task has been checked and has rows and columns.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn backward<S: Source>(task: &WideBackwardTask<'_>, scratch: &mut Scratch) {
        let Some(row_bytes) = task.dtype.row_bytes(task.k) else { return };
        let panel = scratch.lines.as_mut_ptr().cast::<f32>();
        let mut column = task.columns.start;
        while column < task.columns.end {
            let within = column % UNIT;
            let columns = (BACKWARD_COLUMNS - within % BACKWARD_COLUMNS).min(task.columns.end - column);
            for r in (0..task.dy.k).step_by(BACKWARD_ROWS) {
                let rows = BACKWARD_ROWS.min(task.dy.k - r);
                let slabs = columns.div_ceil(16);
                let mut scales = [[_mm256_setzero_ps(); 2]; BACKWARD_COLUMNS / 16];
                // SAFETY: rows of the matrix from a unit's beginning; the panel holds a block.
                unsafe {
                    for i in 0..rows {
                        let unit = task.weight.as_ptr().add((r + i) * row_bytes + column / UNIT * S::UNIT_BYTES);
                        S::unpack(unit, within..within + columns, panel.add(16 * i), 16 * BACKWARD_ROWS);
                    }
                    for (i, scales) in scales[..slabs].iter_mut().enumerate() {
                        *scales = fix(panel.add(i * 16 * BACKWARD_ROWS), rows);
                    }
                }
                for t in (0..task.dy.tokens).step_by(TOKENS) {
                    let tokens = TOKENS.min(task.dy.tokens - t);
                    for (i, scales) in scales[..slabs].iter().enumerate() {
                        // SAFETY: the check has found tokens, rows and columns in bounds of dy and dx.
                        unsafe {
                            let to = Target {
                                at: task.dx.base.add(t * task.dx.stride + column + 16 * i),
                                row: task.dx.stride,
                                columns: 16.min(columns - 16 * i),
                                add: task.accumulate || r > 0,
                            };
                            let from = (t, tokens, r / GROUP);
                            let slab = panel.add(i * 16 * BACKWARD_ROWS);
                            multiply(slab, *scales, rows.div_ceil(GROUP), task.dy, from, to);
                        }
                    }
                }
            }
            column += columns;
        }
    }
}

#[cfg(test)]
mod tests;
