//! Linear kernels for AArch64, of the same design as those for AVX2. NEON is part of the target and can be called anywhere;
//! what needs more, the dot products of Armv8.2 (`sdot`) and the matrix products of Armv8.6 (`smmla`), is inlined
//! into one entry per kernel, which is reached only where the token says that the processor has them.

pub(in crate::cpu::kernels) mod dot;
mod matvec;
pub(super) mod source;
mod tile;
pub(super) mod unpack;

use super::activations::{GROUP, Row, SMALLEST};
use super::tile::XRow;
use super::{LinearTask, Q8, Scratch};
use crate::cpu::isa::Neon;
use dot::{Dot, Sdot, Widening};
use matvec::matvec;
use std::arch::aarch64::*;
use tile::{DotTile, Layout, MatrixTile, NeonTile};
use unpack::Block;

/// One to four tokens.
pub(super) fn run_matvec<B: Block>(token: Neon, task: &LinearTask<'_>) {
    #[target_feature(enable = "dotprod")]
    fn with_dotprod<B: Block>(task: &LinearTask<'_>) {
        // SAFETY: the feature is enabled here, and `linear` checked the task.
        unsafe { by_tokens::<B, Sdot>(task) }
    }
    // SAFETY: the token proves the feature; the baseline needs none.
    unsafe { if token.dotprod { with_dotprod::<B>(task) } else { by_tokens::<B, Widening>(task) } }
}

/// Splits a task into at most four tokens at a time.
///
/// # Safety
/// The caller has what `D` needs, and `linear` has checked the task.
#[inline(always)]
unsafe fn by_tokens<B: Block, D: Dot>(task: &LinearTask<'_>) {
    let Some(x) = task.x.q8 else { return };
    for t in (0..task.x.tokens).step_by(4) {
        // SAFETY: by the contract.
        unsafe {
            match task.x.tokens - t {
                1 => some::<B, D, 1>(task, &x, t),
                2 => some::<B, D, 2>(task, &x, t),
                _ => some::<B, D, 4>(task, &x, t),
            }
        }
    }
}

/// Tokens `t0 .. t0 + T`.
#[inline(always)]
unsafe fn some<B: Block, D: Dot, const T: usize>(task: &LinearTask<'_>, x: &Q8<'_>, t0: usize) {
    let Some(row_bytes) = task.dtype.row_bytes(task.k) else { return };
    // SAFETY: by `by_tokens`' contract.
    unsafe {
        let x = XRow::some::<T>(x, t0);
        matvec::<B, D, T>(task.weight.as_ptr(), row_bytes, task.k, task.rows.clone(), x, |t, row, value| {
            if t0 + t < task.x.tokens {
                task.out.write(t0 + t, row, value, task.accumulate);
            }
        });
    }
}

/// Many tokens.
pub(super) fn run_tile<B: Block>(token: Neon, task: &LinearTask<'_>, scratch: &mut Scratch) {
    #[inline(always)]
    unsafe fn with<B: Block, L: Layout>(task: &LinearTask<'_>, scratch: &mut Scratch) {
        // SAFETY: the callers have the features; `linear` checked the task.
        unsafe { super::tile::run::<NeonTile<B, L>>(task, scratch) }
    }
    #[target_feature(enable = "i8mm")]
    fn with_i8mm<B: Block>(task: &LinearTask<'_>, scratch: &mut Scratch) {
        // SAFETY: the feature is enabled here.
        unsafe { with::<B, MatrixTile>(task, scratch) }
    }
    #[target_feature(enable = "dotprod")]
    fn with_dotprod<B: Block>(task: &LinearTask<'_>, scratch: &mut Scratch) {
        // SAFETY: the feature is enabled here.
        unsafe { with::<B, DotTile<Sdot>>(task, scratch) }
    }
    // SAFETY: the token proves the features; the baseline needs none.
    unsafe {
        match token {
            Neon { i8mm: true, .. } => with_i8mm::<B>(task, scratch),
            Neon { dotprod: true, .. } => with_dotprod::<B>(task, scratch),
            _ => with::<B, DotTile<Widening>>(task, scratch),
        }
    }
}

/// Quantizes one row exactly as the scalar form does.
pub(super) fn quantize_row(_proof: Neon, x: &[f32], row: Row<'_>) {
    // SAFETY: the token proves the feature.
    unsafe { quantize(x, row) }
}

#[target_feature(enable = "neon")]
fn quantize(x: &[f32], mut row: Row<'_>) {
    let n = row.qs.len() / GROUP;
    for (g, x) in x.chunks_exact(GROUP).enumerate() {
        let q = &mut row.qs[GROUP * g..GROUP * (g + 1)];
        let mut v = [vdupq_n_f32(0.0); GROUP / 4];
        let mut top = vdupq_n_u32(0);
        for (v, x) in v.iter_mut().zip(x.chunks_exact(4)) {
            // SAFETY: `x` is 4 long.
            *v = unsafe { vld1q_f32(x.as_ptr()) };
            // Absolute values compare as their bit patterns do, with infinities and NaNs on top.
            top = vmaxq_u32(top, vreinterpretq_u32_f32(vabsq_f32(*v)));
        }
        let amax = f32::from_bits(vmaxvq_u32(top));
        let (scale, inverse) = match amax {
            _ if !amax.is_finite() => (f32::NAN, 0.0),
            _ if amax < SMALLEST => (0.0, 0.0),
            _ => (amax / 127.0, 127.0 / amax),
        };
        let mut sums = [0; 2];
        if inverse == 0.0 {
            q.fill(0);
        } else {
            for (half, (v, q)) in v.chunks_exact(4).zip(q.chunks_exact_mut(16)).enumerate() {
                let mut int = [vdupq_n_s32(0); 4];
                for (int, v) in int.iter_mut().zip(v) {
                    *int = vcvtnq_s32_f32(vmulq_n_f32(*v, inverse));
                }
                let words = |a, b| vcombine_s16(vmovn_s32(a), vmovn_s32(b));
                let bytes = vcombine_s8(vmovn_s16(words(int[0], int[1])), vmovn_s16(words(int[2], int[3])));
                sums[half] = i32::from(vaddlvq_s8(bytes));
                // SAFETY: `q` is 16 long.
                unsafe { vst1q_s8(q.as_mut_ptr(), bytes) };
            }
        }
        row.group(g, scale, sums);
    }
    row.pad(n);
}
