//! Both directions against f64 within what two roundings may cost, over all types, shapes and tails; every instruction
//! set against the specification; that a split does not show.

#![allow(clippy::single_range_in_vec_init)]

use super::super::tests::{Case, PAD, Random};
use super::super::{Activations, LinearTask};
use super::*;

impl Case {
    fn wide_forward(&self, isa: Isa, ranges: &[Range<usize>], start: f32, accumulate: bool) -> Vec<f32> {
        let mut y = vec![start; self.tokens * (self.rows + PAD)];
        let buffer = rounded::<i16>(isa, &self.x, self.k + PAD, self.tokens, self.k);
        let wide = Some(Rounded::new(bytemuck::cast_slice(&buffer), self.tokens, self.k).unwrap());
        let x = Activations {
            f32s: &self.x,
            q8: None,
            tiled: None,
            low: None,
            wide,
            tokens: self.tokens,
            k: self.k,
            stride: self.k + PAD,
        };
        // SAFETY: `y` outlives the calls.
        let out = unsafe { OutMut::new(y.as_mut_ptr(), self.rows + PAD, y.len()) };
        for rows in ranges {
            let (dtype, weight, k, rows) = (self.dtype, &self.weight[..], self.k, rows.clone());
            let task = LinearTask { dtype, weight, k, rows, x: &x, out, accumulate };
            linear_wide(isa, &task, &mut Scratch::new()).unwrap();
        }
        y
    }

    fn rounded_backward<Q: Level>(&self, isa: Isa, ranges: &[Range<usize>], start: f32, accumulate: bool) -> Vec<f32> {
        let mut dx = vec![start; self.tokens * (self.k + PAD)];
        let buffer = rounded::<Q>(isa, &self.dy, self.rows + PAD, self.tokens, self.rows);
        let dy = Rounded::<Q>::new(bytemuck::cast_slice(&buffer), self.tokens, self.rows).unwrap();
        // SAFETY: `dx` outlives the calls.
        let out = unsafe { OutMut::new(dx.as_mut_ptr(), self.k + PAD, dx.len()) };
        for columns in ranges {
            let (dtype, weight, k, columns) = (self.dtype, &self.weight[..], self.k, columns.clone());
            let task = RoundedBackwardTask { dtype, weight, k, columns, dy: &dy, dx: out, accumulate };
            linear_backward_rounded(isa, &task, &mut Scratch::new()).unwrap();
        }
        dx
    }
}

#[test]
fn chunks_are_whole_units_that_fit() {
    for k in [1, 255, 256, 300, 512, 513, 576, 800, 896, 1024, 1025, 1537, 4864] {
        let mut end = 0;
        for chunk in chunks(k) {
            assert!(
                chunk.start == end && chunk.start % UNIT == 0 && (1..=FORWARD_COLUMNS).contains(&chunk.len()),
                "{k}"
            );
            end = chunk.end;
        }
        assert_eq!(end, k);
    }
}

/// Rounded rows; what lies behind them was not zero.
fn rounded<Q: Level>(isa: Isa, x: &[f32], stride: usize, tokens: usize, k: usize) -> Vec<u64> {
    let mut buffer = vec![u64::MAX; rounded_bytes::<Q>(tokens, k).div_ceil(8)];
    // SAFETY: large enough, and this function's own.
    let dst = unsafe { RoundedMut::new(buffer.as_mut_ptr().cast(), tokens, k) };
    round_rows::<Q>(isa, x, stride, 0..tokens, &dst).unwrap();
    buffer
}

fn shapes(dtype: DType) -> &'static [(usize, usize, usize)] {
    match dtype.block_len() {
        1 => &[(1, 1, 1), (31, 5, 7), (257, 97, 13), (300, 200, 5), (1537, 20, 2)],
        32 => &[(32, 3, 1), (96, 97, 6), (288, 200, 19), (1056, 33, 7)],
        _ => &[(256, 3, 1), (512, 97, 19), (1280, 200, 6)],
    }
}

