//! Sessions as files: the tokens of a window with their keys and values, so that a conversation goes on without being
//! computed again.
//!
//! Layout, numbers little-endian: `"kinglet\0"`, version (u32), bytes of the header (u32); the header, JSON ([`Header`]);
//! the tokens (u32 each); keys and values as [`KvCache::contents`](crate::cpu::KvCache::contents) has them; the SHA-256 of
//! all before. The header says how long the rest is, so a file has one right length. Nothing is taken over before
//! everything was found right: the lengths, the model's fingerprint, the shapes, the adapters, the tokens, the checksum.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::engine::{Engine, Sequence};
use crate::adapter;
use crate::file::NewFile;
use crate::{Error, Result};

const MAGIC: [u8; 8] = *b"kinglet\0";
const VERSION: u32 = 1;
/// Magic, version and the header's length.
const START: usize = 16;
/// The longest header that is read; most of it is the caller's note.
const MAX_HEADER: usize = 64 << 20;
/// Bytes of a SHA-256.
const CHECKSUM: usize = 32;

/// What a file says of itself.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    /// The model's file, for messages.
    model: String,
    /// [`fingerprint`](adapter::fingerprint) of the model.
    fingerprint: String,
    cache: Shape,
    adapters: Vec<AdapterId>,
    tokens: usize,
    /// From here on, keys and values know of text that has been dropped.
    shifted: Option<usize>,
    /// The caller's own.
    note: String,
}

/// The cache's layout.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shape {
    kv_type: String,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
}

/// An adapter that was in force.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AdapterId {
    /// For messages.
    name: String,
    /// [`identity`](adapter::identity) of the adapter.
    identity: String,
    factor: f32,
}

impl PartialEq for AdapterId {
    fn eq(&self, other: &AdapterId) -> bool {
        self.identity == other.identity && self.factor == other.factor
    }
}

impl Header {
    /// What a file of this engine and so many tokens says.
    fn new(engine: &Engine, tokens: usize, shifted: Option<usize>, note: &str) -> Header {
        let layout = engine.layout();
        let adapters = engine.adapters().iter().map(|(adapter, factor)| AdapterId {
            name: adapter.name.clone(),
            identity: adapter::identity(adapter),
            factor: *factor,
        });
        Header {
            model: engine.model().gguf().name().to_string(),
            fingerprint: adapter::fingerprint(engine.model().gguf()),
            cache: Shape {
                kv_type: layout.dtype.name().to_string(),
                layers: layout.layers,
                kv_heads: layout.kv_heads,
                head_dim: layout.head_dim,
            },
            adapters: adapters.collect(),
            tokens,
            shifted,
            note: note.to_string(),
        }
    }

    /// Why a session of `self` cannot go on in one of `ours`, if it cannot.
    fn misfit(&self, ours: &Header) -> Option<String> {
        if self.fingerprint != ours.fingerprint {
            return Some(format!("it belongs to the model {}, and this is {}; open that one", self.model, ours.model));
        }
        if self.cache != ours.cache {
            return Some(format!(
                "its cache is of {:?}, and this session's of {:?}; open the session with the same type of KV cache",
                self.cache, ours.cache
            ));
        }
        if self.adapters != ours.adapters {
            let list = |adapters: &[AdapterId]| match adapters {
                [] => "none".to_string(),
                all => all.iter().map(|a| format!("{} × {}", a.name, a.factor)).collect::<Vec<_>>().join(", "),
            };
            return Some(format!(
                "it was computed with other adapters ({}) than are in force ({}); set the same",
                list(&self.adapters),
                list(&ours.adapters)
            ));
        }
        None
    }
}

/// A file that is hashed as it grows.
struct Hashed {
    file: NewFile,
    hash: Sha256,
}

impl Hashed {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.file.write(bytes)
    }
}

