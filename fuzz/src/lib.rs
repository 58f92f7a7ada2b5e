//! Fuzz targets: what anybody may hand to Kinglet, as functions of bytes. A target that returns has held; one that
//! panics, takes ten seconds, two gigabytes or memory that is not its own has found a bug.
//!
//! | target | bytes are | what must hold |
//! | --- | --- | --- |
//! | [`gguf`] | a file | opened or refused; every tensor lies within it |
//! | [`model`] | a model | opened, run and trained, or refused |
//! | [`tokenizer`] | a vocabulary and a text | tokens are in the vocabulary; decoding gives the text back |
//! | [`template`] | a chat template and what is said | rendered or refused; the parts of a mask are the whole |
//! | [`grammar`] | a grammar and an answer under it, or an answer with calls | compiled and held, or refused, in time |
//! | [`adapter`] | a LoRA adapter, as GGUF or PEFT | opened and applied, or refused; written again it is the same |
//! | [`ffi`] | calls of the C ABI with their arguments | a status of the header, never `KINGLET_ERR_INTERNAL` |
//!
//! `fuzz/run` runs them under libFuzzer and AddressSanitizer. `corpus/` has inputs to begin with, which [`seeds`] makes;
//! what was found is kept in `found/`. Both are run by `cargo test -p kinglet-fuzz`, without libFuzzer.

mod adapter;
mod ffi;
mod gguf;
mod grammar;
mod input;
mod model;
pub mod seeds;
mod template;
mod tokenizer;

pub use adapter::adapter;
pub use ffi::ffi;
pub use gguf::gguf;
pub use grammar::grammar;
pub use model::model;
pub use template::template;
pub use tokenizer::tokenizer;

/// What takes the bytes of an input.
pub type Target = fn(&[u8]);

/// All targets by name, which is that of their corpus too.
pub const TARGETS: [(&str, Target); 7] = [
    ("gguf", gguf),
    ("model", model),
    ("tokenizer", tokenizer),
    ("template", template),
    ("grammar", grammar),
    ("adapter", adapter),
    ("ffi", ffi),
];
