//! Model families as data, the catalogue of known models with `pull`, tiny random models for tests, and models to be
//! trained from nothing.
//!
//! A family is one short file that reads a GGUF's keys and says what the decoder is made of, as a
//! [`Spec`](kinglet_engine::tape::Spec). [`open`] does the whole way from a path to a model that can run.

pub mod catalogue;
pub mod families;
pub mod peft;
#[cfg(feature = "pull")]
pub mod pull;
pub mod scratch;
pub mod tiny;

use std::path::Path;
use std::sync::Arc;

use kinglet_engine::Result;
use kinglet_engine::adapter::Adapter;
use kinglet_engine::gguf::Gguf;
use kinglet_engine::session::Model;

/// Opens the model file at `path`: maps it, recognises its family, checks its tensors.
///
/// # Errors
/// A file that is no GGUF or is damaged, an architecture that is not supported, tensors that do not fit the metadata.
pub fn open(path: impl AsRef<Path>) -> Result<Model> {
    load(Gguf::open(path)?)
}

/// Opens the LoRA adapter at `path` for `model`: a GGUF file, or a folder as PEFT writes it.
///
/// # Errors
/// What [`Adapter::open`] and [`peft::read`] say of files that are no adapters or do not fit `model`.
pub fn open_adapter(path: impl AsRef<Path>, model: &Model) -> Result<Adapter> {
    let path = path.as_ref();
    if path.is_dir() { peft::read(path, model) } else { Adapter::open(path) }
}

/// As [`open`], for a GGUF that is already mapped or read.
///
/// # Errors
/// As [`open`].
pub fn load(gguf: Gguf) -> Result<Model> {
    let spec = families::spec(&gguf)?;
    Model::new(Arc::new(gguf), spec)
}
