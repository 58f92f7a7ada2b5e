//! What adapters do to a model: sessions with an adapter against models whose weights were merged with it.
//!
//! The two ways share no arithmetic: a session adds `h·Bᵀ` to what the kernels give, a merged model has other weights.

mod common;

use std::sync::Arc;

use common::{Folder, adapter};
use kinglet_engine::adapter::{LowRank, merge};
use kinglet_engine::quant::DType;
use kinglet_engine::session::{Model, Session, SessionOptions};
use kinglet_models::tiny::TinyConfig;

fn session(model: &Model, threads: usize) -> Session {
    let options = SessionOptions { context: 64, threads, kv_type: DType::F32, chunk: 16, ..SessionOptions::default() };
    Session::new(model, &options).unwrap()
}

/// Logits after a prompt in chunks and after each of some tokens, and scores.
fn run(session: &mut Session) -> Vec<f32> {
    let tokens: Vec<u32> = (0..29u32).map(|i| i * 37 % 250).collect();
    session.reset();
    let mut out = session.feed(&tokens).unwrap().to_vec();
    for token in [3, 99, 7] {
        out.extend_from_slice(session.feed(&[token]).unwrap());
    }
    session.reset();
    out.extend(session.score(&tokens, 0).unwrap());
    out
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_session_with_adapters_is_the_merged_model() {
    for arch in ["llama", "qwen2", "gemma3", "chatglm"] {
        for (dora, threads) in [(false, 1), (false, 3), (true, 2)] {
            let folder = Folder::new(&format!("merged-{arch}-{dora}-{threads}"));
            let model = folder.model(&TinyConfig::new(arch));
            let (one, two) = (Arc::new(adapter(&model, 4, 1, dora)), Arc::new(adapter(&model, 7, 2, false)));
            let merged_path = folder.0.join("merged.gguf");
            merge(model.gguf(), &[(&one, 1.0), (&two, -0.5)], None, &merged_path).unwrap();
            let expected = run(&mut session(&kinglet_models::open(&merged_path).unwrap(), threads));
            let mut ours = session(&model, threads);
            let base = run(&mut ours);
            let report = ours.set_adapters(&[(one.clone(), 1.0), (two.clone(), -0.5)]).unwrap();
            assert_eq!(report.tensors, [one.entries.len(), two.entries.len()]);
            let found = run(&mut ours);
            assert!(distance(&base, &expected) > 0.1, "{arch}: the adapters change too little to show anything");
            let apart = distance(&found, &expected);
            assert!(apart < 1e-4, "{arch}, DoRA {dora}, {threads} threads: logits differ by {apart}");
        }
    }
}

#[test]
fn setting_and_unsetting_disturbs_nobody() {
    let folder = Folder::new("swap");
    let model = folder.model(&TinyConfig::new("llama").with_dtype(DType::Q8_0));
    let (one, two) = (Arc::new(adapter(&model, 4, 1, false)), Arc::new(adapter(&model, 4, 2, true)));
    let (mut a, mut b) = (session(&model, 2), session(&model, 2));
    let base = run(&mut a);
    a.set_adapters(&[(one.clone(), 1.0)]).unwrap();
    let with_one = run(&mut a);
    assert_eq!(run(&mut b), base, "another session of the same model");
    b.set_adapters(&[(two.clone(), 1.0)]).unwrap();
    let with_two = run(&mut b);
    assert_eq!(run(&mut a), with_one);
    assert!(distance(&with_one, &base) > 0.1 && distance(&with_one, &with_two) > 0.1);
    a.set_adapters(&[(two.clone(), 1.0)]).unwrap();
    assert_eq!(run(&mut a), with_two, "swapped");
    a.set_adapters(&[(two, 0.0)]).unwrap();
    assert_eq!(run(&mut a), base, "a factor of 0");
    a.set_adapters(&[(one, 1.0)]).unwrap();
    assert_eq!(a.position(), 0, "the window belongs to the old weights");
    a.set_adapters(&[]).unwrap();
    assert_eq!(run(&mut a), base, "taken off");
}

#[test]
fn quantized_bases_take_half_precision_corrections() {
    let folder = Folder::new("quantized");
    let model = folder.model(&TinyConfig::new("llama").with_dtype(DType::Q4_K));
    let one = Arc::new(adapter(&model, 5, 1, true));
    let merged_path = folder.0.join("merged.gguf");
    merge(model.gguf(), &[(&one, 1.0)], Some(DType::F32), &merged_path).unwrap();
    let expected = run(&mut session(&kinglet_models::open(&merged_path).unwrap(), 2));
    let mut ours = session(&model, 2);
    let base = run(&mut ours);
    ours.set_adapters(&[(one, 1.0)]).unwrap();
    let found = run(&mut ours);
    let root_mean_square =
        |a: &[f32], b: &[f32]| (a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>() / a.len() as f32).sqrt();
    // What is left is the 8-bit activations of the base's maps, which a dense model does not have.
    assert!(root_mean_square(&found, &expected) < 0.1 * root_mean_square(&base, &expected));
}

#[test]
fn an_embedding_is_corrected_where_it_is_looked_up() {
    let folder = Folder::new("embedding");
    let model = folder.model(&TinyConfig::new("qwen2"));
    let mut one = adapter(&model, 4, 1, false);
    let (width, vocab) = (model.spec().width, model.spec().vocab);
    let values = |n: usize, k: f32| (0..n).map(|i| (i as f32 * k).sin()).collect();
    let entry = LowRank {
        rank: 3,
        inputs: width,
        outputs: vocab,
        a: values(3 * width, 0.7),
        b: values(3 * vocab, 0.3),
        magnitude: None,
    };
    one.entries.insert("token_embd.weight".into(), entry);
    let merged_path = folder.0.join("merged.gguf");
    merge(model.gguf(), &[(&one, 1.0)], None, &merged_path).unwrap();
    let expected = run(&mut session(&kinglet_models::open(&merged_path).unwrap(), 2));
    let mut ours = session(&model, 2);
    ours.set_adapters(&[(Arc::new(one), 1.0)]).unwrap();
    assert!(distance(&run(&mut ours), &expected) < 1e-4);
}

#[test]
fn adapters_count_in_the_memory_budget() {
    let folder = Folder::new("budget");
    let model = folder.model(&TinyConfig::new("llama"));
    let options = SessionOptions { context: 64, threads: 1, chunk: 16, ..SessionOptions::default() };
    let needed = Session::estimate(&model, &options).unwrap().resident();
    let mut session = Session::new(&model, &SessionOptions { memory_budget: Some(needed + 1000), ..options }).unwrap();
    let error = session.set_adapters(&[(Arc::new(adapter(&model, 8, 1, false)), 1.0)]).unwrap_err().to_string();
    assert!(error.contains("adapters"), "{error}");
    assert!(session.adapters().is_empty());
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let folder = Folder::new("other");
    let model = folder.model(&TinyConfig::new("llama"));
    let one = adapter(&model, 4, 1, false);
    let other = folder.model(&TinyConfig { seed: 2, ..TinyConfig::new("llama") });
    let error = session(&other, 1).set_adapters(&[(Arc::new(one), 1.0)]).unwrap_err().to_string();
    assert!(error.contains("fingerprint"), "{error}");
}
