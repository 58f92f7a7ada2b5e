//! The loops around the vector kernels of `wide`: a block of weights is unpacked to f32, rounded in place, and multiplied
//! with all tokens.
//!
//! A block lies in *slabs* of 16 lanes, one behind the other. Unpacked, a slab is `[step][16]` f32; rounded, it is
//! `[step / 2][16][2]` i16 in the first half of the same memory: a pair of steps is 64 bytes, two vectors of AVX2 or one
//! of AVX-512, which `vpmaddwd` or `vpdpwssd` multiplies with a pair of activations. Several slabs that are next to each
//! other can be multiplied together, as [`Vectors::SLABS`] says.
//!
//! The loops are inlined into the functions of `avx2` and `avx512` that have the instructions, one for each type.

use super::super::avx2::source::{Source, unpack_turned};
use super::super::{LinearTask, Scratch, scratch_bytes};
use super::{BACKWARD_COLUMNS, BACKWARD_ROWS, FORWARD_COLUMNS, GROUP, UNIT, Wide, WideBackwardTask};

/// Rows of a block of the forward map.
const FORWARD_ROWS: usize = 64;
/// Tokens that go by while their activations stay in the second cache, with the block and their part of the output: whole
/// register tiles of 4 and of 12.
const TOKENS: usize = 72;
/// Lanes of a slab.
pub(super) const LANES: usize = 16;

const _: () = assert!(4 * BACKWARD_ROWS * BACKWARD_COLUMNS <= scratch_bytes());
const _: () = assert!(4 * (FORWARD_ROWS * FORWARD_COLUMNS + 8 * UNIT) <= scratch_bytes());

pub(super) type Forward = unsafe fn(&LinearTask<'_>, &Wide<'_>, &mut Scratch);
pub(super) type Backward = unsafe fn(&WideBackwardTask<'_>, &mut Scratch);

/// One scale for each lane of a slab.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Scales(pub [f32; LANES]);

/// Slabs of rounded weights that are next to each other: the i-th begins at `at + i · step`.
#[derive(Clone, Copy)]
pub(super) struct Slabs<'a> {
    pub at: *const f32,
    /// Floats between slabs.
    pub step: usize,
    /// Theirs, and with that their number.
    pub scales: &'a [Scales],
    /// Groups of each.
    pub groups: usize,
}

/// Rows of activations: token t's group g is `q[(t · row + g) · GROUP ..][.. GROUP]`, times `d[t · row + g]`.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub q: *const i16,
    pub d: *const f32,
    /// Groups of a row.
    pub row: usize,
    /// Rows.
    pub tokens: usize,
}

impl Rows {
    /// From token `t` on, `tokens` of them.
    #[inline(always)]
    pub fn from(self, t: usize, tokens: usize) -> Rows {
        let Rows { q, d, row, .. } = self;
        Rows { q: q.wrapping_add(t * row * GROUP), d: d.wrapping_add(t * row), row, tokens }
    }
}

/// Where the results of some slabs go: token t's lanes at `at[t · row]`, the first `columns` of them.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub at: *mut f32,
    pub row: usize,
    pub columns: usize,
    pub add: bool,
}

impl Target {
    /// From token `t` on.
    #[inline(always)]
    pub fn from(self, t: usize) -> Target {
        Target { at: self.at.wrapping_add(t * self.row), ..self }
    }
}

/// An instruction set's part of the work, once for all types: it is not inlined.
pub(super) trait Vectors {
    /// Slabs that are multiplied together.
    const SLABS: usize;

    /// Rounds a slab of `steps` × 16 weights in place, to whole groups with zeros behind the last; returns the scales.
    ///
    /// # Safety
    /// The slab has room for whole groups of f32; the caller has the instructions.
    unsafe fn fix(slab: *mut f32, steps: usize) -> Scales;

