//! Perplexity by the protocol of llama.cpp's `perplexity` tool, so that figures can be compared with the many published.
//!
//! The text is tokenized once and cut into disjoint windows of `n_ctx` tokens; the rest is dropped. If the tokenizer puts
//! a BOS token before text, the first token of every window is replaced by it. Each window starts from an empty cache. Its
//! first half is context only; the logits at the positions `n_ctx / 2 ..= n_ctx − 2` are scored on the token that follows
//! each: `n_ctx − n_ctx / 2 − 1` predictions a window, 255 at 512.
//!
//! ```text
//! nll = −ln p(token)      PPL = exp(mean nll)      ± = PPL · sqrt((mean(nll²) − mean(nll)²) / (count − 1))
//! ```
//!
//! Other tools score differently and get other numbers for the same model: always say which protocol. A model is known
//! here only as a [`Scorer`]; a [`Session`] is one.

use kinglet_engine::session::Session;
use kinglet_engine::{Error, Result};
use serde::Serialize;

/// Something that tells how probable a text is.
pub trait Scorer {
    /// `ln p(tokens[i + 1] | tokens[..= i])` for every `i` in `from .. tokens.len() − 1`, with nothing before `tokens`.
    ///
    /// # Errors
    /// Whatever the model's evaluation fails with.
    fn log_probs(&mut self, tokens: &[u32], from: usize) -> Result<Vec<f64>>;
}

impl Scorer for Session {
    fn log_probs(&mut self, tokens: &[u32], from: usize) -> Result<Vec<f64>> {
        self.reset();
        Ok(self.score(tokens, from)?.into_iter().map(|nll| -f64::from(nll)).collect())
    }
}

/// The outcome.
#[derive(Clone, Debug, Serialize)]
pub struct Perplexity {
    /// `exp` of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Its standard error, as llama.cpp prints it after `+/-`.
    pub uncertainty: f64,
    /// Mean negative log-likelihood of a scored token, in nats.
    pub mean_nll: f64,
    /// Windows evaluated.
    pub windows: usize,
    /// Tokens scored.
    pub scored: usize,
    /// Tokens of the whole text.
    pub tokens: usize,
    /// Tokens in a window.
    pub context: usize,
    /// The protocol, for whoever reads the figure.
    pub protocol: &'static str,
}

/// Name of this protocol in outputs.
pub const PROTOCOL: &str = "llama.cpp: disjoint windows, second half of each scored";

/// Running sums over scored tokens.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    count: usize,
    nll: f64,
    nll2: f64,
}

impl Sums {
    fn add(&mut self, log_prob: f64) {
        self.count += 1;
        self.nll -= log_prob;
        self.nll2 += log_prob * log_prob;
    }

    fn mean(&self) -> f64 {
        self.nll / self.count as f64
    }

    fn perplexity(&self) -> f64 {
        self.mean().exp()
    }

    fn uncertainty(&self) -> f64 {
        let variance = self.nll2 / self.count as f64 - self.mean().powi(2);
        if self.count > 1 && variance > 0.0 {
            self.perplexity() * (variance / (self.count - 1) as f64).sqrt()
        } else {
            0.0
        }
    }
}

