//! What was trained, as files and sessions take it: an adapter, or a whole new model file.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::Learner;
use crate::adapter::{Adapter, BaseId, LowRank};
use crate::gguf::{Gguf, TensorInfo, Writer};
use crate::quant::{self, DType};
use crate::tape::{Param, Weight, WeightId, adapted_norm};
use crate::{Error, Result};

/// Rows that are converted at a time.
const ROWS: usize = 64;

/// What was trained of some rows of a matrix.
struct Part<'a> {
    rows: Range<usize>,
    /// `[rank, inputs]`.
    a: &'a [f32],
    /// `[rows, rank]`.
    b: &'a [f32],
    /// `[rows]`.
    magnitude: Option<&'a [f32]>,
}

/// The parts of one matrix as one pair: the `A`s one below the other, each `B` in its part's rows and its `A`'s columns, and
/// zero elsewhere. Files give an entry the scale `alpha/rank`; `B` makes up for the larger rank. Rows that have no trained
/// length keep the one they have.
fn whole(gguf: &Gguf, tensor: &str, parts: &[Part<'_>], rank: usize) -> Result<LowRank> {
    let Some(info) = gguf.tensor(tensor) else {
        return Err(Error::argument(format!("{}: no tensor {tensor}", gguf.name())));
    };
    let (inputs, outputs, total) = (info.width(), info.rows(), rank * parts.len());
    let mut b = vec![0.0; outputs * total];
    for (i, part) in parts.iter().enumerate() {
        for (row, values) in part.rows.clone().zip(part.b.chunks_exact(rank)) {
            let place = &mut b[row * total + i * rank..][..rank];
            place.iter_mut().zip(values).for_each(|(to, v)| *to = parts.len() as f32 * v);
        }
    }
    let mut magnitude = None;
    if parts.iter().any(|part| part.magnitude.is_some()) {
        let row_bytes = gguf.data(info).len() / outputs.max(1);
        let mut row = vec![0.0; inputs];
        let lengths = gguf.data(info).chunks_exact(row_bytes.max(1)).map(|bytes| {
            quant::dequantize(info.dtype, bytes, &mut row)?;
            Ok(adapted_norm(&mut row, 0.0, &[], &[]))
        });
        let mut lengths = lengths.collect::<Result<Vec<f32>>>()?;
        for part in parts {
            let trained = part.magnitude.into_iter().flatten();
            lengths[part.rows.clone()].iter_mut().zip(trained).for_each(|(to, v)| *to = *v);
        }
        magnitude = Some(lengths);
    }
    let a = parts.iter().flat_map(|part| part.a).copied().collect();
    Ok(LowRank { rank: total, inputs, outputs, a, b, magnitude })
}

impl Learner {
    /// The adapter that `values` are, named `name` in messages; its `alpha` is the scale times the rank. Parts of one matrix
    /// (stacked queries, keys and values) become one entry, whose rank is the sum of theirs.
    ///
    /// # Errors
    /// A training of all weights, values of another number or not finite.
    pub fn adapter(&self, values: &[f32], name: &str) -> Result<Adapter> {
        self.check_length(values)?;
        let Some(lora) = self.trained().lora() else {
            return Err(Error::argument("all weights were trained, no adapter; write a model instead"));
        };
        let weights = self.model().weights();
        let mut matrices: BTreeMap<&str, Vec<Part<'_>>> = BTreeMap::new();
        for (id, info) in weights.iter() {
            let find = |half: &str| {
                let p = self.params().iter().find(|p| p.name.strip_suffix(half) == Some(&info.name))?;
                values.get(p.offset..p.end())
            };
            let (Some(a), Some(b)) = (find(".lora_a"), find(".lora_b")) else { continue };
            let (tensor, rows) = weights.source(id);
            matrices.entry(tensor).or_default().push(Part { rows, a, b, magnitude: find(".lora_magnitude") });
        }
        let mut entries = BTreeMap::new();
        for (tensor, parts) in matrices {
            entries.insert(tensor.to_string(), whole(self.model().gguf(), tensor, &parts, lora.rank)?);
        }
        let adapter = Adapter {
            name: name.into(),
            rank: lora.rank,
            alpha: lora.scale * lora.rank as f32,
            rslora: false,
            entries,
            base: Some(BaseId::of(self.model().gguf())?),
        };
        adapter.check()?;
        Ok(adapter)
    }

    /// Writes to `path` the model with `values` for its weights: a file like the one that training began with, whose
    /// matrices keep their type or get `dtype`; norms, biases and what is not trained stay as they lie there. Gives the
    /// file's bytes.
    ///
    /// # Errors
    /// A training of adapters, values of another number or not finite, rows that are no whole number of blocks of `dtype`,
    /// [`Error::Io`].
    pub fn write_model(&self, values: &[f32], dtype: Option<DType>, path: impl AsRef<Path>) -> Result<u64> {
        self.check_length(values)?;
        if self.trained().lora().is_some() {
            return Err(Error::argument("adapters were trained; write the adapter, or merge it into the model"));
        }
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            let name = self.params().iter().find(|p| (p.offset..p.end()).contains(&at)).map_or("?", |p| &p.name);
            return Err(Error::argument(format!("{name} has a {}: the training diverged", values[at])));
        }
        let gguf = self.model().gguf();
        let as_written = |t: &TensorInfo| match dtype {
            Some(dtype) if t.shape.len() > 1 && !self.parts(t).is_empty() => dtype,
            _ => t.dtype,
        };
        let mut writer = Writer::new();
        for (key, value) in gguf.metadata().iter() {
            if !(gguf.shards() > 1 && key.starts_with("split.")) {
                writer.set(key, value.clone());
            }
        }
        if let Some(dtype) = dtype {
            writer.metadata_mut().remove("general.file_type");
            if let Some(number) = dtype.gguf_file_type() {
                writer.set("general.file_type", number);
            }
        }
        for t in gguf.tensors() {
            writer.tensor(&t.name, as_written(t), &t.shape)?;
        }
        let mut file = writer.create(path)?;
        for t in gguf.tensors() {
            let parts = self.parts(t);
            if parts.is_empty() {
                file.write(&t.name, gguf.data(t))?;
                continue;
            }
            let row_bytes = gguf.data(t).len() / t.rows().max(1);
            let mut rows = vec![0.0f32; ROWS * t.width()];
            for (block, bytes) in gguf.data(t).chunks(ROWS * row_bytes.max(1)).enumerate() {
                let count = bytes.len() / row_bytes.max(1);
                let rows = &mut rows[..count * t.width()];
                // Rows that the model does not compute with stay.
                quant::dequantize(t.dtype, bytes, rows)?;
                let first = block * ROWS * t.width();
                for (p, part) in &parts {
                    let (start, end) = (part.start.max(first), part.end.min(first + rows.len()));
                    if start < end {
                        let from = p.offset + start - part.start;
                        rows[start - first..end - first].copy_from_slice(&values[from..from + (end - start)]);
                    }
                }
                file.write(&t.name, &quant::quantize(as_written(t), rows)?)?;
            }
        }
        file.finish()
    }

    /// The trained weights that a tensor holds, with the elements of each.
    fn parts(&self, t: &TensorInfo) -> Vec<(&Param, Range<usize>)> {
        let weights = self.model().weights();
        let part = |(id, w): (WeightId, &Weight)| {
            let (tensor, elements) = weights.elements(id);
            let p = self.params().iter().find(|p| tensor == t.name && p.name == w.name)?;
            Some((p, elements))
        };
        weights.iter().filter_map(part).collect()
    }

    fn check_length(&self, values: &[f32]) -> Result<()> {
        match values.len() == self.param_count() {
            true => Ok(()),
            false => Err(Error::argument(format!("{} values for {} parameters", values.len(), self.param_count()))),
        }
    }
}
