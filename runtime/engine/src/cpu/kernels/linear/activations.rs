//! Activations as the linear kernels read them: the f32 rows, and beside them an 8-bit copy quantized once for all
//! maps that share the input (Q, K and V; gate and up).
//!
//! A row of `k` values is cut into groups of 32. Group `g` holds `q = round(x / d)` with `d = max|x| / 127`, and the
//! sums of its values, from which a kernel takes the share of a weight's zero point or minimum: `s = d·Σq` over the 32
//! values, and the same over each half of 16 for the types whose scales are 16 wide. Quantizing weights' partners to
//! 8 bits with a scale per 32 values costs about 0.4 % of the values' size; integer products are exact from there on.
//! Where a kernel adds 128 to signed weights, which makes them the unsigned factors that processors want, `c = −128·Σq` is what its
//! integer sums begin at.
//!
//! In memory (one buffer, every section starting on 64 bytes):
//!
//! | section | type | shape |
//! | --- | --- | --- |
//! | `qs` | i8 | `[tokens][k]` |
//! | `d` | f32 | `[tokens][groups]`, `groups` = k / 32 rounded up to a multiple of 8, the padding zero |
//! | `s` | f32 | `[tokens][groups]` |
//! | `s16` | f32 | `[tokens][2 · groups]` |
//! | `c` | i32 | `[tokens][groups]` |
//! | `c16` | i32 | `[tokens][2 · groups]` |
//!
//! The padding lets a kernel load eight scales at once at the end of a row.

use super::rounded::Rounded;
use super::tiled::Tiled;
use crate::cpu::isa::Isa;
use crate::cpu::kernels::gemm::fits;
use crate::{Error, Result};
use std::ops::Range;

/// Values that share one scale.
pub const GROUP: usize = 32;

/// Activations prepared once for all linear maps that share an input.
#[derive(Clone, Copy, Debug)]
pub struct Activations<'a> {
    /// The rows as f32: row `t` is `f32s[t * stride ..][.. k]`.
    pub f32s: &'a [f32],
    /// The same rows in 8 bits, for quantized weights.
    pub q8: Option<Q8<'a>>,
    /// The same rows in 16 bits; read by [`linear_wide`](super::linear_wide).
    pub wide: Option<Rounded<'a, i16>>,
    /// The same rows in tiles of bfloat16; read by kernels whose [`KernelInfo::reads`](super::KernelInfo::reads) says so.
    pub tiled: Option<Tiled<'a>>,
    /// What rounding has taken from [`Activations::tiled`], likewise: kernels that read tiles multiply both, where it is there.
    pub low: Option<Tiled<'a>>,
    /// Rows.
    pub tokens: usize,
    /// Values in a row.
    pub k: usize,
    /// Distance between rows in `f32s`, in values; at least `k`.
    pub stride: usize,
}

/// The 8-bit form of [`Activations`], laid out as the module describes.
#[derive(Clone, Copy, Debug)]
pub struct Q8<'a> {
    pub(super) qs: &'a [i8],
    pub(super) d: &'a [f32],
    pub(super) s: &'a [f32],
    pub(super) s16: &'a [f32],
    pub(super) c: &'a [i32],
    pub(super) c16: &'a [i32],
    pub(super) layout: Q8Layout,
}

/// Where the sections of a [`Q8`] lie in its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Q8Layout {
    /// Rows.
    pub tokens: usize,
    /// Values in a row.
    pub k: usize,
    /// Groups in a row with the padding: the row stride of `d` and `s`.
    pub groups: usize,
    /// Byte offsets of `d`, `s`, `s16`, `c` and `c16`; `qs` is at 0.
    pub d: usize,
    /// See `d`.
    pub s: usize,
    /// See `d`.
    pub s16: usize,
    /// See `d`.
    pub c: usize,
    /// See `d`.
    pub c16: usize,
    /// Bytes of the whole buffer.
    pub bytes: usize,
}

impl Q8Layout {
    /// The layout for `tokens` rows of `k` values; a `k` that is no multiple of 32 is rounded down (such rows have no
    /// quantized weights).
    pub const fn new(tokens: usize, k: usize) -> Q8Layout {
        const fn up64(n: usize) -> usize {
            n.div_ceil(64) * 64
        }
        let groups = (k / GROUP).div_ceil(8) * 8;
        let d = up64(tokens * k);
        let s = d + up64(tokens * groups * 4);
        let s16 = s + up64(tokens * groups * 4);
        let c = s16 + up64(tokens * groups * 8);
        let c16 = c + up64(tokens * groups * 4);
        Q8Layout { tokens, k, groups, d, s, s16, c, c16, bytes: c16 + up64(tokens * groups * 8) }
    }
}

