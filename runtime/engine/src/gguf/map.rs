//! Where a model's bytes are: a read-only map of a file, a private copy of it, or memory of the caller's.
//!
//! All three look like one `&[u8]` that never changes and never moves. `unsafe` is needed here once: the system cannot
//! promise that nobody rewrites a file that is mapped. Models are
//! replaced by renaming a complete file over the old name (as [`Writer`](super::Writer) does), which leaves maps of the
//! old one intact; whoever cannot rely on that opens with `copy`.
//!
//! Called by `model` only.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::sync::Arc;

use memmap2::{Mmap, MmapMut, MmapOptions};

use crate::{Error, Result, system};

/// The bytes of one file.
pub(super) enum Mapping {
    /// Pages of the file, or of a private copy of it; either way aligned to a page.
    Pages(Mmap),
    /// The caller's memory.
    Shared(Arc<dyn AsRef<[u8]> + Send + Sync>),
}

impl Mapping {
    /// Maps `length` bytes from `offset` of `file`. `name` is for messages. `read_ahead` asks the system to start
    /// reading the pages now.
    pub(super) fn map(file: &File, name: &str, offset: u64, length: u64, read_ahead: bool) -> Result<Mapping> {
        let length = check_range(file, name, offset, length)?;
        // SAFETY: the range lies within the file (checked just above), so every page of the map exists. Nothing here
        // writes through the map. That no other process truncates or rewrites the file while it is mapped is the
        // condition under which `Gguf::open` is documented to work; a model is replaced by rename, not in place.
        let pages = unsafe { MmapOptions::new().offset(offset).len(length).map(file) }.map_err(Error::io(name))?;
        #[cfg(unix)]
        advise(|advice| pages.advise(advice), read_ahead);
        #[cfg(target_os = "linux")]
        if read_ahead {
            super::pages::renew(file, offset, &pages);
        }
        #[cfg(not(unix))]
        let _ = read_ahead;
        Ok(Mapping::Pages(pages))
    }

    /// Reads `length` bytes from `offset` of `file` into private pages.
    pub(super) fn read(mut file: &File, name: &str, offset: u64, length: u64) -> Result<Mapping> {
        let length = check_range(file, name, offset, length)?;
        let mut pages = anonymous(length)?;
        file.seek(SeekFrom::Start(offset)).map_err(Error::io(name))?;
        file.read_exact(&mut pages).map_err(Error::io(name))?;
        Ok(Mapping::Pages(pages.make_read_only().map_err(Error::io(name))?))
    }

    /// Copies `bytes` into private pages, or to the heap where the system gives none.
    pub(super) fn copy(bytes: &[u8], name: &str) -> Result<Mapping> {
        if !system::PAGES {
            return Ok(Mapping::Shared(Arc::new(Words::copy(bytes)?)));
        }
        let mut pages = anonymous(bytes.len())?;
        pages.copy_from_slice(bytes);
        Ok(Mapping::Pages(pages.make_read_only().map_err(Error::io(name))?))
    }

    /// All bytes, where they lie in pages of the system's: every page that they touch is mapped, for as long as this is here.
    #[cfg(feature = "gpu")]
    pub(super) fn pages(&self) -> Option<&[u8]> {
        match self {
            Mapping::Pages(pages) => Some(pages),
            Mapping::Shared(_) => None,
        }
    }

    /// How many bytes are mapped in large pages; `None` where the system does not tell.
    pub(super) fn large_pages(&self) -> Option<usize> {
        #[cfg(target_os = "linux")]
        if let Mapping::Pages(pages) = self {
            return super::pages::large(pages);
        }
        None
    }

    /// All bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Mapping::Pages(pages) => pages,
            Mapping::Shared(bytes) => (**bytes).as_ref(),
        }
    }
}

/// Checks that `offset..offset + length` lies within a regular file and can be addressed; returns the length.
fn check_range(file: &File, name: &str, offset: u64, length: u64) -> Result<usize> {
    let meta = file.metadata().map_err(Error::io(name))?;
    let fail = |what: String| Error::Format { file: name.into(), at: format!("byte {offset}"), what };
    if !meta.is_file() {
        return Err(fail("is not a regular file; give the path of a .gguf file".into()));
    }
    if length == 0 {
        return Err(fail("there is nothing here (0 bytes); download the model again".into()));
    }
    if offset.checked_add(length).is_none_or(|end| end > meta.len()) {
        return Err(fail(format!(
            "{length} bytes were to be opened here but the file has {} in all; correct the offset and the length",
            meta.len()
        )));
    }
    usize::try_from(length).map_err(|_| {
        Error::Unsupported(format!("{name} has {length} bytes, more than a {}-bit process can address", usize::BITS))
    })
}

fn no_memory(length: usize) -> Error {
    Error::Memory {
        needed: length as u64,
        available: 0,
        what: "a private copy of the model; open it without `copy`, which uses the original instead".into(),
    }
}

/// Bytes on the heap, aligned to 8.
struct Words {
    words: Vec<u64>,
    length: usize,
}

impl Words {
    fn copy(bytes: &[u8]) -> Result<Words> {
        let length = bytes.len();
        let mut words = Vec::new();
        words.try_reserve_exact(length.div_ceil(8)).map_err(|_| no_memory(length))?;
        words.resize(length.div_ceil(8), 0);
        let mut copy = Words { words, length };
        if let Some(to) = bytemuck::cast_slice_mut(&mut copy.words).get_mut(..length) {
            to.copy_from_slice(bytes);
        }
        Ok(copy)
    }
}

impl AsRef<[u8]> for Words {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words).get(..self.length).unwrap_or_default()
    }
}

fn anonymous(length: usize) -> Result<MmapMut> {
    let pages = MmapMut::map_anon(length).map_err(|_| no_memory(length))?;
    #[cfg(unix)]
    advise(|advice| pages.advise(advice), false);
    Ok(pages)
}

/// The one place that tells the system how the weights will be used: all of them, soon, again and again. `give` passes
/// one advice on. Advice may be refused, which changes the speed and nothing else.
#[cfg(unix)]
fn advise(give: impl Fn(memmap2::Advice) -> std::io::Result<()>, read_ahead: bool) {
    use memmap2::Advice;
    let given = |advice| match give(advice) {
        Ok(()) => true,
        Err(e) => {
            log::debug!("madvise {advice:?}: {e}");
            false
        }
    };
    // Who touches one of these has it read whole, and the next; what is read before, by the other advice, are small pages.
    #[cfg(target_os = "linux")]
    let large = given(Advice::HugePage);
    #[cfg(not(target_os = "linux"))]
    let large = false;
    if read_ahead && !large {
        given(Advice::WillNeed);
    }
}
