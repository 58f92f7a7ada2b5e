//! The KV cache of one sequence: keys and values of every layer, in pages of a fixed number of positions.
//!
//! A page holds `[layer][K, V][kv_head][PAGE][head_dim]`, so that the keys of one head lie together and a head streams
//! whole pages. Pages are allocated when they are first needed and shared between forks of a sequence until one of them
//! writes (copy on write), which makes a common prompt cost its memory once.

use std::sync::Arc;

use super::buffer::Buffer;
use super::isa::Isa;
use super::kernels::attention::{kv_row_bytes, store_kv};
use super::kernels::rope;
use crate::quant::{self, DType};
use crate::tape::{Frequencies, Spec, check_dropped};
use crate::{Error, Result};

/// Positions per page.
pub const PAGE: usize = 128;
/// What pages are for, in messages.
const WHAT: &str = "the KV cache";

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

    /// Bytes of the keys and values of one position.
    pub fn position_bytes(&self) -> usize {
        self.page_bytes() / PAGE
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
        while self.pages.len() < len.div_ceil(PAGE) {
            self.pages.push(Arc::new(Buffer::new(self.layout.page_bytes(), WHAT)?));
        }
        self.own(self.len / PAGE)
    }

    /// Makes all pages from page `first` on this sequence's own.
    fn own(&mut self, first: usize) -> Result<()> {
        for page in &mut self.pages[first..] {
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

    /// An identity and the bytes of every page, first to last.
    pub fn page_sizes(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.pages.iter().map(|p| (Arc::as_ptr(p) as usize, self.layout.page_bytes()))
    }

    /// The bytes of what is held: page after page, in each `[layer][K, V][kv_head]`, of each head the positions that are
    /// held of the page.
    pub fn contents(&self) -> impl Iterator<Item = &[u8]> + '_ {
        (0..self.pages.len()).flat_map(|page| self.page_contents(page))
    }

    /// Of [`KvCache::contents`] what is in page `index`, if there is such a page.
    pub fn page_contents(&self, index: usize) -> impl Iterator<Item = &[u8]> + '_ {
        // A run that was stopped may have left pages that hold nothing.
        let held = self.len.saturating_sub(index * PAGE).min(PAGE) * self.layout.row_bytes;
        let bytes = self.pages.get(index).map(|page| page.bytes()).unwrap_or_default();
        bytes.chunks_exact(self.layout.head_stride()).map(move |head| &head[..held])
    }

    /// Holds `len` positions in place of what it holds; `read` is to fill their bytes, which come as
    /// [`KvCache::contents`] gives them.
    ///
    /// # Errors
    /// [`Error::Memory`], and what `read` says; nothing is held then.
    pub fn fill(&mut self, len: usize, mut read: impl FnMut(&mut [u8]) -> Result<()>) -> Result<()> {
        self.truncate(0);
        (0..len.div_ceil(PAGE)).try_for_each(|page| self.fill_page(page, len, &mut read))
    }

    /// Of [`KvCache::fill`] what is in page `index`. Pages come in order, to a cache that holds nothing; it holds `len`
    /// positions when the last one has come.
    ///
    /// # Errors
    /// As [`KvCache::fill`].
    pub fn fill_page(&mut self, index: usize, len: usize, read: impl FnMut(&mut [u8]) -> Result<()>) -> Result<()> {
        let (first, end) = (index * PAGE, len.min((index + 1) * PAGE));
        self.reserve(end)?;
        let (stride, held) = (self.layout.head_stride(), (end - first) * self.layout.row_bytes);
        // Its own since `reserve`.
        let bytes = self.pages.get_mut(index).and_then(Arc::get_mut).map(Buffer::bytes_mut).unwrap_or_default();
        bytes.chunks_exact_mut(stride).map(|head| &mut head[..held]).try_for_each(read)?;
        if end == len {
            self.len = len;
        }
        Ok(())
    }

    /// Forgets `drop` positions from `keep` on and moves those behind them down: values as they are, keys turned back by
    /// `drop` positions, rounded to the cache's type once more. The positions that move keep what they know of the text
    /// that is gone; only their distances are new.
    ///
    /// # Errors
    /// Positions that are not held, [`Error::Memory`].
    pub fn shift(&mut self, spec: &Spec, keep: usize, drop: usize) -> Result<()> {
        check_dropped(self.len, keep, drop)?;
        self.own(keep / PAGE)?;
        let KvLayout { dtype, layers, kv_heads, head_dim, row_bytes } = self.layout;
        let isa = Isa::detect();
        let tables: Vec<[Vec<f32>; 2]> = spec.ropes.iter().map(|rope| Frequencies::new(rope).turn(drop)).collect();
        let mut row = vec![0; row_bytes];
        let mut key = vec![0.0; head_dim];
        for (layer, kind) in (0..layers).flat_map(|layer| [(layer, 0), (layer, 1)]) {
            let rope = spec.layers[layer].rope.filter(|_| kind == 0);
            for (head, from) in (0..kv_heads).flat_map(|head| (keep + drop..self.len).map(move |from| (head, from))) {
                let first = ((2 * layer + kind) * kv_heads + head) * self.layout.head_stride();
                let place = |p: usize| first + p % PAGE * row_bytes..first + (p % PAGE + 1) * row_bytes;
                row.copy_from_slice(&self.pages[from / PAGE].bytes()[place(from)]);
                if let Some(rope) = rope {
                    quant::dequantize(dtype, &row, &mut key)?;
                    let [cos, sin] = &tables[rope];
                    rope::rope_backward(isa, &mut key, head_dim, cos, sin, spec.ropes[rope].style);
                    // SAFETY: a row has as many bytes as the layout says of a head's vector.
                    unsafe { store_kv(isa, dtype, &key, row.as_mut_ptr()) };
                }
                let to = from - drop;
                if let Some(page) = Arc::get_mut(&mut self.pages[to / PAGE]) {
                    page.bytes_mut()[place(to)].copy_from_slice(&row);
                }
            }
        }
        self.truncate(self.len - drop);
        Ok(())
    }

    /// The pages' addresses, first to last.
    pub(super) fn page_pointers(&self) -> impl Iterator<Item = *const u8> + '_ {
        self.pages.iter().map(|p| p.as_ptr().cast_const())
    }
}
