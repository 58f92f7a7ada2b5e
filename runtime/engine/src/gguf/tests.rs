//! Hostile and well-formed files, all built here. `Raw` writes any bytes that the format can hold, right or wrong,
//! independently of the module's own writer. Real models are opened in the tests crate.

use std::path::PathBuf;
use std::sync::Arc;

use super::*;
use crate::quant::DType;
use crate::{Error, Result};

/// A file under construction; every part can be given wrongly.
#[derive(Clone, Default)]
struct Raw {
    keys: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    data: Vec<u8>,
}

fn string(s: impl AsRef<[u8]>) -> Vec<u8> {
    let s = s.as_ref();
    [&(s.len() as u64).to_le_bytes(), s].concat()
}

/// `type, value` of a u32.
fn u32_value(v: u32) -> Vec<u8> {
    [4u32.to_le_bytes(), v.to_le_bytes()].concat()
}

/// `type, element type, length` of an array, without its elements.
fn array_head(element: u32, len: u64) -> Vec<u8> {
    [&9u32.to_le_bytes()[..], &element.to_le_bytes(), &len.to_le_bytes()].concat()
}

impl Raw {
    fn key(mut self, key: impl AsRef<[u8]>, type_and_value: Vec<u8>) -> Raw {
        self.keys.push([string(key), type_and_value].concat());
        self
    }

    fn tensor(mut self, name: impl AsRef<[u8]>, dims: &[u64], dtype: u32, offset: u64) -> Raw {
        let mut t = string(name);
        t.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| t.extend(d.to_le_bytes()));
        t.extend(dtype.to_le_bytes());
        t.extend(offset.to_le_bytes());
        self.tensors.push(t);
        self
    }

    fn data(mut self, bytes: usize) -> Raw {
        self.data = vec![0; bytes];
        self
    }

    fn build(&self) -> Vec<u8> {
        self.build_as(*b"GGUF", 3, self.tensors.len() as u64, self.keys.len() as u64)
    }

    fn build_as(&self, magic: [u8; 4], version: u32, tensors: u64, keys: u64) -> Vec<u8> {
        let mut out = magic.to_vec();
        out.extend(version.to_le_bytes());
        out.extend(tensors.to_le_bytes());
        out.extend(keys.to_le_bytes());
        out.extend(self.keys.concat());
        out.extend(self.tensors.concat());
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        out
    }
}

fn open(bytes: Vec<u8>) -> Result<Gguf> {
    // `copy`, because a Vec<u8> promises no alignment.
    Gguf::from_memory_with(Arc::new(bytes), &OpenOptions { copy: true, validate: true, ..OpenOptions::default() })
}

/// Checks that the bytes are refused with a message that has all of `fragments`.
fn refused(attack: &str, result: Result<Gguf>, fragments: &[&str]) {
    let message = match result {
        Ok(_) => panic!("{attack}: was opened"),
        Err(e @ (Error::Format { .. } | Error::Unsupported(_))) => e.to_string(),
        Err(e) => panic!("{attack}: another kind of error: {e}"),
    };
    for f in fragments {
        assert!(message.contains(f), "{attack}: no {f:?} in: {message}");
    }
}

