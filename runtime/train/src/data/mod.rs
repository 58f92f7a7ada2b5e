//! From files to masked tokens.
//!
//! | file | what |
//! | --- | --- |
//! | `record` | lines of a file to [`Record`]s: which keys mean what |
//! | `encode` | records to [`Example`]s with the tokens and the mask that serving implies |
//! | `split` | which records are kept for validation |
//!
//! [`load`] does all three. Data sets for adapters are small beside a model, so everything is held in memory: 5 bytes a
//! token.

mod encode;
mod record;
mod split;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use kinglet_engine::session::Model;
use serde::{Deserialize, Serialize};

pub use encode::Encoder;
pub use record::{Record, Sample, parse, read};
pub use split::split;

use crate::config::TrainConfig;
use crate::keep::{self, Prediction};
use crate::preference::Loss;
use crate::{Error, Result};

/// A sequence of tokens, and which of them the model is to learn to predict.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Example {
    /// The tokens as the model sees them, BOS included where the model wants it.
    pub tokens: Vec<u32>,
    /// For each token whether it is predicted from those before it. The first never is, whatever stands here.
    pub trained: Vec<bool>,
    /// What is to be predicted in place of the tokens, where the model is to stay as it was.
    pub prediction: Option<Box<Prediction>>,
}

impl Example {
    /// An example whose tokens are trained where `trained` says so.
    pub fn new(tokens: Vec<u32>, trained: Vec<bool>) -> Example {
        Example { tokens, trained, prediction: None }
    }

    /// An example that is trained as a whole.
    pub fn plain(tokens: Vec<u32>) -> Example {
        Example::new(tokens.clone(), vec![true; tokens.len()])
    }

    /// The number of tokens that are predicted.
    pub fn trained_tokens(&self) -> usize {
        self.trained.iter().skip(1).filter(|trained| **trained).count()
    }
}

/// Two answers to one prompt; only the answers are marked as trained.
#[derive(Clone, Debug, PartialEq)]
pub struct PairExample {
    /// The prompt with the better answer.
    pub chosen: Example,
    /// The prompt with the worse one.
    pub rejected: Example,
}

/// An answer that was judged by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct RatedExample {
    /// The prompt with the answer, which alone is marked as trained.
    pub example: Example,
    /// How many of its tokens are the prompt: KTO's reference point takes prompts and answers apart.
    pub prompt: usize,
    /// Whether the answer is good.
    pub good: bool,
}

/// Encoded data of the kind that the loss needs.
#[derive(Clone, Debug, PartialEq)]
pub enum Examples {
    /// For cross-entropy.
    Plain(Vec<Example>),
    /// For DPO and its relatives, ORPO and SimPO.
    Pairs(Vec<PairExample>),
    /// For KTO.
    Rated(Vec<RatedExample>),
}

