//! First values of an adapter.
//!
//! `A` is uniform in ±1/√inputs, `B` is zero, so a fresh adapter changes nothing. The values of a tensor follow from its
//! name and the seed alone: they do not depend on which other tensors are trained, on the number of threads or on the
//! platform, and another program can compute them too. That is how a training run is compared with PyTorch's.

use crate::random;

/// The values of tensor `name` with this row-major `shape` (`[rank, inputs]`): with s = FNV-1a(name) ⊕ seed and
/// u = the uniform number i of stream s ([`random::uniform`]), value i is (2u − 1) / √inputs, computed in `f64`. Inputs
/// are the last dimension. Empty where the shape is.
pub fn golden_init(name: &str, shape: &[usize], seed: u64) -> Vec<f32> {
    let count: usize = shape.iter().product();
    let inputs = shape.last().copied().unwrap_or(1);
    let (stream, root) = (random::stream(name, seed), (inputs as f64).sqrt());
    (0..count).map(|index| ((2.0 * random::uniform(stream, index as u64) - 1.0) / root) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Check {
        shape: [usize; 2],
        sum: f64,
        sumsq: f64,
        first4: [f64; 4],
    }

    #[test]
    fn meets_the_reference_run() {
        let text = include_str!("../tests/golden/lora_init.json");
        let golden: serde_json::Value = serde_json::from_str(text).unwrap();
        let checks: std::collections::BTreeMap<String, Check> =
            serde_json::from_value(golden["checks"].clone()).unwrap();
        assert!(checks.len() >= 7);
        for (name, check) in checks {
            let values: Vec<f64> = golden_init(&name, &check.shape, 42).into_iter().map(f64::from).collect();
            let first = values[..4].iter().map(|value| *value as f32);
            assert!(first.eq(check.first4.iter().map(|value| *value as f32)), "{name}: {values:?}");
            let (sum, sumsq) = (values.iter().sum::<f64>(), values.iter().map(|v| v * v).sum::<f64>());
            assert!((sum - check.sum).abs() < 1e-9 && (sumsq - check.sumsq).abs() < 1e-9, "{name}: {sum} {sumsq}");
        }
    }

    #[test]
    fn depends_on_name_and_seed() {
        let first = golden_init("a", &[2, 8], 1);
        assert_ne!(first, golden_init("b", &[2, 8], 1));
        assert_ne!(first, golden_init("a", &[2, 8], 2));
        assert_eq!(first, golden_init("a", &[2, 8], 1));
        assert!(golden_init("a", &[0, 8], 1).is_empty());
    }
}
