//! The engine's one error type. A message names the file, the offset, the key or the tensor at fault, and what to do.

use std::path::{Path, PathBuf};

/// Result with the engine's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong in the engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file operation.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file concerned.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A model file is malformed; `at` names the byte offset, the key or the tensor.
    #[error("{file}: {at}: {what}")]
    Format {
        /// The file, or `<memory>`.
        file: String,
        /// Where: `byte 24`, `key general.alignment`, `tensor blk.0.attn_q.weight`.
        at: String,
        /// What is wrong there and what to do.
        what: String,
    },
    /// Valid, but not something this version can run; the message names what is supported.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// A parameter of the caller's is out of range; the message names it and its range.
    #[error("{0}")]
    Argument(String),
    /// The plan does not fit the memory budget, or the system refused memory.
    #[error("needs {needed} bytes but {available} are available: {what}")]
    Memory {
        /// Bytes the request comes to.
        needed: u64,
        /// Bytes in the budget.
        available: u64,
        /// What they are for and how to need less.
        what: String,
    },
    /// The context window is used up.
    #[error(
        "the context window of {window} tokens is full ({used} used, {asked} more asked for); open the session with a larger context or shorten the input"
    )]
    ContextFull {
        /// The session's window, in tokens.
        window: usize,
        /// Tokens already in the window.
        used: usize,
        /// Tokens that were to be added.
        asked: usize,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// A computation gave a value that cannot be used (NaN or infinite logits).
    #[error("{0}")]
    Numeric(String),
    /// The GPU or its driver failed, was lost or refused memory; what is on the CPU's side is whole.
    #[error("{device}: {what}")]
    Device {
        /// The device's name.
        device: String,
        /// What happened and what to do.
        what: String,
    },
    /// The model's chat template could not be compiled or rendered.
    #[error("chat template: {0}")]
    Template(String),
    /// A grammar, JSON schema or regular expression for the answer is wrong, not supported or too large; the message says
    /// which and where.
    #[error("{0}")]
    Grammar(String),
}

impl Error {
    /// An [`Error::Io`] for `path`; for use in `map_err`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// An [`Error::Argument`].
    pub fn argument(what: impl Into<String>) -> Error {
        Error::Argument(what.into())
    }
}