/// Bytes of the buffer that [`quantize_rows`] fills for `tokens` rows of `k` values: what a planner reserves.
pub const fn activation_bytes(tokens: usize, k: usize) -> usize {
    Q8Layout::new(tokens, k).bytes
}

impl<'a> Q8<'a> {
    /// Reads `buffer`, which [`quantize_rows`] has filled under the same `tokens` and `k`. The buffer must be aligned
    /// for f32 and hold at least [`activation_bytes`].
    pub fn new(buffer: &'a [u8], tokens: usize, k: usize) -> Result<Q8<'a>> {
        let layout = Q8Layout::new(tokens, k);
        let misfit = || {
            Error::argument(format!(
                "quantized activations: {} bytes at an address aligned to 4 are needed for {tokens} rows of {k}, got {}",
                layout.bytes,
                buffer.len()
            ))
        };
        let part = |from: usize, n: usize| buffer.get(from..from + n).ok_or_else(misfit);
        let floats = |from: usize, n: usize| bytemuck::try_cast_slice(part(from, n * 4)?).map_err(|_| misfit());
        Ok(Q8 {
            qs: bytemuck::cast_slice(part(0, tokens * k)?),
            d: floats(layout.d, tokens * layout.groups)?,
            s: floats(layout.s, tokens * layout.groups)?,
            s16: floats(layout.s16, tokens * layout.groups * 2)?,
            c: bytemuck::cast_slice(floats(layout.c, tokens * layout.groups)?),
            c16: bytemuck::cast_slice(floats(layout.c16, tokens * layout.groups * 2)?),
            layout,
        })
    }

    /// The quantized values, `[tokens][k]`.
    pub fn values(&self) -> &'a [i8] {
        self.qs
    }

    /// The scales, `[tokens][groups]` with [`Q8Layout::groups`] a row.
    pub fn scales(&self) -> &'a [f32] {
        self.d
    }

    /// The sums `d·Σq` over 32 values, shaped as the scales.
    pub fn sums(&self) -> &'a [f32] {
        self.s
    }

    /// The sums `d·Σq` over 16 values, two for every scale.
    pub fn half_sums(&self) -> &'a [f32] {
        self.s16
    }

    /// What sums of products with weights that have had 128 added begin at, `−128·Σq`: over 32 values, shaped as the scales, and over
    /// 16 values, two for every scale.
    pub fn offsets(&self) -> [&'a [i32]; 2] {
        [self.c, self.c16]
    }

    /// Row count, width and offsets.
    pub fn layout(&self) -> Q8Layout {
        self.layout
    }
}

/// Where [`quantize_rows`] writes: a buffer of [`activation_bytes`] that several threads may share, each writing its
/// own rows.
#[derive(Clone, Copy, Debug)]
pub struct Q8Mut {
    base: *mut u8,
    layout: Q8Layout,
}

// SAFETY: a plain address; `Q8Mut::new` makes the caller vouch for the memory and for disjoint rows.
unsafe impl Send for Q8Mut {}
// SAFETY: as above.
unsafe impl Sync for Q8Mut {}

impl Q8Mut {
    /// A destination at `base`.
    ///
    /// # Safety
    /// `base` must be aligned for f32 and valid for writes of `activation_bytes(tokens, k)` bytes for as long as the
    /// value is used, and no two threads may quantize the same row at the same time.
    pub const unsafe fn new(base: *mut u8, tokens: usize, k: usize) -> Q8Mut {
        Q8Mut { base, layout: Q8Layout::new(tokens, k) }
    }

    /// Values `columns` of row `t`, whole groups, with what belongs to their groups; behind the last values the padding.
    pub(super) fn part(&self, t: usize, columns: Range<usize>) -> Row<'_> {
        let Q8Layout { k, groups, d, s, s16, c, c16, .. } = self.layout;
        let inside = t < self.layout.tokens && columns.start <= columns.end && columns.end <= k;
        assert!(inside, "values {columns:?} of row {t} of {} quantized rows of {k}", self.layout.tokens);
        let (first, n) = (columns.start / GROUP, columns.len());
        let count = if columns.end == k { groups - first } else { n / GROUP };
        let at = t * groups + first;
        // SAFETY: `t` and the columns are in range, the offsets lie within the buffer by `Q8Layout::new`, they are multiples of 64
        // from an aligned base, and the caller of `new` vouched for the rest.
        unsafe {
            Row {
                qs: std::slice::from_raw_parts_mut(self.base.add(t * k + columns.start).cast(), n),
                d: std::slice::from_raw_parts_mut(self.base.add(d).cast::<f32>().add(at), count),
                s: std::slice::from_raw_parts_mut(self.base.add(s).cast::<f32>().add(at), count),
                s16: std::slice::from_raw_parts_mut(self.base.add(s16).cast::<f32>().add(2 * at), 2 * count),
                c: std::slice::from_raw_parts_mut(self.base.add(c).cast::<i32>().add(at), count),
                c16: std::slice::from_raw_parts_mut(self.base.add(c16).cast::<i32>().add(2 * at), 2 * count),
            }
        }
    }
}

