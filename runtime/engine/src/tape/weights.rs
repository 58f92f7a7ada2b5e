//! The weights a tape names: matrices stay in the mapped file, vectors (norms, biases) are a few kilobytes and are
//! read once as f32. Every reference is checked for presence, shape and type here, so that no op meets a surprise.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::op::WeightId;
use super::spec::{LayerSpec, LinearSpec, Spec, WeightRef};
use crate::gguf::Gguf;
use crate::quant::{self, DType};
use crate::{Error, Result};

/// One weight.
#[derive(Debug)]
pub struct Weight {
    /// Its name, with the rows where it is a part of a tensor.
    pub name: String,
    /// Element type in the file.
    pub dtype: DType,
    /// Input width: elements per row.
    pub width: usize,
    /// Output width: rows.
    pub rows: usize,
    /// Index of the tensor in the file's table.
    tensor: usize,
    /// The bytes within the tensor.
    bytes: Range<usize>,
    /// A vector's elements.
    vector: Option<Box<[f32]>>,
}

impl Weight {
    /// A norm's or a bias's elements; empty for matrices.
    pub fn vector(&self) -> &[f32] {
        self.vector.as_deref().unwrap_or(&[])
    }

    /// Bytes in the file.
    pub fn len_bytes(&self) -> usize {
        self.bytes.len()
    }
}

/// All weights of a model, by [`WeightId`].
#[derive(Debug)]
pub struct Weights {
    gguf: Arc<Gguf>,
    table: Vec<Weight>,
    ids: HashMap<String, WeightId>,
}

impl Weights {
    /// Finds every weight that `spec` names and checks it.
    ///
    /// # Errors
    /// A missing tensor, a shape that differs from what the sizes in the spec ask for, a type no kernel multiplies.
    pub fn resolve(gguf: Arc<Gguf>, spec: &Spec) -> Result<Weights> {
        let mut weights = Weights { gguf, table: Vec::new(), ids: HashMap::new() };
        weights.matrix(&spec.embedding, spec.vocab, spec.width)?;
        weights.vector(&spec.output_norm, spec.width)?;
        weights.matrix(&spec.head, spec.vocab, spec.width)?;
        for layer in &spec.layers {
            weights.layer(spec, layer)?;
        }
        Ok(weights)
    }

