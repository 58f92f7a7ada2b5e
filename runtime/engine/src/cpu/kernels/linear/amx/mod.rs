//! Linear kernels for a matrix unit (AMX), for many tokens: activations in tiles of bfloat16 ([`Tiled`](super::Tiled)) times
//! panels of unpacked weights, summed in single precision within the unit.
//!
//! One instruction multiplies 16 rows of 32 values by 32 × 16 weights in 16 cycles, eight times as much as `vpdpbusd` does of
//! bytes. Integers would be twice as fast again, and are not: with a scale for every 32 values they have to leave the unit
//! after each instruction, which takes longer than the instruction. In bfloat16 a weight is what it is, scale and all, a sum
//! never leaves before its end, and both factors are off by at most 2⁻⁸ of themselves: closer than 8-bit groups are.
//!
//! A panel is 32 columns of the output and up to [`DEPTH`] values of the sum, `[k / 32][2][16 pairs of k][16 columns][2]`; it is
//! made once for all tokens and stays in the first cache, while tiles of activations stream by from the second. Two tile rows
//! meet two columns of tiles, so four sums share four loads. Where a sum has several panels it goes on from what is in the output,
//! whose next lines are asked for meanwhile.
//!
//! The instructions have no intrinsics in stable Rust, so they stand here as assembly. The tile registers hold nothing between
//! two calls of a kernel, and are given back at the end of each, so that switches of threads need not keep them.

mod backward;
mod forward;

pub(super) use backward::backward_of;
pub(super) use forward::run as run_tile;

use super::OutMut;
use super::tiled::{TILE_BYTES, TILE_ROWS, Tiled};
use crate::cpu::isa::Avx512;
use std::arch::asm;
use std::arch::x86_64::*;

/// Columns of a panel: two tiles of 16.
const COLUMNS: usize = 32;
/// Values of the sum in a panel, at most.
const DEPTH: usize = 512;
/// Tokens of a block: two tile rows.
const PAIR: usize = 2 * TILE_ROWS;
/// Bytes of a panel.
const PANEL_BYTES: usize = 2 * COLUMNS * DEPTH;

/// The tile registers in use, all 16 rows of 64 bytes, and how they were set up before: other code of the process may count on
/// that, although calls need not keep it.
struct Unit {
    before: Config,
}

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// Nothing: all registers are free.
    const NONE: Config = Config { palette: 0, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
}

/// Eight registers of 16 rows of 64 bytes.
static ALL: Config = {
    let mut config = Config { palette: 1, ..Config::NONE };
    let mut i = 0;
    while i < 8 {
        (config.row_bytes[i], config.rows[i]) = (64, TILE_ROWS as u8);
        i += 1;
    }
    config
};

impl Unit {
    /// # Safety
    /// The CPU has AMX, and the system lets the process use it.
    unsafe fn open() -> Unit {
        let mut before = Config::NONE;
        // SAFETY: by the contract; a configuration is 64 bytes.
        unsafe {
            asm!("sttilecfg [{}]", in(reg) &raw mut before, options(nostack));
            asm!("ldtilecfg [{}]", in(reg) &raw const ALL, options(nostack, readonly));
        }
        Unit { before }
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // SAFETY: `open` has found the instructions, and stored what is loaded.
        unsafe {
            if self.before.palette == 0 {
                asm!("tilerelease", options(nostack, nomem));
            } else {
                asm!("ldtilecfg [{}]", in(reg) &raw const self.before, options(nostack, readonly));
            }
        }
    }
}

/// A part of the sum of all tokens for the columns of a panel.
struct Product<'a> {
    x: &'a Tiled<'a>,
    /// The first tile of the sum in a row of `x`, and how many.
    first: usize,
    steps: usize,
    /// `steps` steps.
    panel: *const u8,
    out: OutMut,
    /// The first column of the output and how many, 1 to [`COLUMNS`].
    column: usize,
    columns: usize,
    /// Go on from what is in the output.
    accumulate: bool,
}

