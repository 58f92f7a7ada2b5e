//! Checkpoints: directories that are whole or absent, whatever happens while they are written.
//!
//! `output/checkpoints/step-00000100/` holds the files that the trainer gives (the adapter, the optimizer's tensors, the
//! training state as JSON) and `manifest.json` with the length and the SHA-256 of each. A save writes them into a
//! directory with a temporary name, forces every file and the directory to disk, renames the directory and forces its
//! parent: a reader sees all or nothing. A disk that lies about this, or rots, is found out by the hashes, and
//! [`Checkpoints::latest`] goes back to the newest checkpoint that is whole. Older ones are deleted only behind a
//! successful save, manifest first, so that a half-deleted one is never taken for whole. When a save fails, on a full
//! disk for instance, what was there before is untouched.
//!
//! Tensors are safetensors files ([`encode_tensors`], [`decode_tensors`]).

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

const MANIFEST: &str = "manifest.json";
const TEMPORARY: &str = ".writing-";

/// A tensor with its name.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// The name, unique in its file.
    pub name: String,
    /// The shape, slowest dimension first.
    pub shape: Vec<usize>,
    /// The values, row by row.
    pub values: Values,
}

/// The values of a [`Tensor`].
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// Numbers.
    F32(Vec<f32>),
    /// Codes.
    U8(Vec<u8>),
}

impl Tensor {
    /// A vector of numbers.
    pub fn f32(name: impl Into<String>, values: Vec<f32>) -> Tensor {
        Tensor { name: name.into(), shape: vec![values.len()], values: Values::F32(values) }
    }

    /// A vector of codes.
    pub fn u8(name: impl Into<String>, values: Vec<u8>) -> Tensor {
        Tensor { name: name.into(), shape: vec![values.len()], values: Values::U8(values) }
    }
}

impl View for &Tensor {
    fn dtype(&self) -> Dtype {
        match self.values {
            Values::F32(_) => Dtype::F32,
            Values::U8(_) => Dtype::U8,
        }
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        match &self.values {
            Values::F32(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into(),
            Values::U8(values) => values.as_slice().into(),
        }
    }
    fn data_len(&self) -> usize {
        match &self.values {
            Values::F32(values) => 4 * values.len(),
            Values::U8(values) => values.len(),
        }
    }
}

/// A safetensors file with `tensors` and text `metadata`.
///
/// # Errors
/// [`Error::Argument`] where a shape does not fit its values.
pub fn encode_tensors(tensors: &[Tensor], metadata: &[(&str, String)]) -> Result<Vec<u8>> {
    let metadata: HashMap<String, String> = metadata.iter().map(|(key, text)| ((*key).into(), text.clone())).collect();
    let metadata = (!metadata.is_empty()).then_some(metadata);
    let views = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor));
    safetensors::serialize(views, metadata).map_err(|error| Error::argument(format!("tensors to write: {error}")))
}

/// The tensors of a safetensors file; `file` is for messages.
///
/// # Errors
/// [`Error::Format`] where it is damaged, [`Error::Unsupported`] for types other than F32 and U8.
pub fn decode_tensors(bytes: &[u8], file: &str) -> Result<Vec<Tensor>> {
    let format = |at: String, what: String| Error::Format { file: file.into(), at, what };
    let tensors = SafeTensors::deserialize(bytes)
        .map_err(|error| format("header".into(), format!("not a whole safetensors file: {error}")))?;
    let read = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let values = match view.dtype() {
            Dtype::F32 => {
                Values::F32(view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
            }
            Dtype::U8 => Values::U8(view.data().to_vec()),
            other => return Err(Error::Unsupported(format!("{file}: tensor {name} of type {other:?}"))),
        };
        Ok(Tensor { name, shape: view.shape().to_vec(), values })
    };
    tensors.tensors().into_iter().map(read).collect()
}

/// The checkpoints of a run.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

/// A checkpoint that was read and found whole.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Steps taken when it was written.
    pub step: u64,
    /// Where it is.
    pub path: PathBuf,
    /// The contents of its files by name.
    pub files: BTreeMap<String, Vec<u8>>,
}

impl Checkpoint {
    /// The file called `name`.
    ///
    /// # Errors
    /// [`Error::Format`] where there is none.
    pub fn file(&self, name: &str) -> Result<&[u8]> {
        self.files.get(name).map(Vec::as_slice).ok_or_else(|| damaged(&self.path, name, "the file is missing"))
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    step: u64,
    files: BTreeMap<String, Entry>,
}

#[derive(Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
struct Entry {
    bytes: u64,
    sha256: String,
}

impl Entry {
    fn of(bytes: &[u8]) -> Entry {
        let sha256 = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        Entry { bytes: bytes.len() as u64, sha256 }
    }
}

impl Checkpoints {
    /// The checkpoints in `folder`, which is made by the first save; the newest `keep` (at least 1) are kept.
    pub fn new(folder: impl Into<PathBuf>, keep: usize) -> Checkpoints {
        Checkpoints { folder: folder.into(), keep: keep.max(1) }
    }

    /// Writes the checkpoint of `step` and deletes those that are too many. One of the same step is replaced.
    ///
    /// # Errors
    /// [`Error::Io`] where the disk is full or refuses: earlier checkpoints are untouched then, and nothing is left of
    /// this one. [`Error::Argument`] for a file name that is not a plain one.
    pub fn save(&self, step: u64, files: &[(&str, &[u8])]) -> Result<PathBuf> {
        self.save_with(step, files, write_file)
    }

