//! Model families as data, the catalogue of known models with `pull`, and tiny random models for tests.

pub mod catalogue;
#[cfg(feature = "pull")]
pub mod pull;
pub mod tiny;
