//! Gradients of low-rank adapters, or of all weights: what a trainer calls, step by step.
//!
//! A learner holds the learning tape of one model and computes with parameters that the caller owns: a flat vector of
//! f32 in which [`Learner::params`] places the matrices. It knows no optimizer, no data and no schedule.

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use super::backend::{Backend, Device};
use super::{Estimate, Model};
use crate::cpu::{Arithmetic, Executor, ExecutorOptions};
use crate::tape::{
    Batch, KeepsTraining, Learning, LoraSpec, Param, PlanLimits, Purpose, SoftTargets, Stage, Timing, Trained, Within,
    adapted_norm,
};
use crate::{Error, Result, quant};

/// How a learner is set up.
#[derive(Clone, Debug)]
pub struct LearnerOptions {
    /// What is trained.
    pub trained: Trained,
    /// Most tokens of a batch.
    pub tokens: usize,
    /// Most tokens of a sequence; 0 for as many as a batch has. A batch of several sequences is computed in several runs
    /// where that lets all layers' values be kept.
    pub sequence: usize,
    /// Arithmetic of the linear maps; the default is fast and close enough to take gradients of.
    pub arithmetic: Arithmetic,
    /// Threads; 0 for one per core.
    pub threads: usize,
    /// Where gradients are computed. [`Device::Auto`] falls back to the CPU where the GPU lacks something. Learners and sessions
    /// of one model that ask for a GPU alike share it, and the weights there.
    pub device: Device,
    /// Read the frozen weights on a GPU from the pages of the mapped file, as
    /// [`SessionOptions::gpu_import`](super::SessionOptions::gpu_import) says.
    pub gpu_import: bool,
    /// Bytes the whole may take, the mapped file included: as many layers are kept from computing twice as fit.
    /// `None` allows 512 MB beside the file and the parameters, or what the smallest plan takes.
    pub memory_budget: Option<u64>,
}

/// Bytes of values that are kept without a budget.
const DEFAULT_ARENA: u64 = 512_000_000;
/// Between the seeds of a batch's runs: the odd number nearest 2⁶⁴ divided by the golden ratio.
const SEED_STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// A run should have as many tokens, that unpacking the weights for it does not count.
const FEWEST_TOKENS: usize = 256;

/// Sequences of one batch.
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
    /// Those of them whose target is a distribution, for learning adapters of the layers.
    pub soft: SoftBatch,
    /// Decides which of the adapters' inputs fall where they have dropout: a hash of the training's seed and of the number
    /// of the run, say. The same seed gives the same gradients.
    pub dropout_seed: u64,
}

/// The memory behind [`SoftTargets`], in which its fields are explained.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SoftBatch {
    /// Where the entries of each output row begin, and the end; empty where none has any.
    pub starts: Vec<u32>,
    /// Tokens.
    pub tokens: Vec<u32>,
    /// Their shares.
    pub shares: Vec<f32>,
}

impl SoftBatch {
    /// Adds an output row.
    pub fn push(&mut self, tokens: &[u32], shares: &[f32]) {
        if self.starts.is_empty() {
            self.starts.push(0);
        }
        self.tokens.extend_from_slice(tokens);
        self.shares.extend_from_slice(shares);
        self.starts.push(self.tokens.len() as u32);
    }

    /// Adds all rows of another.
    pub fn append(&mut self, other: &SoftBatch) {
        let rows = other.starts.len().saturating_sub(1);
        let all = other.of(0..rows);
        for row in 0..rows {
            let (tokens, shares) = all.of(row);
            self.push(tokens, shares);
        }
    }

