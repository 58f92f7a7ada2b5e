//! Training whose state is on the GPU: the optimizer's steps, what is kept and resumed, what goes wrong.

use std::sync::atomic::AtomicBool;

use kinglet_engine::Error;
use kinglet_engine::session::{Arithmetic, Device, LearnBatch, Learner, LearnerOptions, Model, Session};
use kinglet_engine::tape::{KeepsTraining, LoraSpec, TrainingState};
use kinglet_models::tiny::TinyConfig;
use kinglet_tests::data::{Random, Scratch, maps, tiny};
use kinglet_train::config::TrainConfig;
use kinglet_train::metrics;
use kinglet_train::optimizer::{AdamW, Options, Parameter, clip_by_global_norm};
use kinglet_train::trainer::Progress;

use crate::gpu::{next_tokens, options, tokens, whole};
use crate::training::{Bench, complete, config, resumes, rolls_back, timeless, write_pairs};

const STEPS: u64 = 12;
/// The length to which gradients are clipped: those of some of the steps.
const CLIP: f64 = 1.0;

fn learner(model: &Model, device: Device) -> Learner {
    let trained = LoraSpec { rank: 5, scale: 1.5, weights: maps(model), ..LoraSpec::default() };
    let options = LearnerOptions {
        trained: trained.into(),
        tokens: 64,
        sequence: 0,
        arithmetic: Arithmetic::Exact,
        threads: 1,
        device,
        gpu_import: false,
        memory_budget: None,
    };
    Learner::new(model, &options).expect("a learner")
}

fn batch(model: &Model, step: u64) -> LearnBatch {
    next_tokens(tokens(model, step % 3, 32))
}

fn first(learner: &Learner) -> Vec<f32> {
    Random::new(3).normals(learner.param_count(), 0.1)
}

/// AdamW over the learner's parameters; weight decay applies to every second.
fn optimizer(learner: &Learner) -> AdamW {
    let parameters: Vec<Parameter> = learner
        .params()
        .iter()
        .enumerate()
        .map(|(i, p)| Parameter { name: p.name.clone(), len: p.rows * p.width, decay: i % 2 == 0 })
        .collect();
    AdamW::new(Options { weight_decay: 0.1, ..Options::default() }, &parameters)
}

/// The state and the norms of steps whose gradients come from the GPU and whose optimizer is the CPU's.
fn on_cpu(model: &Model) -> (TrainingState, Vec<f64>) {
    let mut learner = learner(model, Device::Open(whole()));
    let (mut params, mut optimizer, mut norms) = (first(&learner), optimizer(&learner), Vec::new());
    let never = AtomicBool::new(false);
    for step in 0..STEPS {
        let mut gradients = vec![0.0; params.len()];
        for half in 0..2 {
            learner.learn(&batch(model, 2 * step + half), &params, &mut gradients, &never).expect("a step");
        }
        norms.push(clip_by_global_norm(&mut [&mut gradients], CLIP));
        let (mut values, mut slices) = (Vec::new(), Vec::new());
        let mut rest = params.as_mut_slice();
        for p in learner.params() {
            let (part, behind) = rest.split_at_mut(p.rows * p.width);
            values.push(part);
            slices.push(&gradients[p.offset..p.end()]);
            rest = behind;
        }
        optimizer.step(1e-2, &mut values, &slices).expect("an update");
    }
    let [m, v] = optimizer.moments().expect("moments of 32 bits");
    (TrainingState { params, m, v }, norms)
}

fn keeper(learner: &mut Learner) -> &mut dyn KeepsTraining {
    learner.keeper().expect("a GPU keeps a training")
}

