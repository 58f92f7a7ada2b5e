//! Large pages of a mapped file (Linux).
//!
//! A token reads all weights once, so with pages of 4 KiB it misses the table of translations at every page; in pages of
//! 2 MiB it hardly does. File systems that keep large folios (XFS since 5.18, ext4 since 6.16) give them to a map that
//! asks, but only for what is read through it: what the page cache already has in small pages, because the file was
//! copied or downloaded, stays in small pages until it is read again. [`renew`] has that done, where it is worth its time.
//!
//! Called by `map` only.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// A large page of x86-64 and of AArch64 with small pages of 4 KiB; where they are larger, so are large ones, and nothing
/// here finds any.
const LARGE: usize = 2 << 20;

/// Below this the tables of any processor hold all small pages.
const WORTH: usize = 16 << 20;

/// How many pages are looked at to know what the others are.
const SAMPLES: usize = 4;

/// How long reading the file again may take. That is spent once, and a long chat gains it back; a user who waits for a
/// first answer should not notice it much.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where `pages`, the map of `file` from `offset`, is in the page cache but in small pages, drops it there, so that it is
/// read again into large ones as it is used: if the file system has them, which one page tells, and if that takes two
/// seconds at most. To be called right after the map was made and large pages were asked for. Pages that another process
/// has mapped, or that are not on disk yet, stay as they are. Whatever fails, the map is as good as before.
pub(super) fn renew(file: &File, offset: u64, pages: &[u8]) {
    let Some(samples) = samples(pages.as_ptr() as usize, pages.len(), offset) else { return };
    let small: Vec<&[u8]> = samples
        .filter_map(|at| pages.get(at..at.checked_add(LARGE)?))
        .filter(|page| resident(page) && touch(page).is_some() && large(page) == Some(0))
        .collect();
    // Some small pages are no matter: a program that reads the header leaves those of the beginning.
    let Some(trial) = small.get(SAMPLES / 2) else { return };
    let place = (trial.as_ptr() as usize).saturating_sub(pages.as_ptr() as usize) as u64;
    // Only what no map uses is dropped.
    unmap(trial);
    drop_cached(file, offset.saturating_add(place), LARGE);
    let start = Instant::now();
    touch(trial);
    let whole = start.elapsed().saturating_mul(u32::try_from(pages.len() / LARGE).unwrap_or(u32::MAX));
    if large(trial) == Some(LARGE) && whole <= PATIENCE {
        small.iter().for_each(|page| unmap(page));
        drop_cached(file, offset, pages.len());
        log::debug!("{} MB lay in small pages and are read again into large ones", pages.len() >> 20);
    }
}

/// How many of `pages`' bytes are mapped in large pages; `None` where the system does not tell (Linux before 6.7).
/// Pages that nobody has touched are not mapped.
pub(super) fn large(pages: &[u8]) -> Option<usize> {
    /// `struct pm_scan_arg` of `linux/fs.h`.
    #[repr(C)]
    struct Scan {
        size: u64,
        flags: u64,
        start: u64,
        end: u64,
        walk_end: u64,
        vec: u64,
        vec_len: u64,
        max_pages: u64,
        category_inverted: u64,
        category_mask: u64,
        category_anyof_mask: u64,
        return_mask: u64,
    }
    /// `struct page_region`.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Region {
        start: u64,
        end: u64,
        categories: u64,
    }
    const IS_HUGE: u64 = 1 << 6;
    const SIZE: u64 = size_of::<Scan>() as u64;
    // _IOWR('f', 16, struct pm_scan_arg)
    const PAGEMAP_SCAN: u64 = (3 << 30) | (SIZE << 16) | ((b'f' as u64) << 8) | 16;

    let map = File::open("/proc/self/pagemap").ok()?;
    let small = page_size()? as u64;
    let mut regions = [Region { start: 0, end: 0, categories: 0 }; 64];
    let mut from = (pages.as_ptr() as u64).checked_next_multiple_of(small)?;
    let end = (pages.as_ptr() as u64).checked_add(pages.len() as u64)?;
    let end = end.checked_sub(end.checked_rem(small)?)?;
    let mut bytes = 0u64;
    while from < end {
        let mut scan = Scan {
            size: SIZE,
            flags: 0,
            start: from,
            end,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: IS_HUGE,
            category_anyof_mask: 0,
            return_mask: IS_HUGE,
        };
        // SAFETY: the kernel reads and writes `scan`, whose size it is told, and at most `vec_len` regions; both are here.
        let found = unsafe { libc::ioctl(map.as_raw_fd(), PAGEMAP_SCAN as _, std::ptr::from_mut(&mut scan)) };
        let found = usize::try_from(found).ok()?;
        bytes = regions.get(..found)?.iter().fold(bytes, |sum, r| sum.saturating_add(r.end.saturating_sub(r.start)));
        if scan.walk_end <= from {
            return None;
        }
        from = scan.walk_end;
    }
    usize::try_from(bytes).ok()
}

