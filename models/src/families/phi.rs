//! Phi 3 and 4: a LLaMA whose queries, keys and values are stacked in `attn_qkv` and whose gate lies in the first rows of
//! `ffn_up`.
//!
//! Where the file names a window, every layer has it, as in the model's own implementation; llama.cpp leaves it out. The
//! models with a long context have two sets of factors of their rotation, one for conversations that stay within the context
//! of the first training and one for longer ones; they are refused.

use kinglet_engine::gguf::Gguf;
use kinglet_engine::tape::{RopeStyle, Spec};
use kinglet_engine::{Error, Result};

use super::common::Keys;

/// `general.architecture = phi3`.
pub fn phi3(gguf: &Gguf) -> Result<Spec> {
    let keys = Keys::new(gguf)?;
    for name in ["rope_factors_short.weight", "rope_factors_long.weight"] {
        if gguf.tensor(name).is_some() {
            return Err(Error::Unsupported(format!(
                "{}: tensor {name}: rotation that depends on the length of the context (LongRoPE); models of a short \
                 context, such as Phi-3-mini-4k, can run",
                gguf.name()
            )));
        }
    }
    let mut spec = keys.decoder(RopeStyle::Halves)?;
    if let Some(window) = keys.opt_u32("attention.sliding_window")?.filter(|w| *w > 0) {
        spec.layers.iter_mut().for_each(|layer| layer.window = Some(window as usize));
    }
    Ok(spec)
}
