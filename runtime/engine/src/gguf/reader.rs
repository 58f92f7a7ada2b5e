//! From the bytes of one file to its header: metadata and tensor table.
//!
//! Layout (all numbers little-endian; a string is a `u64` length and that many bytes of UTF-8):
//!
//! ```text
//! "GGUF"  u32 version  u64 tensors  u64 keys
//! keys × { string key, u32 type, value }          array: u32 element type, u64 length, elements
//! tensors × { string name, u32 dims, dims × u64, u32 type, u64 offset }
//! padding to general.alignment, then the data section, to which the offsets are relative
//! ```
//!
//! Versions 2 and 3 have this layout. Every number is checked before it is used: counts against [`limits`] and against
//! the bytes that are left, offsets against the file, shapes against the blocks of their type, tensors against each
//! other. Called by `model` only.

use std::collections::HashSet;

use super::limits::*;
use super::metadata::Metadata;
use super::tensor::{TensorInfo, size_of};
use super::value::{Array, Value, ValueType};
use super::{DEFAULT_ALIGNMENT, KEY_ALIGNMENT, MAGIC, align_up};
use crate::quant::DType;
use crate::{Error, Result};

/// What the header of one file says.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) alignment: usize,
    pub(super) metadata: Metadata,
    /// In the file's order, all with shard 0.
    pub(super) tensors: Vec<TensorInfo>,
}

/// Reads the header of `bytes`; `file` is the name for messages.
pub(super) fn read_header(bytes: &[u8], file: &str) -> Result<Header> {
    let mut r = Reader { bytes, at: 0, file, inside: String::new() };
    let version = r.version()?;
    let tensor_count = r.count("tensors", MAX_TENSORS, 24)?;
    let key_count = r.count("metadata keys", MAX_KEYS, 13)?;

    let mut metadata = Metadata::new(file);
    for _ in 0..key_count {
        let at = r.at;
        let key = r.string("a metadata key", MAX_KEY_BYTES)?;
        if key.is_empty() {
            return Err(r.fail_at(at, "a metadata key is empty; convert the model again"));
        }
        if metadata.contains(key) {
            return Err(metadata.error(key, format!("is there twice (again at byte {at}); convert the model again")));
        }
        r.inside = format!(" (key {key})");
        let value = r.value()?;
        metadata.set(key, value);
        r.inside.clear();
    }
    let alignment = alignment(&metadata)?;

    let mut table = Vec::with_capacity(tensor_count);
    let mut names = HashSet::with_capacity(tensor_count);
    for _ in 0..tensor_count {
        let entry = r.tensor()?;
        if !names.insert(entry.name) {
            return Err(r.fail_tensor(entry.name, "is there twice; convert the model again"));
        }
        r.inside.clear();
        table.push(entry);
    }

    let data_start =
        align_up(r.at, alignment).ok_or_else(|| r.fail("the data section starts beyond what can be addressed"))?;
    let tensors = place(&r, table, data_start, alignment)?;
    Ok(Header { version, alignment, metadata, tensors })
}

/// `general.alignment`, checked.
fn alignment(metadata: &Metadata) -> Result<usize> {
    let Some(wanted) = metadata.opt_u64(KEY_ALIGNMENT)? else { return Ok(DEFAULT_ALIGNMENT) };
    if !wanted.is_power_of_two() || !(MIN_ALIGNMENT..=MAX_ALIGNMENT).contains(&wanted) {
        return Err(metadata.error(
            KEY_ALIGNMENT,
            format!(
                "is {wanted}, but a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT} is needed; convert the model again"
            ),
        ));
    }
    usize::try_from(wanted).map_err(|_| metadata.error(KEY_ALIGNMENT, "is more than can be addressed"))
}

/// A tensor as the table states it.
struct Entry<'a> {
    name: &'a str,
    dtype: DType,
    shape: Vec<u64>,
    bytes: usize,
    offset: u64,
}

