//! Many tokens: rows are unpacked once, eight at a time, into scratch that stays in the first cache, and multiplied there
//! with all tokens, up to four in a register tile. One micro-kernel for dot products serves every type, and one for `smmla`;
//! they differ in how the bytes of a tile lie and in nothing that is computed.
//!
//! | kernel | bytes | a vector is |
//! | --- | --- | --- |
//! | [`DotTile`] | `q[k/4][row][4]` | four rows, against four bytes of a token in all lanes |
//! | [`MatrixTile`] | `q[k/8][row][8]` | two rows, against eight bytes of two tokens |
//!
//! Scales and minima are `[group][row]`. Rows are lanes: no sum crosses them, so a row's result does not depend on its
//! neighbours.

// Registers are numbered: `for t in 0..T` says what happens better than zipped iterators do.
#![allow(clippy::needless_range_loop)]

use super::super::tile::{Ahead, Place, Tile, TileMemory, XRow};
use super::dot::{Dot, smmla};
use super::unpack::Block;
use std::arch::aarch64::*;
use std::marker::PhantomData;

/// Rows of a tile: two vectors of sums for each token.
const ROWS: usize = 8;
/// Tokens of a register tile: with their integer sums, eight rows' sums are sixteen of the thirty-two registers.
const TOKENS: usize = 4;

/// The sums of `T` tokens and eight rows.
type Sums<V, const T: usize> = [[V; 2]; T];

/// How the bytes of a tile lie, and the integer products with them.
pub(super) trait Layout {
    /// Puts sixteen values of each row, from value `at` of the tile on, in their places.
    ///
    /// # Safety
    /// `to` is a tile's bytes and has the place.
    unsafe fn store(rows: [int8x16_t; ROWS], to: *mut i8, at: usize);

    /// The products of sixteen values from `at` on, added to `sums`, whose order is this layout's own.
    ///
    /// # Safety
    /// The caller has the instructions; `tile` and tokens have the values.
    unsafe fn multiply<const T: usize>(tile: *const i8, at: usize, x: &[*const i8; T], sums: &mut Sums<int32x4_t, T>);

    /// The sums as `[token][row]`.
    ///
    /// # Safety
    /// None beyond NEON.
    unsafe fn ordered<const T: usize>(sums: Sums<int32x4_t, T>) -> Sums<int32x4_t, T>;
}

/// Four vectors of four 32-bit lanes, turned.
#[target_feature(enable = "neon")]
#[inline]
fn transpose(rows: [int8x16_t; 4]) -> [int8x16_t; 4] {
    let [a, b, c, d] = rows.map(|v| vreinterpretq_s32_s8(v));
    let pairs = [vtrn1q_s32(a, b), vtrn2q_s32(a, b), vtrn1q_s32(c, d), vtrn2q_s32(c, d)];
    let [a, b, c, d] = pairs.map(|v| vreinterpretq_s64_s32(v));
    [vtrn1q_s64(a, c), vtrn1q_s64(b, d), vtrn2q_s64(a, c), vtrn2q_s64(b, d)].map(|v| vreinterpretq_s8_s64(v))
}

/// For [`Dot`] products.
pub(super) struct DotTile<D>(PhantomData<D>);

