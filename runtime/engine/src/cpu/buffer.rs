//! Cache-line aligned memory whose allocation can fail without ending the program.
//!
//! Large blocks are mapped, and take memory as they are touched; the largest, on Linux, with the wish for pages of 2 MiB:
//! kernels go through the rows of a matrix 64 bytes at a time, every row on another page, and a core remembers the places of
//! only so many pages.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use memmap2::MmapMut;

use crate::{Error, Result, system};

/// Alignment of every buffer, in bytes.
pub const ALIGN: usize = 64;

/// From how many bytes on a block is mapped: the system gives zeroed pages when they are first touched, while the allocator,
/// asked for more than its own alignment, would write zeros over all of it.
const MAPPED: usize = 1 << 20;

/// From how many bytes on pages of 2 MiB are wished for. Smaller blocks, a chat's, are better off with small pages: most of
/// them are for long prompts and never touched.
#[cfg(target_os = "linux")]
const LARGE: usize = 64 << 20;

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
        let refused = || Error::Memory {
            needed: bytes as u64,
            available: 0,
            what: format!("the system refused memory for {what}; close other programs or ask for a smaller context"),
        };
        if system::PAGES && bytes >= MAPPED {
            let mut map = MmapMut::map_anon(bytes).map_err(|_| refused())?;
            #[cfg(target_os = "linux")]
            if bytes >= LARGE {
                // A wish: without it everything works as well, if slower.
                let _ = map.advise(memmap2::Advice::HugePage);
            }
            let base = NonNull::new(map.as_mut_ptr()).ok_or_else(refused)?;
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