/// Turns offsets into places in the file, and checks that tensors are aligned, lie within the file and do not overlap.
fn place(r: &Reader<'_>, table: Vec<Entry<'_>>, data_start: usize, alignment: usize) -> Result<Vec<TensorInfo>> {
    let mut tensors = Vec::with_capacity(table.len());
    for entry in table {
        let Entry { name, dtype, shape, bytes, offset } = entry;
        if offset.checked_rem(alignment as u64) != Some(0) {
            return Err(r.fail_tensor(
                name,
                format!("its offset {offset} is no multiple of the alignment {alignment}; convert the model again"),
            ));
        }
        let range = usize::try_from(offset)
            .ok()
            .and_then(|offset| data_start.checked_add(offset))
            .and_then(|start| start.checked_add(bytes).map(|end| (start, end)));
        let Some((start, _)) = range.filter(|&(_, end)| end <= r.bytes.len()) else {
            return Err(r.fail_tensor(
                name,
                format!(
                    "its {bytes} bytes at offset {offset} of the data section (which starts at byte {data_start}) end \
                     beyond the file of {} bytes; the file is cut short: download it again",
                    r.bytes.len()
                ),
            ));
        };
        tensors.push(TensorInfo { name: name.into(), dtype, shape, shard: 0, start, bytes });
    }

    let mut by_place: Vec<&TensorInfo> = tensors.iter().collect();
    by_place.sort_by_key(|t| t.start);
    for (a, b) in by_place.iter().zip(by_place.iter().skip(1)) {
        // Both ends lie within the file, so this sum has been made before.
        if a.start.saturating_add(a.bytes) > b.start {
            return Err(r.fail_tensor(
                &b.name,
                format!("its bytes at {} overlap those of {}; convert the model again", b.start, a.name),
            ));
        }
    }
    Ok(tensors)
}

/// A cursor over the header.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    file: &'a str,
    /// What is being read, for messages: empty, or ` (key …)`, or ` (tensor …)`.
    inside: String,
}

impl<'a> Reader<'a> {
    fn fail_at(&self, at: usize, what: impl Into<String>) -> Error {
        Error::Format { file: self.file.into(), at: format!("byte {at}{}", self.inside), what: what.into() }
    }

    fn fail(&self, what: impl Into<String>) -> Error {
        self.fail_at(self.at, what)
    }

    fn fail_tensor(&self, name: &str, what: impl Into<String>) -> Error {
        Error::Format { file: self.file.into(), at: format!("tensor {name}"), what: what.into() }
    }

