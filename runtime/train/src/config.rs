//! Every setting of a training run, with its default and its range.
//!
//! A [`TrainConfig`] reads from JSON (unknown keys are errors, absent ones get their default) and is written into each
//! checkpoint. [`TrainConfig::validate`] names the field, its value and its range. What a run computes follows from the
//! configuration, the model and the data.

pub use kinglet_engine::session::Arithmetic;
use serde::{Deserialize, Serialize};

use crate::batch::Packing;
use crate::data::Truncation;
use crate::preference::Loss;
use crate::schedule::{Schedule, Shape};
use crate::{Error, Result};

/// A linear map of the decoder's layers that an adapter may be attached to; or the tables at its ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Output projection of the attention.
    O,
    /// Gate of the feed-forward part.
    Gate,
    /// Up projection.
    Up,
    /// Down projection.
    Down,
    /// The table of the input tokens.
    Embedding,
    /// The output layer.
    Head,
}

impl Target {
    /// The seven linear maps of a layer.
    pub const LAYER: [Target; 7] = [Target::Q, Target::K, Target::V, Target::O, Target::Gate, Target::Up, Target::Down];
}

/// The settings of a training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Train all weights of the model in f32 instead of adapters: for small models, from scratch or to go on with. What is
    /// said about adapters does not count then.
    pub full: bool,
    /// Rank of the adapter's matrices. 1 to 1,024.
    pub rank: usize,
    /// The adapter counts `alpha / rank` (or `alpha / √rank`). Above 0.
    pub alpha: f64,
    /// Divide by `√rank` (Kalajdzievski 2023, arXiv:2312.03732).
    pub rslora: bool,
    /// Learn the weights' magnitudes apart from their directions (Liu and others 2024, arXiv:2402.09353).
    pub dora: bool,
    /// Share of the adapter's inputs that are zeroed in a step. 0 to below 1.
    pub dropout: f64,
    /// What the adapter is attached to; at least one, none twice.
    pub targets: Vec<Target>,

    /// Rows of a batch. 1 to 65,536.
    pub batch: usize,
    /// Tokens of a row. 2 to 1,048,576.
    pub seq: usize,
    /// Batches whose gradients make one step. 1 to 65,536.
    pub accumulation: usize,
    /// How documents are put into rows.
    pub packing: Packing,
    /// What happens to an example that is longer than a row.
    pub truncation: Truncation,
    /// Whether each epoch has an order of its own; otherwise the order of the files.
    pub shuffle: bool,
    /// Share of the data kept for validation. 0 to 0.9.
    pub val_fraction: f64,

    /// Steps; `None`: as many as `epochs` come to. At least 1.
    pub steps: Option<u64>,
    /// Passes over the data where `steps` is `None`. Above 0, at most 10,000.
    pub epochs: f64,
    /// Highest learning rate. Above 0, at most 1.
    pub lr: f64,
    /// Lowest learning rate behind the warmup. 0 to `lr`.
    pub min_lr: f64,
    /// The learning rate's way down.
    pub schedule: Shape,
    /// Steps over which the learning rate rises; not more than `steps`.
    pub warmup: u64,
    /// Decoupled weight decay. 0 to 1.
    pub weight_decay: f64,
    /// AdamW's decay rates of the two moments. 0 to below 1.
    pub betas: [f64; 2],
    /// What AdamW adds to the root. Above 0, at most 0.1.
    pub eps: f64,
    /// Longest gradient; longer ones are shortened. 0: no limit.
    pub clip: f64,
    /// Keep the optimizer's state in 8 bits.
    pub state_8bit: bool,
    /// How exactly the model's own maps are computed while an adapter is learned; adapters themselves are f32, and so is all in a
    /// full training. On a GPU all but `exact` is what the device does fastest.
    pub arithmetic: Arithmetic,
    /// What is minimised.
    pub loss: Loss,
    /// How much the divergence from the untrained model counts in a token on which it is to stay as it is, beside the loss of a
    /// token that is learned. 0 to 1,000.
    pub keep_weight: f64,
    /// Tokens on which the model is to stay as it is, in a pass, beside one of the data; passes take turns with the texts, so
    /// that none is learned by heart. 0 to 100.
    pub keep_share: f64,

    /// All chance follows from it.
    pub seed: u64,
    /// Steps between validations; 0: only at the end.
    pub eval_every: u64,
    /// Steps between checkpoints; 0: only at the end.
    pub checkpoint_every: u64,
    /// Checkpoints kept. At least 1.
    pub keep_checkpoints: usize,
    /// Stop after so many validations without progress; `None`: never. At least 1.
    pub early_stop: Option<u32>,
}