impl<D: Dot> Layout for DotTile<D> {
    #[inline(always)]
    unsafe fn store(rows: [int8x16_t; ROWS], to: *mut i8, at: usize) {
        // SAFETY: within the sixteen values' place, by the contract.
        unsafe {
            for h in 0..2 {
                let turned = transpose([rows[4 * h], rows[4 * h + 1], rows[4 * h + 2], rows[4 * h + 3]]);
                for (i, v) in turned.into_iter().enumerate() {
                    vst1q_s8(to.add((at + 4 * i) * ROWS + 16 * h), v);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply<const T: usize>(tile: *const i8, at: usize, x: &[*const i8; T], sums: &mut Sums<int32x4_t, T>) {
        // SAFETY: by the contract.
        unsafe {
            let mut q = [vdupq_n_s8(0); T];
            for t in 0..T {
                q[t] = vld1q_s8(x[t].add(at));
            }
            let tile = tile.add(at * ROWS);
            macro_rules! step {
                ($lane:literal) => {
                    let w = [vld1q_s8(tile.add(4 * $lane * ROWS)), vld1q_s8(tile.add(4 * $lane * ROWS + 16))];
                    for t in 0..T {
                        for h in 0..2 {
                            sums[t][h] = D::dot_lane::<$lane>(sums[t][h], w[h], q[t]);
                        }
                    }
                };
            }
            step!(0);
            step!(1);
            step!(2);
            step!(3);
        }
    }

    #[inline(always)]
    unsafe fn ordered<const T: usize>(sums: Sums<int32x4_t, T>) -> Sums<int32x4_t, T> {
        sums
    }
}

/// For `smmla`. Two tokens' sums are kept as `[row pair][2][2]`; a token without a partner is its own.
pub(super) struct MatrixTile;

impl Layout for MatrixTile {
    #[inline(always)]
    unsafe fn store(rows: [int8x16_t; ROWS], to: *mut i8, at: usize) {
        // SAFETY: within the sixteen values' place, by the contract.
        unsafe {
            for pair in 0..ROWS / 2 {
                let (a, b) = (vreinterpretq_s64_s8(rows[2 * pair]), vreinterpretq_s64_s8(rows[2 * pair + 1]));
                for (i, v) in [vtrn1q_s64(a, b), vtrn2q_s64(a, b)].into_iter().enumerate() {
                    vst1q_s8(to.add((at + 8 * i) * ROWS + 16 * pair), vreinterpretq_s8_s64(v));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply<const T: usize>(tile: *const i8, at: usize, x: &[*const i8; T], sums: &mut Sums<int32x4_t, T>) {
        // SAFETY: by the contract.
        unsafe {
            for i in 0..2 {
                let at = at + 8 * i;
                let tile = tile.add(at * ROWS);
                let mut w = [vdupq_n_s8(0); 4];
                for (pair, w) in w.iter_mut().enumerate() {
                    *w = vld1q_s8(tile.add(16 * pair));
                }
                for t in (0..T - T % 2).step_by(2) {
                    let q = vcombine_s8(vld1_s8(x[t].add(at)), vld1_s8(x[t + 1].add(at)));
                    for h in 0..2 {
                        sums[t][h] = smmla(sums[t][h], w[h], q);
                        sums[t + 1][h] = smmla(sums[t + 1][h], w[2 + h], q);
                    }
                }
                if T % 2 == 1 {
                    let q = vld1_s8(x[T - 1].add(at));
                    let q = vcombine_s8(q, q);
                    // Both tokens of the pair are the same, so every row's sum is there twice.
                    for h in 0..2 {
                        let (a, b) = (smmla(vdupq_n_s32(0), w[2 * h], q), smmla(vdupq_n_s32(0), w[2 * h + 1], q));
                        sums[T - 1][h] = vaddq_s32(sums[T - 1][h], vuzp1q_s32(a, b));
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn ordered<const T: usize>(mut sums: Sums<int32x4_t, T>) -> Sums<int32x4_t, T> {
        for t in (0..T - T % 2).step_by(2) {
            let [[a, b], [c, d]] = [sums[t], sums[t + 1]];
            // SAFETY: registers only.
            unsafe {
                sums[t] = [vuzp1q_s32(a, b), vuzp1q_s32(c, d)];
                sums[t + 1] = [vuzp2q_s32(a, b), vuzp2q_s32(c, d)];
            }
        }
        sums
    }
}

/// The tile kernel of a type.
pub(super) struct NeonTile<B, L>(PhantomData<(B, L)>);

impl<B: Block, L: Layout> Tile for NeonTile<B, L> {
    const ROWS: usize = ROWS;
    const TOKENS: usize = TOKENS;
    const UNIT_BYTES: usize = B::BYTES;

    #[inline(always)]
    unsafe fn unpack(units: &[*const u8], groups: usize, tile: &TileMemory, ahead: &mut Ahead<'_>) {
        let wide = if B::HALVES { 2 } else { 1 };
        // SAFETY: by the contract; tile rows are ROWS wide.
        unsafe {
            for unit in 0..groups.div_ceil(8) {
                let n = (groups - 8 * unit).min(8);
                let p: [*const u8; ROWS] = std::array::from_fn(|i| units[i].add(unit * B::BYTES));
                for g in 0..n {
                    ahead.step();
                    let mut halves = [[vdupq_n_s8(0); ROWS]; 2];
                    for i in 0..ROWS {
                        [halves[0][i], halves[1][i]] = B::group(p[i], g);
                    }
                    for (h, rows) in halves.into_iter().enumerate() {
                        L::store(rows, tile.q.cast(), (8 * unit + g) * 32 + 16 * h);
                    }
                }
                let (mut d, mut m) = ([0.0; 16], [0.0; 16]);
                for (i, p) in p.into_iter().enumerate() {
                    B::scales(p, n, &mut d, &mut m);
                    for at in 0..wide * n {
                        let to = (wide * 8 * unit + at) * ROWS + i;
                        *tile.d.add(to) = d[at];
                        if B::MINIMA {
                            *tile.m.add(to) = m[at];
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn multiply(tile: &TileMemory, groups: usize, x: &[XRow], sums: Place, _: &mut Ahead<'_>) {
        // SAFETY: the caller's contract.
        unsafe {
            match *x {
                [a, b, c, d] => add::<B, L, 4>(tile, groups, &[a, b, c, d], sums),
                [a, b, c] => add::<B, L, 3>(tile, groups, &[a, b, c], sums),
                [a, b] => add::<B, L, 2>(tile, groups, &[a, b], sums),
                [a] => add::<B, L, 1>(tile, groups, &[a], sums),
                _ => {}
            }
        }
    }
}

/// [`Tile::multiply`] for `T` tokens.
#[inline(always)]
unsafe fn add<B: Block, L: Layout, const T: usize>(tile: &TileMemory, groups: usize, x: &[XRow; T], sums: Place) {
    // SAFETY: by `Tile::multiply`'s contract.
    unsafe {
        let mut acc = [[vdupq_n_f32(0.0); 2]; T];
        if !sums.before.is_null() {
            for t in 0..T {
                for h in 0..2 {
                    acc[t][h] = vld1q_f32(sums.before.add(ROWS * t + 4 * h));
                }
            }
        }
        if B::MINIMA {
            minima::<B, T>(tile, groups, x, &mut acc);
        }
        micro::<B, L, T>(tile, groups, x, &mut acc);
        for t in 0..T {
            for h in 0..2 {
                let at = sums.to.add(sums.stride * t + 4 * h);
                let sum = acc[t][h];
                vst1q_f32(at, if sums.add { vaddq_f32(vld1q_f32(at), sum) } else { sum });
            }
        }
    }
}

/// `T` tokens times the tile's eight rows over `groups` groups of 32, added to `acc`.
///
/// # Safety
/// The caller has what `L` needs; the tile holds `groups` groups; `x` points at the tokens' first value of the chunk.
#[inline(always)]
unsafe fn micro<B: Block, L: Layout, const T: usize>(
    tile: &TileMemory,
    groups: usize,
    x: &[XRow; T],
    acc: &mut Sums<float32x4_t, T>,
) {
    let wide = if B::HALVES { 2 } else { 1 };
    // SAFETY: by the contract.
    unsafe {
        let mut q = [std::ptr::null(); T];
        for t in 0..T {
            q[t] = x[t].q;
        }
        for at in 0..groups * wide {
            let mut sums = [[vdupq_n_s32(0); 2]; T];
            for half in 0..2 / wide {
                L::multiply(tile.q.cast_const().cast(), 32 / wide * at + 16 * half, &q, &mut sums);
            }
            let sums = L::ordered(sums);
            for h in 0..2 {
                let d = vld1q_f32(tile.d.add(at * ROWS + 4 * h));
                for t in 0..T {
                    let scale = vmulq_n_f32(d, *x[t].d.add(at / wide));
                    acc[t][h] = vfmaq_f32(acc[t][h], vcvtq_f32_s32(sums[t][h]), scale);
                }
            }
        }
    }
}

/// The minima's share, `Σ m·sₓ` over the chunk, added to `acc`.
///
/// # Safety
/// As for [`micro`].
#[inline(always)]
unsafe fn minima<B: Block, const T: usize>(
    tile: &TileMemory,
    groups: usize,
    x: &[XRow; T],
    acc: &mut Sums<float32x4_t, T>,
) {
    // SAFETY: by the contract.
    unsafe {
        for at in 0..if B::HALVES { 2 * groups } else { groups } {
            for h in 0..2 {
                let m = vld1q_f32(tile.m.add(at * ROWS + 4 * h));
                for t in 0..T {
                    let s = if B::HALVES { x[t].s16 } else { x[t].s };
                    acc[t][h] = vfmaq_n_f32(acc[t][h], m, *s.add(at));
                }
            }
        }
    }
}
