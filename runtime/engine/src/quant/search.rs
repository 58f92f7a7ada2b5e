//! Finding scales and codes for a group of values: the searches behind the quantizers.
//!
//! A group is approximated by `scale · code`, by `scale · code − min`, or by `scale · table[code]`. Given the codes, the
//! best scale (and minimum) is a weighted least-squares fit; given the scale, the best codes are the nearest ones.
//! Rounding after the plain choice `peak / levels` leaves error behind, so each search tries a handful of slightly
//! different scales, refits, and keeps what has the least error: the approach of the K-quants of llama.cpp
//! (<https://github.com/ggml-org/llama.cpp/pull/1684>). Sums run in the same order and precision as there, so the blocks
//! come out byte for byte the same, which the golden values check.

/// Below this magnitude a group counts as all zeros.
pub(super) const SMALLEST_PEAK: f32 = 1e-15;

/// Nearest integer, ties to even; NaN gives 0 and the range is ±4,194,303.
pub(super) fn nearest(v: f32) -> i32 {
    // Adding 1.5·2²³ pushes the fraction out of the mantissa, so the addition itself rounds.
    let shifted = v.clamp(-4_194_303.0, 4_194_303.0) + 12_582_912.0;
    (shifted.to_bits() & 0x007f_ffff) as i32 - 0x0040_0000
}

/// The value of largest magnitude, with its sign; the first of equals, 0 when there is none.
pub(super) fn peak(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |peak: f32, &v| if v.abs() > peak.abs() { v } else { peak })
}

/// `1 / d`, or 0 for 0.
pub(super) fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// Sum of squares, in order.
pub(super) fn sum_of_squares(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, v| sum + v * v)
}

/// The weights of an importance matrix: what the caller gave, damped for values far below `mean_square`.
pub(super) fn damped_weights(importance: &[f32], x: &[f32], mean_square: f32, out: &mut [f32]) {
    for ((w, importance), x) in out.iter_mut().zip(importance).zip(x) {
        *w = importance * (mean_square + x * x).sqrt();
    }
}

/// `value ≈ scale · (code − half)` with codes `0..2·half`. Tries 18 scales around the one that maps the peak to −half.
///
/// Returns the scale; an all-zero group has scale 0 and codes 0.
pub(super) fn fit_symmetric(x: &[f32], weights: &[f32], half: i32, codes: &mut [u8]) -> f32 {
    let peak = peak(x);
    if peak.abs() < SMALLEST_PEAK {
        codes.fill(0);
        return 0.0;
    }
    let code = |inverse_scale: f32, v: f32| nearest(inverse_scale * v).clamp(-half, half - 1);
    // Projections of the values on the codes and of the codes on themselves: scale = xl / ll, and the error falls by
    // xl² / ll.
    let project = |inverse_scale: f32| {
        let (mut xl, mut ll) = (0.0f32, 0.0f32);
        for (&v, &w) in x.iter().zip(weights) {
            let l = code(inverse_scale, v) as f32;
            xl += w * v * l;
            ll += w * l * l;
        }
        (xl, ll)
    };
    let mut best_inverse = -half as f32 / peak;
    let (xl, ll) = project(best_inverse);
    let mut scale = if ll != 0.0 { xl / ll } else { 0.0 };
    let mut best = scale * xl;
    for step in (-9..=9).filter(|&step| step != 0) {
        let candidate = -(half as f32 + 0.1 * step as f32) / peak;
        let (xl, ll) = project(candidate);
        if ll > 0.0 && xl * xl > best * ll {
            scale = xl / ll;
            best = scale * xl;
            best_inverse = candidate;
        }
    }
    for (c, &v) in codes.iter_mut().zip(x) {
        *c = (code(best_inverse, v) + half) as u8;
    }
    scale
}

