//! The loops around the vector kernels of `rounded`: a block of weights is unpacked to f32, rounded in place, and multiplied
//! with all tokens.
//!
//! A block lies in *slabs* of 16 lanes, one behind the other. Unpacked, a slab is `[step][16]` f32; rounded, it lies at the
//! beginning of the same memory, on x86-64 in vectors of 64 bytes, which a multiplying instruction takes with as many activations
//! (`neon` says how it lies there):
//!
//! | level | a vector | behind them |
//! | --- | --- | --- |
//! | `i16` | `[16][2]`: two steps (`vpmaddwd`, twice 32 bytes, or `vpdpwssd`) | after the last, the lanes' scales |
//! | `u8` | `[16][4]`: four steps (`vpdpbusd`) | after each group, the lanes' scales for it, and what the activations' 128 comes to |
//!
//! Several slabs that are next to each other can be multiplied together, as [`Vectors::SLABS`] says.
//!
//! The loops are inlined into the functions of `avx2`, `avx512` and `neon` that have the instructions, one for each type.

use super::super::source::{Source, unpack_turned};
use super::super::{LinearTask, Scratch, scratch_bytes};
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::{BACKWARD_COLUMNS, BACKWARD_ROWS, FORWARD_COLUMNS, GROUP, Rounded, RoundedBackwardTask, UNIT, native};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::cpu::isa::Isa;
use crate::cpu::kernels::lanes::{F32x8, fma, load, load_some, store, store_some, zero};
use crate::quant::DType;

/// Rows of a block of the forward map.
const FORWARD_ROWS: usize = 64;
/// Tokens that go by while their activations stay in the second cache, with the block and their part of the output: whole
/// register tiles of 4 and of 12.
const TOKENS: usize = 72;
/// Lanes of a slab.
pub(super) const LANES: usize = 16;

const _: () = assert!(4 * BACKWARD_ROWS * BACKWARD_COLUMNS <= scratch_bytes());
const _: () = assert!(4 * (FORWARD_ROWS * FORWARD_COLUMNS + 8 * UNIT) <= scratch_bytes());

pub(super) type Forward = unsafe fn(&LinearTask<'_>, &Rounded<'_, i16>, &mut Scratch);
pub type Backward<Q> = unsafe fn(&RoundedBackwardTask<'_, Rounded<'_, Q>>, &mut Scratch);

/// What a level of rounding has for each instruction set.
pub trait Kernels: native::Pack {
    /// The backward pass for a type; to be called where `isa` is, with a task that has been checked.
    fn backward_of(isa: Isa, dtype: DType) -> Option<Backward<Self>>;
}

/// The forward map for a type, likewise.
pub(super) fn forward_of(isa: Isa, dtype: DType) -> Option<Forward> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => Some(avx512::forward_of(dtype)),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(_) => Some(avx2::forward_of(dtype)),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon(_) => Some(neon::forward_of(dtype)),
        _ => None,
    }
}

impl Kernels for i16 {
    fn backward_of(isa: Isa, dtype: DType) -> Option<Backward<i16>> {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => Some(avx512::backward_of::<i16>(dtype)),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => Some(avx2::backward_of(dtype)),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(_) => Some(neon::backward_of::<i16>(dtype)),
            _ => None,
        }
    }
}

impl Kernels for u8 {
    fn backward_of(isa: Isa, dtype: DType) -> Option<Backward<u8>> {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => Some(avx512::backward_of::<u8>(dtype)),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(token) if token.dotprod => Some(neon::backward_of::<u8>(dtype)),
            // Without an instruction for four products there is nothing to gain.
            _ => None,
        }
    }
}

/// Slabs of rounded weights that are next to each other: the i-th begins at `at + i · step`.
#[derive(Clone, Copy)]
pub(super) struct Slabs {
    pub at: *const f32,
    /// Floats between slabs.
    pub step: usize,
    /// Their number.
    pub count: usize,
    /// Groups of each.
    pub groups: usize,
}

/// Rows of activations: token t's group g is `q[(t · row + g) · GROUP ..][.. GROUP]`, times `d[t · row + g]`.
#[derive(Clone, Copy)]
pub(super) struct Rows<Q> {
    pub q: *const Q,
    pub d: *const f32,
    /// Groups of a row.
    pub row: usize,
    /// Rows.
    pub tokens: usize,
}

impl<Q> Rows<Q> {
    /// From token `t` on, `tokens` of them.
    #[inline(always)]
    pub fn from(self, t: usize, tokens: usize) -> Rows<Q> {
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

    /// Writes a slab's lanes of token `t`, times `by`, or adds them.
    ///
    /// # Safety
    /// The target has room; the caller has the instructions of lanes.
    #[inline(always)]
    pub unsafe fn write(self, t: usize, lanes: [F32x8; 2], by: [F32x8; 2]) {
        for h in 0..2 {
            let at = self.at.wrapping_add(t * self.row + 8 * h);
            let columns = self.columns.saturating_sub(8 * h);
            // SAFETY: the caller's promise.
            unsafe {
                if columns >= 8 {
                    let old = if self.add { load(at) } else { zero() };
                    store(at, fma(lanes[h], by[h], old));
                } else if columns > 0 {
                    let old = if self.add { load_some(at, columns) } else { zero() };
                    store_some(at, columns, fma(lanes[h], by[h], old));
                }
            }
        }
    }
}

/// Where the scales of a slab in 16 bits lie: behind its weights, of which one f32 holds two.
pub(super) const fn scales_at(groups: usize) -> usize {
    groups * GROUP / 2 * LANES
}

/// An instruction set's part of the work at a level, once for all types: it is not inlined.
pub(super) trait Vectors<Q> {
    /// Slabs that are multiplied together.
    const SLABS: usize;