    /// Those of some output rows.
    fn of(&self, outputs: Range<usize>) -> SoftTargets<'_> {
        let starts = match self.starts.is_empty() {
            true => &[],
            // What is missing is found out by the check of the run.
            false => self.starts.get(outputs.start..=outputs.end).unwrap_or(&self.starts),
        };
        SoftTargets { starts, tokens: &self.tokens, shares: &self.shares }
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Learner {
    model: Model,
    trained: Trained,
    backend: Backend,
    estimate: Estimate,
    /// Most tokens of a batch, and of a run.
    tokens: usize,
    run_tokens: usize,
    scores: Vec<f32>,
}

impl Learner {
    /// Plans the tape, checks the budget, allocates.
    ///
    /// # Errors
    /// No or unknown weights to adapt, parameters out of range, [`Error::Memory`] with figures when over budget.
    pub fn new(model: &Model, options: &LearnerOptions) -> Result<Learner> {
        let wanted = check(model, options)?;
        let (backend, estimate, run_tokens) = open(model, options, &wanted)?;
        Ok(Learner {
            model: model.clone(),
            trained: options.trained.clone(),
            backend,
            estimate,
            tokens: options.tokens,
            run_tokens,
            scores: Vec::new(),
        })
    }

    /// How many numbers [`Learner::new`] with the same arguments would train; allocates nothing.
    ///
    /// # Errors
    /// As [`Learner::new`], memory apart.
    pub fn count(model: &Model, options: &LearnerOptions) -> Result<usize> {
        Ok(Executor::needs(model.spec(), model.weights(), &check(model, options)?).param_count)
    }