/// The product of activations and weights in f64, and the most that rounding either by the largest of a group may
/// change it.
fn product<Q: Level>(x: &[f64], w: &[f64]) -> (f64, f64) {
    let most = |v: &[f64]| v.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let (mut sum, mut error) = (0.0, 0.0);
    for (x, w) in x.chunks(GROUP).zip(w.chunks(GROUP)) {
        let (ex, ew) = (0.5 * most(x) / f64::from(Q::MOST), 0.5 * most(w) / f64::from(Q::MOST_WEIGHT));
        for (x, w) in x.iter().zip(w) {
            sum += x * w;
            error += x.abs() * ew + w.abs() * ex + 2.0 * ex * ew;
        }
    }
    (sum, error)
}

/// Errors of all results relative to their bounds, squared and summed, with their number.
#[derive(Default)]
struct Errors {
    sum: f64,
    count: usize,
}

impl Errors {
    /// `slack` is for weights whose scale is one for a longer block than a group: they are of one size here.
    fn check(&mut self, got: f32, start: f32, (sum, bound): (f64, f64), slack: f64, what: &dyn Fn() -> String) {
        let bound = slack * bound + 3e-6 * (sum.abs() + f64::from(start.abs())) + 1e-7;
        let error = (f64::from(got) - sum - f64::from(start)).abs() / bound;
        assert!(error <= 1.0, "{}: {got}, not {sum} + {start} ± {bound}", what());
        self.sum += error * error;
        self.count += 1;
    }

    /// Roundings are independent: the usual error is far below the worst.
    fn assert_usual(&self, isa: Isa) {
        let usual = (self.sum / self.count as f64).sqrt();
        assert!((1e-4..0.1).contains(&usual), "{}: {usual} of the bound", isa.name());
    }
}

/// All types and shapes, with and without something to add to.
fn cases(mut check: impl FnMut(&Case, bool)) {
    for dtype in DType::WEIGHTS {
        for &(k, rows, tokens) in shapes(dtype) {
            let case = Case::new(dtype, k, rows, tokens);
            [false, true].into_iter().for_each(|accumulate| check(&case, accumulate));
        }
    }
}

/// What the results begin with, and what they should not depend on where nothing is added.
fn begins(accumulate: bool) -> (f32, f32) {
    if accumulate { (0.5, 0.5) } else { (0.0, f32::NAN) }
}

#[test]
fn the_map_agrees_with_f64_over_types_and_shapes() {
    for isa in Isa::available() {
        let mut errors = Errors::default();
        cases(|case, accumulate| {
            let Case { k, rows, .. } = *case;
            let (start, before) = begins(accumulate);
            let from = rows / 3;
            let y = case.wide_forward(isa, &[from..rows], before, accumulate);
            for (at, &got) in y.iter().enumerate() {
                let (t, r) = (at / (rows + PAD), at % (rows + PAD));
                if r < from || r >= rows {
                    assert_eq!(got.to_bits(), before.to_bits(), "wrote outside");
                    continue;
                }
                let x: Vec<f64> = case.x[t * (k + PAD)..][..k].iter().map(|v| f64::from(*v)).collect();
                let want = product::<i16>(&x, &case.decoded[r * k..][..k]);
                errors.check(got, start, want, 3.0, &|| format!("{case} {} y[{t}][{r}]", isa.name()));
            }
        });
        errors.assert_usual(isa);
    }
}

fn the_gradient_agrees_with_f64<Q: Level>(slack: f64) {
    for isa in Isa::available() {
        let mut errors = Errors::default();
        cases(|case, accumulate| {
            let Case { k, rows, .. } = *case;
            let (start, before) = begins(accumulate);
            let from = k / 3 / 32 * 32;
            let dx = case.rounded_backward::<Q>(isa, &[from..k], before, accumulate);
            for (at, &got) in dx.iter().enumerate() {
                let (t, c) = (at / (k + PAD), at % (k + PAD));
                if c < from || c >= k {
                    assert_eq!(got.to_bits(), before.to_bits(), "wrote outside");
                    continue;
                }
                let dy: Vec<f64> = case.dy[t * (rows + PAD)..][..rows].iter().map(|v| f64::from(*v)).collect();
                let column: Vec<f64> = (0..rows).map(|r| case.decoded[r * k + c]).collect();
                let want = product::<Q>(&dy, &column);
                errors.check(got, start, want, slack, &|| format!("{case} {} dx[{t}][{c}]", isa.name()));
            }
        });
        errors.assert_usual(isa);
    }
}

#[test]
fn the_gradient_in_16_bits_agrees_with_f64_over_types_and_shapes() {
    the_gradient_agrees_with_f64::<i16>(3.0);
}

