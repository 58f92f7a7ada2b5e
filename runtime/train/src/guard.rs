//! When training goes wrong, and when it is done.
//!
//! [`LossGuard`] looks at each step's loss and gradient norm before the step is applied. Numbers that are not finite, and
//! losses far above what was normal lately, end in [`Verdict::RollBack`]: the trainer returns to its last good state, goes
//! on with other data (the cursor is not rolled back) and a learning rate that is smaller by [`LossGuard::rate_factor`].
//! "Normal" is the median of a window and the median distance from it, which a few outliers do not move; losses of
//! different batches may differ widely, so one step must be absurd, or several in a row far out, before it counts.
//!
//! [`EarlyStop`] watches the validation loss. Both are plain data that a checkpoint keeps.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Losses that the median is taken of.
const WINDOW: usize = 64;
/// Losses before which nothing is judged but whether numbers are finite.
const LEAST: usize = 8;
/// Distance from the median, in standard deviations, above which a loss is far out.
const FAR: f64 = 6.0;
/// … and how far above the median, in shares of it, it must be as well: calm losses have tiny deviations.
const FAR_SHARE: f64 = 0.25;
/// Steps in a row that must be far out.
const IN_A_ROW: u32 = 3;
/// Multiple of the median at which (with [`FAR`]) one step is enough.
const ABSURD: f64 = 3.0;

/// What to do with a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Apply it.
    Continue,
    /// Drop it and return to the last good state; the text says why, with numbers.
    RollBack(String),
    /// It happened too often: stop with this message.
    GiveUp(String),
}

/// Watches the losses of the steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossGuard {
    window: VecDeque<f64>,
    far: u32,
    rollbacks: u32,
    limit: u32,
}

impl LossGuard {
    /// A guard that gives up at the rollback after `limit` of them.
    pub fn new(limit: u32) -> LossGuard {
        LossGuard { window: VecDeque::new(), far: 0, rollbacks: 0, limit }
    }

    /// Rollbacks so far.
    pub fn rollbacks(&self) -> u32 {
        self.rollbacks
    }

    /// What the learning rate is multiplied with: one half for each rollback.
    pub fn rate_factor(&self) -> f64 {
        0.5f64.powi(self.rollbacks.min(1000) as i32)
    }

    /// Judges step `step`.
    pub fn check(&mut self, step: u64, loss: f64, gradient_norm: f64) -> Verdict {
        if !loss.is_finite() || !gradient_norm.is_finite() {
            return self.roll_back(format!("step {step}: the loss is {loss} and the gradient norm {gradient_norm}"));
        }
        if self.window.len() >= LEAST {
            let (center, deviation) = spread(&self.window);
            if loss > center + (FAR * deviation).max(FAR_SHARE * center.abs()) {
                self.far += 1;
                if self.far >= IN_A_ROW || loss > ABSURD * center.abs() {
                    let row = if self.far > 1 { format!(", {} steps in a row", self.far) } else { String::new() };
                    return self.roll_back(format!(
                        "step {step}: the loss is {loss:.3} where {center:.3} ± {deviation:.3} is normal{row}"
                    ));
                }
                // Not part of what is normal.
                return Verdict::Continue;
            }
        }
        self.far = 0;
        self.window.push_back(loss);
        if self.window.len() > WINDOW {
            self.window.pop_front();
        }
        Verdict::Continue
    }

    fn roll_back(&mut self, why: String) -> Verdict {
        self.far = 0;
        if self.rollbacks >= self.limit {
            return Verdict::GiveUp(format!(
                "{why}; training was rolled back {} times already. Lower the learning rate or look at the data",
                self.rollbacks
            ));
        }
        self.rollbacks += 1;
        Verdict::RollBack(why)
    }
}

/// The median, and the standard deviation that the median distance from it stands for.
fn spread(window: &VecDeque<f64>) -> (f64, f64) {
    let mut values: Vec<f64> = window.iter().copied().collect();
    let center = median(&mut values);
    values.iter_mut().for_each(|value| *value = (*value - center).abs());
    (center, 1.4826 * median(&mut values))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Watches the validation loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EarlyStop {
    patience: Option<u32>,
    best: Option<(u64, f64)>,
    worse: u32,
}

/// What a validation showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// It is the best so far: keep this state.
    pub improved: bool,
    /// There was none for too long.
    pub stop: bool,
}

