//! The CPU backend: instruction sets, kernels, the thread team and the loop that runs a tape.

pub mod isa;
pub mod kernels;
