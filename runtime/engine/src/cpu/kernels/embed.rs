//! Token embedding: one row of the (usually quantized) embedding matrix as floats, times a constant.
//!
//! The matrix lies in the mapped file, \[vocabulary\]\[width\]; a row is decoded by the format's specification in
//! [`quant`](crate::quant), since one row a token is no hot path. Gemma scales by √width.

use super::vector::scale;
use crate::cpu::isa::Isa;
use crate::quant::{DType, dequantize};
use crate::{Error, Result};

/// out ← `factor` · row `token` of `table`, whose rows are `out.len()` wide.
///
/// # Errors
/// [`Error::Argument`] if the table has no such row, the width is no multiple of the type's block, or the type is no
/// weight type.
pub fn embed(isa: Isa, dtype: DType, table: &[u8], token: u32, factor: f32, out: &mut [f32]) -> Result<()> {
    let bytes = dtype
        .row_bytes(out.len())
        .filter(|&n| n > 0)
        .ok_or_else(|| Error::argument(format!("an embedding row of {dtype} cannot be {} elements wide", out.len())))?;
    let row = (token as usize).checked_mul(bytes).and_then(|at| table.get(at..)?.get(..bytes)).ok_or_else(|| {
        Error::argument(format!("token {token} is outside the vocabulary of {} tokens", table.len() / bytes))
    })?;
    dequantize(dtype, row, out)?;
    if factor != 1.0 {
        scale(isa, factor, out);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::quantize;

    #[test]
    fn finds_its_row_and_scales_it() {
        let values: Vec<f32> = (0..5 * 256).map(|i| ((i * 37 % 211) as f32 - 100.0) * 0.01).collect();
        for dtype in DType::WEIGHTS {
            let table = quantize(dtype, &values).unwrap();
            let mut all = vec![0.0; values.len()];
            dequantize(dtype, &table, &mut all).unwrap();
            for isa in Isa::available() {
                for token in 0..5u32 {
                    let mut row = [0.0; 256];
                    embed(isa, dtype, &table, token, 1.0, &mut row).unwrap();
                    assert_eq!(row, all[token as usize * 256..][..256]);
                    let mut scaled = [0.0; 256];
                    embed(isa, dtype, &table, token, 16.0, &mut scaled).unwrap();
                    assert_eq!(scaled, row.map(|x| x * 16.0));
                }
                let error = embed(isa, dtype, &table, 5, 1.0, &mut [0.0; 256]).unwrap_err();
                assert!(error.to_string().contains("5 tokens"), "{error}");
                assert!(embed(isa, dtype, &table, u32::MAX, 1.0, &mut [0.0; 256]).is_err());
            }
        }
        assert!(embed(Isa::Scalar, DType::Q4_K, &[0; 144], 0, 1.0, &mut [0.0; 100]).is_err());
        assert!(embed(Isa::Scalar, DType::I8, &[0; 144], 0, 1.0, &mut [0.0; 16]).is_err());
        assert!(embed(Isa::Scalar, DType::F32, &[0; 144], 0, 1.0, &mut []).is_err());
    }
}
