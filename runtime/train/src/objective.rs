//! What a step minimises, on the tape: batches of examples to a loss and to gradients.
//!
//! Cross-entropy is one run per batch. Losses on preferences need the model's scores of the answers before they know how
//! much each answer weighs, so they score first (policy, and reference where there is one) and then run for the gradient
//! with these weights. The reference is the model as it was before training; its scores of an example never change and
//! are kept.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;

use kinglet_engine::session::LearnBatch;
use sha2::{Digest, Sha256};

use crate::batch::collate;
use crate::data::{Dataset, Example, Examples, PairExample, RatedExample};
use crate::parameters::Parameters;
use crate::preference::{Loss, PairScores, RatedScores, kto, kto_distance};
use crate::{Error, Result, random};

/// Which of the two sets of a [`Dataset`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Set {
    Train,
    Validation,
}

/// What a step or a validation came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Outcome {
    /// Mean loss: of the trained tokens, or of the pairs or answers.
    pub loss: f64,
    /// Tokens of the examples.
    pub tokens: usize,
    /// Of losses on preferences: the share of pairs (or of answers, for KTO) that are judged right, and the mean margin.
    pub preference: Option<(f64, f64)>,
    /// Where texts on which the model is to stay as it was were among the examples: the divergence per token of them.
    pub keep_kl: Option<f64>,
}

/// Sums on the way to an [`Outcome`].
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    loss: f64,
    /// What the loss is a mean of.
    items: usize,
    tokens: usize,
    right: usize,
    margin: f64,
    /// The divergence in texts that are kept, and their trained tokens.
    kl: f64,
    kept: usize,
}

/// A model and where it stands.
pub(crate) struct Policy<'a> {
    pub parameters: &'a mut Parameters,
    /// The parameters before training; empty where the loss needs no reference.
    pub reference: &'a [f32],
    pub cancel: &'a AtomicBool,
}

/// The data under a loss.
#[derive(Debug)]
pub(crate) struct Objective {
    loss: Loss,
    /// Weight of the divergence in examples on which the model is to stay as it was.
    keep_weight: f64,
    train: Examples,
    validation: Examples,
    /// The reference's scores by set and number: of a pair's two answers, or of an answer.
    reference: HashMap<(Set, usize), [f64; 2]>,
}

impl Objective {
    /// # Errors
    /// Texts to stay the same on that were not predicted, or under a loss on preferences.
    pub fn new(loss: Loss, keep_weight: f64, data: Dataset) -> Result<Objective> {
        let Dataset { mut train, validation, keep, .. } = data;
        if keep.iter().any(|example| example.prediction.is_none()) {
            return Err(Error::argument(
                "texts on which the model is to stay as it is need its predictions; Dataset::predict makes them",
            ));
        }
        match &mut train {
            Examples::Plain(train) => train.extend(keep),
            _ if keep.is_empty() => {}
            _ => {
                return Err(Error::Unsupported(
                    "texts on which the model is to stay as it is beside a loss on preferences, which has a reference of \
                     its own; leave them out"
                        .into(),
                ));
            }
        }
        Ok(Objective { loss, keep_weight, train, validation, reference: HashMap::new() })
    }

    fn set(&self, set: Set) -> &Examples {
        match set {
            Set::Train => &self.train,
            Set::Validation => &self.validation,
        }
    }

    /// The length of each example, in tokens: what a batch is filled by.
    pub fn lengths(&self, set: Set) -> Vec<usize> {
        match self.set(set) {
            Examples::Plain(all) => all.iter().map(|e| e.tokens.len()).collect(),
            Examples::Pairs(all) => all.iter().map(|p| p.chosen.tokens.len() + p.rejected.tokens.len()).collect(),
            Examples::Rated(all) => all.iter().map(|r| r.example.tokens.len()).collect(),
        }
    }

    /// Tokens of the longest sequence; answers under strange prompts are no longer than that.
    pub fn longest(&self) -> usize {
        let of = |set: &Examples| match set {
            Examples::Plain(all) => all.iter().map(|e| e.tokens.len()).max(),
            Examples::Pairs(all) => all.iter().map(|p| p.chosen.tokens.len().max(p.rejected.tokens.len())).max(),
            Examples::Rated(all) => all.iter().map(|r| r.example.tokens.len()).max(),
        };
        of(&self.train).max(of(&self.validation)).unwrap_or(0)
    }

