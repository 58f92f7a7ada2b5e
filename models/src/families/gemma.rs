//! Gemma 3: scaled embedding, norms before and after each branch, norms of query and key heads, GeGLU, and five layers
//! with a sliding window and their own base of rotation for each layer that sees everything.
//!
//! GGUF files store the norm weights as `1 + w`, so nothing is added here.

use kinglet_engine::Result;
use kinglet_engine::gguf::Gguf;
use kinglet_engine::tape::{Gate, RopeStyle, Spec, WeightRef};

use super::common::{Keys, with_head_norms};

/// One layer in this many sees the whole context.
const PATTERN: usize = 6;
/// Rotation base of the layers with a window.
const LOCAL_BASE: f32 = 10_000.0;
/// The largest model, whose attention is scaled by its width per head instead of its head size.
const LAYERS_27B: usize = 62;

/// `general.architecture = gemma3`.
pub fn gemma3(gguf: &Gguf) -> Result<Spec> {
    let keys = Keys::new(gguf)?;
    let mut spec = keys.decoder(RopeStyle::Halves)?;
    with_head_norms(&mut spec);
    spec.embed_scale = (spec.width as f32).sqrt();
    spec.gate = Gate::GeluTanh;
    spec.logit_softcap = keys.opt_f32("final_logit_softcapping")?.filter(|c| *c > 0.0);
    if spec.layers.len() == LAYERS_27B {
        spec.attention_scale = 1.0 / ((spec.width / spec.heads) as f32).sqrt();
    }
    let mut local = spec.ropes[0].clone();
    local.base = keys.opt_f32("rope.freq_base_swa")?.unwrap_or(LOCAL_BASE);
    local.scale = 1.0;
    spec.ropes.push(local);
    let window = keys.opt_u32("attention.sliding_window")?.filter(|w| *w > 0).map(|w| w as usize);
    for (i, layer) in spec.layers.iter_mut().enumerate() {
        layer.post_attention_norm = Some(WeightRef::whole(format!("blk.{i}.post_attention_norm.weight")));
        layer.post_ffn_norm = Some(WeightRef::whole(format!("blk.{i}.post_ffw_norm.weight")));
        if window.is_some() && i % PATTERN != PATTERN - 1 {
            layer.window = window;
            layer.rope = Some(1);
        }
    }
    Ok(spec)
}
