//! Prompts: panels of 32 rows of a matrix, unpacked as the AVX-512 tile is and then widened.

use super::super::avx512::{Turn, unpack};
use super::super::tile::{Ahead, TileMemory, pointers};
use super::super::{LinearTask, Scratch, TILE_ROWS_MAX, UNIT};
use super::{COLUMNS, DEPTH, PANEL_BYTES, Product};
use crate::cpu::isa::Avx512;
use crate::cpu::kernels::amx::{TILE_BYTES, TILE_ROWS, Unit, pairs};
use std::arch::x86_64::*;

/// Groups of 32 in a unit.
const UNIT_GROUPS: usize = UNIT / 32;
/// Bytes of activations that stay in the second cache beside a panel's columns of the output.
const CACHED_BYTES: usize = 1 << 20;
/// Tokens that are worth a panel.
const CACHED_TOKENS: usize = 256;

/// Runs a task.
pub(in super::super) fn run<B: Turn>(proof: Avx512, task: &LinearTask<'_>, scratch: &mut Scratch) {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn inner<B: Turn>(task: &LinearTask<'_>, scratch: &mut Scratch) {
        // SAFETY: the features are enabled here; the token, which `run` has, says that there is AMX; `linear` checked the task.
        unsafe { by_panels::<B>(task, scratch) }
    }
    if proof.amx {
        // SAFETY: the token proves the features.
        unsafe { inner::<B>(task, scratch) }
    }
}

/// # Safety
/// The caller has the instructions of [`unpack`], and AMX; `linear` has checked the task.
#[inline(always)]
unsafe fn by_panels<B: Turn>(task: &LinearTask<'_>, scratch: &mut Scratch) {
    let (Some(x), Some(row_bytes)) = (task.x.tiled, task.dtype.row_bytes(task.k)) else { return };
    let tile = scratch.tile();
    // The running sums of other tile kernels are not needed here: they are in the unit, or in the output.
    let panel: *mut u8 = tile.sums.cast();
    const { assert!(PANEL_BYTES <= 4 * TILE_ROWS_MAX * super::super::TILE_TOKENS && COLUMNS == TILE_ROWS_MAX) };
    let units = task.k.div_ceil(UNIT);
    // Chunks of equal size, as near as whole units allow.
    let chunk = if task.k <= DEPTH { units } else { units.div_ceil(units.div_ceil(DEPTH / UNIT)) };
    let pointers = |r0: usize, unit: usize| pointers(task, row_bytes, r0, unit * B::BYTES);
    // All of the sum goes by for one panel's columns where its activations stay in the second cache, and so do the columns' sums;
    // else a chunk of it goes by for all columns.
    let whole = 2 * task.k * CACHED_TOKENS <= CACHED_BYTES;
    let tokens = if whole { CACHED_BYTES / (2 * task.k) } else { CACHED_BYTES / (2 * UNIT * chunk) };
    let tokens = task.x.tokens.div_ceil(task.x.tokens.div_ceil(tokens)).next_multiple_of(2 * TILE_ROWS);
    // SAFETY: by the contract.
    let matrix_unit = unsafe { Unit::open() };
    let (panels, chunks) = (task.rows.len().div_ceil(COLUMNS), units.div_ceil(chunk));
    // The first row and unit of a panel, in the order in which they are made.
    let place = |i: usize| {
        let (panel, at) = if whole { (i / chunks, i % chunks) } else { (i % panels, i / panels) };
        (task.rows.start + COLUMNS * panel, chunk * at)
    };
    for t0 in (0..task.x.tokens).step_by(tokens) {
        for i in 0..panels * chunks {
            let (r0, u0) = place(i);
            let groups = (task.k / 32 - UNIT_GROUPS * u0).min(UNIT_GROUPS * chunk);
            for unit in 0..groups.div_ceil(UNIT_GROUPS) {
                let n = (groups - UNIT_GROUPS * unit).min(UNIT_GROUPS);
                let next = if unit * UNIT_GROUPS + n < groups { (r0, u0 + unit + 1) } else { place(i + 1) };
                let upcoming = pointers(next.0, next.1);
                let mut ahead = Ahead::new(&upcoming, n * B::BYTES / UNIT_GROUPS, 4 * n);
                // SAFETY: pointers at a unit of rows within the matrix, `n` groups of which are there; the panel has
                // `DEPTH` values.
                unsafe {
                    unpack::<B, COLUMNS>(&pointers(r0, u0 + unit), n, &tile, &mut ahead);
                    widen::<B>(&tile, n, panel.add(unit * UNIT_GROUPS * 2 * TILE_BYTES));
                }
            }
            let product = Product {
                x: &x,
                low: task.x.low.as_ref(),
                first: UNIT_GROUPS * u0,
                steps: groups,
                panel,
                out: task.out,
                column: r0,
                columns: (task.rows.end - r0).min(COLUMNS),
                accumulate: task.accumulate || u0 > 0,
            };
            // SAFETY: `linear` checked the sizes.
            unsafe { matrix_unit.multiply(&product, t0..(t0 + tokens).min(task.x.tokens)) };
        }
    }
}

/// Makes `groups` groups of an unpacked tile, `[k / 4][32 rows][4]` bytes with a scale and a minimum, a panel of bfloat16.
///
/// # Safety
/// The caller has AVX-512 F; the tile has been unpacked; the panel has room.
#[inline(always)]
unsafe fn widen<B: Turn>(tile: &TileMemory, groups: usize, panel: *mut u8) {
    // SAFETY: by the contract.
    unsafe {
        for group in 0..groups {
            for half in 0..2 {
                let to = panel.add((2 * group + half) * TILE_BYTES);
                let factors = |i: usize| {
                    let at = if B::HALVES { 2 * group + i / 4 } else { group };
                    let at = at * COLUMNS + 16 * half;
                    let d = _mm512_load_ps(tile.d.add(at));
                    let m = match B::CENTRED {
                        true => _mm512_mul_ps(d, _mm512_set1_ps(-128.0)),
                        false => _mm512_load_ps(tile.m.add(at)),
                    };
                    (d, m)
                };
                for i in 0..8 {
                    let (d, m) = factors(i);
                    let v = _mm512_load_si512(tile.q.add(((8 * group + i) * COLUMNS + 16 * half) * 4).cast());
                    let byte = _mm512_set1_epi32(0xff);
                    let weight = |q: __m512i| _mm512_fmadd_ps(_mm512_cvtepi32_ps(q), d, m);
                    let a = weight(_mm512_and_si512(v, byte));
                    let b = weight(_mm512_and_si512(_mm512_srli_epi32::<8>(v), byte));
                    let c = weight(_mm512_and_si512(_mm512_srli_epi32::<16>(v), byte));
                    let d = weight(_mm512_srli_epi32::<24>(v));
                    _mm512_store_si512(to.add(128 * i).cast(), pairs(a, b));
                    _mm512_store_si512(to.add(128 * i + 64).cast(), pairs(c, d));
                }
            }
        }
    }
}
