//! NEON. A slab's lanes are four registers; a token's values are taken from one of them by number, so nothing is spread.
//!
//! | level | of a slab | products |
//! | --- | --- | --- |
//! | `i16` | `[step][16]` words, behind them the lanes' scales | one a lane (`smlal`), on every processor |
//! | `u8` | `[group]`: `[16][lane][4]` bytes, then the lanes' scales | four a lane (`sdot`), where there are dot products |
//!
//! Bytes are signed in `sdot`, so the 128 comes off the activations when they are loaded. A register tile is 4 tokens: their
//! 16 sums of a group, what they are made of, and most of the f32 sums are registers.

// Registers are numbered: `for h in 0..4` says what happens better than zipped iterators do.
#![allow(clippy::needless_range_loop)]

use super::super::neon::dot::{Dot, Sdot};
use super::super::source::{Source, by_type};
use super::super::{LinearTask, Scratch};
use super::blocks::{self, Backward, Forward, LANES, Rows, Slabs, Target, Vectors, scales_at};
use super::{GROUP, Level, Rounded, RoundedBackwardTask, SMALLEST, scale_of_most};
use crate::cpu::kernels::lanes::{F32x8, fma, load, mul, splat, zero};
use crate::quant::DType;
use std::arch::aarch64::*;

/// Tokens of a register tile.
const TILE: usize = 4;
/// Vectors of four steps that a group of bytes is.
const VECTORS: usize = GROUP / 4;
/// Floats of a group of bytes, scales included.
const STRIDE: usize = (VECTORS + 1) * LANES;

/// The forward map for a type; to be called with a task that has been checked.
pub(super) fn forward_of(dtype: DType) -> Forward {
    by_type!(dtype, forward)
}

/// The backward pass for a type, likewise; with dot products where the level needs them.
pub(super) fn backward_of<Q: Level>(dtype: DType) -> Backward<Q>
where
    Neon: Vectors<Q>,
{
    by_type!(dtype, backward, Q)
}

/// # Safety
/// As for [`blocks::forward`].
unsafe fn forward<S: Source>(task: &LinearTask<'_>, x: &Rounded<'_, i16>, scratch: &mut Scratch) {
    // SAFETY: the caller's promise.
    unsafe { blocks::forward::<S, Neon>(task, x, scratch) }
}

/// # Safety
/// As for [`blocks::backward`].
unsafe fn backward<S: Source, Q: Level>(task: &RoundedBackwardTask<'_, Rounded<'_, Q>>, scratch: &mut Scratch)
where
    Neon: Vectors<Q>,
{
    // SAFETY: the caller's promise.
    unsafe { blocks::backward::<S, Q, Neon>(task, scratch) }
}

/// The kernels of both levels.
pub(super) struct Neon;

impl Vectors<i16> for Neon {
    const SLABS: usize = 1;

    #[inline(never)]
    unsafe fn fix(slab: *mut f32, steps: usize) {
        let (words, groups) = (slab.cast::<i16>(), steps.div_ceil(GROUP));
        // SAFETY: steps of 16 values; one is read before it is written over.
        unsafe {
            let scales = scales_of::<i16>(slab, steps);
            for i in 0..steps {
                let int = scales.round(slab.add(LANES * i));
                for h in 0..2 {
                    let eight = vcombine_s16(vmovn_s32(int[2 * h]), vmovn_s32(int[2 * h + 1]));
                    vst1q_s16(words.add(LANES * i + 8 * h), eight);
                }
            }
            words.add(LANES * steps).write_bytes(0, LANES * (groups * GROUP - steps));
            scales.store(slab.add(scales_at(groups)));
        }
    }

    #[inline(never)]
    unsafe fn multiply(slabs: Slabs, x: Rows<i16>, to: Target) {
        for t in (0..x.tokens).step_by(TILE) {
            let (x, to) = (x.from(t, TILE.min(x.tokens - t)), to.from(t));
            // SAFETY: the caller's promise.
            unsafe {
                match x.tokens {
                    1 => words::<1>(slabs, x, to),
                    2 => words::<2>(slabs, x, to),
                    3 => words::<3>(slabs, x, to),
                    _ => words::<4>(slabs, x, to),
                }
            }
        }
    }
}

