//! Qwen 2 and 2.5 (biases on Q, K and V, found as tensors) and Qwen 3 (norms of query and key heads instead).

use kinglet_engine::Result;
use kinglet_engine::gguf::Gguf;
use kinglet_engine::tape::{RopeStyle, Spec};

use super::common::{Keys, with_head_norms};

/// `general.architecture = qwen2`.
pub fn qwen2(gguf: &Gguf) -> Result<Spec> {
    Keys::new(gguf)?.decoder(RopeStyle::Halves)
}

/// `general.architecture = qwen3`.
pub fn qwen3(gguf: &Gguf) -> Result<Spec> {
    let mut spec = qwen2(gguf)?;
    with_head_norms(&mut spec);
    Ok(spec)
}
