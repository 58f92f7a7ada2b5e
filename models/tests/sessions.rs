//! Sessions: what may change how fast an answer comes must not change the answer.

mod common;

use std::sync::Arc;

use common::{Folder, adapter};
use kinglet_engine::quant::DType;
use kinglet_engine::sampling::{Mirostat, SamplerOptions};
use kinglet_engine::session::{
    EndReason, GenerateOptions, GenerationStats, Model, Session, SessionOptions, Speculation,
};
use kinglet_models::tiny::TinyConfig;

const TYPES: [DType; 8] =
    [DType::F32, DType::F16, DType::Q4_0, DType::Q4_1, DType::Q8_0, DType::Q4_K, DType::Q6_K, DType::IQ4_XS];

fn options() -> SessionOptions {
    SessionOptions { context: 256, threads: 2, chunk: 32, logit_rows: 6, ..SessionOptions::default() }
}

fn session(model: &Model) -> Session {
    Session::new(model, &options()).unwrap()
}

fn prompt(len: u32) -> Vec<u32> {
    (0..len).map(|i| i * i * 37 % 250).collect()
}

fn with_seed(seed: u64) -> SamplerOptions {
    SamplerOptions { seed: Some(seed), ..SamplerOptions::default() }
}

/// The tokens of an answer, and its counts.
fn answer(session: &mut Session, prompt: &[u32], options: GenerateOptions) -> (Vec<u32>, GenerationStats) {
    let mut generation = session.generate(prompt, options).unwrap();
    let mut tokens = Vec::new();
    while let Some(piece) = generation.next().unwrap() {
        tokens.extend(piece.token);
    }
    (tokens, generation.stats().clone())
}

#[test]
fn rows_that_are_computed_together_can_have_the_bits_of_single_ones() {
    for kv_type in [DType::F16, DType::F32, DType::Q8_0] {
        for dtype in TYPES {
            let folder = Folder::new(&format!("alone-{dtype}-{kv_type}"));
            let mut config = TinyConfig::new("llama").with_dtype(dtype);
            config.head_dim = config.head_dim.next_multiple_of(32);
            let model = folder.model(&config);
            let mut session = Session::new(&model, &SessionOptions { kv_type, ..options() }).unwrap();
            // Past a page of the cache and past blocks of attention.
            let (prompt, tokens) = (prompt(126), prompt(6));
            session.feed(&prompt).unwrap();
            let single: Vec<Vec<f32>> = tokens.iter().map(|t| session.feed(&[*t]).unwrap().to_vec()).collect();
            for count in 1..=tokens.len() {
                session.rewind(prompt.len()).unwrap();
                session
                    .logits_alone(&tokens[..count], |row, logits| {
                        assert!(logits == single[row], "{dtype}, cache {kv_type}, row {row} of {count}")
                    })
                    .unwrap();
            }
        }
    }
}

#[test]
fn adapters_do_not_tell_rows_apart() {
    let folder = Folder::new("alone-adapter");
    let model = folder.model(&TinyConfig::new("llama").with_dtype(DType::Q4_1));
    let mut session = session(&model);
    session.set_adapters(&[(Arc::new(adapter(&model, 5, 1, true)), 1.0)]).unwrap();
    let single: Vec<Vec<f32>> = prompt(5).iter().map(|t| session.feed(&[*t]).unwrap().to_vec()).collect();
    session.reset();
    session.logits_alone(&prompt(5), |row, logits| assert!(logits == single[row], "row {row}")).unwrap();
}

#[test]
fn guessing_ahead_changes_no_token() {
    let samplers = [
        SamplerOptions::greedy(),
        with_seed(1),
        SamplerOptions { top_k: 0, min_p: 0.0, ..with_seed(2) },
        SamplerOptions { repeat_penalty: 1.3, frequency_penalty: 0.2, dry_multiplier: 0.8, ..with_seed(3) },
        SamplerOptions { mirostat: Some(Mirostat { tau: 3.0, eta: 0.2 }), ..with_seed(4) },
    ];
    for dtype in [DType::F32, DType::Q4_1, DType::Q4_K] {
        let folder = Folder::new(&format!("speculate-{dtype}"));
        let config = TinyConfig::new("llama").with_dtype(dtype);
        let model = folder.named("model.gguf", &config);
        // One that guesses well, being the same weights rounded otherwise, and one that knows nothing.
        let near =
            folder.named("near.gguf", &TinyConfig { dtype: DType::Q8_0, embedding: DType::Q8_0, ..config.clone() });
        let far = folder.named("far.gguf", &TinyConfig { seed: 2, ..config });
        for sampler in &samplers {
            let plain = GenerateOptions { sampler: sampler.clone(), max_tokens: 100, ..Default::default() };
            let (want, _) = answer(&mut session(&model), &prompt(20), plain.clone());
            assert_eq!(want.len(), 100);
            let kinds = [
                (Speculation::Lookup, None, 0),
                (Speculation::Model, Some(&near), 5),
                (Speculation::Model, Some(&far), 0),
            ];
            for (speculation, draft, least) in kinds {
                let mut session = session(&model);
                session.set_draft(draft.map(self::session)).unwrap();
                let options = GenerateOptions { speculation, ..plain.clone() };
                let (found, stats) = answer(&mut session, &prompt(20), options);
                assert_eq!(found, want, "{dtype}, {speculation:?}, {sampler:?}");
                let (drafted, accepted) = (stats.drafted_tokens, stats.accepted_tokens);
                assert!(accepted >= least && accepted <= drafted, "{dtype}, {sampler:?}: {accepted} of {drafted}");
                let whole = [prompt(20), want.clone()].concat();
                assert!(whole.starts_with(session.tokens()) && session.position() + 1 >= whole.len());
            }
        }
    }
}

