//! The tape: a flat list of coarse operations in execution order, the same machinery for chatting and for learning.
//!
//! [`Spec`] says what a model is made of (made by a family in `kinglet-models`), [`decoder`] writes it down as ops
//! through a [`Builder`], [`Plan`] gives every value its place in one arena and so knows the peak memory before
//! anything is allocated. A backend then walks the list. Row counts, positions and cache lengths are parameters of a
//! run: nothing is rebuilt per token. There is no graph rewriting; fusion is by construction, each op being as coarse
//! as the kernels want it.

mod adamw;
mod backward;
mod batch;
mod builder;
pub mod decoder;
mod dora;
mod op;
mod op_learn;
mod plan;
mod recompute;
mod rope;
mod spec;
mod timing;
mod weights;

pub use adamw::{AdamWStep, KeepsTraining, TrainingState};
pub(crate) use batch::check_dropped;
pub use batch::{Batch, Learning, MOST_LARGEST, Segments, SoftTargets, Within};
pub use builder::{Builder, LoraSpec, Trained};
pub use decoder::{Purpose, Stage};
pub use dora::{adapted_norm, magnitude_ratio};
pub use op::{
    Attention, Epilogue, KvSource, Linear, Op, Param, ParamId, Part, Rope, Rows, Tape, Value, ValueInfo, WeightId,
};
pub use op_learn::{AttentionBackward, Dropout, EmbedLora, HeadLora, Lora, LoraBackward, LoraHidden, Rescale};
pub use plan::{Place, Plan, PlanLimits};
pub use rope::Frequencies;
pub use spec::{Gate, LayerSpec, LinearSpec, RopeSpec, RopeStyle, Spec, WeightRef, Yarn};
pub use timing::Timing;
pub(crate) use timing::Timings;
pub use weights::{Weight, Weights};
