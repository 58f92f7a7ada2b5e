//! Training of all weights from nothing, and what comes of a training: files and sessions compute what was trained.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kinglet_engine::gguf::Gguf;
use kinglet_engine::quant::DType;
use kinglet_engine::session::{
    Arithmetic, Device, LearnBatch, Learner, LearnerOptions, Model, Session, SessionOptions,
};
use kinglet_engine::tape::{LoraSpec, Trained};
use kinglet_engine::text::EncodeOptions;
use kinglet_models::scratch::write_scratch;
use kinglet_models::tiny::{TinyConfig, write_tiny};
use kinglet_tests::data::{Random, Scratch};
use kinglet_train::optimizer::{AdamW, Options, Parameter};

const TEXT: &str = "A kinglet is a small bird. It weighs five grams, sings at eight kilohertz and builds its nest of moss, \
                    lichen and spider silk under the twigs of a spruce.";

/// Every token of the sequences is predicted from those before it.
fn batch(tokens: &[u32], length: usize) -> LearnBatch {
    let outputs: Vec<u32> = (0..tokens.len()).filter(|i| (i + 1) % length != 0).map(|i| i as u32).collect();
    LearnBatch {
        targets: outputs.iter().map(|i| tokens[*i as usize + 1]).collect(),
        weights: vec![1.0 / outputs.len() as f32; outputs.len()],
        lengths: vec![length; tokens.len() / length],
        tokens: tokens.to_vec(),
        outputs,
        ..LearnBatch::default()
    }
}

fn options(trained: Trained) -> LearnerOptions {
    let arithmetic = Arithmetic::Exact;
    LearnerOptions {
        trained,
        tokens: 256,
        sequence: 0,
        arithmetic,
        threads: 1,
        device: Device::Cpu,
        gpu_import: false,
        memory_budget: None,
    }
}

fn mean(scores: &[f32]) -> f64 {
    scores.iter().map(|s| f64::from(*s)).sum::<f64>() / scores.len() as f64
}

fn score(learner: &mut Learner, batch: &LearnBatch, values: &[f32]) -> Vec<f32> {
    learner.score(batch, values, &AtomicBool::new(false)).expect("scores").to_vec()
}

/// Scores of the first sequence by a session, which computes logits from a cache, token by token.
fn session_scores(session: &mut Session, batch: &LearnBatch) -> Vec<f32> {
    let tokens = &batch.tokens[..batch.lengths[0]];
    let pairs = tokens.windows(2);
    pairs
        .map(|pair| {
            let logits = session.feed(&pair[..1]).expect("logits");
            let max = logits.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = logits.iter().map(|z| f64::from(z - max).exp()).sum();
            (sum.ln() + f64::from(max) - f64::from(logits[pair[1] as usize])) as f32
        })
        .collect()
}

fn session(model: &Model) -> Session {
    let options = SessionOptions { context: 128, threads: 1, kv_type: DType::F32, ..SessionOptions::default() };
    Session::new(model, &options).expect("a session")
}

fn close(ours: &[f32], theirs: &[f32], tolerance: f32) {
    assert!(ours.len() <= theirs.len() && !ours.is_empty());
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() < tolerance, "position {i}: {a}, {b}");
    }
}

#[test]
fn a_model_from_nothing_learns_a_text_by_heart_and_is_written() {
    let scratch = Scratch::new("from-scratch");
    let source = scratch.path("tokenizer.gguf");
    write_tiny(&source, &TinyConfig::new("qwen2").with_bpe()).expect("a tokenizer");
    let source = Gguf::open(&source).expect("it opens");
    for (arch, tied) in [("llama", false), ("qwen2", true), ("gemma3", true), ("chatglm", false)] {
        let path = scratch.path("nothing.gguf");
        let config = TinyConfig { layers: 2, tied, dtype: DType::F16, ..TinyConfig::new(arch) };
        write_scratch(&path, &config, &source).expect("a model from nothing");
        let model = kinglet_models::open(&path).expect("the model opens");
        let tokens = model.tokenizer().encode(TEXT, EncodeOptions { add_special: false, parse_special: false });
        assert_eq!(model.tokenizer().decode(&tokens, false), TEXT.as_bytes());
        let length = tokens.len() / 2;
        let batch = batch(&tokens[..2 * length], length);

        let mut learner = Learner::new(&model, &options(Trained::All)).expect("a learner");
        let mut values = learner.initial().expect("first values");
        let first = mean(&score(&mut learner, &batch, &values));
        let nothing = f64::from(model.spec().vocab as u32).ln();
        assert!((first - nothing).abs() < 0.2, "{arch} begins with {first}, but knows nothing: {nothing}");
        let all = Parameter { name: "all".into(), len: values.len(), decay: false };
        let mut optimizer = AdamW::new(Options::default(), &[all]);
        for _ in 0..120 {
            let mut gradients = vec![0.0; values.len()];
            learner.learn(&batch, &values, &mut gradients, &AtomicBool::new(false)).expect("a step");
            optimizer.step(5e-3, &mut [&mut values], &[&gradients]).expect("an optimizer step");
        }
        let learned = score(&mut learner, &batch, &values);
        println!("{arch}: {first:.3} → {:.4}", mean(&learned));
        assert!(mean(&learned) < 0.05, "{arch} has learned only to {}", mean(&learned));

        for (dtype, tolerance) in
            [(Some(DType::F32), 0.0), (Some(DType::BF16), 0.1), (None, 0.02), (Some(DType::Q8_0), 0.2)]
        {
            let path = scratch.path("learned.gguf");
            learner.write_model(&values, dtype, &path).expect("it is written");
            let written = kinglet_models::open(&path).expect("it opens");
            let matrix = written.gguf().tensor("blk.1.ffn_down.weight").expect("a matrix");
            assert_eq!(matrix.dtype, dtype.unwrap_or(DType::F16));
            let mut again = Learner::new(&written, &options(Trained::All)).expect("a learner");
            let read = again.initial().expect("its values");
            let scores = score(&mut again, &batch, &read);
            if tolerance == 0.0 {
                assert!(read == values && scores == learned, "{arch}: f32 comes back as it was");
                close(&session_scores(&mut session(&written), &batch), &learned, 2e-4);
            }
            close(&scores, &learned, tolerance + 1e-6);
        }
    }
}