#[test]
fn a_text_that_repeats_itself_is_guessed_from_the_window() {
    let folder = Folder::new("lookup");
    let mut session = session(&folder.model(&TinyConfig::new("llama")));
    let options = GenerateOptions {
        sampler: SamplerOptions::greedy(),
        max_tokens: 120,
        speculation: Speculation::Lookup,
        ..Default::default()
    };
    // Without a penalty a random model soon goes round in circles.
    let (_, stats) = answer(&mut session, &prompt(20), options);
    assert!(stats.accepted_tokens > 10, "{stats:?}");
}

#[test]
fn drafting_leaves_the_distribution_as_it_is() {
    const TOKENS: usize = 8;
    let folder = Folder::new("distribution");
    let config = TinyConfig { vocab: TOKENS as u32, ..TinyConfig::new("llama") };
    let model = folder.named("model.gguf", &config);
    let draft = folder.named("draft.gguf", &TinyConfig { seed: 2, ..config });
    let options = SessionOptions { threads: 1, ..options() };
    let mut session = Session::new(&model, &options).unwrap();
    let sampler = SamplerOptions { top_k: 0, top_p: 1.0, min_p: 0.0, ..with_seed(0) };
    let prompt = [1, 5, 2];

    // What the third token should be, over all that may come before it.
    let mut probabilities = |text: &[u32]| {
        session.reset();
        let logits = session.feed(text).unwrap();
        let weights: Vec<f64> = logits.iter().map(|z| f64::from(z / sampler.temperature).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter().map(|w| w / sum).collect::<Vec<f64>>()
    };
    let mut expected = [0.0; TOKENS];
    let one = probabilities(&prompt);
    for (a, one) in (0..).zip(&one) {
        let two = probabilities(&[&prompt[..], &[a]].concat());
        for (b, two) in (0..).zip(&two) {
            let three = probabilities(&[&prompt[..], &[a, b]].concat());
            expected.iter_mut().zip(&three).for_each(|(sum, p)| *sum += one * two * p);
        }
    }

    const TEXTS: u64 = 3_000;
    session.set_draft(Some(Session::new(&draft, &options).unwrap())).unwrap();
    let (mut counts, mut accepted) = ([0.0; TOKENS], 0);
    for seed in 0..TEXTS {
        let sampler = SamplerOptions { seed: Some(seed), ..sampler.clone() };
        let options = GenerateOptions { sampler, max_tokens: 4, speculation: Speculation::Model, ..Default::default() };
        let (tokens, stats) = answer(&mut session, &prompt, options);
        counts[tokens[2] as usize] += 1.0;
        accepted += stats.accepted_tokens;
    }
    let square = |(count, p): (&f64, &f64)| (count - p * TEXTS as f64).powi(2) / (p * TEXTS as f64);
    let chi: f64 = counts.iter().zip(&expected).map(square).sum();
    // 1 in 1,000 of chi squared with 7 degrees of freedom.
    assert!(chi < 24.3, "chi squared {chi}: {counts:?} for {expected:?}");
    assert!(accepted > 100, "only {accepted} guesses were right: nothing was tested");
}

#[test]
fn what_cannot_guess_is_refused() {
    let folder = Folder::new("draft");
    let model = folder.named("model.gguf", &TinyConfig::new("llama").with_bpe());
    let smaller = folder.named("smaller.gguf", &TinyConfig::new("llama"));
    let other = TinyConfig { vocab: model.spec().vocab as u32, ..TinyConfig::new("llama") };
    let nameless = folder.named("nameless.gguf", &other);
    let mut session = session(&model);
    let refuse =
        |session: &mut Session, draft: &Model| session.set_draft(Some(self::session(draft))).unwrap_err().to_string();
    let error = refuse(&mut session, &smaller);
    assert!(error.contains(&format!("{} tokens against 256", model.spec().vocab)), "{error}");
    let error = refuse(&mut session, &nameless);
    assert!(error.contains("token 0 is \"!\" against"), "{error}");
    let options = |speculation| GenerateOptions { speculation, ..Default::default() };
    let error = session.generate(&prompt(3), options(Speculation::Model)).unwrap_err().to_string();
    assert!(error.contains("set_draft"), "{error}");
    let mut narrow = Session::new(&model, &SessionOptions { logit_rows: 1, ..self::options() }).unwrap();
    let error = narrow.generate(&prompt(3), options(Speculation::Lookup)).unwrap_err().to_string();
    assert!(error.contains("logit_rows"), "{error}");
}

#[test]
fn guesses_stay_within_the_window_and_the_answer() {
    let folder = Folder::new("ends");
    let model = folder.model(&TinyConfig::new("llama"));
    for speculation in [Speculation::Off, Speculation::Lookup, Speculation::Model] {
        let mut session = Session::new(&model, &SessionOptions { context: 64, ..options() }).unwrap();
        session.set_draft(Some(self::session(&model))).unwrap();
        let options =
            |max_tokens| GenerateOptions { sampler: with_seed(7), max_tokens, speculation, ..Default::default() };
        let (tokens, stats) = answer(&mut session, &prompt(30), options(usize::MAX));
        // The last token is sampled behind a full window.
        assert_eq!((tokens.len(), stats.end), (64 - 30 + 1, Some(EndReason::ContextFull)), "{speculation:?}");
        let (tokens, stats) = answer(&mut session, &prompt(30), options(7));
        assert_eq!((tokens.len(), stats.end), (7, Some(EndReason::Length)), "{speculation:?}");
        assert!(session.position() <= 37, "guesses that nobody looked at are gone");
    }
}
