//! Sessions: what may change how fast an answer comes must not change the answer.

mod common;

use std::sync::Arc;

use common::{Folder, adapter};
use kinglet_engine::quant::DType;
use kinglet_engine::sampling::{Mirostat, SamplerOptions};
use kinglet_engine::session::{
    Batcher, EndReason, Engine, GenerateOptions, GenerationStats, Model, PrefixCache, Session, SessionOptions,
    Speculation,
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

/// The answer to `prompt` of a session that is its own.
fn alone(model: &Model, prompt: &[u32], options: GenerateOptions) -> Vec<u32> {
    answer(&mut session(model), prompt, options).0
}

fn sampled(seed: u64, max_tokens: usize) -> GenerateOptions {
    GenerateOptions { sampler: with_seed(seed), max_tokens, ..Default::default() }
}

#[test]
fn a_prompt_that_was_computed_is_not_computed_again() {
    let folder = Folder::new("prefix");
    let model = folder.model(&TinyConfig::new("llama"));
    let cache = PrefixCache::new(64 << 20);
    let cached = SessionOptions { prefix_cache: Some(cache.clone()), ..options() };
    let open = |options: &SessionOptions| Session::new(&model, options).unwrap();
    let chat = |question: u32| [prompt(150), vec![question, 7, question + 1, 9, 3]].concat();
    let (_, stats) = answer(&mut open(&cached), &chat(1), sampled(1, 10));
    assert_eq!((stats.reused_tokens, cache.len()), (0, 1));
    let (tokens, stats) = answer(&mut open(&cached), &chat(2), sampled(1, 10));
    assert_eq!((stats.reused_tokens, stats.prompt_tokens), (150, 155));
    assert_eq!(tokens, alone(&model, &chat(2), sampled(1, 10)));
    // The first session's own window is no worse than the cache; the prompt as a whole lacks its last token's logits.
    let (_, stats) = answer(&mut open(&cached), &chat(2), sampled(2, 10));
    assert_eq!(stats.reused_tokens, 154);

    // Nothing is shared between what is computed differently.
    let other = SessionOptions { kv_type: DType::F32, ..cached.clone() };
    assert_eq!(answer(&mut open(&other), &chat(2), sampled(1, 3)).1.reused_tokens, 0);
    let mut adapted = open(&cached);
    adapted.set_adapters(&[(Arc::new(adapter(&model, 4, 1, false)), 1.0)]).unwrap();
    assert_eq!(answer(&mut adapted, &chat(2), sampled(1, 3)).1.reused_tokens, 0);
    let twin = folder.model(&TinyConfig::new("llama"));
    assert_eq!(answer(&mut Session::new(&twin, &cached).unwrap(), &chat(2), sampled(1, 3)).1.reused_tokens, 0);
}

#[test]
fn the_prefix_cache_stays_in_its_bounds() {
    let folder = Folder::new("bounds");
    let model = folder.model(&TinyConfig::new("llama"));
    let cache = PrefixCache::new(u64::MAX);
    let cached = |cache: &PrefixCache| SessionOptions { prefix_cache: Some(cache.clone()), ..options() };
    let ask = |cache: &PrefixCache, prompt: &[u32]| {
        answer(&mut Session::new(&model, &cached(cache)).unwrap(), prompt, sampled(1, 1)).1.reused_tokens
    };
    ask(&cache, &prompt(120));
    let page = cache.bytes();
    // A second prompt with the same first page costs one page, and one that goes on from another takes its place.
    ask(&cache, &[prompt(128), vec![1; 60]].concat());
    let both = cache.bytes();
    ask(&cache, &[prompt(128), vec![1; 70]].concat());
    assert_eq!((cache.len(), cache.bytes()), (1, both));
    ask(&cache, &[prompt(128), vec![2; 60]].concat());
    assert_eq!((cache.len(), cache.bytes()), (2, 3 * page));

    let cache = PrefixCache::new(2 * page);
    for first in [10, 20, 10, 30] {
        ask(&cache, &[vec![first; 50], prompt(50)].concat());
        assert!(cache.bytes() <= 2 * page);
    }
    assert_eq!(ask(&cache, &[vec![20; 50], prompt(50)].concat()), 0, "the one that was longest unasked went");
    assert_eq!(ask(&cache, &[vec![30; 50], prompt(50)].concat()), 99);
    cache.clear();
    assert!(cache.is_empty() && cache.bytes() == 0);
}

fn length(x: &[f32]) -> f32 {
    x.iter().map(|x| x * x).sum::<f32>().sqrt()
}

#[test]
fn an_embedding_is_the_direction_that_the_head_reads() {
    let folder = Folder::new("embed");
    let model = folder.model(&TinyConfig::new("llama").with_dtype(DType::F32));
    let mut session = session(&model);
    let head = model.gguf().tensor("output.weight").unwrap();
    let weights: Vec<f32> =
        model.gguf().data(head).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    for token in [3, 77, 200] {
        let logits = session.feed(&[token]).unwrap().to_vec();
        session.reset();
        let state = session.embed(&[token]).unwrap();
        assert_eq!(session.position(), 0);
        assert!((length(&state) - 1.0).abs() < 1e-5);
        let read: Vec<f32> =
            weights.chunks_exact(state.len()).map(|row| row.iter().zip(&state).map(|(w, x)| w * x).sum()).collect();
        let together: f32 = read.iter().zip(&logits).map(|(a, b)| a * b).sum();
        assert!(together > 0.9999 * length(&read) * length(&logits), "{together}");
    }
    // A text of several chunks is one text.
    let mut whole = Session::new(&model, &SessionOptions { chunk: 128, ..options() }).unwrap();
    let (one, many) = (whole.embed(&prompt(90)).unwrap(), session.embed(&prompt(90)).unwrap());
    assert!(one.iter().zip(&many).all(|(a, b)| (a - b).abs() < 1e-4), "{one:?} {many:?}");
    assert!(session.embed(&[]).is_err() && session.embed(&prompt(300)).is_err());
}

#[test]
fn a_session_that_gave_its_memory_back_goes_on() {
    let folder = Folder::new("trim");
    let model = folder.model(&TinyConfig::new("llama").with_dtype(DType::Q4_1));
    let (mut trimmed, mut other) = (session(&model), session(&model));
    for i in 0..3 {
        let tokens = prompt(20 + i);
        assert_eq!(trimmed.feed(&tokens).unwrap(), other.feed(&tokens).unwrap());
        assert_eq!(trimmed.score(&tokens, 0).unwrap(), other.score(&tokens, 0).unwrap());
        assert!(trimmed.trim().unwrap() > 0);
        assert_eq!(trimmed.trim().unwrap(), 0, "there is nothing left to give");
    }
}

#[test]
fn a_saved_session_goes_on_as_if_nothing_had_been() {
    for (kv_type, len) in [(DType::F16, 150), (DType::Q8_0, 128), (DType::F32, 3)] {
        let folder = Folder::new(&format!("saved-{kv_type}"));
        let model = folder.model(&TinyConfig { head_dim: 32, ..TinyConfig::new("llama").with_dtype(DType::Q4_1) });
        let options = SessionOptions { kv_type, ..options() };
        let mut first = Session::new(&model, &options).unwrap();
        let adapters = [(Arc::new(adapter(&model, 4, 1, false)), 0.5)];
        first.set_adapters(&adapters).unwrap();
        let (tokens, _) = answer(&mut first, &prompt(len), sampled(1, 20));
        let path = folder.0.join("chat.kinglet");
        first.save(&path, "a note: é").unwrap();
        let mut second = Session::new(&model, &options).unwrap();
        second.set_adapters(&adapters).unwrap();
        assert_eq!(second.load(&path).unwrap(), "a note: é");
        assert_eq!(second.tokens(), first.tokens());
        let more = [prompt(len), tokens, vec![5, 6]].concat();
        let (want, one) = answer(&mut first, &more, sampled(2, 30));
        let (found, two) = answer(&mut second, &more, sampled(2, 30));
        assert_eq!((found, two.reused_tokens), (want, one.reused_tokens));
        assert_eq!(two.reused_tokens, more.len() - 3);
    }
}

#[test]
fn saved_sessions_that_do_not_fit_are_refused() {
    let folder = Folder::new("misfits");
    let model = folder.named("one.gguf", &TinyConfig::new("llama"));
    let other = folder.named("two.gguf", &TinyConfig { seed: 2, ..TinyConfig::new("llama") });
    let mut saved = session(&model);
    saved.feed(&prompt(140)).unwrap();
    let path = folder.0.join("chat.kinglet");
    saved.save(&path, "").unwrap();
    let refused = |session: &mut Session, says: &str| {
        session.feed(&[1, 2]).unwrap();
        let error = session.load(&path).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("chat.kinglet"), "{error}");
        assert_eq!(session.tokens(), [1, 2], "the window stays");
        session.reset();
    };
    refused(&mut session(&other), "belongs to the model");
    refused(
        &mut Session::new(&model, &SessionOptions { kv_type: DType::F32, ..options() }).unwrap(),
        "type of KV cache",
    );
    refused(&mut Session::new(&model, &SessionOptions { context: 100, ..options() }).unwrap(), "larger context");
    let mut adapted = session(&model);
    adapted.set_adapters(&[(Arc::new(adapter(&model, 4, 1, false)), 1.0)]).unwrap();
    refused(&mut adapted, "other adapters");

    // Cut short, made longer, any byte changed: found before anything is taken over.
    let bytes = std::fs::read(&path).unwrap();
    let mut fresh = session(&model);
    for len in [0, 7, 16, 40, 300, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..len]).unwrap();
        refused(&mut fresh, "");
    }
    std::fs::write(&path, [&bytes[..], &[0]].concat()).unwrap();
    refused(&mut fresh, "should have");
    let step = bytes.len() / 199;
    for at in (0..600).chain((600..bytes.len()).step_by(step)) {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x11;
        std::fs::write(&path, &bytes).unwrap();
        // In the header a name may change unseen by all but the checksum.
        refused(&mut fresh, "");
    }
    // A header that promises the world.
    let mut bytes = bytes;
    bytes[12..16].fill(0xff);
    std::fs::write(&path, &bytes).unwrap();
    refused(&mut fresh, "header of 4294967295 bytes");
    std::fs::remove_file(&path).unwrap();
    assert!(fresh.load(&path).unwrap_err().to_string().contains("chat.kinglet"));
}