/// See [`Session::save`](super::Session::save).
pub(super) fn save(engine: &Engine, sequence: &Sequence, note: &str, path: &Path) -> Result<()> {
    let header = serde_json::to_vec(&Header::new(engine, sequence.tokens.len(), sequence.shifted, note))
        .map_err(|e| Error::argument(format!("the session cannot be written: {e}")))?;
    if header.len() > MAX_HEADER {
        return Err(Error::argument(format!("the note of {} bytes is longer than {MAX_HEADER}", note.len())));
    }
    let mut out = Hashed { file: NewFile::create(path)?, hash: Sha256::new() };
    out.write(&MAGIC)?;
    out.write(&VERSION.to_le_bytes())?;
    out.write(&(header.len() as u32).to_le_bytes())?;
    out.write(&header)?;
    out.write(&sequence.tokens.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<u8>>())?;
    engine.contents(sequence, |bytes| out.write(bytes))?;
    let Hashed { mut file, hash } = out;
    file.write(&hash.finalize())?;
    file.finish()
}

/// A file that is hashed as it is read.
struct Reader<'a> {
    path: &'a Path,
    file: BufReader<File>,
    hash: Sha256,
}

impl Reader<'_> {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact(bytes).map_err(Error::io(self.path))?;
        self.hash.update(bytes);
        Ok(())
    }

    fn number(&mut self) -> Result<u32> {
        let mut bytes = [0; 4];
        self.fill(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn error<T>(&self, at: &str, what: impl Into<String>) -> Result<T> {
        Err(Error::Format { file: self.path.display().to_string(), at: at.into(), what: what.into() })
    }
}

/// See [`Session::load`](super::Session::load).
pub(super) fn load(engine: &mut Engine, path: &Path) -> Result<(Sequence, String)> {
    let file = File::open(path).map_err(Error::io(path))?;
    let length = file.metadata().map_err(Error::io(path))?.len();
    let mut file = Reader { path, file: BufReader::with_capacity(1 << 20, file), hash: Sha256::new() };
    let mut magic = [0; MAGIC.len()];
    if length < (START + CHECKSUM) as u64 || file.fill(&mut magic).is_err() || magic != MAGIC {
        return file.error("byte 0", "this is no saved session");
    }
    let version = file.number()?;
    if version != VERSION {
        return file.error("byte 8", format!("it is of version {version}, and {VERSION} can be read"));
    }
    let header_bytes = file.number()? as usize;
    if header_bytes > MAX_HEADER || (START + header_bytes) as u64 > length {
        return file.error("byte 12", format!("a header of {header_bytes} bytes in a file of {length}: it is damaged"));
    }
    let mut header = vec![0; header_bytes];
    file.fill(&mut header)?;
    let header: Header = match serde_json::from_slice(&header) {
        Ok(header) => header,
        Err(e) => return file.error("the header", format!("{e}: it is damaged")),
    };
    if let Some(misfit) = header.misfit(&Header::new(engine, 0, None, "")) {
        return file.error("the header", misfit);
    }
    let window = engine.options().context;
    if header.tokens > window {
        return file.error(
            "the header",
            format!(
                "it holds {} tokens, and the window is of {window}; open the session with a larger context",
                header.tokens
            ),
        );
    }
    let per_token = 4 + engine.layout().position_bytes();
    let right = START + header_bytes + header.tokens * per_token + CHECKSUM;
    if length != right as u64 {
        return file
            .error("its end", format!("it has {length} bytes and should have {right}: it is cut short or damaged"));
    }
    let vocab = engine.model().spec().vocab;
    let mut sequence = engine.sequence();
    for i in 0..header.tokens {
        let token = file.number()?;
        if token as usize >= vocab {
            return file.error(&format!("token {i}"), format!("{token} is outside the vocabulary of {vocab}"));
        }
        sequence.tokens.push(token);
    }
    engine.fill(&mut sequence, |bytes| file.fill(bytes))?;
    sequence.shifted = header.shifted.filter(|from| *from < header.tokens);
    let computed = file.hash.clone().finalize();
    let mut checksum = [0; CHECKSUM];
    file.fill(&mut checksum)?;
    if checksum != *computed {
        return file.error("its end", "the checksum is wrong: it is damaged");
    }
    Ok((sequence, header.note))
}
