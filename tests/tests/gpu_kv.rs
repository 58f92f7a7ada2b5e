//! Keys and values on the GPU: saved, loaded, forked, given back, shifted, in 8 bits; against the CPU's.

use kinglet_engine::quant::DType;
use kinglet_engine::sampling::SamplerOptions;
use kinglet_engine::session::{Device, GenerateOptions, Model, Session, SessionOptions};
use kinglet_models::tiny::TinyConfig;
use kinglet_tests::data::{Scratch, tiny};

use crate::gpu::{distance, options, small, tokens, whole, wide};

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::Q8_0];

/// A model with heads of an odd number of blocks of Q8_0, and of an even one.
fn model(scratch: &Scratch, head_dim: usize) -> Model {
    let head_dim = head_dim as u32;
    let base = TinyConfig::new("qwen2");
    tiny(scratch, &TinyConfig { head_dim, width: 4 * head_dim, heads: 4, kv_heads: 2, ..base })
}

/// How far logits with a cache of some type may be from those of the CPU: what sums in another order make of it, and where
/// rounding is coarse, another rounding.
fn most(kv_type: DType) -> f32 {
    match kv_type {
        DType::F32 => 1e-3,
        DType::F16 => 5e-3,
        _ => 0.05,
    }
}

fn open(model: &Model, device: Device, kv_type: DType) -> Session {
    Session::new(model, &SessionOptions { kv_type, chunk: 64, context: 512, ..options(device) }).expect("a session")
}

/// A file of the one goes on in the other, with pages full and not, and holds the same bits after a round trip.
#[test]
fn gpu_and_cpu_load_what_the_other_saved() {
    let device = whole();
    for (kv_type, head_dim, len) in
        TYPES.into_iter().flat_map(|kv_type| [(kv_type, 32, 150), (kv_type, 64, 128), (kv_type, 96, 3)])
    {
        let name = format!("{kv_type}, heads of {head_dim}, {len} tokens");
        let scratch = Scratch::new(&format!("gpu-saved-{kv_type}-{head_dim}"));
        let model = model(&scratch, head_dim);
        let open = |on_gpu: bool| {
            let device = if on_gpu { Device::Open(device.clone()) } else { Device::Cpu };
            open(&model, device, kv_type)
        };
        for from_gpu in [false, true] {
            let (first, second) = (scratch.path("first.kinglet"), scratch.path("second.kinglet"));
            let mut from = open(from_gpu);
            from.feed(&tokens(&model, 1, len)).expect("a prompt");
            from.save(&first, "a note").expect("a file");
            let wanted = from.feed(&[7]).expect("a token").to_vec();
            for to_gpu in [false, true] {
                let mut to = open(to_gpu);
                to.feed(&[1, 2, 3]).expect("another window");
                assert_eq!(to.load(&first).expect("the file"), "a note");
                assert_eq!(to.tokens(), tokens(&model, 1, len), "{name}");
                to.save(&second, "a note").expect("a file");
                let same = std::fs::read(&first).expect("a file") == std::fs::read(&second).expect("a file");
                assert!(same, "{name}: what was loaded is saved otherwise");
                let far = distance(to.feed(&[7]).expect("a token"), &wanted);
                let most = if from_gpu == to_gpu { 0.0 } else { most(kv_type) };
                assert!(far <= most, "{name}, {from_gpu} to {to_gpu}: {far}");
            }
        }
    }
}

/// What damages a file is found, and the window stays as it was.
#[test]
fn gpu_refuses_a_damaged_session() {
    let scratch = Scratch::new("gpu-damaged");
    let model = model(&scratch, 32);
    let mut session = open(&model, Device::Open(whole()), DType::F16);
    session.feed(&tokens(&model, 1, 20)).expect("a prompt");
    let path = scratch.path("chat.kinglet");
    session.save(&path, "").expect("a file");
    let mut bytes = std::fs::read(&path).expect("a file");
    let at = bytes.len() - 100;
    bytes[at] ^= 1;
    std::fs::write(&path, bytes).expect("a file");
    let mut other = open(&model, Device::Open(whole()), DType::F16);
    let before = other.feed(&[1, 2]).expect("a window").to_vec();
    assert!(other.load(&path).expect_err("damage").to_string().contains("checksum"));
    assert_eq!(other.tokens(), [1, 2]);
    other.rewind(1).expect("one token");
    assert!(distance(other.feed(&[2]).expect("a token"), &before) < 1e-3);
}

