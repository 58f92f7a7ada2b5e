//! An entry of the tensor table.
//!
//! The shape is in GGUF order: `shape[0]` runs fastest, so a linear map from `n` inputs to `m` outputs has the shape
//! `[n, m]` and lies in memory as `m` rows of `n` elements, each row a whole number of blocks. The reader has checked
//! all of it: the products fit `usize`, the bytes lie within the file, no two tensors overlap.

use crate::quant::DType;

/// Name, type, shape and place of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The tensor's name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// The elements' type.
    pub dtype: DType,
    /// Elements along each dimension, the fastest first; one to four of them, none 0.
    pub shape: Vec<u64>,
    /// Which of the model's files.
    pub(super) shard: usize,
    /// First byte, from the start of that file.
    pub(super) start: usize,
    /// Number of bytes.
    pub(super) bytes: usize,
}

impl TensorInfo {
    /// Bytes of the whole tensor.
    pub fn len_bytes(&self) -> usize {
        self.bytes
    }

    /// Elements of a row: `shape[0]`.
    pub fn width(&self) -> usize {
        self.shape.first().map_or(1, |&n| n as usize)
    }

    /// Rows: the product of all dimensions but the first.
    pub fn rows(&self) -> usize {
        self.shape.iter().skip(1).fold(1usize, |a, &n| a.saturating_mul(n as usize))
    }

    /// Elements of the whole tensor.
    pub fn elements(&self) -> usize {
        self.width().saturating_mul(self.rows())
    }

    /// Which of the model's files holds the tensor, from 0.
    pub fn shard(&self) -> usize {
        self.shard
    }

    /// The tensor's first byte, from the start of its file.
    pub fn offset(&self) -> usize {
        self.start
    }
}

/// Bytes of a tensor of this type and shape, or what is wrong with the shape.
pub(super) fn size_of(dtype: DType, shape: &[u64]) -> Result<usize, String> {
    let too_large = || format!("its shape {shape:?} has more elements than can be addressed; the file is corrupt");
    let Some((&width, rest)) = shape.split_first() else {
        return Err("it has no dimensions; a single number is written with the shape [1]".into());
    };
    if shape.contains(&0) {
        return Err(format!("its shape {shape:?} has a dimension of 0; leave empty tensors out"));
    }
    let width = usize::try_from(width).map_err(|_| too_large())?;
    let row = dtype.row_bytes(width).ok_or_else(|| {
        format!(
            "its rows of {width} elements are no whole number of {dtype} blocks of {}; quantize this tensor to another type",
            dtype.block_len()
        )
    })?;
    let mut elements = width;
    let mut bytes = row;
    for &n in rest {
        let n = usize::try_from(n).map_err(|_| too_large())?;
        elements = elements.checked_mul(n).ok_or_else(too_large)?;
        bytes = bytes.checked_mul(n).ok_or_else(too_large)?;
    }
    // Element counts and byte offsets must stay exact in signed arithmetic too: slices are limited to `isize::MAX`.
    if elements > isize::MAX as usize || bytes > isize::MAX as usize {
        return Err(too_large());
    }
    Ok(bytes)
}
