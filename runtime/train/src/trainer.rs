//! The loop: data, learner, optimizer, guard, checkpoints and metrics joined, one step at a time.
//!
//! A caller pulls: [`Trainer::advance`] takes one step and says what happened, until it says that training is done. What a
//! step consists of:
//!
//! 1. the gradients of the next batches (`objective`), and their length;
//! 2. the guard's verdict, before anything is applied: go on, return to the last checkpoint, or give up;
//! 3. clipping, AdamW (`parameters`, which knows where the numbers are), one line of `metrics.jsonl`;
//! 4. where they are due: validation, the best state kept, a checkpoint.
//!
//! A step whose gradients fail or are cancelled has not happened: parameters, optimizer and place in the data are those
//! before it. If what is due after a step is cancelled, the next call does it. [`Trainer::save`] can write the state at any
//! time between calls. The state of a run is its configuration, the parameters, the optimizer's
//! moments and a few counters, all in a checkpoint; everything else follows from them, so a resumed run repeats the
//! interrupted one bit by bit.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use kinglet_engine::adapter::{Adapter, fingerprint};
use kinglet_engine::session::{Device, Learner, LearnerOptions, Model};
use kinglet_engine::{Stopwatch, file};
use serde::{Deserialize, Serialize};

use crate::batch::{Cursor, Loader, LoaderOptions, Packing};
use crate::checkpoint::{Checkpoint, Checkpoints, Tensor, Values, decode_tensors, encode_tensors};
use crate::config::{Target, TrainConfig};
use crate::data::{Dataset, Encoder, Summary};
use crate::guard::{EarlyStop, LossGuard, Verdict};
use crate::init::golden_init;
use crate::metrics::{MetricsWriter, StepMetrics};
use crate::objective::{Objective, Outcome, Policy, Set};
use crate::optimizer::{AdamW, Options, Parameter};
use crate::parameters::Parameters;
use crate::preference::Loss;
use crate::probe::{Forgetting, Probe};
use crate::report::Report;
use crate::schedule::Schedule;
use crate::{Error, Result, metrics, product, random};

/// Rollbacks before a training is given up.
const ROLLBACKS: u32 = 3;
const PARAMETERS: &str = "parameters.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
/// The parameters of the best validation, beside the checkpoints.
const BEST: &str = "best.safetensors";

/// How and where a training runs: what does not change its result.
#[derive(Clone, Debug, Default)]
pub struct TrainerOptions {
    /// The folder for everything it writes.
    pub output: PathBuf,
    /// The heading of the report.
    pub title: String,
    /// Go on from the last checkpoint in `output`, if there is one.
    pub resume: bool,
    /// Threads; 0 for one per core.
    pub threads: usize,
    /// Where gradients are computed.
    pub device: Device,
    /// Read the frozen weights on a GPU from the pages of the mapped file, without a copy, as
    /// [`SessionOptions::gpu_import`](kinglet_engine::session::SessionOptions::gpu_import) says.
    pub gpu_import: bool,
    /// Bytes that the whole may take, the mapped file included.
    pub memory_budget: Option<u64>,
    /// Text of the forgetting probe; `None` for the built-in one.
    pub probe: Option<String>,
}

/// What a training comes to need and to do, known before the first step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Preflight {
    /// Numbers that are trained.
    pub parameters: usize,
    /// Steps, those of a resumed run included.
    pub steps: u64,
    /// Examples for training and validation, and what became of the rest.
    pub data: Summary,
    /// Examples among them that are kept for validation.
    pub validation: usize,
    /// Examples beside them on which the model is to stay as it is.
    pub keep: usize,
    /// Bytes resident at the peak, the mapped weights included.
    pub memory: u64,
    /// The frozen weights, which are part of `memory`: the mapped file, or what a GPU reads of it.
    pub weights: u64,
    /// Of the weights what is read in place from the mapped file, and not allocated.
    pub mapped: u64,
    /// Most tokens that run at once.
    pub tokens: usize,
}

/// What [`Trainer::advance`] did.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress {
    /// A step.
    Stepped(StepMetrics),
    /// The step went wrong; the state is that after `step` steps again.
    RolledBack {
        /// Steps taken in the state that was returned to.
        step: u64,
        /// What went wrong, with numbers.
        why: String,
    },
    /// Nothing is left to do but [`Trainer::finish`].
    Done(Ending),
}

/// Why a training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// All steps were taken.
    Steps,
    /// The validation loss did not fall any more.
    EarlyStop,
}

