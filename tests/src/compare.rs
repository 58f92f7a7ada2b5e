//! How far two engines' logits are apart.
//!
//! Logits themselves may differ by a constant and by rounding; what counts is the distribution they stand for. So:
//! whether the most probable token is the same, and the Kullback–Leibler divergence of ours from the oracle's, in nats.

/// Index of the largest value; the first of equals.
pub fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in logits.iter().enumerate() {
        if *value > logits[best] {
            best = i;
        }
    }
    best
}

/// By how much the largest logit exceeds the second largest.
pub fn top_gap(logits: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &value in logits {
        if value > first {
            (first, second) = (value, first);
        } else if value > second {
            second = value;
        }
    }
    first - second
}

/// `log softmax`, in double precision.
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = logits.iter().map(|&x| (x as f64 - max).exp()).sum();
    let shift = max + sum.ln();
    logits.iter().map(|&x| x as f64 - shift).collect()
}

/// KL(reference ‖ ours), in nats.
pub fn divergence(reference: &[f32], ours: &[f32]) -> f64 {
    let (p, q) = (log_softmax(reference), log_softmax(ours));
    p.iter().zip(&q).map(|(p, q)| if *p == f64::NEG_INFINITY { 0.0 } else { p.exp() * (p - q) }).sum()
}

/// How far `ours` are from `reference`, as a share of how far those are from their mean.
pub fn distance(ours: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(ours.len(), reference.len());
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        ours.iter().zip(reference).map(|(a, b)| f(f64::from(*a), f64::from(*b))).sum()
    };
    let mean = sum(&|_, b| b) / reference.len() as f64;
    (sum(&|a, b| (a - b).powi(2)) / sum(&|_, b| (b - mean).powi(2))).sqrt()
}

/// A lead of the most probable token over the second, in logits, below which rounding may decide.
pub const UNDECIDED: f32 = 0.1;

/// Agreement over many positions.
#[derive(Clone, Debug, Default)]
pub struct Agreement {
    /// Positions compared.
    pub positions: usize,
    /// Positions at which both find the same token most probable.
    pub same_top: usize,
    /// Positions at which the reference's choice leads by more than [`UNDECIDED`].
    pub decided: usize,
    /// Those among them at which both find the same token most probable.
    pub same_decided: usize,
    /// Sum of the divergences.
    pub divergence: f64,
    /// Largest divergence of one position.
    pub worst: f64,
}

impl Agreement {
    /// Adds one position.
    pub fn add(&mut self, reference: &[f32], ours: &[f32]) {
        assert_eq!(reference.len(), ours.len(), "vocabularies of different sizes");
        assert!(ours.iter().all(|x| !x.is_nan()), "a logit is NaN");
        let divergence = divergence(reference, ours);
        let same = argmax(reference) == argmax(ours);
        self.positions += 1;
        self.same_top += usize::from(same);
        if top_gap(reference) > UNDECIDED {
            self.decided += 1;
            self.same_decided += usize::from(same);
        }
        self.divergence += divergence;
        self.worst = self.worst.max(divergence);
    }

    /// Share of positions with the same most probable token.
    pub fn top(&self) -> f64 {
        self.same_top as f64 / self.positions.max(1) as f64
    }

    /// Mean divergence, in nats.
    pub fn mean_divergence(&self) -> f64 {
        self.divergence / self.positions.max(1) as f64
    }
}

impl std::fmt::Display for Agreement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} positions: same top token {:.2} % ({} of {} decided differ), mean KL {:.2e}, worst KL {:.2e}",
            self.positions,
            100.0 * self.top(),
            self.decided - self.same_decided,
            self.decided,
            self.mean_divergence(),
            self.worst
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_distributions_have_no_divergence() {
        // A constant added to all logits changes nothing.
        assert!(divergence(&[1.0, 2.0, 3.0], &[11.0, 12.0, 13.0]).abs() < 1e-12);
    }

    #[test]
    fn divergence_of_a_fair_from_a_biased_coin() {
        // ½ ln(½ / ¾) + ½ ln(½ / ¼)
        let expected = 0.5 * (2.0f64 / 3.0).ln() + 0.5 * 2.0f64.ln();
        let biased = [3.0f32.ln(), 0.0];
        assert!((divergence(&[0.0, 0.0], &biased) - expected).abs() < 1e-7);
    }

    #[test]
    fn the_gap_is_between_the_two_largest() {
        assert_eq!(top_gap(&[1.0, 7.0, 4.0, 6.5]), 0.5);
        assert_eq!(argmax(&[1.0, 7.0, 7.0]), 1);
    }
}