    /// Sequences that an example puts into a row.
    pub fn sequences(&self) -> usize {
        if matches!(self.train, Examples::Pairs(_)) { 2 } else { 1 }
    }

    /// A number that follows from all tokens and marks: whether a checkpoint was written with the same data.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        let mut add = |example: &Example, mark: u8| {
            hash.update([mark]);
            hash.update((example.tokens.len() as u64).to_le_bytes());
            example.tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
            example.trained.iter().for_each(|trained| hash.update([u8::from(*trained)]));
        };
        for (mark, set) in [(0, &self.train), (128, &self.validation)] {
            match set {
                Examples::Plain(all) => all.iter().for_each(|e| add(e, mark)),
                Examples::Pairs(all) => all.iter().for_each(|p| {
                    add(&p.chosen, mark + 1);
                    add(&p.rejected, mark + 2);
                }),
                Examples::Rated(all) => all.iter().for_each(|r| add(&r.example, mark + 3 + u8::from(r.good))),
            }
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Loss of the training examples in `batches`, and its gradients, which are added to those of the step. `seed` decides over
    /// dropout.
    pub fn learn(&mut self, policy: &mut Policy<'_>, batches: &[Vec<usize>], seed: u64) -> Result<Outcome> {
        let items = batches.iter().map(|batch| self.items(Set::Train, batch)).sum();
        let mut sums = Sums::default();
        for (batch, number) in batches.iter().zip(0..) {
            let gradients = Some((items, random::splitmix64(seed, number)));
            self.run(policy, Set::Train, batch, gradients, &mut sums)?;
        }
        Ok(self.outcome(sums))
    }

    /// Loss of the validation examples, at most `tokens` of them in a run.
    pub fn validate(&mut self, policy: &mut Policy<'_>, tokens: usize) -> Result<Outcome> {
        let lengths = self.lengths(Set::Validation);
        let mut sums = Sums::default();
        let (mut batch, mut used) = (Vec::new(), 0);
        for (number, length) in lengths.into_iter().enumerate() {
            if used + length > tokens && !batch.is_empty() {
                self.run(policy, Set::Validation, &batch, None, &mut sums)?;
                batch.clear();
                used = 0;
            }
            batch.push(number);
            used += length;
        }
        self.run(policy, Set::Validation, &batch, None, &mut sums)?;
        Ok(self.outcome(sums))
    }

    /// What the mean of a batch is taken of.
    fn items(&self, set: Set, batch: &[usize]) -> usize {
        match self.set(set) {
            Examples::Plain(all) => batch.iter().map(|i| all[*i].trained_tokens()).sum(),
            _ => batch.len(),
        }
    }

    fn outcome(&self, sums: Sums) -> Outcome {
        let items = sums.items.max(1) as f64;
        let preference = (self.loss != Loss::CrossEntropy).then_some((sums.right as f64 / items, sums.margin / items));
        let keep_kl = (sums.kept > 0).then_some(sums.kl / sums.kept.max(1) as f64);
        Outcome { loss: (sums.loss + self.keep_weight * sums.kl) / items, tokens: sums.tokens, preference, keep_kl }
    }

    /// Adds a batch to `sums` and, where what their mean is taken of is given with a seed, to the gradients.
    fn run(
        &mut self,
        policy: &mut Policy<'_>,
        set: Set,
        batch: &[usize],
        gradients: Option<(usize, u64)>,
        sums: &mut Sums,
    ) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        sums.items += self.items(set, batch);
        let Objective { loss, keep_weight, train, validation, reference } = self;
        let examples = if set == Set::Train { train } else { validation };
        match examples {
            Examples::Plain(all) => {
                let mut run = collate(batch.iter().map(|i| &all[*i]));
                sums.tokens += run.tokens.len();
                let mut weights = run.weights.iter_mut();
                for example in batch.iter().map(|i| &all[*i]) {
                    let weight = if example.prediction.is_some() { *keep_weight as f32 } else { 1.0 };
                    weights.by_ref().take(example.trained_tokens()).for_each(|w| *w = weight);
                }
                let mut scores = policy.run(run, gradients)?.iter().map(|score| f64::from(*score));
                for example in batch.iter().map(|i| &all[*i]) {
                    let sum: f64 = scores.by_ref().take(example.trained_tokens()).sum();
                    match &example.prediction {
                        None => sums.loss += sum,
                        Some(prediction) => {
                            sums.kl += sum - prediction.entropies.iter().map(|e| f64::from(*e)).sum::<f64>();
                            sums.kept += example.trained_tokens();
                        }
                    }
                }
                Ok(())
            }
            Examples::Pairs(all) => pairs(policy, loss, all, (set, batch), reference, gradients, sums),
            Examples::Rated(all) => rated(policy, loss, all, (set, batch), reference, gradients, sums),
        }
    }
}