#[test]
fn attacks() {
    let r = Raw::default;
    let f32s = DType::F32.ggml();
    let nested = |depth: usize| {
        let mut v = vec![];
        v.extend(9u32.to_le_bytes());
        for _ in 1..depth {
            v.extend(9u32.to_le_bytes());
            v.extend(1u64.to_le_bytes());
        }
        v.extend(0u32.to_le_bytes());
        v.extend(0u64.to_le_bytes());
        v
    };
    let table: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("empty", vec![], &["byte 0", "cut short"]),
        ("magic only", b"GGUF".to_vec(), &["byte 4", "version"]),
        ("old ggml", r().build_as(*b"tjgg", 3, 0, 0), &["byte 0", "before GGUF", "convert"]),
        ("git lfs", b"version https://git-lfs.github.com/spec/v1\n".to_vec(), &["Git LFS pointer"]),
        ("web page", b"<!DOCTYPE html><html>not found</html>".to_vec(), &["web page"]),
        ("version 1", r().build_as(MAGIC, 1, 0, 0), &["byte 4", "version 1"]),
        ("version 9", r().build_as(MAGIC, 9, 0, 0), &["version 9", "update"]),
        ("big-endian", r().build_as(MAGIC, 3u32.swap_bytes(), 0, 0), &["big-endian", "gguf_convert_endian.py"]),
        ("tensor count", r().build_as(MAGIC, 3, u64::MAX, 0), &["byte 8", "tensors", "limit"]),
        ("tensor count beyond the file", r().build_as(MAGIC, 3, 100_000, 0), &["byte 8", "100000 tensors", "left"]),
        ("key count", r().build_as(MAGIC, 3, 0, 1 << 40), &["byte 16", "metadata keys", "limit"]),
        ("key count beyond the file", r().build_as(MAGIC, 3, 0, 60_000), &["byte 16", "60000 metadata keys"]),
        ("key length", r().key("k", u32_value(1)).build_as(MAGIC, 3, 0, 1).tap(|b| b[24] = 200), &["byte 32", "key"]),
        (
            "key length overflow",
            r().key("k", u32_value(1)).build().tap(|b| b[24..32].fill(255)),
            &["byte 24", "limit of 65535"],
        ),
        ("empty key", r().key("", u32_value(1)).build(), &["byte 24", "empty"]),
        ("key not UTF-8", r().key(b"a\xff", u32_value(1)).build(), &["byte 33", "UTF-8"]),
        ("key twice", r().key("k", u32_value(1)).key("k", u32_value(1)).build(), &["key k", "twice", "byte 41"]),
        ("value type", r().key("k", 13u32.to_le_bytes().into()).build(), &["(key k)", "13 is no value type"]),
        ("boolean of 2", r().key("k", [&7u32.to_le_bytes()[..], &[2]].concat()).build(), &["(key k)", "boolean"]),
        (
            "string not UTF-8",
            r().key("k", [8u32.to_le_bytes().to_vec(), string(b"ab\xc3")].concat()).build(),
            &["byte 47 (key k)", "UTF-8"],
        ),
        (
            "string length",
            r().key("k", [&8u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat()).build(),
            &["(key k)", "limit"],
        ),
        ("array length", r().key("k", array_head(0, u64::MAX)).build(), &["(key k)", "array elements", "limit"]),
        ("array beyond the file", r().key("k", array_head(10, 1 << 20)).build(), &["(key k)", "do not fit"]),
        ("array of no type", r().key("k", array_head(77, 1)).build(), &["(key k)", "77 is no value type"]),
        ("nested too deep", r().key("k", nested(limits::MAX_ARRAY_DEPTH + 1)).build(), &["(key k)", "nested"]),
        ("nested without end", r().key("k", nested(100_000)).build(), &["(key k)", "nested"]),
        ("alignment 0", r().key(KEY_ALIGNMENT, u32_value(0)).build(), &["key general.alignment", "power of two"]),
        ("alignment 24", r().key(KEY_ALIGNMENT, u32_value(24)).build(), &["key general.alignment", "is 24"]),
        ("alignment of 2 GiB", r().key(KEY_ALIGNMENT, u32_value(1 << 31)).build(), &["key general.alignment"]),
        (
            "alignment as text",
            r().key(KEY_ALIGNMENT, [8u32.to_le_bytes().to_vec(), string("32")].concat()).build(),
            &["key general.alignment", "a string", "integer"],
        ),
        ("tensor without a name", r().tensor("", &[8], f32s, 0).data(32).build(), &["byte 24", "no name"]),
        ("tensor name length", r().tensor([b'n'; 513], &[8], f32s, 0).data(32).build(), &["byte 24", "limit of 512"]),
        ("tensor not UTF-8", r().tensor(b"\xfe", &[8], f32s, 0).data(32).build(), &["byte 32", "UTF-8"]),
        (
            "tensor twice",
            r().tensor("t", &[8], f32s, 0).tensor("t", &[8], f32s, 32).data(64).build(),
            &["tensor t", "twice"],
        ),
        ("5 dimensions", r().tensor("t", &[1; 5], f32s, 0).data(32).build(), &["(tensor t)", "5 dimensions"]),
        ("no dimension", r().tensor("t", &[], f32s, 0).data(32).build(), &["tensor t", "no dimensions"]),
        ("dimension 0", r().tensor("t", &[8, 0], f32s, 0).data(32).build(), &["tensor t", "dimension of 0"]),
        (
            "elements overflow",
            r().tensor("t", &[1 << 32, 1 << 32], f32s, 0).data(32).build(),
            &["tensor t", "more elements"],
        ),
        (
            "elements overflow to nothing",
            r().tensor("t", &[1 << 16, 1 << 16, 1 << 16, 1 << 16], f32s, 0).data(32).build(),
            &["tensor t", "more elements"],
        ),
        ("elements as a negative", r().tensor("t", &[u64::MAX], f32s, 0).data(32).build(), &["tensor t", "elements"]),
        (
            "half a block",
            r().tensor("t", &[48, 2], DType::Q8_0.ggml(), 0).data(102).build(),
            &["tensor t", "Q8_0 blocks of 32"],
        ),
        (
            "half a K block",
            r().tensor("t", &[128], DType::Q4_K.ggml(), 0).data(72).build(),
            &["tensor t", "Q4_K", "256"],
        ),
        ("tensor type", r().tensor("t", &[8], 1000, 0).data(32).build(), &["(tensor t)", "1000 is no known"]),
        ("tensor type of others", r().tensor("t", &[256], 16, 0).data(256).build(), &["tensor t", "IQ2_XXS", "Q4_K"]),
        ("unaligned", r().tensor("t", &[8], f32s, 4).data(64).build(), &["tensor t", "offset 4", "alignment 32"]),
        ("beyond the file", r().tensor("t", &[16], f32s, 0).data(63).build(), &["tensor t", "64 bytes", "cut short"]),
        ("far beyond the file", r().tensor("t", &[8], f32s, 1 << 40).data(32).build(), &["tensor t", "beyond"]),
        ("offset overflow", r().tensor("t", &[8], f32s, u64::MAX - 31).data(32).build(), &["tensor t", "beyond"]),
        (
            "overlap",
            r().tensor("a", &[16], f32s, 0).tensor("b", &[8], f32s, 32).data(64).build(),
            &["tensor b", "overlap", "of a"],
        ),
        (
            "same place",
            r().tensor("a", &[8], f32s, 0).tensor("b", &[8], f32s, 0).data(32).build(),
            &["tensor b", "overlap", "of a"],
        ),
        (
            "part of a split model",
            r().key("split.count", u32_value(2)).key("split.no", u32_value(0)).build(),
            &["split.count", "part 1 of a model in 2 files"],
        ),
        (
            "split place",
            r().key("split.count", u32_value(2)).key("split.no", u32_value(2)).build(),
            &["split.no", "numbered from 0"],
        ),
        ("split count", r().key("split.count", u32_value(60_000)).build(), &["split.count", "limit of 1024"]),
    ];
    for (attack, bytes, fragments) in table {
        refused(attack, open(bytes), fragments);
    }
    // The builder itself is right: what it makes without an attack is opened.
    let fine =
        r().key("k", u32_value(7)).key("n", nested(limits::MAX_ARRAY_DEPTH)).tensor("t", &[8], f32s, 32).data(64);
    let model = open(fine.build()).unwrap();
    assert_eq!((model.metadata().u32("k").unwrap(), model.tensors()[0].len_bytes(), model.version()), (7, 32, 3));
    assert_eq!(open(fine.build_as(MAGIC, 2, 1, 2)).unwrap().version(), 2);
}

