//! Types without a scale: every element is a block of one. `F32`, `F16` and `BF16` are what norms, biases and
//! unquantized models use; rounding is to nearest, ties to even.

use bytemuck::{Pod, Zeroable};

use super::DType;
use super::block::{Block, F16, Importance};

/// A single-precision float: four little-endian bytes, alignment 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct F32(pub [u8; 4]);

impl F32 {
    /// The bytes of `value`.
    pub fn new(value: f32) -> F32 {
        F32(value.to_le_bytes())
    }

    /// The number itself.
    pub fn get(self) -> f32 {
        f32::from_le_bytes(self.0)
    }
}

/// A bfloat16: the upper half of a single-precision float, two little-endian bytes, alignment 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct BF16(pub [u8; 2]);

impl BF16 {
    /// `value` rounded to the nearest bfloat16, ties to even.
    pub fn new(value: f32) -> BF16 {
        BF16(half::bf16::from_f32(value).to_bits().to_le_bytes())
    }

    /// The number itself; exact.
    pub fn get(self) -> f32 {
        half::bf16::from_bits(u16::from_le_bytes(self.0)).to_f32()
    }
}

macro_rules! dense_block {
    ($name:ident) => {
        impl Block for $name {
            const DTYPE: DType = DType::$name;

            fn decode(&self, out: &mut [f32]) {
                out.fill(self.get());
            }

            fn encode(x: &[f32], _: Option<Importance<'_>>) -> Self {
                $name::new(x.first().copied().unwrap_or(0.0))
            }

            fn is_finite(&self) -> bool {
                self.get().is_finite()
            }
        }
    };
}
dense_block!(F32);
dense_block!(F16);
dense_block!(BF16);
