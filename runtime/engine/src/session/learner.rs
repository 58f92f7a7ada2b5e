//! Gradients of low-rank adapters, or of all weights: what a trainer calls, step by step.
//!
//! A learner holds the learning tape of one model and computes with parameters that the caller owns: a flat vector of
//! f32 in which [`Learner::params`] places the matrices. It knows no optimizer, no data and no schedule.

use std::sync::atomic::AtomicBool;

use super::{Estimate, Model};
use crate::cpu::{Batch, Executor, ExecutorOptions, Learning, Segment, Timing};
use crate::tape::{LoraSpec, Param, PlanLimits, Purpose, Trained, adapted_norm};
use crate::{Error, Result, quant};

/// How a learner is set up.
#[derive(Clone, Debug)]
pub struct LearnerOptions {
    /// What is trained.
    pub trained: Trained,
    /// Most tokens per run.
    pub tokens: usize,
    /// Compute with f32 activations instead of 8-bit ones: slower, and what the mathematics says.
    pub exact: bool,
    /// Threads; 0 for one per core.
    pub threads: usize,
    /// Bytes the whole may take, the mapped file included: as many layers are kept from computing twice as fit.
    /// `None` computes every layer but the last twice.
    pub memory_budget: Option<u64>,
}

/// Sequences of one run.
#[derive(Clone, Debug, Default)]
pub struct LearnBatch {
    /// Token ids, sequence after sequence.
    pub tokens: Vec<u32>,
    /// Length of each sequence.
    pub lengths: Vec<usize>,
    /// Rows at which a token is predicted, increasing.
    pub outputs: Vec<u32>,
    /// The token to be predicted at each of them.
    pub targets: Vec<u32>,
    /// Factor on the gradient of each of their cross-entropies.
    pub weights: Vec<f32>,
    /// Decides which of the adapters' inputs fall where they have dropout: a hash of the training's seed and of the number
    /// of the run, say. The same seed gives the same gradients.
    pub dropout_seed: u64,
}

/// See the module's text.
#[derive(Debug)]
pub struct Learner {
    model: Model,
    trained: Trained,
    executor: Executor,
    estimate: Estimate,
}

impl Learner {
    /// Plans the tape, checks the budget, allocates.
    ///
    /// # Errors
    /// No or unknown weights to adapt, parameters out of range, [`Error::Memory`] with figures when over budget.
    pub fn new(model: &Model, options: &LearnerOptions) -> Result<Learner> {
        let mut executor_options = check(model, options)?;
        let estimate = plan(model, options, &mut executor_options);
        estimate.check(options.memory_budget)?;
        let executor = Executor::new(model.spec(), model.weights().clone(), &executor_options)?;
        Ok(Learner { model: model.clone(), trained: options.trained.clone(), executor, estimate })
    }

