//! The core of Kinglet: quantized weights mapped from a GGUF file, and one tape of coarse operations that is built
//! once, checked, planned and then run, for chatting and for learning alike.
//!
//! | module | what is in it | depends on |
//! | --- | --- | --- |
//! | [`error`] | the one error type | – |
//! | [`mod@file`] | files that appear whole or not at all | `error` |
//! | [`gguf`] | the file map, metadata and tensor table; reader and writer | `file`, `quant` (types) |
//! | [`quant`] | block layouts, dequantize, quantize: the specification of every type | `error` |
//! | [`text`] | tokenizer and chat template, both from the GGUF | `gguf` |
//! | [`tape`] | values, ops, the builder, the planner | `quant` |
//! | [`cpu`] | kernels by instruction set, the thread pool, the tape's executor | `tape`, `quant` |
//! | `gpu` | WGSL kernels and the executor that records a tape for a device (feature `gpu`) | `tape`, `quant` |
//! | [`adapter`] | LoRA and DoRA: files, checks, merging | `gguf`, `quant` |
//! | [`session`] | model, KV cache, prefill and decode, generation | all above |
//! | `system` | threads, pages and clocks, where there are any | – |
//! | [`random`] | numbers that are hashes of a seed and a counter | – |
//! | [`sampling`] | from logits to a token | `random` |
//! | [`grammar`] | what an answer may be: JSON schemas, grammars, regular expressions | `text` |
//!
//! No architecture is known here by name: a family is a [`tape`] made by `kinglet-models`.

pub mod adapter;
pub mod cpu;
mod deep;
pub mod error;
pub mod file;
pub mod gguf;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod grammar;
pub mod quant;
pub mod random;
pub mod sampling;
pub mod session;
mod system;
pub mod tape;
pub mod text;

#[cfg(all(feature = "gpu", target_family = "wasm"))]
compile_error!("a browser's GPU answers by promises, which nothing here waits for: build with --no-default-features");

pub use error::{Error, Result};
pub use system::Stopwatch;