    /// What [`Learner::new`] comes to need, the parameters and their gradients included.
    pub fn estimate(&self) -> Estimate {
        self.estimate
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What computes, for people: `cpu`, or the GPU's name.
    pub fn device_name(&self) -> String {
        self.backend.name()
    }

    /// The GPU that computes; none on the CPU.
    #[cfg(feature = "gpu")]
    pub fn gpu(&mut self) -> Option<&std::sync::Arc<crate::gpu::Device>> {
        self.backend.gpu().map(|executor| executor.device())
    }

    /// What is trained.
    pub fn trained(&self) -> &Trained {
        &self.trained
    }

    /// The trained matrices and their places in the flat vector.
    pub fn params(&self) -> &[Param] {
        &self.backend.tape().params
    }

    /// Length of the flat vector.
    pub fn param_count(&self) -> usize {
        self.backend.tape().param_count()
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
        self.run(Purpose::Score, batch, Some((params, &mut [])), cancel)
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
        self.run(Purpose::Learn, batch, Some((params, gradients)), cancel)
    }

    /// Runs with parameters and gradients of the caller's, or with those that the device holds.
    fn run(
        &mut self,
        purpose: Purpose,
        batch: &LearnBatch,
        given: Option<(&[f32], &mut [f32])>,
        cancel: &AtomicBool,
    ) -> Result<&[f32]> {
        let held = given.is_none();
        let (params, gradients) = given.unwrap_or_default();
        let rows = batch.tokens.len();
        if rows > self.tokens || batch.lengths.iter().sum::<usize>() != rows {
            return Err(Error::argument(format!(
                "a batch takes at most {} tokens, in sequences of {rows} together, not {}",
                self.tokens,
                batch.lengths.iter().sum::<usize>()
            )));
        }
        if let Some(long) = batch.lengths.iter().find(|l| **l > self.run_tokens) {
            return Err(Error::argument(format!(
                "a sequence has {long} tokens, runs were planned for {}: name the longest when setting up",
                self.run_tokens
            )));
        }
        if purpose == Purpose::Learn && batch.weights.len() < batch.outputs.len() {
            return Err(Error::argument(format!(
                "{} predicted tokens have {} weights",
                batch.outputs.len(),
                batch.weights.len()
            )));
        }
        self.scores.clear();
        let (mut sequence, mut row, mut output) = (0, 0, 0);
        // At least one run, which has complaints about what is empty.
        while sequence < batch.lengths.len() || row == 0 {
            let (first_sequence, first_row, first_output) = (sequence, row, output);
            while batch.lengths.get(sequence).is_some_and(|l| row - first_row + l <= self.run_tokens) {
                row += batch.lengths[sequence];
                sequence += 1;
            }
            output += batch.outputs[output..].iter().take_while(|o| (**o as usize) < row).count();
            // The last run has what lies outside all, and complaints about it.
            let outputs =
                if sequence == batch.lengths.len() { first_output..batch.outputs.len() } else { first_output..output };
            let targets = outputs.start.min(batch.targets.len())..match sequence == batch.lengths.len() {
                true => batch.targets.len(),
                false => output.min(batch.targets.len()),
            };
            let shifted: Vec<u32> =
                batch.outputs[outputs.clone()].iter().map(|o| o.wrapping_sub(first_row as u32)).collect();
            let run = Batch {
                tokens: &batch.tokens[first_row..row],
                input: &[],
                segments: &mut &batch.lengths[first_sequence..sequence],
                outputs: &shifted,
                largest: 0,
                targets: &batch.targets[targets],
                alone: false,
                learning: Some(Learning {
                    params,
                    gradients,
                    held,
                    within: Within { begun: first_sequence > 0, goes_on: sequence < batch.lengths.len() },
                    row_weights: batch.weights.get(outputs.clone()).unwrap_or_default(),
                    soft_targets: batch.soft.of(outputs),
                    dropout_seed: batch.dropout_seed.wrapping_add((first_sequence as u64).wrapping_mul(SEED_STEP)),
                }),
            };
            self.scores.extend_from_slice(self.backend.run(purpose, run, cancel)?);
            if row == 0 {
                break;
            }
        }
        Ok(&self.scores)
    }

    /// What keeps parameters, gradients and moments of a training on the learner's device and takes its steps there, if the
    /// device does: a GPU. Runs with what it holds are [`Learner::score_held`] and [`Learner::learn_held`].
    pub fn keeper(&mut self) -> Option<&mut dyn KeepsTraining> {
        self.backend.keeper()
    }

    /// As [`Learner::score`], with the parameters that the device holds.
    ///
    /// # Errors
    /// As [`Learner::score`]; a device that holds none.
    pub fn score_held(&mut self, batch: &LearnBatch, cancel: &AtomicBool) -> Result<&[f32]> {
        self.run(Purpose::Score, batch, None, cancel)
    }

    /// As [`Learner::learn`], with the parameters and the gradients that the device holds.
    ///
    /// # Errors
    /// As [`Learner::score_held`]; the gradients are unusable then.
    pub fn learn_held(&mut self, batch: &LearnBatch, cancel: &AtomicBool) -> Result<&[f32]> {
        self.run(Purpose::Learn, batch, None, cancel)
    }

    /// Gives back the memory that a GPU has for this learner, the weights and a training's state included, until the next run,
    /// which goes on with the same numbers. Gradients of an unfinished step are lost. Gives its bytes: 0 on the CPU.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`].
    pub fn park(&mut self) -> Result<u64> {
        self.backend.park()
    }

    /// Time spent by kind of op since the last call; empty unless [`Learner::set_timing`] turned it on.
    pub fn take_timings(&mut self) -> Vec<Timing> {
        self.backend.take_timings()
    }

    /// Turns the op timing table on or off.
    pub fn set_timing(&mut self, on: bool) {
        self.backend.set_timing(on);
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
        0 => crate::system::cores(),
        n => n,
    };
    Ok(ExecutorOptions {
        threads,
        limits: PlanLimits { tokens: options.tokens, outputs: options.tokens },
        stage: Stage::Whole,
        trained: Some(options.trained.clone()),
        kept_layers: 1,
        arithmetic: match options.trained {
            Trained::Adapters(_) => options.arithmetic,
            // Trained weights are f32.
            Trained::All => Arithmetic::Exact,
        },
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

/// The executor, what it takes, and the tokens of a run.
fn open(model: &Model, options: &LearnerOptions, wanted: &ExecutorOptions) -> Result<(Backend, Estimate, usize)> {
    #[cfg(feature = "gpu")]
    match open_gpu(model, options, wanted) {
        Ok(Some(opened)) => return Ok(opened),
        Ok(None) => {}
        Err(e) if options.device.is_auto() => log::warn!("the CPU trains the model: {e}"),
        Err(e) => return Err(e),
    }
    #[cfg(not(feature = "gpu"))]
    options.device.check(None)?;
    let needs = |options: &ExecutorOptions| {
        let needs = Executor::needs(model.spec(), model.weights(), options);
        // Parameters, each with its gradient.
        (needs.arena as u64, needs.scratch as u64, 8 * needs.param_count as u64)
    };
    // Trained weights are read once, and then among the parameters.
    let weights = if options.trained == Trained::All { 0 } else { model.gguf().file_bytes() };
    let frozen = Estimate { weights, ..Estimate::default() };
    let (planned, estimate) = plan(model, options, wanted, (frozen, None), needs);
    estimate.check(options.memory_budget)?;
    let executor = Executor::new(model.spec(), model.weights().clone(), &planned)?;
    Ok((Backend::Cpu(Box::new(executor)), estimate, planned.limits.tokens))
}

#[cfg(feature = "gpu")]
fn open_gpu(
    model: &Model,
    options: &LearnerOptions,
    wanted: &ExecutorOptions,
) -> Result<Option<(Backend, Estimate, usize)>> {
    use crate::{gpu, quant::DType};
    let Some(device) = model.gpu(&options.device, options.gpu_import)? else { return Ok(None) };
    let gpu_options = |options: &ExecutorOptions| gpu::ExecutorOptions {
        limits: options.limits,
        // Nothing is cached.
        window: 0,
        kv_type: DType::F16,
        stage: Stage::Whole,
        trained: options.trained.clone(),
        exact: options.arithmetic == Arithmetic::Exact,
        kept_layers: options.kept_layers,
    };
    let needs = |options: &ExecutorOptions| {
        let needs = gpu::Executor::needs(&device, model.spec(), model.weights(), &gpu_options(options));
        (needs.arena, 0, needs.trained)
    };
    let weights = gpu::Executor::weight_bytes(&device, model.spec(), model.weights(), &gpu_options(wanted))?;
    let frozen = Estimate { weights: weights.all, imported: weights.imported, on_gpu: true, ..Estimate::default() };
    // All values of a run lie in one buffer.
    let most = Some(device.info().binding_bytes);
    let (planned, estimate) = plan(model, options, wanted, (frozen, most), needs);
    estimate.check(options.memory_budget)?;
    let executor = gpu::Executor::new(&device, model.spec(), model.weights().clone(), &gpu_options(&planned))?;
    Ok(Some((Backend::Gpu(Box::new(executor)), estimate, planned.limits.tokens)))
}

/// Chooses the tokens of a run and the layers to keep so that least is computed twice, and says what that takes beside what is
/// `frozen`. Values take at most `most` bytes, where a plan so small exists; `needs` are bytes of values, of scratch and of what
/// is trained.
///
/// The tokens of a run decide in which order gradients are added up, so they do not depend on the number of threads.
fn plan(
    model: &Model,
    options: &LearnerOptions,
    executor_options: &ExecutorOptions,
    (frozen, most): (Estimate, Option<u64>),
    needs: impl Fn(&ExecutorOptions) -> (u64, u64, u64),
) -> (ExecutorOptions, Estimate) {
    let estimate = |options: &ExecutorOptions| {
        let (arena, scratch, adapters) = needs(options);
        Estimate { arena, adapters, scratch, ..frozen }
    };
    let fits = |e: &Estimate, scratch: u64| match options.memory_budget {
        Some(budget) => e.resident() - e.scratch + scratch <= budget && most.is_none_or(|most| e.arena <= most),
        None => e.arena <= most.unwrap_or(DEFAULT_ARENA),
    };
    let of = |tokens: usize, kept_layers: usize| ExecutorOptions {
        limits: PlanLimits { tokens, outputs: tokens },
        kept_layers,
        ..executor_options.clone()
    };
    let layers = model.spec().layers.len();
    let sequence = if options.sequence == 0 { options.tokens } else { options.sequence };
    let fewest = sequence.max(FEWEST_TOKENS).min(options.tokens);
    let mut tokens = options.tokens;
    while tokens > fewest && !fits(&estimate(&of(tokens, layers)), 0) {
        tokens = (tokens / 2).max(fewest);
    }
    let (mut low, mut high) = (1, layers.max(1));
    while low < high {
        let middle = (low + high).div_ceil(2);
        let e = estimate(&of(tokens, middle));
        match fits(&e, e.scratch) {
            true => low = middle,
            false => high = middle - 1,
        }
    }
    let planned = of(tokens, low);
    let estimate = estimate(&planned);
    (planned, estimate)
}