impl EarlyStop {
    /// Stops after `patience` validations without a new best; never if `None`.
    pub fn new(patience: Option<u32>) -> EarlyStop {
        EarlyStop { patience, best: None, worse: 0 }
    }

    /// The step and the loss of the best validation.
    pub fn best(&self) -> Option<(u64, f64)> {
        self.best
    }

    /// Takes in the validation loss after `step` steps. A loss that is not a number counts as no progress.
    pub fn observe(&mut self, step: u64, loss: f64) -> Progress {
        let improved = !loss.is_nan() && self.best.is_none_or(|(_, best)| loss < best);
        if improved {
            self.best = Some((step, loss));
            self.worse = 0;
        } else {
            self.worse += 1;
        }
        Progress { improved, stop: self.patience.is_some_and(|patience| self.worse >= patience) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> (Vec<f64>, Vec<f64>) {
        let golden: serde_json::Value = serde_json::from_str(include_str!("../tests/golden/losses.json")).unwrap();
        let column = |key: &str| serde_json::from_value::<Vec<f64>>(golden[key].clone()).unwrap();
        (column("loss"), column("grad_norm"))
    }

    fn after_healthy(limit: u32) -> LossGuard {
        let mut guard = LossGuard::new(limit);
        for (step, (loss, norm)) in std::iter::zip(healthy().0, healthy().1).enumerate() {
            assert_eq!(guard.check(step as u64, loss, norm), Verdict::Continue);
        }
        guard
    }

    #[test]
    fn lets_healthy_training_be() {
        assert_eq!(after_healthy(3).rollbacks(), 0);
        // Neither a fall to almost nothing nor noise around it is a spike.
        let mut guard = LossGuard::new(3);
        for step in 0..500u64 {
            let noise = 0.5 + crate::random::uniform(1, step);
            let loss = 4.0 * (-(step as f64) / 60.0).exp() * noise + 0.01 * noise;
            assert_eq!(guard.check(step, loss, 1.0), Verdict::Continue, "step {step}: {loss}");
        }
    }

    #[test]
    fn rolls_back_what_is_not_finite_or_absurd() {
        for (loss, norm) in [(f64::NAN, 1.0), (f64::INFINITY, 1.0), (3.0, f64::NAN), (30.0, 1.0)] {
            let mut guard = after_healthy(1);
            assert!(matches!(guard.check(50, loss, norm), Verdict::RollBack(why) if why.contains("step 50")));
            assert_eq!(guard.rate_factor(), 0.5);
            assert!(matches!(guard.check(51, f64::NAN, norm), Verdict::GiveUp(why) if why.contains("1 times")));
        }
        // Even before anything is known.
        assert!(matches!(LossGuard::new(1).check(0, f64::NAN, 1.0), Verdict::RollBack(_)));
    }

    #[test]
    fn rolls_back_a_rise_that_lasts() {
        let mut guard = after_healthy(3);
        let center = spread(&guard.window).0;
        let high = 2.5 * center;
        assert_eq!(guard.check(50, high, 1.0), Verdict::Continue);
        assert_eq!(guard.check(51, center, 1.0), Verdict::Continue);
        assert_eq!(guard.check(52, high, 1.0), Verdict::Continue);
        assert_eq!(guard.check(53, high, 1.0), Verdict::Continue);
        assert!(matches!(guard.check(54, high, 1.0), Verdict::RollBack(why) if why.contains("3 steps in a row")));
    }

    #[test]
    fn survives_a_checkpoint() {
        let guard = after_healthy(3);
        let text = serde_json::to_string(&guard).unwrap();
        assert_eq!(serde_json::from_str::<LossGuard>(&text).unwrap(), guard);
    }

    #[test]
    fn stops_without_progress() {
        let mut stop = EarlyStop::new(Some(2));
        assert_eq!(stop.observe(10, 2.0), Progress { improved: true, stop: false });
        assert_eq!(stop.observe(20, 2.0), Progress { improved: false, stop: false });
        assert_eq!(stop.observe(30, 1.5), Progress { improved: true, stop: false });
        assert_eq!(stop.observe(40, f64::NAN), Progress { improved: false, stop: false });
        assert_eq!(stop.observe(50, 1.6), Progress { improved: false, stop: true });
        assert_eq!(stop.best(), Some((30, 1.5)));
        let mut never = EarlyStop::new(None);
        assert!((0..100).all(|step| !never.observe(step, step as f64).stop));
    }
}