    /// Rounds a slab of `steps` × 16 weights in place, to whole groups with zeros behind the last.
    ///
    /// # Safety
    /// The slab has room for whole groups of f32; the caller has the instructions.
    unsafe fn fix(slab: *mut f32, steps: usize);

    /// Rows of activations times `SLABS` slabs or fewer.
    ///
    /// # Safety
    /// All of them exist and the target has room; the caller has the instructions.
    unsafe fn multiply(slabs: Slabs, x: Rows<Q>, to: Target);
}

/// A block that has been rounded, times all tokens of `x` from their group `group` on; `to` is the block's first result.
///
/// # Safety
/// As for [`Vectors::multiply`].
#[inline(always)]
unsafe fn multiply<Q: super::Level, V: Vectors<Q>>(block: Slabs, x: &Rounded<'_, Q>, group: usize, to: Target) {
    let x = Rows {
        q: x.q.as_ptr().wrapping_add(group * GROUP),
        d: x.d.as_ptr().wrapping_add(group),
        row: x.groups(),
        tokens: x.tokens,
    };
    for t in (0..x.tokens).step_by(TOKENS) {
        let x = x.from(t, TOKENS.min(x.tokens - t));
        for i in (0..block.count).step_by(V::SLABS) {
            let at = block.at.wrapping_add(i * block.step);
            let slabs = Slabs { at, count: V::SLABS.min(block.count - i), ..block };
            let (to, lane) = (to.from(t), i * LANES);
            let columns = (to.columns - lane).min(slabs.count * LANES);
            // SAFETY: the caller's promise.
            unsafe { V::multiply(slabs, x, Target { at: to.at.wrapping_add(lane), columns, ..to }) };
        }
    }
}

/// The forward map.
///
/// # Safety
/// The task has been checked and has rows and columns; the caller has the instructions of `V` and of lanes.
#[inline(always)]
pub(super) unsafe fn forward<S: Source, V: Vectors<i16>>(
    task: &LinearTask<'_>,
    x: &Rounded<'_, i16>,
    scratch: &mut Scratch,
) {
    const STEP: usize = LANES * FORWARD_COLUMNS;
    let Some(row_bytes) = task.dtype.row_bytes(task.k) else { return };
    let panel = scratch.lines.as_mut_ptr().cast::<f32>();
    // SAFETY: within the scratch, as asserted above.
    let eight = unsafe { panel.add(FORWARD_ROWS * FORWARD_COLUMNS) };
    let x = &Rounded { tokens: task.x.tokens, ..*x };
    for r in task.rows.clone().step_by(FORWARD_ROWS) {
        let rows = FORWARD_ROWS.min(task.rows.end - r);
        let slabs = rows.div_ceil(LANES);
        for chunk in super::chunks(task.k) {
            let columns = chunk.len();
            // SAFETY: rows of the matrix from units' beginnings; both parts of the scratch have room. The check has found
            // tokens, rows and columns in bounds of x and y.
            unsafe {
                for u in (0..columns).step_by(UNIT) {
                    let offset = (chunk.start + u) / UNIT * S::UNIT_BYTES;
                    let at = |i: usize| task.weight.as_ptr().add((r + i) * row_bytes + offset);
                    unpack_turned::<S>(at, rows, UNIT.min(columns - u), (panel.add(LANES * u), STEP), eight);
                }
                for i in 0..slabs {
                    V::fix(panel.add(i * STEP), columns);
                }
                let groups = columns.div_ceil(GROUP);
                let block = Slabs { at: panel, step: STEP, count: slabs, groups };
                let to = Target {
                    at: task.out.base.add(r),
                    row: task.out.stride,
                    columns: rows,
                    add: task.accumulate || chunk.start > 0,
                };
                multiply::<i16, V>(block, x, chunk.start / GROUP, to);
            }
        }
    }
}

/// The backward pass.
///
/// # Safety
/// As for [`forward`].
#[inline(always)]
pub(super) unsafe fn backward<S: Source, Q: super::Level, V: Vectors<Q>>(
    task: &RoundedBackwardTask<'_, Rounded<'_, Q>>,
    scratch: &mut Scratch,
) {
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
            // SAFETY: rows of the matrix from a unit's beginning; the panel holds a block. The check has found tokens,
            // rows and columns in bounds of dy and dx.
            unsafe {
                for i in 0..rows {
                    let unit = task.weight.as_ptr().add((r + i) * row_bytes + column / UNIT * S::UNIT_BYTES);
                    S::unpack(unit, within..within + columns, panel.add(LANES * i), STEP);
                }
                for i in 0..slabs {
                    V::fix(panel.add(i * STEP), rows);
                }
                let block = Slabs { at: panel, step: STEP, count: slabs, groups: rows.div_ceil(GROUP) };
                let to = Target {
                    at: task.dx.base.add(column),
                    row: task.dx.stride,
                    columns,
                    add: task.accumulate || r > 0,
                };
                multiply::<Q, V>(block, task.dy, r / GROUP, to);
            }
        }
        column += columns;
    }
}
