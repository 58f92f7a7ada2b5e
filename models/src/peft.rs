//! Adapters as PEFT keeps them: a folder with `adapter_config.json` and `adapter_model.safetensors`.
//!
//! The tensors of a linear map are `base_model.model.{module}.lora_A.weight` `[r, in]` and `….lora_B.weight` `[out, r]`,
//! of the embedding `….lora_embedding_A` `[r, vocab]` and `….lora_embedding_B` `[width, r]`; DoRA adds
//! `….lora_magnitude_vector` `[out]`. Modules are named as in the Hugging Face implementation of the family, whose queries
//! and keys rotate in halves. Where the GGUF file has their rows interleaved (`RopeStyle::Interleaved`), row
//! `p·D/2 + i` of a head is row `2i + p` in the file, and the rows of `B` (and of the magnitude) move likewise; `A` stays.
//! Format: <https://huggingface.co/docs/peft/developer_guides/checkpoint>.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use kinglet_engine::adapter::{Adapter, BaseId, LowRank};
use kinglet_engine::file;
use kinglet_engine::quant::{self, DType};
use kinglet_engine::session::Model;
use kinglet_engine::tape::Spec;
use kinglet_engine::{Error, Result};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

/// A tensor's values and its shape.
type Values = (Vec<f32>, Vec<usize>);

/// The files of an adapter.
const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
/// What PEFT writes before the names of a model's modules.
const PREFIX: &str = "base_model.model.";

/// A module within a layer, and its matrix within a block of the GGUF file.
type Names = (&'static str, &'static str);

const Q: Names = ("self_attn.q_proj", "attn_q");
const K: Names = ("self_attn.k_proj", "attn_k");
const V: Names = ("self_attn.v_proj", "attn_v");
const QKV: Names = ("self_attn.qkv_proj", "attn_qkv");
const O: Names = ("self_attn.o_proj", "attn_output");
const GATE: Names = ("mlp.gate_proj", "ffn_gate");
const UP: Names = ("mlp.up_proj", "ffn_up");
const GATE_UP: Names = ("mlp.gate_up_proj", "ffn_up");
const DOWN: Names = ("mlp.down_proj", "ffn_down");
/// ChatGLM's own implementation; the one within Hugging Face's library has names like the others.
const GLM_QKV: Names = ("self_attention.query_key_value", "attn_qkv");
const GLM_O: Names = ("self_attention.dense", "attn_output");
const GLM_GATE_UP: Names = ("mlp.dense_h_to_4h", "ffn_up");
const GLM_DOWN: Names = ("mlp.dense_4h_to_h", "ffn_down");

const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";

/// The modules of some families, as the Hugging Face implementation has them.
struct Modules {
    families: &'static [&'static str],
    /// What stands before `layers.{i}.`
    front: &'static str,
    layer: &'static [Names],
    /// Modules outside of layers.
    outer: [Names; 2],
    /// Whether converters permute the rows of queries and keys.
    permuted: bool,
}

const USUAL: Modules = Modules {
    families: &["qwen2", "qwen3", "gemma", "gemma2", "gemma3"],
    front: "model.",
    layer: &[Q, K, V, O, GATE, UP, DOWN],
    outer: [("model.embed_tokens", EMBEDDING), ("lm_head", HEAD)],
    permuted: false,
};

const MODULES: [Modules; 5] = [
    Modules { families: &["llama"], permuted: true, ..USUAL },
    USUAL,
    // Neighbouring components rotate in the implementation too.
    Modules { families: &["glm4", "chatglm"], layer: &[Q, K, V, O, GATE_UP, DOWN], ..USUAL },
    Modules {
        families: &["chatglm"],
        front: "transformer.encoder.",
        layer: &[GLM_QKV, GLM_O, GLM_GATE_UP, GLM_DOWN],
        outer: [("transformer.embedding.word_embeddings", EMBEDDING), ("transformer.output_layer", HEAD)],
        ..USUAL
    },
    Modules { families: &["phi3"], layer: &[QKV, O, GATE_UP, DOWN], ..USUAL },
];

