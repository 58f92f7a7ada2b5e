//! Unpacking of tiles: the bytes of sixteen rows are turned first, by sixteen each, so that a lane of 32 bits is a row, and made
//! into weights then, 16 rows in an instruction. The other way round, as AVX2 does it, what is turned is up to twice as much, and
//! every row is unpacked by itself.

use super::super::avx2::tile::scales_of_eight;
use super::super::avx2::unpack::{self, Block};
use super::super::blocks::{IQ4, MXFP4_PLUS_12};
use super::super::tile::{Ahead, TileMemory};
use std::arch::x86_64::*;

/// Rows that are turned at a time: 32-bit lanes of a vector.
pub(super) const LANES: usize = 16;

/// Units of sixteen rows.
pub(super) type Units = [*const u8; LANES];

/// A group of sixteen rows: vector i holds values 4·i to 4·i + 3 of each row.
type Group = [__m512i; 8];

/// A format's bytes and scales, of sixteen rows at a time.
pub(in super::super) trait Turn: Block {
    /// Whether weights are multiples of their scale; [`Turn::group_of_rows`] gives the multiples plus 128, and there are no minima.
    const CENTRED: bool;
    /// Whether each group has factors of its own, which [`Turn::factors`] reads; else [`Block::scales`] reads those of a unit.
    const EACH: bool = false;

    /// Group `g`, as [`Block::group`] gives it of a row unless weights are [centred](Turn::CENTRED).
    ///
    /// # Safety
    /// The units have group `g`; the caller has AVX-512 F, BW, DQ, VL.
    unsafe fn group_of_rows(rows: &Units, g: usize) -> Group;

    /// Scales and minima of group `g`.
    ///
    /// # Safety
    /// As for [`Turn::group_of_rows`].
    #[inline(always)]
    unsafe fn factors(_rows: &Units, _g: usize) -> (__m512, __m512) {
        // SAFETY: register arithmetic.
        unsafe { (_mm512_setzero_ps(), _mm512_setzero_ps()) }
    }
}

/// Unpacks `groups` groups of `ROWS` rows from their unit pointers. Of [centred](Turn::CENTRED) weights there are no minima.
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
        for unit in 0..groups.div_ceil(8) {
            let n = (groups - 8 * unit).min(8);
            for row in (0..ROWS).step_by(LANES) {
                let rows: Units = std::array::from_fn(|i| units[row + i].add(unit * B::BYTES));
                for g in 0..n {
                    let at = 8 * unit + g;
                    let values = B::group_of_rows(&rows, g);
                    for (i, v) in values.into_iter().enumerate() {
                        _mm512_storeu_si512(tile.q.add(((8 * at + i) * ROWS + row) * 4).cast(), v);
                    }
                    if B::EACH {
                        let (d, m) = B::factors(&rows, g);
                        _mm512_storeu_ps(tile.d.add(at * ROWS + row), d);
                        if !B::CENTRED {
                            _mm512_storeu_ps(tile.m.add(at * ROWS + row), m);
                        }
                    }
                    ahead.step();
                    ahead.step();
                }
                if !B::EACH {
                    scales::<B, ROWS>(&rows, n, tile, unit, row);
                }
            }
        }
    }
}

