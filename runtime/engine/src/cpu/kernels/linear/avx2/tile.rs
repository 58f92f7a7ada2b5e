//! Many tokens: rows are unpacked once, 16 at a time and `CHUNK` values long, into scratch that stays in the first
//! cache, and multiplied there with all tokens. One micro-kernel serves every type.
//!
//! The tile lies as the products want it: `q[k/4][row][4]`, so that a vector of 8 rows times 4 broadcast activation
//! bytes gives 8 row sums at once, and `d`, `m` as `[group][row]`. Products of up to 6-bit weights are added in 16
//! bits as long as they fit, then widened; per group one conversion, then `d·dₓ` and `m·sₓ` in f32. Rows are lanes:
//! no sum crosses them, so a row's result does not depend on its neighbours.

// Registers are numbered: `for r in 0..R` says what happens better than zipped iterators do.
#![allow(clippy::needless_range_loop)]

use super::super::tile::{Ahead, Place, Tile, TileMemory, XRow};
use super::unpack::Block;
use std::arch::x86_64::*;

/// Rows of an AVX2 tile: two vectors of eight lanes.
const ROWS: usize = 16;

/// Unpacks `groups` groups of `ROWS` rows from their unit pointers.
///
/// # Safety
/// The caller has AVX2, FMA, F16C; the pointers are good for the groups asked for; the tile has room.
#[inline(always)]
unsafe fn unpack<B: Block, const ROWS: usize>(
    units: &[*const u8],
    groups: usize,
    tile: &TileMemory,
    ahead: &mut Ahead<'_>,
) {
    // SAFETY: by the contract; tile rows are ROWS wide.
    unsafe {
        for unit in 0..groups.div_ceil(8) {
            let n = (groups - 8 * unit).min(8);
            for h in 0..ROWS / 8 {
                let p: [*const u8; 8] = std::array::from_fn(|i| units[8 * h + i].add(unit * B::BYTES));
                for g in 0..n {
                    let mut v = [_mm256_setzero_si256(); 8];
                    for i in 0..8 {
                        v[i] = B::group(p[i], g);
                    }
                    ahead.step();
                    let v = transpose(v);
                    let to = tile.q.add(((8 * unit + g) * 8 * ROWS + 8 * h) * 4);
                    for i in 0..8 {
                        _mm256_storeu_si256(to.add(i * ROWS * 4).cast(), v[i]);
                    }
                }
                scales_of_eight::<B, ROWS>(&p, n, tile, unit, 8 * h, !B::SIGNED);
            }
        }
    }
}

/// Scales, and `minima` if so, of the first `n` groups of unit `unit`, of the eight rows at `p`, to rows `row ..` of the tile.
///
/// # Safety
/// As for [`unpack`].
#[inline(always)]
pub(in super::super) unsafe fn scales_of_eight<B: Block, const ROWS: usize>(
    p: &[*const u8; 8],
    n: usize,
    tile: &TileMemory,
    unit: usize,
    row: usize,
    minima: bool,
) {
    // SAFETY: by the contract; tile rows are ROWS wide.
    unsafe {
        let (mut d, mut m) = ([[_mm256_setzero_ps(); 8]; 2], [[_mm256_setzero_ps(); 8]; 2]);
        for i in 0..8 {
            let (di, mi) = B::scales(p[i], n);
            (d[0][i], d[1][i], m[0][i], m[1][i]) = (di[0], di[1], mi[0], mi[1]);
        }
        let wide = if B::HALVES { 2 } else { 1 };
        for part in 0..wide {
            let (d, m) = (transpose_ps(d[part]), transpose_ps(m[part]));
            for i in 0..8 {
                let to = ((wide * unit + part) * 8 + i) * ROWS + row;
                _mm256_storeu_ps(tile.d.add(to), d[i]);
                if minima {
                    _mm256_storeu_ps(tile.m.add(to), m[i]);
                }
            }
        }
    }
}

