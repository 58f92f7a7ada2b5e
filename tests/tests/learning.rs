//! The gradients of a real model's adapters against PyTorch's, step by step.
//!
//! `data/train_smollm2_lora.json` holds losses and gradient norms of the first steps of a LoRA training, made by torch in
//! fp32 on weights dequantized from the same file. With exact arithmetic ours must be the same numbers; in 16-bit integers they
//! must hardly differ; in 8-bit integers, which is how training runs, they must be nearer than torch's own bf16.

use std::sync::atomic::AtomicBool;

use kinglet_engine::session::{Arithmetic, Device, LearnBatch, Learner, LearnerOptions};
use kinglet_engine::tape::LoraSpec;
use kinglet_engine::text::EncodeOptions;
use kinglet_tests::data::{alone, file, heavy, model};
use kinglet_train::init::golden_init;
use kinglet_train::optimizer::{AdamW, Options, Parameter};

const MAPS: [&str; 7] = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
const SEQUENCES: usize = 4;
const LENGTH: usize = 128;
/// Batches that the training goes through again and again.
const BATCHES: usize = 10;

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

/// Trains for `steps` and hands loss, gradient norm and gradients of each step to `check`.
fn train(arithmetic: Arithmetic, steps: usize, check: impl FnMut(usize, f64, &Learner, &[f32])) {
    train_within(arithmetic, None, steps, check);
}

/// The same with a budget of memory.
fn train_within(
    arithmetic: Arithmetic,
    memory_budget: Option<u64>,
    steps: usize,
    mut check: impl FnMut(usize, f64, &Learner, &[f32]),
) {
    let _alone = alone();
    let model = kinglet_models::open(model("smollm2")).expect("the model opens");
    let weights = (0..30).flat_map(|l| MAPS.map(|m| format!("blk.{l}.{m}.weight"))).collect();
    let lora = LoraSpec { rank: 8, scale: 2.0, weights, ..LoraSpec::default() };
    let options = LearnerOptions {
        trained: lora.into(),
        tokens: SEQUENCES * LENGTH,
        sequence: LENGTH,
        arithmetic,
        threads: 0,
        device: Device::Cpu,
        gpu_import: false,
        memory_budget,
    };
    let mut learner = Learner::new(&model, &options).expect("a learner");
    let mut params = vec![0.0; learner.param_count()];
    for p in learner.params().iter().filter(|p| p.name.ends_with(".lora_a")) {
        let values = golden_init(&p.name.replace(".weight", ""), &[p.rows, p.width], 42);
        params[p.offset..p.end()].copy_from_slice(&values);
    }
    let text = std::fs::read_to_string(file("handbook.txt")).expect("the text");
    let tokens = model.tokenizer().encode(&text, EncodeOptions { add_special: false, parse_special: false });
    let all = Parameter { name: "adapters".into(), len: params.len(), decay: false };
    let mut optimizer = AdamW::new(Options::default(), &[all]);
    let batches: Vec<&[u32]> = tokens.chunks_exact(SEQUENCES * LENGTH).take(BATCHES).collect();
    for (step, tokens) in batches.into_iter().cycle().take(steps).enumerate() {
        let outputs: Vec<u32> =
            (0..SEQUENCES * LENGTH).filter(|i| i % LENGTH != LENGTH - 1).map(|i| i as u32).collect();
        let batch = LearnBatch {
            targets: outputs.iter().map(|i| tokens[*i as usize + 1]).collect(),
            weights: vec![1.0 / outputs.len() as f32; outputs.len()],
            tokens: tokens.to_vec(),
            lengths: vec![LENGTH; SEQUENCES],
            outputs,
            ..LearnBatch::default()
        };
        let mut gradients = vec![0.0; params.len()];
        let scores = learner.learn(&batch, &params, &mut gradients, &AtomicBool::new(false)).expect("a step");
        let loss = scores.iter().map(|s| f64::from(*s)).sum::<f64>() / scores.len() as f64;
        check(step, loss, &learner, &gradients);
        optimizer.step(1e-4, &mut [&mut params], &[&gradients]).expect("an optimizer step");
    }
}

fn golden() -> serde_json::Value {
    let text = std::fs::read_to_string(file("train_smollm2_lora.json")).expect("the reference values");
    serde_json::from_str(&text).expect("JSON")
}

fn assert_close(what: &str, ours: f64, reference: &serde_json::Value, tolerance: f64) {
    let reference = reference.as_f64().unwrap_or_else(|| panic!("{what} has no reference value"));
    assert!((ours / reference - 1.0).abs() < tolerance, "{what}: {ours}, torch {reference}");
}

#[test]
fn exact_gradients_are_those_of_torch() {
    let golden = golden();
    train(Arithmetic::Exact, 3, |step, loss, learner, gradients| {
        assert_close(&format!("loss of step {step}"), loss, &golden["loss"][step], 1e-4);
        assert_close(&format!("gradient norm of step {step}"), norm(gradients), &golden["grad_norm"][step], 1e-3);
        if step == 1 {
            let of_tensors = golden["grad_norms_step_1"].as_object().expect("norms by tensor");
            for (name, reference) in of_tensors {
                let p = learner.params().iter().find(|p| p.name.replace(".weight", "") == *name).expect("the tensor");
                let ours = norm(&gradients[p.offset..p.end()]);
                // The norms of A are of the order of rounding where B has taken one step only.
                assert_close(name, ours, reference, 1e-2);
            }
        }
    });
}