    fn layer(&mut self, spec: &Spec, layer: &LayerSpec) -> Result<()> {
        let (q_width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        self.vector(&layer.attention_norm, spec.width)?;
        self.linear(&layer.q, q_width, spec.width)?;
        self.linear(&layer.k, kv_width, spec.width)?;
        self.linear(&layer.v, kv_width, spec.width)?;
        self.linear(&layer.o, spec.width, q_width)?;
        for norm in [&layer.q_norm, &layer.k_norm].into_iter().flatten() {
            self.vector(norm, spec.head_dim)?;
        }
        for norm in [&layer.post_attention_norm, &layer.post_ffn_norm].into_iter().flatten() {
            self.vector(norm, spec.width)?;
        }
        self.vector(&layer.ffn_norm, spec.width)?;
        self.linear(&layer.gate, spec.ffn, spec.width)?;
        self.linear(&layer.up, spec.ffn, spec.width)?;
        self.linear(&layer.down, spec.width, spec.ffn)
    }

    fn linear(&mut self, linear: &LinearSpec, rows: usize, width: usize) -> Result<()> {
        self.matrix(&linear.weight, rows, width)?;
        if let Some(bias) = &linear.bias {
            self.vector(bias, rows)?;
        }
        Ok(())
    }

    fn matrix(&mut self, reference: &WeightRef, rows: usize, width: usize) -> Result<()> {
        let weight = self.locate(reference, rows, width, false)?;
        if !DType::WEIGHTS.contains(&weight.dtype) {
            return Err(Error::Unsupported(format!(
                "{}: tensor {} has type {}, which no kernel multiplies with; convert it to one of {}",
                self.gguf.name(),
                weight.name,
                weight.dtype,
                DType::WEIGHTS.map(DType::name).join(", ")
            )));
        }
        self.insert(reference, weight);
        Ok(())
    }

    fn vector(&mut self, reference: &WeightRef, len: usize) -> Result<()> {
        let mut weight = self.locate(reference, 1, len, true)?;
        let mut vector = vec![0.0; len];
        let data = &self.tensor_data(weight.tensor)[weight.bytes.clone()];
        quant::dequantize(weight.dtype, data, &mut vector)?;
        if let Some(at) = vector.iter().position(|v| !v.is_finite()) {
            return Err(Error::Format {
                file: self.gguf.name().to_string(),
                at: format!("tensor {}", weight.name),
                what: format!("element {at} is {}; the file is damaged, fetch it again", vector[at]),
            });
        }
        weight.vector = Some(vector.into());
        self.insert(reference, weight);
        Ok(())
    }

    fn insert(&mut self, reference: &WeightRef, weight: Weight) {
        let key = reference.name();
        if !self.ids.contains_key(&key) {
            self.ids.insert(key, WeightId(self.table.len() as u32));
            self.table.push(weight);
        }
    }

    /// Finds a matrix of `rows` rows of `width`, or a vector, whose "rows" in the reference are its elements.
    fn locate(&self, reference: &WeightRef, rows: usize, width: usize, vector: bool) -> Result<Weight> {
        let format = |what: String| Error::Format {
            file: self.gguf.name().to_string(),
            at: format!("tensor {}", reference.tensor),
            what,
        };
        let Some(tensor) = self.gguf.tensors().iter().position(|t| t.name == reference.tensor) else {
            return Err(format("is missing; the file is incomplete or of another architecture".into()));
        };
        let info = &self.gguf.tensors()[tensor];
        // A vector may be stored as [n] or as [n, 1]: count its elements as one row, or as rows where some are meant.
        let have = match (vector, &reference.rows) {
            (false, _) => (info.width(), info.rows()),
            (true, None) => (info.elements(), 1),
            (true, Some(_)) => (1, info.elements()),
        };
        let (unit, units) = if vector && reference.rows.is_some() { (1, width) } else { (width, rows) };
        let range = reference.rows.clone().unwrap_or(0..have.1);
        if have.0 != unit || range.len() != units || range.end > have.1 {
            return Err(format(format!(
                "has shape {:?} where [{width}, {rows}] is needed; the file's metadata and tensors disagree",
                info.shape
            )));
        }
        let row_bytes = info.dtype.row_bytes(unit).ok_or_else(|| {
            format(format!(
                "rows of {unit} elements are no multiple of the {} elements of a {} block",
                info.dtype.block_len(),
                info.dtype
            ))
        })?;
        Ok(Weight {
            name: reference.name(),
            dtype: info.dtype,
            width,
            rows,
            tensor,
            bytes: range.start * row_bytes..range.end * row_bytes,
            vector: None,
        })
    }

    fn tensor_data(&self, tensor: usize) -> &[u8] {
        self.gguf.data(&self.gguf.tensors()[tensor])
    }

    /// The id of a weight that the spec names.
    ///
    /// # Panics
    /// If `reference` is no part of the spec the table was made from: a mistake of the program, not of a file.
    pub(crate) fn id(&self, reference: &WeightRef) -> WeightId {
        self.ids[&reference.name()]
    }

    /// A weight.
    pub fn get(&self, id: WeightId) -> &Weight {
        &self.table[id.0 as usize]
    }

    /// A weight's bytes in the map: `rows` times the row bytes of its type.
    pub fn data(&self, id: WeightId) -> &[u8] {
        let weight = self.get(id);
        &self.tensor_data(weight.tensor)[weight.bytes.clone()]
    }

    /// Where a matrix lies: the tensor's name in the file, and which of its rows it is.
    pub fn source(&self, id: WeightId) -> (&str, Range<usize>) {
        let weight = self.get(id);
        let row_bytes = (weight.bytes.len() / weight.rows.max(1)).max(1);
        let first = weight.bytes.start / row_bytes;
        (&self.gguf.tensors()[weight.tensor].name, first..first + weight.rows)
    }

    /// Where a weight lies: the tensor's name in the file, and which of its elements, counted row by row, the weight is.
    pub fn elements(&self, id: WeightId) -> (&str, Range<usize>) {
        let weight = self.get(id);
        let info = &self.gguf.tensors()[weight.tensor];
        let at = |byte: usize| byte / info.dtype.block_bytes().max(1) * info.dtype.block_len();
        (&info.name, at(weight.bytes.start)..at(weight.bytes.end))
    }

    /// Some rows of a weight's bytes.
    pub fn rows(&self, id: WeightId, rows: Range<usize>) -> &[u8] {
        let (data, row_bytes) = (self.data(id), self.get(id).len_bytes() / self.get(id).rows);
        &data[rows.start * row_bytes..rows.end * row_bytes]
    }

    /// The files' bytes, of those that lie in pages of the system's.
    #[cfg(feature = "gpu")]
    pub(crate) fn files(&self) -> impl Iterator<Item = &[u8]> {
        self.gguf.pages()
    }

    /// All weights.
    pub fn iter(&self) -> impl Iterator<Item = (WeightId, &Weight)> {
        self.table.iter().enumerate().map(|(i, w)| (WeightId(i as u32), w))
    }
}