/// Eight rows of eight 32-bit lanes, turned.
#[inline(always)]
pub(in super::super) unsafe fn transpose(r: [__m256i; 8]) -> [__m256i; 8] {
    // SAFETY: register arithmetic.
    unsafe {
        let pair = |a, b| (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        let ((a0, a1), (a2, a3)) = (pair(r[0], r[1]), pair(r[2], r[3]));
        let ((a4, a5), (a6, a7)) = (pair(r[4], r[5]), pair(r[6], r[7]));
        let quad = |a, b| (_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
        let ((b0, b1), (b2, b3)) = (quad(a0, a2), quad(a1, a3));
        let ((b4, b5), (b6, b7)) = (quad(a4, a6), quad(a5, a7));
        let low = |a, b| _mm256_permute2x128_si256::<0x20>(a, b);
        let high = |a, b| _mm256_permute2x128_si256::<0x31>(a, b);
        [low(b0, b4), low(b1, b5), low(b2, b6), low(b3, b7), high(b0, b4), high(b1, b5), high(b2, b6), high(b3, b7)]
    }
}

#[inline(always)]
unsafe fn transpose_ps(r: [__m256; 8]) -> [__m256; 8] {
    // SAFETY: register arithmetic.
    unsafe {
        let [a, b, c, d, e, f, g, h] = r;
        let (a, b, c, d) =
            (_mm256_castps_si256(a), _mm256_castps_si256(b), _mm256_castps_si256(c), _mm256_castps_si256(d));
        let (e, f, g, h) =
            (_mm256_castps_si256(e), _mm256_castps_si256(f), _mm256_castps_si256(g), _mm256_castps_si256(h));
        let ints = transpose([a, b, c, d, e, f, g, h]);
        let mut out = r;
        for (out, int) in out.iter_mut().zip(ints) {
            *out = _mm256_castsi256_ps(int);
        }
        out
    }
}

/// `T` tokens times the tile's 16 rows over `groups` groups of 32, added to `acc`.
///
/// The inner loop counts to a number the compiler cannot see: unrolled, it is reordered token by token and drowns in
/// spills. As it stands, its 8 sums, 2 weights and a broadcast stay in registers.
///
/// # Safety
/// The caller has AVX2 and FMA; the tile holds `groups` groups; `x` points at the tokens' first value of the chunk.
#[inline(always)]
pub(crate) unsafe fn micro<B: Block, const T: usize>(
    tile: &TileMemory,
    groups: usize,
    x: &[XRow; T],
    acc: &mut [[__m256; 2]; T],
    ahead: &mut Ahead<'_>,
) {
    let wide = if B::HALVES { 2 } else { 1 };
    let steps = 8 / wide;
    let rounds = steps / B::RUN.min(steps);
    let run = std::hint::black_box(if B::SIGNED { steps } else { B::RUN.min(steps) });
    // SAFETY: by the contract.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        let mut w = tile.q.cast::<__m256i>().cast_const();
        // The bytes of token `t` in the step at `offset`, in every lane.
        let bytes = |t: usize, offset: usize| _mm256_set1_epi32(x[t].q.add(offset).cast::<i32>().read_unaligned());
        for at in 0..groups * wide {
            ahead.step();
            let g = at / wide;
            let mut offset = 32 / wide * at;
            let mut sums = [[_mm256_setzero_si256(); 2]; T];
            if B::SIGNED {
                for _ in 0..run {
                    let (w0, w1) = (_mm256_load_si256(w), _mm256_load_si256(w.add(1)));
                    let (a0, a1) = (_mm256_abs_epi8(w0), _mm256_abs_epi8(w1));
                    for (t, sums) in sums.iter_mut().enumerate() {
                        let q = bytes(t, offset);
                        let p0 = _mm256_maddubs_epi16(a0, _mm256_sign_epi8(q, w0));
                        let p1 = _mm256_maddubs_epi16(a1, _mm256_sign_epi8(q, w1));
                        sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(p0, ones));
                        sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(p1, ones));
                    }
                    (w, offset) = (w.add(2), offset + 4);
                }
            } else {
                for round in 0..rounds {
                    let mut short = [[_mm256_setzero_si256(); 2]; T];
                    for _ in 0..run {
                        let (w0, w1) = (_mm256_load_si256(w), _mm256_load_si256(w.add(1)));
                        for (t, short) in short.iter_mut().enumerate() {
                            let q = bytes(t, offset);
                            short[0] = _mm256_add_epi16(short[0], _mm256_maddubs_epi16(w0, q));
                            short[1] = _mm256_add_epi16(short[1], _mm256_maddubs_epi16(w1, q));
                        }
                        (w, offset) = (w.add(2), offset + 4);
                    }
                    for (sums, short) in sums.iter_mut().zip(&short) {
                        for (sum, short) in sums.iter_mut().zip(short) {
                            let long = _mm256_madd_epi16(*short, ones);
                            *sum = if round == 0 { long } else { _mm256_add_epi32(*sum, long) };
                        }
                    }
                }
            }
            for h in 0..2 {
                let d = _mm256_load_ps(tile.d.add(at * ROWS + 8 * h));
                for t in 0..T {
                    let scale = _mm256_mul_ps(d, _mm256_broadcast_ss(&*x[t].d.add(g)));
                    acc[t][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[t][h]), scale, acc[t][h]);
                }
            }
        }
    }
}

