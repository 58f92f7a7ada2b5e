//! Root-mean-square normalisation, one row at a time (Zhang and Sennrich 2019, arXiv:1910.07467):
//! yᵢ = wᵢ · xᵢ / √(mean(x²) + ε).
//!
//! The squares are summed in f64, eight lanes, so the width of the model does not enter the error; what remains is the
//! rounding of each product. Every instruction set runs the same body and gives the same bits. Per-head norms
//! (Qwen3, Gemma 3) are the same kernel on rows of `head_dim`.

use super::vector::{LANES, by_isa};

/// 1 / √(mean(x²) + ε), the mean taken in f64.
#[inline(always)]
fn inverse_rms_body(x: &[f32], eps: f32) -> f32 {
    let mut lanes = [0.0f64; LANES];
    let (x8, tail) = x.as_chunks::<LANES>();
    for x in x8 {
        for i in 0..LANES {
            lanes[i] += f64::from(x[i]) * f64::from(x[i]);
        }
    }
    let sum: f64 = lanes.iter().sum::<f64>() + tail.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
    (1.0 / (sum / x.len().max(1) as f64 + f64::from(eps)).sqrt()) as f32
}

by_isa! {
    /// y ← w ⊙ x / rms(x); returns 1 / rms(x), which the backward pass needs. All slices are one row wide.
    pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) -> f32 {
        debug_assert!(x.len() == w.len() && x.len() == y.len());
        let r = inverse_rms_body(x, eps);
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = x * r * w;
        }
        r
    }
}

by_isa! {
    /// x ← w ⊙ x / rms(x) in place; returns 1 / rms(x).
    pub fn rms_norm_inplace(x: &mut [f32], w: &[f32], eps: f32) -> f32 {
        debug_assert_eq!(x.len(), w.len());
        let r = inverse_rms_body(x, eps);
        for (x, w) in x.iter_mut().zip(w) {
            *x = *x * r * w;
        }
        r
    }
}

by_isa! {
    /// The residual step and the norm after it in one pass: x ← x + d, then y ← w ⊙ x / rms(x); returns 1 / rms(x).
    pub fn add_rms_norm(x: &mut [f32], d: &[f32], w: &[f32], eps: f32, y: &mut [f32]) -> f32 {
        debug_assert!(x.len() == d.len() && x.len() == w.len() && x.len() == y.len());
        for (x, d) in x.iter_mut().zip(d) {
            *x += d;
        }
        let r = inverse_rms_body(x, eps);
        for ((y, x), w) in y.iter_mut().zip(&*x).zip(w) {
            *y = x * r * w;
        }
        r
    }
}

by_isa! {
    /// The sandwich norm of Gemma: y ← y + w ⊙ x / rms(x), the norm of a branch added to the stream; returns 1 / rms(x).
    pub fn rms_norm_add(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) -> f32 {
        debug_assert!(x.len() == w.len() && x.len() == y.len());
        let r = inverse_rms_body(x, eps);
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y += x * r * w;
        }
        r
    }
}

by_isa! {
    /// 1 / rms(x) alone, for a backward pass that kept x only.
    pub fn inverse_rms(x: &[f32], eps: f32) -> f32 {
        inverse_rms_body(x, eps)
    }
}

by_isa! {
    /// The gradient of y = w ⊙ x·ρ with ρ = `inv_rms` = 1 / rms(x), for the incoming gradient `dy`:
    /// dx ← ρ·u − x·ρ³·mean(u ⊙ x) with u = w ⊙ dy, added to `dx` if `accumulate`. All slices are one row wide.
    ///
    /// The mean is taken in f64, as that of the squares is.
    pub fn rms_norm_backward(x: &[f32], w: &[f32], dy: &[f32], inv_rms: f32, dx: &mut [f32], accumulate: bool) {
        debug_assert!(x.len() == w.len() && x.len() == dy.len() && x.len() == dx.len());
        let mut lanes = [0.0f64; LANES];
        let ((x8, x_tail), (w8, w_tail), (d8, d_tail)) = (x.as_chunks(), w.as_chunks(), dy.as_chunks());
        for ((x, w), d) in x8.iter().zip(w8).zip(d8) {
            let (x, w, d): (&[f32; LANES], &[f32; LANES], &[f32; LANES]) = (x, w, d);
            for i in 0..LANES {
                lanes[i] += f64::from(w[i] * d[i]) * f64::from(x[i]);
            }
        }
        let tail = x_tail.iter().zip(w_tail).zip(d_tail).map(|((x, w), d)| f64::from(w * d) * f64::from(*x));
        let mean = (lanes.iter().sum::<f64>() + tail.sum::<f64>()) / x.len().max(1) as f64;
        let rho = f64::from(inv_rms);
        let along = (rho * rho * rho * mean) as f32;
        for (((dx, x), w), d) in dx.iter_mut().zip(x).zip(w).zip(dy) {
            let old = if accumulate { *dx } else { 0.0 };
            *dx = old + (inv_rms * (w * d) - x * along);
        }
    }
}