    /// What [`Learner::new`] comes to need, the parameters and their gradients included.
    pub fn estimate(&self) -> Estimate {
        self.estimate
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What is trained.
    pub fn trained(&self) -> &Trained {
        &self.trained
    }

    /// The trained matrices and their places in the flat vector.
    pub fn params(&self) -> &[Param] {
        &self.executor.tape().params
    }

    /// Length of the flat vector.
    pub fn param_count(&self) -> usize {
        self.executor.tape().param_count()
    }

    /// Parameters to start from, with which the model is as it was: all weights, where those are trained; else zeros, and the
    /// lengths of the weights' rows for the magnitudes of DoRA. `.lora_a` is the caller's to draw: with zeros in both
    /// halves of an adapter neither would ever move.
    ///
    /// # Errors
    /// None that a resolved model has.
    pub fn initial(&self) -> Result<Vec<f32>> {
        let mut values = vec![0.0; self.param_count()];
        let weights = self.model.weights();
        for p in self.params() {
            let (name, norms) = match p.name.strip_suffix(".lora_magnitude") {
                Some(name) => (name, true),
                None => (p.name.as_str(), false),
            };
            let Some((id, info)) = weights.iter().find(|(_, w)| w.name == name) else { continue };
            let values = &mut values[p.offset..p.end()];
            if !norms {
                quant::dequantize(info.dtype, weights.data(id), values)?;
                continue;
            }
            let mut row = vec![0.0; info.width];
            for (i, norm) in values.iter_mut().enumerate() {
                quant::dequantize(info.dtype, weights.rows(id, i..i + 1), &mut row)?;
                *norm = adapted_norm(&mut row, 0.0, &[], &[]);
            }
        }
        Ok(values)
    }

    /// `−ln p` of each target with the adapters in `params`, in nats.
    ///
    /// # Errors
    /// Sizes that do not fit, token ids outside the vocabulary, [`Error::Cancelled`].
    pub fn score(&mut self, batch: &LearnBatch, params: &[f32], cancel: &AtomicBool) -> Result<&[f32]> {
        self.run(Purpose::Score, batch, params, &mut [], cancel)
    }

    /// As [`Learner::score`], and adds to `gradients` those of `Σ weight · −ln p`.
    ///
    /// # Errors
    /// As [`Learner::score`]; the gradients are unusable then.
    pub fn learn(
        &mut self,
        batch: &LearnBatch,
        params: &[f32],
        gradients: &mut [f32],
        cancel: &AtomicBool,
    ) -> Result<&[f32]> {
        self.run(Purpose::Learn, batch, params, gradients, cancel)
    }

    fn run(
        &mut self,
        purpose: Purpose,
        batch: &LearnBatch,
        params: &[f32],
        gradients: &mut [f32],
        cancel: &AtomicBool,
    ) -> Result<&[f32]> {
        let segments = batch.lengths.iter().map(|rows| Segment { cache: None, rows: *rows }).collect();
        let batch = Batch {
            tokens: &batch.tokens,
            segments,
            outputs: &batch.outputs,
            targets: &batch.targets,
            learning: Some(Learning {
                params,
                gradients,
                row_weights: &batch.weights,
                dropout_seed: batch.dropout_seed,
            }),
        };
        self.executor.run(purpose, batch, cancel)
    }

    /// Time spent by kind of op since the last call; empty unless [`Learner::set_timing`] turned it on.
    pub fn take_timings(&mut self) -> Vec<Timing> {
        self.executor.take_timings()
    }

    /// Turns the op timing table on or off.
    pub fn set_timing(&mut self, on: bool) {
        self.executor.set_timing(on);
    }
}

fn check(model: &Model, options: &LearnerOptions) -> Result<ExecutorOptions> {
    if let Trained::Adapters(lora) = &options.trained {
        check_adapters(model, lora)?;
    }
    if !(1..=1 << 20).contains(&options.tokens) {
        return Err(Error::argument(format!(
            "tokens per run must be between 1 and {}, not {}",
            1 << 20,
            options.tokens
        )));
    }
    let threads = match options.threads {
        0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
        n => n,
    };
    Ok(ExecutorOptions {
        threads,
        limits: PlanLimits { tokens: options.tokens, outputs: options.tokens },
        trained: Some(options.trained.clone()),
        kept_layers: 1,
        exact: options.exact,
    })
}

fn check_adapters(model: &Model, lora: &LoraSpec) -> Result<()> {
    if lora.weights.is_empty() {
        return Err(Error::argument("no weights to adapt were named"));
    }
    if let Some(unknown) = lora.weights.iter().find(|name| !model.weights().iter().any(|(_, w)| w.name == **name)) {
        return Err(Error::argument(format!("there is no weight {unknown:?} to adapt; `inspect` lists them")));
    }
    let table = &model.weights().get(model.weights().id(&model.spec().embedding)).name;
    if lora.dora && lora.weights.contains(table) {
        return Err(Error::Unsupported(format!(
            "learned lengths (DoRA) of the embedding {table}; leave it out, or train without them"
        )));
    }
    let vector = |name: &&String| model.weights().iter().any(|(_, w)| w.name == **name && !w.vector().is_empty());
    if let Some(vector) = lora.weights.iter().find(vector) {
        return Err(Error::argument(format!("{vector} is no matrix: adapters are for matrices")));
    }
    if !(1..=1024).contains(&lora.rank) || !lora.scale.is_finite() {
        return Err(Error::argument(format!("a rank between 1 and 1024 and a finite scale are needed, not {lora:?}")));
    }
    if !(0.0..1.0).contains(&lora.dropout) {
        return Err(Error::argument(format!("a dropout from 0 to below 1 is needed, not {}", lora.dropout)));
    }
    Ok(())
}

/// Keeps as many layers as the budget allows, and says what that takes.
fn plan(model: &Model, options: &LearnerOptions, executor_options: &mut ExecutorOptions) -> Estimate {
    let estimate = |options: &ExecutorOptions| {
        let needs = Executor::needs(model.spec(), model.weights(), options);
        Estimate {
            // Trained weights are read once, and then among the parameters.
            weights: if options.trained == Some(Trained::All) { 0 } else { model.gguf().file_bytes() },
            kv_cache: 0,
            arena: needs.arena as u64,
            adapters: needs.params as u64,
            scratch: needs.scratch as u64,
        }
    };
    if let Some(budget) = options.memory_budget {
        let (mut low, mut high) = (1, model.spec().layers.len());
        while low < high {
            let middle = (low + high).div_ceil(2);
            let fits =
                estimate(&ExecutorOptions { kept_layers: middle, ..executor_options.clone() }).resident() <= budget;
            match fits {
                true => low = middle,
                false => high = middle - 1,
            }
        }
        executor_options.kept_layers = low;
    }
    estimate(executor_options)
}
