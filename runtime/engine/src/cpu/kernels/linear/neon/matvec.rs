//! One to four tokens against rows read straight from their blocks: the shape of decoding, bound by memory.
//!
//! As on AVX2: a unit of 256 weights at a time, its scales multiplied by the activations' at once and kept in memory; then
//! eight times 32 bytes are unpacked, multiplied with the tokens' bytes, and added under their scale.

// Registers are numbered: `for t in 0..T` says what happens better than zipped iterators do.
#![allow(clippy::needless_range_loop)]

use super::super::tile::XRow;
use super::dot::Dot;
use super::unpack::Block;
use std::arch::aarch64::*;

/// Partial sums of a row and token, so that additions wait less for each other.
const PARTS: usize = 2;

/// Rows `rows` of the matrix at `weight` times `T` tokens: `write(t, row, value)`.
///
/// # Safety
/// The caller has what `D` needs; every row is `row_bytes` of whole blocks for `k` values; `x` points at rows of `k` values
/// with padded scales.
#[inline(always)]
pub(super) unsafe fn matvec<B: Block, D: Dot, const T: usize>(
    weight: *const u8,
    row_bytes: usize,
    k: usize,
    rows: std::ops::Range<usize>,
    x: [XRow; T],
    mut write: impl FnMut(usize, usize, f32),
) {
    for row in rows {
        // SAFETY: the row lies in the matrix; units and their tail stay within it.
        unsafe {
            let mut p = weight.add(row * row_bytes);
            let mut sums = [[vdupq_n_f32(0.0); PARTS]; T];
            for u in 0..k / 256 {
                unit::<B, D, T>(p, u, 8, &x, &mut sums);
                p = p.add(B::BYTES);
            }
            if !k.is_multiple_of(256) {
                unit::<B, D, T>(p, k / 256, k % 256 / 32, &x, &mut sums);
            }
            for (t, [a, b]) in sums.iter().enumerate() {
                write(t, row, vaddvq_f32(vaddq_f32(*a, *b)));
            }
        }
    }
}

/// Unit `u` of a row, which lies at `p` and has `groups` groups.
#[inline(always)]
unsafe fn unit<B: Block, D: Dot, const T: usize>(
    p: *const u8,
    u: usize,
    groups: usize,
    x: &[XRow; T],
    sums: &mut [[float32x4_t; PARTS]; T],
) {
    // SAFETY: by `matvec`'s contract; activation scales are padded to a multiple of eight.
    unsafe {
        let (mut d, mut m) = ([0.0; 16], [0.0; 16]);
        B::scales(p, groups, &mut d, &mut m);
        let mut products = [[0.0f32; 16]; T];
        for t in 0..T {
            for half in 0..2 {
                let dx = vld1q_f32(x[t].d.add(8 * u + 4 * half));
                let mut scale = |at: usize, dx| {
                    vst1q_f32(products[t].as_mut_ptr().add(at), vmulq_f32(vld1q_f32(d.as_ptr().add(at)), dx));
                };
                if B::HALVES {
                    scale(8 * half, vzip1q_f32(dx, dx));
                    scale(8 * half + 4, vzip2q_f32(dx, dx));
                } else {
                    scale(4 * half, dx);
                }
            }
            if B::MINIMA {
                let s = if B::HALVES { x[t].s16.add(16 * u) } else { x[t].s.add(8 * u) };
                for i in 0..if B::HALVES { 4 } else { 2 } {
                    let part = &mut sums[t][i % PARTS];
                    *part = vfmaq_f32(*part, vld1q_f32(m.as_ptr().add(4 * i)), vld1q_f32(s.add(4 * i)));
                }
            }
        }
        for g in 0..groups {
            let w = B::group(p, g);
            for t in 0..T {
                let q = x[t].q.add(256 * u + 32 * g);
                let q = [vld1q_s8(q), vld1q_s8(q.add(16))];
                let zero = vdupq_n_s32(0);
                if B::HALVES {
                    for h in 0..2 {
                        let dot = vcvtq_f32_s32(D::dot(zero, w[h], q[h]));
                        sums[t][h] = vfmaq_n_f32(sums[t][h], dot, products[t][2 * g + h]);
                    }
                } else {
                    let dot = vcvtq_f32_s32(D::dot(D::dot(zero, w[0], q[0]), w[1], q[1]));
                    let part = &mut sums[t][g % PARTS];
                    *part = vfmaq_n_f32(*part, dot, products[t][g]);
                }
            }
        }
    }
}