/// Where a map at `address`, `length` bytes of a file from `offset`, has large pages that are worth a look, spread evenly
/// over it; `None` where it is too small, or file and memory are shifted against each other so that none fit.
fn samples(address: usize, length: usize, offset: u64) -> Option<impl Iterator<Item = usize>> {
    let shift = (address as u64).wrapping_sub(offset).checked_rem(LARGE as u64)?;
    if length < WORTH || shift != 0 {
        return None;
    }
    let first = address.checked_next_multiple_of(LARGE)?.checked_sub(address)?;
    let whole = length.checked_sub(first)?.checked_div(LARGE)?;
    Some((0..SAMPLES).map(move |i| first.saturating_add((i.saturating_mul(whole) / SAMPLES).saturating_mul(LARGE))))
}

/// Whether all of `page` is in the page cache. To ask does not read it.
fn resident(page: &[u8]) -> bool {
    let Some(small) = page_size() else { return false };
    let mut there = vec![0u8; page.len().div_ceil(small)];
    // SAFETY: the kernel writes a byte for each small page, for which there is room.
    let failed = unsafe { libc::mincore(page.as_ptr().cast_mut().cast(), page.len(), there.as_mut_ptr().cast()) };
    failed == 0 && there.iter().all(|byte| byte & 1 == 1)
}

/// Has the first byte of `page` mapped.
fn touch(page: &[u8]) -> Option<u8> {
    std::hint::black_box(page).first().map(|byte| std::hint::black_box(*byte))
}

/// Takes `page` out of this process's tables; it is mapped again when it is touched.
fn unmap(page: &[u8]) {
    // SAFETY: of a map of a file that nobody wrote to, the advice leaves every byte as it is: they come from the file again.
    unsafe { libc::madvise(page.as_ptr().cast_mut().cast(), page.len(), libc::MADV_DONTNEED) };
}

/// Takes `length` bytes of `file` from `offset` out of the page cache, as far as no map and no pending write holds them.
fn drop_cached(file: &File, offset: u64, length: usize) {
    let (Ok(offset), Ok(length)) = (offset.try_into(), length.try_into()) else { return };
    // SAFETY: the call takes numbers and touches no memory of the process.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), offset, length, libc::POSIX_FADV_DONTNEED) };
}

fn page_size() -> Option<usize> {
    // SAFETY: the call takes a number and touches no memory of the process.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).ok().filter(|size| size.is_power_of_two())
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::{Advice, Mmap};
    use std::io::{Read, Write};
    use std::path::Path;

    #[test]
    fn samples_are_whole_large_pages_of_file_and_memory() {
        let all = |address, length, offset| samples(address, length, offset).map(Iterator::collect::<Vec<_>>);
        assert_eq!(all(8 * LARGE, 16 * LARGE, 0), Some(vec![0, 4 * LARGE, 8 * LARGE, 12 * LARGE]));
        // From the middle of a large page on.
        let (address, offset) = (8 * LARGE + 4096, 3 * LARGE as u64 + 4096);
        let found = all(address, 17 * LARGE, offset).unwrap();
        assert!(found.iter().all(|at| (address + at) % LARGE == 0 && at + LARGE <= 17 * LARGE), "{found:?}");
        assert_eq!(all(8 * LARGE, 16 * LARGE, 4096), None);
        assert_eq!(all(8 * LARGE, WORTH - 1, 0), None);
    }

    /// Maps the file as `Mapping::map` does, looks at every byte, and tells how much is in large pages.
    fn seen(path: &Path, again: bool) -> (u64, Option<usize>) {
        let file = File::open(path).unwrap();
        // SAFETY: nobody else knows the file.
        let pages = unsafe { Mmap::map(&file) }.unwrap();
        let _ = pages.advise(Advice::HugePage);
        if again {
            renew(&file, 0, &pages);
        }
        (pages.iter().map(|byte| u64::from(*byte)).sum(), large(&pages))
    }

    #[test]
    fn a_file_in_small_pages_is_read_again_where_large_ones_are_to_be_had() {
        let path = std::env::temp_dir().join(format!("kinglet-pages-{}", std::process::id()));
        let mut file = File::create(&path).unwrap();
        let mut wanted = 0;
        for i in 0..(40usize << 20) / 4096 {
            let block = [i as u8; 4096];
            wanted += u64::from(i as u8) * 4096;
            file.write_all(&block).unwrap();
        }
        file.sync_all().unwrap();
        // Read once from beginning to end, as a check of its digest would.
        drop_cached(&file, 0, 40 << 20);
        File::open(&path).unwrap().read_to_end(&mut Vec::new()).unwrap();
        let before = seen(&path, false);
        let after = seen(&path, true);
        drop_cached(&file, 0, 40 << 20);
        let fresh = seen(&path, false);
        std::fs::remove_file(&path).unwrap();
        println!("in large pages: {:?} as it was, {:?} renewed, {:?} read anew", before.1, after.1, fresh.1);
        assert_eq!((before.0, after.0, fresh.0), (wanted, wanted, wanted));
        // Where a fresh map has large pages, so has a renewed one. (A disk that is too slow for that is none to test on.)
        assert!(after.1 >= fresh.1.map(|bytes| bytes / 2), "{after:?}, {fresh:?}");
        assert!(large(&[0; 64]).is_none_or(|bytes| bytes == 0));
    }
}