/// What a finished training comes to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finished {
    /// Steps taken.
    pub steps: u64,
    /// Why it ended.
    pub ending: Ending,
    /// The step whose parameters were written: the last, or that of the best validation where early stopping is on.
    pub written_step: u64,
    /// The last step's loss.
    pub loss: f64,
    /// Validation loss before training and of what was written, where there are validation data.
    pub validation: Option<[f64; 2]>,
    /// Perplexity on general text.
    pub forgetting: Forgetting,
    /// Tokens of all steps.
    pub tokens: u64,
    /// Seconds of all steps.
    pub seconds: f64,
    /// The files written.
    pub files: Vec<PathBuf>,
    /// What happened on the way.
    pub notes: Vec<String>,
}

/// The part of a run's state that is no tensor.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    config: TrainConfig,
    /// Fingerprints of the model and the data.
    model: String,
    data: String,
    step: u64,
    cursor: Cursor,
    guard: LossGuard,
    early_stop: EarlyStop,
    stopped: bool,
    /// A step that was applied while what is due after it was not done yet.
    pending: Option<StepMetrics>,
    /// Loss of the last step, validation loss before training and last, perplexity of the probe before training.
    loss: Option<f64>,
    before: Option<f64>,
    validation: Option<f64>,
    probe: Option<f64>,
    tokens: u64,
    seconds: f64,
    notes: Vec<String>,
}

/// A training run. See the module's text.
pub struct Trainer {
    options: TrainerOptions,
    parameters: Parameters,
    objective: Objective,
    probe: Probe,
    loader: Loader,
    schedule: Schedule,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    preflight: Preflight,
    /// The first parameters, where the loss needs a reference.
    reference: Vec<f32>,
    state: State,
    /// A step whose checkpoint is due and could not be written yet.
    unsaved: Option<StepMetrics>,
}

