//! A scan of the weights for numbers that no model has: NaN or infinity as an element of a dense tensor or as a scale
//! of a block. Packed values cannot be invalid, so only the scales are read; where they lie is a table by type. The
//! scan touches every page of the file, so it is asked for (`OpenOptions::validate`), not done by default.

use half::{bf16, f16};

use super::tensor::TensorInfo;
use crate::quant::DType;
use crate::{Error, Result};

/// How a scale is stored.
#[derive(Clone, Copy)]
enum Scale {
    F16,
    Bf16,
    F32,
    F64,
    /// A power of two as a biased exponent; 255 stands for NaN (OCP Microscaling Formats 1.0, section 5.4.1).
    E8m0,
}

/// The scales of one block: how they are stored and at which bytes of the block.
fn scales(dtype: DType) -> &'static [(Scale, usize)] {
    match dtype {
        DType::F32 => &[(Scale::F32, 0)],
        DType::F64 => &[(Scale::F64, 0)],
        DType::F16 => &[(Scale::F16, 0)],
        DType::BF16 => &[(Scale::Bf16, 0)],
        DType::I8 | DType::I16 | DType::I32 | DType::I64 => &[],
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::IQ4_NL | DType::IQ4_XS => &[(Scale::F16, 0)],
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[(Scale::F16, 0), (Scale::F16, 2)],
        DType::Q2_K => &[(Scale::F16, 80), (Scale::F16, 82)],
        DType::Q3_K => &[(Scale::F16, 108)],
        DType::Q6_K => &[(Scale::F16, 208)],
        DType::Q8_K => &[(Scale::F32, 0)],
        DType::MXFP4 => &[(Scale::E8m0, 0)],
    }
}

impl Scale {
    /// Whether the scale at byte `at` of `block` is a number.
    fn is_finite(self, block: &[u8], at: usize) -> bool {
        match self {
            Scale::F16 => bytes_at(block, at).is_some_and(|b| f16::from_le_bytes(b).is_finite()),
            Scale::Bf16 => bytes_at(block, at).is_some_and(|b| bf16::from_le_bytes(b).is_finite()),
            Scale::F32 => bytes_at(block, at).is_some_and(|b| f32::from_le_bytes(b).is_finite()),
            Scale::F64 => bytes_at(block, at).is_some_and(|b| f64::from_le_bytes(b).is_finite()),
            Scale::E8m0 => block.get(at).is_some_and(|&b| b != 255),
        }
    }
}

fn bytes_at<const N: usize>(block: &[u8], at: usize) -> Option<[u8; N]> {
    block.get(at..)?.first_chunk().copied()
}

/// Checks all of one tensor's scales. `data` is the tensor's bytes, `file` the name for the message.
pub(super) fn check(file: &str, tensor: &TensorInfo, data: &[u8]) -> Result<()> {
    let scales = scales(tensor.dtype);
    if scales.is_empty() {
        return Ok(());
    }
    for (index, block) in data.chunks_exact(tensor.dtype.block_bytes()).enumerate() {
        for &(scale, at) in scales {
            if !scale.is_finite(block, at) {
                let unit = if tensor.dtype.is_quantized() { "the scale of block" } else { "element" };
                return Err(Error::Format {
                    file: file.into(),
                    at: format!("tensor {}", tensor.name),
                    what: format!(
                        "{unit} {index} ({}) is NaN or infinite; the file is corrupt: check its SHA-256 and download it again",
                        tensor.dtype
                    ),
                });
            }
        }
    }
    Ok(())
}
