//! Which model an adapter was trained on, told in milliseconds; and which adapter it is.
//!
//! Hashing gigabytes of weights would make opening an adapter slow, so the fingerprint is the SHA-256 of the tensor table
//! with samples of the data: for every tensor, in the table's order, its name (with its length before it), its type's
//! ggml number, its shape, and [`SAMPLES`] pieces of up to [`SAMPLE_BYTES`] bytes, spread evenly from its first byte to
//! its last. Numbers are 64-bit little-endian. Two fine-tunes of one model differ nearly everywhere and so in the
//! samples; metadata, and how a model is split into files, do not count.

use std::fmt::Write;

use sha2::{Digest, Sha256};

use super::Adapter;
use crate::gguf::Gguf;

/// Pieces of each tensor that are hashed.
const SAMPLES: usize = 8;
/// Bytes of a piece.
const SAMPLE_BYTES: usize = 64;

/// The fingerprint of a model: 64 hexadecimal digits.
pub fn fingerprint(model: &Gguf) -> String {
    let mut hash = Sha256::new();
    hash.update(b"kinglet fingerprint 1");
    for tensor in model.tensors() {
        let number = |n: u64| n.to_le_bytes();
        hash.update(number(tensor.name.len() as u64));
        hash.update(tensor.name.as_bytes());
        hash.update(number(tensor.dtype.ggml().into()));
        hash.update(number(tensor.shape.len() as u64));
        tensor.shape.iter().for_each(|n| hash.update(number(*n)));
        let data = model.data(tensor);
        let size = SAMPLE_BYTES.min(data.len());
        let last = data.len() - size;
        for i in 0..SAMPLES {
            let start = (last as u128 * i as u128 / (SAMPLES - 1) as u128) as usize;
            hash.update(data.get(start..start + size).unwrap_or_default());
        }
    }
    hex(hash)
}

/// What tells adapters apart: the SHA-256 of all that they do to a model, 64 hexadecimal digits. Names do not count.
pub fn identity(adapter: &Adapter) -> String {
    let mut hash = Sha256::new();
    hash.update(b"kinglet adapter 1");
    hash.update(adapter.alpha.to_le_bytes());
    hash.update([u8::from(adapter.rslora)]);
    for (name, entry) in &adapter.entries {
        for n in [name.len(), entry.rank, entry.inputs, entry.outputs, usize::from(entry.magnitude.is_some())] {
            hash.update((n as u64).to_le_bytes());
        }
        hash.update(name.as_bytes());
        for values in [Some(&entry.a), Some(&entry.b), entry.magnitude.as_ref()].into_iter().flatten() {
            values.iter().for_each(|v| hash.update(v.to_le_bytes()));
        }
    }
    hex(hash)
}

fn hex(hash: Sha256) -> String {
    let mut text = String::with_capacity(64);
    for byte in hash.finalize() {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}
