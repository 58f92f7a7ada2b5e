//! The block formats against ggml: golden values made by `tests/golden/quant/make.py` (which says how), and the
//! properties that no table of values covers.

use super::*;
use crate::Error;

macro_rules! golden {
    ($file:expr) => {
        include_bytes!(concat!("../../tests/golden/quant/", $file))
    };
}

/// What ggml made of the golden inputs for one type.
struct Golden {
    dtype: DType,
    quantized: &'static [u8],
    /// With the importance matrix, where the type uses one.
    weighted: Option<&'static [u8]>,
    /// Random blocks and their values.
    random: Option<(&'static [u8], &'static [u8])>,
}

macro_rules! table {
    (@row $t:ident dense) => {
        Golden { dtype: DType::$t, quantized: golden!(concat!(stringify!($t), ".quantized")), weighted: None, random: None }
    };
    (@row $t:ident plain) => {
        Golden { random: Some((golden!(concat!(stringify!($t), ".random")), golden!(concat!(stringify!($t), ".decoded")))),
            ..table!(@row $t dense) }
    };
    (@row $t:ident weighted) => {
        Golden { weighted: Some(golden!(concat!(stringify!($t), ".weighted"))), ..table!(@row $t plain) }
    };
    ($($t:ident $kind:ident),* $(,)?) => { [$(table!(@row $t $kind)),*] };
}

fn all() -> [Golden; 16] {
    table![
        F16 dense, BF16 dense, Q8_0 plain, Q8_K plain, MXFP4 plain,
        Q4_0 weighted, Q4_1 weighted, Q5_0 weighted, Q5_1 weighted,
        Q2_K weighted, Q3_K weighted, Q4_K weighted, Q5_K weighted, Q6_K weighted,
        IQ4_NL weighted, IQ4_XS weighted,
    ]
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn values() -> Vec<f32> {
    floats(golden!("values.f32"))
}

/// A few values of ordinary size.
fn ordinary(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 % 1009) as f32 / 1009.0 - 0.5) * 0.2).collect()
}

#[test]
fn random_blocks_decode_as_ggml_does() {
    for g in all() {
        let Some((blocks, decoded)) = g.random else { continue };
        let mut out = vec![0.0; decoded.len() / 4];
        dequantize(g.dtype, blocks, &mut out).unwrap();
        for (i, (ours, ggml)) in out.iter().zip(floats(decoded)).enumerate() {
            assert_eq!(ours.to_bits(), ggml.to_bits(), "{} value {i}: {ours} against {ggml}", g.dtype);
        }
    }
}

/// Compares the FNV-1a hash of `bytes` with the one of the golden list.
#[track_caller]
fn assert_hash(dtype: DType, what: &str, bytes: impl IntoIterator<Item = u8>) {
    let hash =
        bytes.into_iter().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let line = format!("{dtype} {what} {hash:016x}");
    assert!(golden_hashes().lines().any(|l| l == line), "{line} is not among the golden hashes");
}

fn golden_hashes() -> &'static str {
    include_str!("../../tests/golden/quant/hashes.txt")
}

/// The 96 rows of ordinary values of which the golden list has hashes only.
fn many() -> Vec<f32> {
    let mut state = 1u32;
    let mut draw = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as i32 - (1 << 23)
    };
    (0..96 * 768).map(|_| (0..4).map(|_| draw()).sum::<i32>() as f32 / (1u32 << 29) as f32).collect()
}

#[test]
fn quantized_values_decode_as_ggml_does() {
    for g in all() {
        let mut out = vec![0.0; values().len()];
        dequantize(g.dtype, g.quantized, &mut out).unwrap();
        assert_hash(g.dtype, "decoded", out.iter().flat_map(|v| v.to_le_bytes()));
    }
}

#[test]
fn many_values_are_quantized_as_ggml_does() {
    let (many, importance) = (many(), floats(golden!("importance.f32")));
    for g in all() {
        assert_hash(g.dtype, "many", quantize(g.dtype, &many).unwrap());
        assert_hash(g.dtype, "many_weighted", quantize_weighted(g.dtype, &many, &importance).unwrap());
    }
}

#[track_caller]
fn assert_same_blocks(dtype: DType, ours: &[u8], ggml: &[u8], what: &str) {
    assert_eq!(ours.len(), ggml.len());
    let size = dtype.block_bytes();
    let differing: Vec<usize> =
        (0..ggml.len() / size).filter(|b| ours[b * size..][..size] != ggml[b * size..][..size]).collect();
    assert!(differing.is_empty(), "{dtype} {what}: blocks {differing:?} differ from ggml's");
}

#[test]
fn quantizing_gives_the_bytes_of_ggml() {
    for g in all() {
        assert_same_blocks(g.dtype, &quantize(g.dtype, &values()).unwrap(), g.quantized, "quantized");
    }
}

#[test]
fn quantizing_by_importance_gives_the_bytes_of_ggml() {
    let importance = floats(golden!("importance.f32"));
    for g in all() {
        let ours = quantize_weighted(g.dtype, &values(), &importance).unwrap();
        assert_same_blocks(g.dtype, &ours, g.weighted.unwrap_or(g.quantized), "weighted");
        assert_eq!(g.weighted.is_some(), g.dtype.uses_importance(), "{}", g.dtype);
    }
}

