//! The median and the spread of a few runs. With this few samples a mean would follow the worst of them.

/// Runs of one thing, in tokens per second.
#[derive(Clone, Debug, Default)]
pub struct Samples(pub Vec<f64>);

impl Samples {
    /// The middle value, 0 when there is none.
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => 0.0,
            n if n % 2 == 1 => sorted[n / 2],
            n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
        }
    }

    /// The fastest run.
    pub fn best(&self) -> f64 {
        self.0.iter().copied().fold(0.0, f64::max)
    }

    /// Smallest and largest value.
    pub fn range(&self) -> (f64, f64) {
        (self.0.iter().copied().fold(f64::INFINITY, f64::min), self.best())
    }
}

/// The ratio of two engines over pairs of neighbouring runs: `ours[i] / theirs[i]`.
pub fn paired(ours: &Samples, theirs: &Samples) -> Samples {
    Samples(ours.0.iter().zip(&theirs.0).map(|(a, b)| a / b).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_and_even_counts() {
        assert_eq!(Samples(vec![3.0, 1.0, 2.0]).median(), 2.0);
        assert_eq!(Samples(vec![4.0, 1.0, 2.0, 3.0]).median(), 2.5);
        assert_eq!(Samples::default().median(), 0.0);
    }

    #[test]
    fn pairs_are_divided_in_order() {
        let ratio = paired(&Samples(vec![2.0, 9.0]), &Samples(vec![1.0, 3.0]));
        assert_eq!(ratio.0, [2.0, 3.0]);
        assert_eq!(ratio.range(), (2.0, 3.0));
    }
}
