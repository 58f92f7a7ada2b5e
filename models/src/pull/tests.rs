//! Pulls without a network: the wheels are zips made here, handed out by a stand-in for pip.

use super::*;
use crate::catalogue::KnownModel;
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use zip::write::SimpleFileOptions;

/// An empty directory that is this test's own.
pub(super) fn scratch(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("kinglet-pull-{}-{name}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    dir
}

pub(super) fn hash(bytes: &[u8]) -> &'static str {
    let mut h = Sha256::new();
    h.update(bytes);
    assembly::hex(h).leak()
}

/// Bytes that do not repeat, a little over `CHUNK` so that more than one piece is moved.
pub(super) fn content(seed: u32, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(2_654_435_761) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            x as u8
        })
        .collect()
}

fn model_of(pieces: &[Vec<u8>]) -> &'static KnownModel {
    let parts: Vec<Part> = pieces
        .iter()
        .enumerate()
        .map(|(i, piece)| Part {
            package: format!("part{i}").leak(),
            version: "1.0",
            member: format!("data/piece{i}").leak(),
            bytes: piece.len() as u64,
            sha256: hash(piece),
            wheel_bytes: piece.len() as u64,
        })
        .collect();
    let whole = pieces.concat();
    Box::leak(Box::new(KnownModel {
        id: "toy",
        description: "",
        licence: "",
        architecture: "llama",
        bytes: whole.len() as u64,
        sha256: hash(&whole),
        sources: vec![Source::Packages(parts.leak())].leak(),
    }))
}

/// Hands out wheels holding `pieces`, and counts.
struct Shop {
    pieces: Vec<Vec<u8>>,
    served: Arc<AtomicUsize>,
    /// Fail from this wheel on.
    until: usize,
}

impl Shop {
    fn new(pieces: &[Vec<u8>]) -> Shop {
        Shop { pieces: pieces.to_vec(), served: Arc::default(), until: usize::MAX }
    }
}

impl Wheels for &mut Shop {
    fn fetch(
        &mut self,
        part: &Part,
        work: &Path,
        progress: &mut dyn Progress,
        seen: &mut dyn FnMut(u64, &mut dyn Progress),
    ) -> Result<PathBuf, PullError> {
        let i: usize = part.package.trim_start_matches("part").parse().unwrap();
        if i >= self.until {
            return Err(PullError::Pip { requirement: part.package.into(), message: "offline".into() });
        }
        self.served.fetch_add(1, Ordering::SeqCst);
        let path = work.join("fetched.whl");
        let mut zip = zip::ZipWriter::new(fs::File::create(&path).unwrap());
        let method =
            if i.is_multiple_of(2) { zip::CompressionMethod::Deflated } else { zip::CompressionMethod::Stored };
        zip.start_file("data/__init__.py", SimpleFileOptions::default()).unwrap();
        zip.start_file(part.member, SimpleFileOptions::default().compression_method(method)).unwrap();
        zip.write_all(&self.pieces[i]).unwrap();
        zip.finish().unwrap();
        seen(part.wheel_bytes / 2, progress);
        Ok(path)
    }
}

#[derive(Default)]
struct Count {
    total: u64,
    at: u64,
    finished: bool,
}
impl Progress for Count {
    fn begin(&mut self, _: &str, total: u64) {
        (self.total, self.at) = (total, 0);
    }
    fn advance(&mut self, bytes: u64) {
        self.at += bytes;
        assert!(self.at <= self.total, "the bar ran past its end");
    }
    fn finish(&mut self) {
        self.finished = true;
    }
}

fn go(cache: &Cache, model: &KnownModel, shop: &mut Shop, progress: &mut dyn Progress) -> Result<PathBuf, PullError> {
    let mut shop = Some(shop);
    pull_known(cache, model, SourceKind::Packages, progress, &mut || Ok(shop.take().unwrap()))
}

fn pieces() -> Vec<Vec<u8>> {
    vec![content(1, 1_200_000), content(2, 700_000), content(3, 33)]
}

#[test]
fn parts_are_joined_in_order_and_nothing_else_is_left() {
    let cache = Cache::at(scratch("join"));
    let pieces = pieces();
    let model = model_of(&pieces);
    let mut count = Count::default();
    let path = go(&cache, model, &mut Shop::new(&pieces), &mut count).unwrap();
    assert_eq!(fs::read(&path).unwrap(), pieces.concat());
    assert_eq!((count.at, count.finished), (model.bytes, true));
    let left: Vec<_> = fs::read_dir(cache.partial()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["toy.lock"]);
    // A second pull finds it and needs no wheel.
    assert_eq!(go(&cache, model, &mut Shop { until: 0, ..Shop::new(&pieces) }, &mut Silent).unwrap(), path);
    assert_eq!(cache.list().unwrap().len(), 1);
}

#[test]
fn an_interrupted_pull_goes_on_where_it_was() {
    let cache = Cache::at(scratch("resume"));
    let pieces = pieces();
    let model = model_of(&pieces);
    let e = go(&cache, model, &mut Shop { until: 2, ..Shop::new(&pieces) }, &mut Silent).unwrap_err();
    assert!(e.to_string().contains("offline"), "{e}");
    assert!(cache.have(model).is_none() && !cache.model_path(model).exists());
    let mut rest = Shop::new(&pieces);
    let mut count = Count::default();
    let path = go(&cache, model, &mut rest, &mut count).unwrap();
    assert_eq!(rest.served.load(Ordering::SeqCst), 1, "two parts were there already");
    assert_eq!(fs::read(path).unwrap(), pieces.concat());
    assert_eq!(count.at, model.bytes);
}