/// The minima's share, `Σ m·sₓ` over the chunk, added to `acc`. A loop of its own: between the integer products a
/// fused multiply-add takes three times as long, for it competes with them for the same pipes.
///
/// # Safety
/// As for [`micro`].
#[inline(always)]
unsafe fn minima<B: Block, const T: usize>(
    tile: &TileMemory,
    groups: usize,
    x: &[XRow; T],
    acc: &mut [[__m256; 2]; T],
) {
    // SAFETY: by the contract.
    unsafe {
        for at in 0..if B::HALVES { 2 * groups } else { groups } {
            let (m0, m1) = (_mm256_load_ps(tile.m.add(at * ROWS)), _mm256_load_ps(tile.m.add(at * ROWS + 8)));
            for (x, acc) in x.iter().zip(acc.iter_mut()) {
                let s = _mm256_broadcast_ss(&*if B::HALVES { x.s16 } else { x.s }.add(at));
                acc[0] = _mm256_fmadd_ps(m0, s, acc[0]);
                acc[1] = _mm256_fmadd_ps(m1, s, acc[1]);
            }
        }
    }
}

/// The AVX2 tile kernel of a type.
pub(crate) struct Avx2Tile<B>(std::marker::PhantomData<B>);

impl<B: Block> Tile for Avx2Tile<B> {
    const ROWS: usize = ROWS;
    const TOKENS: usize = 4;
    const UNIT_BYTES: usize = B::BYTES;

    #[inline(always)]
    unsafe fn unpack(units: &[*const u8], groups: usize, tile: &TileMemory, ahead: &mut Ahead<'_>) {
        // SAFETY: the caller's contract.
        unsafe { unpack::<B, ROWS>(units, groups, tile, ahead) }
    }

    #[inline(always)]
    unsafe fn multiply(tile: &TileMemory, groups: usize, x: &[XRow], sums: Place, ahead: &mut Ahead<'_>) {
        // SAFETY: the caller's contract.
        unsafe {
            match *x {
                [a, b, c, d] => add::<B, 4>(tile, groups, &[a, b, c, d], sums, ahead),
                [a, b, c] => add::<B, 3>(tile, groups, &[a, b, c], sums, ahead),
                [a, b] => add::<B, 2>(tile, groups, &[a, b], sums, ahead),
                [a] => add::<B, 1>(tile, groups, &[a], sums, ahead),
                _ => {}
            }
        }
    }
}

/// `micro` on sums in memory.
#[inline(always)]
unsafe fn add<B: Block, const T: usize>(
    tile: &TileMemory,
    groups: usize,
    x: &[XRow; T],
    sums: Place,
    ahead: &mut Ahead<'_>,
) {
    // SAFETY: by `Tile::multiply`'s contract.
    unsafe {
        let mut acc = [[_mm256_setzero_ps(); 2]; T];
        if !sums.before.is_null() {
            for t in 0..T {
                for h in 0..2 {
                    acc[t][h] = _mm256_load_ps(sums.before.add(ROWS * t + 8 * h));
                }
            }
        }
        if !B::SIGNED {
            minima::<B, T>(tile, groups, x, &mut acc);
        }
        micro::<B, T>(tile, groups, x, &mut acc, ahead);
        for t in 0..T {
            for h in 0..2 {
                let at = sums.to.add(sums.stride * t + 8 * h);
                let sum = acc[t][h];
                _mm256_storeu_ps(at, if sums.add { _mm256_add_ps(_mm256_loadu_ps(at), sum) } else { sum });
            }
        }
    }
}
