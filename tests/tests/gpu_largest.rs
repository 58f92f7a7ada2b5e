//! Tokens that the GPU finds the largest logits for are those that the CPU's sampler chooses from all logits of the same GPU.
//! A bias of 0 changes no logit, but has all of them read back.

use kinglet_engine::quant::DType;
use kinglet_engine::sampling::SamplerOptions;
use kinglet_engine::session::{
    Batcher, Device, Engine, GenerateOptions, Model, Progress, Session, SessionOptions, Speculation,
};
use kinglet_models::tiny::TinyConfig;
use kinglet_tests::data::{self, Scratch, alone, tiny};

use crate::gpu::{architectures, options, small, tokens, whole};

/// Greedy; drawn from 40, from 7 with further filters, from too many to be found.
fn samplers() -> [SamplerOptions; 4] {
    let drawn = |top_k| SamplerOptions { top_k, temperature: 1.5, min_p: 0.0, seed: Some(5), ..Default::default() };
    let filtered = SamplerOptions { typical_p: 0.9, top_p: 0.8, min_p: 0.01, ..drawn(7) };
    [SamplerOptions::greedy(), drawn(40), filtered, drawn(100)]
}

fn all_read(sampler: &SamplerOptions) -> SamplerOptions {
    SamplerOptions { logit_bias: vec![(0, 0.0)], ..sampler.clone() }
}

fn answer(session: &mut Session, prompt: &[u32], sampler: SamplerOptions, count: usize) -> Vec<u32> {
    let options = GenerateOptions { sampler, max_tokens: count, ignore_end: true, ..Default::default() };
    session.reset();
    let mut generation = session.generate(prompt, options).expect("an answer");
    let mut all = Vec::new();
    while let Some(piece) = generation.next().expect("a token") {
        all.extend(piece.token);
    }
    assert_eq!(all.len(), count);
    all
}

fn compare(name: &str, model: &Model, options: &SessionOptions, count: usize) {
    let mut session = Session::new(model, options).expect("a session");
    let prompt = tokens(model, 1, 20);
    for sampler in samplers() {
        let ours = answer(&mut session, &prompt, sampler.clone(), count);
        let wanted = answer(&mut session, &prompt, all_read(&sampler), count);
        assert_eq!(ours, wanted, "{name}: {sampler:?}");
    }
}

/// Every architecture; a vocabulary of several chunks, on a device that has WebGPU's baseline only; and a divided model.
#[test]
fn gpu_finds_the_tokens_that_all_logits_give() {
    let device = whole();
    for config in architectures() {
        let scratch = Scratch::new(&format!("largest-{}", config.arch));
        compare(&config.arch, &tiny(&scratch, &config), &options(Device::Open(device.clone())), 24);
    }
    let scratch = Scratch::new("largest-vocabulary");
    let model = tiny(&scratch, &TinyConfig { vocab: 9_001, layers: 2, ..TinyConfig::new("gemma3") });
    for device in [whole(), small(1 << 20)] {
        let options = options(Device::Open(device));
        compare("9,001 tokens", &model, &options, 24);
        compare("divided", &model, &SessionOptions { gpu_layers: Some(1), ..options }, 24);
    }
}

/// The device does it, and only where it may.
#[test]
fn gpu_reads_few_logits_back_where_few_decide() {
    let scratch = Scratch::new("largest-used");
    let model = tiny(&scratch, &TinyConfig::new("llama"));
    let mut session = Session::new(&model, &options(Device::Open(whole()))).expect("a session");
    session.set_timing(true);
    for (i, sampler) in samplers().into_iter().enumerate() {
        for (sampler, found) in [(all_read(&sampler), false), (sampler, i < 3)] {
            answer(&mut session, &[1, 2, 3], sampler.clone(), 5);
            let timings = session.take_timings();
            let count = timings.iter().find(|t| t.op == "largest").map_or(0, |t| t.count);
            // Two dispatches for each token behind the prompt's.
            assert_eq!(count, if found { 8 } else { 0 }, "{sampler:?}");
        }
    }
}

