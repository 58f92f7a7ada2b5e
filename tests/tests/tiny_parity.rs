//! Logits of tiny random models against llama.cpp: every architecture that can be written, in every weight type.
//!
//! Random weights make a hard test: nothing averages out, a wrong rotation, scale or mask moves every logit. Real models
//! cover three architectures, this covers all. Distances are relative: the root mean square of the difference over that
//! of the logits' own deviation from their mean.

use kinglet_engine::quant::DType;
use kinglet_engine::session::{Session, SessionOptions};
use kinglet_models::families;
use kinglet_models::tiny::{TinyConfig, write_tiny};
use kinglet_tests::data::{Random, Scratch};
use kinglet_tests::oracle::{self, ContextOptions};

/// Enough to leave the sliding window, which is 8 tokens.
const TOKENS: usize = 29;

/// How far apart the engines may be. llama.cpp multiplies `F16` and `BF16` weights with activations rounded to the same
/// type, and quantized ones with activations rounded to 8 bits. It takes GELU from a table of 16-bit values.
///
/// Roundings of 8 bits add up over the layers as independent errors do: with the square root of their number.
fn bound(config: &TinyConfig) -> f64 {
    let arch = &config.arch;
    match config.dtype {
        DType::F32 if arch.starts_with("gemma") => 2e-3,
        DType::F32 => 1e-5,
        DType::F16 => 5e-3,
        DType::BF16 => 2e-2,
        _ => 5e-2 * f64::from(config.layers.max(6)).sqrt() / 6f64.sqrt(),
    }
}

fn distance(ours: &[f32], theirs: &[f32]) -> f64 {
    let mean = theirs.iter().map(|x| f64::from(*x)).sum::<f64>() / theirs.len() as f64;
    let deviation: f64 = theirs.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum();
    let difference: f64 = theirs.iter().zip(ours).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    (difference / deviation).sqrt()
}

/// The largest distance over all positions, of ours fed token by token, in two chunks and at once.
fn worst_distance(config: &TinyConfig, scratch: &Scratch) -> Result<f64, String> {
    let path = scratch.path("tiny.gguf");
    write_tiny(&path, config).map_err(|e| e.to_string())?;
    let theirs_model = oracle::Model::load(&path)?;
    let vocabulary = theirs_model.vocab_size();
    let mut random = Random::new(7);
    let tokens: Vec<u32> = (0..TOKENS).map(|_| random.below(vocabulary) as u32).collect();
    let context = ContextOptions { context: 64, threads: 1, f16_cache: false };
    let theirs = theirs_model.context(context)?.logits(&tokens)?;
    let theirs: Vec<&[f32]> = theirs.chunks_exact(vocabulary).collect();

    let model = kinglet_models::open(&path).map_err(|e| e.to_string())?;
    let options = SessionOptions { context: 64, threads: 1, kv_type: DType::F32, ..SessionOptions::default() };
    let mut session = Session::new(&model, &options).map_err(|e| e.to_string())?;
    let mut worst = 0.0f64;
    for (token, reference) in tokens.iter().zip(&theirs) {
        let logits = session.feed(&[*token]).map_err(|e| e.to_string())?;
        worst = worst.max(distance(logits, reference));
    }
    for chunks in [&[11, TOKENS - 11][..], &[TOKENS]] {
        session.reset();
        let mut end = 0;
        for length in chunks {
            end += length;
            let logits = session.feed(&tokens[end - length..end]).map_err(|e| e.to_string())?;
            worst = worst.max(distance(logits, theirs[end - 1]));
        }
    }
    if worst.is_nan() { Err("a logit is NaN".into()) } else { Ok(worst) }
}

fn check(configs: impl Iterator<Item = TinyConfig>, name: &str) {
    let scratch = Scratch::new(name);
    let mut broken = Vec::new();
    for config in configs {
        let (arch, dtype) = (&config.arch, config.dtype);
        match worst_distance(&config, &scratch) {
            Ok(distance) if distance <= bound(&config) => println!("{arch} {dtype}: {distance:.1e}"),
            Ok(distance) => broken.push(format!("{arch} {dtype}: {distance:.1e}, more than {:.0e}", bound(&config))),
            Err(error) => broken.push(format!("{arch} {dtype}: {error}")),
        }
    }
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

/// Architectures that run. A family that is added is tested from then on.
fn architectures() -> impl Iterator<Item = &'static str> {
    let known = families::known();
    TinyConfig::architectures().filter(move |arch| known.contains(arch))
}

#[test]
fn every_family_has_a_tiny_model() {
    let written: Vec<_> = TinyConfig::architectures().collect();
    for arch in families::known() {
        assert!(written.contains(&arch), "no tiny model of {arch}: nothing compares it with llama.cpp");
    }
}

#[test]
fn every_architecture_in_f32() {
    check(architectures().map(TinyConfig::new), "architectures");
}

#[test]
fn every_architecture_in_every_type() {
    // Q8_K is a type of activations; llama.cpp takes it for no weight.
    let types = || DType::WEIGHTS.into_iter().filter(|t| *t != DType::Q8_K && *t != DType::F32);
    check(architectures().flat_map(|a| types().map(move |t| TinyConfig::new(a).with_dtype(t))), "types");
}

/// Heads of the 13B model are told apart by distance alone: here as many as a power of two, and not.
#[test]
fn distances_instead_of_rotation() {
    let shape = |heads, head_dim| TinyConfig {
        layers: 40,
        heads,
        kv_heads: heads,
        head_dim,
        width: heads * head_dim,
        ..TinyConfig::new("baichuan")
    };
    check([shape(4, 16), shape(6, 16), shape(5, 12)].into_iter(), "alibi");
}

#[test]
fn grouped_heads_of_every_ratio() {
    let ratios = [(4, 4), (4, 2), (4, 1)];
    let configs =
        ratios.into_iter().map(|(heads, kv_heads)| TinyConfig { heads, kv_heads, ..TinyConfig::new("llama") });
    check(configs, "heads");
}
