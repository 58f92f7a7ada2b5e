//! From the name of a model to its file.

use std::path::{Path, PathBuf};

use kinglet_models::catalogue;
use kinglet_models::pull::Cache;

/// The file `text` names: a path, or a known model that `kinglet pull` has put into the cache.
///
/// # Errors
/// A text for people, with the remedy.
pub fn file(text: &str) -> Result<PathBuf, String> {
    if Path::new(text).is_file() {
        return Ok(text.into());
    }
    let known = catalogue::find(text).ok_or_else(|| format!("{text}: no such file and no known model"))?;
    let cache = Cache::from_env().map_err(|e| e.to_string())?;
    cache.have(known).ok_or_else(|| format!("{text} is not in the cache: run `kinglet pull {text}` first"))
}