/// The same steps with everything on the GPU; `between` is done before each.
fn on_gpu(model: &Model, mut between: impl FnMut(&mut Learner, u64)) -> (TrainingState, Vec<f64>) {
    let mut learner = learner(model, Device::Open(whole()));
    let (mut optimizer, mut norms) = (optimizer(&learner), Vec::new());
    let params = first(&learner);
    let zeros = vec![0.0; params.len()];
    let state = TrainingState { params, m: zeros.clone(), v: zeros };
    let decays = optimizer.decays();
    keeper(&mut learner).hold(&state, &decays).expect("a place for the state");
    let never = AtomicBool::new(false);
    for step in 0..STEPS {
        between(&mut learner, step);
        keeper(&mut learner).clear_gradients().expect("gradients");
        for half in 0..2 {
            learner.learn_held(&batch(model, 2 * step + half), &never).expect("a step");
        }
        let norm = keeper(&mut learner).gradient_norm().expect("a norm");
        let factor = if norm > CLIP { (CLIP / norm) as f32 } else { 1.0 };
        keeper(&mut learner).update(&optimizer.next(1e-2), factor).expect("an update");
        optimizer.count();
        norms.push(norm);
    }
    (keeper(&mut learner).held().expect("the state"), norms)
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The optimizer on the device takes the steps of the one on the CPU, the same ones every time, whatever else the learner does
/// between them: it scores with other parameters, drops gradients of a step that is not taken, gives its memory back.
#[test]
fn gpu_optimizer_takes_the_cpus_steps() {
    let scratch = Scratch::new("gpu-adamw");
    let model = tiny(&scratch, &TinyConfig::new("llama"));
    let (wanted, wanted_norms) = on_cpu(&model);
    let (ours, norms) = on_gpu(&model, |_, _| {});
    assert!(wanted_norms.iter().any(|n| *n > CLIP), "nothing is clipped: {wanted_norms:?}");
    for (norm, wanted) in norms.iter().zip(&wanted_norms) {
        assert!((norm / wanted - 1.0).abs() < 1e-4, "norms {norms:?} for {wanted_norms:?}");
    }
    let moved = apart(&wanted.params, &first(&learner(&model, Device::Cpu)));
    let far = [apart(&ours.params, &wanted.params) / moved, apart(&ours.m, &wanted.m), apart(&ours.v, &wanted.v)];
    assert!(moved > 0.05 && far[0] < 1e-4 && far[1] < 1e-6 && far[2] < 1e-8, "{far:?} apart, {moved} moved");

    assert_eq!(on_gpu(&model, |_, _| {}), (ours.clone(), norms.clone()), "a second time");
    let never = AtomicBool::new(false);
    let (again, again_norms) = on_gpu(&model, |learner, step| {
        let other = vec![0.01; learner.param_count()];
        let scores = learner.score(&batch(&model, step), &other, &never).expect("scores").to_vec();
        let held = learner.score_held(&batch(&model, step), &never).expect("scores");
        assert!(apart(&scores, held) > 1e-3, "other parameters, other scores");
        learner.learn_held(&batch(&model, step + 1), &never).expect("gradients that are dropped");
        if step % 3 == 1 {
            assert!(learner.park().expect("memory is given back") > 0);
        }
    });
    assert_eq!((again, again_norms), (ours, norms), "with other things between the steps");
}

/// What is no number is seen before it is applied.
#[test]
fn gpu_norm_tells_what_is_no_number() {
    let scratch = Scratch::new("gpu-nan");
    let model = tiny(&scratch, &TinyConfig::new("llama"));
    let mut learner = learner(&model, Device::Open(whole()));
    let mut params = first(&learner);
    let count = params.len();
    let decays = vec![true; learner.params().len()];
    let never = AtomicBool::new(false);
    for (bad, wanted) in [(1.0, true), (f32::INFINITY, false), (f32::NAN, false)] {
        params[count / 2] = bad;
        let state = TrainingState { params: params.clone(), m: vec![0.0; count], v: vec![0.0; count] };
        keeper(&mut learner).hold(&state, &decays).expect("a place for the state");
        keeper(&mut learner).clear_gradients().expect("gradients");
        learner.learn_held(&batch(&model, 1), &never).expect("gradients");
        let norm = keeper(&mut learner).gradient_norm().expect("a norm");
        assert_eq!(norm.is_finite(), wanted, "{bad}: {norm}");
        let held = keeper(&mut learner).held().expect("the state");
        assert_eq!(apart(&held.params[..count / 2], &state.params[..count / 2]), 0.0, "nothing is applied");
    }
    let message = keeper(&mut learner).hold(&TrainingState::default(), &decays).expect_err("no state").to_string();
    assert!(message.contains("0, 0 and 0 values"), "{message}");
    assert!(learner.learn(&batch(&model, 1), &params, &mut vec![0.0; count], &never).is_err(), "not to be mixed");
}

/// A bench on the GPU, and settings whose whole state is there.
fn bench(name: &str) -> (Bench, TrainConfig) {
    let bench = Bench { device: Device::Open(whole()), ..Bench::new(name) };
    (bench, TrainConfig { state_8bit: false, ..config() })
}

#[test]
fn gpu_resumed_run_is_the_run() {
    let (bench, config) = bench("gpu-resumes");
    resumes(&bench, config.clone());
    // Moments of 8 bits are kept in main memory.
    resumes(
        &Bench { device: bench.device.clone(), ..Bench::new("gpu-resumes-8bit") },
        TrainConfig { state_8bit: true, ..config },
    );
}

#[test]
fn gpu_spike_is_rolled_back() {
    let (bench, config) = bench("gpu-spikes");
    rolls_back(&bench, config);
}

/// Checkpoints go from one backend to the other and back.
#[test]
fn gpu_and_cpu_resume_each_other() {
    let (mut bench, config) = bench("gpu-swaps");
    let data = write_pairs(&bench.scratch);
    let (gpu, go) = (bench.device.clone(), AtomicBool::new(false));
    bench.device = Device::Cpu;
    let (wanted, finished) = bench.train(&config, &data, "cpu");
    for step in 0..4u64 {
        bench.device = if step % 2 == 0 { gpu.clone() } else { Device::Cpu };
        let mut trainer = bench.trainer(&config, &data, "both", step > 0).expect("a trainer");
        assert_eq!(trainer.step(), 3 * step);
        while trainer.step() < 3 * step + 3 {
            assert!(matches!(trainer.advance(&go), Ok(Progress::Stepped(_))), "step {}", trainer.step());
        }
    }
    bench.device = gpu;
    let mut trainer = bench.trainer(&config, &data, "both", true).expect("a trainer");
    let ended = complete(&mut trainer).expect("a finished training");
    let lines = timeless(metrics::read(&bench.scratch.path("both/metrics.jsonl")).expect("metrics"));
    assert_eq!(lines.len(), wanted.len());
    for (ours, wanted) in lines.iter().zip(&wanted) {
        assert!((ours.loss / wanted.loss - 1.0).abs() < 0.03, "step {}: {} for {}", ours.step, ours.loss, wanted.loss);
    }
    assert!((ended.loss / finished.loss - 1.0).abs() < 0.03, "{} for {}", ended.loss, finished.loss);
}

/// A training whose device is lost says so, and goes on from its checkpoint on one that is opened anew, though a session has the
/// lost one still.
#[test]
fn gpu_training_resumes_after_its_device_was_lost() {
    let (bench, config) = bench("gpu-lost-training");
    let bench = Bench { device: Device::Gpu(0), ..bench };
    let data = write_pairs(&bench.scratch);
    let (wanted, _) = bench.train(&config, &data, "whole");
    let go = AtomicBool::new(false);
    let mut trainer = bench.trainer(&config, &data, "parts", false).expect("a trainer");
    let mut session = Session::new(&bench.model, &options(Device::Gpu(0))).expect("a session");
    for _ in 0..4 {
        assert!(matches!(trainer.advance(&go), Ok(Progress::Stepped(_))), "step {}", trainer.step());
    }
    let lost = trainer.learner_mut().gpu().expect("a GPU").clone();
    lost.destroy();
    for _ in 0..2 {
        assert!(matches!(trainer.advance(&go), Err(Error::Device { .. })));
    }
    assert!(session.feed(&[1, 2]).is_err(), "the session has another device");
    drop(trainer);
    let mut trainer = bench.trainer(&config, &data, "parts", true).expect("a trainer");
    assert_eq!(trainer.step(), 3);
    complete(&mut trainer).expect("a finished training");
    let parts = metrics::read(&bench.scratch.path("parts/metrics.jsonl")).expect("metrics");
    assert_eq!(timeless(parts), timeless(wanted));
}

/// All weights of a model from nothing: the same losses, and a file that a session computes with.
#[test]
fn gpu_trains_all_weights_as_the_cpu() {
    let (mut bench, config) = bench("gpu-full");
    let data = write_pairs(&bench.scratch);
    let config = TrainConfig { full: true, dropout: 0.0, lr: 2e-3, ..config };
    let (ours, finished) = bench.train(&config, &data, "gpu");
    bench.device = Device::Cpu;
    let (wanted, _) = bench.train(&config, &data, "cpu");
    assert_eq!(ours.len(), wanted.len());
    for (ours, wanted) in ours.iter().zip(&wanted) {
        assert!((ours.loss / wanted.loss - 1.0).abs() < 5e-3, "step {}: {} for {}", ours.step, ours.loss, wanted.loss);
        assert!((ours.grad_norm / wanted.grad_norm - 1.0).abs() < 2e-2, "step {}: norms", ours.step);
    }
    let [before, after] = finished.validation.expect("validation data");
    assert!(after < 0.9 * before, "validation {before} to {after}");
    let file = finished.files.iter().find(|f| f.extension().is_some_and(|e| e == "gguf")).expect("a model");
    assert!(kinglet_models::open(file).is_ok());
}