/// One row under construction, or a part of one.
pub(super) struct Row<'a> {
    pub qs: &'a mut [i8],
    pub d: &'a mut [f32],
    pub s: &'a mut [f32],
    pub s16: &'a mut [f32],
    pub c: &'a mut [i32],
    pub c16: &'a mut [i32],
}

impl Row<'_> {
    /// Writes the scale and all sums of group `g`, given those of its halves' values.
    #[inline(always)]
    pub fn group(&mut self, g: usize, scale: f32, [a, b]: [i32; 2]) {
        self.d[g] = scale;
        self.s[g] = scale * (a + b) as f32;
        self.s16[2 * g] = scale * a as f32;
        self.s16[2 * g + 1] = scale * b as f32;
        self.c[g] = -128 * (a + b);
        self.c16[2 * g] = -128 * a;
        self.c16[2 * g + 1] = -128 * b;
    }

    /// Zeros for the groups from `n` on, the padding.
    pub fn pad(self, n: usize) {
        self.d[n..].fill(0.0);
        self.s[n..].fill(0.0);
        self.s16[2 * n..].fill(0.0);
        self.c[n..].fill(0);
        self.c16[2 * n..].fill(0);
    }
}

/// Quantizes rows `rows` of `x` (row `t` is `x[t * stride ..][.. k]`) to 8 bits into `dst`, to nearest, ties to even.
/// A group that holds a NaN or an infinity gets a NaN scale, so that whatever is computed from it is NaN; a group
/// whose values are all below 2⁻¹¹⁰ counts as zero.
pub fn quantize_rows(isa: Isa, x: &[f32], stride: usize, rows: Range<usize>, dst: &Q8Mut) -> Result<()> {
    quantize_columns(isa, x, stride, rows, 0..dst.layout.k, dst)
}

/// As [`quantize_rows`] for the values `columns` of each row, whole groups, of which `x` has no others.
///
/// # Errors
/// [`Error::Argument`] before anything is written, when a size does not fit.
pub fn quantize_columns(
    isa: Isa,
    x: &[f32],
    stride: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    dst: &Q8Mut,
) -> Result<()> {
    let n = columns.len();
    let enough = rows.is_empty() || fits(rows.end, n, stride, x.len());
    let whole = columns.start.is_multiple_of(GROUP) && columns.end.is_multiple_of(GROUP);
    if rows.end > dst.layout.tokens || !enough || !whole || columns.end > dst.layout.k {
        return Err(Error::argument(format!(
            "quantize values {columns:?}, multiples of {GROUP}, of rows {rows:?}: the input has {} values at stride {stride}, the output {} rows of {}",
            x.len(),
            dst.layout.tokens,
            dst.layout.k
        )));
    }
    for t in rows {
        let (x, row) = (&x[t * stride..t * stride + n], dst.part(t, columns.clone()));
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(token) => super::avx2::quantize_row(token, x, row),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(token) => super::avx512::quantize_row(token, x, row),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(token) => super::neon::quantize_row(token, x, row),
            _ => quantize_row(x, row),
        }
    }
    Ok(())
}

/// Below this a group's scale would not have a finite inverse.
pub(super) const SMALLEST: f32 = f32::from_bits((127 - 110) << 23);

/// The specification of the quantization: one row.
pub(super) fn quantize_row(x: &[f32], mut row: Row<'_>) {
    let n = row.qs.len() / GROUP;
    for (g, x) in x.chunks_exact(GROUP).enumerate() {
        let q = &mut row.qs[GROUP * g..GROUP * (g + 1)];
        // Absolute values compare as their bit patterns do, with infinities and NaNs on top.
        let top = x.iter().fold(0, |top, v| (v.to_bits() & 0x7fff_ffff).max(top));
        let amax = f32::from_bits(top);
        let (scale, inverse) = match amax {
            _ if !amax.is_finite() => (f32::NAN, 0.0),
            _ if amax < SMALLEST => (0.0, 0.0),
            _ => (amax / 127.0, 127.0 / amax),
        };
        let mut sums = [0i32; 2];
        for (i, (q, v)) in q.iter_mut().zip(x).enumerate() {
            *q = if inverse == 0.0 { 0 } else { (v * inverse).round_ties_even() as i8 };
            sums[i / 16] += i32::from(*q);
        }
        row.group(g, scale, sums);
    }
    row.pad(n);
}
