//! Models whose last layers run on the GPU and the others on the CPU: what they say, and all that a session does with its
//! window, is what the CPU alone says and does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;

use kinglet_engine::Error;
use kinglet_engine::quant::DType;
use kinglet_engine::sampling::SamplerOptions;
use kinglet_engine::session::{
    Batcher, Device, Engine, GenerateOptions, Model, PrefixCache, Progress, Session, SessionOptions,
};
use kinglet_models::tiny::TinyConfig;
use kinglet_tests::compare::{argmax, divergence};
use kinglet_tests::data::{Scratch, tiny};

use crate::gpu::{adapter, architectures, distance, logits, options, real, small, tokens, whole, wide};

/// A model of three layers, or of as many as its architecture demands.
fn layered(scratch: &Scratch, arch: &str) -> Model {
    let config = TinyConfig::new(arch);
    let layers = if arch == "baichuan" { config.layers } else { 3 };
    tiny(scratch, &TinyConfig { layers, ..config })
}

/// With so many layers on `device`, the CPU alone for none.
fn divided(device: Device, layers: usize) -> SessionOptions {
    SessionOptions { gpu_layers: Some(layers), ..options(if layers == 0 { Device::Cpu } else { device }) }
}

fn answer(session: &mut Session, prompt: &[u32], count: usize) -> Vec<u32> {
    let options = GenerateOptions { sampler: SamplerOptions::greedy(), max_tokens: count, ..Default::default() };
    let mut generation = session.generate(prompt, options).expect("an answer");
    let mut all = Vec::new();
    while let Some(piece) = generation.next().expect("a token") {
        all.extend(piece.token);
    }
    all
}

/// Every architecture, with no layer on the GPU to all of them.
#[test]
fn gpu_divided_logits_are_the_cpus_for_every_architecture() {
    let device = whole();
    for config in architectures() {
        let scratch = Scratch::new(&format!("divided-{}", config.arch));
        let model = layered(&scratch, &config.arch);
        let (prompt, more) = (tokens(&model, 1, 75), tokens(&model, 2, 4));
        let wanted = logits(&model, &options(Device::Cpu), &prompt, &more);
        let greedy = answer(&mut Session::new(&model, &options(Device::Cpu)).expect("a session"), &prompt, 12);
        let all = model.spec().layers.len();
        for layers in BTreeSet::from([0, 1, all / 2, all - 1, all]) {
            let name = format!("{} with {layers} layers on the GPU", config.arch);
            let options = divided(Device::Open(device.clone()), layers);
            for (ours, wanted) in logits(&model, &options, &prompt, &more).iter().zip(&wanted) {
                let far = distance(ours, wanted);
                assert!(far < 1e-3 && divergence(wanted, ours) < 1e-6, "{name}: {far}");
                assert_eq!(argmax(ours), argmax(wanted), "{name}");
            }
            let mut session = Session::new(&model, &options).expect("a session");
            assert_eq!(answer(&mut session, &prompt, 12), greedy, "{name}");
        }
    }
}

/// Scores and embeddings take the same way, on a device that has WebGPU's baseline only, matrices in pieces.
#[test]
fn gpu_divided_scores_and_embeds_as_the_cpu() {
    let scratch = Scratch::new("divided-scores");
    let model = tiny(&scratch, &TinyConfig { layers: 3, ..wide("gemma3") });
    let text = tokens(&model, 1, 60);
    let run = |options: SessionOptions| {
        let mut session = Session::new(&model, &options).expect("a session");
        (session.score(&text, 0).expect("scores"), session.embed(&text).expect("a direction"))
    };
    let (ours, wanted) = (run(divided(Device::Open(small(512 << 10)), 2)), run(options(Device::Cpu)));
    assert!(distance(&ours.0, &wanted.0) < 1e-3 && distance(&ours.1, &wanted.1) < 1e-3);
}

