//! ChatGLM (2, 3 and GLM-4) and GLM-4-0414: half of each head rotates, neighbouring components together, and the gate lies in
//! the first rows of `ffn_up`. ChatGLM stacks queries, keys and values, with their biases, in `attn_qkv`; GLM-4-0414 keeps
//! them apart and has norms behind each branch.
//!
//! Converters leave the rows as they are; what part of a head rotates is in `rope.dimension_count`.

use kinglet_engine::gguf::Gguf;
use kinglet_engine::tape::{RopeStyle, Spec};
use kinglet_engine::{Error, Result};

use super::common::{Keys, with_post_norms};

/// `general.architecture = chatglm`.
pub fn chatglm(gguf: &Gguf) -> Result<Spec> {
    Keys::new(gguf)?.decoder(RopeStyle::Interleaved)
}

/// `general.architecture = glm4`.
pub fn glm4(gguf: &Gguf) -> Result<Spec> {
    let keys = Keys::new(gguf)?;
    // Models that see rotate by three positions; models that guess ahead have layers which are none of the decoder's.
    let key = keys.key("rope.dimension_sections");
    if gguf.metadata().get(&key).is_some() {
        return Err(Error::Unsupported(format!("{}: key {key}: rotation by several positions", gguf.name())));
    }
    if let Some(extra) = keys.opt_u32("nextn_predict_layers")?.filter(|n| *n > 0) {
        return Err(Error::Unsupported(format!("{}: {extra} layers that predict further tokens", gguf.name())));
    }
    let mut spec = keys.decoder(RopeStyle::Interleaved)?;
    with_post_norms(&mut spec);
    Ok(spec)
}