    /// The next `n` bytes.
    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.bytes.len());
        let Some((end, bytes)) = end.and_then(|end| self.bytes.get(self.at..end).map(|b| (end, b))) else {
            return Err(self.fail(format!(
                "{what} takes {n} bytes but the file ends at byte {}; it is cut short: download it again",
                self.bytes.len()
            )));
        };
        if end > MAX_HEADER_BYTES {
            return Err(self.fail(format!("the header is longer than {MAX_HEADER_BYTES} bytes; the file is corrupt")));
        }
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let bytes = self.take(N, what)?;
        bytes.try_into().map_err(|_| self.fail("short read"))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of things that take at least `min_bytes` each, checked against `limit` and the bytes that are left.
    fn count(&mut self, what: &str, limit: u64, min_bytes: usize) -> Result<usize> {
        let at = self.at;
        let n = self.u64(&format!("the number of {what}"))?;
        if n > limit {
            return Err(self.fail_at(at, format!("{n} {what} are more than the limit of {limit}; the file is corrupt")));
        }
        let left = self.bytes.len().saturating_sub(self.at);
        match usize::try_from(n).ok().filter(|n| n.checked_mul(min_bytes).is_some_and(|need| need <= left)) {
            Some(n) => Ok(n),
            None => Err(self.fail_at(
                at,
                format!("{n} {what} do not fit the {left} bytes that are left; the file is cut short or corrupt: download it again"),
            )),
        }
    }

    fn string(&mut self, what: &str, limit: u64) -> Result<&'a str> {
        let at = self.at;
        let n = self.u64(&format!("the length of {what}"))?;
        if n > limit {
            return Err(self
                .fail_at(at, format!("{what} of {n} bytes is longer than the limit of {limit}; the file is corrupt")));
        }
        let start = self.at;
        let bytes = self.take(usize::try_from(n).unwrap_or(usize::MAX), what)?;
        std::str::from_utf8(bytes).map_err(|e| {
            let bad = start.saturating_add(e.valid_up_to());
            self.fail_at(bad, format!("{what} is not valid UTF-8; convert the model again"))
        })
    }

    /// Magic and version.
    fn version(&mut self) -> Result<u32> {
        let magic: [u8; 4] = self.array("the magic number")?;
        if magic != MAGIC {
            let hint = match &magic {
                b"ggml" | b"lmgg" | b"fmgg" | b"tjgg" | b"ggjt" | b"ggmf" => "a GGML file from before GGUF",
                [b'P', b'K', ..] => "a ZIP or PyTorch file",
                [b'<', ..] => "a web page, perhaps an error of the download",
                b"vers" => "a Git LFS pointer, not the file it points to",
                _ => "no GGUF file",
            };
            return Err(self.fail_at(0, format!("this is {hint}; give a .gguf file, or convert the model to one")));
        }
        let at = self.at;
        let version = self.u32("the version")?;
        match version {
            2 | 3 => Ok(version),
            1 => Err(self.fail_at(at, "version 1 of GGUF is not read; convert the model again with a current converter")),
            v if matches!(v.swap_bytes(), 1..=3) => Err(self.fail_at(
                at,
                "this file is big-endian, only little-endian files are read; convert it with gguf_convert_endian.py of llama.cpp",
            )),
            v => Err(self.fail_at(at, format!("version {v} of GGUF is not known (2 and 3 are); update Kinglet"))),
        }
    }

    fn value_type(&mut self) -> Result<ValueType> {
        let at = self.at;
        let id = self.u32("a value type")?;
        ValueType::from_id(id)
            .ok_or_else(|| self.fail_at(at, format!("{id} is no value type (0 to 12 are); the file is corrupt")))
    }

    fn bool(&mut self) -> Result<bool> {
        let at = self.at;
        match self.array("a boolean")? {
            [0] => Ok(false),
            [1] => Ok(true),
            [b] => Err(self.fail_at(at, format!("{b} is no boolean (0 or 1 is); the file is corrupt"))),
        }
    }

    fn value(&mut self) -> Result<Value> {
        Ok(match self.value_type()? {
            ValueType::U8 => Value::U8(u8::from_le_bytes(self.array("a u8")?)),
            ValueType::I8 => Value::I8(i8::from_le_bytes(self.array("an i8")?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(self.array("a u16")?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(self.array("an i16")?)),
            ValueType::U32 => Value::U32(u32::from_le_bytes(self.array("a u32")?)),
            ValueType::I32 => Value::I32(i32::from_le_bytes(self.array("an i32")?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.array("an f32")?)),
            ValueType::U64 => Value::U64(u64::from_le_bytes(self.array("a u64")?)),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.array("an i64")?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.array("an f64")?)),
            ValueType::Bool => Value::Bool(self.bool()?),
            ValueType::String => Value::String(self.string("a string", MAX_STRING_BYTES)?.into()),
            ValueType::Array => Value::Array(self.array_value(1)?),
        })
    }

    /// An array at nesting level `depth`, from its element type on.
    fn array_value(&mut self, depth: usize) -> Result<Array> {
        if depth > MAX_ARRAY_DEPTH {
            return Err(self.fail(format!("arrays are nested more than {MAX_ARRAY_DEPTH} deep; the file is corrupt")));
        }
        let element = self.value_type()?;
        let n = self.count("array elements", MAX_ARRAY_LEN, element.min_bytes())?;
        Ok(match element {
            ValueType::U8 => Array::U8(self.numbers(n, u8::from_le_bytes)?),
            ValueType::I8 => Array::I8(self.numbers(n, i8::from_le_bytes)?),
            ValueType::U16 => Array::U16(self.numbers(n, u16::from_le_bytes)?),
            ValueType::I16 => Array::I16(self.numbers(n, i16::from_le_bytes)?),
            ValueType::U32 => Array::U32(self.numbers(n, u32::from_le_bytes)?),
            ValueType::I32 => Array::I32(self.numbers(n, i32::from_le_bytes)?),
            ValueType::F32 => Array::F32(self.numbers(n, f32::from_le_bytes)?),
            ValueType::U64 => Array::U64(self.numbers(n, u64::from_le_bytes)?),
            ValueType::I64 => Array::I64(self.numbers(n, i64::from_le_bytes)?),
            ValueType::F64 => Array::F64(self.numbers(n, f64::from_le_bytes)?),
            ValueType::Bool => Array::Bool((0..n).map(|_| self.bool()).collect::<Result<_>>()?),
            ValueType::String => Array::String(self.strings(n)?),
            ValueType::Array => {
                let deeper = depth.saturating_add(1);
                Array::Array((0..n).map(|_| self.array_value(deeper)).collect::<Result<_>>()?)
            }
        })
    }

    fn strings(&mut self, n: usize) -> Result<Vec<String>> {
        let mut strings = Vec::with_capacity(n);
        for _ in 0..n {
            strings.push(self.string("a string", MAX_STRING_BYTES)?.into());
        }
        Ok(strings)
    }

    fn numbers<T, const N: usize>(&mut self, n: usize, decode: fn([u8; N]) -> T) -> Result<Vec<T>> {
        let bytes = self.take(n.saturating_mul(N), "an array")?;
        let (numbers, _) = bytes.as_chunks::<N>();
        Ok(numbers.iter().map(|&b| decode(b)).collect())
    }

    fn tensor(&mut self) -> Result<Entry<'a>> {
        let at = self.at;
        let name = self.string("a tensor's name", MAX_TENSOR_NAME_BYTES)?;
        if name.is_empty() {
            return Err(self.fail_at(at, "a tensor has no name; convert the model again"));
        }
        self.inside = format!(" (tensor {name})");
        let at = self.at;
        let dims = self.u32("the number of dimensions")?;
        if dims > MAX_DIMS {
            return Err(self.fail_at(at, format!("{dims} dimensions are more than {MAX_DIMS}; the file is corrupt")));
        }
        let shape = (0..dims).map(|_| self.u64("a dimension")).collect::<Result<Vec<u64>>>()?;
        let at = self.at;
        let id = self.u32("the tensor's type")?;
        let offset = self.u64("the tensor's offset")?;
        let dtype = match (DType::from_ggml(id), foreign_type(id)) {
            (Some(dtype), _) => dtype,
            (None, Some(known)) => {
                return Err(Error::Unsupported(format!(
                    "{}: tensor {name} has the type {known}; take the model in one of: {}",
                    self.file,
                    DType::WEIGHTS.map(DType::name).join(", ")
                )));
            }
            (None, None) => {
                return Err(
                    self.fail_at(at, format!("{id} is no known tensor type; the file is corrupt, or update Kinglet"))
                );
            }
        };
        let bytes = size_of(dtype, &shape).map_err(|what| self.fail_tensor(name, what))?;
        Ok(Entry { name, dtype, shape, bytes, offset })
    }
}

/// ggml's types that Kinglet does not read: a clear message is better than "unknown".
fn foreign_type(id: u32) -> Option<&'static str> {
    Some(match id {
        4 | 5 => "Q4_2 or Q4_3 (withdrawn from ggml)",
        9 => "Q8_1",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        29 => "IQ1_M",
        31..=33 => "Q4_0 repacked for ARM (withdrawn from ggml)",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36..=38 => "IQ4_NL repacked (withdrawn from ggml)",
        _ => return None,
    })
}