impl Default for TrainConfig {
    fn default() -> TrainConfig {
        TrainConfig {
            full: false,
            rank: 8,
            alpha: 16.0,
            rslora: false,
            dora: false,
            dropout: 0.0,
            targets: Target::LAYER.to_vec(),
            batch: 4,
            seq: 256,
            accumulation: 1,
            packing: Packing::BestFit,
            truncation: Truncation::End,
            shuffle: true,
            val_fraction: 0.1,
            steps: None,
            epochs: 3.0,
            lr: 2e-4,
            min_lr: 0.0,
            schedule: Shape::Cosine,
            warmup: 10,
            weight_decay: 0.0,
            betas: [0.9, 0.999],
            eps: 1e-8,
            clip: 1.0,
            state_8bit: false,
            arithmetic: Arithmetic::default(),
            loss: Loss::CrossEntropy,
            keep_weight: 1.0,
            keep_share: 0.5,
            seed: 42,
            eval_every: 50,
            checkpoint_every: 50,
            keep_checkpoints: 2,
            early_stop: None,
        }
    }
}

impl TrainConfig {
    /// Checks every field against its range.
    ///
    /// # Errors
    /// [`Error::Argument`] that names the first field outside its range, its value and the range.
    pub fn validate(&self) -> Result<()> {
        check("rank", self.rank, (1..=1024).contains(&self.rank), "from 1 to 1024")?;
        check("alpha", self.alpha, self.alpha > 0.0 && self.alpha.is_finite(), "above 0")?;
        check("dropout", self.dropout, (0.0..1.0).contains(&self.dropout), "from 0 to below 1")?;
        check("targets", self.targets.len(), !self.targets.is_empty(), "at least one of q, k, v, o, gate, up, down")?;
        let mut targets = self.targets.clone();
        targets.sort_unstable();
        targets.dedup();
        check("targets", self.targets.len(), targets.len() == self.targets.len(), "without a target named twice")?;
        check("batch", self.batch, (1..=1 << 16).contains(&self.batch), "from 1 to 65536 rows")?;
        check("seq", self.seq, (2..=1 << 20).contains(&self.seq), "from 2 to 1048576 tokens")?;
        check("accumulation", self.accumulation, (1..=1 << 16).contains(&self.accumulation), "from 1 to 65536")?;
        check("val_fraction", self.val_fraction, (0.0..=0.9).contains(&self.val_fraction), "from 0 to 0.9")?;
        if let Some(steps) = self.steps {
            check("steps", steps, steps >= 1, "at least 1")?;
            check("warmup", self.warmup, self.warmup <= steps, &format!("at most the {steps} steps"))?;
        }
        check("epochs", self.epochs, self.epochs > 0.0 && self.epochs <= 1e4, "above 0 and at most 10000")?;
        check("lr", self.lr, self.lr > 0.0 && self.lr <= 1.0, "above 0 and at most 1")?;
        check("min_lr", self.min_lr, (0.0..=self.lr).contains(&self.min_lr), &format!("from 0 to lr ({})", self.lr))?;
        check("weight_decay", self.weight_decay, (0.0..=1.0).contains(&self.weight_decay), "from 0 to 1")?;
        for beta in self.betas {
            check("betas", beta, (0.0..1.0).contains(&beta), "two numbers from 0 to below 1")?;
        }
        check("eps", self.eps, self.eps > 0.0 && self.eps <= 0.1, "above 0 and at most 0.1")?;
        check("clip", self.clip, self.clip >= 0.0 && self.clip.is_finite(), "0 (no limit) or above")?;
        check("keep_weight", self.keep_weight, (0.0..=1e3).contains(&self.keep_weight), "from 0 to 1000")?;
        check("keep_share", self.keep_share, (0.0..=100.0).contains(&self.keep_share), "from 0 to 100")?;
        check("keep_checkpoints", self.keep_checkpoints, self.keep_checkpoints >= 1, "at least 1")?;
        if let Some(patience) = self.early_stop {
            check("early_stop", patience, patience >= 1, "at least 1 validation, or null")?;
        }
        self.loss.validate()
    }

    /// Reads a configuration from JSON and checks it; `file` is for messages.
    ///
    /// # Errors
    /// [`Error::Format`] for what is not JSON of this shape, [`Error::Argument`] as [`TrainConfig::validate`].
    pub fn from_json(text: &str, file: &str) -> Result<TrainConfig> {
        let config: TrainConfig = serde_json::from_str(text).map_err(|error| Error::Format {
            file: file.into(),
            at: format!("line {}", error.line()),
            what: error.to_string(),
        })?;
        config.validate()?;
        Ok(config)
    }