impl Vectors<u8> for Neon {
    const SLABS: usize = 1;

    #[inline(never)]
    unsafe fn fix(slab: *mut f32, steps: usize) {
        for g in 0..steps.div_ceil(GROUP) {
            let some = (steps - g * GROUP).min(GROUP);
            // SAFETY: whole groups have room. What is written lies before what is read later: of the group by vectors, four
            // steps each, and between groups, since a rounded one is smaller.
            unsafe {
                let (from, to) = (slab.add(g * GROUP * LANES).cast_const(), slab.add(g * STRIDE));
                let scales = scales_of::<u8>(from, some);
                for v in 0..VECTORS {
                    let mut int = [[vdupq_n_s32(0); 4]; 4];
                    for (i, int) in int.iter_mut().enumerate().take(some.saturating_sub(4 * v)) {
                        *int = scales.round(from.add(LANES * (4 * v + i)));
                    }
                    for h in 0..4 {
                        let low = vsliq_n_s32::<8>(int[0][h], int[1][h]);
                        let packed = vsliq_n_s32::<24>(vsliq_n_s32::<16>(low, int[2][h]), int[3][h]);
                        vst1q_s32(to.add(LANES * v + 4 * h).cast(), packed);
                    }
                }
                scales.store(to.add(LANES * VECTORS));
            }
        }
    }

    #[target_feature(enable = "dotprod")]
    #[inline(never)]
    unsafe fn multiply(slabs: Slabs, x: Rows<u8>, to: Target) {
        for t in (0..x.tokens).step_by(TILE) {
            let (x, to) = (x.from(t, TILE.min(x.tokens - t)), to.from(t));
            // SAFETY: the caller's promise.
            unsafe {
                match x.tokens {
                    1 => bytes::<1>(slabs, x, to),
                    2 => bytes::<2>(slabs, x, to),
                    3 => bytes::<3>(slabs, x, to),
                    _ => bytes::<4>(slabs, x, to),
                }
            }
        }
    }
}

/// T tokens × 16 lanes of words.
///
/// # Safety
/// As for [`Vectors::multiply`], with T rows of activations and one slab.
#[inline(always)]
unsafe fn words<const T: usize>(slab: Slabs, x: Rows<i16>, to: Target) {
    // SAFETY: by the contract.
    unsafe {
        let mut acc = [[zero(); 2]; T];
        let mut w = slab.at.cast::<i16>();
        for g in 0..slab.groups {
            let mut sums = [[vdupq_n_s32(0); 4]; T];
            for s in (0..GROUP).step_by(8) {
                let mut q = [vdupq_n_s16(0); T];
                for t in 0..T {
                    q[t] = vld1q_s16(x.q.add((t * x.row + g) * GROUP + s));
                }
                macro_rules! step {
                    ($lane:literal) => {
                        let (a, b) = (vld1q_s16(w.add(LANES * $lane)), vld1q_s16(w.add(LANES * $lane + 8)));
                        for t in 0..T {
                            sums[t] = [
                                vmlal_laneq_s16::<$lane>(sums[t][0], vget_low_s16(a), q[t]),
                                vmlal_high_laneq_s16::<$lane>(sums[t][1], a, q[t]),
                                vmlal_laneq_s16::<$lane>(sums[t][2], vget_low_s16(b), q[t]),
                                vmlal_high_laneq_s16::<$lane>(sums[t][3], b, q[t]),
                            ];
                        }
                    };
                }
                step!(0);
                step!(1);
                step!(2);
                step!(3);
                step!(4);
                step!(5);
                step!(6);
                step!(7);
                w = w.add(8 * LANES);
            }
            for t in 0..T {
                let d = splat(*x.d.add(t * x.row + g));
                for h in 0..2 {
                    acc[t][h] = fma(floats(sums[t], h), d, acc[t][h]);
                }
            }
        }
        let scales = slab.at.add(scales_at(slab.groups));
        let scales = [load(scales), load(scales.add(8))];
        for t in 0..T {
            to.write(t, acc[t], scales);
        }
    }
}