/// Requests of all kinds together, and guesses.
#[test]
fn gpu_finds_the_tokens_of_several_answers() {
    let scratch = Scratch::new("largest-several");
    let model = tiny(&scratch, &TinyConfig { vocab: 5_000, ..TinyConfig::new("qwen2") });
    let options = SessionOptions { logit_rows: 3, ..options(Device::Open(whole())) };
    let run = |kinds: &[usize], read_all: bool| {
        let mut batcher = Batcher::new(Engine::new(&model, &options).expect("an engine"));
        let mut answers = std::collections::BTreeMap::new();
        for (i, kind) in kinds.iter().enumerate() {
            let sampler = &samplers()[*kind];
            let sampler = if read_all { all_read(sampler) } else { sampler.clone() };
            let options = GenerateOptions { sampler, max_tokens: 12, ignore_end: true, ..Default::default() };
            batcher.submit(&tokens(&model, i as u64, 9), options).expect("a request");
        }
        let report = |progress: Progress<'_>| {
            answers.entry(progress.request).or_insert_with(Vec::new).extend(progress.token);
        };
        batcher.run_all(report).expect("answers");
        answers
    };
    for kinds in [[0, 1, 2], [0, 0, 0], [1, 3, 0]] {
        assert_eq!(run(&kinds, false), run(&kinds, true), "{kinds:?}");
    }
    let mut session =
        Session::new(&model, &SessionOptions { logit_rows: Speculation::ROWS, ..options }).expect("a session");
    let text: Vec<u32> = [1, 2, 3, 4, 5].repeat(6);
    let mut guess = |speculation| {
        let options = GenerateOptions {
            sampler: SamplerOptions::greedy(),
            max_tokens: 20,
            ignore_end: true,
            speculation,
            ..Default::default()
        };
        session.reset();
        let mut generation = session.generate(&text, options).expect("an answer");
        let mut all = Vec::new();
        while let Some(piece) = generation.next().expect("a token") {
            all.extend(piece.token);
        }
        all
    };
    assert_eq!(guess(Speculation::Lookup), guess(Speculation::Off));
}

/// A logit that is none is the error that the CPU's sampler makes of it.
#[test]
fn gpu_names_a_logit_that_is_no_number() {
    let scratch = Scratch::new("largest-nan");
    let config = TinyConfig { tied: false, dtype: DType::F32, embedding: DType::F32, ..TinyConfig::new("llama") };
    let model = tiny(&scratch, &config);
    let head = model.gguf().tensors().iter().find(|t| t.name == model.spec().head.tensor).expect("a head");
    let (path, width) = (scratch.path("tiny.gguf"), head.width());
    let mut bytes = std::fs::read(&path).expect("a file");
    let data = model.gguf().data(head);
    let at = bytes.windows(256).position(|window| window == &data[..256]).expect("the head's bytes");
    bytes[at + 123 * width * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let damaged = scratch.path("damaged.gguf");
    std::fs::write(&damaged, bytes).expect("a file");
    let model = kinglet_models::open(&damaged).expect("the model opens");
    let error = |device: Device| {
        let mut session = Session::new(&model, &options(device)).expect("a session");
        session.feed(&[1, 2]).expect("logits");
        let sampler = SamplerOptions::greedy();
        let options = GenerateOptions { sampler, ..Default::default() };
        let mut generation = session.generate(&[1, 2, 3], options).expect("an answer");
        generation.next().map(|_| ()).expect_err("no token").to_string()
    };
    let told = error(Device::Open(whole()));
    assert!(told.contains("logit of token 123 is NaN"), "{told}");
    assert_eq!(told, error(Device::Cpu));
}

#[test]
fn gpu_smollm2_finds_the_tokens_that_all_logits_give() {
    let _alone = alone();
    let model = kinglet_models::open(data::model("smollm2")).expect("the model opens");
    let options = SessionOptions { context: 64, chunk: 32, threads: 0, ..options(Device::Open(whole())) };
    compare("smollm2", &model, &options, 16);
}
