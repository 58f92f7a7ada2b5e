//! What the integration tests share: folders with tiny models in them, and random adapters.

// Each test binary uses its own part.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use kinglet_engine::adapter::{Adapter, BaseId, LowRank};
use kinglet_engine::session::Model;
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
