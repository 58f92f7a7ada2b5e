//! Unpacking of tiles: the bytes of sixteen rows are turned first, by sixteen each, so that a lane of 32 bits is a row, and made
//! into weights then, 16 rows in an instruction. The other way round, as AVX2 does it, what is turned is up to twice as much, and
//! every row is unpacked by itself.

use super::super::avx2::tile::scales_of_eight;
use super::super::avx2::unpack::{self, Block};
use super::super::blocks::{IQ4, MXFP4_PLUS_12};
use super::super::tile::{Ahead, TileMemory};
use std::arch::x86_64::*;

/// Rows that are turned at a time: 32-bit lanes of a vector.
const LANES: usize = 16;

/// Units of sixteen rows.
type Units = [*const u8; LANES];

/// A group of sixteen rows: vector i holds values 4·i to 4·i + 3 of each row.
type Group = [__m512i; 8];

/// A format's bytes and scales, of sixteen rows at a time.
pub(in super::super) trait Turn: Block {
    /// Whether each group has factors of its own, which [`Turn::factors`] reads; else [`Block::scales`] reads those of a unit.
    const EACH: bool = false;

    /// Group `g`, as [`Block::group`] gives it of a row.
    ///
    /// # Safety
    /// The units have group `g`; the caller has AVX-512 F, BW, DQ, VL.
    unsafe fn group_of_rows(rows: &Units, g: usize) -> Group;

    /// Scales and minima of group `g`; for signed formats the scales alone.
    ///
    /// # Safety
    /// As for [`Turn::group_of_rows`].
    #[inline(always)]
    unsafe fn factors(_rows: &Units, _g: usize) -> (__m512, __m512) {
        // SAFETY: register arithmetic.
        unsafe { (_mm512_setzero_ps(), _mm512_setzero_ps()) }
    }
}

/// Unpacks `groups` groups of `ROWS` rows from their unit pointers; signed bytes are made unsigned by adding 128, which the
/// minimum takes off again.
///
/// # Safety
/// The caller has AVX2, FMA, F16C and AVX-512 F, BW, DQ, VL; the pointers are good for the groups asked for; the tile has room.
#[inline(always)]
pub(in super::super) unsafe fn unpack<B: Turn, const ROWS: usize>(
    units: &[*const u8],
    groups: usize,
    tile: &TileMemory,
    ahead: &mut Ahead<'_>,
) {
    // SAFETY: by the contract; tile rows are ROWS wide.
    unsafe {
        let flip = _mm512_set1_epi8(-128);
        for unit in 0..groups.div_ceil(8) {
            let n = (groups - 8 * unit).min(8);
            for row in (0..ROWS).step_by(LANES) {
                let rows: Units = std::array::from_fn(|i| units[row + i].add(unit * B::BYTES));
                for g in 0..n {
                    let at = 8 * unit + g;
                    let values = B::group_of_rows(&rows, g);
                    for (i, v) in values.into_iter().enumerate() {
                        let v = if B::SIGNED { _mm512_xor_si512(v, flip) } else { v };
                        _mm512_storeu_si512(tile.q.add(((8 * at + i) * ROWS + row) * 4).cast(), v);
                    }
                    if B::EACH {
                        let (d, m) = B::factors(&rows, g);
                        let m = if B::SIGNED { _mm512_mul_ps(d, _mm512_set1_ps(-128.0)) } else { m };
                        _mm512_storeu_ps(tile.d.add(at * ROWS + row), d);
                        _mm512_storeu_ps(tile.m.add(at * ROWS + row), m);
                    }
                    ahead.step();
                    ahead.step();
                }
                if !B::EACH {
                    for row in [row, row + 8] {
                        let rows = std::array::from_fn(|i| units[row + i].add(unit * B::BYTES));
                        scales_of_eight::<B, ROWS, true>(&rows, n, tile, unit, row);
                    }
                }
            }
        }
    }
}

/// 16 bytes at `at` of each row, lane l of vector i from row 4·l + i.
#[inline(always)]
unsafe fn lanes(rows: &Units, at: usize) -> [__m512i; 4] {
    // SAFETY: the callers' blocks hold 16 bytes at `at`.
    unsafe {
        let load = |i: usize| _mm_loadu_si128(rows[i].add(at).cast());
        let mut v = [_mm512_setzero_si512(); 4];
        for (i, v) in v.iter_mut().enumerate() {
            let pair = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(load(i)), load(4 + i));
            *v = _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(pair, load(8 + i)), load(12 + i));
        }
        v
    }
}

