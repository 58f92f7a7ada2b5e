//! Baichuan and Baichuan 2. The 7B model is a LLaMA; the 13B model has no rotation but ALiBi (Press, Smith and Lewis 2021,
//! arXiv:2108.12409): each head takes its slope times the distance off its scores.
//!
//! The file says neither; the number of layers tells the two apart, as it does for llama.cpp. Converters cut the stacked
//! `W_pack` into queries, keys and values and permute the rows of the first two, in both models.

use kinglet_engine::gguf::Gguf;
use kinglet_engine::tape::{RopeStyle, Spec};
use kinglet_engine::{Error, Result};

use super::common::Keys;

const LAYERS_7B: usize = 32;
const LAYERS_13B: usize = 40;
/// The slopes fall to 2 to the minus this.
const MAX_BIAS: f64 = 8.0;

/// `general.architecture = baichuan`.
pub fn spec(gguf: &Gguf) -> Result<Spec> {
    let mut spec = Keys::new(gguf)?.decoder(RopeStyle::Interleaved)?;
    match spec.layers.len() {
        LAYERS_7B => {}
        LAYERS_13B => {
            spec.alibi = Some(slopes(spec.heads));
            spec.ropes.clear();
            spec.layers.iter_mut().for_each(|layer| layer.rope = None);
        }
        other => {
            return Err(Error::Unsupported(format!(
                "{}: a Baichuan of {other} layers; known are 7B with {LAYERS_7B}, whose heads rotate, and 13B with \
                 {LAYERS_13B}, which has ALiBi",
                gguf.name()
            )));
        }
    }
    Ok(spec)
}

/// One slope per head: powers of `2^(−8/n)` for the largest power of two `n` that is no more than `heads`, and then every
/// other of the powers that twice as many heads would have.
fn slopes(heads: usize) -> Vec<f32> {
    let whole = 1usize << heads.max(1).ilog2();
    let slope = |h: usize| match h.checked_sub(whole) {
        None => -MAX_BIAS * (h + 1) as f64 / whole as f64,
        Some(rest) => -MAX_BIAS * (2 * rest + 1) as f64 / (2 * whole) as f64,
    };
    (0..heads).map(|h| slope(h).exp2() as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `get_slopes` of <https://github.com/ofirpress/attention_with_linear_biases>, for 8 and for 6 heads.
    #[test]
    fn slopes_are_those_of_the_paper() {
        assert_eq!(slopes(8), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]);
        assert_eq!(slopes(6), [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]);
    }
}
