//! Whole or absent: torn files, killed writers, full disks.

use super::*;
use crate::random::splitmix64;

/// A folder that goes away with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("kinglet-checkpoint-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn contents(step: u64) -> Vec<(&'static str, Vec<u8>)> {
    let bytes = |count: u64, stream: u64| (0..count).map(|i| splitmix64(stream + step, i) as u8).collect();
    vec![
        ("adapter.safetensors", bytes(3000, 10)),
        ("optimizer.safetensors", bytes(900, 20)),
        ("state.json", bytes(40, 30)),
    ]
}

fn save(checkpoints: &Checkpoints, step: u64) -> Result<PathBuf> {
    let contents = contents(step);
    let files: Vec<(&str, &[u8])> = contents.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
    checkpoints.save(step, &files)
}

fn assert_is(checkpoint: &Checkpoint, step: u64) {
    assert_eq!(checkpoint.step, step);
    for (name, bytes) in contents(step) {
        assert_eq!(checkpoint.file(name).unwrap(), bytes);
    }
}

#[test]
fn keeps_the_newest_and_reads_them_back() {
    let folder = Folder::new("keep");
    let checkpoints = Checkpoints::new(&folder.0, 2);
    assert!(checkpoints.latest().unwrap().0.is_none());
    for step in [5, 10, 15] {
        save(&checkpoints, step).unwrap();
    }
    assert_eq!(checkpoints.steps().unwrap(), [10, 15]);
    let (latest, skipped) = checkpoints.latest().unwrap();
    assert_is(&latest.unwrap(), 15);
    assert!(skipped.is_empty());
    // The same step once more replaces it.
    save(&checkpoints, 15).unwrap();
    assert_is(&checkpoints.load(15).unwrap(), 15);
    assert!(checkpoints.load(15).unwrap().file("other").unwrap_err().to_string().contains("other"));
}

/// Cuts, and flips a bit of, every file at random offsets: always found, and the one before is taken.
#[test]
fn finds_torn_and_rotten_files() {
    let folder = Folder::new("torn");
    let checkpoints = Checkpoints::new(&folder.0, 3);
    save(&checkpoints, 1).unwrap();
    let path = save(&checkpoints, 2).unwrap();
    let names = ["adapter.safetensors", "optimizer.safetensors", "state.json", MANIFEST];
    for (case, name) in names.iter().cycle().take(200).enumerate() {
        let file = path.join(name);
        let whole = fs::read(&file).unwrap();
        let at = (splitmix64(99, case as u64) % whole.len() as u64) as usize;
        let mut broken = whole.clone();
        if case % 8 < 4 {
            broken.truncate(at);
        } else {
            broken[at] ^= 1 << (case / 8 % 8);
        }
        fs::write(&file, &broken).unwrap();
        let (latest, skipped) = checkpoints.latest().unwrap();
        // A flipped bit in the manifest's white space changes nothing; anything else does.
        match latest.unwrap() {
            found if found.step == 1 => {
                assert_is(&found, 1);
                assert!(skipped.len() == 1 && skipped[0].to_string().contains("step-00000002"), "{skipped:?}");
            }
            found => {
                assert!(*name == MANIFEST, "case {case}: {name} at {at}");
                assert_is(&found, 2);
            }
        }
        fs::write(&file, &whole).unwrap();
    }
    fs::remove_file(path.join("state.json")).unwrap();
    assert_is(&checkpoints.latest().unwrap().0.unwrap(), 1);
}

/// A writer killed at any moment leaves a temporary folder with any part of the files.
#[test]
fn ignores_what_a_killed_writer_left() {
    let folder = Folder::new("killed");
    let checkpoints = Checkpoints::new(&folder.0, 2);
    save(&checkpoints, 1).unwrap();
    let all: usize = contents(2).iter().map(|(_, bytes)| bytes.len()).sum();
    for case in 0..50 {
        let temporary = folder.0.join(format!("{TEMPORARY}00000002"));
        fs::create_dir_all(&temporary).unwrap();
        let mut left = (splitmix64(7, case) % (all as u64 + 1)) as usize;
        for (name, bytes) in contents(2) {
            let part = left.min(bytes.len());
            fs::write(temporary.join(name), &bytes[..part]).unwrap();
            left -= part;
        }
        assert_is(&checkpoints.latest().unwrap().0.unwrap(), 1);
    }
    save(&checkpoints, 2).unwrap();
    assert_is(&checkpoints.latest().unwrap().0.unwrap(), 2);
    assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 2);
}

/// A writer killed after it removed the checkpoint it was about to replace, and before it named the new one.
#[test]
fn finds_what_lacks_only_its_name() {
    let folder = Folder::new("nameless");
    let checkpoints = Checkpoints::new(&folder.0, 1);
    let path = save(&checkpoints, 3).unwrap();
    fs::rename(&path, folder.0.join(format!("{TEMPORARY}00000003"))).unwrap();
    assert_is(&checkpoints.latest().unwrap().0.unwrap(), 3);
    assert_eq!(checkpoints.steps().unwrap(), [3]);
}

/// A disk with room for so many more bytes.
#[test]
fn a_full_disk_keeps_what_was_there() {
    let folder = Folder::new("full");
    let checkpoints = Checkpoints::new(&folder.0, 1);
    save(&checkpoints, 1).unwrap();
    let contents = contents(2);
    let files: Vec<(&str, &[u8])> = contents.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
    for room in [0, 1, 2999, 3000, 3500, 3900, 3945] {
        let left = std::cell::Cell::new(room);
        let full = |path: &Path, bytes: &[u8]| {
            let part = bytes.len().min(left.get());
            left.set(left.get() - part);
            write_file(path, &bytes[..part])?;
            if part < bytes.len() { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        };
        let error = checkpoints.save_with(2, &files, full).unwrap_err();
        assert!(matches!(&error, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull));
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1, "nothing is left of it");
        assert_is(&checkpoints.latest().unwrap().0.unwrap(), 1);
    }
}

#[test]
fn names_stay_inside() {
    let folder = Folder::new("names");
    for name in ["", "../a", "a/b", ".a", MANIFEST] {
        assert!(Checkpoints::new(&folder.0, 1).save(1, &[(name, b"")]).is_err(), "{name}");
    }
}

#[test]
fn tensors_come_back() {
    let tensors = [
        Tensor { name: "a".into(), shape: vec![2, 2], values: Values::F32(vec![1.0, -0.0, f32::MIN_POSITIVE, 1e30]) },
        Tensor::u8("b", vec![0, 255, 7]),
        Tensor::f32("empty", Vec::new()),
    ];
    let bytes = encode_tensors(&tensors, &[("format", "pt".into())]).unwrap();
    let mut back = decode_tensors(&bytes, "x").unwrap();
    back.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(back, tensors);
    assert!(
        decode_tensors(&bytes[..bytes.len() - 1], "x.safetensors").unwrap_err().to_string().contains("x.safetensors")
    );
    let wrong = Tensor { shape: vec![3], ..tensors[0].clone() };
    assert!(encode_tensors(&[wrong], &[]).is_err());
}