impl Unit {
    /// Computes it for tokens `tokens`, which begin with a tile row.
    ///
    /// # Safety
    /// All sizes fit, and nobody else uses these columns of the output.
    unsafe fn multiply(&self, p: &Product<'_>, tokens: std::ops::Range<usize>) {
        for t in tokens.clone().step_by(PAIR) {
            let rows = (tokens.end - t).min(PAIR);
            // A second tile row that is not there repeats the first.
            let second = if rows > TILE_ROWS { t / TILE_ROWS + 1 } else { t / TILE_ROWS };
            let a = [p.x.tile(t / TILE_ROWS, p.first), p.x.tile(second, p.first)];
            // SAFETY: tile rows of `x`, places of the output; or of a copy where not all of the 32 × 32 are there.
            unsafe {
                let out = p.out.base.add(t * p.out.stride + p.column);
                if rows == PAIR && p.columns == COLUMNS {
                    let ahead = if t + PAIR < tokens.end { p.out.stride } else { 0 };
                    self.block(a, p, out, p.out.stride, ahead);
                    continue;
                }
                let mut copy = [[0f32; COLUMNS]; PAIR];
                if p.accumulate {
                    for (i, row) in copy.iter_mut().enumerate().take(rows) {
                        std::ptr::copy_nonoverlapping(out.add(i * p.out.stride), row.as_mut_ptr(), p.columns);
                    }
                }
                self.block(a, p, copy.as_mut_ptr().cast(), COLUMNS, 0);
                for (i, row) in copy.iter().enumerate().take(rows) {
                    std::ptr::copy_nonoverlapping(row.as_ptr(), out.add(i * p.out.stride), p.columns);
                }
            }
        }
    }

    /// Two tile rows at `a` times the panel, 32 × 32 values at `to`, in rows `stride` apart. Asks for the lines of the rows behind,
    /// `ahead` apart; 0 asks for none.
    ///
    /// # Safety
    /// `a` and the panel have the steps, at least one; `to` is good for 32 rows of 32 values.
    #[inline(always)]
    unsafe fn block(&self, a: [*const u8; 2], p: &Product<'_>, to: *mut f32, stride: usize, ahead: usize) {
        let (low, high, stride) = (to, to.wrapping_add(TILE_ROWS * stride), 4 * stride);
        // SAFETY: by the contract; what a register holds goes from one statement to the next, which keep their order.
        unsafe {
            if p.accumulate {
                asm!(
                    "tileloadd tmm0, [{low} + {s}*1]",
                    "tileloadd tmm1, [{low} + {s}*1 + 64]",
                    "tileloadd tmm2, [{high} + {s}*1]",
                    "tileloadd tmm3, [{high} + {s}*1 + 64]",
                    low = in(reg) low, high = in(reg) high, s = in(reg) stride, options(nostack),
                );
            } else {
                asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack));
            }
            asm!(
                "2:",
                "tileloadd tmm4, [{a} + {s}*1]",
                "tileloadd tmm6, [{w} + {s}*1]",
                "tileloadd tmm7, [{w} + {s}*1 + {tile}]",
                "tileloadd tmm5, [{b} + {s}*1]",
                "prefetchw [{c}]",
                "prefetchw [{c} + 64]",
                "prefetchw [{c} + {cs}]",
                "prefetchw [{c} + {cs} + 64]",
                "lea {c}, [{c} + 2*{cs}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, {tile}",
                "add {b}, {tile}",
                "add {w}, 2*{tile}",
                "dec {n}",
                "jnz 2b",
                a = inout(reg) a[0] => _,
                b = inout(reg) a[1] => _,
                w = inout(reg) p.panel => _,
                n = inout(reg) p.steps => _,
                s = in(reg) 64usize,
                c = inout(reg) to.wrapping_add(PAIR * ahead) => _,
                cs = in(reg) 4 * ahead,
                tile = const TILE_BYTES,
                options(nostack),
            );
            asm!(
                "tilestored [{low} + {s}*1], tmm0",
                "tilestored [{low} + {s}*1 + 64], tmm1",
                "tilestored [{high} + {s}*1], tmm2",
                "tilestored [{high} + {s}*1 + 64], tmm3",
                low = in(reg) low, high = in(reg) high, s = in(reg) stride, options(nostack),
            );
        }
    }
}

/// Both as bfloat16, the first in the low half of each lane; halves are rounded up.
#[inline(always)]
unsafe fn pairs(low: __m512, high: __m512) -> __m512i {
    // SAFETY: register arithmetic.
    unsafe {
        let half = _mm512_set1_epi32(0x8000);
        let low = _mm512_srli_epi32::<16>(_mm512_add_epi32(_mm512_castps_si512(low), half));
        let high = _mm512_add_epi32(_mm512_castps_si512(high), half);
        // Bits of `high` where the mask has ones, else of `low`.
        _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi32(0xffff_0000_u32 as i32), high, low)
    }
}

/// Operations (a multiplication and an addition are two) of a round of [`spin`].
pub const SPIN_OPS: usize = 4 * 2 * 16 * 16 * 32;

/// The products of [`Unit::block`] without their loads, `rounds` times: what the unit can do at best.
pub fn spin(proof: Avx512, rounds: usize) {
    if !proof.amx || rounds == 0 {
        return;
    }
    // SAFETY: the token says that there is AMX; registers alone are touched.
    unsafe {
        let _unit = Unit::open();
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {n}",
            "jnz 2b",
            n = inout(reg) rounds => _,
            options(nostack, nomem),
        );
    }
}
