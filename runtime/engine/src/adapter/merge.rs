//! A new model file with the adapters inside: for programs that read models only, and for the last percent of speed.
//!
//! The base is copied tensor by tensor; corrected matrices are dequantized some rows at a time, `ΔW` is added in f32, and
//! the rows are quantized again, to the type they had or to a chosen one. Memory is a few rows, whatever the model's size.
//! Quantizing twice costs a little quality, which the base's own type decides; `F16` or `Q8_0` keep nearly all of it.

use std::path::Path;

use super::Adapter;
use super::lora::LowRank;
use crate::gguf::{Gguf, TensorInfo, Writer};
use crate::quant::{self, DType};
use crate::{Error, Result};

/// Rows that are converted at a time.
const ROWS: usize = 64;
/// The embedding, and the head that replaces it where the two are not tied.
const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";

/// What a merge did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merged {
    /// Matrices that were changed.
    pub tensors: usize,
    /// Size of the new file, in bytes.
    pub bytes: u64,
}

/// Writes to `path` the model `base` with `adapters`, each times its factor. Changed matrices keep their type, or get
/// `dtype`.
///
/// # Errors
/// An adapter that does not match ([`Adapter::matches`]); one that corrects an embedding which is the head as well (the
/// two would both change); rows that are no whole number of blocks of `dtype`; [`Error::Io`].
pub fn merge(
    base: &Gguf,
    adapters: &[(&Adapter, f32)],
    dtype: Option<DType>,
    path: impl AsRef<Path>,
) -> Result<Merged> {
    for (adapter, factor) in adapters {
        adapter.matches(base)?;
        if !factor.is_finite() {
            return Err(Error::argument(format!("{}: its factor is {factor}, but a number is needed", adapter.name)));
        }
        if adapter.entries.contains_key(EMBEDDING) && base.tensor(HEAD).is_none() {
            return Err(Error::Unsupported(format!(
                "{}: it corrects the embedding of a model that uses it as the head too; apply it to a session instead",
                adapter.name
            )));
        }
    }
    let corrections = |t: &TensorInfo| -> Vec<(&LowRank, f32, f32)> {
        adapters
            .iter()
            .filter_map(|(adapter, factor)| adapter.entries.get(&t.name).map(|e| (e, adapter.scale(e), *factor)))
            .collect()
    };
    let mut writer = Writer::new();
    for (key, value) in base.metadata().iter() {
        if !(base.shards() > 1 && key.starts_with("split.")) {
            writer.set(key, value.clone());
        }
    }
    for t in base.tensors() {
        let changed = !corrections(t).is_empty();
        writer.tensor(&t.name, if changed { dtype.unwrap_or(t.dtype) } else { t.dtype }, &t.shape)?;
    }
    let mut file = writer.create(path)?;
    let mut tensors = 0;
    for t in base.tensors() {
        let corrections = corrections(t);
        if corrections.is_empty() {
            file.write(&t.name, base.data(t))?;
            continue;
        }
        tensors += 1;
        let width = t.width();
        let row_bytes = base.data(t).len() / t.rows().max(1);
        let mut rows = vec![0.0f32; ROWS * width];
        for (block, bytes) in base.data(t).chunks(ROWS * row_bytes.max(1)).enumerate() {
            let count = bytes.len() / row_bytes.max(1);
            let rows = rows.get_mut(..count * width).unwrap_or_default();
            quant::dequantize(t.dtype, bytes, rows)?;
            for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                correct(block * ROWS + i, row, &corrections);
            }
            file.write(&t.name, &quant::quantize(dtype.unwrap_or(t.dtype), rows)?)?;
        }
    }
    Ok(Merged { tensors, bytes: file.finish()? })
}

/// Adds to row `row` of a matrix what the corrections (entry, scale, factor) make of it.
fn correct(row: usize, w: &mut [f32], corrections: &[(&LowRank, f32, f32)]) {
    let deltas: Vec<_> = corrections.iter().map(|(e, scale, factor)| e.row_delta(row, w, *scale, *factor)).collect();
    let gain = 1.0 + deltas.iter().map(|d| d.gain).sum::<f32>();
    if gain != 1.0 {
        w.iter_mut().for_each(|v| *v *= gain);
    }
    for ((entry, ..), delta) in corrections.iter().zip(&deltas) {
        entry.add_row(row, delta.factor, w);
    }
}