/// What was saved with some layers on the GPU goes on with others, and is saved again with the same bits.
#[test]
fn gpu_divided_sessions_load_what_others_saved() {
    let device = whole();
    for (kv_type, len, most) in [(DType::F32, 300, 1e-3), (DType::Q8_0, 128, 0.05), (DType::F16, 3, 5e-3)] {
        let scratch = Scratch::new(&format!("divided-saved-{kv_type}"));
        let config =
            TinyConfig { layers: 3, width: 128, heads: 4, kv_heads: 2, head_dim: 32, ..TinyConfig::new("qwen2") };
        let model = tiny(&scratch, &config);
        let open = |layers: usize| {
            let options = divided(Device::Open(device.clone()), layers);
            Session::new(&model, &SessionOptions { kv_type, context: 512, chunk: 64, ..options }).expect("a session")
        };
        let (first, second) = (scratch.path("first.kinglet"), scratch.path("second.kinglet"));
        for from in [0, 1, 2, 3] {
            let mut saved = open(from);
            saved.feed(&tokens(&model, 1, len)).expect("a prompt");
            saved.save(&first, "a note").expect("a file");
            let wanted = saved.feed(&[7]).expect("a token").to_vec();
            for to in [0, 1, 2, 3] {
                let mut session = open(to);
                session.feed(&[1, 2, 3]).expect("another window");
                assert_eq!(session.load(&first).expect("the file"), "a note");
                session.save(&second, "a note").expect("a file");
                let same = std::fs::read(&first).expect("a file") == std::fs::read(&second).expect("a file");
                assert!(same, "{kv_type}, {from} to {to} layers: what was loaded is saved otherwise");
                let far = distance(session.feed(&[7]).expect("a token"), &wanted);
                assert!(far <= if from == to { 0.0 } else { most }, "{kv_type}, {from} to {to} layers: {far}");
            }
        }
        // What is cut short leaves the window as it was.
        let bytes = std::fs::read(&first).expect("a file");
        std::fs::write(&first, [&bytes[..bytes.len() - 40], &[0; 40]].concat()).expect("a file");
        let mut session = open(2);
        let before = session.feed(&[1, 2]).expect("a window").to_vec();
        assert!(session.load(&first).is_err() && session.tokens() == [1, 2]);
        session.rewind(1).expect("one token");
        assert!(distance(session.feed(&[2]).expect("a token"), &before) <= most);
    }
}

/// A window that is forked, rewound, shifted, parked and trimmed goes on as on the CPU.
#[test]
fn gpu_divided_windows_are_the_cpus() {
    let scratch = Scratch::new("divided-windows");
    let model = layered(&scratch, "llama");
    let text = tokens(&model, 1, 200);
    let run = |options: SessionOptions| {
        let mut first = Session::new(&model, &options).expect("a session");
        first.feed(&text).expect("a prompt");
        let mut second = first.fork().expect("a fork");
        first.rewind(150).expect("a start");
        let mut all = first.feed(&text[..9]).expect("more").to_vec();
        first.shift(5, 90).expect("a part goes");
        assert!(first.shift(60, 40).expect_err("too much").to_string().contains("are held"));
        first.trim().expect("memory back");
        all.extend_from_slice(first.feed(&[9]).expect("a token"));
        second.park().expect("memory back");
        all.extend_from_slice(second.feed(&[9]).expect("a token"));
        all
    };
    let wanted = run(options(Device::Cpu));
    let device = whole();
    for layers in [1, 2] {
        let far = distance(&run(divided(Device::Open(device.clone()), layers)), &wanted);
        assert!(far < 3e-3, "{layers} layers: {far}");
    }
}