impl Policy<'_> {
    /// `−ln p` of the run's targets; with `gradients`, also those of the weighted sum, divided by a number.
    fn run(&mut self, mut run: LearnBatch, gradients: Option<(usize, u64)>) -> Result<&[f32]> {
        let Some((items, seed)) = gradients else { return self.parameters.score(&run, self.cancel) };
        let share = 1.0 / items.max(1) as f32;
        run.weights.iter_mut().for_each(|weight| *weight *= share);
        run.dropout_seed = seed;
        self.parameters.learn(&run, self.cancel)
    }

    /// The log-probability of each example's trained tokens, by the model in training or by the reference.
    pub fn scores(&mut self, examples: &[&Example], reference: bool) -> Result<Vec<f64>> {
        let run = collate(examples.iter().copied());
        let scores = match reference {
            true => self.parameters.learner_mut().score(&run, self.reference, self.cancel)?,
            false => self.parameters.score(&run, self.cancel)?,
        };
        let mut tokens = scores.iter();
        let sum =
            |example: &&Example| -tokens.by_ref().take(example.trained_tokens()).map(|s| f64::from(*s)).sum::<f64>();
        Ok(examples.iter().map(sum).collect())
    }

    /// Gradients of `Σ slope · score` over the examples.
    fn descend(&mut self, examples: &[&Example], slopes: &[f64], gradients: (usize, u64)) -> Result<()> {
        let mut run = collate(examples.iter().copied());
        let mut weights = run.weights.iter_mut();
        for (example, slope) in examples.iter().zip(slopes) {
            // The tape's gradients are those of −ln p.
            weights.by_ref().take(example.trained_tokens()).for_each(|weight| *weight = -*slope as f32);
        }
        self.run(run, Some(gradients)).map(|_| ())
    }
}

/// Takes the reference's scores of those of `batch` that have none yet; `answers` gives the examples of numbers, one or two
/// for each.
fn remember<'e>(
    policy: &mut Policy<'_>,
    reference: &mut HashMap<(Set, usize), [f64; 2]>,
    (set, batch): (Set, &[usize]),
    answers: impl Fn(&[usize]) -> Vec<&'e Example>,
) -> Result<()> {
    let new: Vec<usize> = batch.iter().copied().filter(|i| !reference.contains_key(&(set, *i))).collect();
    if new.is_empty() {
        return Ok(());
    }
    let scores = policy.scores(&answers(&new), true)?;
    let of_each = scores.chunks(scores.len() / new.len());
    let pair = |scores: &[f64]| [scores[0], scores.get(1).copied().unwrap_or(0.0)];
    reference.extend(new.into_iter().map(|i| (set, i)).zip(of_each.map(pair)));
    Ok(())
}

