//! From a model argument to an open file: pulled on first use, with a bar.

use crate::progress::Download;
use kinglet_engine::gguf::Gguf;
use kinglet_engine::session::Model;
use kinglet_models::pull::{self, Cache, Resolved, SourceKind};
use std::path::PathBuf;

/// The file of `model`, fetched if this machine does not have it.
pub fn file_of(model: &str) -> anyhow::Result<PathBuf> {
    let resolved = pull::resolve(model)?;
    if let Resolved::File(path) = resolved {
        return Ok(path);
    }
    Ok(pull::pull(&Cache::from_env()?, &resolved, SourceKind::Any, &mut Download::default())?)
}

/// The open file of `model`.
pub fn gguf_of(model: &str) -> anyhow::Result<Gguf> {
    Ok(Gguf::open(file_of(model)?)?)
}

/// `model`, ready to run.
pub fn open(model: &str) -> anyhow::Result<Model> {
    Ok(kinglet_models::open(file_of(model)?)?)
}