/// T tokens × 16 lanes of bytes.
///
/// # Safety
/// As for [`Vectors::multiply`], with T rows of activations and one slab.
#[inline(always)]
unsafe fn bytes<const T: usize>(slab: Slabs, x: Rows<u8>, to: Target) {
    // SAFETY: by the contract.
    unsafe {
        let mut acc = [[zero(); 2]; T];
        let mut w = slab.at;
        for g in 0..slab.groups {
            let mut sums = [[vdupq_n_s32(0); 4]; T];
            for s in (0..GROUP).step_by(16) {
                let mut q = [vdupq_n_s8(0); T];
                for t in 0..T {
                    let biased = vld1q_u8(x.q.add((t * x.row + g) * GROUP + s));
                    q[t] = vreinterpretq_s8_u8(veorq_u8(biased, vdupq_n_u8(128)));
                }
                macro_rules! step {
                    ($lane:literal) => {
                        for h in 0..4 {
                            let weights = vld1q_s8(w.add(LANES * $lane + 4 * h).cast());
                            for t in 0..T {
                                sums[t][h] = Sdot::dot_lane::<$lane>(sums[t][h], weights, q[t]);
                            }
                        }
                    };
                }
                step!(0);
                step!(1);
                step!(2);
                step!(3);
                w = w.add(4 * LANES);
            }
            let scales = [load(w), load(w.add(8))];
            w = w.add(LANES);
            for t in 0..T {
                let d = splat(*x.d.add(t * x.row + g));
                for h in 0..2 {
                    acc[t][h] = fma(floats(sums[t], h), mul(scales[h], d), acc[t][h]);
                }
            }
        }
        for t in 0..T {
            to.write(t, acc[t], [splat(1.0); 2]);
        }
    }
}

/// One half of sixteen sums as f32.
#[inline(always)]
fn floats(sums: [int32x4_t; 4], half: usize) -> F32x8 {
    // SAFETY: registers only, and NEON is part of the target.
    unsafe { [vcvtq_f32_s32(sums[2 * half]), vcvtq_f32_s32(sums[2 * half + 1])] }
}

/// Scales of sixteen lanes.
struct Scales {
    /// What a rounded value is to be multiplied with.
    scale: [float32x4_t; 4],
    /// What a value is multiplied with to be rounded.
    inverse: [float32x4_t; 4],
    /// The lanes of which anything is to be multiplied: those of finite values that are not all tiny.
    keep: [uint32x4_t; 4],
}

impl Scales {
    /// Sixteen values as integers.
    ///
    /// # Safety
    /// They must be readable.
    #[inline(always)]
    unsafe fn round(&self, from: *const f32) -> [int32x4_t; 4] {
        // SAFETY: the caller's promise. Nothing of a NaN may be multiplied, not even by zero.
        unsafe {
            let mut int = [vdupq_n_s32(0); 4];
            for h in 0..4 {
                let kept = masked(vld1q_f32(from.add(4 * h)), self.keep[h]);
                int[h] = vcvtnq_s32_f32(vmulq_f32(kept, self.inverse[h]));
            }
            int
        }
    }

    /// Writes the scales.
    ///
    /// # Safety
    /// Sixteen values must be writable.
    #[inline(always)]
    unsafe fn store(&self, to: *mut f32) {
        for h in 0..4 {
            // SAFETY: the caller's promise.
            unsafe { vst1q_f32(to.add(4 * h), self.scale[h]) };
        }
    }
}

