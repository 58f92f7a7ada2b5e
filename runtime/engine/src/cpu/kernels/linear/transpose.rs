//! The linear map backward, and forward with exact activations: products of f32 rows with the weights as f32.
//!
//! The weights are frozen, so only the gradient with respect to the input is wanted,
//!   dx[t][c] = Σᵣ dy[t][r] · W[r][c],
//! the same matrix transposed. [`linear_exact`] is the forward map y[t][r] = Σ_c x[t][c] · W[r][c] without the rounding
//! of activations to 8 bits: what gradients are checked against, and an alternative for training.
//!
//! Both unpack a block of the matrix once, to f32 in scratch that stays in the second cache, and multiply it with all
//! tokens of the task in register tiles (`gemm`): the cost of unpacking is shared by all tokens, so a K-quant is as fast
//! as Q8_0.
//!
//! | | block | in scratch | sums |
//! | --- | --- | --- | --- |
//! | backward | 96 rows × 256 columns | `[columns/16][96][16]` | over rows, 96 at a time |
//! | exact | 64 rows × 256 columns | `[rows/16][256][16]`, transposed 8 × 8 | over columns, 256 at a time |
//!
//! The order of a sum depends neither on the tokens nor on the rows of the task: any split over threads gives the same
//! bits.

use super::{LinearTask, OutMut, Scratch, matrix_fault};
use crate::cpu::isa::Isa;
use crate::cpu::kernels::vector::dot_body;
use crate::quant::{DType, dequantize};
use crate::{Error, Result};
use std::ops::Range;

/// Columns that are unpacked at a time: a unit of every format.
const UNIT: usize = 256;

/// One thread's share of the backward pass of a linear map.
#[derive(Clone, Debug)]
pub struct LinearBackwardTask<'a> {
    /// Type of the weights.
    pub dtype: DType,
    /// The whole matrix: `rows` rows of `dtype.row_bytes(k)` bytes, one after the other.
    pub weight: &'a [u8],
    /// Values in a row, which is the width of dx; a multiple of `dtype.block_len()`.
    pub k: usize,
    /// Rows of the matrix, which is the width of dy.
    pub rows: usize,
    /// The gradient of the output: token t is `dy[t * dy_stride ..][.. rows]`.
    pub dy: &'a [f32],
    /// Distance between tokens in `dy`, in values.
    pub dy_stride: usize,
    /// The tokens to compute; threads divide these.
    pub tokens: Range<usize>,
    /// The gradient of the input, `dx[t][c]`; only the task's tokens are written.
    pub dx: OutMut,
    /// Add to `dx` instead of overwriting it.
    pub accumulate: bool,
}

/// Adds the gradient with respect to the input of a linear map to `dx`, or stores it there.
///
/// # Errors
/// [`Error::Argument`] before anything is written, when a size does not fit.
pub fn linear_backward(isa: Isa, task: &LinearBackwardTask<'_>, scratch: &mut Scratch) -> Result<()> {
    check(task)?;
    if task.tokens.is_empty() || task.k == 0 {
        return Ok(());
    }
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    if crate::cpu::kernels::lanes::runs(isa) && task.rows > 0 {
        // SAFETY: the token in `isa` proves the instructions; everything is in bounds.
        unsafe { lanes::backward_of(task.dtype)(task, scratch) };
        return Ok(());
    }
    let _ = (isa, scratch);
    backward_scalar(task)
}

/// As [`linear`](super::linear), but with the f32 rows of the input for every type; `task.x.q8` is not read.
///
/// # Errors
/// [`Error::Argument`] before anything is written, when a size does not fit.
pub fn linear_exact(isa: Isa, task: &LinearTask<'_>, scratch: &mut Scratch) -> Result<()> {
    super::check_sizes(task, super::Form::F32)?;
    if task.rows.is_empty() || task.x.tokens == 0 {
        return Ok(());
    }
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    if crate::cpu::kernels::lanes::runs(isa) && task.k > 0 {
        // SAFETY: the token in `isa` proves the instructions; everything is in bounds.
        unsafe { lanes::exact_of(task.dtype)(task, scratch) };
        return Ok(());
    }
    let _ = (isa, scratch);
    exact_scalar(task)
}