    /// Rows of activations times `SLABS` slabs or fewer.
    ///
    /// # Safety
    /// All of them exist and the target has room; the caller has the instructions.
    unsafe fn multiply(slabs: Slabs<'_>, x: Rows, to: Target);
}

/// A block that has been rounded, times all tokens of `x` from their group `group` on; `to` is the block's first result.
///
/// # Safety
/// As for [`Vectors::multiply`].
#[inline(always)]
unsafe fn multiply<V: Vectors>(block: Slabs<'_>, x: &Wide<'_>, group: usize, to: Target) {
    let x = Rows {
        q: x.q.as_ptr().wrapping_add(group * GROUP),
        d: x.d.as_ptr().wrapping_add(group),
        row: x.groups(),
        tokens: x.tokens,
    };
    for t in (0..x.tokens).step_by(TOKENS) {
        let x = x.from(t, TOKENS.min(x.tokens - t));
        for (i, scales) in block.scales.chunks(V::SLABS).enumerate() {
            let lane = i * V::SLABS * LANES;
            let slabs = Slabs { at: block.at.wrapping_add(i * V::SLABS * block.step), scales, ..block };
            let to = to.from(t);
            let columns = (to.columns - lane).min(scales.len() * LANES);
            // SAFETY: the caller's promise.
            unsafe { V::multiply(slabs, x, Target { at: to.at.wrapping_add(lane), columns, ..to }) };
        }
    }
}

/// The forward map.
///
/// # Safety
/// The task has been checked and has rows and columns; the caller has the instructions of `V` and AVX2.
#[inline(always)]
pub(super) unsafe fn forward<S: Source, V: Vectors>(task: &LinearTask<'_>, x: &Wide<'_>, scratch: &mut Scratch) {
    const STEP: usize = LANES * FORWARD_COLUMNS;
    let Some(row_bytes) = task.dtype.row_bytes(task.k) else { return };
    let panel = scratch.lines.as_mut_ptr().cast::<f32>();
    // SAFETY: within the scratch, as asserted above.
    let eight = unsafe { panel.add(FORWARD_ROWS * FORWARD_COLUMNS) };
    let x = &Wide { tokens: task.x.tokens, ..*x };
    for r in task.rows.clone().step_by(FORWARD_ROWS) {
        let rows = FORWARD_ROWS.min(task.rows.end - r);
        let slabs = rows.div_ceil(LANES);
        for chunk in super::chunks(task.k) {
            let columns = chunk.len();
            let mut scales = [Scales([0.0; LANES]); FORWARD_ROWS / LANES];
            // SAFETY: rows of the matrix from units' beginnings; both parts of the scratch have room. The check has found
            // tokens, rows and columns in bounds of x and y.
            unsafe {
                for u in (0..columns).step_by(UNIT) {
                    let offset = (chunk.start + u) / UNIT * S::UNIT_BYTES;
                    let at = |i: usize| task.weight.as_ptr().add((r + i) * row_bytes + offset);
                    unpack_turned::<S>(at, rows, UNIT.min(columns - u), (panel.add(LANES * u), STEP), eight);
                }
                for (i, scales) in scales[..slabs].iter_mut().enumerate() {
                    *scales = V::fix(panel.add(i * STEP), columns);
                }
                let groups = columns.div_ceil(GROUP);
                let block = Slabs { at: panel, step: STEP, scales: &scales[..slabs], groups };
                let to = Target {
                    at: task.out.base.add(r),
                    row: task.out.stride,
                    columns: rows,
                    add: task.accumulate || chunk.start > 0,
                };
                multiply::<V>(block, x, chunk.start / GROUP, to);
            }
        }
    }
}

/// The backward pass.
///
/// # Safety
/// As for [`forward`].
#[inline(always)]
pub(super) unsafe fn backward<S: Source, V: Vectors>(task: &WideBackwardTask<'_>, scratch: &mut Scratch) {
    const STEP: usize = LANES * BACKWARD_ROWS;
    let Some(row_bytes) = task.dtype.row_bytes(task.k) else { return };
    let panel = scratch.lines.as_mut_ptr().cast::<f32>();
    let mut column = task.columns.start;
    while column < task.columns.end {
        let within = column % UNIT;
        let columns = (BACKWARD_COLUMNS - within % BACKWARD_COLUMNS).min(task.columns.end - column);
        let slabs = columns.div_ceil(LANES);
        for r in (0..task.dy.k).step_by(BACKWARD_ROWS) {
            let rows = BACKWARD_ROWS.min(task.dy.k - r);
            let mut scales = [Scales([0.0; LANES]); BACKWARD_COLUMNS / LANES];
            // SAFETY: rows of the matrix from a unit's beginning; the panel holds a block. The check has found tokens,
            // rows and columns in bounds of dy and dx.
            unsafe {
                for i in 0..rows {
                    let unit = task.weight.as_ptr().add((r + i) * row_bytes + column / UNIT * S::UNIT_BYTES);
                    S::unpack(unit, within..within + columns, panel.add(LANES * i), STEP);
                }
                for (i, scales) in scales[..slabs].iter_mut().enumerate() {
                    *scales = V::fix(panel.add(i * STEP), rows);
                }
                let block = Slabs { at: panel, step: STEP, scales: &scales[..slabs], groups: rows.div_ceil(GROUP) };
                let to = Target {
                    at: task.dx.base.add(column),
                    row: task.dx.stride,
                    columns,
                    add: task.accumulate || r > 0,
                };
                multiply::<V>(block, task.dy, r / GROUP, to);
            }
        }
        column += columns;
    }
}