impl Examples {
    /// Their number.
    pub fn len(&self) -> usize {
        match self {
            Examples::Plain(all) => all.len(),
            Examples::Pairs(all) => all.len(),
            Examples::Rated(all) => all.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What is done with a conversation that is longer than a row. Plain text is not cut off but goes on in further rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Truncation {
    /// Its end is cut off. The model does not learn to end there: the end of the turn is gone too.
    #[default]
    End,
    /// Its beginning is cut off.
    Start,
    /// It is left out.
    Drop,
}

/// Counts to show before training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Records read.
    pub records: usize,
    /// Examples made of them, for training and validation.
    pub examples: usize,
    /// Examples that were cut.
    pub truncated: usize,
    /// Examples left out: too long, or nothing in them to learn.
    pub dropped: usize,
    /// Tokens of all examples.
    pub tokens: usize,
    /// Tokens of them that are predicted.
    pub trained: usize,
}

/// What [`load`] gives.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// To train on; not empty.
    pub train: Examples,
    /// To validate on; empty where `val_fraction` is 0 or the data are too few.
    pub validation: Examples,
    /// On which the model is to stay as it is; [`Dataset::predict`] comes before training.
    pub keep: Vec<Example>,
    /// What was read, `keep` apart.
    pub summary: Summary,
}

impl Dataset {
    /// Has the model say what it predicts in the texts on which it is to stay as it is; `progress` is told tokens done and
    /// all.
    ///
    /// # Errors
    /// As [`keep::predict`].
    pub fn predict(
        &mut self,
        model: &Model,
        options: &keep::Options,
        cancel: &AtomicBool,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<()> {
        let all = self.keep.iter().map(|example| example.tokens.len()).sum();
        keep::predict(model, &mut self.keep, options, cancel, |done| progress(done, all))
    }
}

/// The files of a training.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a, P> {
    /// To learn from.
    pub data: &'a [P],
    /// To validate on; where there are none, a share of the records of `data`.
    pub validation: &'a [P],
    /// On which the model is to stay as it is.
    pub keep: &'a [P],
}

impl<'a, P> From<&'a [P]> for Files<'a, P> {
    /// Files to learn from, of which a share is validated on.
    fn from(data: &'a [P]) -> Files<'a, P> {
        Files { data, validation: &[], keep: &[] }
    }
}

/// Reads `files` and encodes them for `model`. Where there are none to validate on, `config.val_fraction` of the records is
/// kept for it.
///
/// A single plain text cannot be split by documents; its end is kept for validation then.
///
/// # Errors
/// [`Error::Io`] and [`Error::Format`] that name the file and the line; [`Error::Argument`] where nothing is left to
/// train on.
pub fn load<P: AsRef<Path>>(files: Files<'_, P>, model: &Model, config: &TrainConfig) -> Result<Dataset> {
    let records = |files: &[P]| -> Result<Vec<Record>> {
        let read = files.iter().map(|file| read(file.as_ref())).collect::<Result<Vec<_>>>()?;
        Ok(read.into_iter().flatten().collect())
    };
    let (train, apart) = (records(files.data)?, records(files.validation)?);
    let mut summary = Summary { records: train.len() + apart.len(), ..Summary::default() };
    let encoder = Encoder::new(model, config.seq, config.truncation)?;
    let single = matches!(train.as_slice(), [Record { sample: Sample::Text(_), .. }]);
    let fraction = if files.validation.is_empty() { config.val_fraction } else { 0.0 };
    let (train, mut kept) = split(train, if single { 0.0 } else { fraction });
    kept.extend(apart);
    let mut train = encoder.examples(&train, &config.loss, &mut summary)?;
    let mut validation = encoder.examples(&kept, &config.loss, &mut summary)?;
    if let (true, Examples::Plain(train), Examples::Plain(validation)) = (single, &mut train, &mut validation) {
        let kept = (train.len() as f64 * fraction).round() as usize;
        validation.splice(..0, train.split_off(train.len() - kept.min(train.len().saturating_sub(1))));
    }
    if train.is_empty() {
        return Err(Error::argument(format!(
            "nothing to train on: {} records gave {} examples, {} were left out as too long for {} tokens or without an \
             answer to learn; check the data, raise seq or choose another truncation",
            summary.records, summary.examples, summary.dropped, config.seq
        )));
    }
    let keep = match encoder.examples(&records(files.keep)?, &Loss::CrossEntropy, &mut Summary::default())? {
        Examples::Plain(keep) => keep,
        _ => Vec::new(),
    };
    Ok(Dataset { train, validation, keep, summary })
}

/// The error for a record that does not suit the loss.
fn unsuited(record: &Record, loss: &Loss) -> Error {
    let wanted = match loss {
        Loss::CrossEntropy => "conversations, instructions or text; preferences need a loss such as dpo, orpo or kto",
        Loss::Kto { .. } => "prompt, completion and label, or prompt, chosen and rejected",
        _ => "prompt, chosen and rejected",
    };
    record.error("record", &format!("it does not suit the loss, which needs {wanted}"))
}
