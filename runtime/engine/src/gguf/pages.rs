//! Large pages of a mapped file (Linux).
//!
//! A token reads all weights once, so with pages of 4 KiB it misses the table of translations at every page; in pages of
//! 2 MiB it hardly does. File systems that keep large folios (XFS since 5.18, ext4 since 6.16) give them to a map that
//! asks, but only for what is read through it: what the page cache already has in small pages, because the file was
//! copied or downloaded, stays in small pages until it is read again. [`renew`] has that done, where it is worth its time.
//!
//! Called by `map` only.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// A large page of x86-64 and of AArch64 with small pages of 4 KiB; where they are larger, so are large ones, and nothing
/// here finds any.
const LARGE: usize = 2 << 20;

/// Below this the tables of any processor hold all small pages.
const WORTH: usize = 16 << 20;

/// How long reading the file again may take. That is spent once, and a long chat gains it back; a user who waits for a
/// first answer should not notice it much.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where a sixteenth of `pages`, the map of `file` from `offset`, or more is in the page cache but in small pages, drops that
/// there, so that it is read again into large ones as it is used: if the file system has them, which one page tells, and as much
/// of it as takes two seconds. To be called right after the map was made and large pages were asked for. Pages that another
/// process has mapped, or that are not on disk yet, stay as they are. Whatever fails, the map is as good as before.
pub(super) fn renew(file: &File, offset: u64, pages: &[u8]) {
    let Some(small) = small(pages, offset).filter(|small| small.len() > pages.len() / LARGE / 16) else { return };
    // Only what no map uses is dropped.
    let give_up = |at: usize, page: &[u8]| {
        unmap(page);
        drop_cached(file, offset.saturating_add(at as u64), page.len());
    };
    let mut all = small.iter().filter_map(|at| Some((*at, pages.get(*at..at.checked_add(LARGE)?)?)));
    let Some((at, trial)) = all.next() else { return };
    give_up(at, trial);
    let start = Instant::now();
    touch(trial);
    let one = start.elapsed().max(Duration::from_micros(1));
    if large_regions(trial).is_none_or(|found| found.is_empty()) {
        return;
    }
    let affordable = PATIENCE.as_micros().checked_div(one.as_micros()).unwrap_or_default() as usize;
    let given_up = all.take(affordable).map(|(at, page)| give_up(at, page)).count();
    log::debug!("{} MB lay in small pages and are read again into large ones", given_up.saturating_mul(LARGE) >> 20);
}

/// Where large pages would fit that are in the page cache, at least in part, and are mapped in small ones; `None` where the
/// system does not tell, or where file and memory are shifted against each other so that none fit.
fn small(pages: &[u8], offset: u64) -> Option<Vec<usize>> {
    let first = first_large(pages.as_ptr() as usize, pages.len(), offset)?;
    let each = page_size()?;
    let resident = resident(pages, each)?;
    let whole = (first..).step_by(LARGE).take_while(|at| at.checked_add(LARGE).is_some_and(|end| end <= pages.len()));
    // A cached page has to be touched, for others would be read.
    let cached = |at: usize| {
        let mut there = (at.checked_div(each)?..at.saturating_add(LARGE).checked_div(each)?)
            .filter(|place| resident.get(*place).is_some_and(|byte| byte & 1 == 1));
        there.next().and_then(|place| touch(pages.get(place.checked_mul(each)?..)?))
    };
    let candidates: Vec<usize> = whole.filter(|at| cached(*at).is_some()).collect();
    let base = pages.as_ptr() as usize;
    let large = large_regions(pages)?;
    let is_small = |at: &usize| {
        let address = base.saturating_add(*at);
        let before = large.partition_point(|region| region.start <= address);
        before.checked_sub(1).and_then(|i| large.get(i)).is_none_or(|region| !region.contains(&address))
    };
    Some(candidates.into_iter().filter(is_small).collect())
}

/// How many of `pages`' bytes are mapped in large pages; `None` where the system does not tell (Linux before 6.7).
/// Pages that nobody has touched are not mapped.
pub(super) fn large(pages: &[u8]) -> Option<usize> {
    Some(large_regions(pages)?.iter().fold(0usize, |sum, region| sum.saturating_add(region.len())))
}

/// The addresses that are mapped in large pages, in order.
fn large_regions(pages: &[u8]) -> Option<Vec<Range<usize>>> {
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
    let mut all = Vec::new();
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
        all.extend(regions.get(..found)?.iter().map(|r| r.start as usize..r.end as usize));
        if scan.walk_end <= from {
            return None;
        }
        from = scan.walk_end;
    }
    Some(all)
}

/// Where the first large page begins in a map at `address`, `length` bytes of a file from `offset`; `None` where the map is too
/// small to be worth a look, or shifted against the file.
fn first_large(address: usize, length: usize, offset: u64) -> Option<usize> {
    let shift = (address as u64).wrapping_sub(offset).checked_rem(LARGE as u64)?;
    if length < WORTH || shift != 0 {
        return None;
    }
    address.checked_next_multiple_of(LARGE)?.checked_sub(address)
}

/// For each small page of a map a byte whose lowest bit tells whether it is in the page cache; `None` of a map that begins
/// within a page. To ask does not read it.
fn resident(pages: &[u8], page_size: usize) -> Option<Vec<u8>> {
    let mut there = vec![0u8; pages.len().div_ceil(page_size)];
    // SAFETY: the kernel writes a byte for each small page, for which there is room; it refuses an address within one.
    let failed = unsafe { libc::mincore(pages.as_ptr().cast_mut().cast(), pages.len(), there.as_mut_ptr().cast()) };
    (failed == 0).then_some(there)
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
    fn large_pages_are_those_of_file_and_memory() {
        assert_eq!(first_large(8 * LARGE, WORTH, 0), Some(0));
        // From the middle of a large page on.
        assert_eq!(first_large(8 * LARGE + 4096, WORTH, 3 * LARGE as u64 + 4096), Some(LARGE - 4096));
        assert_eq!(first_large(8 * LARGE, WORTH, 4096), None);
        assert_eq!(first_large(8 * LARGE, WORTH - 1, 0), None);
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

    /// Reads the file in small steps, and tells how much of it is in large pages then.
    fn seen_by_reading(path: &Path) -> Option<usize> {
        let mut file = File::open(path).unwrap();
        // SAFETY: the call takes numbers.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) };
        let mut some = [0; 4096];
        while file.read(&mut some).unwrap() > 0 {}
        seen(path, false).1
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
        // Large pages and small ones, as when some were dropped and another program read them.
        drop_cached(&file, 8 << 20, 16 << 20);
        let half = seen_by_reading(&path);
        let again = seen(&path, true);
        drop_cached(&file, 0, 40 << 20);
        let fresh = seen(&path, false);
        std::fs::remove_file(&path).unwrap();
        println!("in large pages: {:?} as it was, {:?} renewed, {:?} read anew", before.1, after.1, fresh.1);
        println!("after dropping some: {half:?}, renewed {:?}", again.1);
        assert_eq!([before.0, after.0, again.0, fresh.0], [wanted; 4]);
        // Where a fresh map has large pages, so has a renewed one. (A disk that is too slow for that is none to test on.)
        let most = fresh.1.map(|bytes| bytes / 8 * 7);
        assert!(after.1 >= most && again.1 >= most, "{after:?}, {again:?}, {fresh:?}");
        assert!(large(&[0; 64]).is_none_or(|bytes| bytes == 0));
    }
}
