//! What a user means by a model argument: a short name, a file, or a file of the hub.
//!
//! | written | means |
//! | --- | --- |
//! | `smollm2` | a model of the catalogue |
//! | `./x.gguf`, `/data/x.gguf`, any existing path | that file |
//! | `owner/repo/file.gguf` (no such local file) | that file of the hub |
//! | `owner/repo:Q4_K_M` | the file of that repository with the tag in its name |
//! | `owner/repo` | the same with the tag `Q4_K_M` |

use super::PullError;
use crate::catalogue::{self, KnownModel};
use std::fmt;
use std::path::{Path, PathBuf};

/// What a model argument stands for.
#[derive(Clone, Debug)]
pub enum Resolved {
    /// A model of the catalogue.
    Known(&'static KnownModel),
    /// A file that exists.
    File(PathBuf),
    /// A file of the Hugging Face hub.
    Hub(HubSpec),
}

/// A file of the Hugging Face hub. Its parts hold no `..`, no empty and no absolute component.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubSpec {
    /// `owner/name`.
    pub repo: String,
    /// Which file.
    pub file: HubFile,
}

/// How a file of a repository is chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HubFile {
    /// By its path.
    Path(String),
    /// By a tag in its name, such as `Q4_K_M`.
    Tag(String),
}

impl fmt::Display for HubSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            HubFile::Path(path) => write!(f, "{}/{path}", self.repo),
            HubFile::Tag(tag) => write!(f, "{}:{tag}", self.repo),
        }
    }
}

/// The tag taken when none is given.
const DEFAULT_TAG: &str = "Q4_K_M";

/// Finds out what `text` stands for.
///
/// # Errors
/// [`PullError::Unknown`] with the known names, and the close ones first, when it stands for nothing.
pub fn resolve(text: &str) -> Result<Resolved, PullError> {
    if let Some(model) = catalogue::find(text) {
        return Ok(Resolved::Known(model));
    }
    let path = Path::new(text);
    if path.is_file() {
        return Ok(Resolved::File(path.to_path_buf()));
    }
    if path.is_dir() {
        return Err(PullError::Unknown(format!("{text} is a directory; name the .gguf file in it")));
    }
    if let Some(spec) = hub_spec(text) {
        return Ok(Resolved::Hub(spec));
    }
    if text.ends_with(".gguf") || text.contains(['/', '\\']) || text.starts_with('.') {
        return Err(PullError::Unknown(format!("{text}: no such file")));
    }
    let ids: Vec<&str> = catalogue::KNOWN.iter().map(|m| m.id).collect();
    let close = catalogue::close_matches(text);
    let hint = if close.is_empty() { ".".into() } else { format!("; did you mean {}?", close.join(" or ")) };
    Err(PullError::Unknown(format!(
        "no model is called {text:?}{hint} Known names: {}. A path to a .gguf file, owner/repo/file.gguf or \
         owner/repo:Q4_K_M of the Hugging Face hub also work.",
        ids.join(", ")
    )))
}

/// `text` as a name of a hub file, if it has the shape of one.
fn hub_spec(text: &str) -> Option<HubSpec> {
    let (text, tag) = match text.split_once(':') {
        Some((left, tag)) => (left, Some(tag)),
        None => (text, None),
    };
    let words: Vec<&str> = text.split('/').collect();
    let [owner, name, rest @ ..] = words.as_slice() else { return None };
    if !words.iter().all(|w| safe_component(w)) {
        return None;
    }
    let file = match (rest, tag) {
        ([], Some(tag)) if safe_component(tag) => HubFile::Tag(tag.into()),
        ([], None) if !name.ends_with(".gguf") => HubFile::Tag(DEFAULT_TAG.into()),
        ([_, ..], None) if text.ends_with(".gguf") => HubFile::Path(rest.join("/")),
        _ => return None,
    };
    Some(HubSpec { repo: format!("{owner}/{name}"), file })
}

/// Whether `word` can be one component of a path below the cache, on every platform.
pub(super) fn safe_component(word: &str) -> bool {
    !word.is_empty()
        && !word.starts_with('.')
        && !word.ends_with('.')
        && word.chars().all(|c| c.is_alphanumeric() || "-_.+@ ".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(text: &str) -> Option<(String, HubFile)> {
        hub_spec(text).map(|s| (s.repo, s.file))
    }

    #[test]
    fn hub_names() {
        let path = |p: &str| HubFile::Path(p.into());
        let tag = |t: &str| HubFile::Tag(t.into());
        assert_eq!(hub("a/b/c.gguf"), Some(("a/b".into(), path("c.gguf"))));
        assert_eq!(hub("a/b/sub/c.gguf"), Some(("a/b".into(), path("sub/c.gguf"))));
        assert_eq!(hub("a/b:Q8_0"), Some(("a/b".into(), tag("Q8_0"))));
        assert_eq!(hub("a/b"), Some(("a/b".into(), tag("Q4_K_M"))));
        for wrong in
            ["a", "a/b.gguf", "a/b/c", "/a/b.gguf", "a/../b.gguf", "a//b.gguf", "../a/b.gguf", "a/b:", "C:\\x\\y.gguf"]
        {
            assert_eq!(hub(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn known_names_in_any_case() {
        assert!(matches!(resolve("SmolLM2"), Ok(Resolved::Known(m)) if m.id == "smollm2"));
    }

    #[test]
    fn unknown_names_are_answered_with_the_known_ones() {
        let e = resolve("smolm2").unwrap_err().to_string();
        assert!(e.contains("did you mean smollm2?") && e.contains("qwen2.5-coder"), "{e}");
        let e = resolve("zzz").unwrap_err().to_string();
        assert!(e.contains("\"zzz\". Known names: smollm2"), "{e}");
        let e = resolve("./missing.gguf").unwrap_err().to_string();
        assert_eq!(e, "./missing.gguf: no such file");
    }
}
