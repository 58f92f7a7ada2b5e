//! Model families as data, the catalogue of known models and how they are fetched.

pub mod catalogue;
#[cfg(feature = "pull")]
pub mod pull;
