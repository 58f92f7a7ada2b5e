//! Kinglet as a contender: a session over a mapped model, nothing else.

use std::path::Path;

use crate::contender::Contender;

/// Opens `path` and makes a session for `context` tokens on `threads` threads.
pub fn open(path: &Path, threads: usize, context: usize) -> anyhow::Result<Box<dyn Contender>> {
    let _ = (path, threads, context);
    anyhow::bail!("not yet")
}
