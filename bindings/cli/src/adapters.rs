//! Adapters named on the command line: `FILE` or `FILE:SCALE`, where FILE is a GGUF file or a PEFT folder.

use kinglet_engine::session::{Model, ScaledAdapter, Session, SessionOptions};
use std::sync::Arc;

/// Reads one adapter for `model`.
pub fn open(argument: &str, model: &Model) -> anyhow::Result<ScaledAdapter> {
    let (path, scale) = split(argument);
    Ok((Arc::new(kinglet_models::open_adapter(path, model)?), scale))
}

/// A session with all of them in force, which it says.
pub fn session(model: &Model, options: SessionOptions, arguments: &[String]) -> anyhow::Result<Session> {
    let mut session = Session::new(model, &options)?;
    if arguments.is_empty() {
        return Ok(session);
    }
    let adapters = arguments.iter().map(|a| open(a, model)).collect::<anyhow::Result<Vec<_>>>()?;
    let report = session.set_adapters(&adapters)?;
    for ((adapter, scale), tensors) in adapters.iter().zip(&report.tensors) {
        eprintln!("adapter {}: rank {}, {tensors} matrices corrected, factor {scale}", adapter.name, adapter.rank);
    }
    Ok(session)
}

/// Path and factor; a colon that no number follows is part of the path.
fn split(argument: &str) -> (&str, f32) {
    match argument.rsplit_once(':').map(|(path, scale)| (path, scale.parse::<f32>())) {
        Some((path, Ok(scale))) if !path.is_empty() => (path, scale),
        _ => (argument, 1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors() {
        assert_eq!(split("a.gguf"), ("a.gguf", 1.0));
        assert_eq!(split("a.gguf:0.5"), ("a.gguf", 0.5));
        assert_eq!(split("C:\\a.gguf"), ("C:\\a.gguf", 1.0));
        assert_eq!(split("C:\\a.gguf:-2"), ("C:\\a.gguf", -2.0));
    }
}
