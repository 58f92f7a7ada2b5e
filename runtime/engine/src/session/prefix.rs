//! Sequences that are kept because the next prompt may begin as they do: a system prompt is computed once for all chats.
//!
//! Pages of keys and values are shared, not copied, so a kept sequence costs the pages that nobody else holds. An entry
//! belongs to a model, a type of cache, an arithmetic and a set of adapters: whoever asks with others finds nothing. Of
//! all entries the one with the longest common start wins; when the limit is passed, the one that was not asked for the
//! longest time goes.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::adapters::{self, ScaledAdapter};
use super::{Arithmetic, Model, Sequence};
use crate::quant::DType;

/// A store of computed sequences, bounded in bytes; see [`SessionOptions::prefix_cache`]. Cloning shares it: sessions
/// that are to profit from each other get clones of one.
///
/// [`SessionOptions::prefix_cache`]: super::SessionOptions::prefix_cache
#[derive(Clone, Debug)]
pub struct PrefixCache {
    inner: Arc<Mutex<Store>>,
}

#[derive(Debug)]
struct Store {
    limit: u64,
    /// The least recently used first.
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    origin: Origin,
    sequence: Sequence,
}

/// What keys and values were computed with.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    pub model: Model,
    pub kv_type: DType,
    pub arithmetic: Arithmetic,
    pub adapters: Arc<[ScaledAdapter]>,
    /// The engine's number, where its caches are of no use to another but its forks: on a GPU.
    pub owner: Option<u64>,
}

impl Origin {
    fn is(&self, other: &Origin) -> bool {
        self.model.is(&other.model)
            && self.kv_type == other.kv_type
            && self.arithmetic == other.arithmetic
            && adapters::same(&self.adapters, &other.adapters)
            && self.owner == other.owner
    }
}

impl PrefixCache {
    /// A store of at most `limit` bytes of keys and values, pages that sessions hold as well included.
    pub fn new(limit: u64) -> PrefixCache {
        PrefixCache { inner: Arc::new(Mutex::new(Store { limit, entries: Vec::new() })) }
    }

    /// Sequences held.
    pub fn len(&self) -> usize {
        self.lock().entries.len()
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of keys and values held, each page once.
    pub fn bytes(&self) -> u64 {
        self.lock().bytes()
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.lock().entries.clear();
    }

    /// The longest common start of `tokens` and a kept sequence, if it is longer than `than`.
    pub(super) fn find(&self, origin: &Origin, tokens: &[u32], than: usize) -> Option<Sequence> {
        let mut store = self.lock();
        let fitting = store.entries.iter().enumerate().filter(|(_, entry)| entry.origin.is(origin));
        let lengths = fitting.map(|(i, entry)| (entry.sequence.common_prefix(tokens), i));
        let (length, at) = lengths.max()?;
        if length <= than {
            return None;
        }
        store.touch(at);
        let mut sequence = store.entries.last()?.sequence.clone();
        sequence.truncate(length);
        Some(sequence)
    }

    /// Keeps `sequence`, in place of those that it begins with.
    pub(super) fn keep(&self, origin: &Origin, sequence: &Sequence) {
        let mut store = self.lock();
        let tokens = sequence.tokens();
        let holds = |entry: &Entry| entry.origin.is(origin) && entry.sequence.tokens().starts_with(tokens);
        if let Some(at) = store.entries.iter().position(holds) {
            return store.touch(at);
        }
        store.entries.retain(|entry| !(entry.origin.is(origin) && tokens.starts_with(entry.sequence.tokens())));
        store.entries.push(Entry { origin: origin.clone(), sequence: sequence.clone() });
        while store.bytes() > store.limit {
            store.entries.remove(0);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Store> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// Makes an entry the last that goes.
    fn touch(&mut self, at: usize) {
        self.entries[at..].rotate_left(1);
    }

    fn bytes(&self) -> u64 {
        let mut seen = HashSet::new();
        let pages = self.entries.iter().flat_map(|entry| entry.sequence.cache.pages());
        pages.filter(|(page, _)| seen.insert(*page)).map(|(_, bytes)| bytes as u64).sum()
    }
}