/// A model of one layer, whose keys and values know nothing of the tokens before: a shifted window is one that was
/// computed without what was dropped.
#[test]
fn a_window_that_lost_a_part_has_its_keys_where_they_belong() {
    for (arch, layers) in [("llama", 1), ("qwen2", 1), ("gemma3", 1), ("chatglm", 1)] {
        for (kv_type, most) in [(DType::F32, 1e-3), (DType::F16, 0.02), (DType::Q8_0, 0.4)] {
            let folder = Folder::new(&format!("shift-{arch}-{kv_type}"));
            let base = TinyConfig::new(arch);
            let config = TinyConfig { layers, width: 128, head_dim: 32, sliding_window: 300, ..base };
            let model = folder.model(&config);
            let options = SessionOptions { kv_type, ..options() };
            let mut ours = Session::new(&model, &options).unwrap();
            let text = prompt(200);
            ours.feed(&text).unwrap();
            ours.shift(5, 90).unwrap();
            let kept = [&text[..5], &text[95..]].concat();
            assert_eq!(ours.tokens(), kept);
            let found = ours.feed(&[9]).unwrap().to_vec();
            let mut fresh = Session::new(&model, &options).unwrap();
            fresh.feed(&kept).unwrap();
            let want = fresh.feed(&[9]).unwrap();
            let apart = found.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < most, "{arch}, cache {kv_type}: logits differ by {apart}");
            fresh.reset();
            fresh.feed(&text).unwrap();
            let whole = fresh.feed(&[9]).unwrap();
            let shows = found.iter().zip(whole).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(
                shows > 3.0 * apart,
                "{arch}, cache {kv_type}: {apart}, but dropping a part changes no more than {shows}"
            );
        }
    }
}

