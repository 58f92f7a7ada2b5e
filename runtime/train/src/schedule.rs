//! The learning rate over the steps: a linear warmup, then constant, linear or cosine down to a floor.
//!
//! Steps count from 0. During `warmup` steps the rate rises from `peak / warmup` to `peak`, so that no step is wasted on
//! a rate of zero; it reaches `floor` at the last step. A rate is a function of the step: nothing to save or restore.

use serde::{Deserialize, Serialize};

/// The shape behind the warmup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Stays at the peak.
    Constant,
    /// Falls in a straight line.
    Linear,
    /// Falls by half a cosine (Loshchilov and Hutter 2016, arXiv:1608.03983, without restarts).
    #[default]
    Cosine,
}

/// A learning rate for every step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The shape.
    pub shape: Shape,
    /// The highest rate.
    pub peak: f64,
    /// The lowest rate after the warmup; not used by [`Shape::Constant`].
    pub floor: f64,
    /// Steps of warmup.
    pub warmup: u64,
    /// All steps, the warmup included.
    pub steps: u64,
}

impl Schedule {
    /// The rate of step `step`.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let fall = self.steps.saturating_sub(self.warmup + 1).max(1);
        let done = ((step - self.warmup) as f64 / fall as f64).min(1.0);
        let share = match self.shape {
            Shape::Constant => return self.peak,
            Shape::Linear => 1.0 - done,
            Shape::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        };
        self.floor + (self.peak - self.floor) * share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: Shape) -> Schedule {
        Schedule { shape, peak: 1.0, floor: 0.1, warmup: 4, steps: 15 }
    }

    #[test]
    fn warms_up_and_comes_down() {
        for shape in [Shape::Constant, Shape::Linear, Shape::Cosine] {
            let rates: Vec<f64> = (0..16).map(|step| schedule(shape).rate(step)).collect();
            assert_eq!(rates[..5], [0.25, 0.5, 0.75, 1.0, 1.0]);
            let last = if shape == Shape::Constant { 1.0 } else { 0.1 };
            assert!((rates[14] - last).abs() < 1e-12 && rates[14] == rates[15], "{shape:?} {rates:?}");
            assert!(rates[4..].windows(2).all(|pair| pair[1] <= pair[0]));
        }
        // Half way down: step 9 is 5 of 10.
        assert!((schedule(Shape::Linear).rate(9) - 0.55).abs() < 1e-12);
        assert!((schedule(Shape::Cosine).rate(9) - 0.55).abs() < 1e-12);
        // A quarter: cos(45°).
        let rate = Schedule { warmup: 0, steps: 9, ..schedule(Shape::Cosine) }.rate(2);
        assert!((rate - (0.1 + 0.9 * 0.5 * (1.0 + 0.5f64.sqrt()))).abs() < 1e-12);
    }

    #[test]
    fn has_a_rate_for_odd_lengths() {
        for (warmup, steps) in [(0, 0), (0, 1), (5, 5), (9, 5), (1, 2)] {
            let schedule = Schedule { warmup, steps, ..schedule(Shape::Cosine) };
            assert!((0..12).all(|step| (0.09..=1.0).contains(&schedule.rate(step))), "{schedule:?}");
        }
    }
}
