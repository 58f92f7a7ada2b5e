//! Activations in bfloat16, as a matrix unit reads them: tiles of 16 rows × 32 values, of one KiB each.
//!
//! | | shape |
//! | --- | --- |
//! | a tile | `[16 rows][32 values]` of bf16, a row on 64 bytes |
//! | all | `[tokens / 16, rounded up][k / 32, rounded up]` tiles |
//!
//! A unit that sums over `k` reads one stretch of memory so, whatever the width. Values behind the last of a row are zero; rows
//! behind the last token hold anything, and what is computed of them is dropped. Rounding is to nearest, ties to even: off by
//! up to 2⁻⁸ of each value, where the 8 bits of [`Q8`](super::Q8) are off by up to 2⁻⁸ of the largest value of a group.

use super::Scratch;
use super::rounded::{RoundedBackwardTask, check_backward};
use crate::cpu::isa::Isa;
use crate::cpu::kernels::amx::{TILE_BYTES, TILE_ROWS, TILE_VALUES};
use crate::cpu::kernels::gemm::fits;
use crate::{Error, Result};
use std::ops::Range;

/// Bytes of the buffer that [`tile_rows`] fills for `tokens` rows of `k` values: what a planner reserves.
pub const fn tiled_bytes(tokens: usize, k: usize) -> usize {
    tokens.div_ceil(TILE_ROWS) * k.div_ceil(TILE_VALUES) * TILE_BYTES
}

/// Rows in tiles, laid out as the module describes.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "no other kernel reads tiles"))]
pub struct Tiled<'a> {
    tiles: &'a [u8],
    /// Rows.
    pub tokens: usize,
    /// Values in a row.
    pub k: usize,
}

impl<'a> Tiled<'a> {
    /// Reads `buffer`, which [`tile_rows`] has filled under the same `tokens` and `k`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a buffer that is too short.
    pub fn new(buffer: &'a [u8], tokens: usize, k: usize) -> Result<Tiled<'a>> {
        let bytes = tiled_bytes(tokens, k);
        let tiles = buffer.get(..bytes).ok_or_else(|| {
            Error::argument(format!(
                "activations in tiles: {bytes} bytes are needed for {tokens} rows of {k}, got {}",
                buffer.len()
            ))
        })?;
        Ok(Tiled { tiles, tokens, k })
    }

    /// Tiles that a row crosses.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn across(&self) -> usize {
        self.k.div_ceil(TILE_VALUES)
    }

    /// The first byte of tile `at` of tile row `row`, both in range or one behind.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn tile(&self, row: usize, at: usize) -> *const u8 {
        self.tiles.as_ptr().wrapping_add((row * self.across() + at) * TILE_BYTES)
    }
}

/// Where [`tile_rows`] writes: a buffer of [`tiled_bytes`] that several threads may share, each writing its own rows.
#[derive(Clone, Copy, Debug)]
pub struct TiledMut {
    base: *mut u8,
    tokens: usize,
    k: usize,
}

// SAFETY: a plain address; `TiledMut::new` makes the caller vouch for the memory and for disjoint rows.
unsafe impl Send for TiledMut {}
// SAFETY: as above.
unsafe impl Sync for TiledMut {}

impl TiledMut {
    /// A destination at `base`.
    ///
    /// # Safety
    /// `base` must be aligned for u16 and valid for writes of `tiled_bytes(tokens, k)` bytes for as long as the value is
    /// used, and no two threads may write the same row at the same time.
    pub const unsafe fn new(base: *mut u8, tokens: usize, k: usize) -> TiledMut {
        TiledMut { base, tokens, k }
    }

    /// Values 32·`at` and on of row `t`.
    fn part(&self, t: usize, at: usize) -> *mut [u16; TILE_VALUES] {
        let tile = t / TILE_ROWS * self.k.div_ceil(TILE_VALUES) + at;
        self.base.wrapping_add(tile * TILE_BYTES + t % TILE_ROWS * 2 * TILE_VALUES).cast()
    }
}

/// Rounds rows `rows` of `x` (row `t` is `x[t * stride ..][.. k]`) to bfloat16 and lays them into `dst`.
///
/// # Errors
/// [`Error::Argument`] before anything is written, when a size does not fit.
pub fn tile_rows(isa: Isa, x: &[f32], stride: usize, rows: Range<usize>, dst: &TiledMut) -> Result<()> {
    tile_columns(isa, x, stride, rows, 0..dst.k, dst)
}

/// As [`tile_rows`] for the values `columns` of each row, from a multiple of 32 to another or the end, of which `x` has no others.
///
/// # Errors
/// [`Error::Argument`] before anything is written, when a size does not fit.
pub fn tile_columns(
    isa: Isa,
    x: &[f32],
    stride: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    dst: &TiledMut,
) -> Result<()> {
    lay(isa, x, stride, (rows, columns), dst, false)
}