    /// The first field, in the order of the JSON's keys, in which `other` is different and so computes something else.
    pub fn difference(&self, other: &TrainConfig) -> Option<String> {
        let fields = |config: &TrainConfig| match serde_json::to_value(config) {
            Ok(serde_json::Value::Object(fields)) => fields,
            _ => serde_json::Map::new(),
        };
        let others = fields(other);
        // How many checkpoints are kept changes nothing that is computed.
        let counts = |key: &String| key != "keep_checkpoints";
        fields(self).into_iter().find(|(key, value)| counts(key) && others.get(key) != Some(value)).map(|(key, _)| key)
    }

    /// What the adapter's product is multiplied with.
    pub fn scale(&self) -> f64 {
        self.alpha / if self.rslora { (self.rank as f64).sqrt() } else { self.rank as f64 }
    }

    /// The number of steps when an epoch has `batches` batches. At least 1.
    pub fn total_steps(&self, batches: u64) -> u64 {
        let epochs = || (self.epochs * batches as f64 / self.accumulation as f64).ceil() as u64;
        self.steps.unwrap_or_else(epochs).max(1)
    }

    /// The learning rates of a run of `steps` steps. The warmup is at most a tenth of them where they were not given.
    pub fn schedule(&self, steps: u64) -> Schedule {
        let warmup = if self.steps.is_some() { self.warmup } else { self.warmup.min(steps / 10) };
        Schedule { shape: self.schedule, peak: self.lr, floor: self.min_lr, warmup, steps }
    }
}

/// An error for `field` unless `good`.
pub(crate) fn check(field: &str, value: impl std::fmt::Debug, good: bool, range: &str) -> Result<()> {
    if good { Ok(()) } else { Err(Error::argument(format!("{field} is {value:?} but must be {range}"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes_and_fills_in_defaults() {
        let config = TrainConfig { rank: 16, loss: Loss::dpo(), early_stop: Some(3), ..TrainConfig::default() };
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(TrainConfig::from_json(&text, "c").unwrap(), config);
        let config =
            TrainConfig::from_json(r#"{"rank": 4, "targets": ["q", "down"], "loss": {"dpo": {}}}"#, "c").unwrap();
        assert_eq!((config.rank, config.seq, config.loss), (4, 256, Loss::dpo()));
        assert_eq!(config.targets, [Target::Q, Target::Down]);
    }

    /// A learning rate that comes back from a checkpoint differing in its last bit would change the run.
    #[test]
    fn every_float_comes_back_exactly() {
        for index in 0..2000 {
            let lr = crate::random::uniform(3, index) / 7.0 + 1e-7;
            let config = TrainConfig { lr, alpha: 1.0 / lr, ..TrainConfig::default() };
            let text = serde_json::to_string(&config).unwrap();
            assert_eq!(TrainConfig::from_json(&text, "c").unwrap(), config);
        }
    }

    #[test]
    fn names_the_field_and_the_range() {
        let message = |text: &str| TrainConfig::from_json(text, "train.json").unwrap_err().to_string();
        for (json, parts) in [
            (r#"{"rank": 0}"#, ["rank is 0", "from 1 to 1024"]),
            (r#"{"dropout": 1.0}"#, ["dropout is 1.0", "below 1"]),
            (r#"{"targets": []}"#, ["targets", "at least one"]),
            (r#"{"targets": ["q", "q"]}"#, ["targets", "twice"]),
            (r#"{"seq": 1}"#, ["seq is 1", "2 to"]),
            (r#"{"lr": 0.0}"#, ["lr is 0.0", "above 0"]),
            (r#"{"lr": 0.1, "min_lr": 0.2}"#, ["min_lr is 0.2", "0.1"]),
            (r#"{"steps": 5, "warmup": 6}"#, ["warmup is 6", "5 steps"]),
            (r#"{"betas": [0.9, 1.0]}"#, ["betas is 1.0", "below 1"]),
            (r#"{"loss": {"dpo": {"beta": -1}}}"#, ["beta is -1", "above 0"]),
            (r#"{"ranks": 8}"#, ["train.json: line 1", "ranks"]),
            (r#"{"schedule": "step"}"#, ["train.json: line 1", "cosine"]),
        ] {
            let text = message(json);
            assert!(parts.iter().all(|part| text.contains(part)), "{json}: {text}");
        }
        let nan = TrainConfig { alpha: f64::NAN, ..TrainConfig::default() };
        assert!(nan.validate().is_err());
    }

    #[test]
    fn counts_steps_and_scales() {
        let config = TrainConfig { epochs: 1.5, accumulation: 2, ..TrainConfig::default() };
        assert_eq!((config.total_steps(10), config.total_steps(0)), (8, 1));
        assert_eq!(TrainConfig { steps: Some(3), ..config.clone() }.total_steps(10), 3);
        assert_eq!(config.schedule(20).warmup, 2);
        assert_eq!(config.scale(), 2.0);
        assert_eq!(TrainConfig { rslora: true, rank: 16, ..config }.scale(), 4.0);
    }
}