/// Losses within 10⁻³, norms of all gradients within 5 · 10⁻³. By tensor only those of B can be compared so: after one step
/// of Adam every element of B is ±rate by the sign of its first gradient, which rounding decides where that is near zero,
/// and the gradients of A are products with B.
#[test]
fn gradients_in_16_bit_integers_hardly_differ_from_those_of_torch() {
    let golden = golden();
    train(Arithmetic::Wide, 5, |step, loss, learner, gradients| {
        assert_close(&format!("loss of step {step}"), loss, &golden["loss"][step], 1e-3);
        if let Some(norm_of_torch) = golden["grad_norm"].get(step) {
            assert_close(&format!("gradient norm of step {step}"), norm(gradients), norm_of_torch, 5e-3);
        }
        if step == 1 {
            for (name, reference) in golden["grad_norms_step_1"].as_object().expect("norms by tensor") {
                let p = learner.params().iter().find(|p| p.name.replace(".weight", "") == *name).expect("the tensor");
                let tolerance = if name.ends_with("lora_b") { 1e-2 } else { 4e-2 };
                assert_close(name, norm(&gradients[p.offset..p.end()]), reference, tolerance);
            }
        }
    });
}

/// How far off the whole curve is: the worst and the mean loss, the worst and the mean gradient norm.
fn fifty_steps(arithmetic: Arithmetic) -> [f64; 4] {
    let golden = golden();
    let off = |ours: f64, theirs: &serde_json::Value| (ours / theirs.as_f64().expect("a number") - 1.0).abs();
    let mut steps = 0;
    let mut worst = [0.0f64; 2];
    let mut sums = [0.0; 2];
    train(arithmetic, 50, |step, loss, _, gradients| {
        let of_step = [off(loss, &golden["loss"][step]), off(norm(gradients), &golden["grad_norm"][step])];
        for (i, off) in of_step.into_iter().enumerate() {
            worst[i] = worst[i].max(off);
            sums[i] += off;
        }
        steps += 1;
    });
    assert_eq!(steps, 50);
    let [loss, norm] = sums.map(|sum| sum / 50.0);
    println!(
        "{arithmetic:?}: losses {loss:.1e}, at most {:.1e}; gradient norms {norm:.1e}, {:.1e}",
        worst[0], worst[1]
    );
    [worst[0], loss, worst[1], norm]
}

/// The whole curve: every loss within 1 %, every gradient norm within 2 %.
#[test]
fn fifty_steps_in_16_bit_integers_are_those_of_torch() {
    if heavy() {
        let [loss, _, norm, _] = fifty_steps(Arithmetic::Wide);
        assert!(loss < 0.01 && norm < 0.02);
    }
}

/// The same of the arithmetic that training runs in. The first steps of Adam are ±rate by the signs of gradients, those near zero
/// included, and the norm of the fourth step hangs on them: torch with bf16 autocast has that 12 % off (losses by 0.6 % in the mean
/// and 1.5 % at most, norms by 2.7 % in the mean).
#[test]
fn fifty_steps_in_8_bit_integers_are_those_of_torch() {
    if heavy() {
        let [loss, mean_loss, norm, mean_norm] = fifty_steps(Arithmetic::default());
        assert!(loss < 0.01 && mean_loss < 0.003 && norm < 0.02 && mean_norm < 0.01);
    }
}

/// At one point, where no earlier step counts: gradients in 8-bit integers beside exact ones.
#[test]
fn gradients_in_8_bit_integers_point_where_the_exact_ones_do() {
    let first_step = |arithmetic| {
        let mut first = None;
        train(arithmetic, 1, |_, loss, _, gradients| first = Some((loss, gradients.to_vec())));
        first.expect("a step")
    };
    let ((loss, gradients), (want, exact)) = (first_step(Arithmetic::Narrow), first_step(Arithmetic::Exact));
    let product: f64 = gradients.iter().zip(&exact).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    let cosine = product / norm(&gradients) / norm(&exact);
    println!("loss {:.1e} off, norm {:.1e}, cosine {cosine}", loss / want - 1.0, norm(&gradients) / norm(&exact) - 1.0);
    assert!((loss / want - 1.0).abs() < 3e-3 && (norm(&gradients) / norm(&exact) - 1.0).abs() < 1e-2);
    assert!(cosine > 0.99, "{cosine}");
}

/// A batch that is computed in several runs gives what it gives in one, but for the order of sums.
#[test]
fn runs_of_a_batch_do_not_show() {
    let (mut whole, mut parts) = (Vec::new(), Vec::new());
    let mut arenas = [0; 2];
    train_within(Arithmetic::Exact, Some(u64::MAX), 1, |_, _, learner, gradients| {
        (whole, arenas[0]) = (gradients.to_vec(), learner.estimate().arena);
    });
    train_within(Arithmetic::Exact, Some(430_000_000), 1, |_, _, learner, gradients| {
        (parts, arenas[1]) = (gradients.to_vec(), learner.estimate().arena);
    });
    assert!(arenas[1] * 3 < arenas[0] * 2, "{arenas:?}: the budget should divide the batch");
    let difference: Vec<f32> = whole.iter().zip(&parts).map(|(a, b)| a - b).collect();
    assert!(norm(&difference) < 1e-4 * norm(&whole), "{} of {}", norm(&difference), norm(&whole));
}

#[test]
fn the_loss_with_8_bit_activations_is_within_a_hundredth() {
    let golden = golden();
    train(Arithmetic::Narrow, 5, |step, loss, _, _| {
        assert_close(&format!("loss of step {step}"), loss, &golden["loss"][step], 1e-2);
    });
}
