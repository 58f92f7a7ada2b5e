//! From an open model to tokens: the model with its tokenizer and template, the engine that runs batches of sequences,
//! the session of one conversation, and generation.
//!
//! | type | what it is |
//! | --- | --- |
//! | [`Model`] | mapped weights, spec, tokenizer, template; shared by any number of engines |
//! | [`Engine`] | tapes, arena and threads; runs rows of several [`Sequence`]s at once |
//! | [`Session`] | an engine with one sequence: feed, score, rewind, generate |
//! | [`Batcher`] | an engine with many sequences: requests come and go, and are decoded together |
//! | [`PrefixCache`] | computed prompts, for others that begin alike |
//! | [`Device`] | where it runs |
//! | [`Learner`] | gradients of adapters or of all weights, and what comes of them as a file |
//! | [`Generation`] | pulls text from a session, piece by piece |
//! | [`Speculation`] | guesses ahead, so that one run of the tape gives several tokens |

mod adapters;
mod answer;
mod backend;
mod batcher;
mod devices;
#[cfg(feature = "gpu")]
mod divided;
mod engine;
mod estimate;
mod generate;
mod learner;
mod model;
mod placement;
mod prefix;
mod saved;
#[allow(clippy::module_inception)]
mod session;
mod speculate;
mod trained;

pub use crate::cpu::Arithmetic;
pub use adapters::{AdapterReport, ScaledAdapter};
pub use answer::{EndReason, GenerateOptions, GenerationStats, Piece};
pub use backend::Device;
pub use batcher::{Batcher, Progress, RequestId};
pub use devices::{DeviceSummary, devices};
pub use engine::{Engine, Sequence, SessionOptions};
pub use estimate::{Estimate, Shared};
pub use generate::Generation;
pub use learner::{LearnBatch, Learner, LearnerOptions, SoftBatch};
pub use model::Model;
pub use prefix::PrefixCache;
pub use session::{CancelHandle, Session};
pub use speculate::Speculation;
