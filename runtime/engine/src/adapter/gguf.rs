//! Adapters as GGUF files, as llama.cpp's converter writes them and its loader reads them.
//!
//! | key | value |
//! | --- | --- |
//! | `general.type` | `adapter` |
//! | `general.architecture` | that of the base |
//! | `adapter.type` | `lora` |
//! | `adapter.lora.alpha` | numerator of the scale `alpha/r`; 0 or missing for a scale of 1 |
//! | `kinglet.lora.rank`, `kinglet.lora.alpha`, `kinglet.lora.rslora` | the adapter's own numbers, ours |
//! | `kinglet.base.fingerprint` | [`fingerprint`](super::fingerprint) of the base, ours |
//!
//! The pair of a matrix `[in, out]` (GGUF order) is `{name}.lora_a` `[in, r]` and `{name}.lora_b` `[r, out]`. For the
//! token embedding the two are swapped and transposed, `lora_a` `[r, vocab]` and `lora_b` `[r, width]`, because it is
//! read by rows. A reader that only knows `alpha/r` gets the right scale for a rank-stabilised adapter too: the common
//! key then holds `alpha·√r`. A magnitude (DoRA) is `{name}.lora_magnitude` `[out]`: others refuse a name they do not
//! know, which is better than the wrong text.

use std::collections::BTreeMap;
use std::path::Path;

use super::lora::{Adapter, BaseId, LowRank, MAX_RANK};
use crate::gguf::{Gguf, TensorInfo, Writer};
use crate::quant::{self, DType};
use crate::{Error, Result};

const TYPE: &str = "general.type";
const ARCHITECTURE: &str = "general.architecture";
const ADAPTER_TYPE: &str = "adapter.type";
const ALPHA: &str = "adapter.lora.alpha";
const OWN_RANK: &str = "kinglet.lora.rank";
const OWN_ALPHA: &str = "kinglet.lora.alpha";
const OWN_RSLORA: &str = "kinglet.lora.rslora";
const OWN_BASE: &str = "kinglet.base.fingerprint";

const SUFFIXES: [&str; 3] = [".lora_a", ".lora_b", ".lora_magnitude"];
/// The matrix whose pair is stored the other way round.
const EMBEDDING: &str = "token_embd.weight";

impl Adapter {
    /// Reads the adapter file at `path`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] for a file that is no adapter or is damaged.
    pub fn open(path: impl AsRef<Path>) -> Result<Adapter> {
        Adapter::from_gguf(&Gguf::open(path)?)
    }

    /// Reads the adapter in `file`.
    ///
    /// # Errors
    /// As [`Adapter::open`].
    pub fn from_gguf(file: &Gguf) -> Result<Adapter> {
        let meta = file.metadata();
        for (key, wanted) in [(TYPE, "adapter"), (ADAPTER_TYPE, "lora")] {
            let found = meta.opt_str(key)?.unwrap_or("nothing");
            if found != wanted {
                return Err(meta.error(key, format!("is {found:?}, but {wanted:?} is needed; this is no LoRA adapter")));
            }
        }
        let base = BaseId {
            architecture: meta.str(ARCHITECTURE)?.to_string(),
            fingerprint: meta.opt_str(OWN_BASE)?.map(str::to_string),
        };
        let mut groups: BTreeMap<String, [Option<&TensorInfo>; 3]> = BTreeMap::new();
        for tensor in file.tensors() {
            let Some((which, name)) =
                SUFFIXES.iter().enumerate().find_map(|(i, s)| Some((i, tensor.name.strip_suffix(s)?)))
            else {
                let error = |what: &str| format_error(file, &tensor.name, what);
                return Err(error("is none of lora_a, lora_b and lora_magnitude; the file is no plain LoRA adapter"));
            };
            if let Some(slot) = groups.entry(name.to_string()).or_default().get_mut(which) {
                *slot = Some(tensor);
            }
        }
        let mut entries = BTreeMap::new();
        for (name, [a, b, magnitude]) in groups {
            let (Some(a), Some(b)) = (a, b) else {
                let missing = if a.is_none() { SUFFIXES[0] } else { SUFFIXES[1] };
                return Err(format_error(file, &format!("{name}{missing}"), "is missing; the file is incomplete"));
            };
            entries.insert(name.clone(), entry(file, &name, a, b, magnitude)?);
        }
        let mut adapter =
            Adapter { name: file.name().into(), rank: 0, alpha: 0.0, rslora: false, entries, base: Some(base) };
        adapter.rank = match meta.opt_u32(OWN_RANK)? {
            Some(rank) => rank as usize,
            None => adapter.entries.values().map(|e| e.rank).max().unwrap_or(0),
        };
        match (meta.opt_f32(OWN_ALPHA)?, meta.opt_f32(ALPHA)?) {
            (Some(alpha), _) => {
                adapter.alpha = alpha;
                adapter.rslora = meta.opt_bool(OWN_RSLORA)?.unwrap_or(false);
            }
            (None, Some(alpha)) if alpha != 0.0 => adapter.alpha = alpha,
            // A scale of 1 whatever the rank.
            _ => {
                adapter.alpha = adapter.rank.max(1) as f32;
                let usual = adapter.alpha;
                for e in adapter.entries.values_mut().filter(|e| e.rank as f32 != usual) {
                    let factor = e.rank as f32 / usual;
                    e.b.iter_mut().for_each(|b| *b *= factor);
                }
            }
        }
        adapter.check()?;
        Ok(adapter)
    }