/// Several answers together, begun alike and with the start from a prefix cache, are those of the CPU; a full window makes
/// room.
#[test]
fn gpu_divided_answers_are_the_cpus() {
    let scratch = Scratch::new("divided-answers");
    let model = layered(&scratch, "gemma3");
    let start = tokens(&model, 1, 140);
    let run = |options: SessionOptions| {
        let prefix_cache = Some(PrefixCache::new(64 << 20));
        let options = SessionOptions { logit_rows: 3, chunk: 64, prefix_cache, ..options };
        let mut batcher = Batcher::new(Engine::new(&model, &options).expect("an engine"));
        let (mut answers, mut reused) = (BTreeMap::new(), 0);
        for round in [vec![1], vec![2, 3, 4]] {
            for end in round {
                let sampler = SamplerOptions::greedy();
                let options = GenerateOptions { sampler, max_tokens: 10, ..Default::default() };
                batcher.submit(&[&start[..], &[end]].concat(), options).expect("a request");
            }
            let report = |progress: Progress<'_>| {
                answers.entry(progress.request).or_insert_with(Vec::new).extend(progress.token);
                reused = reused.max(progress.stats.reused_tokens);
            };
            batcher.run_all(report).expect("answers");
        }
        assert_eq!((answers.len(), reused), (4, start.len()), "the start is computed once");
        let options = SessionOptions { context: 64, prefix_cache: None, logit_rows: 1, ..options };
        let mut session = Session::new(&model, &options).expect("a session");
        let sampler = SamplerOptions::greedy();
        let options = GenerateOptions { sampler, shift: Some(10), max_tokens: 80, ..Default::default() };
        let mut generation = session.generate(&start[..30], options).expect("an answer");
        let mut long = Vec::new();
        while let Some(piece) = generation.next().expect("a token") {
            long.extend(piece.token);
        }
        answers.into_values().chain([long]).collect::<Vec<_>>()
    };
    let (ours, wanted) = (run(divided(Device::Open(whole()), 2)), run(options(Device::Cpu)));
    assert_eq!(ours, wanted);
}

/// Adapters of the layers on either device, and of the head.
#[test]
fn gpu_divided_adapters_are_the_cpus() {
    let scratch = Scratch::new("divided-adapters");
    let model = layered(&scratch, "llama");
    let text = tokens(&model, 1, 40);
    let of_the_layers = adapter(&model, 4, 1);
    let mut of_the_head = (*of_the_layers).clone();
    let entry = of_the_head.entries.values().next().expect("an entry").clone();
    let (rows, width) = (model.spec().vocab, model.spec().width);
    let entry = kinglet_engine::adapter::LowRank {
        inputs: width,
        outputs: rows,
        a: (0..entry.rank * width).map(|i| 0.02 * (i % 7) as f32 - 0.06).collect(),
        b: (0..entry.rank * rows).map(|i| 0.02 * (i % 11) as f32 - 0.1).collect(),
        ..entry
    };
    of_the_head.entries.insert(model.spec().head.tensor.clone(), entry);
    let device = whole();
    for set in [[(of_the_layers, 1.0)], [(of_the_head.into(), 1.0)]] {
        let run = |options: SessionOptions| {
            let mut session = Session::new(&model, &options).expect("a session");
            let mut all = session.feed(&text).expect("the base").to_vec();
            session.set_adapters(&set).expect("the adapter matches");
            all.extend_from_slice(session.feed(&text).expect("a prompt"));
            all.extend_from_slice(session.feed(&[7]).expect("a token"));
            all
        };
        let wanted = run(options(Device::Cpu));
        for layers in [1, 2] {
            let far = distance(&run(divided(Device::Open(device.clone()), layers)), &wanted);
            assert!(far < 5e-3, "{layers} layers: {far}");
        }
    }
}

