//! The GPU backend against the CPU's exact arithmetic: the same models, the same tokens, nearly the same numbers.
//!
//! A machine without a GPU needs lavapipe (`mesa-vulkan-drivers`); with no adapter at all these tests fail. Small limits are
//! asked for, so that even tiny models are split over several buffers.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kinglet_engine::adapter::{Adapter, BaseId, LowRank};
use kinglet_engine::gpu::{self, Limits};
use kinglet_engine::quant::DType;
use kinglet_engine::session::{
    Arithmetic, Device, Engine, LearnBatch, Learner, LearnerOptions, Model, Session, SessionOptions, SoftBatch,
};
use kinglet_engine::tape::{LoraSpec, Param, Trained};
use kinglet_models::tiny::TinyConfig;
use kinglet_tests::compare::{argmax, divergence};
use kinglet_tests::data::{self, Random, Scratch, alone, heavy, maps, tiny};
use kinglet_train::optimizer::{AdamW, Options, Parameter};

/// The device under test: `KINGLET_GPU`, or the first.
pub(crate) fn device(limits: Limits) -> Arc<gpu::Device> {
    let index = std::env::var("KINGLET_GPU").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    gpu::Device::open(index, limits).expect("a GPU, or lavapipe in its place")
}

/// All that the device has.
pub(crate) fn whole() -> Arc<gpu::Device> {
    device(Limits::default())
}

/// Such small bindings, and nothing that WebGPU does not promise.
pub(crate) fn small(binding_bytes: u64) -> Arc<gpu::Device> {
    device(Limits { binding_bytes: Some(binding_bytes), baseline: true, ..Limits::default() })
}

pub(crate) fn options(device: Device) -> SessionOptions {
    let arithmetic = Arithmetic::Exact;
    SessionOptions {
        context: 256,
        chunk: 16,
        threads: 1,
        kv_type: DType::F32,
        device,
        arithmetic,
        ..SessionOptions::default()
    }
}

/// A tiny model with rows of more than 1,024 elements.
pub(crate) fn wide(arch: &str) -> TinyConfig {
    TinyConfig { width: 256, heads: 4, kv_heads: 2, head_dim: 64, ffn: 1_280, ..TinyConfig::new(arch) }
}

/// One sequence of which every token is to be predicted from those before it.
pub(crate) fn next_tokens(ids: Vec<u32>) -> LearnBatch {
    let count = ids.len() - 1;
    LearnBatch {
        lengths: vec![ids.len()],
        outputs: (0..count as u32).collect(),
        targets: ids[1..].to_vec(),
        tokens: ids,
        weights: vec![1.0 / count as f32; count],
        ..LearnBatch::default()
    }
}

/// Logits after a prompt and after each of some further tokens.
pub(crate) fn logits(model: &Model, options: &SessionOptions, prompt: &[u32], more: &[u32]) -> Vec<Vec<f32>> {
    let mut session = Session::new(model, options).expect("a session");
    let mut all = vec![session.feed(prompt).expect("the prompt").to_vec()];
    all.extend(more.iter().map(|token| session.feed(&[*token]).expect("a token").to_vec()));
    all
}

/// The largest difference, relative to the spread of the logits.
pub(crate) fn distance(ours: &[f32], wanted: &[f32]) -> f32 {
    let mean = wanted.iter().sum::<f32>() / wanted.len() as f32;
    let spread = (wanted.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / wanted.len() as f32).sqrt();
    ours.iter().zip(wanted).fold(0.0, |worst: f32, (a, b)| worst.max((a - b).abs())) / spread
}