    /// Writes the adapter to `path`, whole or not at all; the matrices as `F32` or, at half the size, `F16`.
    ///
    /// # Errors
    /// An adapter that is not sound or does not say which architecture it is for, rank-stabilised entries of different
    /// ranks (the common key has one scale for all), another type, [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>, dtype: DType) -> Result<()> {
        self.check()?;
        if ![DType::F32, DType::F16].contains(&dtype) {
            return Err(Error::argument(format!("an adapter cannot be written as {dtype}; choose F32 or F16")));
        }
        let Some(base) = &self.base else {
            return Err(Error::argument(format!("{}: the adapter does not say which base it is for", self.name)));
        };
        let ranks: Vec<usize> = self.entries.values().map(|e| e.rank).collect();
        let rank = ranks.first().copied().unwrap_or(self.rank);
        if self.rslora && ranks.iter().any(|r| *r != rank) {
            return Err(Error::argument(
                "a rank-stabilised adapter with matrices of different ranks cannot be written",
            ));
        }
        let common = if self.rslora { self.alpha * (rank as f32).sqrt() } else { self.alpha };
        let mut writer = Writer::new();
        writer.set(ARCHITECTURE, base.architecture.as_str()).set(TYPE, "adapter").set(ADAPTER_TYPE, "lora");
        writer.set(ALPHA, common).set(OWN_RANK, self.rank as u32).set(OWN_ALPHA, self.alpha);
        writer.set(OWN_RSLORA, self.rslora);
        if let Some(fingerprint) = &base.fingerprint {
            writer.set(OWN_BASE, fingerprint.as_str());
        }
        let mut tensors = Vec::new();
        for (name, e) in &self.entries {
            let (rank, inputs, outputs) = (e.rank as u64, e.inputs as u64, e.outputs as u64);
            let (a, b) = match name == EMBEDDING {
                false => ((e.a.clone(), [inputs, rank]), (e.b.clone(), [rank, outputs])),
                true => ((e.b.clone(), [rank, outputs]), (transpose(&e.a, e.inputs), [rank, inputs])),
            };
            for (suffix, (values, shape)) in SUFFIXES.iter().zip([a, b]) {
                tensors.push((format!("{name}{suffix}"), dtype, shape.to_vec(), values));
            }
            if let (Some(m), Some(suffix)) = (&e.magnitude, SUFFIXES.last()) {
                tensors.push((format!("{name}{suffix}"), DType::F32, vec![outputs], m.clone()));
            }
        }
        for (name, dtype, shape, _) in &tensors {
            writer.tensor(name, *dtype, shape)?;
        }
        let mut file = writer.create(path)?;
        for (name, dtype, _, values) in &tensors {
            file.write(name, &quant::quantize(*dtype, values)?)?;
        }
        file.finish()?;
        Ok(())
    }
}

fn format_error(file: &Gguf, tensor: &str, what: impl Into<String>) -> Error {
    Error::Format { file: file.name().into(), at: format!("tensor {tensor}"), what: what.into() }
}

fn entry(file: &Gguf, name: &str, a: &TensorInfo, b: &TensorInfo, magnitude: Option<&TensorInfo>) -> Result<LowRank> {
    let swapped = name == EMBEDDING;
    let (rank_of_a, rank_of_b) = if swapped { (a.width(), b.width()) } else { (a.rows(), b.width()) };
    if rank_of_a != rank_of_b || rank_of_a > MAX_RANK {
        return Err(format_error(
            file,
            &a.name,
            format!("has shape {:?} and lora_b {:?}, which have no common rank up to {MAX_RANK}", a.shape, b.shape),
        ));
    }
    let values = |t: &TensorInfo| -> Result<Vec<f32>> {
        let mut out = vec![0.0; t.elements()];
        quant::dequantize(t.dtype, file.data(t), &mut out).map_err(|e| format_error(file, &t.name, e.to_string()))?;
        Ok(out)
    };
    let (a_values, b_values, magnitude) = (values(a)?, values(b)?, magnitude.map(values).transpose()?);
    Ok(match swapped {
        false => LowRank { rank: rank_of_a, inputs: a.width(), outputs: b.rows(), a: a_values, b: b_values, magnitude },
        true => LowRank {
            rank: rank_of_a,
            inputs: b.rows(),
            outputs: a.rows(),
            a: transpose(&b_values, rank_of_a),
            b: a_values,
            magnitude,
        },
    })
}

/// The transpose of a matrix of rows of `width`.
fn transpose(matrix: &[f32], width: usize) -> Vec<f32> {
    (0..width).flat_map(|column| matrix.iter().skip(column).step_by(width.max(1)).copied()).collect()
}
