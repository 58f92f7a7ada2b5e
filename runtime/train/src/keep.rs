//! Against forgetting: texts on which the trained model is to stay as it was.
//!
//! A loss on one's own data says nothing about all the rest, and what nothing holds in place drifts. So texts of another
//! kind stand among the data, and on them the loss is the divergence of the trained model from the untrained one,
//!
//!   KL(p‖q) = Σ p(v)·(ln p(v) − ln q(v)),
//!
//! with p what the untrained model predicts and q what the trained one does: knowledge distillation (Hinton, Vinyals and
//! Dean 2015, arXiv:1503.02531) from the model as it was, against its own forgetting (Li and Hoiem 2016, arXiv:1606.09282).
//! A text alone says much less: learned as data it is learned by heart, which is forgetting in another place. Even the divergence
//! only holds near the texts it is measured on, so there should be many, and each pass over the data takes some of them in
//! turn.
//!
//! p is computed once, before training, and kept as few tokens a row: the likeliest ones with their probabilities, and of all
//! others a sample, which stands for them without a bias ([`Shares`]). No texts are at hand? [`write()`] has the model write
//! some: what it says of its own accord is what it should not unlearn.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use kinglet_engine::file;
use kinglet_engine::sampling::SamplerOptions;
use kinglet_engine::session::{
    Batcher, Device, Engine, GenerateOptions, Model, RequestId, Session, SessionOptions, SoftBatch,
};
use kinglet_engine::text::Message;
use serde_json::json;

use crate::data::Example;
use crate::{Error, Result, random};

/// Tokens of a row that are kept with their probabilities.
const LIKELIEST: usize = 40;
/// Draws that stand for the others.
const DRAWS: usize = 16;
/// Texts that are written side by side.
const TOGETHER: usize = 8;
/// Most tokens of a text that the model writes.
const LENGTH: usize = 160;
/// Rows whose logits are computed at once.
const LOGIT_ROWS: usize = 64;

/// What the model as it was predicts in an example.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prediction {
    /// For each trained token the distribution in its place.
    pub(crate) targets: SoftBatch,
    /// For each trained token the cross-entropy of the distribution with the model it comes from: what to take off, so that
    /// a divergence of 0 is none.
    pub(crate) entropies: Vec<f32>,
}

impl Prediction {
    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> u64 {
        let SoftBatch { starts, tokens, shares } = &self.targets;
        4 * (starts.len() + tokens.len() + shares.len() + self.entropies.len()) as u64
    }
}

/// Where the model that predicts or writes runs.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Threads; 0 for one per core.
    pub threads: usize,
    /// The device.
    pub device: Device,
    /// Read the weights on a GPU from the pages of the mapped file, as [`SessionOptions::gpu_import`] says.
    pub gpu_import: bool,
}

/// Gives each of `examples` what `model` predicts in it; `progress` is told the tokens done.
///
/// # Errors
/// [`Error::Cancelled`]; as [`Session::new`].
pub fn predict(
    model: &Model,
    examples: &mut [Example],
    options: &Options,
    cancel: &AtomicBool,
    mut progress: impl FnMut(usize),
) -> Result<()> {
    let Some(longest) = examples.iter().map(|example| example.tokens.len()).max() else { return Ok(()) };
    let mut session = Session::new(
        model,
        &SessionOptions {
            context: longest,
            threads: options.threads,
            device: options.device.clone(),
            gpu_import: options.gpu_import,
            logit_rows: LOGIT_ROWS,
            ..SessionOptions::default()
        },
    )?;
    let (mut shares, mut done) = (Shares::default(), 0);
    for (number, example) in examples.iter_mut().enumerate() {
        if cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        session.reset();
        let (mut prediction, seed) = (Prediction::default(), random::stream("keep", number as u64));
        let trained = &example.trained;
        session.logits(&example.tokens, |row, logits| {
            if trained.get(row + 1).is_some_and(|trained| *trained) {
                let entropy = shares.take(logits, random::uniform(seed, row as u64));
                prediction.targets.push(&shares.tokens, &shares.shares);
                prediction.entropies.push(entropy);
            }
        })?;
        example.prediction = Some(Box::new(prediction));
        done += example.tokens.len();
        progress(done);
    }
    Ok(())
}