#[test]
fn a_damaged_partial_file_is_repaired() {
    let cache = Cache::at(scratch("repair"));
    let pieces = pieces();
    let model = model_of(&pieces);
    go(&cache, model, &mut Shop { until: 2, ..Shop::new(&pieces) }, &mut Silent).unwrap_err();
    let partial = cache.partial().join("toy.gguf");
    let mut bytes = fs::read(&partial).unwrap();
    bytes[1_200_100] ^= 1; // in the second part
    bytes.extend([7; 50]); // and the beginning of a third
    fs::write(&partial, bytes).unwrap();
    let mut rest = Shop::new(&pieces);
    let path = go(&cache, model, &mut rest, &mut Silent).unwrap();
    assert_eq!(rest.served.load(Ordering::SeqCst), 2);
    assert_eq!(fs::read(path).unwrap(), pieces.concat());
}

#[test]
fn wrong_bytes_are_refused_and_not_found_again() {
    let cache = Cache::at(scratch("mismatch"));
    let pieces = pieces();
    let model = model_of(&pieces);
    for wrong in [content(9, 700_000), content(2, 699_999), content(2, 700_001)] {
        let mut shop = Shop::new(&[pieces[0].clone(), wrong, pieces[2].clone()]);
        let e = go(&cache, model, &mut shop, &mut Silent).unwrap_err();
        assert!(matches!(e, PullError::Mismatch { .. }), "{e}");
        assert!(e.to_string().contains("data/piece1 of part1==1.0"), "{e}");
        assert!(!cache.model_path(model).exists());
        assert_eq!(fs::metadata(cache.partial().join("toy.gguf")).unwrap().len(), 1_200_000);
    }
    go(&cache, model, &mut Shop::new(&pieces), &mut Silent).unwrap();
}

#[test]
fn a_wheel_that_is_no_zip_or_lacks_the_member_is_named() {
    let dir = scratch("bad-wheel");
    let wheel = dir.join("x.whl");
    fs::write(&wheel, b"not a zip").unwrap();
    let e = wheel::with_member(&wheel, "m", |_| Ok(())).unwrap_err().to_string();
    assert!(e.contains("x.whl") && e.contains("not a wheel"), "{e}");
    let mut zip = zip::ZipWriter::new(fs::File::create(&wheel).unwrap());
    zip.start_file("other", SimpleFileOptions::default()).unwrap();
    zip.finish().unwrap();
    let e = wheel::with_member(&wheel, "m", |_| Ok(())).unwrap_err().to_string();
    assert!(e.contains("member m"), "{e}");
}

#[test]
fn a_broken_stream_keeps_the_parts_before_it() {
    let dir = scratch("broken-stream");
    let pieces = pieces();
    let Source::Packages(parts) = &model_of(&pieces).sources[0] else { unreachable!() };
    let path = dir.join("x.gguf");
    let mut assembly = Assembly::resume(&path, parts, &Silent).unwrap();
    assembly.append(&mut pieces[0].as_slice(), &dir, &|| false).unwrap();
    struct Broken(usize);
    impl std::io::Read for Broken {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            if self.0 == 0 {
                return Err(std::io::Error::other("invalid checksum"));
            }
            let n = buffer.len().min(self.0);
            self.0 -= n;
            Ok(n)
        }
    }
    let e = assembly.append(&mut Broken(500_000), &dir, &|| false).unwrap_err();
    assert!(e.to_string().contains("invalid checksum"), "{e}");
    assert_eq!(fs::metadata(&path).unwrap().len(), 1_200_000);
    assert!(matches!(assembly.append(&mut Broken(1), &dir, &|| true), Err(PullError::Cancelled)));
    assembly.append(&mut pieces[1].as_slice(), &dir, &|| false).unwrap();
    assert_eq!(assembly.length(), 1_900_000);
}

#[test]
fn of_two_pulls_at_once_one_fetches() {
    let cache = Cache::at(scratch("lock"));
    let pieces = pieces();
    let model = model_of(&pieces);
    let served: Arc<AtomicUsize> = Arc::default();
    let paths = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut shop = Shop { served: served.clone(), ..Shop::new(&pieces) };
                paths.lock().unwrap().push(go(&cache, model, &mut shop, &mut Silent).unwrap());
            });
        }
    });
    assert_eq!(served.load(Ordering::SeqCst), pieces.len());
    assert_eq!(fs::read(&paths.lock().unwrap()[0]).unwrap(), pieces.concat());
}

#[test]
fn waiting_for_a_lock_can_be_cancelled_and_is_told() {
    #[derive(Default)]
    struct Impatient(Vec<String>);
    impl Progress for Impatient {
        fn message(&mut self, text: &str) {
            self.0.push(text.into());
        }
        fn cancelled(&self) -> bool {
            true
        }
    }
    let cache = Cache::at(scratch("wait"));
    let held = cache.lock("toy", &mut Silent).unwrap();
    let mut progress = Impatient::default();
    assert!(matches!(cache.lock("toy", &mut progress), Err(PullError::Cancelled)));
    assert_eq!(progress.0, ["another process is fetching toy; waiting for it"]);
    drop(held);
    cache.lock("toy", &mut progress).unwrap();
}

#[test]
fn a_short_file_in_the_cache_does_not_count() {
    let cache = Cache::at(scratch("short"));
    let pieces = pieces();
    let model = model_of(&pieces);
    let path = go(&cache, model, &mut Shop::new(&pieces), &mut Silent).unwrap();
    verify(&cache, model, &mut Silent).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[5] ^= 1;
    fs::write(&path, &bytes).unwrap();
    assert!(matches!(verify(&cache, model, &mut Silent), Err(PullError::Mismatch { .. })));
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert!(cache.have(model).is_none());
}
