//! Rows of any weight type as f32, for the kernels that multiply blocks of unpacked weights: the backward pass, the map
//! with exact activations, and both in integers.
//!
//! A [`Source`] writes part of a unit of 256 values in slabs of 16 columns, which is how the products of the backward
//! pass read them (a lane is a column of the matrix); [`unpack_turned`] gives the same turned (a lane is a row), for the
//! forward map. Quantized types are read as each instruction set unpacks them (`avx2/source.rs`, `neon/source.rs`), dense ones
//! in lanes. Everything is inlined into functions that have the instructions.

use super::UNIT;
#[cfg(target_arch = "x86_64")]
use super::avx2::{source as native, unpack::Block};
use super::dense::Dense;
#[cfg(target_arch = "aarch64")]
use super::neon::{source as native, unpack::Block};
use crate::cpu::kernels::lanes::{F32x8, load, store, transpose, zero};
use std::marker::PhantomData;
use std::ops::Range;

/// Values of one row of a type as f32.
pub(crate) trait Source {
    /// Writes values `columns` (within 0..256, from a multiple of 32 on) of the unit eight at a time: the c-th of them
    /// to `to[c / 16 · step + c % 16]`. A last group that is not whole is filled up with zeros.
    ///
    /// # Safety
    /// The row has these values at `unit`, `to` has room, and the caller has the instructions of lanes.
    unsafe fn unpack(unit: *const u8, columns: Range<usize>, to: *mut f32, step: usize);
    /// Bytes of 256 values.
    const UNIT_BYTES: usize;
}

/// A type in blocks, as the instruction set unpacks it.
pub(crate) struct Quantized<B>(PhantomData<B>);

impl<B: Block> Source for Quantized<B> {
    const UNIT_BYTES: usize = B::BYTES;

    #[inline(always)]
    unsafe fn unpack(unit: *const u8, columns: Range<usize>, to: *mut f32, step: usize) {
        let groups = columns.start / 32..columns.end / 32;
        // SAFETY: by the contract.
        unsafe {
            let (scales, minima) = native::scales::<B>(unit, groups.end);
            // A group's number is a constant so, and with it the shifts.
            for g in 0..8 {
                if groups.contains(&g) {
                    native::expand::<B>(unit, g, &scales, &minima, to.add(2 * (g - groups.start) * step), step);
                }
            }
        }
    }
}

/// A dense type.
pub(crate) struct Plain<D>(PhantomData<D>);

impl<D: Dense<Lanes = F32x8>> Source for Plain<D> {
    const UNIT_BYTES: usize = UNIT * D::BYTES;

    #[inline(always)]
    unsafe fn unpack(unit: *const u8, columns: Range<usize>, to: *mut f32, step: usize) {
        let (unit, columns) = (unit.wrapping_add(columns.start * D::BYTES), columns.len());
        let whole = columns & !7;
        // SAFETY: eight values below `whole` at a time; the rest by way of a buffer.
        unsafe {
            for c in (0..whole).step_by(8) {
                store(to.add(c / 16 * step + c % 16), D::load(unit.add(c * D::BYTES)));
            }
            if whole < columns {
                let mut last = [0u8; 32];
                let from = unit.add(whole * D::BYTES);
                std::ptr::copy_nonoverlapping(from, last.as_mut_ptr(), (columns - whole) * D::BYTES);
                store(to.add(whole / 16 * step + whole % 16), D::load(last.as_ptr()));
            }
        }
    }
}

