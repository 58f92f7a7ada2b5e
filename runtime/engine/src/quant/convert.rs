//! From bytes to floats and back, for any weight type chosen at run time.
//!
//! These are the checked entry points to the block formats, used by the file converter, by tests, and wherever a few rows
//! are needed as floats (embeddings, adapters). They work on one thread and allocate only what they return; rows may be converted in any
//! grouping, since blocks never cross rows.

use super::block::{Block, F16, Importance, blocks, blocks_mut};
use super::dense::{BF16, F32};
use super::iq4::{BlockIq4Nl, BlockIq4Xs};
use super::k_affine::{BlockQ2K, BlockQ4K, BlockQ5K};
use super::k_symmetric::{BlockQ3K, BlockQ6K, BlockQ8K};
use super::legacy::{BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0};
use super::mxfp4::BlockMxfp4;
use super::{DType, search};
use crate::{Error, Result};

/// Values of the longest block.
const LONGEST: usize = 256;

/// Calls a function that is generic over the block with the block of a [`DType`].
macro_rules! with_block {
    ($dtype:expr, $function:ident($($argument:expr),*)) => {
        match $dtype {
            DType::F32 => $function::<F32>($($argument),*),
            DType::F16 => $function::<F16>($($argument),*),
            DType::BF16 => $function::<BF16>($($argument),*),
            DType::Q4_0 => $function::<BlockQ4_0>($($argument),*),
            DType::Q4_1 => $function::<BlockQ4_1>($($argument),*),
            DType::Q5_0 => $function::<BlockQ5_0>($($argument),*),
            DType::Q5_1 => $function::<BlockQ5_1>($($argument),*),
            DType::Q8_0 => $function::<BlockQ8_0>($($argument),*),
            DType::Q2_K => $function::<BlockQ2K>($($argument),*),
            DType::Q3_K => $function::<BlockQ3K>($($argument),*),
            DType::Q4_K => $function::<BlockQ4K>($($argument),*),
            DType::Q5_K => $function::<BlockQ5K>($($argument),*),
            DType::Q6_K => $function::<BlockQ6K>($($argument),*),
            DType::Q8_K => $function::<BlockQ8K>($($argument),*),
            DType::IQ4_NL => $function::<BlockIq4Nl>($($argument),*),
            DType::IQ4_XS => $function::<BlockIq4Xs>($($argument),*),
            DType::MXFP4 => $function::<BlockMxfp4>($($argument),*),
            DType::I8 | DType::I16 | DType::I32 | DType::I64 | DType::F64 => Err(not_a_weight_type($dtype)),
        }
    };
}

/// Writes the values of `bytes` to `out`, bit for bit as ggml's `to_float` does.
///
/// `bytes` are rows of `dtype`, one after the other; `out` has room for exactly their values. Bytes from a damaged file
/// may give infinities or NaN, never an error.
///
/// # Errors
/// [`Error::Argument`] when the lengths do not fit each other or `dtype` is no weight type.
pub fn dequantize(dtype: DType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    check_lengths(dtype, bytes.len(), out.len())?;
    with_block!(dtype, decode_all(bytes, out))
}

/// The blocks of `dtype` that stand for `values`, byte for byte as `ggml_quantize_chunk` makes them without an importance
/// matrix.
///
/// `values` are whole rows whose width is a multiple of the block ([`DType::block_len`]).
///
/// # Errors
/// [`Error::Argument`] when the length is no multiple of the block, `dtype` is no weight type, or a value is NaN, infinite
/// or too large for the type's half-precision scale; the message has its index.
pub fn quantize(dtype: DType, values: &[f32]) -> Result<Vec<u8>> {
    let mut bytes = vec![0; bytes_for(dtype, values.len())?];
    quantize_into(dtype, values, &mut bytes)?;
    Ok(bytes)
}

/// As [`quantize`], into `bytes`, which has exactly the room ([`DType::row_bytes`]).
///
/// # Errors
/// As [`quantize`], and when `bytes` has another length.
pub fn quantize_into(dtype: DType, values: &[f32], bytes: &mut [u8]) -> Result<()> {
    check_lengths(dtype, bytes.len(), values.len())?;
    with_block!(dtype, encode_all(values, None, bytes))
}

