//! Models in several files.
//!
//! Each shard is a GGUF file of its own, named `…-00001-of-00003.gguf`, with the keys `split.no` (its place, from 0),
//! `split.count` (shards in all) and `split.tensors.count` (tensors in all shards). The first carries the model's
//! metadata. A model may be opened by the path of any shard; the others' names follow from it, and each shard must be
//! the one that its name says: a shard that is missing, is there twice, stands in another's place or links back to an
//! earlier one is refused.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::limits::MAX_SHARDS;
use super::metadata::Metadata;
use super::tensor::TensorInfo;
use crate::{Error, Result};

const KEY_NO: &str = "split.no";
const KEY_COUNT: &str = "split.count";
const KEY_TENSORS: &str = "split.tensors.count";

/// What a shard's metadata says of the split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Split {
    /// The shard's place, from 0.
    pub(super) no: u64,
    /// Shards in all, at least 2.
    pub(super) count: u64,
    /// Tensors in all shards.
    tensors: Option<u64>,
}

impl Split {
    /// Reads the keys; `None` where the file is a whole model.
    pub(super) fn of(metadata: &Metadata) -> Result<Option<Split>> {
        let count = metadata.opt_u64(KEY_COUNT)?.unwrap_or(0);
        if count <= 1 {
            return Ok(None);
        }
        if count > MAX_SHARDS {
            return Err(metadata.error(KEY_COUNT, format!("{count} is more than the limit of {MAX_SHARDS} files")));
        }
        let no = metadata.u64(KEY_NO)?;
        if no >= count {
            return Err(metadata.error(KEY_NO, format!("is {no}, but there are {count} files, numbered from 0")));
        }
        Ok(Some(Split { no, count, tensors: metadata.opt_u64(KEY_TENSORS)? }))
    }

    /// Checks that the shard at place `no` of this split says so itself.
    pub(super) fn check(&self, metadata: &Metadata, no: u64) -> Result<()> {
        let same_model = |s: &Split| s.count == self.count && s.tensors == self.tensors;
        match Split::of(metadata)? {
            Some(s) if s.no == no && same_model(&s) => Ok(()),
            Some(s) if same_model(&s) => Err(metadata.error(
                KEY_NO,
                format!(
                    "this file stands in place {} of {} but is part {}: a copy of or a link to another part; download this part again",
                    no.saturating_add(1),
                    self.count,
                    s.no.saturating_add(1)
                ),
            )),
            _ => Err(metadata.error(
                KEY_COUNT,
                format!(
                    "this file is no part of the same model in {} files; download all parts of one model into one folder",
                    self.count
                ),
            )),
        }
    }

    /// The paths of all shards, from the path of this one.
    pub(super) fn paths(&self, path: &Path, metadata: &Metadata) -> Result<Vec<PathBuf>> {
        let parsed = path.file_name().and_then(|n| n.to_str()).and_then(parse_name);
        let Some((prefix, place)) =
            parsed.and_then(|(prefix, place, count)| (count == self.count).then_some((prefix, place)))
        else {
            return Err(metadata.error(
                KEY_COUNT,
                format!(
                    "this is part {} of a model in {} files, so its name must end in -{:05}-of-{:05}.gguf for the others to be found; restore the names",
                    self.no.saturating_add(1),
                    self.count,
                    self.no.saturating_add(1),
                    self.count
                ),
            ));
        };
        self.check(metadata, place.saturating_sub(1))?;
        Ok((1..=self.count)
            .map(|i| path.with_file_name(format!("{prefix}-{i:05}-of-{:05}.gguf", self.count)))
            .collect())
    }

    /// Checks the tensors of all shards together; `file_of` gives the name of a shard's file.
    pub(super) fn check_tensors<'a>(
        &self,
        metadata: &Metadata,
        tensors: &[TensorInfo],
        file_of: impl Fn(usize) -> &'a str,
    ) -> Result<()> {
        let mut seen: HashMap<&str, usize> = HashMap::with_capacity(tensors.len());
        for t in tensors {
            if let Some(first) = seen.insert(&t.name, t.shard) {
                return Err(Error::Format {
                    file: file_of(t.shard).into(),
                    at: format!("tensor {}", t.name),
                    what: format!("is in {} too; download all parts of one model into one folder", file_of(first)),
                });
            }
        }
        match self.tensors {
            Some(n) if n != tensors.len() as u64 => Err(metadata.error(
                KEY_TENSORS,
                format!("is {n}, but the {} files have {} tensors; download them again", self.count, tensors.len()),
            )),
            _ => Ok(()),
        }
    }
}

/// Takes `prefix-00002-of-00003.gguf` apart into `("prefix", 2, 3)`.
fn parse_name(name: &str) -> Option<(&str, u64, u64)> {
    let digits = |s: &str| (s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse().ok()).flatten();
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (prefix, place) = rest.rsplit_once('-')?;
    let (place, count): (u64, u64) = (digits(place)?, digits(count)?);
    (1..=count).contains(&place).then_some((prefix, place, count))
}

#[cfg(test)]
mod tests {
    use super::parse_name;

    #[test]
    fn names() {
        assert_eq!(parse_name("a-b-00002-of-00003.gguf"), Some(("a-b", 2, 3)));
        assert_eq!(parse_name("-00001-of-00001.gguf"), Some(("", 1, 1)));
        for bad in [
            "a.gguf",
            "a-00000-of-00003.gguf",
            "a-00004-of-00003.gguf",
            "a-1-of-3.gguf",
            "a-0000x-of-00003.gguf",
            "a-+0001-of-00003.gguf",
            "a-00001-of-00003.bin",
            "00001-of-00003.gguf",
        ] {
            assert_eq!(parse_name(bad), None, "{bad}");
        }
    }
}
