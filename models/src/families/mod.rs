//! One file per family: GGUF keys → [`Spec`], tensor names, quirks.

mod baichuan;
mod common;
mod gemma;
mod glm;
mod internlm;
mod llama;
mod phi;
mod qwen;

use kinglet_engine::gguf::Gguf;
use kinglet_engine::tape::Spec;
use kinglet_engine::{Error, Result};

/// Reads a family's keys.
type Reader = fn(&Gguf) -> Result<Spec>;

/// Values of `general.architecture` that are known, with their readers.
const FAMILIES: [(&str, Reader); 11] = [
    ("llama", llama::spec),
    ("qwen2", qwen::qwen2),
    ("qwen3", qwen::qwen3),
    ("gemma", gemma::gemma),
    ("gemma2", gemma::gemma2),
    ("gemma3", gemma::gemma3),
    ("baichuan", baichuan::spec),
    ("chatglm", glm::chatglm),
    ("glm4", glm::glm4),
    ("internlm2", internlm::internlm2),
    ("phi3", phi::phi3),
];

/// The architectures that can run.
pub fn known() -> Vec<&'static str> {
    FAMILIES.iter().map(|(name, _)| *name).collect()
}

/// What the model in `gguf` is made of.
///
/// # Errors
/// [`Error::Unsupported`] for an architecture that is not in the table, [`Error::Format`] for missing or absurd keys.
pub fn spec(gguf: &Gguf) -> Result<Spec> {
    let architecture = gguf.metadata().str("general.architecture")?;
    let Some((_, read)) = FAMILIES.iter().find(|(name, _)| *name == architecture) else {
        return Err(Error::Unsupported(format!(
            "{}: the architecture {architecture:?}; known are {}",
            gguf.name(),
            known().join(", ")
        )));
    };
    read(gguf)
}