impl Trainer {
    /// Plans memory, reads or makes the first state, opens the files in the output folder.
    ///
    /// # Errors
    /// Settings out of range, [`Error::Memory`] with figures when over budget, an output folder that holds another training,
    /// [`Error::Io`].
    pub fn new(model: &Model, config: &TrainConfig, data: Dataset, options: TrainerOptions) -> Result<Trainer> {
        config.validate()?;
        let checkpoints = Checkpoints::new(options.output.join("checkpoints"), config.keep_checkpoints);
        let (checkpoint, damaged) = checkpoints.latest()?;
        if !options.resume && (checkpoint.is_some() || !damaged.is_empty()) {
            return Err(Error::argument(format!(
                "{} holds a training already; resume it (--resume), or choose another folder",
                options.output.display()
            )));
        }
        let (summary, validation) = (data.summary, data.validation.len());
        if config.early_stop.is_some() && validation == 0 {
            return Err(Error::argument("early stopping needs data to validate on; set val_fraction or give a file"));
        }
        if !data.keep.is_empty() && (config.full || config.targets.contains(&Target::Head)) {
            return Err(Error::Unsupported(
                "texts on which the model is to stay as it is where the output layer learns; leave out the head, or train \
                 an adapter"
                    .into(),
            ));
        }
        let kept = data.keep.len();
        let predictions =
            data.keep.iter().filter_map(|example| example.prediction.as_ref()).map(|p| p.bytes()).sum::<u64>();
        let objective = Objective::new(config.loss, config.keep_weight, data)?;
        let lengths = objective.lengths(Set::Train);
        let probe = Probe::new(&Encoder::new(model, config.seq, config.truncation)?, options.probe.as_deref())?;
        let packing = if config.loss == Loss::CrossEntropy { config.packing } else { Packing::None };
        let loader = Loader::new(
            lengths.clone(),
            LoaderOptions {
                batch: config.batch,
                seq: config.seq * objective.sequences(),
                packing,
                shuffle: config.shuffle,
                seed: config.seed,
                in_turns: kept,
                share: config.keep_share,
            },
        )?;
        let longest = |lengths: &[usize]| lengths.iter().copied().max().unwrap_or(0);
        let row = if packing == Packing::None { longest(&lengths) } else { config.seq };
        let rows = config.batch.min(lengths.len());
        let tokens = (rows * row).max(longest(&objective.lengths(Set::Validation))).max(probe.longest());
        let sequence = objective.longest().max(probe.longest());

        let trained = product::trained(config, model)?;
        let mut learner_options = LearnerOptions {
            trained,
            tokens,
            sequence,
            arithmetic: config.arithmetic,
            threads: options.threads,
            device: options.device.clone(),
            gpu_import: options.gpu_import,
            memory_budget: None,
        };
        // What is held beside the learner follows from the number of parameters.
        let count = Learner::count(model, &learner_options)?;
        let state_bytes = if config.state_8bit { 2 } else { 8 };
        let held = if config.loss.needs_reference() { 4 } else { 0 };
        // Parameters and moments once in use and twice on their way into a checkpoint.
        let beside = (count * (state_bytes + held) + 2 * count * (4 + state_bytes)) as u64 + predictions;
        learner_options.memory_budget = options.memory_budget.map(|budget| budget.saturating_sub(beside));
        let learner = Learner::new(model, &learner_options)?;

        let params = first(&learner, config.seed)?;
        let parameters: Vec<Parameter> = learner
            .params()
            .iter()
            .map(|p| Parameter {
                name: p.name.clone(),
                len: p.rows * p.width,
                decay: p.rows > 1 && !p.name.ends_with(".lora_magnitude"),
            })
            .collect();
        let optimizer = AdamW::new(
            Options {
                betas: config.betas,
                eps: config.eps,
                weight_decay: config.weight_decay,
                state_8bit: config.state_8bit,
            },
            &parameters,
        );
        let steps = config.total_steps(loader.batches_per_epoch());
        let estimate = learner.estimate();
        let preflight = Preflight {
            parameters: count,
            steps,
            data: summary,
            validation,
            keep: kept,
            memory: estimate.resident() + beside,
            weights: estimate.weights,
            mapped: estimate.mapped(),
            tokens,
        };
        let state = State {
            config: config.clone(),
            model: fingerprint(model.gguf()),
            data: objective.fingerprint(),
            step: 0,
            cursor: loader.cursor(),
            guard: LossGuard::new(ROLLBACKS),
            early_stop: EarlyStop::new(config.early_stop),
            stopped: false,
            pending: None,
            loss: None,
            before: None,
            validation: None,
            probe: None,
            tokens: 0,
            seconds: 0.0,
            notes: Vec::new(),
        };
        std::fs::create_dir_all(&options.output).map_err(Error::io(&options.output))?;
        let step = checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.step);
        let mut trainer = Trainer {
            schedule: config.schedule(steps),
            metrics: MetricsWriter::resume(&options.output.join("metrics.jsonl"), step)?,
            reference: if config.loss.needs_reference() { params.clone() } else { Vec::new() },
            options,
            parameters: Parameters::new(learner, optimizer, params),
            objective,
            probe,
            loader,
            checkpoints,
            preflight,
            state,
            unsaved: None,
        };
        if let Some(checkpoint) = checkpoint {
            let state = trainer.read(&checkpoint)?;
            trainer.loader.seek(state.cursor)?;
            trainer.state = state;
            let damaged: Vec<String> = damaged.iter().map(|error| format!("skipped: {error}")).collect();
            trainer.state.notes.extend(damaged);
            trainer.state.notes.push(format!("resumed at step {step}"));
        }
        let config = serde_json::to_vec_pretty(&trainer.state.config).map_err(|e| Error::argument(e.to_string()))?;
        file::replace(trainer.options.output.join("train.json"), &config)?;
        Ok(trainer)
    }

    /// What is ahead.
    pub fn preflight(&self) -> &Preflight {
        &self.preflight
    }

    /// Steps taken.
    pub fn step(&self) -> u64 {
        self.state.step
    }

    /// The settings, which are those of the checkpoint in a resumed run.
    pub fn config(&self) -> &TrainConfig {
        &self.state.config
    }

    /// What happened on the way, one line each.
    pub fn notes(&self) -> &[String] {
        &self.state.notes
    }

    /// Parameters, in the places that the learner gives them.
    ///
    /// # Errors
    /// [`Error::Device`] where a GPU has them and is lost.
    pub fn params(&mut self) -> Result<&[f32]> {
        self.parameters.values()
    }

    /// The adapter as it is after the steps so far, to try it out.
    ///
    /// # Errors
    /// A training of all weights, numbers that are not finite.
    pub fn adapter(&mut self) -> Result<Adapter> {
        let (learner, params) = self.parameters.learned()?;
        product::adapter(learner, params, &self.state.config)
    }

    /// The learner, for its table of times.
    pub fn learner_mut(&mut self) -> &mut Learner {
        self.parameters.learner_mut()
    }

    /// Gives back the memory that a GPU has for the training, between two calls, until the next of them. Gives its bytes.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`].
    pub fn park(&mut self) -> Result<u64> {
        self.parameters.learner_mut().park()
    }

    /// Takes one step. The first call also measures the model as it is.
    ///
    /// # Errors
    /// [`Error::Cancelled`]; a loss that stays absurd after rollbacks; [`Error::Io`]. The step has not happened then, or is
    /// not done: the next call finishes it.
    pub fn advance(&mut self, cancel: &AtomicBool) -> Result<Progress> {
        if let Some(line) = self.state.pending.clone() {
            return self.settle(line, cancel);
        }
        if let Some(line) = self.unsaved.clone() {
            return self.keep(line);
        }
        if self.state.stopped {
            return Ok(Progress::Done(Ending::EarlyStop));
        }
        if self.state.step >= self.schedule.steps {
            return Ok(Progress::Done(Ending::Steps));
        }
        if self.state.probe.is_none() {
            self.state.before = self.validation_loss(cancel)?.map(|outcome| outcome.loss);
            self.state.probe = Some(self.perplexity(cancel)?);
        }
        let cursor = self.loader.cursor();
        let start = Stopwatch::start();
        match self.gradients(cancel) {
            Ok(outcome) => match self.apply(outcome, start)? {
                Ok(line) => self.settle(line, cancel),
                Err(rolled_back) => Ok(rolled_back),
            },
            Err(error) => {
                self.loader.seek(cursor)?;
                Err(error)
            }
        }
    }

    /// The gradients of the next batches.
    fn gradients(&mut self, cancel: &AtomicBool) -> Result<Outcome> {
        let batches: Vec<Vec<usize>> = (0..self.state.config.accumulation).map(|_| self.loader.next_batch()).collect();
        self.parameters.begin()?;
        let seed = random::splitmix64(random::stream("dropout", self.state.config.seed), self.state.step);
        let mut policy = Policy { parameters: &mut self.parameters, reference: &self.reference, cancel };
        self.objective.learn(&mut policy, &batches, seed)
    }

    /// Judges the gradients and applies them, or goes back.
    fn apply(&mut self, outcome: Outcome, start: Stopwatch) -> Result<Result<StepMetrics, Progress>> {
        let norm = self.parameters.norm()?;
        let step = self.state.step + 1;
        match self.state.guard.check(step, outcome.loss, norm) {
            Verdict::Continue => {}
            Verdict::RollBack(why) => return self.roll_back(why).map(Err),
            Verdict::GiveUp(why) => return Err(Error::argument(why)),
        }
        let lr = self.schedule.rate(self.state.step) * self.state.guard.rate_factor();
        self.parameters.step(lr, norm, self.state.config.clip)?;
        let seconds = start.elapsed().as_secs_f64();
        self.state.step = step;
        self.state.cursor = self.loader.cursor();
        self.state.loss = Some(outcome.loss);
        self.state.tokens += outcome.tokens as u64;
        self.state.seconds += seconds;
        let line = StepMetrics {
            step,
            loss: outcome.loss,
            lr,
            grad_norm: norm,
            tokens_per_second: outcome.tokens as f64 / seconds.max(1e-9),
            val_loss: None,
            keep_kl: outcome.keep_kl,
            reward_accuracy: outcome.preference.map(|p| p.0),
            reward_margin: outcome.preference.map(|p| p.1),
        };
        self.state.pending = Some(line.clone());
        Ok(Ok(line))
    }

    /// Does what is due after a step: validation, the line in the metrics, a checkpoint.
    fn settle(&mut self, mut line: StepMetrics, cancel: &AtomicBool) -> Result<Progress> {
        let step = self.state.step;
        let last = step == self.schedule.steps;
        let due = |every: u64| last || (every > 0 && step.is_multiple_of(every));
        if due(self.state.config.eval_every) && line.val_loss.is_none() {
            line.val_loss = self.validate(cancel)?;
            // Once, should the rest fail.
            self.state.pending = Some(line.clone());
        }
        self.metrics.write(&line)?;
        self.state.pending = None;
        if due(self.state.config.checkpoint_every) || self.state.stopped {
            return self.keep(line);
        }
        Ok(Progress::Stepped(line))
    }

    /// Ends a step with a checkpoint.
    fn keep(&mut self, line: StepMetrics) -> Result<Progress> {
        self.unsaved = Some(line.clone());
        self.save()?;
        self.unsaved = None;
        Ok(Progress::Stepped(line))
    }

    /// The validation loss; keeps the parameters where they are the best so far.
    fn validate(&mut self, cancel: &AtomicBool) -> Result<Option<f64>> {
        let Some(outcome) = self.validation_loss(cancel)? else { return Ok(None) };
        // A loss counts once what it asks for is on the disk.
        let mut early_stop = self.state.early_stop.clone();
        let progress = early_stop.observe(self.state.step, outcome.loss);
        if progress.improved && self.state.config.early_stop.is_some() {
            file::replace(self.options.output.join(BEST), &encode_tensors(&self.tensors()?, &[])?)?;
        }
        self.state.early_stop = early_stop;
        self.state.validation = Some(outcome.loss);
        self.state.stopped = progress.stop;
        Ok(Some(outcome.loss))
    }

    fn validation_loss(&mut self, cancel: &AtomicBool) -> Result<Option<Outcome>> {
        if self.preflight.validation == 0 {
            return Ok(None);
        }
        let mut policy = Policy { parameters: &mut self.parameters, reference: &self.reference, cancel };
        self.objective.validate(&mut policy, self.preflight.tokens).map(Some)
    }

    fn perplexity(&mut self, cancel: &AtomicBool) -> Result<f64> {
        let mut policy = Policy { parameters: &mut self.parameters, reference: &[], cancel };
        self.probe.perplexity(&mut policy)
    }

    /// Returns to the last checkpoint, or to the beginning; the place in the data stays.
    fn roll_back(&mut self, why: String) -> Result<Progress> {
        let (checkpoint, _) = self.checkpoints.latest()?;
        let guard = self.state.guard.clone();
        let notes = std::mem::take(&mut self.state.notes);
        match checkpoint {
            Some(checkpoint) => self.state = self.read(&checkpoint)?,
            None => {
                let (learner, values, optimizer) = self.parameters.change()?;
                values.copy_from_slice(&first(learner, self.state.config.seed)?);
                optimizer.reset();
                (self.state.step, self.state.tokens, self.state.seconds) = (0, 0, 0.0);
                self.state.early_stop = EarlyStop::new(self.state.config.early_stop);
            }
        }
        self.state.guard = guard;
        self.state.notes = notes;
        self.state.cursor = self.loader.cursor();
        let step = self.state.step;
        self.state.notes.push(format!("{why}; went back to step {step} with half the learning rate"));
        self.metrics = MetricsWriter::resume(&self.options.output.join("metrics.jsonl"), step)?;
        Ok(Progress::RolledBack { step, why })
    }

    /// The parameters as tensors.
    fn tensors(&mut self) -> Result<Vec<Tensor>> {
        let (learner, values) = self.parameters.learned()?;
        let tensor = |p: &kinglet_engine::tape::Param| Tensor {
            name: p.name.clone(),
            shape: vec![p.rows, p.width],
            values: Values::F32(values[p.offset..p.end()].to_vec()),
        };
        Ok(learner.params().iter().map(tensor).collect())
    }

    /// Writes a checkpoint of the state as it is.
    ///
    /// # Errors
    /// [`Error::Io`]; checkpoints that are there stay as they are.
    pub fn save(&mut self) -> Result<PathBuf> {
        let parameters = encode_tensors(&self.tensors()?, &[])?;
        let optimizer = encode_tensors(&self.parameters.export_moments()?, &[])?;
        let state = serde_json::to_vec_pretty(&self.state).map_err(|error| Error::argument(error.to_string()))?;
        self.checkpoints.save(
            self.state.step,
            &[(PARAMETERS, parameters.as_slice()), (OPTIMIZER, optimizer.as_slice()), (STATE, state.as_slice())],
        )
    }

    /// Takes over parameters and optimizer of a checkpoint; gives its state.
    fn read(&mut self, checkpoint: &Checkpoint) -> Result<State> {
        let file = checkpoint.path.join(STATE).display().to_string();
        let state: State = serde_json::from_slice(checkpoint.file(STATE)?).map_err(|error| Error::Format {
            file: file.clone(),
            at: format!("line {}", error.line()),
            what: error.to_string(),
        })?;
        let differs = |what: &str| {
            Err(Error::argument(format!(
                "{file}: the training was begun with {what}; resume it with the same, or choose another folder"
            )))
        };
        if state.model != self.state.model {
            return differs("another model");
        }
        if state.data != self.state.data {
            return differs("other data");
        }
        if let Some(field) = state.config.difference(&self.state.config) {
            return differs(&format!("another value of {field}"));
        }
        self.take(&decode_tensors(checkpoint.file(PARAMETERS)?, &file)?, &file)?;
        let (_, _, optimizer) = self.parameters.change()?;
        optimizer.import(state.step, &decode_tensors(checkpoint.file(OPTIMIZER)?, &file)?)?;
        Ok(state)
    }

    /// Takes over parameters that [`Trainer::tensors`] gave.
    fn take(&mut self, tensors: &[Tensor], file: &str) -> Result<()> {
        let (learner, params, _) = self.parameters.change()?;
        for p in learner.params() {
            let values = tensors.iter().find(|t| t.name == p.name).map(|t| &t.values);
            match values {
                Some(Values::F32(values)) if values.len() == p.rows * p.width => {
                    params[p.offset..p.end()].copy_from_slice(values);
                }
                _ => {
                    return Err(Error::Format {
                        file: file.into(),
                        at: p.name.clone(),
                        what: "the tensor is missing or of another size".into(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Writes what was trained, measures what was forgotten, and draws the report.
    ///
    /// # Errors
    /// [`Error::Cancelled`], [`Error::Io`].
    pub fn finish(&mut self, cancel: &AtomicBool) -> Result<Finished> {
        let best = self.options.output.join(BEST);
        let (mut written_step, mut validation) = (self.state.step, self.state.validation);
        if let (Some(_), Some((step, loss))) = (self.state.config.early_stop, self.state.early_stop.best()) {
            let bytes = std::fs::read(&best).map_err(Error::io(&best))?;
            self.take(&decode_tensors(&bytes, &best.display().to_string())?, &best.display().to_string())?;
            (written_step, validation) = (step, Some(loss));
        }
        let after = self.perplexity(cancel)?;
        let (learner, params) = self.parameters.learned()?;
        let (files, note) = product::write(&self.options.output, learner, params, &self.state.config)?;
        self.state.notes.extend(note);
        let finished = Finished {
            steps: self.state.step,
            ending: if self.state.stopped { Ending::EarlyStop } else { Ending::Steps },
            written_step,
            loss: self.state.loss.unwrap_or(f64::NAN),
            validation: self.state.before.zip(validation).map(|(before, after)| [before, after]),
            forgetting: Forgetting { before: self.state.probe.unwrap_or(f64::NAN), after },
            tokens: self.state.tokens,
            seconds: self.state.seconds,
            files,
            notes: self.state.notes.clone(),
        };
        self.report(Some(&finished))?;
        Ok(finished)
    }

    /// Writes the report of the steps so far; `finished` for the last one.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn report(&self, finished: Option<&Finished>) -> Result<PathBuf> {
        let path = self.options.output.join("report.html");
        let lines = metrics::read(&self.options.output.join("metrics.jsonl"))?;
        let Preflight { parameters, steps, data, validation, memory, .. } = self.preflight;
        let mut facts = vec![
            ("steps".to_string(), format!("{} of {steps}", self.state.step)),
            ("trained parameters".to_string(), parameters.to_string()),
            (
                "examples".to_string(),
                format!("{} to train on, {validation} to validate on", data.examples - validation),
            ),
            ("tokens of all examples".to_string(), format!("{}, {} of them trained", data.tokens, data.trained)),
            ("memory at the peak, planned".to_string(), format!("{:.0} MB", memory as f64 / 1e6)),
        ];
        if let Some(finished) = finished {
            let Forgetting { before, after } = finished.forgetting;
            if let Some([before, after]) = finished.validation {
                facts.push(("validation loss".into(), format!("{before:.4} before, {after:.4} after")));
            }
            let change = 100.0 * finished.forgetting.change();
            facts.push((
                "perplexity on general text".into(),
                format!("{before:.2} before, {after:.2} after ({change:+.1} %)"),
            ));
        }
        let report = Report {
            title: &self.options.title,
            facts: &facts,
            config: &self.state.config,
            metrics: &lines,
            notes: &self.state.notes,
        };
        report.write(&path)?;
        Ok(path)
    }

    /// Where everything is written.
    pub fn output(&self) -> &Path {
        &self.options.output
    }
}

/// The parameters before the first step. The halves `A` are drawn by the name other programs know them by, so that those can
/// draw the same values.
fn first(learner: &Learner, seed: u64) -> Result<Vec<f32>> {
    let mut params = learner.initial()?;
    for p in learner.params().iter().filter(|p| p.name.ends_with(".lora_a")) {
        let values = golden_init(&p.name.replace(".weight", ""), &[p.rows, p.width], seed);
        params[p.offset..p.end()].copy_from_slice(&values);
    }
    Ok(params)
}
