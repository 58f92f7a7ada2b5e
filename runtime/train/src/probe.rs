//! Whether a model forgets: its perplexity on general text before and after training.
//!
//! A model that learns one field may lose others (catastrophic forgetting). The probe is a short text about nothing in
//! particular, English and Chinese, written for this purpose, so no model has learned it by heart; or a text of the
//! user's own. Only the change counts, not the value.

use serde::{Deserialize, Serialize};

use crate::data::{Encoder, Example};
use crate::objective::Policy;
use crate::{Error, Result};

const GENERAL: [&str; 2] = [include_str!("probe/general_en.txt"), include_str!("probe/general_zh.txt")];

/// Perplexities on general text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Forgetting {
    /// Of the model as it was.
    pub before: f64,
    /// Of the trained one.
    pub after: f64,
}

impl Forgetting {
    /// How much worse the model has become: 0.05 is five per cent, negative is better.
    pub fn change(&self) -> f64 {
        self.after / self.before - 1.0
    }
}

/// The general text as the model reads it.
#[derive(Debug)]
pub(crate) struct Probe {
    rows: Vec<Example>,
}

impl Probe {
    /// `text`, or the built-in one, in rows of the encoder's length.
    pub fn new(encoder: &Encoder<'_>, text: Option<&str>) -> Result<Probe> {
        let rows: Vec<Example> = match text {
            Some(text) => encoder.text(text),
            None => GENERAL.iter().flat_map(|text| encoder.text(text)).collect(),
        };
        if rows.iter().all(|row| row.trained_tokens() == 0) {
            return Err(Error::argument("the text of the forgetting probe is empty; give it some paragraphs"));
        }
        Ok(Probe { rows })
    }

    /// Tokens of the longest row: what a run must hold.
    pub fn longest(&self) -> usize {
        self.rows.iter().map(|row| row.tokens.len()).max().unwrap_or(0)
    }

    /// The perplexity of the policy.
    pub fn perplexity(&self, policy: &mut Policy<'_>) -> Result<f64> {
        let (mut sum, mut tokens) = (0.0, 0);
        for row in &self.rows {
            sum -= policy.scores(&[row], false)?.iter().sum::<f64>();
            tokens += row.trained_tokens();
        }
        Ok((sum / tokens.max(1) as f64).exp())
    }
}