#[test]
fn a_full_window_makes_room_where_that_is_wanted() {
    let folder = Folder::new("room");
    let model = folder.model(&TinyConfig::new("llama"));
    let options = SessionOptions { context: 64, ..options() };
    for speculation in [Speculation::Off, Speculation::Lookup] {
        let mut ours = Session::new(&model, &options).unwrap();
        let shifting = GenerateOptions { shift: Some(10), speculation, ..sampled(3, 200) };
        let (tokens, stats) = answer(&mut ours, &prompt(30), shifting.clone());
        assert_eq!((tokens.len(), stats.end), (200, Some(EndReason::Length)));
        assert!(stats.dropped_tokens >= 200 + 30 - 64);
        assert_eq!(ours.tokens()[..10], prompt(30)[..10]);
        // What knows of text that is gone is no part of another prompt.
        let again = [ours.tokens(), &[1, 2]].concat();
        let (_, stats) = answer(&mut ours, &again[..40], shifting);
        assert_eq!(stats.reused_tokens, 10);
    }
    let mut ours = Session::new(&model, &options).unwrap();
    ours.feed(&prompt(20)).unwrap();
    assert!(ours.shift(15, 6).unwrap_err().to_string().contains("20 are held"));
    let all = GenerateOptions { shift: Some(63), ..sampled(1, 10) };
    assert!(ours.generate(&prompt(3), all).unwrap_err().to_string().contains("nothing would be left"));
}

