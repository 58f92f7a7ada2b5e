//! Models: whatever a header promises, running it gives numbers or an error.

use std::sync::atomic::AtomicBool;

use kinglet_engine::session::{
    Arithmetic, Device, LearnBatch, Learner, LearnerOptions, Model, Session, SessionOptions,
};
use kinglet_engine::tape::LoraSpec;

use crate::gguf::open;

/// Bytes that one input may ask for.
const BUDGET: u64 = 256 << 20;

/// See the crate's text.
pub fn model(data: &[u8]) {
    let Ok(model) = open(data).and_then(kinglet_models::load) else { return };
    let vocabulary = model.spec().vocab as u32;
    let tokens: Vec<u32> = [1, 0, 7, 3].into_iter().filter(|t| *t < vocabulary).collect();
    run(&model, &tokens);
    learn(&model, &tokens);
}

pub(crate) fn options() -> SessionOptions {
    SessionOptions { context: 32, threads: 1, chunk: 2, memory_budget: Some(BUDGET), ..SessionOptions::default() }
}

fn run(model: &Model, tokens: &[u32]) {
    let Ok(mut session) = Session::new(model, &options()) else { return };
    let vocabulary = model.spec().vocab;
    if let Ok(logits) = session.feed(tokens) {
        assert_eq!(logits.len(), vocabulary);
        let _ = session.score(tokens, 0);
    }
}

fn learn(model: &Model, tokens: &[u32]) {
    if tokens.len() < 2 {
        return;
    }
    let maps = model.weights().iter().filter(|(_, w)| w.name.starts_with("blk.") && w.rows > 1);
    let weights = maps.map(|(_, w)| w.name.clone()).collect();
    let lora = LoraSpec { rank: 2, scale: 1.0, weights, dora: false, dropout: 0.0 };
    let options = LearnerOptions {
        trained: lora.into(),
        tokens: 8,
        sequence: 0,
        arithmetic: Arithmetic::Narrow,
        threads: 1,
        device: Device::Cpu,
        gpu_import: false,
        memory_budget: Some(BUDGET),
    };
    let Ok(mut learner) = Learner::new(model, &options) else { return };
    let Ok(params) = learner.initial() else { return };
    let count = tokens.len() - 1;
    let batch = LearnBatch {
        tokens: tokens.to_vec(),
        lengths: vec![tokens.len()],
        outputs: (0..count as u32).collect(),
        targets: tokens[1..].to_vec(),
        weights: vec![1.0; count],
        ..LearnBatch::default()
    };
    let mut gradients = vec![0.0; params.len()];
    if let Ok(scores) = learner.learn(&batch, &params, &mut gradients, &AtomicBool::new(false)) {
        assert_eq!(scores.len(), count);
    }
}