/// Forks share keys and values until one writes, and the weights; each goes its own way, on threads of its own.
#[test]
fn gpu_forks_are_the_cpus() {
    let scratch = Scratch::new("gpu-forks");
    let model = model(&scratch, 32);
    let prompt = tokens(&model, 1, 200);
    let run = |device: Device| {
        let mut first = open(&model, device, DType::F32);
        first.feed(&prompt).expect("a prompt");
        let mut second = first.fork().expect("a fork");
        let ways = |session: &mut Session, seed: u64| -> Vec<f32> {
            let more = tokens(&model, seed, 100);
            more.chunks(9).flat_map(|tokens| session.feed(tokens).expect("tokens").to_vec()).collect()
        };
        std::thread::scope(|scope| {
            let other = scope.spawn(|| ways(&mut second, 3));
            let mine = ways(&mut first, 2);
            [mine, other.join().expect("the fork")].concat()
        })
    };
    let far = distance(&run(Device::Open(whole())), &run(Device::Cpu));
    assert!(far < 1e-3, "{far}");
}

/// What a session gives back is gone from the device, and it goes on as if nothing had been: bit by bit.
#[test]
fn gpu_sessions_give_their_memory_back() {
    let scratch = Scratch::new("gpu-park");
    let model = model(&scratch, 64);
    let device = whole();
    let held = || device.allocated_bytes().expect("an allocator that counts");
    let empty = held();
    let mut parked = open(&model, Device::Open(device.clone()), DType::F16);
    parked.feed(&tokens(&model, 1, 150)).expect("a prompt");
    let mut fork = parked.fork().expect("a fork");
    let full = held();
    let path = scratch.path("chat.kinglet");
    fork.save(&path, "").expect("a file");
    let saved = std::fs::read(&path).expect("a file");

    let freed = parked.trim().expect("memory back") as u64;
    assert!(freed > 0 && held() <= full - freed, "{freed} of {full}, {} are held", held());
    assert_eq!(parked.trim().expect("memory back"), 0, "there is nothing left to give");
    let freed = fork.park().expect("memory back");
    assert!(freed > 0 && parked.park().expect("memory back") == 0);
    // What is small stays: norms, descriptions of dispatches, buffers of the least size.
    let stays = held() - empty;
    assert!(stays * 4 < full - empty, "{stays} of {} stay", full - empty);
    // Saving needs no device.
    fork.save(&path, "").expect("a file");
    assert!(std::fs::read(&path).expect("a file") == saved && held() - empty <= stays);

    let mut other = open(&model, Device::Open(device.clone()), DType::F16);
    other.feed(&tokens(&model, 1, 150)).expect("a prompt");
    for token in [4, 5] {
        let wanted = other.feed(&[token]).expect("a token").to_vec();
        assert_eq!(parked.feed(&[token]).expect("a token"), wanted);
        assert_eq!(fork.feed(&[token]).expect("a token"), wanted);
        fork.park().expect("memory back");
    }
}

/// What a session was said to take is what the device's allocator counts once the window is full, within a tenth, buffers
/// whose least size shows in tiny models apart.
#[test]
fn gpu_sessions_take_what_was_estimated() {
    let scratch = Scratch::new("gpu-estimate");
    let base = wide("llama");
    for (vocab, context, chunk, kv_type, dtype) in [
        (2_000, 2_048, 64, DType::F32, DType::Q4_0),
        (2_000, 700, 256, DType::Q8_0, DType::F16),
        (20_000, 128, 128, DType::F16, DType::Q8_0),
    ] {
        let config = TinyConfig { vocab, context: 2_048, layers: 4, dtype, embedding: dtype, ..base.clone() };
        let model = tiny(&scratch, &config);
        let device = whole();
        let options = SessionOptions { context, chunk, kv_type, ..options(Device::Open(device.clone())) };
        let estimate = Session::estimate(&model, &options).expect("an estimate");
        assert!(estimate.on_gpu && estimate.scratch == 0 && estimate.allocated() == estimate.resident());
        let held = || device.allocated_bytes().expect("an allocator that counts");
        let before = held();
        let mut session = Session::new(&model, &options).expect("a session");
        session.feed(&tokens(&model, 1, context - 1)).expect("a prompt");
        session.feed(&[3]).expect("the last token");
        let (taken, told) = ((held() - before) as f64, estimate.resident() as f64);
        println!("{context} tokens of {kv_type}: {taken} bytes, {told} were told: {estimate:?}");
        assert!((taken - told).abs() < 0.1 * taken, "{taken} bytes are taken, {told} were told: {estimate:?}");
        let budget = Some(estimate.resident() - 1);
        let refused = Session::new(&model, &SessionOptions { memory_budget: budget, ..options }).expect_err("too much");
        assert!(refused.to_string().contains("uploaded weights"), "{refused}");
    }
}

