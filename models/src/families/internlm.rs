//! InternLM 2: a LLaMA. Converters cut the stacked `wqkv` into queries, keys and values, and permute the rows of the first
//! two. (InternLM 3 says `llama` in its files.)

use kinglet_engine::Result;
use kinglet_engine::gguf::Gguf;
use kinglet_engine::tape::{RopeStyle, Spec};

use super::common::Keys;

/// `general.architecture = internlm2`.
pub fn internlm2(gguf: &Gguf) -> Result<Spec> {
    Keys::new(gguf)?.decoder(RopeStyle::Interleaved)
}