by_isa! {
    /// The gradient of the weights, for models whose norms train: dw ← dw + dy ⊙ x·ρ, ρ = `inv_rms` = 1 / rms(x).
    pub fn rms_norm_backward_weight(x: &[f32], dy: &[f32], inv_rms: f32, dw: &mut [f32]) {
        debug_assert!(x.len() == dy.len() && x.len() == dw.len());
        for ((dw, x), d) in dw.iter_mut().zip(x).zip(dy) {
            *dw += d * (x * inv_rms);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;

    #[test]
    fn agrees_with_f64_over_widths_and_isas() {
        for n in [1usize, 7, 8, 64, 80, 576, 1536, 4099] {
            let x: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1009) as f32 - 504.0) * 0.01).collect();
            let w: Vec<f32> = (0..n).map(|i| 0.5 + (i % 13) as f32 * 0.1).collect();
            let d: Vec<f32> = x.iter().rev().map(|x| x * 0.25).collect();
            let norm = |x: &[f64]| -> Vec<f64> {
                let mean = x.iter().map(|x| x * x).sum::<f64>() / n as f64;
                x.iter().zip(&w).map(|(x, w)| x * f64::from(*w) / (mean + 1e-5).sqrt()).collect()
            };
            let plain = norm(&x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
            let added = norm(&x.iter().zip(&d).map(|(&x, &d)| f64::from(x) + f64::from(d)).collect::<Vec<_>>());
            let close = |got: &[f32], want: &[f64], what: &str| {
                for (i, (g, w)) in got.iter().zip(want).enumerate() {
                    assert!((f64::from(*g) - w).abs() <= 3e-7 * w.abs() + 1e-7, "{what} n = {n}, [{i}]: {g} {w}");
                }
            };
            for isa in Isa::available() {
                let mut y = vec![0.0; n];
                let r = rms_norm(isa, &x, &w, 1e-5, &mut y);
                close(&y, &plain, isa.name());
                let mut z = x.clone();
                assert_eq!(rms_norm_inplace(isa, &mut z, &w, 1e-5), r);
                assert_eq!(z, y);
                let (mut stream, mut y2) = (x.clone(), vec![0.0; n]);
                add_rms_norm(isa, &mut stream, &d, &w, 1e-5, &mut y2);
                close(&y2, &added, "add_rms_norm");
                assert!(stream.iter().zip(&x).zip(&d).all(|((s, x), d)| *s == x + d));
                let mut y3 = d.clone();
                rms_norm_add(isa, &x, &w, 1e-5, &mut y3);
                let want: Vec<f64> = plain.iter().zip(&d).map(|(p, d)| p + f64::from(*d)).collect();
                assert!(y3.iter().zip(&want).all(|(g, w)| (f64::from(*g) - w).abs() < 1e-5));
            }
        }
    }

    #[test]
    fn backward_agrees_with_central_differences() {
        for n in [1usize, 7, 8, 65, 576, 1539] {
            let x: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1009) as f32 - 504.0) * 0.01 + 0.003).collect();
            let w: Vec<f32> = (0..n).map(|i| 0.5 + (i % 13) as f32 * 0.1).collect();
            let dy: Vec<f32> = (0..n).map(|i| ((i * 613 % 211) as f32 - 100.0) * 0.02).collect();
            let loss = |x: &[f64], w: &[f64]| {
                let rms = (x.iter().map(|x| x * x).sum::<f64>() / n as f64 + 1e-5).sqrt();
                x.iter().zip(w).zip(&dy).map(|((x, w), d)| x * w / rms * f64::from(*d)).sum::<f64>()
            };
            let (x64, w64): (Vec<f64>, Vec<f64>) =
                (x.iter().map(|&x| x.into()).collect(), w.iter().map(|&w| w.into()).collect());
            let slope = |i: usize, weights: bool| {
                let at = |by: f64| {
                    let (mut x, mut w) = (x64.clone(), w64.clone());
                    if weights {
                        w[i] += by
                    } else {
                        x[i] += by
                    }
                    loss(&x, &w)
                };
                (at(1e-5) - at(-1e-5)) / 2e-5
            };
            for isa in Isa::available() {
                let rho = inverse_rms(isa, &x, 1e-5);
                let (mut dx, mut added, mut dw) = (vec![f32::NAN; n], vec![0.5; n], vec![0.25; n]);
                rms_norm_backward(isa, &x, &w, &dy, rho, &mut dx, false);
                rms_norm_backward(isa, &x, &w, &dy, rho, &mut added, true);
                rms_norm_backward_weight(isa, &x, &dy, rho, &mut dw);
                for i in (0..n).step_by(1 + n / 50) {
                    let want = slope(i, false);
                    assert!(
                        (f64::from(dx[i]) - want).abs() < 3e-6 * (1.0 + want.abs()),
                        "n = {n} [{i}]: {} {want}",
                        dx[i]
                    );
                    assert!((f64::from(added[i]) - 0.5 - want).abs() < 3e-6 * (1.0 + want.abs()));
                    let want = slope(i, true);
                    assert!((f64::from(dw[i]) - 0.25 - want).abs() < 3e-6 * (1.0 + want.abs()));
                }
            }
        }
    }

    #[test]
    fn a_row_of_zeros_stays_zero() {
        let mut y = [1.0f32; 16];
        rms_norm(Isa::detect(), &[0.0; 16], &[1.0; 16], 1e-6, &mut y);
        assert_eq!(y, [0.0; 16]);
    }
}
