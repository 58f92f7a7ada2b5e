//! What the integration tests share: folders and files with tiny models in them, and random adapters.

// Each test binary uses its own part.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use kinglet_engine::adapter::{Adapter, BaseId, LowRank};
use kinglet_engine::gguf::{Gguf, Value, Writer};
use kinglet_engine::quant::DType;
use kinglet_engine::session::{Model, Session, SessionOptions};
use kinglet_engine::tape::Spec;
use kinglet_models::families;
use kinglet_models::tiny::{TinyConfig, write_tiny};

/// A folder that goes away.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("kinglet-models-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    /// A tiny model, named `base.gguf`.
    pub fn model(&self, config: &TinyConfig) -> Model {
        self.named("base.gguf", config)
    }

    pub fn named(&self, name: &str, config: &TinyConfig) -> Model {
        let path = self.0.join(name);
        write_tiny(&path, config).unwrap();
        kinglet_models::open(path).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A tensor to be written: name, type, shape, bytes.
pub type Tensor = (String, DType, Vec<u64>, Vec<u8>);

/// A file that goes away.
pub struct Temporary(pub PathBuf);

impl Temporary {
    pub fn new() -> Temporary {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("kinglet-file-{}-{}.gguf", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        Temporary(std::env::temp_dir().join(name))
    }

    pub fn tiny(config: &TinyConfig) -> Temporary {
        let file = Temporary::new();
        write_tiny(&file.0, config).unwrap();
        file
    }

    /// The same file with keys added (or removed, where there is no value) and tensors changed.
    pub fn changed(&self, keys: &[(&str, Option<Value>)], tensors: impl Fn(&mut Vec<Tensor>)) -> Temporary {
        let gguf = Gguf::open(&self.0).unwrap();
        let mut writer = Writer::new();
        for (key, value) in gguf.metadata().iter() {
            writer.set(key, value.clone());
        }
        for (key, value) in keys {
            match value {
                Some(value) => drop(writer.set(key, value.clone())),
                None => drop(writer.metadata_mut().remove(key)),
            }
        }
        let mut all: Vec<Tensor> =
            gguf.tensors().iter().map(|t| (t.name.clone(), t.dtype, t.shape.clone(), gguf.data(t).to_vec())).collect();
        tensors(&mut all);
        for (name, dtype, shape, _) in &all {
            writer.tensor(name, *dtype, shape).unwrap();
        }
        let to = Temporary::new();
        let mut file = writer.create(&to.0).unwrap();
        for (name, .., bytes) in &all {
            file.write(name, bytes).unwrap();
        }
        file.finish().unwrap();
        to
    }

    pub fn spec(&self) -> kinglet_engine::Result<Spec> {
        families::spec(&Gguf::open(&self.0).unwrap())
    }

    /// Logits of the last position after each of `chunks` tokens.
    pub fn logits(&self, chunks: &[usize]) -> Vec<Vec<f32>> {
        let model = kinglet_models::open(&self.0).unwrap();
        let options = SessionOptions { context: 64, threads: 2, kv_type: DType::F32, ..SessionOptions::default() };
        let mut session = Session::new(&model, &options).unwrap();
        let mut tokens = (0..).map(|i: u32| i * 37 % 250);
        let mut feed = |n: &usize| session.feed(&tokens.by_ref().take(*n).collect::<Vec<u32>>()).unwrap().to_vec();
        chunks.iter().map(&mut feed).collect()
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Random corrections of every linear map, with magnitudes where `dora`; of the head too where it is no embedding.
pub fn adapter(model: &Model, rank: usize, seed: u32, dora: bool) -> Adapter {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut entries = BTreeMap::new();
    for t in model.gguf().tensors() {
        let linear = t.name.starts_with("blk.") && t.shape.len() == 2 || t.name == "output.weight";
        if !linear {
            continue;
        }
        let (inputs, outputs) = (t.width(), t.rows());
        let mut random = |n: usize, size: f32| (0..n).map(|_| next() * size).collect::<Vec<f32>>();
        entries.insert(
            t.name.clone(),
            LowRank {
                rank,
                inputs,
                outputs,
                a: random(rank * inputs, 1.0),
                b: random(rank * outputs, 0.2),
                magnitude: dora.then(|| random(outputs, 1.0).iter().map(|m| 0.6 + m.abs()).collect()),
            },
        );
    }
    let base = Some(BaseId::of(model.gguf()).unwrap());
    Adapter { name: format!("adapter {seed}"), rank, alpha: rank as f32, rslora: false, entries, base }
}