impl Modules {
    /// Those of `model`, whose file must have stacked the same matrices as the implementation.
    fn of(model: &Model, folder: &Folder<'_>) -> Result<&'static Modules> {
        let family = model.spec().family.as_str();
        // The first of each stack: where it is missing, the file has the stack.
        let stacks_alike = |m: &Modules| {
            let found = |first: Names| model.gguf().tensor(&format!("blk.0.{}.weight", first.1)).is_some();
            [Q, GATE].into_iter().all(|first| found(first) == m.layer.contains(&first))
        };
        let mut of_family = MODULES.iter().filter(|m| m.families.contains(&family)).peekable();
        let known = of_family.peek().is_some();
        of_family.find(|m| stacks_alike(m)).ok_or_else(|| {
            let mut families: Vec<&str> = MODULES.iter().flat_map(|m| m.families).copied().collect();
            families.sort_unstable();
            families.dedup();
            let what = match known {
                true => format!("{} stacks other matrices than the implementation PEFT adapts", model.gguf().name()),
                false => format!("PEFT adapters of the architecture {family:?}; known are {}", families.join(", ")),
            };
            Error::Unsupported(format!("{}: {what}", folder.0.display()))
        })
    }

    /// The GGUF name of a module's matrix. Wrappers around the text model put more in front (`language_model.model.…`).
    fn gguf_name(&self, module: &str) -> Option<String> {
        if let Some((_, name)) =
            self.outer.iter().find(|(m, _)| module == *m || m.strip_prefix("model.") == Some(module))
        {
            return Some((*name).to_string());
        }
        let (front, inner) = module.split_once("layers.")?;
        let wrapped = ["", "language_model.model.", "model.language_model."].contains(&front);
        if front != self.front && !wrapped {
            return None;
        }
        let (layer, part) = inner.split_once('.')?;
        let layer: usize = layer.parse().ok()?;
        let (_, name) = self.layer.iter().find(|(m, _)| *m == part)?;
        Some(format!("blk.{layer}.{name}.weight"))
    }

    /// The module of a matrix.
    fn module_name(&self, gguf: &str) -> Option<String> {
        if let Some((module, _)) = self.outer.iter().find(|(_, name)| *name == gguf) {
            return Some((*module).to_string());
        }
        let (layer, part) = gguf.strip_prefix("blk.")?.strip_suffix(".weight")?.split_once('.')?;
        let (module, _) = self.layer.iter().find(|(_, name)| *name == part)?;
        Some(format!("{}layers.{layer}.{module}", self.front))
    }

    /// Moves the rows (of `width`) of a query or key matrix between the two orders; others come back as they are.
    fn permute(&self, spec: &Spec, name: &str, rows: Vec<f32>, width: usize, way: Way) -> Vec<f32> {
        let turns = name.ends_with(".attn_q.weight") || name.ends_with(".attn_k.weight");
        let (dim, half) = (spec.head_dim, spec.head_dim / 2);
        if !turns || !self.permuted || dim < 2 || width == 0 || !rows.len().is_multiple_of(dim * width) {
            return rows;
        }
        let mut out = vec![0.0; rows.len()];
        for (row, values) in rows.chunks_exact(width).enumerate() {
            let (head, at) = (row / dim * dim, row % dim);
            let to = head + if way == Way::ToGguf { at % half * 2 + at / half } else { at % 2 * half + at / 2 };
            out[to * width..(to + 1) * width].copy_from_slice(values);
        }
        out
    }

    /// `target_modules`: the ends of names where every layer has the same modules, else all names in full.
    fn targets(&self, named: &BTreeSet<String>, layers: usize) -> Vec<String> {
        let mut ends = BTreeSet::new();
        for module in named {
            ends.insert(module.rsplit('.').next().unwrap_or(module).to_string());
        }
        let wanted = |end: &String| self.layer.iter().find(|(m, _)| m.ends_with(end.as_str())).map(|(m, _)| *m);
        let complete = ends.iter().all(|end| match wanted(end) {
            Some(module) => (0..layers).all(|i| named.contains(&format!("{}layers.{i}.{module}", self.front))),
            None => true,
        });
        if complete { ends.into_iter().collect() } else { named.iter().cloned().collect() }
    }
}

/// Which way rows move.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    ToGguf,
    FromGguf,
}

fn transpose(matrix: &[f32], width: usize) -> Vec<f32> {
    (0..width).flat_map(|column| matrix.iter().skip(column).step_by(width.max(1)).copied()).collect()
}

