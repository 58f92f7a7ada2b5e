//! Block formats against ggml: reading bit for bit, writing byte for byte, for every weight type.
//!
//! ggml's `to_float` and `ggml_quantize_chunk` (without an importance matrix) are what the bits in a GGUF file mean.
//! The legacy and dense types have one right encoding. The K-quants and `IQ4` search for good scales, and another
//! compiler's rounding may tip a search: there our error may exceed ggml's by 2 % at most.

use kinglet_engine::gguf::Gguf;
use kinglet_engine::quant::{DType, dequantize, dot, quantize};
use kinglet_tests::data::{MODELS, Random, model};
use kinglet_tests::oracle;

/// Widths of several blocks: below, at and above 1024.
const WIDTHS: [usize; 3] = [256, 1024, 2816];

fn ours(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / dtype.block_bytes() * dtype.block_len()];
    dequantize(dtype, bytes, &mut values).expect("lengths fit");
    values
}

/// Fails at the first value whose bits differ; NaNs are equal.
fn assert_same_bits(what: &str, ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan());
    if let Some(i) = ours.iter().zip(theirs).position(differs) {
        panic!("{what}: value {i} is {:e}, ggml reads {:e}", ours[i], theirs[i]);
    }
}

fn rmse(values: &[f32], of: &[f32]) -> f64 {
    let sum: f64 = values.iter().zip(of).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    (sum / values.len() as f64).sqrt()
}

/// Data like weights: normal, with rows of different scale, some outliers, and a row of zeros.
fn weights(random: &mut Random, width: usize, rows: usize) -> Vec<f32> {
    let mut values = Vec::with_capacity(width * rows);
    for row in 0..rows {
        let scale = if row == 0 { 0.0 } else { 0.02 * (1.0 + row as f32) };
        values.extend((0..width).map(|_| {
            let outlier = if random.below(97) == 0 { 8.0 } else { 1.0 };
            random.normal() * scale * outlier
        }));
    }
    values
}

/// Whether the encoding is determined (no search).
fn is_determined(dtype: DType) -> bool {
    use DType::*;
    matches!(dtype, F32 | F16 | BF16 | Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q8_K | MXFP4)
}

/// `ggml_quantize_chunk` has no entry for the activation type.
fn ggml_encodes(dtype: DType) -> bool {
    dtype != DType::Q8_K
}

#[test]
fn block_sizes_are_ggmls() {
    for dtype in DType::ALL {
        let info = oracle::type_info(dtype.ggml());
        assert_eq!((info.block_len, info.block_bytes), (dtype.block_len(), dtype.block_bytes()), "{dtype}");
    }
}

#[test]
fn reading_is_bit_equal_on_weights() {
    let mut random = Random::new(1);
    for dtype in DType::WEIGHTS.into_iter().filter(|t| ggml_encodes(*t)) {
        for width in WIDTHS {
            let bytes = oracle::quantize(dtype.ggml(), &weights(&mut random, width, 4), width);
            let Some(theirs) = oracle::dequantize(dtype.ggml(), &bytes) else {
                assert_eq!(dtype, DType::F32, "ggml cannot read {dtype}");
                continue;
            };
            assert_same_bits(&format!("{dtype}, width {width}"), &ours(dtype, &bytes), &theirs);
        }
    }
}

#[test]
fn reading_is_bit_equal_on_any_bytes() {
    let mut random = Random::new(2);
    for dtype in DType::WEIGHTS {
        let bytes: Vec<u8> = (0..64 * dtype.block_bytes()).map(|_| random.bits() as u8).collect();
        let Some(theirs) = oracle::dequantize(dtype.ggml(), &bytes) else { continue };
        assert_same_bits(&format!("{dtype}, random bytes"), &ours(dtype, &bytes), &theirs);
    }
}

