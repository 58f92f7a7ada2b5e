//! The GPU backend against the CPU's exact arithmetic: the same models, the same tokens, nearly the same numbers.
//!
//! A machine without a GPU needs lavapipe (`mesa-vulkan-drivers`); with no adapter at all these tests fail. Small limits are
//! asked for, so that even tiny models are split over several buffers.

use std::sync::Arc;

use kinglet_engine::gpu::{self, Limits};
use kinglet_engine::quant::DType;
use kinglet_engine::session::{Arithmetic, Device, Model, Session, SessionOptions};
use kinglet_models::tiny::{TinyConfig, write_tiny};
use kinglet_tests::compare::{argmax, divergence};
use kinglet_tests::data::{Random, Scratch};

/// The device under test: `KINGLET_GPU`, or the first.
fn device(binding_bytes: Option<u64>) -> Arc<gpu::Device> {
    let index = std::env::var("KINGLET_GPU").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    gpu::Device::open(index, Limits { binding_bytes }).expect("a GPU, or lavapipe in its place")
}

fn open(scratch: &Scratch, config: &TinyConfig) -> Model {
    let path = scratch.path("tiny.gguf");
    write_tiny(&path, config).expect("a tiny model");
    kinglet_models::open(&path).expect("the model opens")
}

fn options(device: Device) -> SessionOptions {
    let arithmetic = Arithmetic::Exact;
    SessionOptions { context: 256, threads: 1, kv_type: DType::F32, device, arithmetic, ..SessionOptions::default() }
}

/// Logits after a prompt and after each of some further tokens.
fn logits(model: &Model, options: &SessionOptions, prompt: &[u32], more: &[u32]) -> Vec<Vec<f32>> {
    let mut session = Session::new(model, options).expect("a session");
    let mut all = vec![session.feed(prompt).expect("the prompt").to_vec()];
    all.extend(more.iter().map(|token| session.feed(&[*token]).expect("a token").to_vec()));
    all
}

/// The largest difference, relative to the spread of the logits.
fn distance(ours: &[f32], wanted: &[f32]) -> f32 {
    let mean = wanted.iter().sum::<f32>() / wanted.len() as f32;
    let spread = (wanted.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / wanted.len() as f32).sqrt();
    ours.iter().zip(wanted).fold(0.0, |worst: f32, (a, b)| worst.max((a - b).abs())) / spread
}

fn tokens(model: &Model, seed: u64, count: usize) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..count).map(|_| random.below(model.spec().vocab) as u32).collect()
}

fn compare(name: &str, model: &Model, device: &Arc<gpu::Device>) {
    let (prompt, more) = (tokens(model, 1, 75), tokens(model, 2, 6));
    let wanted = logits(model, &options(Device::Cpu), &prompt, &more);
    let ours = logits(model, &options(Device::Open(device.clone())), &prompt, &more);
    for (step, (ours, wanted)) in ours.iter().zip(&wanted).enumerate() {
        let distance = distance(ours, wanted);
        assert!(distance < 1e-3, "{name}, step {step}: {distance}");
        assert!(divergence(wanted, ours) < 1e-6 && argmax(ours) == argmax(wanted), "{name}, step {step}");
    }
}

fn architectures() -> Vec<TinyConfig> {
    TinyConfig::architectures()
        .filter(|arch| kinglet_models::families::known().contains(arch))
        .map(TinyConfig::new)
        .collect()
}

/// Every architecture, with prompts longer than a tile and the sliding window.
#[test]
fn gpu_logits_are_the_cpus_for_every_architecture() {
    let device = device(None);
    for config in architectures() {
        let scratch = Scratch::new(&format!("gpu-{}", config.arch));
        let config = TinyConfig { dtype: DType::F32, embedding: DType::F32, ..config };
        compare(&config.arch.clone(), &open(&scratch, &config), &device);
    }
}

/// Every type of weights, in rows longer than 1,024 elements, on a device whose bindings are so small that matrices and
/// tables come in pieces.
#[test]
fn gpu_logits_are_the_cpus_for_every_type() {
    let (whole, small) = (device(None), device(Some(192 << 10)));
    for dtype in DType::WEIGHTS {
        let scratch = Scratch::new(&format!("gpu-{dtype}"));
        let config = TinyConfig::new("llama");
        let config = TinyConfig {
            width: 256,
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            ffn: 1_280,
            dtype,
            embedding: dtype,
            ..config
        };
        let model = open(&scratch, &config);
        compare(dtype.name(), &model, &whole);
        compare(&format!("{dtype} in pieces"), &model, &small);
    }
}
