//! Adapters that we write, loaded by PEFT: the logits it then gives are ours.
//!
//! `data/peft_loads.json` has PEFT's logits and the hash of the files it read, so nothing but numbers is needed as long as
//! the same files are written. `KINGLET_PEFT=python3` asks a Python with torch and PEFT anew, by `data/peft_loads.py`, and
//! keeps what it says.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use kinglet_engine::adapter::{Adapter, BaseId, LowRank};
use kinglet_engine::gguf::{Gguf, TensorInfo};
use kinglet_engine::quant::DType;
use kinglet_engine::session::{Arithmetic, Model, Session, SessionOptions};
use kinglet_models::peft;
use kinglet_models::tiny::{TinyConfig, write_tiny};
use kinglet_tests::compare::distance;
use kinglet_tests::data::{Scratch, file};
use kinglet_train::init::golden_init;
use serde_json::Value;
use sha2::{Digest, Sha256};

const SEED: u64 = 11;

/// What an adapter has besides a pair for each map of the layers.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Plain,
    /// Magnitudes.
    Dora,
    /// Rank-stabilised, and one map of another rank than the others.
    Ranks,
    /// The embedding and the head too.
    Ends,
}

/// The folder's name, which tells the script the architecture, and what is in it.
const CASES: [(&str, Kind); 7] = [
    ("llama-plain", Kind::Plain),
    ("llama-dora", Kind::Dora),
    ("qwen2-ranks", Kind::Ranks),
    ("qwen2-ends", Kind::Ends),
    ("gemma2-plain", Kind::Plain),
    ("glm4-dora", Kind::Dora),
    ("phi3-plain", Kind::Plain),
];

fn row_lengths(file: &Gguf, t: &TensorInfo) -> Vec<f32> {
    let values: Vec<f32> =
        file.data(t).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect();
    values.chunks_exact(t.width()).map(|row| row.iter().map(|v| v * v).sum::<f32>().sqrt()).collect()
}

fn adapter(model: &Model, kind: Kind) -> Adapter {
    let usual = 4;
    let mut entries = BTreeMap::new();
    for t in model.gguf().tensors() {
        let map = t.name.starts_with("blk.") && t.shape.len() == 2;
        let end = kind == Kind::Ends && ["token_embd.weight", "output.weight"].contains(&t.name.as_str());
        if !map && !end {
            continue;
        }
        let rank = if kind == Kind::Ranks && t.name == "blk.1.ffn_up.weight" { 6 } else { usual };
        let (inputs, outputs) = (t.width(), t.rows());
        let half = |which: &str, shape: [usize; 2]| golden_init(&format!("{}.{which}", t.name), &shape, SEED);
        let magnitude = (kind == Kind::Dora).then(|| {
            let by = half("lora_magnitude", [1, outputs]);
            row_lengths(model.gguf(), t).iter().zip(by).map(|(length, by)| length * (1.0 + by)).collect()
        });
        let (a, b) = (half("lora_a", [rank, inputs]), half("lora_b", [outputs, rank]));
        entries.insert(t.name.clone(), LowRank { rank, inputs, outputs, a, b, magnitude });
    }
    let base = Some(BaseId::of(model.gguf()).expect("the model has an architecture"));
    Adapter { name: "test".into(), rank: usual, alpha: 6.0, rslora: kind == Kind::Ranks, entries, base }
}

/// The two files of PEFT as one number.
fn hash(folder: &Path) -> String {
    let mut hash = Sha256::new();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        hash.update(std::fs::read(folder.join(name)).expect("the file was written"));
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

fn logits(model: &Model, adapters: &[(Arc<Adapter>, f32)]) -> Vec<f32> {
    let options = SessionOptions {
        context: 64,
        threads: 1,
        kv_type: DType::F32,
        arithmetic: Arithmetic::Exact,
        ..SessionOptions::default()
    };
    let mut session = Session::new(model, &options).expect("a session");
    session.set_adapters(adapters).expect("the adapters fit");
    let tokens: Vec<u32> = (0..24).map(|t| (37 * t + 11 * t * t) % 256).collect();
    session.feed(&tokens).expect("the tokens fit").to_vec()
}

#[test]
fn peft_gives_our_logits() {
    let scratch = Scratch::new("peft-loads");
    let (mut hashes, mut ours) = (BTreeMap::new(), BTreeMap::new());
    for (name, kind) in CASES {
        let arch = name.split('-').next().expect("a name");
        let path = scratch.path(&format!("{name}.gguf"));
        write_tiny(&path, &TinyConfig { layers: 2, ..TinyConfig::new(arch) }).expect("a tiny model");
        let model = kinglet_models::open(&path).expect("the model opens");
        let adapter = adapter(&model, kind);
        let folder = scratch.path(name);
        peft::write(&folder, &adapter, &model, None).expect("the adapter is written");
        hashes.insert(name, hash(&folder));
        ours.insert(name, [logits(&model, &[]), logits(&model, &[(Arc::new(adapter), 1.0)])]);
    }
    let kept = file("peft_loads.json");
    let golden: Value = match std::env::var("KINGLET_PEFT") {
        Ok(python) => {
            let output = Command::new(python).arg(file("peft_loads.py")).arg(scratch.path("")).output();
            let output = output.expect("KINGLET_PEFT names a Python");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let mut golden: Value = serde_json::from_slice(&output.stdout).expect("the script prints JSON");
            golden["files"] = serde_json::to_value(&hashes).expect("texts");
            std::fs::write(&kept, golden.to_string() + "\n").expect("the values are kept");
            golden
        }
        Err(_) => serde_json::from_slice(&std::fs::read(&kept).expect("the kept values")).expect("JSON"),
    };
    for (name, [base, adapted]) in ours {
        let theirs = |which: &str| -> Vec<f32> {
            serde_json::from_value(golden["logits"][name][which].clone()).expect("logits of every case")
        };
        assert_eq!(
            golden["files"][name], hashes[name],
            "{name}: other files are written than PEFT has read; ask it again (the file's text says how)"
        );
        let apart = [distance(&base, &theirs("base")), distance(&adapted, &theirs("adapted"))];
        let moved = distance(&theirs("base"), &theirs("adapted"));
        println!("{name}: base {:.1e}, adapted {:.1e}; moved {moved:.1e}", apart[0], apart[1]);
        assert!(moved > 0.1, "{name}: the adapter changes too little to show anything");
        assert!(apart.into_iter().all(|d| d < 1e-5), "{name}: {apart:?}");
    }
}
