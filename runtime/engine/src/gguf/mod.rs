//! Model files: the GGUF container, read in place and written atomically.
//!
//! A GGUF file is a header (typed metadata, then a table of tensors) followed by the tensors' bytes, each at a multiple
//! of `general.alignment` from the start of the data section. [`Gguf`] maps the file, reads the header into memory and
//! hands out slices of the map: a weight is never copied. Large models come in several files (shards); they are opened
//! together and look like one.
//!
//! | file | what is in it |
//! | --- | --- |
//! | `map` | where the bytes are: the map of a file, a copy, the caller's memory |
//! | `pages` | large pages of a map; here and in `map` only is there `unsafe` |
//! | `limits` | how much of everything a header may ask for |
//! | `value`, `metadata` | typed values and the ordered table of them |
//! | `tensor` | the tensor table's entries |
//! | `reader` | header bytes → metadata and tensors, with every check |
//! | `split` | models in several files |
//! | `validate` | NaN and infinity among the block scales |
//! | `writer` | metadata and tensors → a file, streaming, atomically |
//!
//! The file is untrusted: whatever its bytes, opening it gives a model or an [`Error::Format`](crate::Error::Format)
//! that names the offset, key or tensor, and memory use is bounded by the header's size.
//! Specification: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

#[cfg(target_endian = "big")]
compile_error!("Kinglet reads little-endian weights in place and so runs on little-endian machines only");

pub mod limits;
mod map;
mod metadata;
mod model;
#[cfg(target_os = "linux")]
mod pages;
mod reader;
mod split;
mod tensor;
mod validate;
mod value;
mod writer;

#[cfg(test)]
mod tests;

pub use metadata::Metadata;
pub use model::{Gguf, OpenOptions, SharedBytes};
pub use tensor::TensorInfo;
pub use value::{Array, Value, ValueType};
pub use writer::{TensorWriter, Writer};

/// The key that says to which multiple tensors are aligned.
pub const KEY_ALIGNMENT: &str = "general.alignment";

/// Alignment of tensors where the file does not say, in bytes.
pub const DEFAULT_ALIGNMENT: usize = 32;

/// The first four bytes of every file.
pub const MAGIC: [u8; 4] = *b"GGUF";

/// `n` rounded up to a multiple of `alignment` (a power of two), or `None` where that overflows.
fn align_up(n: usize, alignment: usize) -> Option<usize> {
    n.checked_next_multiple_of(alignment)
}