/// Runs `requests` through a batcher, the next one taken in every third step, and gives each answer; request `victim` is
/// cancelled after some tokens.
fn batched(batcher: &mut Batcher, requests: &[(Vec<u32>, GenerateOptions)], victim: Option<usize>) -> Vec<Vec<u32>> {
    let mut answers = vec![Vec::new(); requests.len()];
    let mut ids = Vec::new();
    let mut ended = 0;
    for step in 0.. {
        if step % 3 == 0
            && let Some((prompt, options)) = requests.get(step / 3)
        {
            ids.push(batcher.submit(prompt, options.clone()).unwrap());
        }
        let more = batcher
            .step(|progress| {
                let at = ids.iter().position(|id| *id == progress.request).unwrap();
                answers[at].extend(progress.token);
                ended += usize::from(progress.stats.end.is_some());
            })
            .unwrap();
        if let Some(victim) = victim
            && answers[victim].len() == 5
            && batcher.cancel(ids[victim]).is_some()
        {
            ended += 1;
        }
        assert!(batcher.len() <= requests.len());
        if !more && ids.len() == requests.len() {
            break;
        }
    }
    assert_eq!(ended, requests.len());
    answers
}

#[test]
fn answers_that_are_written_together_are_those_of_sessions() {
    for (dtype, alone_rows) in [(DType::F32, false), (DType::Q4_1, true), (DType::Q4_K, true)] {
        let folder = Folder::new(&format!("batch-{dtype}"));
        let model = folder.model(&TinyConfig::new("llama").with_dtype(dtype));
        let requests: Vec<(Vec<u32>, GenerateOptions)> = (0..6u32)
            .map(|i| {
                let mut options = sampled(u64::from(i), 10 + 5 * i as usize);
                if i % 2 == 0 {
                    options.sampler = SamplerOptions { repeat_penalty: 1.2, ..options.sampler };
                }
                ([vec![i; 3], prompt(11 + 9 * i)].concat(), options)
            })
            .collect();
        let want: Vec<Vec<u32>> = requests.iter().map(|(p, o)| alone(&model, p, o.clone())).collect();
        // Three at a time, so that some wait.
        let open = || {
            let mut batcher =
                Batcher::new(Engine::new(&model, &SessionOptions { logit_rows: 3, ..options() }).unwrap());
            batcher.set_alone(alone_rows);
            batcher
        };
        assert_eq!(batched(&mut open(), &requests, None), want, "{dtype}");
        let found = batched(&mut open(), &requests, Some(2));
        for (i, (found, want)) in found.iter().zip(&want).enumerate() {
            assert_eq!(found, if i == 2 { &want[..5] } else { want }, "{dtype}, request {i}");
        }
    }
}

