//! The CPU backend: instruction sets, kernels, the thread team and the loop that runs a tape.

mod buffer;
mod executor;
pub mod isa;
pub mod kernels;
mod kv;
mod matrix;
mod ops;
mod ops_head;
mod ops_learn;
mod ops_loss;
mod ops_weights;
mod patch;
mod pool;
pub mod roof;
mod timing;

pub use buffer::Buffer;
pub use executor::{Arithmetic, Batch, Executor, ExecutorNeeds, ExecutorOptions, Learning, Segment};
pub use kv::{KvCache, KvLayout, PAGE};
pub use patch::{Correction, Patches};
pub use pool::{Pool, Team};
pub use timing::Timing;
