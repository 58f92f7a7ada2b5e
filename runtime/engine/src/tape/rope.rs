//! The angles of rotary position embedding (Su et al. 2021, arXiv:2104.09864), the same for every backend.
//!
//! Frequency scaling follows the definitions behind GGUF's `rope.scaling.*` keys: linear interpolation, YaRN (Peng et
//! al. 2023, arXiv:2309.00071) and per-pair divisors (`rope_freqs.weight`).

use super::spec::{RopeSpec, Yarn};

/// The angle per position of every pair, in f64, and the factor on cosine and sine.
#[derive(Clone, Debug)]
pub struct Frequencies {
    per_position: Vec<f64>,
    magnitude: f64,
}

impl Frequencies {
    /// The frequencies of one kind of rotation.
    pub fn new(spec: &RopeSpec) -> Frequencies {
        let scale = f64::from(spec.scale);
        let ramp = spec.yarn.map(|yarn| (yarn, correction_range(spec, &yarn)));
        let per_position = (0..spec.dims / 2)
            .map(|i| {
                let factor = spec.factors.as_ref().and_then(|f| f.get(i)).map_or(1.0, |&f| f64::from(f));
                let extrapolated = f64::from(spec.base).powf(-2.0 * i as f64 / spec.dims as f64) / factor;
                let interpolated = scale * extrapolated;
                let Some((_, (low, high))) = ramp else { return interpolated };
                let mix = 1.0 - ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                interpolated * (1.0 - mix) + extrapolated * mix
            })
            .collect();
        let magnitude =
            spec.yarn.map_or(1.0, |yarn| f64::from(yarn.attention_factor) * (1.0 + 0.1 * (1.0 / scale).ln()));
        Frequencies { per_position, magnitude }
    }

    /// Pairs, half the rotated dimensions: the length of one position's cosines.
    pub fn pairs(&self) -> usize {
        self.per_position.len()
    }

    /// Cosines and sines of `positions`, without the factor on them: what turns a vector that has been turned already.
    pub fn turn(&self, positions: usize) -> [Vec<f32>; 2] {
        let angles = self.per_position.iter().map(|f| (positions as f64 * f).sin_cos());
        let (sin, cos) = angles.map(|(sin, cos)| (sin as f32, cos as f32)).unzip();
        [cos, sin]
    }

    /// Cosines and sines of `position`, [`pairs`](Self::pairs) of each.
    pub fn table(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        debug_assert!(cos.len() == self.pairs() && sin.len() == self.pairs());
        for ((c, s), f) in cos.iter_mut().zip(sin).zip(&self.per_position) {
            let (sine, cosine) = (position as f64 * f).sin_cos();
            *c = (cosine * self.magnitude) as f32;
            *s = (sine * self.magnitude) as f32;
        }
    }
}

/// The pairs between which YaRN goes from extrapolating to interpolating.
fn correction_range(spec: &RopeSpec, yarn: &Yarn) -> (f64, f64) {
    let dims = spec.dims as f64;
    let pair_of = |turns: f32| {
        let turns = f64::from(turns) * 2.0 * std::f64::consts::PI;
        dims * (yarn.original_context as f64 / turns).ln() / (2.0 * f64::from(spec.base).ln())
    };
    (pair_of(yarn.beta_fast).floor().max(0.0), pair_of(yarn.beta_slow).ceil().min(dims - 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::RopeStyle;

    /// Ratios of the scaled to the plain frequencies: linear is the factor itself; YaRN keeps the fastest pairs,
    /// interpolates the slowest and lies between on its ramp.
    #[test]
    fn scaling_changes_the_frequencies_as_defined() {
        let plain = RopeSpec::plain(RopeStyle::Halves, 10_000.0, 64);
        let base = Frequencies::new(&plain);
        let linear = Frequencies::new(&RopeSpec { scale: 0.25, ..plain.clone() });
        let params = Yarn { beta_fast: 32.0, beta_slow: 1.0, attention_factor: 1.0, original_context: 4096 };
        let scaled = RopeSpec { scale: 0.25, yarn: Some(params), ..plain.clone() };
        let yarn = Frequencies::new(&scaled);
        let ratio = |f: &Frequencies| -> Vec<f64> {
            f.per_position.iter().zip(&base.per_position).map(|(a, b)| a / b).collect()
        };
        assert!(ratio(&linear).iter().all(|r| (r - 0.25).abs() < 1e-12));
        assert_eq!(correction_range(&scaled, &params), (10.0, 23.0));
        let r = ratio(&yarn);
        assert!(r[..=10].iter().all(|r| (r - 1.0).abs() < 1e-12) && r[23..].iter().all(|r| (r - 0.25).abs() < 1e-12));
        assert!(r.windows(2).all(|w| w[0] >= w[1] - 1e-12) && (r[16] - (1.0 - 0.75 * 6.0 / 13.0)).abs() < 1e-12);
        assert!((yarn.magnitude - (1.0 + 0.1 * 4f64.ln())).abs() < 1e-12);
        let factors = Some((0..32).map(|i| 1.0 + i as f32).collect());
        let divided = Frequencies::new(&RopeSpec { factors, ..plain });
        assert!(ratio(&divided).iter().enumerate().all(|(i, r)| (r * (1 + i) as f64 - 1.0).abs() < 1e-12));
    }
}
