//! The gradient with respect to the input: panels of 32 columns of a matrix, in which a step is a pair of its rows.

use super::super::rounded::RoundedBackwardTask;
use super::super::source::{Source, by_type};
use super::super::{Scratch, Tiled, UNIT};
use super::{COLUMNS, Product};
use crate::cpu::kernels::amx::{TILE_BYTES, TILE_VALUES, Unit, pairs};
use crate::quant::DType;
use std::arch::x86_64::*;

/// Rows of a block, which is unpacked for a unit's columns at once, so that scales are read once.
const ROWS: usize = 384;
/// Bytes of a block's panels.
const BLOCK_BYTES: usize = 2 * ROWS * UNIT;
const _: () = assert!(BLOCK_BYTES <= super::super::scratch_bytes() && ROWS.is_multiple_of(TILE_VALUES));

pub(in super::super) type Backward = unsafe fn(&RoundedBackwardTask<'_, Tiled<'_>>, &mut Scratch);

/// The backward pass for a type; to be called with the instructions of the token `Avx512` and AMX, and a task that has been checked.
pub(in super::super) fn backward_of(dtype: DType) -> Backward {
    by_type!(dtype, backward)
}

/// # Safety
/// As [`backward_of`] says.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn backward<S: Source>(task: &RoundedBackwardTask<'_, Tiled<'_>>, scratch: &mut Scratch) {
    let RoundedBackwardTask { dtype, weight, k, columns, dy, dx, accumulate } = task;
    let Some(row_bytes) = dtype.row_bytes(*k) else { return };
    let panels: *mut u8 = scratch.lines.as_mut_ptr().cast();
    // SAFETY: by the contract.
    let matrix_unit = unsafe { Unit::open() };
    for r0 in (0..dy.k).step_by(ROWS) {
        let rows = (dy.k - r0).min(ROWS);
        let steps = rows.div_ceil(TILE_VALUES);
        for unit in columns.start / UNIT..columns.end.div_ceil(UNIT) {
            let within = columns.start.max(UNIT * unit) - UNIT * unit..columns.end.min(UNIT * (unit + 1)) - UNIT * unit;
            let at = |r: usize| weight.as_ptr().wrapping_add((r0 + r) * row_bytes + unit * S::UNIT_BYTES);
            // SAFETY: rows of the matrix, columns of the unit; the scratch has a block.
            unsafe { fill::<S>(at, rows, steps, within.clone(), panels) };
            for (i, first) in within.clone().step_by(COLUMNS).enumerate() {
                let product = Product {
                    x: dy,
                    low: None,
                    first: r0 / TILE_VALUES,
                    steps,
                    panel: panels.wrapping_add(i * steps * 2 * TILE_BYTES),
                    out: *dx,
                    column: UNIT * unit + first,
                    columns: (within.end - first).min(COLUMNS),
                    accumulate: *accumulate || r0 > 0,
                };
                // SAFETY: the sizes were checked.
                unsafe { matrix_unit.multiply(&product, 0..dy.tokens) };
            }
        }
    }
}

/// Fills panels with `columns` of the units of `rows` rows, and with zeros up to whole steps.
///
/// # Safety
/// The caller has the instructions of [`Source`] and AVX-512 F; `unit(r)` is the unit of a row; the panels have room.
#[inline(always)]
unsafe fn fill<S: Source>(
    unit: impl Fn(usize) -> *const u8,
    rows: usize,
    steps: usize,
    columns: std::ops::Range<usize>,
    panels: *mut u8,
) {
    // A row's columns in slabs of 16, the last one filled up.
    let mut pair = [[[0f32; 16]; UNIT / 16]; 2];
    let slabs = columns.len().div_ceil(16);
    for r in (0..steps * TILE_VALUES).step_by(2) {
        for (i, row) in pair.iter_mut().enumerate() {
            if r + i < rows {
                // SAFETY: by the contract.
                unsafe { S::unpack(unit(r + i), columns.clone(), row.as_mut_ptr().cast(), 16) };
            } else {
                *row = [[0.0; 16]; UNIT / 16];
            }
        }
        // SAFETY: as above.
        unsafe {
            let to = panels.add(r / TILE_VALUES * 2 * TILE_BYTES + r % TILE_VALUES / 2 * 64);
            for (slab, (low, high)) in pair[0].iter().zip(&pair[1]).enumerate().take(slabs) {
                let (low, high) = (_mm512_loadu_ps(low.as_ptr()), _mm512_loadu_ps(high.as_ptr()));
                let at = to.add(slab / 2 * steps * 2 * TILE_BYTES + slab % 2 * TILE_BYTES);
                _mm512_store_si512(at.cast(), pairs(low, high));
            }
        }
    }
}