trait Tap: Sized {
    fn tap(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

impl Tap for Vec<u8> {}

/// A folder of its own that goes away.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("kinglet-gguf-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A header with a value of every type and three tensors.
fn everything() -> (Writer, Vec<(&'static str, Vec<u8>)>) {
    let mut w = Writer::new();
    w.set("general.architecture", "test")
        .set("z.u8", 200u8)
        .set("a.i8", -100i8)
        .set("u16", 60_000u16)
        .set("i16", -30_000i16)
        .set("u32", 4_000_000_000u32)
        .set("i32", -2_000_000_000)
        .set("f32", 0.1f32)
        .set("bool", true)
        .set("string", "naïve 文字 🐦")
        .set("u64", u64::MAX)
        .set("i64", i64::MIN)
        .set("f64", 1e300)
        .set("array.u8", vec![1u8, 2])
        .set("array.i8", vec![-1i8])
        .set("array.u16", vec![1u16, 65_535])
        .set("array.i16", vec![-1i16])
        .set("array.u32", vec![1u32, 2, 3])
        .set("array.i32", vec![-1i32, 2])
        .set("array.f32", vec![0.5f32, -0.0])
        .set("array.bool", vec![true, false])
        .set("array.string", vec![String::new(), "b".to_string()])
        .set("array.array", vec![Array::from(vec![1u32]), Array::from(Vec::<f64>::new())])
        .set("array.u64", vec![u64::MAX])
        .set("array.i64", vec![i64::MIN])
        .set("array.f64", vec![1e300])
        .set("array.none", Vec::<String>::new());
    w.tensor("first.weight", DType::F32, &[3]).unwrap();
    w.tensor("second.weight", DType::Q8_0, &[64, 3]).unwrap();
    w.tensor("third.weight", DType::F16, &[5, 2, 1, 3]).unwrap();
    let pattern = |n: usize| (0..n).map(|i| (i % 113) as u8).collect::<Vec<u8>>();
    (w, vec![("first.weight", pattern(12)), ("second.weight", pattern(6 * 34)), ("third.weight", pattern(60))])
}

fn write(path: &std::path::Path, w: &Writer, tensors: &[(&str, Vec<u8>)]) -> u64 {
    let mut file = w.create(path).unwrap();
    for (name, bytes) in tensors {
        // In two pieces: the writer streams.
        let (a, b) = bytes.split_at(bytes.len() / 2);
        file.write(name, a).unwrap();
        file.write(name, b).unwrap();
    }
    file.finish().unwrap()
}

/// The file of `everything`, as bytes.
fn everything_bytes(test: &str) -> Vec<u8> {
    let folder = Folder::new(test);
    let (w, tensors) = everything();
    write(&folder.path("m.gguf"), &w, &tensors);
    std::fs::read(folder.path("m.gguf")).unwrap()
}

#[test]
fn round_trip() {
    let folder = Folder::new("round-trip");
    let (w, tensors) = everything();
    let path = folder.path("model.gguf");
    let size = write(&path, &w, &tensors);
    assert_eq!(folder.names(), ["model.gguf"], "temporary files are left");

    let file = || std::fs::File::open(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(size, bytes.len() as u64);
    // The same model through every door.
    let padded = [vec![0; 4096 + 40], bytes.clone(), vec![0; 7]].concat();
    std::fs::write(folder.path("package"), &padded).unwrap();
    let package = || std::fs::File::open(folder.path("package")).unwrap();
    let copy = OpenOptions { copy: true, ..OpenOptions::default() };
    let models = [
        Gguf::open(&path).unwrap(),
        Gguf::open_with(&path, &copy).unwrap(),
        Gguf::open_with(&path, &OpenOptions { header_only: true, ..OpenOptions::default() }).unwrap(),
        Gguf::from_file(file(), 0, size).unwrap(),
        Gguf::from_file(package(), 4096 + 40, size).unwrap(),
        Gguf::from_file_with(package(), 4096 + 40, size, &copy).unwrap(),
        open(bytes.clone()).unwrap(),
    ];
    for model in &models {
        assert_eq!(model.file_bytes(), size);
        let m = model.metadata();
        let keys: Vec<_> = m.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
        let mut wanted = w.clone();
        let wanted: Vec<_> = wanted.metadata_mut().iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
        assert_eq!(keys, wanted);
        for ((name, bytes), t) in tensors.iter().zip(model.tensors()) {
            assert_eq!((t.name.as_str(), model.data(t)), (*name, bytes.as_slice()));
            assert_eq!(t.offset() % model.alignment(), 0);
            assert_eq!(model.tensor(name), Some(t));
        }
        let t = model.tensor("third.weight").unwrap();
        assert_eq!((t.width(), t.rows(), t.elements(), t.len_bytes()), (5, 6, 30, 60));
        assert_eq!(model.tensor("fourth.weight"), None);
    }

    // Copied through the writer it is the same, byte for byte.
    let again = folder.path("again.gguf");
    write(&again, &Writer::like(&models[0]), &tensors);
    assert_eq!(std::fs::read(&again).unwrap(), bytes);
}

#[test]
fn getters() {
    let bytes = everything_bytes("getters");
    let model = open(bytes).unwrap();
    let m = model.metadata();
    assert_eq!(m.str("string").unwrap(), "naïve 文字 🐦");
    assert_eq!((m.u32("z.u8").unwrap(), m.u64("u16").unwrap(), m.i32("a.i8").unwrap()), (200, 60_000, -100));
    assert_eq!((m.f32("f32").unwrap(), m.bool("bool").unwrap()), (0.1, true));
    assert_eq!(m.strings("array.string").unwrap(), ["", "b"]);
    assert_eq!(m.i32s("array.u16").unwrap(), [1, 65_535]);
    assert_eq!(m.u32s("array.u8").unwrap(), [1, 2]);
    assert_eq!(m.f32s("array.f32").unwrap(), [0.5, 0.0]);
    assert_eq!(m.bools("array.bool").unwrap(), [true, false]);
    assert_eq!((m.opt_u32("no").unwrap(), m.opt_strings("no").unwrap()), (None, None));
    for (result, fragments) in [
        (m.u32("no").map(drop), ["<memory>: key no:", "missing"]),
        (m.u32("a.i8").map(drop), ["key a.i8", "i8 -100"]),
        (m.u32("u64").map(drop), ["key u64", "u64 18446744073709551615"]),
        (m.opt_u32("string").map(drop), ["key string", "a string"]),
        (m.u64("f32").map(drop), ["key f32", "f32 0.1"]),
        (m.str("array.u8").map(drop), ["key array.u8", "an array of 2 u8"]),
        (m.u32s("array.i32").map(drop), ["key array.i32", "array of integers"]),
        (m.i32s("array.string").map(drop), ["key array.string", "array of integers"]),
        (m.bool("z.u8").map(drop), ["key z.u8", "boolean"]),
    ] {
        let message = result.unwrap_err().to_string();
        fragments.iter().for_each(|f| assert!(message.contains(f), "no {f:?} in: {message}"));
    }
}

#[test]
fn metadata_keeps_its_order() {
    let mut m = Metadata::new("x");
    for key in ["c", "a", "b"] {
        m.set(key, 1u32);
    }
    m.set("a", 2u32);
    assert_eq!(m.remove("c"), Some(Value::U32(1)));
    assert_eq!(m.remove("c"), None);
    m.set("d", 3u32);
    assert_eq!(m.iter().map(|(k, _)| k).collect::<Vec<_>>(), ["a", "b", "d"]);
    assert_eq!((m.u32("a").unwrap(), m.u32("b").unwrap(), m.u32("d").unwrap()), (2, 1, 3));
}

/// Cut anywhere before the end of the last tensor, a file is refused; and the message is about the cut.
#[test]
fn truncated_at_every_byte() {
    let bytes = everything_bytes("truncated");
    let last = open(bytes.clone()).unwrap().tensors()[2].clone();
    let end = last.offset() + last.len_bytes();
    for n in 0..end {
        refused(&format!("cut at {n}"), open(bytes[..n].to_vec()), &["<memory>: "]);
    }
    for n in end..=bytes.len() {
        open(bytes[..n].to_vec()).unwrap_or_else(|e| panic!("only padding is cut at {n}: {e}"));
    }
}

/// Files with random bytes changed are opened or refused, never worse; what is opened stays within its bounds.
#[test]
fn mutations() {
    let bytes = everything_bytes("mutations");
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % n as u64) as usize
    };
    let interesting = [0u8, 1, 2, 0x7f, 0x80, 0xff];
    let (mut opened, mut rejected) = (0, 0);
    for _ in 0..20_000 {
        let mut b = bytes.clone();
        for _ in 0..=random(3) {
            let at = random(b.len());
            match random(5) {
                0 => b[at] = random(256) as u8,
                1 => b[at] = interesting[random(interesting.len())],
                2 => b[at..].iter_mut().take(8).for_each(|x| *x = 0xff),
                3 => drop(b.drain(at..(at + 1 + random(16)).min(bytes.len()).min(b.len()).max(at))),
                _ => b.insert(at, random(256) as u8),
            }
        }
        match open(b) {
            Ok(model) => {
                opened += 1;
                for t in model.tensors() {
                    assert_eq!(model.data(t).len(), t.len_bytes());
                }
            }
            Err(Error::Format { .. } | Error::Unsupported(_)) => rejected += 1,
            Err(e) => panic!("another kind of error: {e}"),
        }
    }
    // Both happen, or the test is about nothing.
    assert!(opened > 1000 && rejected > 1000, "{opened} opened, {rejected} refused");
}

/// The shards of a model of `count` files with one tensor each; `change` may spoil the header of a shard.
fn shards(folder: &Folder, count: u16, change: impl Fn(u16, &mut Writer)) -> Vec<PathBuf> {
    (0..count)
        .map(|no| {
            let mut w = Writer::new();
            if no == 0 {
                w.set("general.architecture", "test");
            }
            w.set("split.no", no).set("split.count", count).set("split.tensors.count", i32::from(count));
            w.tensor(&format!("blk.{no}.weight"), DType::F32, &[8]).unwrap();
            change(no, &mut w);
            let path = folder.path(&format!("model-{:05}-of-{count:05}.gguf", no + 1));
            let mut file = w.create(&path).unwrap();
            file.write(&format!("blk.{no}.weight"), &[no as u8; 32]).unwrap();
            file.finish().unwrap();
            path
        })
        .collect()
}

#[test]
fn split_files() {
    let folder = Folder::new("split");
    let paths = shards(&folder, 3, |_, _| {});
    for path in &paths {
        let model = Gguf::open(path).unwrap();
        assert_eq!((model.shards(), model.tensors().len()), (3, 3));
        assert_eq!(model.metadata().str("general.architecture").unwrap(), "test");
        for (no, t) in model.tensors().iter().enumerate() {
            assert_eq!(t.name, format!("blk.{no}.weight"));
            assert_eq!((t.shard(), model.data(t)), (no, &[no as u8; 32][..]));
        }
        let merged = Writer::like(&model);
        let tensors: Vec<_> = model.tensors().iter().map(|t| (t.name.as_str(), model.data(t).to_vec())).collect();
        write(&folder.path("merged.gguf"), &merged, &tensors);
        let merged = Gguf::open(folder.path("merged.gguf")).unwrap();
        assert_eq!((merged.shards(), merged.tensors().len(), merged.metadata().len()), (1, 3, 1));
    }
}

#[test]
fn split_attacks() {
    let attack = |name: &str, spoil: &dyn Fn(&Folder, &[PathBuf]), open: usize, fragments: &[&str]| {
        let folder = Folder::new(&format!("split-{name}"));
        let paths = shards(&folder, 3, |_, _| {});
        spoil(&folder, &paths);
        refused(name, Gguf::open(&paths[open]), fragments);
    };
    let over = |from: usize, to: usize| {
        move |_: &Folder, p: &[PathBuf]| {
            std::fs::copy(&p[from], &p[to]).unwrap();
        }
    };
    attack("copied", &over(0, 1), 0, &["model-00002-of-00003.gguf: key split.no", "place 2 of 3", "part 1"]);
    attack("copied-and-opened", &over(0, 2), 2, &["model-00003-of-00003.gguf: key split.no", "part 1"]);
    let swap = |f: &Folder, p: &[PathBuf]| {
        std::fs::rename(&p[1], f.path("x")).unwrap();
        std::fs::rename(&p[2], &p[1]).unwrap();
        std::fs::rename(f.path("x"), &p[2]).unwrap();
    };
    attack("swapped", &swap, 0, &["model-00002-of-00003.gguf: key split.no", "part 3"]);
    #[cfg(unix)]
    attack(
        "cyclic",
        &|_, p| {
            std::fs::remove_file(&p[2]).unwrap();
            std::os::unix::fs::symlink(&p[0], &p[2]).unwrap();
        },
        0,
        &["model-00003-of-00003.gguf: key split.no", "link"],
    );
    let foreign = |_: &Folder, p: &[PathBuf]| {
        let mut w = Writer::new();
        w.set("general.architecture", "other");
        w.create(&p[1]).unwrap().finish().unwrap();
    };
    attack("foreign", &foreign, 0, &["model-00002-of-00003.gguf: key split.count", "no part of the same model"]);

    let folder = Folder::new("split-missing");
    let paths = shards(&folder, 3, |_, _| {});
    std::fs::remove_file(&paths[1]).unwrap();
    match Gguf::open(&paths[0]) {
        Err(Error::Io { path, .. }) => assert_eq!(path, paths[1]),
        other => panic!("missing shard: {other:?}"),
    }
    let renamed = folder.path("renamed.gguf");
    std::fs::rename(&paths[0], &renamed).unwrap();
    refused("renamed", Gguf::open(&renamed), &["-00001-of-00003.gguf", "restore the names"]);

    let folder = Folder::new("split-tensors");
    let miscounted = shards(&folder, 2, |_, w| {
        w.set("split.tensors.count", 5);
    });
    refused("miscounted", Gguf::open(&miscounted[0]), &["split.tensors.count", "is 5", "2 tensors"]);
    let folder = Folder::new("split-twice");
    let paths = shards(&folder, 2, |_, _| {});
    let mut w = Writer::new();
    w.set("split.no", 1u16).set("split.count", 2u16).set("split.tensors.count", 2);
    w.tensor("blk.0.weight", DType::F32, &[8]).unwrap();
    write(&paths[1], &w, &[("blk.0.weight", vec![0; 32])]);
    refused("tensor in two", Gguf::open(&paths[0]), &["model-00002", "tensor blk.0.weight", "00001-of-00002.gguf too"]);
}

/// A block of every type with one scale turned into NaN is found, wherever it is; untouched it passes.
#[test]
fn validation() {
    let folder = Folder::new("validation");
    let path = folder.path("m.gguf");
    let f16_nan = 0x7e00u16.to_le_bytes().to_vec();
    let f32_inf = f32::INFINITY.to_le_bytes().to_vec();
    use DType::*;
    let scales: &[(DType, &[usize], &[u8])] = &[
        (F32, &[0], &f32_inf),
        (F16, &[0], &f16_nan),
        (BF16, &[0], &[0xc0, 0x7f]),
        (F64, &[0], &f64::NAN.to_le_bytes()),
        (Q4_0, &[0], &f16_nan),
        (Q4_1, &[0, 2], &f16_nan),
        (Q5_0, &[0], &f16_nan),
        (Q5_1, &[0, 2], &f16_nan),
        (Q8_0, &[0], &f16_nan),
        (Q2_K, &[80, 82], &f16_nan),
        (Q3_K, &[108], &f16_nan),
        (Q4_K, &[0, 2], &f16_nan),
        (Q5_K, &[0, 2], &f16_nan),
        (Q6_K, &[208], &f16_nan),
        (Q8_K, &[0], &f32_inf),
        (IQ4_NL, &[0], &f16_nan),
        (IQ4_XS, &[0], &f16_nan),
        (MXFP4, &[0], &[255]),
    ];
    let types: Vec<DType> = scales.iter().map(|s| s.0).collect();
    assert!(DType::WEIGHTS.iter().all(|t| types.contains(t)), "a type has no validation test");
    for &(dtype, places, bad) in scales {
        let (len, bytes) = (dtype.block_len() as u64, dtype.block_bytes());
        for &place in places {
            for broken in [None, Some(0), Some(5)] {
                let mut w = Writer::new();
                w.tensor("t", dtype, &[len * 2, 3]).unwrap();
                // The rest of the blocks is full of ones: no packed value may be taken for a scale.
                let mut block = vec![0xffu8; bytes];
                places.iter().for_each(|&p| block[p..p + bad.len()].fill(0));
                let mut data = block.repeat(6);
                if let Some(i) = broken {
                    data[i * bytes + place..][..bad.len()].copy_from_slice(bad);
                }
                write(&path, &w, &[("t", data)]);
                Gguf::open(&path).unwrap();
                let checked = Gguf::open_with(&path, &OpenOptions { validate: true, ..OpenOptions::default() });
                match broken {
                    None => drop(checked.unwrap_or_else(|e| panic!("{dtype}: {e}"))),
                    Some(i) => refused(dtype.name(), checked, &["tensor t", &format!(" {i} ({dtype})"), "NaN"]),
                }
            }
        }
    }
}

#[test]
fn misplaced_memory_and_ranges() {
    let bytes = everything_bytes("misplaced");
    /// Memory of which the model starts one byte in.
    struct Odd(Vec<u64>);
    impl AsRef<[u8]> for Odd {
        fn as_ref(&self) -> &[u8] {
            &bytemuck::cast_slice(&self.0)[1..]
        }
    }
    let mut odd = Odd(vec![0; bytes.len() / 8 + 1]);
    bytemuck::cast_slice_mut(&mut odd.0)[1..=bytes.len()].copy_from_slice(&bytes);
    let odd: SharedBytes = Arc::new(odd);
    refused("odd memory", Gguf::from_memory(odd.clone()), &["tensor first.weight", "multiple of 8 bytes"]);
    Gguf::from_memory_with(odd, &OpenOptions { copy: true, ..OpenOptions::default() }).unwrap();

    let folder = Folder::new("ranges");
    let path = folder.path("m.gguf");
    std::fs::write(&path, &bytes).unwrap();
    let len = bytes.len() as u64;
    for (offset, length) in [(0, 0), (0, len + 1), (1, len), (u64::MAX, 2), (len, 1)] {
        for copy in [false, true] {
            let options = OpenOptions { copy, ..OpenOptions::default() };
            let opened = Gguf::from_file_with(std::fs::File::open(&path).unwrap(), offset, length, &options);
            refused("range", opened, &[&format!("byte {offset}")]);
        }
    }
    refused("folder", Gguf::open(&folder.0), &["regular file"]);
    std::fs::write(&path, b"").unwrap();
    refused("empty file", Gguf::open(&path), &["m.gguf: byte 0", "0 bytes"]);
    assert!(matches!(Gguf::open(folder.path("none.gguf")), Err(Error::Io { .. })));
    // A tensor of another model is no way out of the map.
    let (small, large) = (open(Raw::default().build()).unwrap(), open(bytes).unwrap());
    assert!(small.data(&large.tensors()[2]).is_empty());
}

#[test]
fn writer_refuses() {
    let folder = Folder::new("writer");
    let path = folder.path("m.gguf");
    std::fs::write(&path, b"old").unwrap();
    let (w, tensors) = everything();
    let says = |result: Result<()>, fragment: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(fragment), "no {fragment:?} in: {message}");
    };
    let mut file = w.create(&path).unwrap();
    says(file.write("second.weight", &[0]), "\"first.weight\" comes first, with 12 of 12");
    says(file.write("first.weight", &[0; 13]), "13 bytes are given");
    file.write("first.weight", &[0; 4]).unwrap();
    says(file.write("first.weight", &[0; 9]), "13 bytes are given");
    says(file.finish().map(drop), "8 of 12 bytes have not been written");
    // What failed has left nothing and changed nothing.
    assert_eq!(folder.names(), ["m.gguf"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    write(&path, &w, &tensors);
    Gguf::open(&path).unwrap();

    let mut w = Writer::new();
    says(w.tensor("t", DType::Q4_K, &[255]).map(drop), "Q4_K blocks of 256");
    says(w.tensor("t", DType::F32, &[1; 5]).map(drop), "at most 4 dimensions");
    says(w.tensor("", DType::F32, &[1]).map(drop), "a name of 1 to 512 bytes");
    w.tensor("t", DType::F32, &[1]).unwrap();
    says(w.tensor("t", DType::F32, &[1]).map(drop), "taken");
    w.set("", 1u32);
    says(w.create(&path).map(drop), "a key of 1 to 65535 bytes");
    w.metadata_mut().remove("");
    w.set(KEY_ALIGNMENT, 12u32);
    says(w.create(&path).map(drop), "power of two");
    w.set(KEY_ALIGNMENT, 4096u32);
    write(&path, &w, &[("t", vec![0; 4])]);
    let model = Gguf::open(&path).unwrap();
    assert_eq!((model.alignment(), model.tensors()[0].offset(), model.file_bytes()), (4096, 4096, 8192));
    says(w.create("/").map(drop), "names no file");
}
