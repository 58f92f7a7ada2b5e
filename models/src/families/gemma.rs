//! Gemma: a scaled embedding and GeGLU. Gemma 2 and 3 add norms behind each branch, and layers with a sliding window among
//! those that see everything: Gemma 2 alternates them and bounds attention scores and logits by a tanh; Gemma 3 has five with
//! a window, and their own base of rotation, for each that sees everything, and norms of query and key heads.
//!
//! GGUF files store the norm weights as `1 + w`, so nothing is added here.

use kinglet_engine::Result;
use kinglet_engine::gguf::Gguf;
use kinglet_engine::tape::{Gate, RopeStyle, Spec};

use super::common::{Keys, with_head_norms, with_post_norms};

/// One layer in this many sees the whole context: the last.
const PATTERN_2: usize = 2;
const PATTERN_3: usize = 6;
/// Rotation base of Gemma 3's layers with a window.
const LOCAL_BASE: f32 = 10_000.0;
/// Layers of the largest models.
const LAYERS_2_27B: usize = 46;
const LAYERS_3_27B: usize = 62;
/// What files of Gemma 2 that do not say it leave to the reader.
const WINDOW_2: u32 = 4_096;
const ATTENTION_SOFTCAP_2: f32 = 50.0;
const LOGIT_SOFTCAP_2: f32 = 30.0;

/// `general.architecture = gemma`.
pub fn gemma(gguf: &Gguf) -> Result<Spec> {
    decoder(&Keys::new(gguf)?)
}

/// `general.architecture = gemma2`.
pub fn gemma2(gguf: &Gguf) -> Result<Spec> {
    let keys = Keys::new(gguf)?;
    let mut spec = decoder(&keys)?;
    with_post_norms(&mut spec);
    scale_by_width(&mut spec, LAYERS_2_27B);
    let softcap = |name: &str, usual| Ok(Some(keys.opt_f32(name)?.unwrap_or(usual)).filter(|c| *c > 0.0));
    spec.attention_softcap = softcap("attn_logit_softcapping", ATTENTION_SOFTCAP_2)?;
    spec.logit_softcap = softcap("final_logit_softcapping", LOGIT_SOFTCAP_2)?;
    let window = keys.opt_u32("attention.sliding_window")?.unwrap_or(WINDOW_2);
    with_windows(&mut spec, window, PATTERN_2, 0);
    Ok(spec)
}

/// `general.architecture = gemma3`.
pub fn gemma3(gguf: &Gguf) -> Result<Spec> {
    let keys = Keys::new(gguf)?;
    let mut spec = decoder(&keys)?;
    with_post_norms(&mut spec);
    with_head_norms(&mut spec);
    scale_by_width(&mut spec, LAYERS_3_27B);
    spec.logit_softcap = keys.opt_f32("final_logit_softcapping")?.filter(|c| *c > 0.0);
    let mut local = spec.ropes[0].clone();
    local.base = keys.opt_f32("rope.freq_base_swa")?.unwrap_or(LOCAL_BASE);
    local.scale = 1.0;
    spec.ropes.push(local);
    let window = keys.opt_u32("attention.sliding_window")?.unwrap_or(0);
    with_windows(&mut spec, window, PATTERN_3, 1);
    Ok(spec)
}

/// What all have.
fn decoder(keys: &Keys<'_>) -> Result<Spec> {
    let mut spec = keys.decoder(RopeStyle::Halves)?;
    spec.embed_scale = (spec.width as f32).sqrt();
    spec.gate = Gate::GeluTanh;
    Ok(spec)
}

/// The attention of the model that has so many layers is scaled by its width per head instead of its head size.
fn scale_by_width(spec: &mut Spec, layers: usize) {
    if spec.layers.len() == layers {
        spec.attention_scale = 1.0 / ((spec.width / spec.heads) as f32).sqrt();
    }
}

/// Gives all layers but each `pattern`-th a window, unless it is 0, and rotation `rope`.
fn with_windows(spec: &mut Spec, window: u32, pattern: usize, rope: usize) {
    for (i, layer) in spec.layers.iter_mut().enumerate() {
        if window > 0 && i % pattern != pattern - 1 {
            layer.window = Some(window as usize);
            layer.rope = Some(rope);
        }
    }
}
