//! The KV cache of one sequence: keys and values of every layer, in pages of a fixed number of positions.
//!
//! A page holds `[layer][K, V][kv_head][PAGE][head_dim]`, so that the keys of one head lie together and a head streams
//! whole pages. Pages are allocated when they are first needed and shared between forks of a sequence until one of them
//! writes (copy on write), which makes a common prompt cost its memory once.

use std::sync::Arc;

use super::buffer::Buffer;
use super::kernels::attention::kv_row_bytes;
use crate::quant::DType;
use crate::tape::Spec;
use crate::{Error, Result};

/// Positions per page.
pub const PAGE: usize = 128;

/// Sizes and offsets inside a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Element type.
    pub dtype: DType,
    /// Layers.
    pub layers: usize,
    /// Heads of keys and of values.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Bytes of one head's vector at one position.
    pub row_bytes: usize,
}

impl KvLayout {
    /// The layout for a model.
    ///
    /// # Errors
    /// A type that attention does not read, or heads whose width is no multiple of its block.
    pub fn new(spec: &Spec, dtype: DType) -> Result<KvLayout> {
        let row_bytes = kv_row_bytes(dtype, spec.head_dim).ok_or_else(|| {
            Error::argument(format!(
                "a KV cache of type {dtype} is not possible with heads of {} elements; choose F16, F32 or, for heads of \
                 a multiple of 32, Q8_0",
                spec.head_dim
            ))
        })?;
        Ok(KvLayout { dtype, layers: spec.layers.len(), kv_heads: spec.kv_heads, head_dim: spec.head_dim, row_bytes })
    }

    /// Bytes of the keys (or values) of one head in one page: from one head to the next.
    pub fn head_stride(&self) -> usize {
        PAGE * self.row_bytes
    }

    /// Offset of the keys of `layer`'s first head in a page.
    pub fn k_offset(&self, layer: usize) -> usize {
        2 * layer * self.kv_heads * self.head_stride()
    }

    /// Offset of the values of `layer`'s first head in a page.
    pub fn v_offset(&self, layer: usize) -> usize {
        (2 * layer + 1) * self.kv_heads * self.head_stride()
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        2 * self.layers * self.kv_heads * self.head_stride()
    }

    /// Bytes of a cache that holds `positions`.
    pub fn bytes(&self, positions: usize) -> usize {
        positions.div_ceil(PAGE).saturating_mul(self.page_bytes())
    }
}

/// The cache of one sequence.
#[derive(Clone, Debug)]
pub struct KvCache {
    layout: KvLayout,
    pages: Vec<Arc<Buffer>>,
    len: usize,
}

impl KvCache {
    /// An empty cache.
    pub fn new(layout: KvLayout) -> KvCache {
        KvCache { layout, pages: Vec::new(), len: 0 }
    }

    /// Its layout.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes in use, pages shared with forks included.
    pub fn bytes(&self) -> usize {
        self.pages.len() * self.layout.page_bytes()
    }

    /// Forgets all positions from `len` on; whole pages behind it are given back.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.pages.truncate(self.len.div_ceil(PAGE));
    }

    /// Makes room for positions up to `len`, and pages that will be written this sequence's own.
    ///
    /// # Errors
    /// [`Error::Memory`]; what is held is kept.
    pub(super) fn reserve(&mut self, len: usize) -> Result<()> {
        const WHAT: &str = "the KV cache";
        while self.pages.len() < len.div_ceil(PAGE) {
            self.pages.push(Arc::new(Buffer::new(self.layout.page_bytes(), WHAT)?));
        }
        for page in &mut self.pages[self.len / PAGE..] {
            if Arc::get_mut(page).is_none() {
                *page = Arc::new(page.try_clone(WHAT)?);
            }
        }
        Ok(())
    }

    /// Counts `n` positions as held, after a run wrote them.
    pub(super) fn advance(&mut self, n: usize) {
        self.len += n;
    }

    /// The pages' addresses, first to last.
    pub(super) fn page_pointers(&self) -> impl Iterator<Item = *const u8> + '_ {
        self.pages.iter().map(|p| p.as_ptr().cast_const())
    }
}