#[test]
fn the_gradient_in_8_bits_agrees_with_f64_over_types_and_shapes() {
    the_gradient_agrees_with_f64::<u8>(1.0);
}

/// Wider vectors sum in the same order.
#[test]
#[cfg(target_arch = "x86_64")]
fn avx512_gives_the_bits_of_avx2() {
    use crate::cpu::isa::{Avx2, Avx512};
    let (Some(narrow), Some(broad)) = (Avx2::detect(), Avx512::detect()) else { return };
    let (narrow, broad) = (Isa::Avx2(narrow), Isa::Avx512(broad));
    for dtype in [DType::F32, DType::Q4_1, DType::Q6_K] {
        for (k, rows, tokens) in [(256, 3, 1), (512, 97, 19), (1280, 70, 13), (768, 400, 5), (256, 33, 260)] {
            let case = Case::new(dtype, k, rows, tokens);
            for accumulate in [false, true] {
                let forward = |isa| case.wide_forward(isa, std::slice::from_ref(&(1..rows)), 0.5, accumulate);
                assert!(forward(narrow) == forward(broad), "y {dtype} {k} {rows} {tokens}");
                let backward = |isa| case.rounded_backward::<i16>(isa, std::slice::from_ref(&(32..k)), 0.5, accumulate);
                assert!(backward(narrow) == backward(broad), "dx {dtype} {k} {rows} {tokens}");
            }
        }
    }
}

/// The specification rounds the same values by the same scales, so only the order of f32 sums may differ, and a weight
/// that the unpackers round differently in its last bit.
#[test]
fn every_instruction_set_meets_the_specification() {
    cases(|case, _| {
        let results = |isa| {
            let y = case.wide_forward(isa, std::slice::from_ref(&(0..case.rows)), 0.0, false);
            let dx = case.rounded_backward::<i16>(isa, std::slice::from_ref(&(0..case.k)), 0.0, false);
            let dx8 = case.rounded_backward::<u8>(isa, std::slice::from_ref(&(0..case.k)), 0.0, false);
            [y, dx, dx8]
        };
        let want = results(Isa::Scalar);
        for isa in Isa::available() {
            for (which, (got, want)) in results(isa).iter().zip(&want).enumerate() {
                let most = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let far = got.iter().zip(want).filter(|(got, want)| (*got - *want).abs() > 1e-5 * most).count();
                // That last bit may decide which of two steps a weight in 8 bits is rounded to.
                let few = if which == 2 { got.len() / 100 } else { 0 };
                assert!(far <= few, "{case} {}: {far} of {} results of kind {which}", isa.name(), got.len());
            }
        }
    });
}

#[test]
fn rounding_is_the_same_on_every_instruction_set() {
    let mut random = Random(7);
    for k in [1, 31, 32, 33, 100, 576] {
        let mut x: Vec<f32> = (0..3 * k).map(|i| random.unit() * 10f32.powi(i as i32 % 9 - 4)).collect();
        x[k / 2] = 0.0;
        x[2 * k..].fill(1e-38);
        fn of<Q: Level>(isa: Isa, x: &[f32], k: usize) -> (Vec<Q>, Vec<f32>) {
            let buffer = rounded::<Q>(isa, x, k, 3, k);
            let rows = Rounded::new(bytemuck::cast_slice(&buffer), 3, k).unwrap();
            (rows.q.to_vec(), rows.d.to_vec())
        }
        for isa in Isa::available() {
            assert_eq!(of::<i16>(isa, &x, k), of::<i16>(Isa::Scalar, &x, k), "{} {k}", isa.name());
            assert_eq!(of::<u8>(isa, &x, k), of::<u8>(Isa::Scalar, &x, k), "{} {k}", isa.name());
        }
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    let case = Case::new(DType::Q8_0, 64, 40, 3);
    for isa in Isa::available() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = case.x.clone();
            x[64 + PAD + 5] = bad;
            let y = Case { x, weight: case.weight.clone(), decoded: vec![], dy: case.dy.clone(), ..case }.wide_forward(
                isa,
                std::slice::from_ref(&(0..40)),
                0.0,
                false,
            );
            for (t, row) in y.chunks_exact(40 + PAD).enumerate() {
                assert!(row[..40].iter().all(|v| v.is_nan() == (t == 1)), "{} {t}", isa.name());
            }
        }
    }
}

