//! LLaMA and everything that shares its layout in GGUF files: Mistral, SmolLM2, InternLM 3, and others.
//!
//! Converters permute the rows of Q and K so that pairs of the rotation are neighbours: [`RopeStyle::Interleaved`].

use kinglet_engine::Result;
use kinglet_engine::gguf::Gguf;
use kinglet_engine::tape::{RopeStyle, Spec};

use super::common::Keys;

/// `general.architecture = llama`.
pub fn spec(gguf: &Gguf) -> Result<Spec> {
    let keys = Keys::new(gguf)?;
    if let Some(experts) = keys.opt_u32("expert_count")?
        && experts > 0
    {
        return Err(kinglet_engine::Error::Unsupported(format!(
            "{}: a mixture of {experts} experts; only dense models can run",
            gguf.name()
        )));
    }
    keys.decoder(RopeStyle::Interleaved)
}
