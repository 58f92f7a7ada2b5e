//! From logits to a token. Greedy for now.

use crate::Result;

/// How tokens are chosen.
#[derive(Clone, Debug, Default)]
pub struct SamplerOptions {}

/// Chooses tokens.
#[derive(Debug)]
pub struct Sampler;

impl Sampler {
    /// A sampler for a vocabulary.
    ///
    /// # Errors
    /// None yet.
    pub fn new(_options: &SamplerOptions, _vocab: usize) -> Result<Sampler> {
        Ok(Sampler)
    }

    /// Takes note of a token.
    pub fn accept(&mut self, _token: u32) {}

    /// The token with the largest logit, the first on a tie.
    ///
    /// # Errors
    /// None yet.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<u32> {
        let best = (0..logits.len()).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
        Ok(best.unwrap_or(0) as u32)
    }
}