/// What an adapter's folder is named in messages, with an error about it.
struct Folder<'a>(&'a Path);

impl Folder<'_> {
    fn error(&self, file: &str, at: impl Into<String>, what: impl Into<String>) -> Error {
        Error::Format { file: self.0.join(file).display().to_string(), at: at.into(), what: what.into() }
    }
}

/// Parts of `adapter_config.json`.
struct Config {
    rank: usize,
    alpha: f32,
    rslora: bool,
    dora: bool,
    /// Module (or its end) → its own alpha.
    alphas: Vec<(String, f32)>,
}

impl Config {
    fn read(folder: &Folder<'_>) -> Result<Config> {
        let path = folder.0.join(CONFIG);
        let text = std::fs::read(&path).map_err(Error::io(&path))?;
        let json: Value = serde_json::from_slice(&text).map_err(|e| folder.error(CONFIG, "text", e.to_string()))?;
        let refuse = |key: &str, what: &str| Err(folder.error(CONFIG, format!("key {key}"), what));
        let kind = json["peft_type"].as_str().unwrap_or("LORA");
        if kind != "LORA" {
            return refuse("peft_type", &format!("is {kind:?}; only \"LORA\" can be read"));
        }
        if !matches!(json["bias"].as_str(), None | Some("none")) {
            return refuse("bias", "trained biases cannot be applied; train with bias = \"none\"");
        }
        for key in ["fan_in_fan_out", "lora_bias"] {
            if json[key].as_bool() == Some(true) {
                return refuse(key, "is set, which no supported family needs");
            }
        }
        if json["modules_to_save"].as_array().is_some_and(|m| !m.is_empty()) {
            return refuse("modules_to_save", "whole trained modules cannot be applied; train low-rank parts only");
        }
        let Some(rank) = json["r"].as_u64().and_then(|r| usize::try_from(r).ok()).filter(|r| *r > 0) else {
            return refuse("r", "a rank of at least 1 is needed");
        };
        let alpha = json["lora_alpha"].as_f64().unwrap_or(8.0) as f32;
        let flag = |key: &str| json[key].as_bool().unwrap_or(false);
        let mut alphas = Vec::new();
        for (module, alpha) in json["alpha_pattern"].as_object().into_iter().flatten() {
            match alpha.as_f64() {
                Some(alpha) if module.chars().all(|c| c.is_ascii_alphanumeric() || "._".contains(c)) => {
                    alphas.push((module.clone(), alpha as f32));
                }
                _ => return refuse("alpha_pattern", &format!("{module:?} is no plain name of a module with a number")),
            }
        }
        Ok(Config { rank, alpha, rslora: flag("use_rslora"), dora: flag("use_dora"), alphas })
    }

    /// What a module's `B` is multiplied with because it has an alpha of its own.
    fn own_factor(&self, module: &str) -> f32 {
        let is = |name: &str| module == name || module.strip_suffix(name).is_some_and(|front| front.ends_with('.'));
        self.alphas.iter().find(|(name, _)| is(name)).map_or(1.0, |(_, alpha)| alpha / self.alpha)
    }
}