fn check(task: &LinearBackwardTask<'_>) -> Result<()> {
    let LinearBackwardTask { dtype, weight, k, rows, dy, dy_stride, tokens, dx, .. } = task;
    let misfit = |what: String| {
        Err(Error::argument(format!(
            "linear map backward, {rows} {dtype} rows of {k} values, tokens {tokens:?}: {what}"
        )))
    };
    if let Some(fault) = matrix_fault(*dtype, weight, *rows, *k) {
        return misfit(fault);
    }
    if tokens.start > tokens.end {
        return misfit("the range is reversed".into());
    }
    if tokens.is_empty() {
        return Ok(());
    }
    let reach = |stride: usize, width: usize| (tokens.end - 1).checked_mul(stride).and_then(|n| n.checked_add(width));
    if reach(*dy_stride, *rows).is_none_or(|n| n > dy.len()) {
        return misfit(format!("dy has {} values at stride {dy_stride}", dy.len()));
    }
    if reach(dx.stride, *k).is_none_or(|n| n > dx.len) || dx.stride < *k {
        return misfit(format!("dx has {} values at stride {}", dx.len, dx.stride));
    }
    Ok(())
}

/// Calls `f(first column, values)` for each unit of row `row`, unpacked by the format's specification.
fn units(dtype: DType, weight: &[u8], k: usize, row: usize, mut f: impl FnMut(usize, &[f32])) -> Result<()> {
    let row_bytes = k / dtype.block_len() * dtype.block_bytes();
    let unit_bytes = UNIT / dtype.block_len() * dtype.block_bytes();
    let mut values = [0.0; UNIT];
    for (u, bytes) in weight[row * row_bytes..(row + 1) * row_bytes].chunks(unit_bytes).enumerate() {
        let values = &mut values[..UNIT.min(k - UNIT * u)];
        dequantize(dtype, bytes, values)?;
        f(UNIT * u, values);
    }
    Ok(())
}

/// The specification of [`linear_backward`].
fn backward_scalar(task: &LinearBackwardTask<'_>) -> Result<()> {
    let dx = |t: usize, columns: Range<usize>| {
        // SAFETY: `check` has found the row in bounds; the caller of `OutMut::new` vouched for it being ours alone, and
        // one such slice is alive at a time.
        unsafe { std::slice::from_raw_parts_mut(task.dx.base.add(t * task.dx.stride + columns.start), columns.len()) }
    };
    if !task.accumulate {
        task.tokens.clone().for_each(|t| dx(t, 0..task.k).fill(0.0));
    }
    for r in 0..task.rows {
        units(task.dtype, task.weight, task.k, r, |c, w| {
            for t in task.tokens.clone() {
                let dy = task.dy[t * task.dy_stride + r];
                dx(t, c..c + w.len()).iter_mut().zip(w).for_each(|(dx, w)| *dx += dy * w);
            }
        })?;
    }
    Ok(())
}

