//! Cache-line aligned memory whose allocation can fail without ending the program.
//!
//! Large blocks are mapped, and take memory as they are touched; the largest, on Linux, with the wish for pages of 2 MiB:
//! kernels go through the rows of a matrix 64 bytes at a time, every row on another page, and a core remembers the places of
//! only so many pages.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::MmapMut;

use crate::{Error, Result, system};

/// Alignment of every buffer, in bytes.
pub const ALIGN: usize = 64;

/// From how many bytes on a block is mapped: the system gives zeroed pages when they are first touched, while the allocator,
/// asked for more than its own alignment, would write zeros over all of it.
const MAPPED: usize = 1 << 20;

/// From how many bytes on pages of 2 MiB are wished for. Smaller blocks, a chat's, are better off with small pages: most of
/// them are for long prompts and never touched.
const LARGE: usize = 64 << 20;
const LARGE_PAGE: usize = 2 << 20;

/// An owned, zeroed, 64-byte aligned block of memory. Its contents are reached by raw pointer: threads of a team write
/// disjoint parts of it at once.
#[derive(Debug)]
pub struct Buffer {
    base: NonNull<u8>,
    bytes: usize,
    /// What `base` points into, when it is not the allocator's.
    map: Option<MmapMut>,
}

// SAFETY: a plain block of bytes, with no ties to the thread that allocated it.
unsafe impl Send for Buffer {}
// SAFETY: shared access hands out raw pointers only; whoever dereferences them states why that is sound.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Allocates `bytes` zeroes; pages are touched when they are written first.
    ///
    /// # Errors
    /// [`Error::Memory`] naming `what` when the system refuses.
    pub fn new(bytes: usize, what: &str) -> Result<Buffer> {
        Buffer::with(bytes, LARGE, what)
    }

    /// As [`Buffer::new`], with the wish for pages of 2 MiB from `large` bytes on.
    fn with(bytes: usize, large: usize, what: &str) -> Result<Buffer> {
        let refused = || Error::Memory {
            needed: bytes as u64,
            available: 0,
            what: format!("the system refused memory for {what}; close other programs or ask for a smaller context"),
        };
        if system::PAGES && bytes >= MAPPED {
            let wished = cfg!(target_os = "linux") && bytes >= large;
            // Whole pages of that size, which begin at multiples of it.
            let room = if wished { bytes.next_multiple_of(LARGE_PAGE) + LARGE_PAGE } else { bytes };
            let mut map = MmapMut::map_anon(room).map_err(|_| refused())?;
            #[cfg(target_os = "linux")]
            if wished {
                // Without it everything works as well, if slower.
                let _ = map.advise(memmap2::Advice::HugePage);
            }
            let skipped = if wished { map.as_ptr().align_offset(LARGE_PAGE) } else { 0 };
            let base = map.get_mut(skipped..).map(<[u8]>::as_mut_ptr).and_then(NonNull::new).ok_or_else(refused)?;
            return Ok(Buffer { base, bytes, map: Some(map) });
        }
        let layout = Layout::from_size_align(bytes.max(ALIGN), ALIGN).map_err(|_| refused())?;
        // SAFETY: the size is not zero.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refused)?;
        Ok(Buffer { base, bytes, map: None })
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The contents, when nobody else writes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: allocated with this size, zeroed; the caller holds the only writer.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.bytes) }
    }

    /// The contents, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`; the block is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.bytes) }
    }

    /// A copy.
    ///
    /// # Errors
    /// As [`Buffer::new`].
    pub fn try_clone(&self, what: &str) -> Result<Buffer> {
        let copy = Buffer::new(self.bytes, what)?;
        // SAFETY: both blocks have `self.bytes` bytes and do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(self.base.as_ptr(), copy.base.as_ptr(), self.bytes) };
        Ok(copy)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.map.is_some() {
            return;
        }
        // SAFETY: the layout that `new` allocated with, checked there.
        unsafe { dealloc(self.base.as_ptr(), Layout::from_size_align_unchecked(self.bytes.max(ALIGN), ALIGN)) }
    }
}

/// Many small tables one behind the other in one block, on large pages: what is read once a token, a few kilobytes here and
/// there, would otherwise begin with the search for its page each time.
#[derive(Debug)]
pub struct Shelf {
    block: Arc<Buffer>,
    used: usize,
}

/// A table on a shelf, `[T]`.
#[derive(Clone, Debug)]
pub struct Table<T> {
    block: Arc<Buffer>,
    at: usize,
    len: usize,
    element: PhantomData<T>,
}

impl Shelf {
    /// Room for `bytes` bytes, gaps up to [`ALIGN`] between tables included.
    ///
    /// # Errors
    /// [`Error::Memory`] naming `what`.
    pub fn new(bytes: usize, what: &str) -> Result<Shelf> {
        Ok(Shelf { block: Arc::new(Buffer::with(bytes, MAPPED, what)?), used: 0 })
    }

    /// Puts a copy of `values` behind what is there; into a block of its own if there is no room left.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn put<T: bytemuck::Pod>(&mut self, values: &[T]) -> Result<Table<T>> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if self.block.len() - self.used < bytes.len() {
            let mut own = Buffer::new(bytes.len(), "a table")?;
            own.bytes_mut().copy_from_slice(bytes);
            return Ok(Table { block: Arc::new(own), at: 0, len: values.len(), element: PhantomData });
        }
        let at = self.used;
        self.used = (at + bytes.len()).next_multiple_of(ALIGN).min(self.block.len());
        // SAFETY: the table ends within the block, and what is behind `used` belongs to no table yet.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.block.as_ptr().add(at), bytes.len()) };
        Ok(Table { block: self.block.clone(), at, len: values.len(), element: PhantomData })
    }
}

impl<T: bytemuck::Pod> Deref for Table<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: written whole before the table was made and never again; tables begin at multiples of 64 bytes.
        unsafe { std::slice::from_raw_parts(self.block.as_ptr().add(self.at).cast(), self.len) }
    }
}
