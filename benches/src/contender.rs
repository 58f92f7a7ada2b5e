//! What is measured: an engine that can prefill a prompt and decode tokens one by one.
//!
//! The two shapes are those of llama.cpp's own benchmark, so that its published figures can be checked against ours:
//! `pp N` feeds N tokens at once into an empty cache and asks for the logits of the last; `tg N` feeds N tokens one at
//! a time, starting from an empty cache, and asks for logits each time. Sampling and tokenizing are left out. Token ids
//! come from a fixed generator, the same for both engines.

use std::time::{Duration, Instant};

/// An engine with a model loaded and a cache.
pub trait Contender {
    /// Name and settings, for the report.
    fn name(&self) -> String;
    /// Empties the cache.
    fn reset(&mut self) -> anyhow::Result<()>;
    /// Feeds `tokens` after what the cache holds and computes the logits of the last one. Returns when they are there.
    fn feed(&mut self, tokens: &[u32]) -> anyhow::Result<()>;
    /// Size of the vocabulary: token ids lie below it.
    fn vocabulary(&self) -> usize;
}

/// The two things a user waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// The whole prompt at once (`pp`).
    Prefill(usize),
    /// One token at a time (`tg`).
    Decode(usize),
}

impl Shape {
    /// Tokens in one run.
    pub fn tokens(self) -> usize {
        match self {
            Shape::Prefill(n) | Shape::Decode(n) => n,
        }
    }

    /// `pp512` or `tg64`, the names llama.cpp's benchmark uses.
    pub fn label(self) -> String {
        match self {
            Shape::Prefill(n) => format!("pp{n}"),
            Shape::Decode(n) => format!("tg{n}"),
        }
    }
}

/// `n` token ids below `vocabulary`, the same on every call (SplitMix64, seed 42).
pub fn token_ids(n: usize, vocabulary: usize) -> Vec<u32> {
    let mut state = 42u64;
    (0..n)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) % vocabulary.max(1) as u64) as u32
        })
        .collect()
}

/// Runs `shape` once from an empty cache and returns tokens per second.
pub fn measure(engine: &mut dyn Contender, shape: Shape) -> anyhow::Result<f64> {
    let tokens = token_ids(shape.tokens(), engine.vocabulary());
    engine.reset()?;
    let start = Instant::now();
    match shape {
        Shape::Prefill(_) => engine.feed(&tokens)?,
        Shape::Decode(_) => {
            for token in tokens.chunks(1) {
                engine.feed(token)?;
            }
        }
    }
    Ok(tokens.len() as f64 / start.elapsed().as_secs_f64())
}

/// Lets the worker threads of the engine that ran last stop spinning before the other one is timed.
pub fn settle() {
    std::thread::sleep(Duration::from_millis(60));
}