/// The specification of [`linear_exact`].
fn exact_scalar(task: &LinearTask<'_>) -> Result<()> {
    for r in task.rows.clone() {
        if task.k == 0 {
            // SAFETY: `check_sizes` has found the place in bounds.
            (0..task.x.tokens).for_each(|t| unsafe { task.out.write(t, r, 0.0, task.accumulate) });
        }
        units(task.dtype, task.weight, task.k, r, |c, w| {
            for t in 0..task.x.tokens {
                let sum = dot_body(&task.x.f32s[t * task.x.stride + c..][..w.len()], w);
                // SAFETY: as above.
                unsafe { task.out.write(t, r, sum, task.accumulate || c > 0) };
            }
        })?;
    }
    Ok(())
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod lanes {
    //! In lanes. Functions marked `inline(always)` are inlined into those with the features.
    use super::super::source::{Source, by_type, unpack_turned};
    use super::super::{LinearTask, Scratch, scratch_bytes};
    use super::{LinearBackwardTask, UNIT};
    use crate::cpu::kernels::gemm::lanes::{Left, Slab, Target, slab};
    use crate::quant::DType;

    /// Rows of a block of the backward pass.
    const ROWS: usize = 96;
    /// Rows of a block of the exact forward map.
    const EXACT_ROWS: usize = 64;
    /// Tokens that go by between two looks at the same part of dx.
    const TOKENS: usize = 256;

    const _: () = assert!(4 * ROWS * UNIT <= scratch_bytes() && 4 * (EXACT_ROWS + 8) * UNIT <= scratch_bytes());

    type Backward = unsafe fn(&LinearBackwardTask<'_>, &mut Scratch);
    type Exact = unsafe fn(&LinearTask<'_>, &mut Scratch);

    /// The backward pass for a type; to be called with the instructions of lanes, and a task that has been checked.
    pub(super) fn backward_of(dtype: DType) -> Backward {
        by_type!(dtype, backward)
    }

    /// The exact forward map for a type, likewise.
    pub(super) fn exact_of(dtype: DType) -> Exact {
        by_type!(dtype, exact)
    }

    /// # Safety
    /// The task has been checked and has rows and columns.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
    unsafe fn backward<S: Source>(task: &LinearBackwardTask<'_>, scratch: &mut Scratch) {
        let Some(row_bytes) = task.dtype.row_bytes(task.k) else { return };
        let panel = scratch.lines.as_mut_ptr().cast::<f32>();
        for column in (0..task.k).step_by(UNIT) {
            let columns = UNIT.min(task.k - column);
            for r in (0..task.rows).step_by(ROWS) {
                let rows = ROWS.min(task.rows - r);
                for i in 0..rows {
                    // SAFETY: row r + i of the matrix from a unit's beginning; the panel holds ROWS × UNIT values.
                    unsafe {
                        let unit = task.weight.as_ptr().add((r + i) * row_bytes + column / UNIT * S::UNIT_BYTES);
                        S::unpack(unit, 0..columns, panel.add(16 * i), 16 * ROWS);
                    }
                }
                for t in task.tokens.clone().step_by(TOKENS) {
                    let tokens = TOKENS.min(task.tokens.end - t);
                    for c in (0..columns).step_by(16) {
                        // SAFETY: `check` has found tokens, rows and columns in bounds of dy and dx.
                        unsafe {
                            let dy = task.dy.as_ptr().add(t * task.dy_stride + r);
                            let dx = task.dx.base.add(t * task.dx.stride + column + c);
                            slab::<2>(
                                tokens,
                                rows,
                                Left { at: dy, row: task.dy_stride, step: 1 },
                                Slab { at: panel.add(c * ROWS), row: 16 },
                                Target {
                                    at: dx,
                                    row: task.dx.stride,
                                    columns: 16.min(columns - c),
                                    alpha: 1.0,
                                    add: task.accumulate || r > 0,
                                },
                            );
                        }
                    }
                }
            }
        }
    }

    /// # Safety
    /// The task has been checked and has rows and columns.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
    unsafe fn exact<S: Source>(task: &LinearTask<'_>, scratch: &mut Scratch) {
        let Some(row_bytes) = task.dtype.row_bytes(task.k) else { return };
        let panel = scratch.lines.as_mut_ptr().cast::<f32>();
        // SAFETY: within the scratch, as asserted above.
        let eight = unsafe { panel.add(EXACT_ROWS * UNIT) };
        let x = &task.x;
        for r in task.rows.clone().step_by(EXACT_ROWS) {
            let rows = EXACT_ROWS.min(task.rows.end - r);
            for column in (0..task.k).step_by(UNIT) {
                let columns = UNIT.min(task.k - column);
                // SAFETY: rows of the matrix from a unit's beginning; both parts of the scratch have room.
                unsafe {
                    let at = |i: usize| task.weight.as_ptr().add((r + i) * row_bytes + column / UNIT * S::UNIT_BYTES);
                    unpack_turned::<S>(at, rows, columns, (panel, 16 * UNIT), eight);
                }
                for t in (0..x.tokens).step_by(TOKENS) {
                    let tokens = TOKENS.min(x.tokens - t);
                    for i in (0..rows).step_by(16) {
                        // SAFETY: the check has found tokens, rows and columns in bounds of x and y.
                        unsafe {
                            slab::<2>(
                                tokens,
                                columns,
                                Left { at: x.f32s.as_ptr().add(t * x.stride + column), row: x.stride, step: 1 },
                                Slab { at: panel.add(i * UNIT), row: 16 },
                                Target {
                                    at: task.out.base.add(t * task.out.stride + r + i),
                                    row: task.out.stride,
                                    columns: 16.min(rows - i),
                                    alpha: 1.0,
                                    add: task.accumulate || column > 0,
                                },
                            );
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::single_range_in_vec_init)]

    use super::super::tests::{Case, PAD};
    use super::super::{Activations, LinearTask};
    use super::*;

    impl Case {
        fn backward(&self, isa: Isa, ranges: &[Range<usize>], start: f32, accumulate: bool) -> Vec<f32> {
            let mut dx = vec![start; self.tokens * (self.k + PAD)];
            // SAFETY: `dx` outlives the calls.
            let out = unsafe { OutMut::new(dx.as_mut_ptr(), self.k + PAD, dx.len()) };
            for tokens in ranges {
                linear_backward(isa, &self.task(tokens.clone(), out, accumulate), &mut Scratch::new()).unwrap();
            }
            dx
        }

        fn task(&self, tokens: Range<usize>, dx: OutMut, accumulate: bool) -> LinearBackwardTask<'_> {
            LinearBackwardTask {
                dtype: self.dtype,
                weight: &self.weight,
                k: self.k,
                rows: self.rows,
                dy: &self.dy,
                dy_stride: self.rows + PAD,
                tokens,
                dx,
                accumulate,
            }
        }

        fn exact(&self, isa: Isa, ranges: &[Range<usize>], start: f32, accumulate: bool) -> Vec<f32> {
            let mut y = vec![start; self.tokens * (self.rows + PAD)];
            let x = Activations {
                f32s: &self.x,
                q8: None,
                tiled: None,
                wide: None,
                low: None,
                tokens: self.tokens,
                k: self.k,
                stride: self.k + PAD,
            };
            // SAFETY: `y` outlives the calls.
            let out = unsafe { OutMut::new(y.as_mut_ptr(), self.rows + PAD, y.len()) };
            for rows in ranges {
                let (dtype, weight, k, rows) = (self.dtype, &self.weight[..], self.k, rows.clone());
                let task = LinearTask { dtype, weight, k, rows, x: &x, out, accumulate };
                linear_exact(isa, &task, &mut Scratch::new()).unwrap();
            }
            y
        }

        /// Σₜᵣ dy[t][r] · y[t][r] as a function of x, in f64, for token `t` alone.
        fn loss(&self, t: usize, x: &[f64]) -> f64 {
            let dy = &self.dy[t * (self.rows + PAD)..][..self.rows];
            dy.iter()
                .zip(self.decoded.chunks_exact(self.k))
                .map(|(dy, w)| f64::from(*dy) * w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>())
                .sum()
        }
    }

    fn shapes(dtype: DType) -> &'static [(usize, usize, usize)] {
        match dtype.block_len() {
            1 => &[(1, 1, 1), (31, 5, 7), (257, 97, 13), (1537, 20, 2)],
            32 => &[(32, 3, 1), (96, 97, 6), (288, 200, 19), (1056, 33, 7)],
            _ => &[(256, 3, 1), (512, 97, 19), (1280, 100, 6)],
        }
    }

    fn close(got: f32, terms: impl Iterator<Item = f64>, start: f32, what: &dyn Fn() -> String) {
        let (sum, size) = terms.fold((f64::from(start), f64::from(start.abs())), |(s, n), x| (s + x, n + x.abs()));
        // The last term is for scales that are rounded once more or once less than by the specification.
        assert!((f64::from(got) - sum).abs() <= 2e-6 * size + 1e-7, "{}: {got}, not {sum}", what());
    }

    #[test]
    fn both_directions_agree_with_f64_over_types_and_shapes() {
        for isa in Isa::available() {
            for dtype in DType::WEIGHTS {
                for &(k, rows, tokens) in shapes(dtype) {
                    let case = Case::new(dtype, k, rows, tokens);
                    for accumulate in [false, true] {
                        let start = if accumulate { 0.5 } else { 0.0 };
                        let what = |side: &str, t, i| {
                            format!("{side} {dtype} {} k={k} rows={rows} tokens={tokens} [{t}][{i}]", isa.name())
                        };
                        let from = tokens / 3;
                        let before = if accumulate { 0.5 } else { f32::NAN };
                        let dx = case.backward(isa, &[from..tokens], before, accumulate);
                        for (at, &got) in dx.iter().enumerate() {
                            let (t, c) = (at / (k + PAD), at % (k + PAD));
                            if t < from || c >= k {
                                assert_eq!(got.to_bits(), before.to_bits(), "wrote outside");
                                continue;
                            }
                            let terms =
                                (0..rows).map(|r| f64::from(case.dy[t * (rows + PAD) + r]) * case.decoded[r * k + c]);
                            close(got, terms, start, &|| what("dx", t, c));
                        }
                        let from = rows / 3;
                        let y = case.exact(isa, &[from..rows], before, accumulate);
                        for (at, &got) in y.iter().enumerate() {
                            let (t, r) = (at / (rows + PAD), at % (rows + PAD));
                            if r < from || r >= rows {
                                assert_eq!(got.to_bits(), before.to_bits(), "wrote outside");
                                continue;
                            }
                            let terms = (0..k).map(|c| f64::from(case.x[t * (k + PAD) + c]) * case.decoded[r * k + c]);
                            close(got, terms, start, &|| what("y", t, r));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_gradient_passes_central_differences() {
        for dtype in DType::WEIGHTS {
            let case = Case::new(dtype, dtype.block_len().max(40).next_multiple_of(dtype.block_len()), 11, 3);
            for isa in Isa::available() {
                let dx = case.backward(isa, &[0..3], 0.0, false);
                for t in 0..3 {
                    let mut x: Vec<f64> =
                        case.x[t * (case.k + PAD)..][..case.k].iter().map(|x| f64::from(*x)).collect();
                    for c in (0..case.k).step_by(3) {
                        let (at, h) = (x[c], 1e-3);
                        x[c] = at + h;
                        let up = case.loss(t, &x);
                        x[c] = at - h;
                        let slope = (up - case.loss(t, &x)) / (2.0 * h);
                        x[c] = at;
                        let got = f64::from(dx[t * (case.k + PAD) + c]);
                        assert!((got - slope).abs() < 1e-5 * (1.0 + slope.abs()), "{dtype} [{t}][{c}]: {got} {slope}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_split_does_not_show() {
        for isa in Isa::available() {
            for dtype in [DType::F16, DType::Q4_1, DType::Q6_K] {
                let case = Case::new(dtype, 512, 150, 23);
                let whole = case.backward(isa, std::slice::from_ref(&(0..23)), 0.25, true);
                assert!(case.backward(isa, &[0..1, 1..12, 12..12, 12..23], 0.25, true) == whole, "{dtype}");
                let whole = case.exact(isa, std::slice::from_ref(&(0..150)), 0.25, true);
                assert!(case.exact(isa, &[0..1, 1..70, 70..150], 0.25, true) == whole, "{dtype}");
            }
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let case = Case::new(DType::Q8_0, 64, 4, 2);
        let mut dx = vec![0.0; 2 * 64];
        // SAFETY: `dx` outlives the calls.
        let (out, short, narrow) = unsafe {
            let at = dx.as_mut_ptr();
            (OutMut::new(at, 64, 128), OutMut::new(at, 64, 127), OutMut::new(at, 63, 128))
        };
        let good = case.task(0..2, out, false);
        let refused = |task: LinearBackwardTask<'_>, word: &str| {
            let message = linear_backward(Isa::detect(), &task, &mut Scratch::new()).expect_err(word).to_string();
            assert!(message.contains(word), "{message}");
        };
        refused(LinearBackwardTask { rows: 5, ..good.clone() }, "matrix");
        refused(LinearBackwardTask { rows: usize::MAX, ..good.clone() }, "matrix");
        refused(LinearBackwardTask { k: 48, ..good.clone() }, "multiple of 32");
        refused(LinearBackwardTask { dtype: DType::I8, ..good.clone() }, "type");
        refused(LinearBackwardTask { tokens: 0..3, ..good.clone() }, "dy");
        refused(LinearBackwardTask { dx: short, ..good.clone() }, "dx");
        refused(LinearBackwardTask { dx: narrow, ..good.clone() }, "dx");
        linear_backward(Isa::detect(), &good, &mut Scratch::new()).unwrap();
    }
}
