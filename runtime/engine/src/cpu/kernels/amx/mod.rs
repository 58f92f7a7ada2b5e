//! The matrix unit (AMX), and what is common to the kernels that multiply in it.
//!
//! One instruction multiplies 16 rows of 32 values by 32 × 16 in 16 cycles, in bfloat16 with sums in single precision: eight times
//! as much as `vpdpbusd` does of bytes. It takes the values of a left factor's row by twos, and two rows of the right factor at a
//! time, so the order within the sum is free as long as both factors have the same.
//!
//! | file | what |
//! | --- | --- |
//! | `unit` | the registers of tiles |
//! | `split` | products of single precision, each factor in two parts |
//! | `linear/amx/`, `attention/` | the kernels |

#[cfg(target_arch = "x86_64")]
pub mod split;
#[cfg(target_arch = "x86_64")]
mod unit;

#[cfg(target_arch = "x86_64")]
pub use unit::{SPIN_OPS, Unit, pairs, spin};

/// Rows of a tile, and dwords of its rows.
pub const TILE_ROWS: usize = 16;
/// Values of a tile's row.
pub const TILE_VALUES: usize = 32;
/// Bytes of a tile.
pub const TILE_BYTES: usize = 2 * TILE_ROWS * TILE_VALUES;