/// Adapters as a learner computes them, and as a session applies them: two implementations.
#[test]
fn a_session_computes_what_was_trained() {
    let scratch = Scratch::new("trained-adapters");
    let cases: [(&str, bool, &[&str]); 6] = [
        ("llama", false, &["token_embd.weight", "output.weight"]),
        ("qwen2", true, &["output.weight"]),
        ("gemma3", true, &[]),
        ("gemma3", false, &["token_embd.weight"]),
        ("phi3", false, &["output.weight"]),
        ("chatglm", true, &[]),
    ];
    for (arch, dora, ends) in cases {
        let path = scratch.path("tiny.gguf");
        write_tiny(&path, &TinyConfig::new(arch)).expect("a tiny model");
        let model = kinglet_models::open(&path).expect("the model opens");
        let matrices = model.weights().iter().filter(|(_, w)| w.name.starts_with("blk.") && w.rows > 1);
        let mut weights: Vec<String> = matrices.map(|(_, w)| w.name.clone()).collect();
        weights.extend(ends.iter().map(|name| name.to_string()));
        let lora = LoraSpec { rank: 4, scale: 0.75, weights, dora, dropout: 0.5 };
        let mut learner = Learner::new(&model, &options(lora.into())).expect("a learner");
        let mut random = Random::new(3);
        let tokens: Vec<u32> = (0..40).map(|_| random.below(model.spec().vocab) as u32).collect();
        let batch = batch(&tokens, 40);
        let mut values = learner.initial().expect("first values");
        let base = session_scores(&mut session(&model), &batch);
        close(&score(&mut learner, &batch, &values), &base, 2e-4);
        for p in learner.params() {
            let values = &mut values[p.offset..p.end()];
            match p.name.ends_with("magnitude") {
                true => values.iter_mut().for_each(|v| *v *= 1.0 + 0.2 * random.normal()),
                false => values.copy_from_slice(&random.normals(p.rows * p.width, 0.5 / (p.width as f32).sqrt())),
            }
        }
        let adapter = Arc::new(learner.adapter(&values, "trained").expect("an adapter"));
        let mut session = session(&model);
        session.set_adapters(&[(adapter, 1.0)]).expect("it is applied");
        let (ours, theirs) = (session_scores(&mut session, &batch), score(&mut learner, &batch, &values));
        close(&ours, &theirs, 5e-4);
        let far = ours.iter().zip(&base).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far > 0.1, "the adapter changes nothing: {far}");
    }
}

#[test]
fn what_cannot_be_written_is_refused() {
    let scratch = Scratch::new("refused");
    let path = scratch.path("tiny.gguf");
    write_tiny(&path, &TinyConfig { layers: 1, ..TinyConfig::new("llama") }).expect("a tiny model");
    let model = kinglet_models::open(&path).expect("the model opens");
    let learner = Learner::new(&model, &options(Trained::All)).expect("a learner");
    let values = learner.initial().expect("first values");
    let to = scratch.path("out.gguf");
    let message = |result: kinglet_engine::Result<u64>| result.expect_err("a refusal").to_string();
    assert!(message(learner.write_model(&values[1..], None, &to)).contains("values for"));
    assert!(message(learner.write_model(&values, Some(DType::Q4_K), &to)).contains("block"));
    assert!(learner.adapter(&values, "a").is_err());
    let mut broken = values.clone();
    let norm = learner.params().iter().find(|p| p.name == "blk.0.ffn_norm.weight").expect("a norm");
    broken[norm.offset + 3] = f32::NAN;
    assert!(message(learner.write_model(&broken, None, &to)).contains("blk.0.ffn_norm.weight"));
    let lora = LoraSpec { rank: 2, scale: 1.0, weights: vec!["blk.0.attn_q.weight".into()], ..LoraSpec::default() };
    let adapters = Learner::new(&model, &options(lora.into())).expect("a learner");
    let values = adapters.initial().expect("first values");
    assert!(message(adapters.write_model(&values, None, &to)).contains("adapters"));
    assert!(!to.exists());
}