/// Reads the adapter in `folder`, which was trained on the Hugging Face form of `model`.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] naming the key or tensor that is damaged, is of a kind that cannot be applied, or does
/// not fit `model`.
pub fn read(folder: impl AsRef<Path>, model: &Model) -> Result<Adapter> {
    let folder = Folder(folder.as_ref());
    let known = Modules::of(model, &folder)?;
    let config = Config::read(&folder)?;
    let path = folder.0.join(TENSORS);
    let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| folder.error(TENSORS, "header", e.to_string()))?;
    // Module → A, B, magnitude.
    let mut modules: BTreeMap<&str, [Option<Values>; 3]> = BTreeMap::new();
    for (name, tensor) in file.iter() {
        let refuse = |what: &str| folder.error(TENSORS, format!("tensor {name}"), what);
        let inner = name.strip_prefix(PREFIX).unwrap_or(name);
        let inner = inner.strip_suffix(".weight").unwrap_or(inner);
        let inner = inner.strip_suffix(".default").unwrap_or(inner);
        let kinds = [".lora_A", ".lora_B", ".lora_magnitude_vector", ".lora_embedding_A", ".lora_embedding_B"];
        let Some((which, module)) =
            kinds.iter().enumerate().find_map(|(i, kind)| Some((i % 3, inner.strip_suffix(kind)?)))
        else {
            return Err(refuse("is no part of a LoRA adapter that is known here"));
        };
        let values = floats(&tensor).map_err(|what| refuse(&what))?;
        modules.entry(module).or_default()[which] = Some((values, tensor.shape().to_vec()));
    }
    let mut adapter = Adapter {
        name: folder.0.display().to_string(),
        rank: config.rank,
        alpha: config.alpha,
        rslora: config.rslora,
        entries: BTreeMap::new(),
        base: Some(BaseId { architecture: model.spec().family.clone(), fingerprint: None }),
    };
    for (module, [a, b, magnitude]) in modules {
        let refuse = |what: &str| folder.error(TENSORS, format!("module {module}"), what);
        let Some(name) = known.gguf_name(module) else {
            return Err(refuse("is none of the modules of this family that can be adapted"));
        };
        let (Some((a, a_shape)), Some((b, b_shape))) = (a, b) else {
            return Err(refuse("has only one of lora_A and lora_B; the file is incomplete"));
        };
        if config.dora != magnitude.is_some() {
            return Err(refuse("use_dora in the configuration and the magnitudes in the file disagree"));
        }
        let (&[rank, inputs], &[outputs, columns]) = (a_shape.as_slice(), b_shape.as_slice()) else {
            return Err(refuse("lora_A and lora_B must be matrices"));
        };
        if rank != columns {
            return Err(refuse(&format!(
                "lora_A has {rank} rows and lora_B {columns} columns, which must be one rank"
            )));
        }
        let factor = config.own_factor(module);
        let b: Vec<f32> = b.into_iter().map(|v| factor * v).collect();
        let entry = match name == EMBEDDING {
            // The embedding's matrix is read by rows: the product of the two is its transpose.
            true => LowRank {
                rank,
                inputs: outputs,
                outputs: inputs,
                a: transpose(&b, rank),
                b: transpose(&a, inputs),
                magnitude: magnitude.map(|m| m.0),
            },
            false => LowRank {
                rank,
                inputs,
                outputs,
                a,
                b: known.permute(model.spec(), &name, b, rank, Way::ToGguf),
                magnitude: magnitude.map(|m| known.permute(model.spec(), &name, m.0, 1, Way::ToGguf)),
            },
        };
        if name == EMBEDDING && entry.magnitude.is_some() {
            return Err(refuse("DoRA of an embedding cannot be applied"));
        }
        adapter.entries.insert(name, entry);
    }
    adapter.matches(model.gguf())?;
    Ok(adapter)
}

/// The values of a tensor of f32, f16 or bf16.
fn floats(tensor: &TensorView<'_>) -> Result<Vec<f32>, String> {
    let dtype = match tensor.dtype() {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        other => return Err(format!("has type {other:?}; F32, F16 and BF16 can be read")),
    };
    let mut out = vec![0.0; tensor.shape().iter().product()];
    quant::dequantize(dtype, tensor.data(), &mut out).map_err(|e| e.to_string())?;
    Ok(out)
}