/// Scales, and minima if there are any, of `n` groups of unit `unit` of sixteen rows, to rows `row ..` of the tile. A call, for it is
/// long, and there is one for 4096 weights.
///
/// # Safety
/// As for [`unpack`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
#[inline(never)]
pub(super) unsafe fn scales<B: Turn, const ROWS: usize>(
    rows: &Units,
    n: usize,
    tile: &TileMemory,
    unit: usize,
    row: usize,
) {
    for half in [0, 8] {
        // SAFETY: by the contract.
        unsafe {
            let rows = std::array::from_fn(|i| rows[half + i]);
            scales_of_eight::<B, ROWS>(&rows, n, tile, unit, row + half, !B::CENTRED);
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

/// The vector itself, of which the compiler then does not know that a part alone is wanted: loads of less than 16 bytes cannot be
/// joined with the instruction that inserts them.
#[target_feature(enable = "avx512f")]
#[inline]
fn whole(mut v: __m512i) -> __m512i {
    // SAFETY: an empty line.
    unsafe { std::arch::asm!("/* {v} */", v = inout(zmm_reg) v, options(pure, nomem, nostack, preserves_flags)) };
    v
}

/// The word at `at` of each row.
#[inline(always)]
unsafe fn word(rows: &Units, at: usize) -> __m512i {
    // SAFETY: the callers' blocks hold 16 bytes at `at`.
    unsafe {
        let mut v = lanes(rows, at);
        for v in &mut v {
            *v = whole(*v);
        }
        let [a, b, c, d] = v;
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

/// The f16 at `at`, and no minimum.
#[inline(always)]
unsafe fn scale(rows: &Units, at: usize) -> (__m512, __m512) {
    // SAFETY: the callers' blocks hold 16 bytes at `at`.
    unsafe { (halves(word(rows, at)), _mm512_setzero_ps()) }
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

/// `by` added to every byte; −128 is 128.
#[inline(always)]
unsafe fn plus(mut v: Group, by: i8) -> Group {
    // SAFETY: register arithmetic.
    unsafe {
        for v in &mut v {
            *v = _mm512_add_epi8(*v, _mm512_set1_epi8(by));
        }
        v
    }
}

/// `bits`, which are clear, set in every byte.
#[inline(always)]
unsafe fn with_bits(mut v: Group, bits: i8) -> Group {
    // SAFETY: register arithmetic.
    unsafe {
        for v in &mut v {
            *v = _mm512_or_si512(*v, _mm512_set1_epi8(bits));
        }
        v
    }
}

/// Q6_K's two high bits where they belong, with what is missing of 128.
const HIGH_PLUS_96: [u8; 16] = [0x60, 0x70, 0x80, 0x90, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// IQ4's values plus 128.
#[inline(always)]
fn iq4() -> [u8; 16] {
    IQ4.map(|v| (v as u8).wrapping_add(128))
}

/// Declares what a format does: its values, and the factors of a group if each has its own.
macro_rules! turn {
    ($($name:ident $centred:literal |$rows:ident, $g:ident| $group:expr $(, each |$r:ident, $h:ident| $factors:expr)?;)*) => { $(
        impl Turn for unpack::$name {
            const CENTRED: bool = $centred;
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

// Layouts are those of `avx2::unpack`; true says that weights are centred.
turn!(
    Q4_0 true |p, g| plus(nibbles(p, 18 * g + 2), 120), each |p, g| scale(p, 18 * g);
    Q4_1 false |p, g| nibbles(p, 20 * g + 4), each |p, g| pair(p, 20 * g);
    Q5_0 true |p, g| fifth(with_bits(nibbles(p, 22 * g + 6), 0x70), p, 22 * g + 2), each |p, g| scale(p, 22 * g);
    Q5_1 false |p, g| fifth(nibbles(p, 24 * g + 8), p, 24 * g + 4), each |p, g| pair(p, 24 * g);
    Q8_0 true |p, g| plus(bytes(p, 34 * g + 2), -128), each |p, g| scale(p, 34 * g);
    Iq4Nl true |p, g| lookup(&iq4(), nibbles(p, 18 * g + 2)), each |p, g| scale(p, 18 * g);
    Mxfp4 true |p, g| lookup(&MXFP4_PLUS_12.map(|v| v + (128 - 12)), nibbles(p, 17 * g + 1));
    Q2K false |p, g| field(bytes(p, 16 + 32 * (g / 4)), 2 * (g % 4), 3);
    Q3K true |p, g| {
        let low = field(bytes(p, 32 + 32 * (g / 4)), 2 * (g % 4), 3);
        add_bit(with_bits(low, 0x7c), bytes(p, 0), g, 2)
    };
    Q4K false |p, g| field(bytes(p, 16 + 32 * (g / 2)), 4 * (g % 2), 15);
    Q5K false |p, g| add_bit(field(bytes(p, 48 + 32 * (g / 2)), 4 * (g % 2), 15), bytes(p, 16), g, 4);
    Q6K true |p, g| {
        // Two bits of each of four groups in 32 bytes.
        let (half, g) = (g / 4, g % 4);
        let low = field(bytes(p, 64 * half + 32 * (g % 2)), 4 * (g / 2), 15);
        let mut high = lookup(&HIGH_PLUS_96, field(bytes(p, 128 + 32 * half), 2 * g, 3));
        for (high, low) in high.iter_mut().zip(low) {
            *high = _mm512_or_si512(*high, low);
        }
        high
    };
    Q8K true |p, g| plus(bytes(p, 4 + 32 * g), -128);
    Iq4Xs true |p, g| lookup(&iq4(), nibbles(p, 8 + 16 * g));
);
