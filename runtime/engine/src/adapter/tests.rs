//! Files that are right, files that are not. What adapters do to a model is tested where models are at hand.

use std::path::PathBuf;

use super::*;
use crate::gguf::{Gguf, Writer};
use crate::quant::{DType, quantize};

struct File(PathBuf);

impl File {
    fn new(name: &str) -> File {
        File(std::env::temp_dir().join(format!("kinglet-adapter-{}-{name}.gguf", std::process::id())))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A model of two matrices, `[outputs, inputs]`.
fn base(name: &str) -> (Gguf, File) {
    let file = File::new(name);
    let mut writer = Writer::new();
    writer.set("general.architecture", "plain");
    writer.tensor("token_embd.weight", DType::F32, &[4, 6]).unwrap();
    writer.tensor("blk.0.attn_q.weight", DType::F32, &[4, 3]).unwrap();
    let mut out = writer.create(&file.0).unwrap();
    let ramp = |n: usize| (0..n).map(|i| i as f32 * 0.25 - 1.0).collect::<Vec<f32>>();
    out.write("token_embd.weight", &quantize(DType::F32, &ramp(24)).unwrap()).unwrap();
    out.write("blk.0.attn_q.weight", &quantize(DType::F32, &ramp(12)).unwrap()).unwrap();
    out.finish().unwrap();
    (Gguf::open(&file.0).unwrap(), file)
}

fn floats(model: &Gguf, name: &str) -> Vec<f32> {
    let t = model.tensor(name).unwrap();
    let mut out = vec![0.0; t.elements()];
    crate::quant::dequantize(t.dtype, model.data(t), &mut out).unwrap();
    out
}

fn entry(inputs: usize, outputs: usize, rank: usize) -> LowRank {
    LowRank {
        rank,
        inputs,
        outputs,
        a: (0..rank * inputs).map(|i| 0.5 - i as f32 * 0.125).collect(),
        b: (0..rank * outputs).map(|i| i as f32 * 0.25 - 0.5).collect(),
        magnitude: None,
    }
}

fn adapter(base: &Gguf) -> Adapter {
    let entries = [("token_embd.weight".into(), entry(4, 6, 2)), ("blk.0.attn_q.weight".into(), entry(4, 3, 2))];
    Adapter {
        name: "test".into(),
        rank: 2,
        alpha: 8.0,
        rslora: false,
        entries: entries.into(),
        base: Some(BaseId::of(base).unwrap()),
    }
}

#[test]
fn files_come_back_as_they_were() {
    let (base, _file) = base("round-base");
    let file = File::new("round");
    let mut written = adapter(&base);
    for (rslora, magnitude, dtype) in [(false, false, DType::F32), (true, false, DType::F16), (false, true, DType::F32)]
    {
        written.rslora = rslora;
        for e in written.entries.values_mut() {
            e.magnitude = magnitude.then(|| (0..e.outputs).map(|i| 1.0 + i as f32).collect());
        }
        written.save(&file.0, dtype).unwrap();
        let mut read = Adapter::open(&file.0).unwrap();
        read.name = "test".into();
        // All values of the test are exact in f16.
        assert_eq!(read, written);
        assert_eq!(read.matches(&base).unwrap(), 2);
    }
}

#[test]
fn the_file_has_the_shapes_and_the_scale_that_others_expect() {
    let (base, _file) = base("shape-base");
    let file = File::new("shape");
    let mut written = adapter(&base);
    written.rslora = true;
    written.save(&file.0, DType::F32).unwrap();
    let gguf = Gguf::open(&file.0).unwrap();
    let shape = |name: &str| gguf.tensor(name).unwrap().shape.clone();
    assert_eq!(shape("blk.0.attn_q.weight.lora_a"), [4, 2]);
    assert_eq!(shape("blk.0.attn_q.weight.lora_b"), [2, 3]);
    assert_eq!(shape("token_embd.weight.lora_a"), [2, 6]);
    assert_eq!(shape("token_embd.weight.lora_b"), [2, 4]);
    // alpha/r of a reader that does not know rsLoRA is alpha/√r of the adapter.
    let common = gguf.metadata().f32("adapter.lora.alpha").unwrap() / 2.0;
    assert!((common - 8.0 / 2f32.sqrt()).abs() < 1e-6);
    assert_eq!(gguf.metadata().str("general.type").unwrap(), "adapter");
}

#[test]
fn an_alpha_of_zero_is_a_scale_of_one() {
    let file = File::new("alpha");
    let mut writer = Writer::new();
    writer.set("general.architecture", "plain").set("general.type", "adapter").set("adapter.type", "lora");
    let tensors = [
        ("a.weight.lora_a", vec![4, 2]),
        ("a.weight.lora_b", vec![2, 3]),
        ("b.weight.lora_a", vec![4, 1]),
        ("b.weight.lora_b", vec![1, 3]),
    ];
    for (name, shape) in &tensors {
        writer.tensor(name, DType::F32, shape).unwrap();
    }
    let mut out = writer.create(&file.0).unwrap();
    for (name, shape) in &tensors {
        let n = shape.iter().product::<u64>() as usize;
        out.write(name, &quantize(DType::F32, &vec![1.0; n]).unwrap()).unwrap();
    }
    out.finish().unwrap();
    let adapter = Adapter::open(&file.0).unwrap();
    for entry in adapter.entries.values() {
        assert_eq!(adapter.scale(entry) * entry.b[0], 1.0);
    }
}

#[test]
fn what_does_not_match_is_named() {
    let (model, _file) = base("match-base");
    let broken = |change: &dyn Fn(&mut Adapter), wanted: &str| {
        let mut a = adapter(&model);
        change(&mut a);
        let error = a.matches(&model).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error:?} does not say {wanted:?}");
    };
    let q = "blk.0.attn_q.weight";
    broken(&|a| a.base.as_mut().unwrap().architecture = "other".into(), "architecture \"other\"");
    broken(&|a| a.base.as_mut().unwrap().fingerprint = Some("00".into()), "fingerprint");
    broken(&|a| a.entries.get_mut(q).unwrap().a[1] = f32::NAN, "NaN");
    broken(&|a| a.entries.get_mut(q).unwrap().b[0] = f32::INFINITY, "NaN or an infinity in B");
    broken(&|a| a.entries.get_mut(q).unwrap().rank = 0, "rank 0");
    broken(&|a| a.entries.get_mut(q).unwrap().rank = 3, q);
    broken(&|a| a.entries.get_mut(q).unwrap().magnitude = Some(vec![1.0]), "magnitude");
    broken(&|a| *a.entries.get_mut(q).unwrap() = entry(5, 3, 2), "5 inputs");
    broken(&|a| drop(a.entries.insert("blk.9.x.weight".into(), entry(4, 3, 2))), "blk.9.x.weight");
    broken(&|a| a.entries.clear(), "no matrices");
    broken(&|a| a.alpha = f32::NAN, "alpha");
}

#[test]
fn hostile_files_give_errors() {
    let file = File::new("hostile");
    type Tensors<'a> = &'a [(&'a str, &'a [u64])];
    let cases: [(&str, Tensors<'_>, &str); 6] = [
        ("adapter", &[("q.weight.lora_a", &[4, 2])], "lora_b"),
        ("adapter", &[("q.weight.lora_a", &[4, 2]), ("q.weight.lora_b", &[3, 3])], "no common rank"),
        ("adapter", &[("q.weight.lora_a", &[1, 5000]), ("q.weight.lora_b", &[5000, 1])], "no common rank"),
        ("adapter", &[("q.weight", &[4, 2])], "none of lora_a"),
        ("adapter", &[], "no matrices"),
        ("model", &[("q.weight.lora_a", &[4, 2]), ("q.weight.lora_b", &[2, 3])], "general.type"),
    ];
    for (kind, tensors, wanted) in cases {
        let mut writer = Writer::new();
        writer.set("general.architecture", "plain").set("general.type", kind).set("adapter.type", "lora");
        for (name, shape) in tensors {
            writer.tensor(name, DType::F32, shape).unwrap();
        }
        let mut out = writer.create(&file.0).unwrap();
        for (name, shape) in tensors {
            out.write(name, &vec![0; 4 * shape.iter().product::<u64>() as usize]).unwrap();
        }
        out.finish().unwrap();
        let error = Adapter::open(&file.0).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error:?} does not say {wanted:?}");
    }
}

#[test]
fn a_merge_is_base_plus_scaled_product() {
    let (base, _file) = base("merge-base");
    // The model has a head, else its embedding could not be merged.
    let mut adapter = adapter(&base);
    let out = File::new("merged");
    assert!(merge(&base, &[(&adapter, 1.0)], None, &out.0).unwrap_err().to_string().contains("embedding"));
    adapter.entries.remove("token_embd.weight");
    assert_eq!(merge(&base, &[(&adapter, 0.5)], None, &out.0).unwrap().tensors, 1);
    let merged = Gguf::open(&out.0).unwrap();
    let (t, e) = (merged.tensor("blk.0.attn_q.weight").unwrap(), &adapter.entries["blk.0.attn_q.weight"]);
    let values: Vec<f32> = floats(&merged, t.name.as_str());
    for (i, value) in values.iter().enumerate() {
        let (o, k) = (i / 4, i % 4);
        let product: f32 = (0..2).map(|j| e.b[o * 2 + j] * e.a[j * 4 + k]).sum();
        assert!((value - (i as f32 * 0.25 - 1.0 + 0.5 * 4.0 * product)).abs() < 1e-5);
    }
    let embedding = |g: &Gguf| g.data(g.tensor("token_embd.weight").unwrap()).to_vec();
    assert_eq!(embedding(&merged), embedding(&base));
    // Windows replaces no file that is mapped.
    drop(merged);
    // With a magnitude the rows of the merged matrix have that norm.
    let rows = [2.0f32, 0.5, 3.0];
    adapter.entries.get_mut("blk.0.attn_q.weight").unwrap().magnitude = Some(rows.into());
    merge(&base, &[(&adapter, 1.0)], None, &out.0).unwrap();
    let merged = Gguf::open(&out.0).unwrap();
    let values: Vec<f32> = floats(&merged, "blk.0.attn_q.weight");
    for (row, norm) in values.chunks_exact(4).zip(rows) {
        assert!((row.iter().map(|v| v * v).sum::<f32>().sqrt() - norm).abs() < 1e-5);
    }
}

#[test]
fn fingerprints_tell_files_apart() {
    let (a, _a) = base("print-a");
    let (b, _b) = base("print-b");
    assert_eq!(fingerprint(&a), fingerprint(&b));
    assert_eq!(fingerprint(&a).len(), 64);
    let mut adapter = adapter(&a);
    adapter.entries.remove("token_embd.weight");
    let out = File::new("print-merged");
    merge(&a, &[(&adapter, 1.0)], None, &out.0).unwrap();
    assert_ne!(fingerprint(&a), fingerprint(&Gguf::open(&out.0).unwrap()));
}
