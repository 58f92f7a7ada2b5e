//! What the integration tests share.
//!
//! The tests themselves are one binary, `tests/all.rs`. With the feature `oracle` they compare Kinglet with llama.cpp,
//! which is then built from source (cmake, a C++17 compiler and libclang are needed); without it they still hold the
//! layers, the documents and the command line.
//!
//! * [`oracle`]: llama.cpp behind a safe interface.
//! * [`compare`]: distances between two engines' logits.
//! * [`data`]: models, texts, random numbers.
//! * [`disk`]: disks that are full.
//! * [`prompts`]: what the engines are asked.
//! * [`process`]: the `kinglet` program, as a user runs it.
//! * [`mod@reference`]: a decoder in double precision.
//! * [`strings`]: seeded strings of every kind for the tokenizers.
//! * [`source`]: the repository as text, for the tests that hold its structure.

pub mod compare;
pub mod data;
pub mod disk;
#[cfg(feature = "oracle")]
pub mod oracle;
pub mod process;
pub mod prompts;
pub mod reference;
pub mod source;
pub mod strings;