pub(crate) fn tokens(model: &Model, seed: u64, count: usize) -> Vec<u32> {
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

pub(crate) fn architectures() -> Vec<TinyConfig> {
    TinyConfig::architectures()
        .filter(|arch| kinglet_models::families::known().contains(arch))
        .map(TinyConfig::new)
        .collect()
}

/// Every architecture, with prompts longer than a tile and the sliding window.
#[test]
fn gpu_logits_are_the_cpus_for_every_architecture() {
    let device = whole();
    for config in architectures() {
        let scratch = Scratch::new(&format!("gpu-{}", config.arch));
        let config = TinyConfig { dtype: DType::F32, embedding: DType::F32, ..config };
        compare(&config.arch.clone(), &tiny(&scratch, &config), &device);
    }
}

/// Every type of weights, in rows longer than 1,024 elements; then on a device that has no more than WebGPU's baseline, and
/// bindings so small that matrices and tables come in pieces.
#[test]
fn gpu_logits_are_the_cpus_for_every_type() {
    let (whole, small) = (whole(), small(400 << 10));
    for dtype in DType::WEIGHTS {
        let scratch = Scratch::new(&format!("gpu-{dtype}"));
        let config = TinyConfig { dtype, embedding: dtype, ..wide("llama") };
        let model = tiny(&scratch, &config);
        compare(dtype.name(), &model, &whole);
        compare(&format!("{dtype} in pieces"), &model, &small);
    }
}

/// Kernels are timed and the times kept; then the file is made to say that products of eight bits are the quickest, and they
/// are taken: nearly the CPU's logits, but where single precision is asked for, whose products come in parts then.
#[test]
fn gpu_products_of_eight_bits_are_nearly_the_cpus() {
    for dtype in [DType::Q4_1, DType::Q4_K, DType::Q6_K, DType::Q8_0] {
        let scratch = Scratch::new(&format!("gpu-int8-{dtype}"));
        let model = tiny(&scratch, &TinyConfig { dtype, embedding: dtype, ..wide("llama") });
        let folder = scratch.path("tuning");
        let (prompt, more) = (tokens(&model, 1, 75), tokens(&model, 2, 6));
        let run = |arithmetic| {
            // Every time a device of its own, as in another process.
            let tuning = gpu::Tuning { folder: Some(folder.clone()), int8: true, software: true, again: false };
            let device = Device::Tuned(Box::new(Device::Open(whole())), tuning);
            let options = SessionOptions { arithmetic, chunk: 80, ..options(device) };
            logits(&model, &options, &prompt, &more)
        };
        run(Arithmetic::Narrow);
        let mut files = std::fs::read_dir(&folder).expect("a folder").map(|entry| entry.expect("a file").path());
        let file = files.find(|path| path.extension().is_some_and(|e| e == "json")).expect("times");
        let text = std::fs::read_to_string(&file).expect("the file");
        let mut times: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let mut forced = 0;
        for entry in times["tuned"].as_array_mut().expect("entries") {
            let shapes = if entry["family"] == "few rows" { 4 } else { 3 };
            for c in entry["candidates"].as_array_mut().expect("candidates") {
                if c["kernel"].as_str().is_some_and(|name| name.ends_with("int8")) {
                    c["seconds"] = vec![1e-9; shapes].into();
                    forced += 1;
                } else if c["kernel"] == "tile" {
                    // So slow that products are divided.
                    c["seconds"] = vec![10.0; shapes].into();
                }
            }
        }
        assert_eq!(forced, 3, "{dtype}: {text}");
        std::fs::write(&file, times.to_string()).expect("the file");

        let wanted = logits(&model, &options(Device::Cpu), &prompt, &more);
        for arithmetic in [Arithmetic::Narrow, Arithmetic::Exact] {
            for (step, (ours, wanted)) in run(arithmetic).iter().zip(&wanted).enumerate() {
                let (distance, divergence) = (distance(ours, wanted), divergence(wanted, ours));
                let what = format!("{dtype}, {arithmetic:?}, step {step}: {distance}, {divergence}");
                match arithmetic {
                    Arithmetic::Exact => assert!(distance < 1e-3, "{what}"),
                    // Rounded, and no more than that.
                    _ => assert!((1e-3..0.2).contains(&distance) && divergence < 2e-3, "{what}"),
                }
            }
        }
    }
}

/// An adapter of all linear maps of the layers.
pub(crate) fn adapter(model: &Model, rank: usize, seed: u64) -> Arc<Adapter> {
    let mut random = Random::new(seed);
    let mut entry = |inputs: usize, outputs: usize| LowRank {
        rank,
        inputs,
        outputs,
        a: random.normals(rank * inputs, 0.2),
        b: random.normals(rank * outputs, 0.2),
        magnitude: None,
    };
    let entries = model
        .gguf()
        .tensors()
        .iter()
        .filter(|t| t.name.starts_with("blk.") && t.shape.len() == 2)
        .map(|t| (t.name.clone(), entry(t.width(), t.rows())))
        .collect();
    let base = Some(BaseId::of(model.gguf()).expect("the model has an architecture"));
    Arc::new(Adapter { name: "random".into(), rank, alpha: rank as f32, rslora: false, entries, base })
}

/// Adapters at run time: one, two with factors, none again; prompts and single tokens.
#[test]
fn gpu_adapters_are_the_cpus() {
    let device = whole();
    for arch in ["llama", "gemma3", "phi3"] {
        let scratch = Scratch::new(&format!("gpu-adapters-{arch}"));
        let model = tiny(&scratch, &TinyConfig::new(arch));
        let (first, second) = (adapter(&model, 3, 1), adapter(&model, 8, 2));
        let sets = [vec![(first.clone(), 1.0)], vec![(first, -0.5), (second, 0.75)], vec![]];
        let run = |device: Device| {
            let mut session = Session::new(&model, &options(device)).expect("a session");
            let mut all = vec![session.feed(&tokens(&model, 1, 40)).expect("the base").to_vec()];
            for set in &sets {
                session.set_adapters(set).expect("the adapters match");
                session.rewind(0).expect("an empty window");
                all.push(session.feed(&tokens(&model, 1, 40)).expect("a prompt").to_vec());
                all.push(session.feed(&[7]).expect("a token").to_vec());
            }
            all
        };
        let (ours, wanted) = (run(Device::Open(device.clone())), run(Device::Cpu));
        assert!(distance(&wanted[1], &wanted[0]) > 0.1, "{arch}: the adapters change too little to show anything");
        for (step, (ours, wanted)) in ours.iter().zip(&wanted).enumerate() {
            // Factors of adapters on the CPU are f16 beside quantized weights.
            assert!(distance(ours, wanted) < 5e-3, "{arch}, step {step}: {}", distance(ours, wanted));
        }
    }
}

/// Adapters of everything that has rows: lengths (DoRA) of the layers' maps and the head, the embedding, beside soft caps.
#[test]
fn gpu_adapters_of_lengths_embedding_and_head_are_the_cpus() {
    let device = whole();
    for config in
        [TinyConfig { tied: false, ..TinyConfig::new("qwen2") }, TinyConfig::new("gemma2"), TinyConfig::new("phi3")]
    {
        let scratch = Scratch::new(&format!("gpu-all-adapters-{}", config.arch));
        let model = tiny(&scratch, &config);
        let mut random = Random::new(4);
        let mut entries: std::collections::BTreeMap<String, LowRank> = adapter(&model, 3, 1).entries.clone();
        for t in model.gguf().tensors().iter().filter(|t| t.name == "token_embd.weight" || t.name == "output.weight") {
            let (a, b) = (random.normals(3 * t.width(), 0.1), random.normals(3 * t.rows(), 0.1));
            let entry = LowRank { rank: 3, inputs: t.width(), outputs: t.rows(), a, b, magnitude: None };
            entries.insert(t.name.clone(), entry);
        }
        let plain = Arc::new(Adapter { entries: entries.clone(), ..(*adapter(&model, 3, 1)).clone() });
        for (name, entry) in &mut entries {
            let lengths = random.normals(entry.outputs, 0.1).iter().map(|v| 1.0 + v).collect();
            entry.magnitude = (name != "token_embd.weight").then_some(lengths);
        }
        let rescaled = Arc::new(Adapter { entries, ..(*plain).clone() });
        let sets =
            [vec![], vec![(plain.clone(), 1.0)], vec![(rescaled.clone(), 1.0)], vec![(plain, 0.5), (rescaled, -0.5)]];
        let run = |device: Device| {
            let mut session = Session::new(&model, &options(device)).expect("a session");
            let mut all = Vec::new();
            for set in &sets {
                session.rewind(0).expect("an empty window");
                session.set_adapters(set).expect("the adapters match");
                all.push(session.feed(&tokens(&model, 1, 40)).expect("a prompt").to_vec());
                all.push(session.feed(&[7]).expect("a token").to_vec());
            }
            all
        };
        let (ours, wanted) = (run(Device::Open(device.clone())), run(Device::Cpu));
        for (step, (ours, theirs)) in ours.iter().zip(&wanted).enumerate() {
            assert!(step < 2 || distance(theirs, &wanted[step % 2]) > 0.1, "{}, step {step}: no change", config.arch);
            assert!(distance(ours, theirs) < 5e-3, "{}, step {step}: {}", config.arch, distance(ours, theirs));
        }
    }
}

/// A window so long that a head's attention is divided, with and without a sliding window.
#[test]
fn gpu_long_windows_are_the_cpus() {
    let device = whole();
    for arch in ["llama", "gemma3"] {
        let scratch = Scratch::new(&format!("gpu-long-{arch}"));
        let model = tiny(&scratch, &TinyConfig { context: 2_048, sliding_window: 700, ..TinyConfig::new(arch) });
        let long = |device| SessionOptions { context: 2_048, chunk: 512, ..options(device) };
        let (prompt, more) = (tokens(&model, 1, 1_150), tokens(&model, 2, 4));
        let wanted = logits(&model, &long(Device::Cpu), &prompt, &more);
        let ours = logits(&model, &long(Device::Open(device.clone())), &prompt, &more);
        for (step, (ours, wanted)) in ours.iter().zip(&wanted).enumerate() {
            assert!(distance(ours, wanted) < 1e-3, "{arch}, step {step}: {}", distance(ours, wanted));
        }
    }
}

/// Several sequences decoded together, forked and shortened: pages are shared, copied and given back.
#[test]
fn gpu_sequences_share_pages_like_the_cpus() {
    let scratch = Scratch::new("gpu-sequences");
    let model = tiny(&scratch, &TinyConfig::new("qwen2"));
    let never = AtomicBool::new(false);
    let run = |device: Device| {
        let options = SessionOptions { chunk: 256, logit_rows: 3, ..options(device) };
        let mut engine = Engine::new(&model, &options).expect("an engine");
        let mut first = engine.sequence();
        let prompt = tokens(&model, 3, 150);
        engine.step(&mut [(&mut first, &prompt)], &never).expect("the prompt");
        let mut second = first.clone();
        let mut third = engine.sequence();
        engine.step(&mut [(&mut third, &prompt[..5])], &never).expect("another prompt");
        let mut all = Vec::new();
        for step in 0..4u32 {
            let (a, b, c) = ([step], [step + 7], [step + 20]);
            let mut feeds = [(&mut first, a.as_slice()), (&mut second, b.as_slice()), (&mut third, c.as_slice())];
            all.extend_from_slice(engine.step(&mut feeds, &never).expect("a step"));
        }
        second.truncate(100);
        drop(third);
        all.extend_from_slice(engine.step(&mut [(&mut second, &prompt[..40])], &never).expect("after a cut"));
        all
    };
    let (ours, wanted) = (run(Device::Open(whole())), run(Device::Cpu));
    let distance = distance(&ours, &wanted);
    assert!(distance < 1e-3, "{distance}");
}

fn learner(model: &Model, device: Device, (rank, dropout): (usize, f32), arithmetic: Arithmetic) -> Learner {
    let trained = LoraSpec { rank, scale: 1.5, weights: maps(model), dropout, ..LoraSpec::default() };
    learner_of(model, device, trained.into(), arithmetic)
}

pub(crate) fn learner_of(model: &Model, device: Device, trained: Trained, arithmetic: Arithmetic) -> Learner {
    let (threads, memory_budget) = (1, None);
    let gpu_import = false;
    let options =
        LearnerOptions { trained, tokens: 160, sequence: 0, arithmetic, threads, device, gpu_import, memory_budget };
    Learner::new(model, &options).expect("a learner")
}

/// Scores and gradients of a batch of sequences of several lengths, at parameters where every gradient counts.
pub(crate) fn gradients(model: &Model, learner: &mut Learner) -> (Vec<f32>, Vec<f32>) {
    let mut random = Random::new(11);
    // Weights and lengths of rows are not far from the model's, adapters are anything.
    let mut params = learner.initial().expect("parameters");
    let mut learns_head = learner.trained().lora().is_none();
    for p in learner.params() {
        let values = random.normals(p.rows * p.width, 1.0 / (p.width as f32).sqrt());
        let params = &mut params[p.offset..p.end()];
        match p.name.ends_with(".lora_a") || p.name.ends_with(".lora_b") {
            true => params.copy_from_slice(&values),
            false => params.iter_mut().zip(values).for_each(|(p, v)| *p *= 1.0 + 0.3 * v),
        }
        learns_head |= p.name == "output.weight.lora_a";
    }
    let lengths = vec![70, 1, 66, 23];
    let rows: usize = lengths.iter().sum();
    let outputs: Vec<u32> = (0..rows as u32).filter(|row| row % 3 != 1).collect();
    // Every fourth target is a distribution.
    let (mut soft, vocab) = (SoftBatch::default(), model.spec().vocab as u32);
    for i in 0..outputs.len() as u32 {
        match i % 4 {
            _ if learns_head => {}
            0 => soft.push(&[i, vocab / 2 + i, vocab - 1 - i], &[0.5, 0.3, 0.2]),
            _ => soft.push(&[], &[]),
        }
    }
    let batch = LearnBatch {
        tokens: tokens(model, 12, rows),
        lengths,
        targets: tokens(model, 13, outputs.len()),
        soft,
        weights: outputs.iter().map(|_| random.unit() - 0.25).collect(),
        outputs,
        dropout_seed: 5,
    };
    let mut gradients = vec![0.0; params.len()];
    let never = AtomicBool::new(false);
    let scores = learner.learn(&batch, &params, &mut gradients, &never).expect("gradients").to_vec();
    (scores, gradients)
}

fn compare_gradients(name: &str, model: &Model, device: &Arc<gpu::Device>, adapters: (usize, f32)) {
    let on_gpu = learner(model, Device::Open(device.clone()), adapters, Arithmetic::Exact);
    compare_learners(name, model, on_gpu, adapters, 1e-3);
}

/// Against the CPU's exact arithmetic: scores, and the gradient of every matrix, in its norm.
fn compare_learners(name: &str, model: &Model, mut learned: Learner, adapters: (usize, f32), most: f32) {
    let exact = learner(model, Device::Cpu, adapters, Arithmetic::Exact);
    compare_with(name, model, &mut learned, exact, most);
}

fn compare_with(name: &str, model: &Model, learned: &mut Learner, mut exact: Learner, most: f32) {
    let (wanted_scores, wanted) = gradients(model, &mut exact);
    let (scores, ours) = gradients(model, learned);
    assert!(distance(&scores, &wanted_scores) < most, "{name}: cross-entropies");
    assert_near(name, exact.params(), &ours, &wanted, most);
}

/// The gradient of every matrix, in its norm.
fn assert_near(name: &str, params: &[Param], ours: &[f32], wanted: &[f32], most: f32) {
    for p in params {
        let (ours, wanted) = (&ours[p.offset..p.end()], &wanted[p.offset..p.end()]);
        let norm = wanted.iter().map(|v| v * v).sum::<f32>().sqrt();
        let apart = ours.iter().zip(wanted).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
        assert!(apart < most * norm, "{name}, {}: {apart} of {norm}", p.name);
    }
}

/// The arithmetic a device uses by default, which may be of half precision.
#[test]
fn gpu_default_arithmetic_is_near_the_cpus() {
    let device = whole();
    for dtype in [DType::F16, DType::Q8_0, DType::Q4_K] {
        let scratch = Scratch::new(&format!("gpu-fast-{dtype}"));
        let model = tiny(&scratch, &TinyConfig { dtype, embedding: dtype, ..wide("llama") });
        let fast = |device| SessionOptions { arithmetic: Arithmetic::Narrow, chunk: 128, ..options(device) };
        let prompt = tokens(&model, 1, 100);
        let wanted = logits(&model, &options(Device::Cpu), &prompt, &[]);
        let ours = logits(&model, &fast(Device::Open(device.clone())), &prompt, &[]);
        let far = distance(&ours[0], &wanted[0]);
        assert!(far < 1e-2, "{dtype}: {far}");
        let learned = learner(&model, Device::Open(device.clone()), (8, 0.0), Arithmetic::Wide);
        compare_learners(dtype.name(), &model, learned, (8, 0.0), 1e-2);
    }
}

/// A step of a real model: the gradient of each of its 420 matrices.
#[test]
fn gpu_gradients_of_smollm2_are_the_cpus() {
    let _alone = alone();
    let model = kinglet_models::open(data::model("smollm2")).expect("the model opens");
    let trained = LoraSpec { rank: 8, scale: 2.0, weights: maps(&model), ..LoraSpec::default() };
    let run = |device: Device| {
        let options = LearnerOptions {
            trained: trained.clone().into(),
            tokens: 48,
            sequence: 0,
            arithmetic: Arithmetic::Exact,
            threads: 0,
            device,
            gpu_import: false,
            memory_budget: None,
        };
        let mut learner = Learner::new(&model, &options).expect("a learner");
        let mut random = Random::new(5);
        let mut params = vec![0.0; learner.param_count()];
        for p in learner.params() {
            params[p.offset..p.end()].copy_from_slice(&random.normals(p.rows * p.width, 0.02));
        }
        let batch = LearnBatch {
            tokens: tokens(&model, 21, 48),
            lengths: vec![48],
            outputs: (0..47).collect(),
            targets: tokens(&model, 21, 48).split_off(1),
            weights: vec![1.0 / 47.0; 47],
            ..LearnBatch::default()
        };
        let mut gradients = vec![0.0; params.len()];
        let scores = learner.learn(&batch, &params, &mut gradients, &AtomicBool::new(false)).expect("a step").to_vec();
        (scores, gradients, learner.params().to_vec())
    };
    let (wanted_scores, wanted, params) = run(Device::Cpu);
    let (scores, ours, _) = run(Device::Open(whole()));
    assert!(distance(&scores, &wanted_scores) < 1e-3);
    assert_near("smollm2", &params, &ours, &wanted, 1e-3);
}

/// A hundred steps of a tiny model: the curve of its losses is the CPU's.
#[test]
fn gpu_learns_as_the_cpu_over_a_hundred_steps() {
    let scratch = Scratch::new("gpu-steps");
    let model = tiny(&scratch, &TinyConfig::new("llama"));
    let run = |device: Device| {
        let mut learner = learner(&model, device, (8, 0.0), Arithmetic::Exact);
        let mut random = Random::new(3);
        let mut params = vec![0.0; learner.param_count()];
        for p in learner.params().iter().filter(|p| p.name.ends_with(".lora_a")) {
            params[p.offset..p.end()].copy_from_slice(&random.normals(p.rows * p.width, 0.1));
        }
        let all = Parameter { name: "adapters".into(), len: params.len(), decay: false };
        let mut optimizer = AdamW::new(Options::default(), &[all]);
        let mut gradients = vec![0.0; params.len()];
        let never = AtomicBool::new(false);
        let mut losses = Vec::new();
        for step in 0..100u64 {
            // Few texts, so that there is something to learn.
            let batch = next_tokens(tokens(&model, step % 4, 32));
            gradients.fill(0.0);
            let scores = learner.learn(&batch, &params, &mut gradients, &never).expect("a step");
            losses.push(scores.iter().sum::<f32>() / scores.len() as f32);
            optimizer.step(3e-3, &mut [&mut params], &[&gradients]).expect("an update");
        }
        losses
    };
    let (ours, wanted) = (run(Device::Open(whole())), run(Device::Cpu));
    assert!(wanted[99] < 0.8 * wanted[0], "nothing is learned: {} to {}", wanted[0], wanted[99]);
    for (step, (ours, wanted)) in ours.iter().zip(&wanted).enumerate() {
        assert!((ours - wanted).abs() < 0.01 * wanted, "step {step}: {ours} for {wanted}");
    }
}

/// Gradients of adapters for every architecture, with dropout.
#[test]
fn gpu_gradients_are_the_cpus_for_every_architecture() {
    let device = whole();
    for config in architectures() {
        let scratch = Scratch::new(&format!("gpu-gradients-{}", config.arch));
        let config = TinyConfig { dtype: DType::F32, embedding: DType::F32, ..config };
        compare_gradients(&config.arch.clone(), &tiny(&scratch, &config), &device, (5, 0.2));
    }
}

fn compare_trained(name: &str, model: &Model, device: &Arc<gpu::Device>, trained: &Trained) {
    let exact = learner_of(model, Device::Cpu, trained.clone(), Arithmetic::Exact);
    let mut ours = learner_of(model, Device::Open(device.clone()), trained.clone(), Arithmetic::Exact);
    compare_with(name, model, &mut ours, exact, 1e-3);
}

/// DoRA, and adapters of the embedding and the head, whole and in pieces; ranks that are read by four and others.
#[test]
fn gpu_gradients_of_lengths_embedding_and_head_are_the_cpus() {
    let (whole, small) = (whole(), small(8 << 20));
    let configs = [
        TinyConfig { tied: false, ..TinyConfig::new("llama") },
        TinyConfig { tied: false, ..TinyConfig::new("qwen2").with_bpe() },
        TinyConfig::new("gemma2"),
        TinyConfig::new("qwen3"),
        TinyConfig::new("phi3"),
    ];
    for config in configs {
        let scratch = Scratch::new(&format!("gpu-lengths-{}", config.arch));
        let model = tiny(&scratch, &config);
        let all: Vec<String> =
            model.weights().iter().filter(|(_, w)| w.rows > 1).map(|(_, w)| w.name.clone()).collect();
        for (dora, rank) in [(false, 8), (false, 3), (true, 8), (true, 5)] {
            // Rows of the embedding have no learned lengths.
            let weights = all.iter().filter(|name| !dora || *name != "token_embd.weight").cloned().collect();
            let trained = LoraSpec { rank, scale: 1.5, weights, dropout: 0.1, dora }.into();
            let name = format!("{}, rank {rank}, {dora}", config.arch);
            compare_trained(&name, &model, &whole, &trained);
            compare_trained(&format!("{name} on a small device"), &model, &small, &trained);
        }
    }
}

/// All weights of every architecture: matrices, biases, norms, the embedding, the head.
#[test]
fn gpu_gradients_of_all_weights_are_the_cpus() {
    let (whole, small) = (whole(), small(8 << 20));
    for config in architectures() {
        let scratch = Scratch::new(&format!("gpu-all-{}", config.arch));
        let model = tiny(&scratch, &config);
        compare_trained(&config.arch, &model, &whole, &Trained::All);
        compare_trained(&format!("{} on a small device", config.arch), &model, &small, &Trained::All);
    }
}

/// Gradients through every type of weights, rows longer than 1,024 elements, whole and in pieces.
#[test]
fn gpu_gradients_are_the_cpus_for_every_type() {
    let (whole, small) = (whole(), small(8 << 20));
    for dtype in DType::WEIGHTS {
        let scratch = Scratch::new(&format!("gpu-gradients-{dtype}"));
        let model = tiny(&scratch, &TinyConfig { dtype, embedding: dtype, ..wide("llama") });
        compare_gradients(dtype.name(), &model, &whole, (8, 0.0));
        compare_gradients(&format!("{dtype} on a small device"), &model, &small, (16, 0.0));
    }
}

/// Sixteen tokens of a real model, all of whose layers or the last ones run on the GPU: each step's distribution is the CPU's.
pub(crate) fn real(name: &str, gpu_layers: Option<usize>) {
    let _alone = alone();
    let model = kinglet_models::open(data::model(name)).expect("the model opens");
    let device = whole();
    let text = "The capital of France is";
    let prompt =
        model.tokenizer().encode(text, kinglet_engine::text::EncodeOptions { add_special: true, parse_special: false });
    let options =
        |device| SessionOptions { context: 64, chunk: 32, threads: 0, kv_type: DType::F16, ..options(device) };
    let mut cpu = Session::new(&model, &options(Device::Cpu)).expect("a session");
    let on_gpu = SessionOptions { gpu_layers, ..options(Device::Open(device)) };
    let mut gpu = Session::new(&model, &on_gpu).expect("a session");
    let mut feed = prompt;
    for step in 0..16 {
        let wanted = cpu.feed(&feed).expect("the CPU").to_vec();
        let ours = gpu.feed(&feed).expect("the GPU");
        let (kl, top) = (divergence(&wanted, ours), argmax(&wanted));
        assert!(kl < 1e-3 && argmax(ours) == top, "{name}, step {step}: KL {kl}, {} for {top}", argmax(ours));
        feed = vec![top as u32];
    }
}

#[test]
fn gpu_smollm2_says_what_the_cpu_says() {
    real("smollm2", None);
}

#[test]
fn gpu_gemma3_says_what_the_cpu_says() {
    if heavy() {
        real("gemma3", None);
    }
}

#[test]
fn gpu_qwen_says_what_the_cpu_says() {
    if heavy() {
        real("qwen2.5-coder", None);
    }
}

/// Counted from the recording: a decoded token reads every weight once, moves few values, and takes few dispatches.
#[test]
fn gpu_decoding_moves_little_but_the_weights() {
    for name in data::MODELS {
        let model = kinglet_models::open(data::model(name)).expect("the model opens");
        let options = SessionOptions { context: 64, chunk: 32, ..options(Device::Open(whole())) };
        let mut engine = Engine::new(&model, &options).expect("an engine");
        let traffic = engine.decode_traffic().expect("a recording").expect("a GPU");
        // A table that is no head gives a single row.
        let table = model.spec().embedding.tensor.as_str();
        let idle = |name: &str| name == table && model.spec().head.tensor != table;
        let matrices = model.weights().iter().filter(|(_, w)| w.vector().is_empty() && !idle(&w.name));
        let once: u64 = matrices.map(|(_, w)| w.len_bytes() as u64).sum();
        assert_eq!(traffic.weight_bytes, once, "{name}");
        assert!(traffic.value_bytes * 20 < traffic.weight_bytes, "{name}: {traffic:?}");
        let layers = model.spec().layers.len();
        // Beside the layers: a table and a head, which may come in two pieces, and the rows that go on (twice).
        assert!(traffic.dispatches <= 7 * layers + 6, "{name}: {traffic:?} for {layers} layers");
        println!("{name}: {traffic:?}");
    }
}