/// Writes `adapter` into `folder` (made where it is missing), as f32; `base` is the name of the Hugging Face model that
/// PEFT is to load it onto, where known.
///
/// # Errors
/// An adapter that does not match `model`, matrices that have no name in PEFT, [`Error::Io`].
pub fn write(folder: impl AsRef<Path>, adapter: &Adapter, model: &Model, base: Option<&str>) -> Result<()> {
    let folder = Folder(folder.as_ref());
    let known = Modules::of(model, &folder)?;
    adapter.matches(model.gguf())?;
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut modules = BTreeSet::new();
    let mut ranks = serde_json::Map::new();
    for (name, e) in &adapter.entries {
        let Some(module) = known.module_name(name) else {
            return Err(Error::Unsupported(format!("{}: {name} has no name in PEFT", adapter.name)));
        };
        if e.rank != adapter.rank {
            ranks.insert(module.clone(), e.rank.into());
        }
        let mut add = |kind: &str, shape: Vec<usize>, values: &[f32]| {
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            tensors.push((format!("{PREFIX}{module}.{kind}"), shape, bytes));
        };
        if name == EMBEDDING {
            add("lora_embedding_A", vec![e.rank, e.outputs], &transpose(&e.b, e.rank));
            add("lora_embedding_B", vec![e.inputs, e.rank], &transpose(&e.a, e.inputs));
        } else {
            add("lora_A.weight", vec![e.rank, e.inputs], &e.a);
            let b = known.permute(model.spec(), name, e.b.clone(), e.rank, Way::FromGguf);
            add("lora_B.weight", vec![e.outputs, e.rank], &b);
        }
        if let Some(m) = &e.magnitude {
            let m = known.permute(model.spec(), name, m.clone(), 1, Way::FromGguf);
            add("lora_magnitude_vector", vec![e.outputs], &m);
        }
        modules.insert(module);
    }
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": if adapter.alpha.fract() == 0.0 { json!(adapter.alpha as i64) } else { json!(adapter.alpha) },
        "lora_dropout": 0.0,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.entries.values().any(|e| e.magnitude.is_some()),
        "target_modules": known.targets(&modules, model.spec().layers.len()),
        "rank_pattern": ranks,
        "alpha_pattern": {},
        "modules_to_save": null,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "inference_mode": true,
    });
    std::fs::create_dir_all(folder.0).map_err(Error::io(folder.0))?;
    let views = tensors.iter().map(|(name, shape, bytes)| {
        TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (name.as_str(), view))
    });
    let views = views.collect::<Result<Vec<_>, _>>().map_err(|e| Error::argument(e.to_string()))?;
    let metadata = std::collections::HashMap::from([("format".to_string(), "pt".to_string())]);
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| Error::argument(e.to_string()))?;
    let text = serde_json::to_vec_pretty(&config).map_err(|e| Error::argument(e.to_string()))?;
    file::replace(folder.0.join(TENSORS), &bytes)?;
    file::replace(folder.0.join(CONFIG), &text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiny::{TinyConfig, write_tiny};

    fn tiny(arch: &str, name: &str) -> (Model, std::path::PathBuf) {
        let folder = std::env::temp_dir().join(format!("kinglet-peft-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("base.gguf");
        write_tiny(&path, &TinyConfig::new(arch)).unwrap();
        (crate::open(&path).unwrap(), folder)
    }

    /// Removes the folder of [`tiny`]; Windows keeps files that are mapped.
    fn remove(model: Model, folder: &Path) {
        drop(model);
        std::fs::remove_dir_all(folder).unwrap();
    }

    fn adapter(model: &Model, dora: bool) -> Adapter {
        let mut state = 1u32;
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        let mut entries = BTreeMap::new();
        for (name, rank) in [
            ("blk.0.attn_q.weight", 3),
            ("blk.0.attn_k.weight", 3),
            ("blk.0.attn_qkv.weight", 9),
            ("blk.1.ffn_up.weight", 3),
            ("blk.1.ffn_down.weight", 5),
            ("output.weight", 3),
            ("token_embd.weight", 3),
        ] {
            let Some(t) = model.gguf().tensor(name) else { continue };
            let mut random = |n: usize| (0..n).map(|_| next()).collect::<Vec<f32>>();
            let magnitude = (dora && name.starts_with("blk")).then(|| random(t.rows()));
            if dora && magnitude.is_none() {
                continue;
            }
            let (a, b) = (random(rank * t.width()), random(rank * t.rows()));
            let entry = LowRank { rank, inputs: t.width(), outputs: t.rows(), a, b, magnitude };
            entries.insert(name.to_string(), entry);
        }
        let base = Some(BaseId { architecture: model.spec().family.clone(), fingerprint: None });
        Adapter { name: "test".into(), rank: 3, alpha: 7.0, rslora: !dora, entries, base }
    }

    #[test]
    fn what_is_written_is_read_again() {
        for arch in ["llama", "qwen2", "gemma2", "glm4", "chatglm", "phi3"] {
            for dora in [false, true] {
                let (model, folder) = tiny(arch, &format!("{arch}-{dora}"));
                let written = adapter(&model, dora);
                write(&folder, &written, &model, Some("a/b")).unwrap();
                let mut read = read(&folder, &model).unwrap();
                read.name = "test".into();
                assert_eq!(read, written, "{arch}");
                remove(model, &folder);
            }
        }
    }

    #[test]
    fn rows_of_queries_and_keys_are_those_of_the_converter() {
        let (model, folder) = tiny("llama", "rows");
        let written = adapter(&model, false);
        write(&folder, &written, &model, None).unwrap();
        let bytes = std::fs::read(folder.join(TENSORS)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let name = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight";
        let theirs = floats(&file.tensor(name).unwrap()).unwrap();
        let ours = &written.entries["blk.0.attn_k.weight"];
        // The converter: W.reshape(heads, 2, D/2, in).swapaxes(1, 2).reshape(W.shape).
        let (heads, half) = (model.spec().kv_heads, model.spec().head_dim / 2);
        for (head, p, i) in (0..heads).flat_map(|h| (0..2).flat_map(move |p| (0..half).map(move |i| (h, p, i)))) {
            let (hf, gguf) = ((head * 2 + p) * half + i, (head * half + i) * 2 + p);
            assert_eq!(theirs[hf * 3..(hf + 1) * 3], ours.b[gguf * 3..(gguf + 1) * 3]);
        }
        let a = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight";
        assert_eq!(floats(&file.tensor(a).unwrap()).unwrap(), ours.a);
        remove(model, &folder);
    }

    #[test]
    fn damaged_folders_are_refused() {
        let (model, folder) = tiny("qwen2", "damaged");
        write(&folder, &adapter(&model, false), &model, None).unwrap();
        let config = std::fs::read_to_string(folder.join(CONFIG)).unwrap();
        for (from, to, wanted) in [
            ("\"LORA\"", "\"LOHA\"", "peft_type"),
            ("\"bias\": \"none\"", "\"bias\": \"all\"", "bias"),
            ("\"r\": 3", "\"r\": -3", "key r"),
            ("\"use_dora\": false", "\"use_dora\": true", "use_dora"),
            ("{", "", "text"),
        ] {
            assert!(config.contains(from));
            std::fs::write(folder.join(CONFIG), config.replacen(from, to, 1)).unwrap();
            let error = read(&folder, &model).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
        std::fs::write(folder.join(CONFIG), &config).unwrap();
        let bytes = std::fs::read(folder.join(TENSORS)).unwrap();
        std::fs::write(folder.join(TENSORS), &bytes[..bytes.len() / 2]).unwrap();
        assert!(read(&folder, &model).unwrap_err().to_string().contains("header"));
        remove(model, &folder);
    }

    #[test]
    fn names_go_both_ways() {
        let [llama, _, glm, own_glm, phi] = &MODULES;
        for (modules, module, gguf) in [
            (llama, "model.layers.12.mlp.up_proj", "blk.12.ffn_up.weight"),
            (glm, "model.layers.12.mlp.gate_up_proj", "blk.12.ffn_up.weight"),
            (own_glm, "transformer.encoder.layers.3.self_attention.query_key_value", "blk.3.attn_qkv.weight"),
            (own_glm, "transformer.output_layer", "output.weight"),
            (phi, "model.layers.0.self_attn.qkv_proj", "blk.0.attn_qkv.weight"),
            (llama, "lm_head", "output.weight"),
            (llama, "model.embed_tokens", "token_embd.weight"),
        ] {
            assert_eq!(modules.gguf_name(module).as_deref(), Some(gguf));
            assert_eq!(modules.module_name(gguf).as_deref(), Some(module));
        }
        assert_eq!(llama.gguf_name("model.layers.0.mlp.experts.3.up_proj"), None);
        assert_eq!(llama.gguf_name("vision_tower.layers.0.self_attn.q_proj"), None);
        assert_eq!(phi.gguf_name("model.layers.0.self_attn.q_proj"), None);
    }

    #[test]
    fn families_without_names_are_refused() {
        let (model, folder) = tiny("internlm2", "unknown");
        let error = write(&folder, &adapter(&model, false), &model, None).unwrap_err().to_string();
        assert!(error.contains("known are chatglm, gemma, gemma2"), "{error}");
        remove(model, &folder);
    }
}
