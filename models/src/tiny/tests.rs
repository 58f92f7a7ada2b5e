//! Tiny models: shapes, types, determinism and refusals.

use std::path::PathBuf;

use kinglet_engine::gguf::{Gguf, OpenOptions};
use kinglet_engine::quant::dequantize;

use super::*;

struct TinyFile(PathBuf);

impl TinyFile {
    fn new(config: &TinyConfig) -> TinyFile {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("kinglet-tiny-{}-{n}.gguf", std::process::id()));
        write_tiny(&path, config).unwrap();
        TinyFile(path)
    }

    fn open(&self) -> Gguf {
        Gguf::open_with(&self.0, &OpenOptions { validate: true, ..OpenOptions::default() }).unwrap()
    }
}

impl Drop for TinyFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn values(model: &Gguf, name: &str) -> Vec<f32> {
    let t = model.tensor(name).unwrap_or_else(|| panic!("no tensor {name}"));
    let mut out = vec![0.0; t.elements()];
    dequantize(t.dtype, model.data(t), &mut out).unwrap();
    out
}

fn deviation(v: &[f32]) -> f32 {
    (v.iter().map(|x| x * x).sum::<f32>() / v.len() as f32).sqrt()
}

#[test]
fn every_architecture_opens() {
    for arch in TinyConfig::architectures() {
        let config = TinyConfig::new(arch).with_bpe();
        let model = TinyFile::new(&config).open();
        let m = model.metadata();
        assert_eq!(m.str("general.architecture").unwrap(), arch);
        assert_eq!(m.u32(&format!("{arch}.block_count")).unwrap(), config.layers);
        assert_eq!(m.strings("tokenizer.ggml.tokens").unwrap().len(), config.vocab as usize);
        assert_eq!(model.tensor("output.weight").is_none(), config.tied, "{arch}");
        assert_eq!(model.tensor("token_embd.weight").unwrap().shape, [64, u64::from(config.vocab)]);
        assert_eq!(model.tensor("blk.1.ffn_down.weight").unwrap().shape, [128, 64]);
    }
}

#[test]
fn every_weight_type_can_be_written() {
    for dtype in DType::WEIGHTS {
        let config = TinyConfig::new("llama").with_dtype(dtype);
        let model = TinyFile::new(&config).open();
        let t = model.tensor("blk.0.attn_q.weight").unwrap();
        assert_eq!((t.dtype, model.tensor("token_embd.weight").unwrap().dtype), (dtype, dtype));
        assert_eq!(t.width() % dtype.block_len(), 0);
        // Two bits tell a normal distribution coarsely, but they do not change its size.
        let (is, wanted) = (deviation(&values(&model, "blk.0.attn_q.weight")), 1.0 / (t.width() as f32).sqrt());
        assert!((is / wanted - 1.0).abs() < 0.06, "{dtype}: deviation {is}, not {wanted}");
    }
}

#[test]
fn weights_follow_from_seed_and_name() {
    let config = TinyConfig::new("qwen2");
    let bytes = |c: &TinyConfig| std::fs::read(&TinyFile::new(c).0).unwrap();
    assert_eq!(bytes(&config), bytes(&config));
    let (a, b) = (TinyFile::new(&config), TinyFile::new(&TinyConfig { seed: 2, ..config.clone() }));
    let deeper = TinyFile::new(&TinyConfig { layers: 3, ..config });
    let (a, b, deeper) = (a.open(), b.open(), deeper.open());
    let name = "blk.1.attn_k.weight";
    assert_ne!(values(&a, name), values(&b, name));
    assert_ne!(values(&a, name), values(&a, "blk.0.attn_k.weight"));
    assert_eq!(values(&a, name), values(&deeper, name));
    let gains = values(&a, "output_norm.weight");
    let mean = gains.iter().sum::<f32>() / gains.len() as f32;
    assert!((mean - 1.0).abs() < 0.05, "norms have the mean {mean}");
}

#[test]
fn impossible_shapes_are_refused() {
    let llama = || TinyConfig::new("llama");
    let wide = TinyConfig { width: 96, ..llama() };
    for (config, fragment) in [
        (TinyConfig::new("mamba"), "known: llama, qwen2"),
        (TinyConfig { kv_heads: 3, ..llama() }, "kv_heads divides heads"),
        (TinyConfig { kv_heads: 0, ..llama() }, "kv_heads divides heads"),
        (TinyConfig { head_dim: 15, ..llama() }, "multiple of 4"),
        (TinyConfig { head_dim: 32, ..TinyConfig::new("qwen2") }, "heads × head_dim is the width"),
        (TinyConfig { tied: true, ..TinyConfig::new("baichuan") }, "tied"),
        (TinyConfig { dtype: DType::Q4_K, ..wide }, "Q4_K blocks of 256"),
        (TinyConfig { dtype: DType::I8, ..llama() }, "I8"),
        (TinyConfig { tokenizer: TinyTokenizer::Bpe, ..llama() }, "at least"),
    ] {
        let path = std::env::temp_dir().join(format!("kinglet-tiny-refused-{}.gguf", std::process::id()));
        let message = write_tiny(&path, &config).expect_err(fragment).to_string();
        assert!(message.contains(fragment), "no {fragment:?} in: {message}");
        assert!(!path.exists());
    }
}