/// A distribution over the vocabulary as few tokens: the likeliest as they are, and for the rest [`DRAWS`] draws at even
/// steps of its cumulative sum, each with an equal part of what they hold together. Any mean over the vocabulary is that over
/// the shares in expectation.
#[derive(Debug, Default)]
struct Shares {
    tokens: Vec<u32>,
    shares: Vec<f32>,
    order: Vec<(f32, u32)>,
    /// e^(z − the largest) of each token.
    weights: Vec<f32>,
}

impl Shares {
    /// Takes the distribution of these logits, with `chance` in 0..1 to draw by; gives `−Σ share·ln p`.
    fn take(&mut self, logits: &[f32], chance: f64) -> f32 {
        let Shares { tokens, shares, order, weights } = self;
        tokens.clear();
        shares.clear();
        order.clear();
        weights.clear();
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        weights.extend(logits.iter().map(|z| (z - top).exp()));
        let sum: f64 = weights.chunks(256).map(|part| f64::from(part.iter().sum::<f32>())).sum();
        let log_sum = f64::from(top) + sum.ln();
        order.extend(logits.iter().copied().zip(0u32..));
        let likeliest = LIKELIEST.min(order.len());
        if likeliest < order.len() {
            order.select_nth_unstable_by(likeliest, |a, b| b.0.total_cmp(&a.0));
        }
        order.truncate(likeliest);
        // In the vocabulary's order, which does not depend on how the selection went.
        order.sort_unstable_by_key(|(_, token)| *token);
        let (mut entropy, mut rest) = (0.0, 1.0);
        let mut add = |token: u32, share: f64| {
            tokens.push(token);
            shares.push(share as f32);
            entropy -= share * (f64::from(logits[token as usize]) - log_sum);
        };
        for (_, token) in order.iter() {
            // Taken, the others are drawn from.
            let weight = std::mem::take(&mut weights[*token as usize]);
            add(*token, f64::from(weight) / sum);
            rest -= f64::from(weight) / sum;
        }
        let step = rest.max(0.0) / DRAWS as f64;
        let (mut passed, mut next, mut drawn) = (0.0, chance * step, 0);
        for (weight, token) in weights.iter().zip(0u32..).take_while(|_| step > 0.0) {
            passed += f64::from(*weight) / sum;
            let before = drawn;
            while next < passed && drawn < DRAWS {
                next += step;
                drawn += 1;
            }
            if drawn > before {
                add(token, step * (drawn - before) as f64);
            }
        }
        // Rounding may have left a draw out.
        let sum: f32 = shares.iter().sum();
        shares.iter_mut().for_each(|share| *share /= sum);
        entropy as f32
    }
}

/// The file of texts that the model writes itself for a training into `output`: made where it is missing.
///
/// # Errors
/// As [`write()`].
pub fn own_texts(
    model: &Model,
    output: &Path,
    count: usize,
    seed: u64,
    options: &Options,
    cancel: &AtomicBool,
    progress: impl FnMut(usize),
) -> Result<PathBuf> {
    std::fs::create_dir_all(output).map_err(Error::io(output))?;
    let path = output.join("keep.jsonl");
    if !path.is_file() {
        write(model, &path, count, seed, options, cancel, progress)?;
    }
    Ok(path)
}

