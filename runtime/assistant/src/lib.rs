//! What is built around the runtime: measuring a model, for now.

pub mod eval;