/// A run that the second part refuses has not happened in the first one either, and sequences of engines that are divided
/// otherwise are refused.
#[test]
fn gpu_divided_runs_happen_whole_or_not_at_all() {
    let scratch = Scratch::new("divided-whole");
    let model = layered(&scratch, "llama");
    let device = whole();
    let never = AtomicBool::new(false);
    let open = |layers| Engine::new(&model, &divided(Device::Open(device.clone()), layers)).expect("an engine");
    let mut engine = open(1);
    let (mut first, mut second) = (engine.sequence(), engine.sequence());
    engine.feed(&mut [(&mut first, &[1, 2, 3])], &never).expect("a prompt");
    // One row of logits at most.
    assert!(engine.step(&mut [(&mut first, &[4]), (&mut second, &[5])], &never).is_err());
    assert!(matches!(engine.step(&mut [(&mut first, &[4])], &AtomicBool::new(true)), Err(Error::Cancelled)));
    let after = engine.step(&mut [(&mut first, &[4])], &never).expect("a token").to_vec();
    let mut fresh = engine.sequence();
    let wanted = engine.step(&mut [(&mut fresh, &[1, 2, 3, 4])], &never).expect("a prompt").to_vec();
    assert!(distance(&after, &wanted) < 1e-3);
    for mut other in [open(0), open(2), open(3)] {
        let refused = other.step(&mut [(&mut first, &[5])], &never).expect_err("another engine's");
        assert!(refused.to_string().contains("belongs to"), "{refused}");
    }
}

/// A bound on the GPU's memory decides how many layers it gets: what was told is what its allocator counts. Nothing fits,
/// or no GPU is meant: that is said before anything starts.
#[test]
fn gpu_memory_decides_how_many_layers_a_gpu_gets() {
    let scratch = Scratch::new("divided-memory");
    let config = TinyConfig { layers: 6, vocab: 2_000, context: 1_024, ..wide("llama") };
    let model = tiny(&scratch, &TinyConfig { dtype: DType::F16, embedding: DType::F16, ..config });
    let device = whole();
    let options = SessionOptions { context: 1_024, chunk: 64, ..options(Device::Open(device.clone())) };
    let all = Session::estimate(&model, &options).expect("an estimate");
    assert!(all.on_gpu && all.shared.is_none());
    let mut seen = Vec::new();
    for percent in [100, 85, 70, 55, 40] {
        let most = all.resident() * percent / 100;
        let options = SessionOptions { gpu_memory: Some(most), ..options.clone() };
        let told = Session::estimate(&model, &options).expect("an estimate");
        let Some(shared) = told.shared else {
            assert!(told == all && percent == 100);
            continue;
        };
        let held = || device.allocated_bytes().expect("an allocator that counts");
        let before = held();
        let mut session = Session::new(&model, &options).expect("a session");
        assert_eq!(session.needs(), told);
        session.feed(&tokens(&model, 1, 1_023)).expect("a prompt");
        session.feed(&[3]).expect("the last token");
        let taken = held() - before;
        assert!(shared.gpu_bytes <= most, "{shared:?}");
        assert!(taken.abs_diff(shared.gpu_bytes) * 10 < taken, "{taken} bytes are taken: {shared:?}");
        assert!(told.resident() > shared.gpu_bytes && told.allocated() + shared.mapped == told.resident());
        // One layer more would be too much.
        let more = SessionOptions { gpu_layers: Some(shared.gpu_layers + 1), ..options };
        let more = Session::estimate(&model, &more).expect("an estimate").on_gpu_bytes();
        assert!(more > most, "{shared:?}: {more} would be within {most}");
        seen.push(shared.gpu_layers);
    }
    assert!(seen.len() == 4 && seen.is_sorted_by(|a, b| a > b), "{seen:?}");
    let none = Session::new(&model, &SessionOptions { gpu_memory: Some(1000), ..options.clone() });
    assert!(matches!(&none, Err(Error::Memory { available: 1000, .. })), "{none:?}");
    let no_gpu = SessionOptions { gpu_layers: Some(2), device: Device::Cpu, ..options };
    let refused = Session::new(&model, &no_gpu).expect_err("no GPU");
    assert!(refused.to_string().contains("backend is the CPU"), "{refused}");
}

#[test]
fn gpu_divided_smollm2_says_what_the_cpu_says() {
    real("smollm2", Some(15));
}