/// Weights that are no numbers spoil their column of the gradient, in whichever group of rows they are, and no other.
#[test]
fn a_weight_that_is_not_finite_stays_in_its_column() {
    for isa in Isa::available() {
        let mut case = Case::new(DType::F32, 64, 140, 3);
        case.weight[4 * (70 * 64 + 5)..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
        let eight = case.rounded_backward::<u8>(isa, std::slice::from_ref(&(0..64)), 0.0, false);
        let sixteen = case.rounded_backward::<i16>(isa, std::slice::from_ref(&(0..64)), 0.0, false);
        for row in eight.chunks_exact(64 + PAD).chain(sixteen.chunks_exact(64 + PAD)) {
            assert!(row[..64].iter().enumerate().all(|(c, v)| v.is_nan() == (c == 5)), "{}", isa.name());
        }
    }
}

#[test]
fn the_split_does_not_show() {
    for isa in Isa::available() {
        for dtype in [DType::F16, DType::Q4_1, DType::Q6_K] {
            let case = Case::new(dtype, 512, 150, 23);
            let whole = case.wide_forward(isa, std::slice::from_ref(&(0..150)), 0.25, true);
            assert!(case.wide_forward(isa, &[0..1, 1..70, 70..70, 70..150], 0.25, true) == whole, "{dtype}");
            fn same<Q: Level>(case: &Case, isa: Isa) -> bool {
                let whole = case.rounded_backward::<Q>(isa, std::slice::from_ref(&(0..512)), 0.25, true);
                case.rounded_backward::<Q>(isa, &[0..32, 32..288, 288..288, 288..512], 0.25, true) == whole
            }
            assert!(same::<i16>(&case, isa) && same::<u8>(&case, isa), "{dtype}");
        }
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let case = Case::new(DType::Q8_0, 64, 4, 2);
    let buffer = rounded::<i16>(Isa::Scalar, &case.dy, 4 + PAD, 2, 4);
    let dy = Rounded::<i16>::new(bytemuck::cast_slice(&buffer), 2, 4).unwrap();
    assert!(Rounded::<i16>::new(&bytemuck::cast_slice(&buffer)[1..], 2, 4).is_err());
    let mut dx = vec![0.0; 2 * 64];
    // SAFETY: `dx` outlives the calls.
    let (out, short, narrow) = unsafe {
        let at = dx.as_mut_ptr();
        (OutMut::new(at, 64, 128), OutMut::new(at, 64, 127), OutMut::new(at, 63, 128))
    };
    let (dtype, weight, k, accumulate) = (DType::Q8_0, &case.weight[..], 64, false);
    let good = RoundedBackwardTask { dtype, weight, k, columns: 0..64, dy: &dy, dx: out, accumulate };
    let refused = |task: RoundedBackwardTask<'_, Rounded<'_, i16>>, word: &str| {
        let message = linear_backward_rounded(Isa::detect(), &task, &mut Scratch::new()).expect_err(word).to_string();
        assert!(message.contains(word), "{message}");
    };
    refused(RoundedBackwardTask { weight: &weight[1..], ..good.clone() }, "matrix");
    refused(RoundedBackwardTask { k: 48, ..good.clone() }, "multiple of 32");
    refused(RoundedBackwardTask { dtype: DType::I8, ..good.clone() }, "type");
    refused(RoundedBackwardTask { columns: 16..64, ..good.clone() }, "groups");
    refused(RoundedBackwardTask { columns: 0..96, ..good.clone() }, "groups");
    refused(RoundedBackwardTask { dx: short, ..good.clone() }, "dx");
    refused(RoundedBackwardTask { dx: narrow, ..good.clone() }, "dx");
    linear_backward_rounded(Isa::detect(), &good, &mut Scratch::new()).unwrap();
    let x =
        Activations { f32s: &case.x, q8: None, tiled: None, wide: None, low: None, tokens: 2, k: 64, stride: 64 + PAD };
    let task = LinearTask { dtype, weight, k, rows: 0..4, x: &x, out, accumulate };
    let message = linear_wide(Isa::detect(), &task, &mut Scratch::new()).unwrap_err().to_string();
    assert!(message.contains("16 bits"), "{message}");
}
