//! Writing a model file: streaming, and whole or not at all.
//!
//! [`Writer`] collects the metadata and the table of tensors; nothing touches the disk. [`Writer::create`] writes the
//! header to a temporary file beside the target, the tensors' bytes then stream into it in the table's order, and
//! [`TensorWriter::finish`] syncs it to the disk and renames it over the target. Whoever has the old file mapped keeps
//! the old one; after a crash there is the old file or the new one, never half of either.
//!
//! Tensors are laid out as every GGUF writer does it: each padded with zeros to the alignment, the last one too. So a
//! file that was laid out this way and is copied through [`Writer::like`] comes out byte for byte the same.

use std::collections::HashSet;
use std::path::Path;

use super::limits::*;
use super::metadata::Metadata;
use super::model::Gguf;
use super::tensor::size_of;
use super::value::{Array, Value};
use super::{DEFAULT_ALIGNMENT, KEY_ALIGNMENT, MAGIC, align_up};
use crate::file::NewFile;
use crate::quant::DType;
use crate::{Error, Result};

/// A tensor to be written.
#[derive(Clone, Debug)]
struct Planned {
    name: String,
    dtype: DType,
    shape: Vec<u64>,
    bytes: usize,
}

/// The header of a file to be written.
///
/// ```no_run
/// # use kinglet_engine::{gguf::Writer, quant::DType};
/// let mut writer = Writer::new();
/// writer.set("general.architecture", "llama");
/// writer.tensor("output_norm.weight", DType::F32, &[64])?;
/// let mut file = writer.create("model.gguf")?;
/// file.write("output_norm.weight", &[0; 256])?;
/// file.finish()?;
/// # Ok::<(), kinglet_engine::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Writer {
    version: u32,
    metadata: Metadata,
    tensors: Vec<Planned>,
    names: HashSet<String>,
}

impl Default for Writer {
    fn default() -> Writer {
        Writer::new()
    }
}

impl Writer {
    /// An empty header of version 3.
    pub fn new() -> Writer {
        Writer { version: 3, metadata: Metadata::default(), tensors: Vec::new(), names: HashSet::new() }
    }

    /// The header of `model`: its version, metadata and tensor table, in its order. Of a model in several files it makes
    /// one, without the `split.*` keys.
    pub fn like(model: &Gguf) -> Writer {
        let mut metadata = model.metadata().clone();
        if model.shards() > 1 {
            for key in ["split.no", "split.count", "split.tensors.count"] {
                metadata.remove(key);
            }
        }
        let planned = |t: &super::TensorInfo| Planned {
            name: t.name.clone(),
            dtype: t.dtype,
            shape: t.shape.clone(),
            bytes: t.len_bytes(),
        };
        Writer {
            version: model.version(),
            metadata,
            tensors: model.tensors().iter().map(planned).collect(),
            names: model.tensors().iter().map(|t| t.name.clone()).collect(),
        }
    }

    /// Puts `value` under `key`: in place where the key is there already, else at the end.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Writer {
        self.metadata.set(key, value);
        self
    }

    /// The metadata to be written.
    pub fn metadata_mut(&mut self) -> &mut Metadata {
        &mut self.metadata
    }

    /// Adds a tensor to the table; `shape` in GGUF order, the fastest dimension first.
    ///
    /// # Errors
    /// [`Error::Argument`] where the name is taken, empty or too long, or the rows are no whole number of blocks.
    pub fn tensor(&mut self, name: &str, dtype: DType, shape: &[u64]) -> Result<&mut Writer> {
        let fail = |what: String| Error::argument(format!("tensor {name:?}: {what}"));
        if name.is_empty() || name.len() as u64 > MAX_TENSOR_NAME_BYTES {
            return Err(fail(format!("a name of 1 to {MAX_TENSOR_NAME_BYTES} bytes is needed")));
        }
        if shape.len() as u64 > u64::from(MAX_DIMS) {
            return Err(fail(format!("at most {MAX_DIMS} dimensions can be written, not {}", shape.len())));
        }
        if self.tensors.len() as u64 >= MAX_TENSORS {
            return Err(fail(format!("at most {MAX_TENSORS} tensors can be written")));
        }
        let bytes = size_of(dtype, shape).map_err(fail)?;
        if !self.names.insert(name.into()) {
            return Err(fail("this name is taken already".into()));
        }
        self.tensors.push(Planned { name: name.into(), dtype, shape: shape.into(), bytes });
        Ok(self)
    }

    /// Starts the file: writes the header to a temporary file beside `path`. The tensors' bytes follow.
    ///
    /// # Errors
    /// [`Error::Argument`] where the header could not be read back (limits, alignment), [`Error::Io`].
    pub fn create(&self, path: impl AsRef<Path>) -> Result<TensorWriter> {
        let alignment = self.alignment()?;
        let header = self.header(alignment)?;
        let mut out = TensorWriter {
            file: NewFile::create(path)?,
            tensors: self.tensors.clone(),
            alignment,
            next: 0,
            written: 0,
            position: 0,
        };
        out.put(&header)?;
        out.pad()?;
        Ok(out)
    }

    fn alignment(&self) -> Result<usize> {
        match self.metadata.opt_u64(KEY_ALIGNMENT)? {
            None => Ok(DEFAULT_ALIGNMENT),
            Some(n) if n.is_power_of_two() && (MIN_ALIGNMENT..=MAX_ALIGNMENT).contains(&n) => Ok(n as usize),
            Some(n) => Err(Error::argument(format!(
                "{KEY_ALIGNMENT} is {n}, but a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT} is needed"
            ))),
        }
    }

    fn header(&self, alignment: usize) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        out.extend(MAGIC);
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        if self.metadata.len() as u64 > MAX_KEYS {
            return Err(Error::argument(format!("at most {MAX_KEYS} metadata keys can be written")));
        }
        for (key, value) in self.metadata.iter() {
            if key.is_empty() || key.len() as u64 > MAX_KEY_BYTES {
                return Err(Error::argument(format!("key {key:?}: a key of 1 to {MAX_KEY_BYTES} bytes is needed")));
            }
            put_string(&mut out, key);
            out.extend(value.value_type().id().to_le_bytes());
            put_value(&mut out, value).map_err(|what| Error::argument(format!("key {key}: {what}")))?;
        }
        let mut offset = 0usize;
        for t in &self.tensors {
            put_string(&mut out, &t.name);
            out.extend((t.shape.len() as u32).to_le_bytes());
            for n in &t.shape {
                out.extend(n.to_le_bytes());
            }
            out.extend(t.dtype.ggml().to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset = offset.checked_add(t.bytes).and_then(|end| align_up(end, alignment)).ok_or_else(|| {
                Error::argument(format!("tensor {}: the tensors together are more than can be addressed", t.name))
            })?;
        }
        if out.len() > MAX_HEADER_BYTES {
            return Err(Error::argument(format!(
                "the header comes to {} bytes, more than the limit of {MAX_HEADER_BYTES}",
                out.len()
            )));
        }
        Ok(out)
    }
}

