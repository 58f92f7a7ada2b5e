//! The CPU backend: instruction sets, kernels, the thread team and the loop that runs a tape.

mod buffer;
mod executor;
mod fusion;
pub mod isa;
pub mod kernels;
mod kv;
mod matrix;
pub mod measure;
mod ops;
mod ops_head;
mod ops_learn;
mod ops_loss;
mod ops_weights;
mod patch;
mod pool;
pub mod roof;

pub use buffer::Buffer;
pub use executor::{Arithmetic, Executor, ExecutorNeeds, ExecutorOptions};
pub use kv::{KvCache, KvLayout, PAGE};
pub use patch::{Correction, Patches};
pub use pool::{Pool, Team};