#[test]
fn a_batcher_ends_answers_and_shares_prompts() {
    let folder = Folder::new("batch-ends");
    let model = folder.model(&TinyConfig::new("llama").with_bpe());
    let cache = PrefixCache::new(64 << 20);
    let options = SessionOptions { context: 64, prefix_cache: Some(cache), logit_rows: 4, chunk: 32, ..options() };
    let mut batcher = Batcher::new(Engine::new(&model, &options).unwrap());
    let text = |prompt: &[u32], options: GenerateOptions| {
        let mut session = Session::new(&model, &SessionOptions { prefix_cache: None, ..self::options() }).unwrap();
        let mut generation = session.generate(prompt, options).unwrap();
        let mut text = String::new();
        while let Some(piece) = generation.next().unwrap() {
            text.push_str(piece.text);
        }
        text
    };
    let whole = text(&prompt(40), sampled(1, 15));
    let stop: String = whole.chars().skip(4).take(3).collect();
    let stopping = GenerateOptions { stop: vec![stop.clone()], ..sampled(1, 15) };
    let mut run = |options: &GenerateOptions| {
        batcher.submit(&prompt(40), options.clone()).unwrap();
        let (mut text, mut stats) = (String::new(), None);
        batcher
            .run_all(|progress| {
                text.push_str(progress.text);
                stats = Some(progress.stats.clone());
            })
            .unwrap();
        (text, stats.unwrap())
    };
    let (found, stats) = run(&sampled(1, 15));
    assert_eq!((found, stats.end, stats.reused_tokens), (whole.clone(), Some(EndReason::Length), 0));
    let (found, stats) = run(&stopping);
    assert_eq!((found.as_str(), stats.end), (&whole[..whole.find(&stop).unwrap()], Some(EndReason::Stop)));
    assert_eq!(stats.reused_tokens, 39);
    let (_, stats) = run(&GenerateOptions { ignore_end: true, ..sampled(2, 100) });
    assert_eq!((stats.output_tokens, stats.end), (64 - 40 + 1, Some(EndReason::ContextFull)));
    let (_, stats) = run(&GenerateOptions { ignore_end: true, shift: Some(4), ..sampled(2, 100) });
    assert_eq!((stats.output_tokens, stats.end), (100, Some(EndReason::Length)));
    let guessing = GenerateOptions { speculation: Speculation::Lookup, ..sampled(1, 1) };
    assert!(batcher.submit(&prompt(3), guessing).is_err());
    assert!(batcher.submit(&[], sampled(1, 1)).is_err() && batcher.is_empty());
}

#[test]
fn a_model_guesses_itself() {
    let folder = Folder::new("itself");
    let model = folder.model(&TinyConfig::new("llama"));
    for seed in 0..6 {
        for sampler in [with_seed(seed), SamplerOptions { top_k: 0, min_p: 0.0, ..with_seed(seed) }] {
            let mut session = session(&model);
            session.set_draft(Some(self::session(&model))).unwrap();
            let options =
                GenerateOptions { sampler, max_tokens: 100, speculation: Speculation::Model, ..Default::default() };
            let (_, stats) = answer(&mut session, &prompt(20), options);
            let (drafted, accepted) = (stats.drafted_tokens, stats.accepted_tokens);
            assert!(accepted + 3 >= drafted, "{accepted} of {drafted}");
        }
    }
}