fn put_string(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) -> Result<(), String> {
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => put_long_string(out, v)?,
        Value::Array(v) => put_array(out, v, 1)?,
    }
    Ok(())
}

fn put_long_string(out: &mut Vec<u8>, s: &str) -> Result<(), String> {
    if s.len() as u64 > MAX_STRING_BYTES {
        return Err(format!("a string of {} bytes is longer than the limit of {MAX_STRING_BYTES}", s.len()));
    }
    put_string(out, s);
    Ok(())
}

fn put_array(out: &mut Vec<u8>, array: &Array, depth: usize) -> Result<(), String> {
    if depth > MAX_ARRAY_DEPTH {
        return Err(format!("arrays are nested more than {MAX_ARRAY_DEPTH} deep"));
    }
    if array.len() as u64 > MAX_ARRAY_LEN {
        return Err(format!("an array of {} elements is longer than the limit of {MAX_ARRAY_LEN}", array.len()));
    }
    out.extend(array.element_type().id().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(v) => out.extend(v),
        Array::I8(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::U16(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::I16(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::U32(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::I32(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::F32(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::U64(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::I64(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::F64(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::Bool(v) => out.extend(v.iter().map(|&x| u8::from(x))),
        Array::String(v) => v.iter().try_for_each(|s| put_long_string(out, s))?,
        Array::Array(v) => v.iter().try_for_each(|a| put_array(out, a, depth.saturating_add(1)))?,
    }
    Ok(())
}

/// A file under way: takes the tensors' bytes in the table's order. Dropped before [`finish`](TensorWriter::finish), it
/// leaves nothing behind.
#[derive(Debug)]
pub struct TensorWriter {
    file: NewFile,
    tensors: Vec<Planned>,
    alignment: usize,
    /// The tensor that is being written.
    next: usize,
    /// Its bytes so far.
    written: usize,
    /// Bytes of the file so far.
    position: u64,
}

impl TensorWriter {
    /// Appends bytes of tensor `name`: all of them, or a piece at a time.
    ///
    /// # Errors
    /// [`Error::Argument`] where another tensor comes next or the tensor has fewer bytes, [`Error::Io`].
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(t) = self.tensors.get(self.next) else {
            return Err(Error::argument(format!("tensor {name:?}: all tensors of the table have been written")));
        };
        if t.name != name {
            return Err(Error::argument(format!(
                "tensor {name:?}: {:?} comes first, with {} of {} bytes to be written",
                t.name,
                t.bytes.saturating_sub(self.written),
                t.bytes
            )));
        }
        let written = self.written.saturating_add(bytes.len());
        if written > t.bytes {
            return Err(Error::argument(format!(
                "tensor {name:?}: {written} bytes are given, but {} with the shape {:?} has {}",
                t.dtype, t.shape, t.bytes
            )));
        }
        let complete = written == t.bytes;
        self.put(bytes)?;
        self.written = written;
        if complete {
            self.pad()?;
            self.written = 0;
            self.next = self.next.saturating_add(1);
        }
        Ok(())
    }

    /// Syncs the file to the disk, puts it in the target's place and returns its size in bytes.
    ///
    /// # Errors
    /// [`Error::Argument`] where tensors are missing, [`Error::Io`]; the target is then as it was.
    pub fn finish(self) -> Result<u64> {
        if let Some(t) = self.tensors.get(self.next) {
            return Err(Error::argument(format!(
                "tensor {:?}: {} of {} bytes have not been written",
                t.name,
                t.bytes.saturating_sub(self.written),
                t.bytes
            )));
        }
        self.file.finish()?;
        Ok(self.position)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write(bytes)?;
        self.position = self.position.saturating_add(bytes.len() as u64);
        Ok(())
    }

    /// Zeros up to the alignment.
    fn pad(&mut self) -> Result<()> {
        let end = self.position.checked_next_multiple_of(self.alignment as u64).unwrap_or(self.position);
        let zeros = usize::try_from(end.saturating_sub(self.position)).unwrap_or(0);
        self.put(&vec![0; zeros])
    }
}