/// A part of the window is dropped on both: at a place within a page, in one step and in many, from a sequence that a fork
/// shares, which keeps its own.
#[test]
fn gpu_shifts_as_the_cpu() {
    let device = whole();
    for arch in ["llama", "qwen2", "gemma3", "chatglm", "baichuan"] {
        for kv_type in TYPES {
            let scratch = Scratch::new(&format!("gpu-shift-{arch}-{kv_type}"));
            let base = TinyConfig::new(arch);
            let model = tiny(&scratch, &TinyConfig { width: 128, head_dim: 32, sliding_window: 300, ..base });
            let text = tokens(&model, 1, 200);
            let run = |device: Device| {
                let mut session = open(&model, device, kv_type);
                session.feed(&text).expect("a prompt");
                let mut whole = session.fork().expect("a fork");
                session.shift(5, 90).expect("a part goes");
                let mut all = session.feed(&[9]).expect("a token").to_vec();
                session.shift(3, 7).expect("a part goes");
                assert_eq!(session.tokens(), [&text[..3], &text[100..], &[9]].concat());
                all.extend_from_slice(session.feed(&text[..40]).expect("more"));
                assert!(session.shift(130, 40).expect_err("too much").to_string().contains("are held"));
                all.extend_from_slice(whole.feed(&[9]).expect("a token"));
                all
            };
            let (ours, wanted) = (run(Device::Open(device.clone())), run(Device::Cpu));
            let far = distance(&ours, &wanted);
            // Two roundings more.
            assert!(far < 3.0 * most(kv_type), "{arch}, cache {kv_type}: {far}");
            let vocab = model.spec().vocab;
            let shows = distance(&wanted[..vocab], &wanted[2 * vocab..]);
            assert!(shows > 3.0 * far, "{arch}, cache {kv_type}: {far}, but dropping a part changes {shows}");
        }
    }
}

/// An answer that outgrows the window several times over is the CPU's, token by token.
#[test]
fn gpu_makes_room_in_a_full_window() {
    let scratch = Scratch::new("gpu-room");
    let model = model(&scratch, 32);
    let run = |device: Device| {
        let options = SessionOptions { context: 64, ..options(device) };
        let mut session = Session::new(&model, &options).expect("a session");
        let sampler = SamplerOptions::greedy();
        let options = GenerateOptions { sampler, shift: Some(10), max_tokens: 200, ..Default::default() };
        let mut generation = session.generate(&tokens(&model, 1, 30), options).expect("an answer");
        let mut all = Vec::new();
        while let Some(piece) = generation.next().expect("a token") {
            all.extend(piece.token);
        }
        assert!(generation.stats().dropped_tokens >= all.len() + 30 - 64, "{:?}", generation.stats());
        all
    };
    let (ours, wanted) = (run(Device::Open(whole())), run(Device::Cpu));
    assert_eq!(ours.len(), 200);
    assert_eq!(ours, wanted);
}

/// Eight bits cost the GPU what they cost the CPU, in prompts, in single tokens and in a window so long that attention is
/// divided; heads have odd and even numbers of blocks.
#[test]
fn gpu_caches_in_eight_bits_as_the_cpu() {
    for (device, head_dim, arch) in
        [(whole(), 32, "llama"), (whole(), 64, "gemma3"), (whole(), 96, "qwen2"), (small(8 << 20), 128, "llama")]
    {
        let scratch = Scratch::new(&format!("gpu-eight-{head_dim}"));
        let config = TinyConfig {
            head_dim,
            width: 4 * head_dim,
            heads: 4,
            kv_heads: 2,
            context: 2_048,
            ..TinyConfig::new(arch)
        };
        let model = tiny(&scratch, &TinyConfig { sliding_window: 700, ..config });
        let run = |device: Device, kv_type: DType| {
            let options = SessionOptions { kv_type, chunk: 256, context: 2_048, ..options(device) };
            let mut session = Session::new(&model, &options).expect("a session");
            let mut all = session.feed(&tokens(&model, 1, 1_030)).expect("a prompt").to_vec();
            for token in tokens(&model, 2, 4) {
                all.extend_from_slice(session.feed(&[token]).expect("a token"));
            }
            (all, session.cache_bytes())
        };
        let (exact, _) = run(Device::Cpu, DType::F32);
        let (wanted, _) = run(Device::Cpu, DType::Q8_0);
        let (ours, bytes) = run(Device::Open(device.clone()), DType::Q8_0);
        let (_, half) = run(Device::Open(device), DType::F16);
        let (cost, price) = (distance(&wanted, &exact), distance(&ours, &exact));
        assert!(cost > 1e-4, "heads of {head_dim}: eight bits cost nothing");
        assert!(price < 1.5 * cost, "heads of {head_dim}: {price} on the GPU, {cost} on the CPU");
        assert!(bytes * 16 <= half * 9, "heads of {head_dim}: {bytes} bytes, {half} in half precision");
    }
}
