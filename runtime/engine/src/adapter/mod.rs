//! Low-rank adapters: small trained corrections to the matrices of a base model that stays as it is.
//!
//! An [`Adapter`] holds, by the name of the matrix in the GGUF file, two thin matrices `A` `[r, in]` and `B` `[out, r]`
//! that stand for `ΔW = s·B·A` (LoRA, <https://arxiv.org/abs/2106.09685>), and with a magnitude `m` `[out]` for
//! `ΔW = m/‖W + s·B·A‖ ∘ (W + s·B·A) − W`, norms taken over each output's row (DoRA, <https://arxiv.org/abs/2402.09353>).
//! `s` is `alpha/r`, or `alpha/√r` for rank-stabilised adapters. A caller's own factor multiplies `ΔW`, so adapters of
//! both kinds add up and 0 is the base model.
//!
//! | file | what |
//! | --- | --- |
//! | `lora` | the adapter itself, its checks, `ΔW` row by row |
//! | `fingerprint` | which base model an adapter belongs to |
//! | `gguf` | GGUF files as llama.cpp reads and writes them |
//! | `merge` | a new model file with the adapters inside |
//!
//! Values come from files, so nothing here indexes, and everything is checked before it is used. Sessions apply adapters
//! without touching the weights ([`Session::set_adapters`](crate::session::Session::set_adapters)); the names and
//! layouts of other programs' adapters are known in `kinglet-models`.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod fingerprint;
mod gguf;
mod lora;
mod merge;
#[cfg(test)]
mod tests;

pub use fingerprint::{fingerprint, identity};
pub(crate) use lora::RowDelta;
pub use lora::{Adapter, BaseId, LowRank, MAX_RANK};
pub use merge::{Merged, merge};