#[test]
fn writing_is_ggmls() {
    let mut random = Random::new(3);
    let mut report = Vec::new();
    for dtype in DType::WEIGHTS.into_iter().filter(|t| ggml_encodes(*t)) {
        let (mut same, mut blocks) = (0, 0);
        for width in WIDTHS {
            let values = weights(&mut random, width, 8);
            let bytes = quantize(dtype, &values).expect("finite values of whole blocks");
            let theirs = oracle::quantize(dtype.ggml(), &values, width);
            let pairs = bytes.chunks(dtype.block_bytes()).zip(theirs.chunks(dtype.block_bytes()));
            same += pairs.clone().filter(|(a, b)| a == b).count();
            blocks += pairs.len();
            if is_determined(dtype) {
                assert!(bytes == theirs, "{dtype}, width {width}: bytes differ from ggml's");
            }
            let (e, theirs) = (rmse(&values, &ours(dtype, &bytes)), rmse(&values, &ours(dtype, &theirs)));
            assert!(e <= 1.02 * theirs, "{dtype}, width {width}: error {e:e}, ggml's {theirs:e}");
        }
        report.push(format!("{dtype}: {same} of {blocks} blocks byte-equal"));
    }
    println!("{}", report.join("\n"));
}

#[test]
fn real_tensors_read_and_write_alike() {
    for id in MODELS {
        let gguf = Gguf::open(model(id)).expect("the model opens");
        let mut seen = Vec::new();
        for tensor in gguf.tensors() {
            if seen.contains(&tensor.dtype) {
                continue;
            }
            seen.push(tensor.dtype);
            let width = tensor.width();
            let row = tensor.dtype.row_bytes(width).expect("whole blocks");
            let data = gguf.data(tensor);
            let bytes = &data[..data.len().min(64 * row)];
            let what = format!("{id}, {} ({})", tensor.name, tensor.dtype);
            let values = ours(tensor.dtype, bytes);
            if let Some(theirs) = oracle::dequantize(tensor.dtype.ggml(), bytes) {
                assert_same_bits(&what, &values, &theirs);
            }
            // The real distribution, written in every type its width allows.
            for dtype in DType::WEIGHTS.into_iter().filter(|t| ggml_encodes(*t) && t.row_bytes(width).is_some()) {
                let mine = quantize(dtype, &values).expect("finite weights");
                let theirs = oracle::quantize(dtype.ggml(), &values, width);
                if is_determined(dtype) {
                    assert!(mine == theirs, "{what} as {dtype}: bytes differ from ggml's");
                }
                let (e, theirs) = (rmse(&values, &ours(dtype, &mine)), rmse(&values, &ours(dtype, &theirs)));
                assert!(e <= 1.02 * theirs, "{what} as {dtype}: error {e:e}, ggml's {theirs:e}");
            }
        }
        assert!(seen.len() >= 3, "{id} has few types: {seen:?}");
    }
}

/// Ours multiplies exact activations, ggml's kernels quantize them to 8 bits first: the two differ by that rounding,
/// which is below 1 % of `|row| · |x|`.
#[test]
fn dot_products_agree_with_ggmls_kernels() {
    let mut random = Random::new(4);
    for dtype in DType::WEIGHTS.into_iter().filter(|t| ggml_encodes(*t)) {
        for width in WIDTHS {
            let values = random.normals(width, 0.1);
            let x = random.normals(width, 1.0);
            let bytes = oracle::quantize(dtype.ggml(), &values, width);
            let Some(theirs) = oracle::dot(dtype.ggml(), &bytes, &x) else { continue };
            let mine = dot(dtype, &bytes, &x).expect("lengths fit");
            let row = ours(dtype, &bytes);
            let norm = |v: &[f32]| v.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>().sqrt();
            let bound = 0.01 * norm(&row) * norm(&x);
            let apart = f64::from(mine - theirs).abs();
            assert!(apart <= bound, "{dtype}, width {width}: {mine} and ggml's {theirs} are {apart} apart");
        }
    }
}