/// The four words of 32 bits at `at` of each row: vector i holds word i of all.
#[inline(always)]
unsafe fn words(rows: &Units, at: usize) -> [__m512i; 4] {
    // SAFETY: the callers' blocks hold 16 bytes at `at`.
    unsafe {
        let [a, b, c, d] = lanes(rows, at);
        let (low, high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (low2, high2) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(low, low2),
            _mm512_unpackhi_epi64(low, low2),
            _mm512_unpacklo_epi64(high, high2),
            _mm512_unpackhi_epi64(high, high2),
        ]
    }
}

/// The word at `at` of each row.
#[inline(always)]
unsafe fn word(rows: &Units, at: usize) -> __m512i {
    // SAFETY: the callers' blocks hold 16 bytes at `at`.
    unsafe {
        let [a, b, c, d] = lanes(rows, at);
        _mm512_unpacklo_epi64(_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d))
    }
}

/// 32 bytes at `at` of each row.
#[inline(always)]
unsafe fn bytes(rows: &Units, at: usize) -> Group {
    // SAFETY: the callers' blocks hold 32 bytes at `at`.
    unsafe {
        let ([a, b, c, d], [e, f, g, h]) = (words(rows, at), words(rows, at + 16));
        [a, b, c, d, e, f, g, h]
    }
}

/// 16 bytes at `at` of each row to 32 nibbles: the low ones first.
#[inline(always)]
unsafe fn nibbles(rows: &Units, at: usize) -> Group {
    // SAFETY: the callers' blocks hold 16 bytes at `at`.
    unsafe {
        let [a, b, c, d] = words(rows, at);
        let [e, f, g, h] = [a, b, c, d];
        let low = field([a, b, c, d, e, f, g, h], 0, 15);
        let high = field([a, b, c, d, e, f, g, h], 4, 15);
        [low[0], low[1], low[2], low[3], high[4], high[5], high[6], high[7]]
    }
}

/// Bits `shift ..` of every byte under `mask`.
#[inline(always)]
unsafe fn field(mut v: Group, shift: usize, mask: i8) -> Group {
    // SAFETY: register arithmetic.
    unsafe {
        for v in &mut v {
            let moved = if shift == 0 { *v } else { _mm512_srl_epi16(*v, _mm_cvtsi32_si128(shift as i32)) };
            *v = _mm512_and_si512(moved, _mm512_set1_epi8(mask));
        }
        v
    }
}

/// Adds `1 << to` to every byte of `v` where bit `bit` of the byte of `from` is set.
#[inline(always)]
unsafe fn add_bit(mut v: Group, from: Group, bit: usize, to: usize) -> Group {
    // SAFETY: register arithmetic.
    unsafe {
        for (v, from) in v.iter_mut().zip(from) {
            let set = _mm512_test_epi8_mask(from, _mm512_set1_epi8((1u8 << bit) as i8));
            *v = _mm512_mask_add_epi8(*v, set, *v, _mm512_set1_epi8(1 << to));
        }
        v
    }
}

/// Adds 16 to the values whose bit is set in the word at `at` of their row.
#[inline(always)]
unsafe fn fifth(mut v: Group, rows: &Units, at: usize) -> Group {
    // SAFETY: the callers' blocks hold 16 bytes at `at`.
    unsafe {
        let word = word(rows, at);
        for (i, v) in v.iter_mut().enumerate() {
            // Bits 4·i to 4·i + 3 are in byte i / 2 of the lane.
            let byte = _mm512_set1_epi32(0x0101_0101 * (i as i32 / 2));
            let spread = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x0404_0404, 0x0808_0808, 0x0c0c_0c0c));
            let spread = _mm512_shuffle_epi8(word, _mm512_add_epi8(spread, byte));
            let bits = if i % 2 == 0 { 0x0804_0201 } else { 0x8040_2010_u32 as i32 };
            let set = _mm512_test_epi8_mask(spread, _mm512_set1_epi32(bits));
            *v = _mm512_mask_add_epi8(*v, set, *v, _mm512_set1_epi8(16));
        }
        v
    }
}

