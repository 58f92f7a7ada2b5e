//! Keys and values on the device, in pages of a fixed number of positions that all sequences of an executor share.
//!
//! A layer has a buffer of its own, so that a window may be as long as the layers' buffers allow, not one of them. Page p
//! of it holds `[K, V][kv_head][PAGE][head_dim]`; a page's number is the same in every layer. Pages are counted: forks of
//! a sequence share them until one writes, and what a dropped sequence held is free for others. The buffers double when
//! pages run out.

use std::sync::{Arc, Mutex};

use super::device::{Device, lock};
use crate::Result;
use crate::tape::Spec;

/// Positions per page; `PAGE` of `shaders/kv.wgsl`.
pub(super) const PAGE: usize = 128;
/// Pages to begin with.
const FIRST_PAGES: usize = 1;

#[derive(Debug)]
pub(super) struct Pool {
    device: Arc<Device>,
    pub layers: Vec<wgpu::Buffer>,
    page_bytes: u64,
    pages: usize,
    free: Arc<Mutex<Vec<u32>>>,
    /// Grows whenever the buffers are replaced.
    pub generation: u64,
}

/// A page in use; the last one who drops it gives it back.
#[derive(Debug)]
struct Page {
    index: u32,
    free: Arc<Mutex<Vec<u32>>>,
}

impl Drop for Page {
    fn drop(&mut self) {
        lock(&self.free).push(self.index);
    }
}

impl Pool {
    /// An empty pool. `element_bytes` is 2 or 4.
    pub fn new(device: Arc<Device>, spec: &Spec, element_bytes: usize) -> Result<Pool> {
        let page_bytes = (2 * spec.kv_heads * PAGE * spec.head_dim * element_bytes) as u64;
        let mut pool = Pool { device, layers: Vec::new(), page_bytes, pages: 0, free: Arc::default(), generation: 0 };
        pool.layers = pool.buffers(FIRST_PAGES, spec.layers.len())?;
        pool.add(FIRST_PAGES);
        Ok(pool)
    }

    fn buffers(&self, pages: usize, layers: usize) -> Result<Vec<wgpu::Buffer>> {
        (0..layers).map(|_| self.device.storage(pages as u64 * self.page_bytes, "the KV cache")).collect()
    }

    fn add(&mut self, pages: usize) {
        lock(&self.free).extend((self.pages as u32..pages as u32).rev());
        self.pages = pages;
    }

    fn page(&mut self) -> Result<Page> {
        loop {
            let free = lock(&self.free).pop();
            if let Some(index) = free {
                return Ok(Page { index, free: self.free.clone() });
            }
            let pages = self.pages * 2;
            let layers = self.buffers(pages, self.layers.len())?;
            let mut encoder = self.device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            for (old, new) in self.layers.iter().zip(&layers) {
                encoder.copy_buffer_to_buffer(old, 0, new, 0, self.pages as u64 * self.page_bytes);
            }
            self.device.queue.submit([encoder.finish()]);
            self.layers = layers;
            self.generation += 1;
            self.add(pages);
        }
    }

    /// A page with the contents of another.
    fn copy(&mut self, from: u32) -> Result<Page> {
        let page = self.page()?;
        let (from, to) = (u64::from(from) * self.page_bytes, u64::from(page.index) * self.page_bytes);
        let scratch = self.device.storage(self.page_bytes, "a page of the KV cache")?;
        let mut encoder = self.device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for layer in &self.layers {
            // A copy within one buffer needs a stop between.
            encoder.copy_buffer_to_buffer(layer, from, &scratch, 0, self.page_bytes);
            encoder.copy_buffer_to_buffer(&scratch, 0, layer, to, self.page_bytes);
        }
        self.device.queue.submit([encoder.finish()]);
        Ok(page)
    }
}

/// The cache of one sequence. Cloning shares its pages until one side writes.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    pages: Vec<Arc<Page>>,
    len: usize,
    page_bytes: usize,
}

impl KvCache {
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
        self.pages.len() * self.page_bytes
    }

    /// Forgets all positions from `len` on; whole pages behind it are given back.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.pages.truncate(self.len.div_ceil(PAGE));
    }

    /// Makes room for positions up to `len`, and pages that will be written this sequence's own.
    pub(super) fn reserve(&mut self, pool: &mut Pool, len: usize) -> Result<()> {
        self.page_bytes = pool.page_bytes as usize * pool.layers.len();
        while self.pages.len() < len.div_ceil(PAGE) {
            self.pages.push(Arc::new(pool.page()?));
        }
        for page in &mut self.pages[self.len / PAGE..] {
            if Arc::get_mut(page).is_none() {
                *page = Arc::new(pool.copy(page.index)?);
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
        self.pages.iter().map(|p| (Arc::as_ptr(p) as usize, self.page_bytes))
    }

    /// The pages' numbers, first to last.
    pub(super) fn pages(&self) -> impl Iterator<Item = u32> + '_ {
        self.pages.iter().map(|p| p.index)
    }
}