/// The source of every type.
pub(crate) mod types {
    #[cfg(target_arch = "x86_64")]
    use super::super::{avx2::unpack, dense::avx2 as dense};
    #[cfg(target_arch = "aarch64")]
    use super::super::{dense::neon as dense, neon::unpack};
    pub(crate) type F32 = super::Plain<dense::F32>;
    pub(crate) type F16 = super::Plain<dense::F16>;
    pub(crate) type Bf16 = super::Plain<dense::Bf16>;
    pub(crate) type Q4_0 = super::Quantized<unpack::Q4_0>;
    pub(crate) type Q4_1 = super::Quantized<unpack::Q4_1>;
    pub(crate) type Q5_0 = super::Quantized<unpack::Q5_0>;
    pub(crate) type Q5_1 = super::Quantized<unpack::Q5_1>;
    pub(crate) type Q8_0 = super::Quantized<unpack::Q8_0>;
    pub(crate) type Q2K = super::Quantized<unpack::Q2K>;
    pub(crate) type Q3K = super::Quantized<unpack::Q3K>;
    pub(crate) type Q4K = super::Quantized<unpack::Q4K>;
    pub(crate) type Q5K = super::Quantized<unpack::Q5K>;
    pub(crate) type Q6K = super::Quantized<unpack::Q6K>;
    pub(crate) type Q8K = super::Quantized<unpack::Q8K>;
    pub(crate) type Iq4Nl = super::Quantized<unpack::Iq4Nl>;
    pub(crate) type Iq4Xs = super::Quantized<unpack::Iq4Xs>;
    pub(crate) type Mxfp4 = super::Quantized<unpack::Mxfp4>;
}

/// `$function` for the source of a type.
macro_rules! by_type {
    ($dtype:expr, $function:ident $(, $more:ty)?) => {{
        use $crate::cpu::kernels::linear::source::types;
        match $dtype {
            DType::F16 => $function::<types::F16 $(, $more)?>,
            DType::BF16 => $function::<types::Bf16 $(, $more)?>,
            DType::Q4_0 => $function::<types::Q4_0 $(, $more)?>,
            DType::Q4_1 => $function::<types::Q4_1 $(, $more)?>,
            DType::Q5_0 => $function::<types::Q5_0 $(, $more)?>,
            DType::Q5_1 => $function::<types::Q5_1 $(, $more)?>,
            DType::Q8_0 => $function::<types::Q8_0 $(, $more)?>,
            DType::Q2_K => $function::<types::Q2K $(, $more)?>,
            DType::Q3_K => $function::<types::Q3K $(, $more)?>,
            DType::Q4_K => $function::<types::Q4K $(, $more)?>,
            DType::Q5_K => $function::<types::Q5K $(, $more)?>,
            DType::Q6_K => $function::<types::Q6K $(, $more)?>,
            DType::Q8_K => $function::<types::Q8K $(, $more)?>,
            DType::IQ4_NL => $function::<types::Iq4Nl $(, $more)?>,
            DType::IQ4_XS => $function::<types::Iq4Xs $(, $more)?>,
            DType::MXFP4 => $function::<types::Mxfp4 $(, $more)?>,
            // The checks have let nothing else through.
            _ => $function::<types::F32 $(, $more)?>,
        }
    }};
}
pub(crate) use by_type;

/// Unpacks the first `columns` of the units at `unit(0) .. unit(rows − 1)`, turned: row i's value c goes to
/// `panel[i / 16 · slab + 16 · c + i % 16]`. Rows are filled up to a multiple of 8 with the last one.
///
/// # Safety
/// As for [`Source::unpack`]; the panel has room, and `eight` is scratch for 8 × 256 values.
#[inline(always)]
pub(crate) unsafe fn unpack_turned<S: Source>(
    unit: impl Fn(usize) -> *const u8,
    rows: usize,
    columns: usize,
    (panel, slab): (*mut f32, usize),
    eight: *mut f32,
) {
    for i in (0..rows).step_by(8) {
        for j in 0..8 {
            // SAFETY: a row's unit; `eight` holds 8 × UNIT values.
            unsafe { S::unpack(unit((i + j).min(rows - 1)), 0..columns, eight.add(UNIT * j), 16) };
        }
        for c in (0..columns).step_by(8) {
            // SAFETY: 8 × 8 tiles within both; a unit's last group of 8 has been filled up.
            unsafe {
                let mut tile = [zero(); 8];
                for (j, tile) in tile.iter_mut().enumerate() {
                    *tile = load(eight.add(UNIT * j + c));
                }
                let to = panel.add(i / 16 * slab + 16 * c + i % 16);
                for (j, tile) in transpose(tile).into_iter().enumerate() {
                    store(to.add(16 * j), tile);
                }
            }
        }
    }
}
