//! Block formats: how weights lie in the file. Layouts, and the scalar code that reads and writes them, which is the
//! specification that every SIMD and GPU kernel is tested against. Nothing here knows an instruction set.
//!
//! | file | what is in it |
//! | --- | --- |
//! | `dtype`, `facts` | the table of types: numbers, sizes, names, bits per weight |
//! | `block` | the trait of all blocks, half-precision scales, packing of codes |
//! | `dense`, `legacy`, `k_affine`, `k_symmetric`, `iq4`, `mxfp4` | one family of layouts each, with its decoder and encoder |
//! | `search` | the scale searches of the encoders |
//! | `convert` | [`dequantize`], [`quantize`], [`dot`]: any type, checked |

mod block;
mod convert;
mod dense;
mod dtype;
mod facts;
mod iq4;
mod k_affine;
mod k_symmetric;
mod legacy;
mod mxfp4;
mod search;
#[cfg(test)]
mod tests;

pub use block::{Block, F16, Importance, blocks, blocks_mut};
pub use convert::{dequantize, dot, quantize, quantize_into, quantize_weighted};
pub use dense::{BF16, F32};
pub use dtype::DType;
pub use iq4::{BlockIq4Nl, BlockIq4Xs, IQ4_VALUES};
pub use k_affine::{BlockQ2K, BlockQ4K, BlockQ5K, pack_scales, unpack_scales};
pub use k_symmetric::{BlockQ3K, BlockQ6K, BlockQ8K};
pub use legacy::{BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0};
pub use mxfp4::{BlockMxfp4, MXFP4_VALUES};
