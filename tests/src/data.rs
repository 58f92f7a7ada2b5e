//! Models, texts and random numbers for the tests.
//!
//! Models come from the cache that `kinglet pull` fills. Random numbers are SplitMix64 with a seed in the test, so a
//! failure can be repeated.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kinglet_engine::session::Model;
use kinglet_models::catalogue;
use kinglet_models::pull::Cache;
use kinglet_models::tiny::{TinyConfig, write_tiny};

/// The three real models of the catalogue that parity is held on.
pub const MODELS: [&str; 3] = ["smollm2", "qwen2.5-coder", "gemma3"];

/// The file of a known model in the cache.
///
/// # Panics
/// When it is not there, with the command that fetches it: a parity test that was skipped proves nothing.
pub fn model(id: &str) -> PathBuf {
    let known = catalogue::find(id).unwrap_or_else(|| panic!("{id} is not in the catalogue"));
    let cache = Cache::from_env().expect("a cache directory");
    cache.have(known).unwrap_or_else(|| {
        panic!("{} is missing: run `kinglet pull {id}`, or tests/run, which does", cache.model_path(known).display())
    })
}

/// Whether the long tests were asked for (`KINGLET_HEAVY=1`).
pub fn heavy() -> bool {
    std::env::var("KINGLET_HEAVY").is_ok_and(|v| v == "1")
}

/// Held by a test that computes with a real model: two such tests at once would take each other's cores.
pub fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file under `tests/data`.
pub fn file(name: &str) -> PathBuf {
    crate::source::root().join("tests/data").join(name)
}

/// A tiny random model, in the scratch directory.
pub fn tiny(scratch: &Scratch, config: &TinyConfig) -> Model {
    let path = scratch.path("tiny.gguf");
    write_tiny(&path, config).expect("a tiny model");
    kinglet_models::open(&path).expect("the model opens")
}

/// Every matrix of the layers.
pub fn maps(model: &Model) -> Vec<String> {
    let matrix = |w: &kinglet_engine::tape::Weight| w.name.starts_with("blk.") && w.rows > 1;
    model.weights().iter().filter(|(_, w)| matrix(w)).map(|(_, w)| w.name.clone()).collect()
}

/// A directory of its own for one test, removed when dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    /// `name` tells apart the tests of one process.
    pub fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("kinglet-test-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary directory");
        Scratch(path)
    }

    /// The path of `file` in the directory.
    pub fn path(&self, file: &str) -> PathBuf {
        self.0.join(file)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014).
pub struct Random(u64);

impl Random {
    /// A generator that starts from `seed`.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `[0, 1)`.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// An integer below `n`; 0 for `n = 0`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n.max(1) as u64) as usize
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// About normal with mean 0 and variance 1: the sum of twelve uniform numbers, less six.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.unit()).sum::<f32>() - 6.0
    }

    /// `n` normal values times `scale`.
    pub fn normals(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.normal() * scale).collect()
    }
}
