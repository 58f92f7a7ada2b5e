//! Perplexity of a real text, through the program: one number that every layer of the stack moves.
//!
//! `kinglet perplexity` follows llama.cpp's protocol (windows of 512 tokens, the second half of each scored), so the
//! bounds are its figures: 23.97 with 8-bit activations, 23.87 with exact ones, on the Q4_1 file of SmolLM2.

use kinglet_tests::data::{self, alone, file, heavy, model};
use kinglet_tests::process::stdout;

fn perplexity(id: &str, options: &[&str]) -> f64 {
    let _alone = alone();
    let (model, text) = (model(id), file("handbook.txt"));
    let (model, text) = (model.to_string_lossy(), text.to_string_lossy());
    let printed = stdout(&[&["perplexity", &model, &text, "--json"], options].concat());
    let report: serde_json::Value = serde_json::from_str(&printed).expect("one JSON object");
    report["perplexity"].as_f64().expect("a figure named `perplexity`")
}

fn assert_within(id: &str, low: f64, high: f64) {
    let found = perplexity(id, &[]);
    println!("{id}: {found:.4}");
    assert!((low..=high).contains(&found), "{id}: perplexity {found:.4} is not between {low} and {high}");
}

#[test]
fn smollm2() {
    assert_within("smollm2", 23.75, 24.09);
}

/// llama.cpp: 24.0673.
#[test]
fn qwen2_5_coder() {
    if heavy() {
        assert_within("qwen2.5-coder", 23.95, 24.19);
    }
}

/// llama.cpp: 25.1498.
#[test]
fn gemma3() {
    if heavy() {
        assert_within("gemma3", 25.02, 25.28);
    }
}

/// Two windows on a software driver take minutes.
#[test]
fn gpu_windows_are_the_cpus() {
    for id in data::MODELS.into_iter().filter(|_| heavy()) {
        let [cpu, gpu] = ["cpu", "gpu:0"].map(|place| perplexity(id, &["--windows", "2", "--backend", place]));
        println!("{id}: {cpu:.4} on the CPU, {gpu:.4} on the GPU");
        assert!((gpu / cpu - 1.0).abs() < 0.005, "{id}: perplexity {gpu} on the GPU, {cpu} on the CPU");
    }
}
