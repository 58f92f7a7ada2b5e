//! Keys and values on the device, in pages of a fixed number of positions that all sequences of an executor share.
//!
//! A layer has a buffer of its own, so that a window may be as long as the layers' buffers allow, not one of them. Page p
//! of it holds `[K, V][kv_head][PAGE]` rows, each a head's vector; a page's number is the same in every layer. Pages are
//! counted: forks of a sequence share them until one writes, and what a dropped sequence held is free for others. When pages
//! run out the buffers double, up to a window's pages first. They can be given back for a while; what is held waits in main memory then.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::device::{Device, lock};
use crate::Result;
use crate::quant::DType;
use crate::tape::Spec;

/// Positions per page; `PAGE` of `shaders/kv.wgsl`.
pub(super) const PAGE: usize = 128;
/// Pages to begin with.
const FIRST_PAGES: usize = 1;

#[derive(Debug)]
pub(super) struct Pool {
    device: Arc<Device>,
    /// A buffer per layer; none while they are given back.
    pub layers: Vec<wgpu::Buffer>,
    layer_count: usize,
    dtype: DType,
    head_dim: usize,
    /// Bytes of a row.
    row_bytes: usize,
    page_bytes: u64,
    pages: usize,
    /// Pages of a window.
    window: usize,
    free: Arc<Mutex<Vec<u32>>>,
    /// The pages in use while the buffers are given back: number, bytes of all layers.
    parked: Vec<(u32, Vec<u8>)>,
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

/// Elements of a block of Q8_0, its bytes and those of its scale.
const BLOCK: (usize, usize, usize) = (32, 34, 2);

/// Bytes of a row, whole words: those of Q8_0 are all quants and then all scales.
fn row_bytes(dtype: DType, head_dim: usize) -> usize {
    dtype.row_bytes(head_dim).unwrap_or(0).next_multiple_of(4)
}

/// Between a row as it lies on the device and as files have it, which differ for Q8_0 alone: calls `part` with the places
/// of bytes that are the same, on the device and in the file.
fn same_bytes(dtype: DType, head_dim: usize, mut part: impl FnMut(Range<usize>, Range<usize>)) {
    if dtype != DType::Q8_0 {
        let bytes = row_bytes(dtype, head_dim);
        return part(0..bytes, 0..bytes);
    }
    let (elements, bytes, scale) = BLOCK;
    for block in 0..head_dim / elements {
        let (quants, scales, at) = (block * elements, head_dim + block * scale, block * bytes);
        part(scales..scales + scale, at..at + scale);
        part(quants..quants + elements, at + scale..at + bytes);
    }
}

/// Bytes of a page in one layer.
fn page_bytes(spec: &Spec, dtype: DType) -> u64 {
    (2 * spec.kv_heads * PAGE * row_bytes(dtype, spec.head_dim)) as u64
}

impl Pool {
    /// An empty pool for keys and values of type `dtype`, of windows of so many positions.
    pub fn new(device: Arc<Device>, spec: &Spec, dtype: DType, window: usize) -> Result<Pool> {
        let mut pool = Pool {
            device,
            layers: Vec::new(),
            layer_count: spec.layers.len(),
            dtype,
            head_dim: spec.head_dim,
            row_bytes: row_bytes(dtype, spec.head_dim),
            page_bytes: page_bytes(spec, dtype),
            pages: 0,
            window: window.div_ceil(PAGE),
            free: Arc::default(),
            parked: Vec::new(),
            generation: 0,
        };
        pool.layers = pool.buffers(FIRST_PAGES)?;
        pool.add(FIRST_PAGES);
        Ok(pool)
    }

    /// Bytes that a pool comes to take for one sequence that fills a window.
    pub fn needs(spec: &Spec, dtype: DType, window: usize) -> u64 {
        let pages = window.div_ceil(PAGE).max(FIRST_PAGES) as u64;
        pages * page_bytes(spec, dtype) * spec.layers.len() as u64
    }

