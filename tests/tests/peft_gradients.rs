//! Gradients of LoRA and DoRA adapters against PEFT's, on a tiny model.
//!
//! `data/peft_gradients.json` was made by the script beside it: torch computes the same model, made from the same hashes,
//! with PEFT's adapters on all its maps. Of each trained tensor it gives the gradient's length, its first elements and
//! its product with a fixed vector.

use std::sync::atomic::AtomicBool;

use kinglet_engine::session::{Arithmetic, Device, LearnBatch, Learner, LearnerOptions};
use kinglet_engine::tape::LoraSpec;
use kinglet_models::tiny::{TinyConfig, write_tiny};
use kinglet_tests::data::{Scratch, file};
use kinglet_train::init::golden_init;

const TOKENS: u32 = 24;
const SEED: u64 = 7;

fn close(what: &str, ours: f64, reference: &serde_json::Value, tolerance: f64) {
    let reference = reference.as_f64().unwrap_or_else(|| panic!("{what} has no reference value"));
    assert!((ours - reference).abs() < tolerance, "{what}: {ours}, PEFT {reference}");
}

fn check(kind: &str) {
    let text = std::fs::read_to_string(file("peft_gradients.json")).expect("the reference values");
    let golden: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let golden = &golden[kind];
    let scratch = Scratch::new(&format!("peft-{kind}"));
    let path = scratch.path("tiny.gguf");
    write_tiny(&path, &TinyConfig { layers: 2, ..TinyConfig::new("qwen2") }).expect("a tiny model");
    let model = kinglet_models::open(&path).expect("the model opens");
    let weights = model.weights().iter().filter(|(_, w)| w.name.starts_with("blk.") && w.rows > 1);
    let ends = ["token_embd.weight", "output.weight"].into_iter().filter(|_| kind == "ends");
    let lora = LoraSpec {
        rank: 4,
        scale: 1.5,
        weights: weights.map(|(_, w)| w.name.clone()).chain(ends.map(String::from)).collect(),
        dora: kind == "dora",
        dropout: 0.0,
    };
    let arithmetic = Arithmetic::Exact;
    let options = LearnerOptions {
        trained: lora.into(),
        tokens: 64,
        sequence: 0,
        arithmetic,
        threads: 2,
        device: Device::Cpu,
        gpu_import: false,
        memory_budget: None,
    };
    let mut learner = Learner::new(&model, &options).expect("a learner");
    let mut params = learner.initial().expect("first values");
    for p in learner.params() {
        let values = &mut params[p.offset..p.end()];
        if p.name.ends_with("magnitude") {
            let sum = values.iter().map(|v| f64::from(*v)).sum();
            close(&format!("{} at first", p.name), sum, &golden["sums_of_magnitudes"][&p.name], 1e-5 * sum);
            let by = golden_init(&p.name, &[p.width], SEED);
            values.iter_mut().zip(by).for_each(|(v, by)| *v *= 1.0 + 0.3 * by);
        } else {
            values.copy_from_slice(&golden_init(&p.name, &[p.rows, p.width], SEED));
        }
    }
    let tokens: Vec<u32> = (0..TOKENS).map(|t| (37 * t + 11 * t * t) % 256).collect();
    let count = tokens.len() - 1;
    let batch = LearnBatch {
        targets: tokens[1..].to_vec(),
        outputs: (0..count as u32).collect(),
        weights: vec![1.0 / count as f32; count],
        lengths: vec![tokens.len()],
        tokens,
        ..LearnBatch::default()
    };
    let mut gradients = vec![0.0; params.len()];
    let scores = learner.learn(&batch, &params, &mut gradients, &AtomicBool::new(false)).expect("a step");
    let loss = scores.iter().map(|s| f64::from(*s)).sum::<f64>() / count as f64;
    close("the loss", loss, &golden["loss"], 1e-5);
    let theirs = golden["gradients"].as_object().expect("gradients by tensor");
    assert_eq!(theirs.len(), learner.params().len());
    for p in learner.params() {
        let (ours, theirs) = (&gradients[p.offset..p.end()], &theirs[&p.name]);
        let norm = ours.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        close(&format!("length of {}", p.name), norm, &theirs["norm"], 2e-5 * norm);
        let direction = golden_init(&format!("{}.direction", p.name), &[ours.len()], SEED);
        let along = ours.iter().zip(direction).map(|(g, d)| f64::from(*g) * f64::from(d)).sum();
        close(&format!("direction of {}", p.name), along, &theirs["along"], 2e-5 * norm);
        for (i, g) in ours.iter().take(3).enumerate() {
            close(&format!("element {i} of {}", p.name), f64::from(*g), &theirs["first"][i], 2e-5 * norm);
        }
    }
}

#[test]
fn lora_has_the_gradients_of_peft() {
    check("lora");
}

#[test]
fn embedding_and_head_have_the_gradients_of_peft() {
    check("ends");
}

#[test]
fn dora_has_the_gradients_of_peft() {
    check("dora");
}
