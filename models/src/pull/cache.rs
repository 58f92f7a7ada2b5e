//! Where models live on disk, and the lock that lets two pulls of one model meet safely.
//!
//! ```text
//! HOME/models/ID.gguf                 a model of the catalogue, whole and verified
//! HOME/models/OWNER/REPO/FILE.gguf    a file of the hub
//! HOME/partial/ID.gguf                a growing prefix of the former
//! HOME/partial/ID.lock                held (by the operating system) while a process pulls ID
//! HOME/partial/ID/                    work of the pull under way: wheels, pip's temporary files
//! HOME/tuning/                        times of GPUs' kernels, which the command line has kept there
//! ```
//! A file under `models/` got there by a rename and is therefore complete. HOME is `$KINGLET_HOME`, else the platform's
//! cache directory: `$XDG_CACHE_HOME/kinglet`, `~/.cache/kinglet`, `~/Library/Caches/kinglet`, `%LOCALAPPDATA%\kinglet`.

use super::{Progress, PullError};
use crate::catalogue::{self, KnownModel};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The directory of pulled models.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

/// A model file in the cache.
#[derive(Clone, Debug)]
pub struct Cached {
    /// What to call it on the command line: a short name, or `owner/repo/file.gguf`.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// Its size, in bytes.
    pub bytes: u64,
}

impl Cache {
    /// The cache the environment asks for; see the module's first lines.
    ///
    /// # Errors
    /// When no variable names a home directory.
    pub fn from_env() -> Result<Cache, PullError> {
        let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let root = var("KINGLET_HOME").or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("kinglet"))).or_else(|| {
            if cfg!(windows) {
                var("LOCALAPPDATA").map(|d| d.join("kinglet"))
            } else if cfg!(target_vendor = "apple") {
                var("HOME").map(|d| d.join("Library/Caches/kinglet"))
            } else {
                var("HOME").map(|d| d.join(".cache/kinglet"))
            }
        });
        root.map(Cache::at).ok_or_else(|| {
            PullError::Unsupported("no home directory is set: set KINGLET_HOME to a directory for models".into())
        })
    }

    /// The cache under `root`, which need not exist yet.
    pub fn at(root: impl Into<PathBuf>) -> Cache {
        Cache { root: root.into() }
    }

    /// Its directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the file of a known model is or will be.
    pub fn model_path(&self, model: &KnownModel) -> PathBuf {
        self.root.join("models").join(format!("{}.gguf", model.id))
    }

    /// Where a file of the hub is or will be. `repo` and `file` are checked parts (see [`super::HubSpec`]).
    pub(super) fn hub_path(&self, repo: &str, file: &str) -> PathBuf {
        let mut path = self.root.join("models");
        path.extend(repo.split('/'));
        path.extend(file.split('/'));
        path
    }

    pub(super) fn partial(&self) -> PathBuf {
        self.root.join("partial")
    }

    /// The known model's file, if it is there at its full size.
    pub fn have(&self, model: &KnownModel) -> Option<PathBuf> {
        let path = self.model_path(model);
        let whole = fs::metadata(&path).is_ok_and(|m| m.is_file() && m.len() == model.bytes);
        whole.then_some(path)
    }

    /// Every model file in the cache, by name.
    ///
    /// # Errors
    /// When a directory cannot be read; an absent cache is empty.
    pub fn list(&self) -> Result<Vec<Cached>, PullError> {
        let models = self.root.join("models");
        let mut found = Vec::new();
        let mut pending = vec![models.clone()];
        while let Some(dir) = pending.pop() {
            let entries = match fs::read_dir(&dir) {
                Ok(entries) => entries,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(PullError::io(&dir, 0)(e)),
            };
            for entry in entries {
                let path = entry.map_err(PullError::io(&dir, 0))?.path();
                let meta = fs::metadata(&path).map_err(PullError::io(&path, 0))?;
                if meta.is_dir() {
                    pending.push(path);
                } else if path.extension().is_some_and(|e| e == "gguf") {
                    let relative = path.strip_prefix(&models).unwrap_or(&path);
                    let name = relative.iter().map(|p| p.to_string_lossy()).collect::<Vec<_>>().join("/");
                    let id = name.strip_suffix(".gguf").and_then(catalogue::find).map(|m| m.id.to_string());
                    found.push(Cached { name: id.unwrap_or(name), bytes: meta.len(), path });
                }
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Takes the lock for `name`, waiting for another process that has it. The lock ends with the returned file, and with
    /// the process, however that ends.
    pub(super) fn lock(&self, name: &str, progress: &mut dyn Progress) -> Result<File, PullError> {
        let dir = self.partial();
        fs::create_dir_all(&dir).map_err(PullError::io(&dir, 0))?;
        let path = dir.join(format!("{name}.lock"));
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(PullError::io(&path, 0))?;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => {
                    if !std::mem::replace(&mut told, true) {
                        progress.message(&format!("another process is fetching {name}; waiting for it"));
                    }
                    if progress.cancelled() {
                        return Err(PullError::Cancelled);
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
                // A file system without locks: go on, the rename at the end is still atomic.
                Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => return Ok(file),
                Err(TryLockError::Error(e)) => return Err(PullError::io(&path, 0)(e)),
            }
        }
    }
}
