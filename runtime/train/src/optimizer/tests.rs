//! AdamW against an implementation in other hands, and 8 bits against 32.

use super::*;
use crate::random::{splitmix64, uniform};

fn parameter(name: &str, len: usize, decay: bool) -> Parameter {
    Parameter { name: name.into(), len, decay }
}

/// Values and the number of the run that made them: `tests/golden/adamw.json`, `adamw.py`.
#[derive(serde::Deserialize)]
struct Run {
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    rates: Vec<f64>,
    values: Vec<f32>,
    gradients: Vec<Vec<f32>>,
    after: Vec<Vec<f64>>,
}

#[test]
fn meets_the_reference_run() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("../../tests/golden/adamw.json")).unwrap();
    let runs: Vec<Run> = serde_json::from_value(golden["runs"].clone()).unwrap();
    assert!(runs.len() >= 3);
    for run in runs {
        let options = Options { betas: run.betas, eps: run.eps, weight_decay: run.weight_decay, state_8bit: false };
        let mut values = run.values.clone();
        let mut optimizer = AdamW::new(options, &[parameter("p", values.len(), true)]);
        for ((gradients, rate), after) in run.gradients.iter().zip(&run.rates).zip(&run.after) {
            optimizer.step(*rate, &mut [&mut values], &[gradients]).unwrap();
            for (got, wanted) in values.iter().zip(after) {
                assert!((f64::from(*got) - wanted).abs() < 2e-6 * wanted.abs().max(1.0), "{got} instead of {wanted}");
            }
        }
    }
}

#[test]
fn decay_spares_what_it_should() {
    let options = Options { weight_decay: 0.5, ..Options::default() };
    let mut optimizer = AdamW::new(options, &[parameter("weight", 1, true), parameter("norm", 1, false)]);
    let (mut weight, mut norm) = ([2.0], [2.0]);
    optimizer.step(0.1, &mut [&mut weight, &mut norm], &[&[0.0], &[0.0]]).unwrap();
    assert_eq!((weight, norm), ([1.9], [2.0]));
}

/// Least squares towards values over four decades with noisy gradients: both kinds of state must come as close.
#[test]
fn eight_bits_track_thirty_two() {
    let len = SMALLEST_QUANTIZED + 100;
    let target: Vec<f32> = (0..len)
        .map(|i| (uniform(1, i as u64) as f32 - 0.5) * 10f32.powi(-((splitmix64(2, i as u64) % 4) as i32)))
        .collect();
    let train = |state_8bit: bool| {
        let mut optimizer = AdamW::new(Options { state_8bit, ..Options::default() }, &[parameter("p", len, true)]);
        let mut values = vec![0.0f32; len];
        for step in 0..300u64 {
            let noise = |i: usize| 0.02 * (uniform(100 + step, i as u64) as f32 - 0.5);
            let gradients: Vec<f32> = (0..len).map(|i| values[i] - target[i] + noise(i)).collect();
            let rate = 0.01 * (1.0 - step as f64 / 300.0);
            optimizer.step(rate, &mut [&mut values], &[&gradients]).unwrap();
        }
        (values, optimizer.state_bytes())
    };
    let ((full, bytes), (quantized, bytes_8bit)) = (train(false), train(true));
    let error = |a: &[f32], b: &[f32]| {
        (a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() / len as f64).sqrt()
    };
    let (loss, loss_8bit, apart) = (error(&full, &target), error(&quantized, &target), error(&full, &quantized));
    assert!(loss < 0.02, "{loss}");
    assert!(loss_8bit < 1.2 * loss + 1e-3 && apart < 5e-3, "{loss_8bit} beside {loss}, {apart} apart");
    assert_eq!(bytes, 8 * len);
    assert!(bytes_8bit < bytes / 3, "{bytes_8bit}");
}

#[test]
fn a_state_goes_on_where_it_was() {
    for state_8bit in [false, true] {
        let options = Options { state_8bit, weight_decay: 0.01, ..Options::default() };
        let parameters = [parameter("a", 5000, true), parameter("b", 7, false)];
        let gradients =
            |step: u64, len: usize| (0..len).map(|i| uniform(step, i as u64) as f32 - 0.5).collect::<Vec<_>>();
        let run = |optimizer: &mut AdamW, values: &mut [Vec<f32>; 2], steps: std::ops::Range<u64>| {
            for step in steps {
                let (a, b) = (gradients(step, 5000), gradients(step, 7));
                let [first, second] = values;
                optimizer.step(1e-3, &mut [first, second], &[&a, &b]).unwrap();
            }
        };
        let mut values = [vec![0.1; 5000], vec![0.2; 7]];
        let mut optimizer = AdamW::new(options, &parameters);
        run(&mut optimizer, &mut values, 0..3);
        let (saved, mut resumed_values) = (optimizer.export(), values.clone());
        run(&mut optimizer, &mut values, 3..6);
        let mut resumed = AdamW::new(options, &parameters);
        resumed.import(3, &saved).unwrap();
        run(&mut resumed, &mut resumed_values, 3..6);
        assert_eq!(values, resumed_values);
        assert_eq!((resumed.steps(), resumed.export()), (6, optimizer.export()));
        // The other kind of state, or a missing tensor, is refused and changes nothing.
        let mut other = AdamW::new(Options { state_8bit: !state_8bit, ..options }, &parameters);
        let message = other.import(3, &saved).unwrap_err().to_string();
        assert!(message.contains("lacks a.m") && other.steps() == 0, "{message}");
    }
}

#[test]
fn lengths_are_checked() {
    let mut optimizer = AdamW::new(Options::default(), &[parameter("a", 2, true)]);
    let mut values = [0.0; 2];
    let message = optimizer.step(0.1, &mut [&mut values], &[&[1.0]]).unwrap_err().to_string();
    assert!(message.contains("parameter a has 2 values"), "{message}");
    assert!(optimizer.step(0.1, &mut [], &[]).is_err());
    assert_eq!((optimizer.steps(), values), (0, [0.0; 2]));
}

#[test]
fn gradients_are_summed_and_clipped() {
    let (mut a, mut b) = (vec![3.0f32, 0.0], vec![0.0f32]);
    accumulate(&mut [&mut a, &mut b], &[&[0.0, 0.0], &[8.0]], 0.5);
    assert_eq!(clip_by_global_norm(&mut [&mut a, &mut b], 10.0), 5.0);
    assert_eq!((a[0], b[0]), (3.0, 4.0));
    assert_eq!(clip_by_global_norm(&mut [&mut a, &mut b], 1.0), 5.0);
    assert!((a[0] - 0.6).abs() < 1e-6 && (b[0] - 0.8).abs() < 1e-6);
    assert_eq!(clip_by_global_norm(&mut [&mut a], 0.0), f64::from(0.6f32));
    let mut wrong = vec![f32::NAN, 1.0];
    assert!(clip_by_global_norm(&mut [&mut wrong], 0.5).is_nan());
    assert_eq!(wrong[1], 1.0);
}