/// Has `model` write `count` texts, raw ones and answers to questions, into a `.jsonl` file; `progress` is told the texts
/// done. The same seed gives the same texts.
///
/// # Errors
/// [`Error::Cancelled`], [`Error::Io`]; as [`Engine::new`].
pub fn write(
    model: &Model,
    path: &Path,
    count: usize,
    seed: u64,
    options: &Options,
    cancel: &AtomicBool,
    mut progress: impl FnMut(usize),
) -> Result<()> {
    let openings: Vec<&str> = include_str!("keep/openings.txt").lines().collect();
    let questions: Vec<&str> = include_str!("keep/questions.txt").lines().collect();
    let template = model.chat_template()?;
    let engine = Engine::new(
        model,
        &SessionOptions {
            threads: options.threads,
            device: options.device.clone(),
            gpu_import: options.gpu_import,
            logit_rows: TOGETHER,
            ..SessionOptions::default()
        },
    )?;
    let mut batcher = Batcher::new(engine);
    let mut texts: Vec<(RequestId, &str, bool, String)> = Vec::with_capacity(count);
    let (mut openings, mut questions) = (openings.iter().cycle(), questions.iter().cycle());
    for number in 0..count {
        // One in three is an answer.
        let asked = number % 3 == 2 && template.is_some();
        let Some(opening) = (if asked { questions.next() } else { openings.next() }) else { break };
        let prompt = match template.filter(|_| asked) {
            Some(template) => template.render(&[Message::new("user", *opening)], None, true)?,
            None => (*opening).to_string(),
        };
        let sampler = SamplerOptions {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: Some(random::splitmix64(random::stream("keep.texts", seed), number as u64)),
            ..SamplerOptions::default()
        };
        let request = GenerateOptions { sampler, max_tokens: LENGTH, ..GenerateOptions::default() };
        let id = batcher.submit(&model.tokenizer().encode_prompt(&prompt), request)?;
        texts.push((id, opening, asked, String::new()));
    }
    let mut done = 0;
    while !batcher.is_empty() {
        if cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        batcher.step(|step| {
            if let Ok(at) = texts.binary_search_by_key(&step.request, |text| text.0) {
                texts[at].3.push_str(step.text);
            }
            done += usize::from(step.stats.end.is_some());
        })?;
        progress(done);
    }
    let line = |(_, opening, asked, text): &(RequestId, &str, bool, String)| match asked {
        true => json!({ "prompt": opening, "completion": text }),
        false => json!({ "text": format!("{opening}{text}") }),
    };
    let lines: String =
        texts.iter().filter(|text| !text.3.trim().is_empty()).map(|text| format!("{}\n", line(text))).collect();
    file::replace(path, lines.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Means over the shares are those over the vocabulary, over many draws; the entropy is the divergence's zero.
    #[test]
    fn shares_stand_for_the_whole_distribution() {
        let logits: Vec<f32> = (0..3_000).map(|i| random::uniform(5, i) as f32 * 6.0).collect();
        let sum: f64 = logits.iter().map(|z| f64::from(*z).exp()).sum();
        let value = |token: u32| random::uniform(9, u64::from(token));
        let wanted: f64 = (0..3_000).map(|i| f64::from(logits[i]).exp() / sum * value(i as u32)).sum();
        let (mut shares, mut mean, mut spread) = (Shares::default(), 0.0, 0.0);
        for round in 0..400 {
            let entropy = shares.take(&logits, random::uniform(1, round));
            assert!(shares.tokens.len() <= LIKELIEST + DRAWS && shares.tokens.len() == shares.shares.len());
            assert!((shares.shares.iter().sum::<f32>() - 1.0).abs() < 1e-5);
            let mut sorted = shares.tokens.clone();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), shares.tokens.len());
            let pairs = || shares.tokens.iter().zip(&shares.shares);
            let by_hand: f64 = pairs().map(|(t, s)| f64::from(*s) * (sum.ln() - f64::from(logits[*t as usize]))).sum();
            assert!((by_hand - f64::from(entropy)).abs() < 1e-4);
            let got: f64 = pairs().map(|(token, share)| f64::from(*share) * value(*token)).sum();
            mean += got / 400.0;
            spread += (got - wanted).powi(2) / 400.0;
        }
        assert!((mean - wanted).abs() < 4.0 * (spread / 400.0).sqrt() && spread > 0.0, "{mean} {wanted} {spread}");
    }

    #[test]
    fn short_and_certain_distributions() {
        let mut shares = Shares::default();
        shares.take(&[0.0, 1.0, 2.0], 0.5);
        assert_eq!(shares.tokens, [0, 1, 2]);
        let mut logits = vec![-200.0; 500];
        logits[77] = 50.0;
        let entropy = shares.take(&logits, 0.5);
        let at = shares.tokens.iter().position(|t| *t == 77).unwrap();
        assert!(shares.shares[at] > 0.999_999 && entropy.abs() < 1e-6);
    }
}
