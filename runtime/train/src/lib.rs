//! QLoRA and full training over the tape of `kinglet-engine`.
//!
//! | module | what |
//! | --- | --- |
//! | [`config`] | [`TrainConfig`](config::TrainConfig): every setting with its default and its range |
//! | [`data`] | files of conversations, texts and preferences to masked tokens; the validation split |
//! | [`batch`] | packing documents into rows, shuffling, and the position in the data that a checkpoint keeps |
//! | [`init`], [`random`] | first values of adapters, and all other chance: counters and a hash, no hidden state |
//! | [`optimizer`], [`schedule`] | AdamW (32 or 8 bits of state), clipping; the learning rate over the steps |
//! | [`preference`] | DPO and its relatives, KTO, ORPO, SimPO: losses and gradients by log-probability |
//! | [`trainer`] | [`Trainer`](trainer::Trainer): the loop that joins all of this, pulled step by step |
//! | `objective` | a batch under a loss: one run, or scores first and then the gradient |
//! | [`keep`] | texts on which the model stays as it was, and what it predicts in them |
//! | [`probe`] | whether the model forgets what it knew |
//! | [`product`] | what a training leaves: adapter files, or a model |
//! | [`guard`] | when to roll back and when to stop |
//! | [`checkpoint`] | directories that are whole or absent |
//! | [`metrics`], [`report`] | `metrics.jsonl`, and the page a person looks at |
//!
//! Nothing here knows a backend: tokens go out, losses and gradients come in. Everything is a function of the
//! configuration, the data and the counters in a checkpoint, so a resumed run repeats the interrupted one bit by bit.

pub mod batch;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod guard;
pub mod init;
pub mod keep;
pub mod metrics;
mod objective;
pub mod optimizer;
mod parameters;
pub mod preference;
pub mod probe;
pub mod product;
pub mod random;
pub mod report;
pub mod schedule;
pub mod trainer;

pub use kinglet_engine::{Error, Result};
