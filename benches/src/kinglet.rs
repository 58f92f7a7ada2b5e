//! Kinglet as a contender: a session over a mapped model, nothing else.

use std::path::Path;

use kinglet_engine::gguf::{Gguf, TensorInfo};
use kinglet_engine::session::{Session, SessionOptions};

use crate::contender::Contender;

/// A session with its number of threads.
pub struct KingletContender {
    session: Session,
    threads: usize,
}

/// Opens `path` and makes a session for `context` tokens on `threads` threads.
pub fn open(path: &Path, threads: usize, context: usize) -> anyhow::Result<KingletContender> {
    let model = kinglet_models::open(path)?;
    let options = SessionOptions { context, threads, ..SessionOptions::default() };
    Ok(KingletContender { session: Session::new(&model, &options)?, threads })
}

impl Contender for KingletContender {
    fn name(&self) -> String {
        format!("Kinglet ({} threads)", self.threads)
    }

    fn reset(&mut self) -> anyhow::Result<()> {
        self.session.reset();
        Ok(())
    }

    fn feed(&mut self, tokens: &[u32]) -> anyhow::Result<()> {
        std::hint::black_box(self.session.feed(tokens)?);
        Ok(())
    }

    fn vocabulary(&self) -> usize {
        self.session.model().spec().vocab
    }
}

/// Bytes of weights one decoded token reads: every tensor once, except that an embedding with a separate output head
/// gives up a single row.
pub fn bytes_per_token(path: &Path) -> anyhow::Result<u64> {
    let gguf = Gguf::open(path)?;
    let untied = gguf.tensor("output.weight").is_some();
    let bytes = |tensor: &TensorInfo| match tensor.name.as_str() {
        "token_embd.weight" if untied => tensor.len_bytes() / tensor.rows().max(1),
        _ => tensor.len_bytes(),
    };
    Ok(gguf.tensors().iter().map(|tensor| bytes(tensor) as u64).sum())
}