fn pairs(
    policy: &mut Policy<'_>,
    loss: &Loss,
    all: &[PairExample],
    (set, batch): (Set, &[usize]),
    reference: &mut HashMap<(Set, usize), [f64; 2]>,
    gradients: Option<(usize, u64)>,
    sums: &mut Sums,
) -> Result<()> {
    let answers = |batch: &[usize]| -> Vec<&Example> {
        batch.iter().flat_map(|i| [&all[*i].chosen, &all[*i].rejected]).collect()
    };
    if loss.needs_reference() {
        remember(policy, reference, (set, batch), answers)?;
    }
    let examples = answers(batch);
    let scores = policy.scores(&examples, false)?;
    let mut slopes = Vec::with_capacity(examples.len());
    for (i, score) in batch.iter().zip(scores.as_chunks::<2>().0) {
        let [reference_chosen, reference_rejected] = reference.get(&(set, *i)).copied().unwrap_or_default();
        let scores = PairScores {
            policy_chosen: score[0],
            policy_rejected: score[1],
            reference_chosen,
            reference_rejected,
            tokens_chosen: all[*i].chosen.trained_tokens(),
            tokens_rejected: all[*i].rejected.trained_tokens(),
        };
        let Some(pair) = loss.pair(&scores) else { continue };
        sums.loss += pair.loss;
        sums.right += usize::from(pair.correct());
        sums.margin += pair.reward_chosen - pair.reward_rejected;
        slopes.extend([pair.d_chosen, pair.d_rejected]);
    }
    sums.tokens += examples.iter().map(|e| e.tokens.len()).sum::<usize>();
    gradients.map_or(Ok(()), |gradients| policy.descend(&examples, &slopes, gradients))
}

fn rated(
    policy: &mut Policy<'_>,
    loss: &Loss,
    all: &[RatedExample],
    (set, batch): (Set, &[usize]),
    reference: &mut HashMap<(Set, usize), [f64; 2]>,
    gradients: Option<(usize, u64)>,
    sums: &mut Sums,
) -> Result<()> {
    let Loss::Kto { beta, good, bad } = *loss else { return Ok(()) };
    let answers = |batch: &[usize]| -> Vec<&Example> { batch.iter().map(|i| &all[*i].example).collect() };
    remember(policy, reference, (set, batch), answers)?;

    // Each prompt with the answer of the one before it.
    let mut distance = 0.0;
    if batch.len() > 1 {
        let before = batch.iter().cycle().skip(batch.len() - 1);
        let limit = batch.iter().map(|i| all[*i].example.tokens.len()).max().unwrap_or(0);
        let strange: Vec<Example> =
            batch.iter().zip(before).map(|(i, before)| mismatched(&all[*i], &all[*before], limit)).collect();
        let strange: Vec<&Example> = strange.iter().collect();
        let by_policy = policy.scores(&strange, false)?;
        let by_reference = policy.scores(&strange, true)?;
        distance = kto_distance(&by_policy.into_iter().zip(by_reference).collect::<Vec<_>>());
    }
    let examples = answers(batch);
    let scores = policy.scores(&examples, false)?;
    let mut slopes = Vec::with_capacity(examples.len());
    for (i, score) in batch.iter().zip(scores) {
        let rated = &all[*i];
        let reference = reference.get(&(set, *i)).map_or(0.0, |scores| scores[0]);
        let scores = RatedScores { policy: score, reference, good: rated.good };
        let result = kto(&scores, distance, beta, if rated.good { good } else { bad });
        let towards = if rated.good { result.reward } else { -result.reward };
        sums.loss += result.loss;
        sums.right += usize::from(towards > 0.0);
        sums.margin += towards;
        slopes.push(result.d_policy);
    }
    sums.tokens += examples.iter().map(|e| e.tokens.len()).sum::<usize>();
    gradients.map_or(Ok(()), |gradients| policy.descend(&examples, &slopes, gradients))
}

/// The prompt of one example with the answer of another, cut at `limit` tokens.
fn mismatched(prompt: &RatedExample, answer: &RatedExample, limit: usize) -> Example {
    let front = prompt.prompt.min(prompt.example.tokens.len()).min(limit.saturating_sub(1));
    let back = answer.prompt.min(answer.example.tokens.len());
    let mut tokens = prompt.example.tokens[..front].to_vec();
    let mut trained = vec![false; front];
    tokens.extend_from_slice(&answer.example.tokens[back..]);
    trained.extend_from_slice(&answer.example.trained[back..]);
    tokens.truncate(limit);
    trained.truncate(limit);
    Example::new(tokens, trained)
}