/// As [`quantize`], but the search gives weight to the columns that matter: `importance` has one number per column, not
/// negative, usually the mean square of the activation that the column is multiplied with over some calibration text.
///
/// `values` are rows of `importance.len()` columns. `F32`, `F16`, `BF16`, `Q8_0`, `Q8_K` and `MXFP4` have nothing to
/// choose and come out as from [`quantize`].
///
/// # Errors
/// As [`quantize`]; and when `values` are no whole rows or an importance is negative or not finite.
pub fn quantize_weighted(dtype: DType, values: &[f32], importance: &[f32]) -> Result<Vec<u8>> {
    let width = importance.len();
    if width == 0 || !values.len().is_multiple_of(width) || dtype.row_bytes(width).is_none() {
        return Err(Error::argument(format!(
            "{} values are no rows of {width} columns in blocks of {}",
            values.len(),
            dtype.block_len()
        )));
    }
    if let Some(i) = importance.iter().position(|w| !(w.is_finite() && *w >= 0.0)) {
        return Err(Error::argument(format!(
            "importance {i} is {}; importances are finite and not negative",
            importance[i]
        )));
    }
    let mut bytes = vec![0; bytes_for(dtype, values.len())?];
    let row_bytes = bytes_for(dtype, width)?;
    for (row, (values, bytes)) in values.chunks_exact(width).zip(bytes.chunks_exact_mut(row_bytes)).enumerate() {
        with_block!(dtype, encode_all(values, Some(importance), bytes)).map_err(|e| match e {
            Error::Argument(what) => Error::Argument(format!("row {row}: {what}")),
            other => other,
        })?;
    }
    Ok(bytes)
}

/// The inner product of a row of `dtype` with `x`: dequantized values times exact activations, summed in double
/// precision. What every matrix kernel with exact activations approximates.
///
/// # Errors
/// [`Error::Argument`] when the lengths do not fit each other or `dtype` is no weight type.
pub fn dot(dtype: DType, row: &[u8], x: &[f32]) -> Result<f32> {
    check_lengths(dtype, row.len(), x.len())?;
    with_block!(dtype, dot_all(row, x))
}

fn decode_all<B: Block>(bytes: &[u8], out: &mut [f32]) -> Result<()> {
    for (block, out) in blocks::<B>(bytes)?.iter().zip(out.chunks_exact_mut(B::DTYPE.block_len())) {
        block.decode(out);
    }
    Ok(())
}

fn encode_all<B: Block>(values: &[f32], importance: Option<&[f32]>, bytes: &mut [u8]) -> Result<()> {
    let len = B::DTYPE.block_len();
    if let Some(i) = values.iter().position(|v| !v.is_finite()) {
        return Err(Error::argument(format!(
            "value {i} is {}; only finite values can be quantized to {}",
            values[i],
            B::DTYPE
        )));
    }
    let row_mean_square = match importance {
        Some(_) => search::sum_of_squares(values) / values.len() as f32,
        None => 0.0,
    };
    let out = blocks_mut::<B>(bytes)?;
    for (i, (out, x)) in out.iter_mut().zip(values.chunks_exact(len)).enumerate() {
        let weights = importance.and_then(|importance| importance.chunks_exact(len).nth(i));
        let peak = search::peak(x);
        *out = B::encode(x, weights.map(|weights| Importance { weights, row_mean_square }));
        if peak.abs() > B::LARGEST || !out.is_finite() {
            return Err(Error::argument(format!(
                "values {}..{} reach {peak}, beyond what the scale of {} can hold; scale the tensor down or keep it in F32",
                i * len,
                (i + 1) * len,
                B::DTYPE
            )));
        }
    }
    Ok(())
}

fn dot_all<B: Block>(row: &[u8], x: &[f32]) -> Result<f32> {
    let len = B::DTYPE.block_len();
    let mut buffer = [0.0f32; LONGEST];
    let values = &mut buffer[..len.min(LONGEST)];
    let mut sum = 0.0f64;
    for (block, x) in blocks::<B>(row)?.iter().zip(x.chunks_exact(len)) {
        block.decode(values);
        sum += values.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum::<f64>();
    }
    Ok(sum as f32)
}

fn not_a_weight_type(dtype: DType) -> Error {
    let known = DType::WEIGHTS.map(DType::name).join(", ");
    Error::argument(format!("{dtype} is no weight type; weight types are {known}"))
}

fn bytes_for(dtype: DType, len: usize) -> Result<usize> {
    dtype.row_bytes(len).ok_or_else(|| {
        Error::argument(format!("{len} values are no whole number of {dtype} blocks of {}", dtype.block_len()))
    })
}

fn check_lengths(dtype: DType, bytes: usize, len: usize) -> Result<()> {
    let needed = bytes_for(dtype, len)?;
    if bytes != needed {
        return Err(Error::argument(format!("{len} values of {dtype} take {needed} bytes, not {bytes}")));
    }
    Ok(())
}