    fn buffers(&self, pages: usize) -> Result<Vec<wgpu::Buffer>> {
        let layer = |_| self.device.storage(pages as u64 * self.page_bytes, "the KV cache");
        (0..self.layer_count).map(layer).collect()
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
            self.grow(match self.pages {
                few if few < self.window => (2 * few).min(self.window),
                all => 2 * all,
            })?;
        }
    }

    /// Makes the buffers as large, one layer after the other, so that no more than one exists twice.
    fn grow(&mut self, pages: usize) -> Result<()> {
        // Those of some layers may be replaced when memory runs out.
        self.generation += 1;
        for layer in &mut self.layers {
            let new = self.device.storage(pages as u64 * self.page_bytes, "the KV cache")?;
            let mut encoder = self.device.encoder();
            encoder.copy_buffer_to_buffer(layer, 0, &new, 0, self.pages as u64 * self.page_bytes);
            self.device.queue.submit([encoder.finish()]);
            self.device.wait()?;
            std::mem::replace(layer, new).destroy();
        }
        self.add(pages);
        Ok(())
    }

    /// A page with the contents of another.
    fn copy(&mut self, from: u32) -> Result<Page> {
        let page = self.page()?;
        let (from, to) = (u64::from(from) * self.page_bytes, u64::from(page.index) * self.page_bytes);
        let scratch = self.device.storage(self.page_bytes, "a page of the KV cache")?;
        let mut encoder = self.device.encoder();
        for layer in &self.layers {
            // A copy within one buffer needs a stop between.
            encoder.copy_buffer_to_buffer(layer, from, &scratch, 0, self.page_bytes);
            encoder.copy_buffer_to_buffer(&scratch, 0, layer, to, self.page_bytes);
        }
        self.device.queue.submit([encoder.finish()]);
        Ok(page)
    }

    /// Bytes of a row in a file.
    fn row_saved(&self) -> usize {
        self.dtype.row_bytes(self.head_dim).unwrap_or(0)
    }

    /// Bytes of a page in all layers.
    fn whole_bytes(&self) -> usize {
        self.page_bytes as usize * self.layer_count
    }

    /// A page's bytes, layer after layer, by way of `staging`; from main memory where there is none.
    fn download(&self, page: u32, staging: Option<&wgpu::Buffer>, bytes: &mut [u8]) -> Result<()> {
        let Some(staging) = staging else {
            if let Some((_, parked)) = self.parked.iter().find(|(number, _)| *number == page) {
                bytes.copy_from_slice(parked);
            }
            return Ok(());
        };
        let mut encoder = self.device.encoder();
        for (layer, to) in self.layers.iter().zip((0u64..).step_by(self.page_bytes as usize)) {
            encoder.copy_buffer_to_buffer(layer, u64::from(page) * self.page_bytes, staging, to, self.page_bytes);
        }
        self.device.queue.submit([encoder.finish()]);
        self.device.read(staging, self.page_bytes * self.layer_count as u64, bytes)
    }

    /// Writes a page's bytes.
    fn upload(&self, page: u32, bytes: &[u8]) -> Result<()> {
        for (layer, bytes) in self.layers.iter().zip(bytes.chunks_exact(self.page_bytes as usize)) {
            self.device.queue.write_buffer(layer, u64::from(page) * self.page_bytes, bytes);
        }
        // At most one page exists twice.
        self.device.queue.submit([]);
        self.device.wait()
    }