/// As [`fit_symmetric`] with weights `x²`, but improves one code at a time, for at most five rounds: better for few
/// levels.
pub(super) fn fit_symmetric_greedy(x: &[f32], half: i32, codes: &mut [u8]) -> f32 {
    let peak = peak(x);
    if peak.abs() < SMALLEST_PEAK {
        codes.fill(0);
        return 0.0;
    }
    let inverse_scale = -half as f32 / peak;
    let (mut xl, mut ll) = (0.0f32, 0.0f32);
    for (c, &v) in codes.iter_mut().zip(x) {
        let code = nearest(inverse_scale * v).clamp(-half, half - 1);
        *c = (code + half) as u8;
        let (l, w) = (code as f32, v * v);
        xl += w * v * l;
        ll += w * l * l;
    }
    for _ in 0..5 {
        let mut changed = false;
        for (c, &v) in codes.iter_mut().zip(x) {
            let (l, w) = ((*c as i32 - half) as f32, v * v);
            // The sums without this value; the code that fits it best is then v over their scale.
            let mut rest_xl = xl - w * v * l;
            if rest_xl <= 0.0 {
                continue;
            }
            let mut rest_ll = ll - w * l * l;
            let code = nearest(v * rest_ll / rest_xl).clamp(-half, half - 1);
            if code + half == *c as i32 {
                continue;
            }
            let l = code as f32;
            rest_xl += w * v * l;
            rest_ll += w * l * l;
            if rest_ll > 0.0 && rest_xl * rest_xl * ll > xl * xl * rest_ll {
                *c = (code + half) as u8;
                (xl, ll) = (rest_xl, rest_ll);
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    if ll > 0.0 { xl / ll } else { 0.0 }
}

/// Which scales [`fit_affine`] tries: `(levels + first + i · step) / range` for `i` in `0..=count`.
#[derive(Clone, Copy)]
pub(super) struct Steps {
    pub first: f32,
    pub step: f32,
    pub count: usize,
    /// Judge by absolute instead of squared error.
    pub absolute: bool,
}

impl Steps {
    /// The finer grid that pays when the weights come from an importance matrix.
    pub const IMPORTANCE: Steps = Steps { first: -0.9, step: 0.05, count: 36, absolute: false };
}

/// `value ≈ scale · code − min` with codes `0..=levels` and `min ≥ 0`; returns `(scale, min)`.
///
/// At each step the codes are those nearest under the best fit so far, and scale and minimum are refitted to them by
/// weighted least squares. A group in which no value is below another has scale 0.
pub(super) fn fit_affine(x: &[f32], weights: &[f32], levels: i32, steps: Steps, codes: &mut [u8]) -> (f32, f32) {
    let (mut low, mut high) = (f32::INFINITY, f32::NEG_INFINITY);
    let (mut sum_w, mut sum_x) = (0.0f32, 0.0f32);
    for (&v, &w) in x.iter().zip(weights) {
        low = if v < low { v } else { low };
        high = if v > high { v } else { high };
        sum_w += w;
        sum_x += w * v;
    }
    if low > 0.0 {
        low = 0.0;
    }
    if high <= low {
        codes.fill(0);
        return (0.0, -low);
    }
    let error = |scale: f32, low: f32, codes: &[u8]| {
        let mut error = 0.0f32;
        for ((&v, &w), &c) in x.iter().zip(weights).zip(codes) {
            let diff = scale * c as f32 + low - v;
            error += w * if steps.absolute { diff.abs() } else { diff * diff };
        }
        error
    };
    let inverse_scale = levels as f32 / (high - low);
    let mut scale = 1.0 / inverse_scale;
    for (c, &v) in codes.iter_mut().zip(x) {
        *c = nearest(inverse_scale * (v - low)).clamp(0, levels) as u8;
    }
    let mut best = error(scale, low, codes);
    let mut buffer = [0u8; 32];
    let trial = &mut buffer[..x.len().min(32)];
    for i in 0..=steps.count {
        let inverse_scale = (steps.first + steps.step * i as f32 + levels as f32) / (high - low);
        let (mut sum_l, mut sum_ll, mut sum_xl) = (0.0f32, 0.0f32, 0.0f32);
        for ((c, &v), &w) in trial.iter_mut().zip(x).zip(weights) {
            let code = nearest(inverse_scale * (v - low)).clamp(0, levels);
            *c = code as u8;
            let l = code as f32;
            sum_l += w * l;
            sum_ll += w * l * l;
            sum_xl += w * l * v;
        }
        let determinant = sum_w * sum_ll - sum_l * sum_l;
        if determinant <= 0.0 {
            continue;
        }
        let mut trial_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let mut trial_low = (sum_ll * sum_x - sum_l * sum_xl) / determinant;
        if trial_low > 0.0 {
            trial_low = 0.0;
            trial_scale = sum_xl / sum_ll;
        }
        let trial_error = error(trial_scale, trial_low, trial);
        if trial_error < best {
            codes.iter_mut().zip(&*trial).for_each(|(c, t)| *c = *t);
            best = trial_error;
            (scale, low) = (trial_scale, trial_low);
        }
    }
    (scale, -low)
}

/// `value ≈ scale · code` for values that are not negative, with codes `0..=levels`: quantizes the scales of a
/// super-block by their groups' weights. Returns the scale.
pub(super) fn fit_positive(x: &[f32], weights: &[f32], levels: i32, codes: &mut [u8]) -> f32 {
    let max = x.iter().fold(0.0f32, |max, &v| max.max(v));
    if max < SMALLEST_PEAK {
        codes.fill(0);
        return 0.0;
    }
    let code = |inverse_scale: f32, v: f32| nearest(inverse_scale * v).clamp(0, levels);
    let error = |inverse_scale: f32| {
        let scale = 1.0 / inverse_scale;
        let mut error = 0.0f32;
        for (&v, &w) in x.iter().zip(weights) {
            let diff = v - scale * code(inverse_scale, v) as f32;
            error += w * diff * diff;
        }
        error
    };
    let mut inverse_scale = levels as f32 / max;
    let mut best = error(inverse_scale);
    for step in (-4..=4).filter(|&step| step != 0) {
        let candidate = (0.1 * step as f32 + levels as f32) / max;
        let candidate_error = error(candidate);
        if candidate_error < best {
            best = candidate_error;
            inverse_scale = candidate;
        }
    }
    let (mut xl, mut ll) = (0.0f32, 0.0f32);
    for ((c, &v), &w) in codes.iter_mut().zip(x).zip(weights) {
        let code = code(inverse_scale, v);
        *c = code as u8;
        let l = code as f32;
        xl += w * v * l;
        ll += w * l * l;
    }
    for _ in 0..5 {
        let mut changed = false;
        for ((c, &v), &w) in codes.iter_mut().zip(x).zip(weights) {
            let l = *c as f32;
            let (mut rest_xl, mut rest_ll) = (xl - w * v * l, ll - w * l * l);
            if rest_xl <= 0.0 || rest_ll <= 0.0 {
                continue;
            }
            let code = nearest(v * rest_ll / rest_xl).clamp(0, levels);
            if code == *c as i32 {
                continue;
            }
            let l = code as f32;
            rest_xl += w * v * l;
            rest_ll += w * l * l;
            if rest_xl * rest_xl * ll > xl * xl * rest_ll {
                *c = code as u8;
                (xl, ll) = (rest_xl, rest_ll);
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    if ll > 0.0 { xl / ll } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_rounds_half_to_even_and_saturates() {
        for (v, n) in [(0.5, 0), (1.5, 2), (-0.5, 0), (-1.5, -2), (2.4999, 2), (1e30, 4_194_303), (f32::NAN, 0)] {
            assert_eq!(nearest(v), n, "{v}");
        }
    }

    #[test]
    fn an_exact_grid_is_found_again() {
        let x: Vec<f32> = (0..32).map(|i| 0.25 * (i % 16) as f32 - 1.0).collect();
        let mut codes = [0u8; 32];
        let steps = Steps { first: -1.0, step: 0.1, count: 20, absolute: false };
        let (scale, min) = fit_affine(&x, &[1.0; 32], 15, steps, &mut codes);
        for (&v, &c) in x.iter().zip(&codes) {
            assert!((scale * c as f32 - min - v).abs() < 1e-5);
        }
    }

    #[test]
    fn a_better_scale_than_the_plain_one_is_found() {
        let x = [1.0f32, 0.93, -0.4, 0.31, 0.11, -0.73, 0.52, 0.05];
        let w = x.map(|v| v * v);
        let mut codes = [0u8; 8];
        let scale = fit_symmetric(&x, &w, 4, &mut codes);
        let error = |scale: f32, code: &dyn Fn(usize) -> f32| -> f32 {
            (0..8).map(|i| w[i] * (scale * code(i) - x[i]).powi(2)).sum()
        };
        let found = error(scale, &|i| codes[i] as f32 - 4.0);
        let plain = error(-0.25, &|i| (x[i] / -0.25).round().clamp(-4.0, 3.0));
        assert!(found < plain, "{found} against {plain}");
    }
}