    /// [`Checkpoints::save`] with its own way to write a file, for tests of disks that fail.
    fn save_with(
        &self,
        step: u64,
        files: &[(&str, &[u8])],
        write: impl Fn(&Path, &[u8]) -> std::io::Result<()>,
    ) -> Result<PathBuf> {
        let plain =
            |name: &str| !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\']) && name != MANIFEST;
        if let Some((name, _)) = files.iter().find(|(name, _)| !plain(name)) {
            return Err(Error::argument(format!("{name:?} is not a name for a file of a checkpoint")));
        }
        fs::create_dir_all(&self.folder).map_err(Error::io(&self.folder))?;
        self.remove_temporary();
        let temporary = self.folder.join(format!("{TEMPORARY}{step:08}"));
        let written = self.write_all(&temporary, step, files, write);
        let target = self.path(step);
        let done = written.and_then(|()| {
            if target.exists() {
                remove(&target)?;
            }
            fs::rename(&temporary, &target).map_err(Error::io(&target))?;
            sync_folder(&self.folder)
        });
        if let Err(error) = done {
            let _ = fs::remove_dir_all(&temporary);
            return Err(error);
        }
        self.prune();
        Ok(target)
    }

    fn write_all(
        &self,
        folder: &Path,
        step: u64,
        files: &[(&str, &[u8])],
        write: impl Fn(&Path, &[u8]) -> std::io::Result<()>,
    ) -> Result<()> {
        fs::create_dir(folder).map_err(Error::io(folder))?;
        let manifest =
            Manifest { step, files: files.iter().map(|(name, bytes)| ((*name).into(), Entry::of(bytes))).collect() };
        let manifest = serde_json::to_string_pretty(&manifest)
            .map_err(|error| Error::argument(format!("the manifest: {error}")))?;
        for (name, bytes) in files.iter().copied().chain([(MANIFEST, manifest.as_bytes())]) {
            let path = folder.join(name);
            write(&path, bytes).map_err(Error::io(&path))?;
        }
        sync_folder(folder)
    }

    /// The newest whole checkpoint, and what is wrong with each newer one. `None` if there is none that is whole.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder cannot be read. That it does not exist is no error.
    pub fn latest(&self) -> Result<(Option<Checkpoint>, Vec<Error>)> {
        self.adopt_temporary();
        let mut skipped = Vec::new();
        for step in self.steps()?.into_iter().rev() {
            match self.load(step) {
                Ok(checkpoint) => return Ok((Some(checkpoint), skipped)),
                Err(error) => skipped.push(error),
            }
        }
        Ok((None, skipped))
    }

    /// The checkpoint of `step`.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Format`] that name the file that is missing or damaged.
    pub fn load(&self, step: u64) -> Result<Checkpoint> {
        load(self.path(step), step)
    }

    /// Gives a checkpoint its name that is whole but for that: whoever replaced one of the same step was stopped in between.
    fn adopt_temporary(&self) {
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let step = name.to_str().and_then(|name| name.strip_prefix(TEMPORARY)).and_then(|step| step.parse().ok());
            if let Some(step) = step
                && !self.path(step).exists()
                && load(entry.path(), step).is_ok()
            {
                // If it cannot be renamed, it is no checkpoint, as before.
                let _ = fs::rename(entry.path(), self.path(step));
            }
        }
    }

    /// The steps that there are checkpoints of, ascending; whether they are whole is not looked at.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder cannot be read. That it does not exist is no error.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(Error::io(&self.folder))?,
        };
        let mut steps = Vec::new();
        for entry in entries {
            let name = entry.map_err(Error::io(&self.folder))?.file_name();
            steps.extend(name.to_str().and_then(|name| name.strip_prefix("step-")).and_then(|n| n.parse::<u64>().ok()));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("step-{step:08}"))
    }

    /// Deletes the oldest beyond `keep`. That one cannot be deleted is no reason to stop training.
    fn prune(&self) {
        let steps = self.steps().unwrap_or_default();
        for step in steps.iter().rev().skip(self.keep) {
            let _ = remove(&self.path(*step));
        }
    }

    /// What a run that was killed while writing left behind.
    fn remove_temporary(&self) {
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// The checkpoint of `step` in the folder `path`.
fn load(path: PathBuf, step: u64) -> Result<Checkpoint> {
    let read = |name: &str| {
        let file = path.join(name);
        fs::read(&file).map_err(Error::io(file))
    };
    let manifest: Manifest =
        serde_json::from_slice(&read(MANIFEST)?).map_err(|error| damaged(&path, MANIFEST, &error.to_string()))?;
    if manifest.step != step {
        return Err(damaged(&path, MANIFEST, &format!("it is the manifest of step {}", manifest.step)));
    }
    let mut files = BTreeMap::new();
    for (name, entry) in manifest.files {
        let bytes = read(&name)?;
        if Entry::of(&bytes) != entry {
            return Err(damaged(&path, &name, "its length or SHA-256 is not what the manifest says"));
        }
        files.insert(name, bytes);
    }
    Ok(Checkpoint { step, path, files })
}

fn damaged(path: &Path, name: &str, what: &str) -> Error {
    Error::Format {
        file: path.display().to_string(),
        at: name.into(),
        what: format!("{what}; the checkpoint is damaged"),
    }
}

/// Deletes a checkpoint, manifest first: what remains if this is interrupted is seen not to be whole.
fn remove(path: &Path) -> Result<()> {
    let _ = fs::remove_file(path.join(MANIFEST));
    fs::remove_dir_all(path).map_err(Error::io(path))
}

fn write_file(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Forces a folder's entries to disk, where the system has a way to.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) { File::open(folder).and_then(|file| file.sync_all()).map_err(Error::io(folder)) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