#[test]
fn blocks_can_be_read_at_odd_addresses() {
    for dtype in DType::WEIGHTS {
        let values = ordinary(512);
        let bytes = quantize(dtype, &values).unwrap();
        let mut straight = vec![0.0; 512];
        dequantize(dtype, &bytes, &mut straight).unwrap();
        for shift in 1..4 {
            let mut shifted = vec![0xff; shift];
            shifted.extend_from_slice(&bytes);
            let mut out = vec![0.0; 512];
            dequantize(dtype, &shifted[shift..], &mut out).unwrap();
            assert_eq!(out, straight, "{dtype} at offset {shift}");
        }
    }
}

#[test]
fn dot_is_the_product_of_the_decoded_row() {
    for dtype in DType::WEIGHTS {
        for width in [256, 1024, 1280] {
            let row = quantize(dtype, &ordinary(width)).unwrap();
            let mut decoded = vec![0.0; width];
            dequantize(dtype, &row, &mut decoded).unwrap();
            let x: Vec<f32> = (0..width).map(|i| (i as f32 * 0.37).sin()).collect();
            let exact: f64 = decoded.iter().zip(&x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
            let found = dot(dtype, &row, &x).unwrap();
            assert!(
                (f64::from(found) - exact).abs() <= 1e-6 * exact.abs().max(0.1),
                "{dtype} {width}: {found} {exact}"
            );
        }
    }
}

#[test]
fn more_bits_leave_less_error() {
    let values = &values()[..512];
    let error = |dtype| {
        let mut out = vec![0.0; values.len()];
        dequantize(dtype, &quantize(dtype, values).unwrap(), &mut out).unwrap();
        out.iter().zip(values).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
    };
    use DType::*;
    for ladder in [&[Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, F16, F32][..], &[MXFP4, Q4_0, Q5_0, Q8_0], &[Q4_1, Q5_1]] {
        for pair in ladder.windows(2) {
            assert!(error(pair[0]) > error(pair[1]), "{} against {}", pair[0], pair[1]);
        }
    }
}

#[test]
fn values_that_are_not_finite_are_named() {
    for dtype in DType::WEIGHTS {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = ordinary(512);
            values[300] = bad;
            let message = quantize(dtype, &values).unwrap_err().to_string();
            assert!(message.contains("value 300") && message.contains(dtype.name()), "{message}");
        }
    }
}

#[test]
fn values_beyond_the_scale_are_an_error_not_an_infinity() {
    for dtype in DType::WEIGHTS {
        for large in [1e5, 1e6, 1e7, 1e8, 1e9, 1e12, 1e20, 3e38f32] {
            let mut values = ordinary(512);
            values[300] = large;
            match quantize(dtype, &values) {
                Ok(bytes) => {
                    let mut out = vec![0.0; 512];
                    dequantize(dtype, &bytes, &mut out).unwrap();
                    assert!((out[300] / large - 1.0).abs() < 0.3, "{dtype}: {large} became {}", out[300]);
                }
                Err(Error::Argument(message)) => {
                    assert!(large > 65504.0 && message.contains(dtype.name()), "{message}")
                }
                Err(other) => panic!("{dtype}: {other}"),
            }
        }
    }
    let message = quantize(DType::F16, &[1.0, 70000.0]).unwrap_err().to_string();
    assert!(message.contains("values 1..2"), "{message}");
    assert!(quantize(DType::BF16, &[f32::MAX]).is_err());
    assert!(quantize(DType::Q4_K, &[1e20; 256]).is_err());
}

#[test]
fn wrong_lengths_and_types_are_errors() {
    for dtype in DType::WEIGHTS {
        let bytes = quantize(dtype, &ordinary(256)).unwrap();
        let mut out = vec![0.0; 256];
        assert!(dequantize(dtype, &bytes[1..], &mut out).is_err(), "{dtype}");
        assert!(dequantize(dtype, &bytes, &mut out[1..]).is_err(), "{dtype}");
        assert!(dot(dtype, &bytes, &out[1..]).is_err(), "{dtype}");
        assert!(quantize_into(dtype, &out, &mut bytes.clone()[1..]).is_err(), "{dtype}");
        assert!(quantize_weighted(dtype, &out, &[]).is_err(), "{dtype}");
        assert!(quantize_weighted(dtype, &out, &[-1.0; 256]).is_err(), "{dtype}");
        if dtype.is_quantized() {
            assert!(quantize(dtype, &out[1..]).is_err(), "{dtype}");
        }
    }
    assert!(dequantize(DType::I32, &[0; 4], &mut [0.0]).is_err());
    assert!(quantize(DType::F64, &[0.0]).is_err());
}

#[test]
fn any_bytes_decode_without_panic() {
    let mut state = 1u32;
    for dtype in DType::WEIGHTS {
        let mut bytes = vec![0; dtype.row_bytes(1024).unwrap()];
        for fill in [None, Some(0xff), Some(0x80), Some(0x7c)] {
            for byte in &mut bytes {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = fill.unwrap_or((state >> 24) as u8);
            }
            dequantize(dtype, &bytes, &mut vec![0.0; 1024]).unwrap();
            dot(dtype, &bytes, &ordinary(1024)).unwrap();
        }
    }
}