/// Scales by which the largest of each lane's `steps` values becomes a level's most.
///
/// # Safety
/// The values must be readable: `steps` times sixteen.
#[inline(always)]
unsafe fn scales_of<Q: Level>(from: *const f32, steps: usize) -> Scales {
    // SAFETY: the caller's promise.
    unsafe {
        let mut top = [vdupq_n_u32(0); 4];
        for i in 0..steps {
            for h in 0..4 {
                top[h] = vmaxq_u32(top[h], size_of_bits(vld1q_f32(from.add(LANES * i + 4 * h))));
            }
        }
        let none = [vdupq_n_f32(0.0); 4];
        let mut scales = Scales { scale: none, inverse: none, keep: top };
        for h in 0..4 {
            let (most, to) = (vreinterpretq_f32_u32(top[h]), vdupq_n_f32(Q::MOST_WEIGHT));
            let infinite = vcgtq_u32(top[h], vdupq_n_u32(0x7f7f_ffff));
            let tiny = vcltq_f32(most, vdupq_n_f32(SMALLEST));
            let keep = vmvnq_u32(vorrq_u32(infinite, tiny));
            scales.keep[h] = keep;
            scales.inverse[h] = masked(vdivq_f32(to, most), keep);
            scales.scale[h] = vbslq_f32(infinite, vdupq_n_f32(f32::NAN), masked(vdivq_f32(most, to), keep));
        }
        scales
    }
}

/// Absolute values as bits, which compare as they do, with infinities and NaNs on top.
#[inline(always)]
fn size_of_bits(v: float32x4_t) -> uint32x4_t {
    // SAFETY: registers only, and NEON is part of the target.
    unsafe { vreinterpretq_u32_f32(vabsq_f32(v)) }
}

/// The lanes of a mask, others zero.
#[inline(always)]
fn masked(v: float32x4_t, keep: uint32x4_t) -> float32x4_t {
    // SAFETY: registers only, and NEON is part of the target.
    unsafe { vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), keep)) }
}

/// One group of activations, and its scale.
///
/// # Safety
/// `q` has room for a group.
pub(super) unsafe fn round_group<Q: Level>(x: &[f32; GROUP], q: *mut Q) -> f32 {
    // SAFETY: whole groups in both.
    unsafe {
        let mut v = [vdupq_n_f32(0.0); GROUP / 4];
        let mut top = vdupq_n_u32(0);
        for (i, v) in v.iter_mut().enumerate() {
            *v = vld1q_f32(x.as_ptr().add(4 * i));
            top = vmaxq_u32(top, size_of_bits(*v));
        }
        let (scale, inverse) = scale_of_most(f32::from_bits(vmaxvq_u32(top)), Q::MOST);
        let mut int = [vdupq_n_s32(0); GROUP / 4];
        // Nothing of a NaN may be multiplied, not even by zero.
        if inverse > 0.0 {
            for (int, v) in int.iter_mut().zip(v) {
                *int = vcvtnq_s32_f32(vmulq_n_f32(v, inverse));
            }
        }
        Q::pack(int, q);
        scale
    }
}

/// How a level's activations lie.
pub trait Pack: Copy {
    /// Packs the rounded activations of a group.
    ///
    /// # Safety
    /// `to` has room for them.
    unsafe fn pack(group: [int32x4_t; GROUP / 4], to: *mut Self);
}

impl Pack for i16 {
    #[inline(always)]
    unsafe fn pack(group: [int32x4_t; GROUP / 4], to: *mut i16) {
        for h in 0..GROUP / 8 {
            // SAFETY: the caller's promise.
            unsafe { vst1q_s16(to.add(8 * h), eight(group, h)) };
        }
    }
}

impl Pack for u8 {
    #[inline(always)]
    unsafe fn pack(group: [int32x4_t; GROUP / 4], to: *mut u8) {
        for h in 0..GROUP / 16 {
            // SAFETY: the caller's promise.
            unsafe {
                let bytes = vcombine_s8(vmovn_s16(eight(group, 2 * h)), vmovn_s16(eight(group, 2 * h + 1)));
                vst1q_u8(to.add(16 * h), veorq_u8(vreinterpretq_u8_s8(bytes), vdupq_n_u8(128)));
            }
        }
    }
}

/// Eight of a group's integers as words.
#[inline(always)]
fn eight(group: [int32x4_t; GROUP / 4], at: usize) -> int16x8_t {
    // SAFETY: registers only, and NEON is part of the target.
    unsafe { vcombine_s16(vmovn_s32(group[2 * at]), vmovn_s32(group[2 * at + 1])) }
}
