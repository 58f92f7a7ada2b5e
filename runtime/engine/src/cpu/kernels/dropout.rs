//! Dropout (Srivastava et al. 2014): some elements become zero, the others grow so that the expectation stays.
//!
//! Chance is counted, not drawn: element `i` of a row takes 16 bits of number `⌊i/4⌋` of the row's part of a stream
//! ([`random`](crate::random)), so forward and backward, threads and instruction sets all see the same mask, and no mask
//! is kept. The rate is a multiple of 2⁻¹⁶, and the factor is the inverse of exactly what is left.

use super::vector::by_isa;
use crate::random::splitmix64;

/// Elements that one random number decides.
const PER_NUMBER: usize = 4;

/// Which elements of a matrix fall, and the factor on the others.
#[derive(Clone, Copy, Debug)]
pub struct Mask {
    stream: u64,
    /// Elements fall whose 16 bits are below.
    threshold: u32,
    factor: f32,
}

impl Mask {
    /// The mask of a stream, with `rate` between 0 and 1 of the elements falling.
    pub fn new(stream: u64, rate: f32) -> Mask {
        let threshold = ((f64::from(rate) * 65_536.0).round() as u32).min(65_535);
        Mask { stream, threshold, factor: (65_536.0 / f64::from(65_536 - threshold)) as f32 }
    }

    /// The factors, 0 or `1/(1 − rate)`, of the elements that number `index` of the stream decides.
    #[inline(always)]
    fn factors(&self, index: u64) -> [f32; PER_NUMBER] {
        let bits = splitmix64(self.stream, index);
        std::array::from_fn(|lane| {
            let kept = (bits >> (16 * lane)) as u32 & 0xffff >= self.threshold;
            if kept { self.factor } else { 0.0 }
        })
    }
}

/// Number of a row's first random number.
fn first_number(row: usize, width: usize) -> u64 {
    row as u64 * width.div_ceil(PER_NUMBER) as u64
}

by_isa! {
    /// `y ← mask ∘ x`, for row `row` of the matrix; added to `y` if `accumulate`.
    pub fn dropout(mask: &Mask, row: usize, x: &[f32], y: &mut [f32], accumulate: bool) {
        debug_assert_eq!(x.len(), y.len());
        if !accumulate {
            y.fill(0.0);
        }
        let mut index = first_number(row, x.len());
        let ((x4, x_tail), (y4, y_tail)) = (x.as_chunks::<PER_NUMBER>(), y.as_chunks_mut::<PER_NUMBER>());
        for (x, y) in x4.iter().zip(y4) {
            let factors = mask.factors(index);
            for i in 0..PER_NUMBER {
                y[i] += factors[i] * x[i];
            }
            index += 1;
        }
        let tail = y_tail.iter_mut().zip(x_tail).zip(mask.factors(index));
        tail.for_each(|((y, x), factor)| *y += factor * x);
    }
}

by_isa! {
    /// `y ← mask ∘ y`.
    pub fn dropout_inplace(mask: &Mask, row: usize, y: &mut [f32]) {
        let mut index = first_number(row, y.len());
        let (chunks, tail) = y.as_chunks_mut::<PER_NUMBER>();
        for y in chunks {
            let factors = mask.factors(index);
            for i in 0..PER_NUMBER {
                y[i] *= factors[i];
            }
            index += 1;
        }
        tail.iter_mut().zip(mask.factors(index)).for_each(|(y, factor)| *y *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;

    #[test]
    fn the_expectation_stays_and_rows_differ() {
        for (isa, rate) in Isa::available().into_iter().flat_map(|isa| [0.05f32, 0.1, 0.5, 0.9].map(|rate| (isa, rate)))
        {
            let mask = Mask::new(17, rate);
            let (rows, width) = (200, 511);
            let x: Vec<f32> = (0..width).map(|i| 1.0 + (i % 7) as f32).collect();
            let (mut sum, mut fallen, mut before) = (0.0, 0usize, Vec::new());
            for row in 0..rows {
                let mut y = vec![f32::NAN; width];
                dropout(isa, &mask, row, &x, &mut y, false);
                sum += y.iter().map(|v| f64::from(*v)).sum::<f64>();
                fallen += y.iter().filter(|v| **v == 0.0).count();
                let mut again = x.clone();
                dropout_inplace(isa, &mask, row, &mut again);
                assert_eq!(y, again);
                dropout(isa, &mask, row, &x, &mut again, true);
                assert!(again.iter().zip(&y).all(|(a, y)| *a == 2.0 * y));
                assert_ne!(y, before);
                before = y;
            }
            let all = (rows * width) as f64;
            // Five standard deviations of a binomial share.
            let share = fallen as f64 / all;
            let deviation = (f64::from(rate * (1.0 - rate)) / all).sqrt();
            assert!((share - f64::from(rate)).abs() < 5.0 * deviation + 1e-5, "{rate}: {share}");
            let expected = rows as f64 * x.iter().map(|v| f64::from(*v)).sum::<f64>();
            assert!((sum / expected - 1.0).abs() < 0.03, "{rate}: {sum}, {expected}");
        }
    }

    #[test]
    fn nothing_falls_at_rate_0_and_the_factor_is_exact() {
        let (x, mut y) = (vec![3.0; 9], vec![0.0; 9]);
        dropout(Isa::detect(), &Mask::new(1, 0.0), 5, &x, &mut y, false);
        assert_eq!(x, y);
        dropout(Isa::detect(), &Mask::new(1, 0.5), 5, &x, &mut y, false);
        assert!(y.iter().all(|v| [0.0, 6.0].contains(v)));
    }
}