/// Scores `tokens` in windows of `context`. `bos` is the token that replaces the first one of a window, if the tokenizer
/// adds one. After each window `progress` is told how many are done, of how many, and the perplexity so far.
///
/// # Errors
/// [`Error::Argument`] if `context` is under 4 or the text shorter than one window; [`Error::Numeric`] if a probability
/// is no number; what `scorer` fails with.
pub fn perplexity(
    scorer: &mut dyn Scorer,
    tokens: &[u32],
    bos: Option<u32>,
    context: usize,
    progress: &mut dyn FnMut(usize, usize, f64),
) -> Result<Perplexity> {
    if context < 4 {
        return Err(Error::argument(format!("a window of {context} tokens is too small; use at least 4")));
    }
    let windows = tokens.len() / context;
    if windows == 0 {
        return Err(Error::argument(format!(
            "the text has {} tokens, fewer than one window of {context}; use a longer text or a smaller context",
            tokens.len()
        )));
    }
    let from = context / 2;
    let mut sums = Sums::default();
    for (done, window) in tokens.chunks_exact(context).enumerate() {
        let mut window = window.to_vec();
        if let (Some(bos), Some(first)) = (bos, window.first_mut()) {
            *first = bos;
        }
        let log_probs = scorer.log_probs(&window, from)?;
        if log_probs.len() != context - from - 1 || log_probs.iter().any(|p| !p.is_finite()) {
            return Err(Error::Numeric(format!(
                "window {done}: the model gave {} log-probabilities for {} predictions, or one that is no number",
                log_probs.len(),
                context - from - 1
            )));
        }
        log_probs.into_iter().for_each(|p| sums.add(p));
        progress(done + 1, windows, sums.perplexity());
    }
    Ok(Perplexity {
        perplexity: sums.perplexity(),
        uncertainty: sums.uncertainty(),
        mean_nll: sums.mean(),
        windows,
        scored: sums.count,
        tokens: tokens.len(),
        context,
        protocol: PROTOCOL,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Knows nothing but remembers what it was asked.
    struct Fake {
        asked: Vec<Vec<u32>>,
        say: fn(usize) -> f64,
    }

    impl Scorer for Fake {
        fn log_probs(&mut self, tokens: &[u32], from: usize) -> Result<Vec<f64>> {
            self.asked.push(tokens.to_vec());
            Ok((from..tokens.len() - 1).map(self.say).collect())
        }
    }

    fn measure(say: fn(usize) -> f64, bos: Option<u32>) -> (Fake, Perplexity) {
        let tokens: Vec<u32> = (0..35).collect();
        let mut fake = Fake { asked: vec![], say };
        let result = perplexity(&mut fake, &tokens, bos, 8, &mut |_, _, _| {}).unwrap();
        (fake, result)
    }

    #[test]
    fn a_uniform_model_has_the_perplexity_of_its_vocabulary() {
        let (_, p) = measure(|_| -(1000f64.ln()), None);
        assert!((p.perplexity - 1000.0).abs() < 1e-9);
        assert!(p.uncertainty < 1e-3, "{}", p.uncertainty);
        assert_eq!((p.windows, p.scored, p.tokens), (4, 4 * 3, 35));
    }

    #[test]
    fn windows_are_disjoint_and_begin_with_bos() {
        let (fake, _) = measure(|_| -1.0, Some(99));
        let firsts: Vec<_> = fake.asked.iter().map(|w| (w[0], w[1], w[7])).collect();
        assert_eq!(firsts, [(99, 1, 7), (99, 9, 15), (99, 17, 23), (99, 25, 31)]);
        let (fake, _) = measure(|_| -1.0, None);
        assert_eq!(fake.asked[1][0], 8);
    }

    #[test]
    fn only_the_second_half_counts_and_the_spread_is_the_standard_error() {
        // Positions 4, 5, 6 of each window: nll 4, 5, 6; mean 5, variance 2/3, 12 predictions.
        let (_, p) = measure(|i| -(i as f64), None);
        assert!((p.mean_nll - 5.0).abs() < 1e-12);
        assert!((p.uncertainty - 5f64.exp() * (2.0f64 / 3.0 / 11.0).sqrt()).abs() < 1e-9);
    }

    #[test]
    fn bad_input_is_told() {
        let mut fake = Fake { asked: vec![], say: |_| f64::NAN };
        let short = perplexity(&mut fake, &[1, 2, 3], None, 8, &mut |_, _, _| {}).unwrap_err().to_string();
        assert!(short.contains("3 tokens, fewer than one window of 8"), "{short}");
        assert!(perplexity(&mut fake, &[1; 9], None, 3, &mut |_, _, _| {}).is_err());
        assert!(matches!(perplexity(&mut fake, &[1; 9], None, 8, &mut |_, _, _| {}), Err(Error::Numeric(_))));
    }
}
