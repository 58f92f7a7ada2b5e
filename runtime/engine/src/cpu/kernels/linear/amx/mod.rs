//! Linear kernels for a matrix unit (AMX), for many tokens: activations in tiles of bfloat16 ([`Tiled`](super::Tiled)) times
//! panels of unpacked weights, summed in single precision within the unit.
//!
//! Integers would be twice as fast again, and are not: with a scale for every 32 values they have to leave the unit
//! after each instruction, which takes longer than the instruction. In bfloat16 a weight is what it is, scale and all, a sum
//! never leaves before its end, and both factors are off by at most 2⁻⁸ of themselves: closer than 8-bit groups are.
//!
//! A panel is 32 columns of the output and up to [`DEPTH`] values of the sum, `[k / 32][2][16 pairs of k][16 columns][2]`; it is
//! made once for all tokens and stays in the first cache, while tiles of activations stream by from the second. Two tile rows
//! meet two columns of tiles, so four sums share four loads. Where a sum has several panels it goes on from what is in the output,
//! whose next lines are asked for meanwhile.

mod backward;
mod forward;

pub(super) use backward::backward_of;
pub(super) use forward::run as run_tile;

use super::OutMut;
use super::tiled::Tiled;
use crate::cpu::kernels::amx::{TILE_BYTES, TILE_ROWS, Unit};
use std::arch::asm;

/// Columns of a panel: two tiles of 16.
const COLUMNS: usize = 32;
/// Values of the sum in a panel, at most.
const DEPTH: usize = 640;
/// Tokens of a block: two tile rows.
const PAIR: usize = 2 * TILE_ROWS;
/// Bytes of a panel.
const PANEL_BYTES: usize = 2 * COLUMNS * DEPTH;

/// A part of the sum of all tokens for the columns of a panel.
struct Product<'a> {
    x: &'a Tiled<'a>,
    /// What rounding has left of it, to be multiplied and added likewise.
    low: Option<&'a Tiled<'a>>,
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
            let of = |x: &Tiled<'_>| [x.tile(t / TILE_ROWS, p.first), x.tile(second, p.first)];
            let a = (of(p.x), p.low.map(of));
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

    /// Two tile rows at `a`, and what is left of them, times the panel, 32 × 32 values at `to`, in rows `stride` apart. Asks for the
    /// lines of the rows behind, `ahead` apart; 0 asks for none.
    ///
    /// # Safety
    /// `a` and the panel have the steps, at least one; `to` is good for 32 rows of 32 values.
    #[inline(always)]
    unsafe fn block(
        &self,
        (a, low): ([*const u8; 2], Option<[*const u8; 2]>),
        p: &Product<'_>,
        to: *mut f32,
        stride: usize,
        ahead: usize,
    ) {
        // SAFETY: by the contract; what a register holds goes from one statement to the next, which keep their order.
        unsafe {
            self.begin_sums(to, stride, p.accumulate);
            for a in [Some(a), low].into_iter().flatten() {
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
            }
            self.store_sums(to, stride);
        }
    }
}
