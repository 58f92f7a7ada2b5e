//! A model to be trained from nothing: random weights in the shape of a family, with another file's tokenizer.
//!
//! Matrices are drawn from a normal distribution of deviation 0.02 (GPT-2's, and that of most since), norms are 1, biases
//! 0. Of the [`TinyConfig`] the vocabulary's size and the tokenizer come from the other file.

use std::path::Path;

use kinglet_engine::gguf::{Gguf, Writer};
use kinglet_engine::{Error, Result};

use crate::tiny::{self, TinyConfig};

/// Deviation of the first weights.
const DEVIATION: f32 = 0.02;

/// Writes to `path` a model of the shape of `config`, whose tokenizer and chat template are those of `tokenizer`.
///
/// # Errors
/// [`Error::Argument`] for impossible shapes, as [`tiny::write_tiny`]; [`Error::Format`] where the other file has no
/// tokens, [`Error::Io`].
pub fn write_scratch(path: impl AsRef<Path>, config: &TinyConfig, tokenizer: &Gguf) -> Result<()> {
    let tokens = tokenizer.metadata().strings("tokenizer.ggml.tokens")?.len();
    let vocab = u32::try_from(tokens).map_err(|_| Error::argument(format!("{tokens} tokens are too many")))?;
    let config = TinyConfig { vocab, ..config.clone() };
    let mut writer = Writer::new();
    for (key, value) in tiny::metadata_of(&config)? {
        writer.set(&key, value);
    }
    writer.set("general.name", format!("{} from scratch", config.arch));
    for (key, value) in tokenizer.metadata().iter().filter(|(key, _)| key.starts_with("tokenizer.")) {
        writer.set(key, value.clone());
    }
    let init = tiny::First::Training { deviation: DEVIATION };
    tiny::write_tensors(writer, &config, init, path)
}
