//! What every block format has in common: fixed bytes, a length, a way to read it and a way to write it.
//!
//! A quantized row is a run of equal blocks. Blocks are declared as plain structs of byte arrays, so that their alignment
//! is 1 and a row can be viewed in place wherever it lies in the file map ([`blocks`]). Multi-byte numbers are
//! little-endian, as GGUF stores them; [`F16`] reads and writes the half-precision scales.
//!
//! Codes (the small integers) are packed in two or three fields per block, all of them instances of one pattern: `run`
//! consecutive bytes hold `8 / bits` runs of `run` elements, the first run in the lowest bits. [`unpack`] and [`pack`]
//! are that pattern, so a format says only which runs and bits it uses. The code here is the specification that the
//! vector kernels are tested against; speed is theirs.

use bytemuck::{Pod, Zeroable};

use super::DType;
use crate::{Error, Result};

/// A half-precision float as it lies in a block: two little-endian bytes, alignment 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct F16(pub [u8; 2]);

impl F16 {
    /// The largest finite number.
    pub const MAX: f32 = 65504.0;

    /// `value` rounded to the nearest half, ties to even; beyond 65,520 it becomes infinite.
    pub fn new(value: f32) -> F16 {
        F16(half::f16::from_f32(value).to_bits().to_le_bytes())
    }

    /// The number itself; exact.
    pub fn get(self) -> f32 {
        half::f16::from_bits(u16::from_le_bytes(self.0)).to_f32()
    }

    /// The 16 bits.
    pub fn to_bits(self) -> u16 {
        u16::from_le_bytes(self.0)
    }
}

/// How much each value of a block matters, for quantization with an importance matrix.
#[derive(Clone, Copy, Debug)]
pub struct Importance<'a> {
    /// One weight per value of the block, not negative: usually the mean square of the activation it multiplies.
    pub weights: &'a [f32],
    /// Mean of the squares of the whole row that the block belongs to.
    pub row_mean_square: f32,
}

/// One block of a tensor type: its layout, and the scalar reference that reads and writes it.
///
/// `decode` and `encode` take slices of exactly [`DType::block_len`] values. They do not panic on other lengths, but
/// what they then leave out is unspecified: the checked entry points are [`dequantize`](super::dequantize) and
/// [`quantize`](super::quantize).
pub trait Block: Pod {
    /// The tensor type these blocks make up.
    const DTYPE: DType;

    /// No value of greater magnitude can be held: the largest half times the largest integers of the format. Far beyond
    /// it the searches' sums overflow, so it is checked before their result is trusted.
    const LARGEST: f32 = f32::MAX;

    /// Writes the values of the block to `out`, bit for bit as ggml does.
    fn decode(&self, out: &mut [f32]);

    /// The block that stands for the finite values `x`; `importance` guides the search where the format has one.
    fn encode(x: &[f32], importance: Option<Importance<'_>>) -> Self;

    /// Whether every scale in the block is a finite number.
    fn is_finite(&self) -> bool;
}

/// Views `bytes` as blocks of type `B`, without copying and at any alignment.
///
/// # Errors
/// [`Error::Argument`] when `bytes` is no whole number of blocks.
pub fn blocks<B: Block>(bytes: &[u8]) -> Result<&[B]> {
    bytemuck::try_cast_slice(bytes).map_err(|_| {
        Error::argument(format!(
            "{} bytes are no whole number of {} blocks of {} bytes",
            bytes.len(),
            B::DTYPE,
            B::DTYPE.block_bytes()
        ))
    })
}

/// As [`blocks`], for writing.
///
/// # Errors
/// [`Error::Argument`] when `bytes` is no whole number of blocks.
pub fn blocks_mut<B: Block>(bytes: &mut [u8]) -> Result<&mut [B]> {
    let len = bytes.len();
    bytemuck::try_cast_slice_mut(bytes).map_err(|_| {
        Error::argument(format!(
            "{len} bytes are no whole number of {} blocks of {} bytes",
            B::DTYPE,
            B::DTYPE.block_bytes()
        ))
    })
}

/// ORs packed `bits`-wide fields into bit `at` of the codes. Every `run` bytes hold `8 / bits` runs of `run` codes: the
/// first run in the lowest bits, the next one above it.
pub(super) fn unpack(packed: &[u8], bits: usize, run: usize, at: usize, codes: &mut [u8]) {
    let mask = (1u8 << bits) - 1;
    for (bytes, codes) in packed.chunks_exact(run).zip(codes.chunks_exact_mut(run * 8 / bits)) {
        for (field, codes) in codes.chunks_exact_mut(run).enumerate() {
            for (code, byte) in codes.iter_mut().zip(bytes) {
                *code |= ((byte >> (field * bits)) & mask) << at;
            }
        }
    }
}

/// The inverse of [`unpack`]: ORs the `bits` bits from bit `at` of every code into `packed`, which starts as zeros.
pub(super) fn pack(codes: &[u8], bits: usize, run: usize, at: usize, packed: &mut [u8]) {
    let mask = (1u8 << bits) - 1;
    for (bytes, codes) in packed.chunks_exact_mut(run).zip(codes.chunks_exact(run * 8 / bits)) {
        for (field, codes) in codes.chunks_exact(run).enumerate() {
            for (code, byte) in codes.iter().zip(bytes.iter_mut()) {
                *byte |= ((code >> at) & mask) << (field * bits);
            }
        }
    }
}

/// Declares a block struct with its traits and checks its size against the table of types.
macro_rules! block_struct {
    ($(#[$doc:meta])* $name:ident: $dtype:ident { $($(#[$field_doc:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(C)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $ty,)*
        }
        const _: () = assert!(size_of::<$name>() == crate::quant::DType::$dtype.block_bytes());
        const _: () = assert!(align_of::<$name>() == 1);
    };
}
pub(super) use block_struct;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_is_inverse_and_places_the_first_run_lowest() {
        let codes: Vec<u8> = (0..64).map(|i| (i * 7 % 16) as u8).collect();
        let mut packed = [0u8; 32];
        pack(&codes, 4, 16, 0, &mut packed);
        assert_eq!(packed[0], codes[0] | codes[16] << 4);
        assert_eq!(packed[16], codes[32] | codes[48] << 4);
        let mut back = [0u8; 64];
        unpack(&packed, 4, 16, 0, &mut back);
        assert_eq!(&back[..], &codes[..]);
    }

    #[test]
    fn single_bits_of_runs_of_one_are_the_bits_of_a_word() {
        let mut codes = [0u8; 32];
        unpack(&0x8000_0401u32.to_le_bytes(), 1, 1, 4, &mut codes);
        let set: Vec<usize> = (0..32).filter(|&i| codes[i] == 16).collect();
        assert_eq!(set, [0, 10, 31]);
    }
}