/// A table of 16 bytes looked up by nibbles.
#[inline(always)]
unsafe fn lookup(table: &[u8; 16], mut nibbles: Group) -> Group {
    // SAFETY: the table is 16 bytes.
    unsafe {
        let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
        for v in &mut nibbles {
            *v = _mm512_shuffle_epi8(table, *v);
        }
        nibbles
    }
}

/// The low halves of the lanes, f16, as f32.
#[inline(always)]
unsafe fn halves(word: __m512i) -> __m512 {
    // SAFETY: register arithmetic.
    unsafe { _mm512_cvtph_ps(_mm512_cvtepi32_epi16(word)) }
}

/// The f16 at `at`, and it times `by`.
#[inline(always)]
unsafe fn scale(rows: &Units, at: usize, by: f32) -> (__m512, __m512) {
    // SAFETY: the callers' blocks hold 16 bytes at `at`.
    unsafe {
        let d = halves(word(rows, at));
        (d, _mm512_mul_ps(d, _mm512_set1_ps(by)))
    }
}

/// The two f16 at `at`.
#[inline(always)]
unsafe fn pair(rows: &Units, at: usize) -> (__m512, __m512) {
    // SAFETY: the callers' blocks hold 16 bytes at `at`.
    unsafe {
        let word = word(rows, at);
        (halves(word), halves(_mm512_srli_epi32::<16>(word)))
    }
}

/// Declares what a format does: its values, and the factors of a group if each has its own.
macro_rules! turn {
    ($($name:ident |$rows:ident, $g:ident| $group:expr $(, each |$r:ident, $h:ident| $factors:expr)?;)*) => { $(
        impl Turn for unpack::$name {
            #[inline(always)]
            unsafe fn group_of_rows($rows: &Units, $g: usize) -> Group {
                // SAFETY: offsets within the unit, by the format's layout.
                unsafe { $group }
            }
            $(const EACH: bool = true;
            #[inline(always)]
            unsafe fn factors($r: &Units, $h: usize) -> (__m512, __m512) {
                // SAFETY: offsets within the unit, by the format's layout.
                unsafe { $factors }
            })?
        }
    )* };
}

// Layouts are those of `avx2::unpack`.
turn!(
    Q4_0 |p, g| nibbles(p, 18 * g + 2), each |p, g| scale(p, 18 * g, -8.0);
    Q4_1 |p, g| nibbles(p, 20 * g + 4), each |p, g| pair(p, 20 * g);
    Q5_0 |p, g| fifth(nibbles(p, 22 * g + 6), p, 22 * g + 2), each |p, g| scale(p, 22 * g, -16.0);
    Q5_1 |p, g| fifth(nibbles(p, 24 * g + 8), p, 24 * g + 4), each |p, g| pair(p, 24 * g);
    Q8_0 |p, g| bytes(p, 34 * g + 2), each |p, g| scale(p, 34 * g, 0.0);
    Iq4Nl |p, g| lookup(&IQ4.map(|v| v as u8), nibbles(p, 18 * g + 2)), each |p, g| scale(p, 18 * g, 0.0);
    Mxfp4 |p, g| lookup(&MXFP4_PLUS_12, nibbles(p, 17 * g + 1));
    Q2K |p, g| field(bytes(p, 16 + 32 * (g / 4)), 2 * (g % 4), 3);
    Q3K |p, g| add_bit(field(bytes(p, 32 + 32 * (g / 4)), 2 * (g % 4), 3), bytes(p, 0), g, 2);
    Q4K |p, g| field(bytes(p, 16 + 32 * (g / 2)), 4 * (g % 2), 15);
    Q5K |p, g| add_bit(field(bytes(p, 48 + 32 * (g / 2)), 4 * (g % 2), 15), bytes(p, 16), g, 4);
    Q6K |p, g| {
        // Two bits of each of four groups in 32 bytes.
        let (half, g) = (g / 4, g % 4);
        let low = field(bytes(p, 64 * half + 32 * (g % 2)), 4 * (g / 2), 15);
        let mut high = field(bytes(p, 128 + 32 * half), 2 * g, 3);
        for (high, low) in high.iter_mut().zip(low) {
            *high = _mm512_or_si512(_mm512_slli_epi16::<4>(*high), low);
        }
        high
    };
    Q8K |p, g| bytes(p, 4 + 32 * g);
    Iq4Xs |p, g| lookup(&IQ4.map(|v| v as u8), nibbles(p, 8 + 16 * g));
);
