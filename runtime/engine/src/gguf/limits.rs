//! How much of everything a header may ask for.
//!
//! Each limit is well above what real models use (in brackets, roughly what large ones come to) and low enough
//! that a hostile file can neither exhaust memory nor keep the reader busy. Beyond these, every count is also checked
//! against the bytes that are left before anything is allocated for it.

/// Bytes of the whole header: metadata and tensor table (16 MiB).
pub const MAX_HEADER_BYTES: usize = 128 << 20;
/// Entries of the metadata (about 60).
pub const MAX_KEYS: u64 = 1 << 16;
/// Bytes of a key; the specification's own limit (about 50).
pub const MAX_KEY_BYTES: u64 = (1 << 16) - 1;
/// Bytes of one string value (chat templates of about 20 KB).
pub const MAX_STRING_BYTES: u64 = 16 << 20;
/// Elements of one array (merges of about 500,000).
pub const MAX_ARRAY_LEN: u64 = 1 << 24;
/// Arrays within arrays; an array of numbers counts 1 (2).
pub const MAX_ARRAY_DEPTH: usize = 4;
/// Tensors of one file (about 2,000).
pub const MAX_TENSORS: u64 = 1 << 18;
/// Bytes of a tensor's name (ggml allows 63, but some converters write over 100).
pub const MAX_TENSOR_NAME_BYTES: u64 = 512;
/// Dimensions of a tensor; ggml's own limit.
pub const MAX_DIMS: u32 = 4;
/// The largest alignment of tensors, in bytes (32; a file made for mapping may use a page).
pub const MAX_ALIGNMENT: u64 = 1 << 24;
/// The smallest alignment of tensors, in bytes: the specification wants a multiple of 8.
pub const MIN_ALIGNMENT: u64 = 8;
/// Files of one model (about 50).
pub const MAX_SHARDS: u64 = 1024;