    /// Hands over what a cache holds in some of its pages, as saved sessions have it: page after page, in each `[layer][K, V][kv_head]`, of
    /// each head the positions that are held of the page.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`], and what `write` says.
    pub fn contents(
        &self,
        cache: &KvCache,
        pages: Range<usize>,
        mut write: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let on_device = !self.layers.is_empty();
        let staging = on_device.then(|| self.device.staging(self.whole_bytes() as u64)).transpose()?;
        let mut bytes = vec![0; self.whole_bytes()];
        let (mut saved, row_saved) = (Vec::new(), self.row_saved());
        let held = cache.pages.iter().zip((0..cache.len).step_by(PAGE));
        for (page, first) in held.skip(pages.start).take(pages.len()) {
            self.download(page.index, staging.as_ref(), &mut bytes)?;
            let held = (cache.len - first).min(PAGE);
            for head in bytes.chunks_exact(PAGE * self.row_bytes) {
                saved.clear();
                for row in head.chunks_exact(self.row_bytes).take(held) {
                    let at = saved.len();
                    saved.resize(at + row_saved, 0);
                    same_bytes(self.dtype, self.head_dim, |device, file| {
                        saved[at..][file].copy_from_slice(&row[device]);
                    });
                }
                write(&saved)?;
            }
        }
        Ok(())
    }

    /// Fills a page of a cache that is to hold `len` positions; `read` is to fill their bytes, which come as
    /// [`Pool::contents`] gives them. Pages come in order, to a cache that holds nothing; it holds the positions when the last
    /// one has come.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`], and what `read` says; nothing is held then.
    pub fn fill_page(
        &mut self,
        cache: &mut KvCache,
        index: usize,
        len: usize,
        mut read: impl FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        self.wake()?;
        let (first, end) = (index * PAGE, len.min((index + 1) * PAGE));
        cache.reserve(self, first, end)?;
        let mut bytes = vec![0; self.whole_bytes()];
        let mut saved = vec![0; (end - first) * self.row_saved()];
        for head in bytes.chunks_exact_mut(PAGE * self.row_bytes) {
            read(&mut saved)?;
            for (row, saved) in head.chunks_exact_mut(self.row_bytes).zip(saved.chunks_exact(self.row_saved())) {
                same_bytes(self.dtype, self.head_dim, |device, file| row[device].copy_from_slice(&saved[file]));
            }
        }
        for page in cache.pages().skip(index).take(1) {
            self.upload(page, &bytes)?;
        }
        if end == len {
            cache.len = len;
        }
        Ok(())
    }

    /// Gives the device's memory back: what pages in use hold waits in main memory until [`Pool::wake`]. Gives its bytes.
    ///
    /// # Errors
    /// [`Error::Device`]; everything is as before then.
    pub fn park(&mut self) -> Result<u64> {
        if self.layers.is_empty() {
            return Ok(0);
        }
        let free = lock(&self.free).clone();
        let used: Vec<u32> = (0..self.pages as u32).filter(|page| !free.contains(page)).collect();
        let staging = self.device.staging(self.whole_bytes() as u64)?;
        let park = |page: u32| -> Result<(u32, Vec<u8>)> {
            let mut bytes = vec![0; self.whole_bytes()];
            self.download(page, Some(&staging), &mut bytes)?;
            Ok((page, bytes))
        };
        self.parked = used.into_iter().map(park).collect::<Result<_>>()?;
        self.layers.drain(..).for_each(|layer| layer.destroy());
        Ok((self.pages * self.whole_bytes()) as u64)
    }

    /// Takes the device's memory again after [`Pool::park`].
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`]; what is held still waits then.
    pub fn wake(&mut self) -> Result<()> {
        if !self.layers.is_empty() {
            return Ok(());
        }
        self.layers = self.buffers(self.pages)?;
        self.generation += 1;
        for (page, bytes) in &self.parked {
            if let Err(e) = self.upload(*page, bytes) {
                self.layers.clear();
                return Err(e);
            }
        }
        self.parked = Vec::new();
        Ok(())
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

    /// Makes room for positions up to `len`, and the pages of those from `first` on this sequence's own: they will be
    /// written.
    pub(super) fn reserve(&mut self, pool: &mut Pool, first: usize, len: usize) -> Result<()> {
        self.page_bytes = pool.whole_bytes();
        while self.pages.len() < len.div_ceil(PAGE) {
            self.pages.push(Arc::new(pool.page()?));
        }
        for page in self.pages.iter_mut().skip(first / PAGE) {
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