/// Lays into `dst` what [`tile_rows`] has taken from the same values, rounded in turn: with both they are off by up to 2⁻¹⁶ of each.
///
/// # Errors
/// [`Error::Argument`] before anything is written, when a size does not fit.
pub fn tile_rests(isa: Isa, x: &[f32], stride: usize, rows: Range<usize>, dst: &TiledMut) -> Result<()> {
    lay(isa, x, stride, (rows, 0..dst.k), dst, true)
}

/// Lays values down rounded, or what that leaves of them, which is exact before it is rounded in turn.
fn lay(
    isa: Isa,
    x: &[f32],
    stride: usize,
    (rows, columns): (Range<usize>, Range<usize>),
    dst: &TiledMut,
    rests: bool,
) -> Result<()> {
    let n = columns.len();
    let enough = rows.is_empty() || fits(rows.end, n, stride, x.len());
    let whole =
        columns.start.is_multiple_of(TILE_VALUES) && (columns.end.is_multiple_of(TILE_VALUES) || columns.end == dst.k);
    if rows.end > dst.tokens || !enough || !whole || columns.end > dst.k {
        return Err(Error::argument(format!(
            "values {columns:?} of rows {rows:?} to be laid in tiles: the input has {} values at stride {stride}, the output {} rows of {}",
            x.len(),
            dst.tokens,
            dst.k
        )));
    }
    let first = columns.start / TILE_VALUES;
    for t in rows {
        for (at, x) in x[t * stride..t * stride + n].chunks(TILE_VALUES).enumerate() {
            let to = dst.part(t, first + at);
            #[cfg(target_arch = "x86_64")]
            if let (Isa::Avx512(token), Ok(x)) = (isa, x.try_into())
                && token.bf16
            {
                // SAFETY: the token says that the CPU has the instructions; the place lies in the buffer, which is the caller's.
                unsafe { if rests { x86::round_rests(x, to) } else { x86::round(x, to) } };
                continue;
            }
            let _ = isa;
            let mut values = [0; TILE_VALUES];
            for (to, x) in values.iter_mut().zip(x) {
                let rounded = half::bf16::from_f32(*x);
                *to = if rests { half::bf16::from_f32(x - rounded.to_f32()) } else { rounded }.to_bits();
            }
            // SAFETY: the place lies in the buffer, which is the caller's.
            unsafe { *to = values };
        }
    }
    Ok(())
}

/// As [`linear_backward_rounded`](super::linear_backward_rounded) with the gradient of the output in tiles.
///
/// # Errors
/// [`Error::Argument`] before anything is written, when a size does not fit, or where there is no matrix unit.
pub fn linear_backward_tiled(isa: Isa, task: &RoundedBackwardTask<'_, Tiled<'_>>, scratch: &mut Scratch) -> Result<()> {
    check_backward(task, (task.dy.tokens, task.dy.k))?;
    #[cfg(target_arch = "x86_64")]
    if let Isa::Avx512(token) = isa
        && token.amx
    {
        if !task.columns.is_empty() && task.dy.tokens > 0 {
            // SAFETY: the token says that there are the instructions; everything is in bounds.
            unsafe { super::amx::backward_of(task.dtype)(task, scratch) };
        }
        return Ok(());
    }
    let _ = scratch;
    Err(Error::argument(format!("{} has no kernel for gradients in tiles", isa.name())))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::TILE_VALUES;
    use std::arch::x86_64::*;

    /// # Safety
    /// The CPU has AVX-512 F and BF16; `to` is good for writes.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn round(x: &[f32; TILE_VALUES], to: *mut [u16; TILE_VALUES]) {
        // SAFETY: 32 values in, 32 out.
        unsafe {
            let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16)));
            let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(to.cast(), both);
        }
    }

    /// As [`round`], of what it leaves.
    ///
    /// # Safety
    /// As there.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn round_rests(x: &[f32; TILE_VALUES], to: *mut [u16; TILE_VALUES]) {
        let mut rests = [0.0; TILE_VALUES];
        // SAFETY: 32 values in, 32 out.
        unsafe {
            for i in [0, 16] {
                let x = _mm512_loadu_ps(x.as_ptr().add(i));
                let rounded: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(x));
                let rounded = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(rounded));
                let rest = _mm512_sub_ps(x, _mm512_castsi512_ps(rounded));
                _mm512_storeu_ps(rests.as_mut_ptr().add(i), rest);
            }
            round(&rests, to);
        }
    }
}
