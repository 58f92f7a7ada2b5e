//! Products of single precision in the matrix unit. A value is split into two of bfloat16, `x ≈ high + low`, both rounded, so
//! that they are off by at most 2⁻¹⁷ of the value together; of the four products that make `x · y` the one of the low parts is left
//! out, at most 2⁻¹⁶ of all. So a product is off by some 10⁻⁵ of itself, and is made five times as fast as by `fma`.
//!
//! A factor lies in pairs of tiles, the high parts before the low ones. In a dword are values 16 apart, not neighbours: what
//! comes from rows in single precision can be put together without a permutation then. By what the rows in memory are to the product
//! there are two ways, and each can be turned:
//!
//! | rows in memory | dword `i` of row `r` | as it is | turned |
//! | --- | --- | --- | --- |
//! | [`along`]: rows of the product, values of its sum | values `i` and `i + 16` of row `r` | left factor | right factor |
//! | [`across`]: values of the sum, columns of the product | value `i` of rows `r` and `r + 16` | right factor | left factor |

use super::{TILE_BYTES, TILE_ROWS, TILE_VALUES, Unit, pairs};
use std::arch::asm;
use std::arch::x86_64::*;

/// Bytes of a pair of tiles.
pub const PAIR_BYTES: usize = 2 * TILE_BYTES;

/// Where a factor of a product of 32 × 32 lies.
#[derive(Clone, Copy, Debug)]
pub struct Factor {
    /// The first pair of tiles.
    pub at: *const u8,
    /// Bytes to the pair for the next 32 values of the sum.
    pub step: usize,
    /// Bytes to the pairs for the other 16 rows of a left factor, or columns of a right one.
    pub other: usize,
}

impl Unit {
    /// 32 × 32 sums of `steps` times 32 products, to rows `stride` floats apart; with `accumulate` in addition to what is there.
    ///
    /// # Safety
    /// Both factors have the steps, at least one; `to` is good for 32 rows of 32 values.
    #[inline(always)]
    pub unsafe fn multiply_split(
        &self,
        a: Factor,
        b: Factor,
        steps: usize,
        to: *mut f32,
        stride: usize,
        accumulate: bool,
    ) {
        // SAFETY: by the contract; what a register holds goes from one statement to the next, which keep their order.
        unsafe {
            self.begin_sums(to, stride, accumulate);
            asm!(
                "2:",
                "tileloadd tmm4, [{a} + {s}*1 + {tile}]",
                "tileloadd tmm6, [{b} + {s}*1]",
                "tileloadd tmm7, [{d} + {s}*1]",
                "tileloadd tmm5, [{c} + {s}*1 + {tile}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm4, [{a} + {s}*1]",
                "tileloadd tmm5, [{c} + {s}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm6, [{b} + {s}*1 + {tile}]",
                "tileloadd tmm7, [{d} + {s}*1 + {tile}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, {a_step}",
                "add {c}, {a_step}",
                "add {b}, {b_step}",
                "add {d}, {b_step}",
                "dec {n}",
                "jnz 2b",
                a = inout(reg) a.at => _,
                c = inout(reg) a.at.wrapping_add(a.other) => _,
                b = inout(reg) b.at => _,
                d = inout(reg) b.at.wrapping_add(b.other) => _,
                n = inout(reg) steps => _,
                a_step = in(reg) a.step,
                b_step = in(reg) b.step,
                s = in(reg) 64usize,
                tile = const TILE_BYTES,
                options(nostack),
            );
            self.store_sums(to, stride);
        }
    }
}

/// Splits two vectors to a row of a pair of tiles, the first in the low half of each dword.
///
/// # Safety
/// `to` is a row of the first of two tiles; the caller has AVX-512 F.
#[target_feature(enable = "avx512f")]
#[inline]
pub unsafe fn put(x: __m512, y: __m512, to: *mut u8) {
    // SAFETY: by the contract.
    unsafe {
        let (top, half) = (_mm512_set1_epi32(0xffff_0000_u32 as i32), _mm512_set1_epi32(0x8000));
        let a = _mm512_add_epi32(_mm512_castps_si512(x), half);
        let b = _mm512_add_epi32(_mm512_castps_si512(y), half);
        // Bits of `b` where the mask has ones, else of `a`.
        let high = _mm512_ternarylogic_epi32::<0xca>(top, b, _mm512_srli_epi32::<16>(a));
        let x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(a, top)));
        let y = _mm512_sub_ps(y, _mm512_castsi512_ps(_mm512_and_si512(b, top)));
        _mm512_store_si512(to.cast(), high);
        _mm512_store_si512(to.add(TILE_BYTES).cast(), pairs(x, y));
    }
}

/// A pair of tiles of 16 rows, at `from` and `stride` floats apart, of 32 values each, as the table says.
///
/// # Safety
/// All rows can be read; `to` is a pair of tiles; the caller has AVX-512 F.
#[target_feature(enable = "avx512f")]
#[inline]
pub unsafe fn along(from: *const f32, stride: usize, to: *mut u8) {
    for r in 0..TILE_ROWS {
        // SAFETY: by the contract.
        unsafe {
            let x = from.add(r * stride);
            put(_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16)), to.add(64 * r));
        }
    }
}

/// A pair of tiles of 32 rows, at `from` and `stride` floats apart, of 16 values each, as the table says.
///
/// # Safety
/// As for [`along`].
#[target_feature(enable = "avx512f")]
#[inline]
pub unsafe fn across(from: *const f32, stride: usize, to: *mut u8) {
    for r in 0..TILE_ROWS {
        // SAFETY: by the contract.
        unsafe {
            let x = from.add(r * stride);
            put(_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(TILE_VALUES / 2 * stride)), to.add(64 * r));
        }
    }
}

/// Writes up to sixteen columns of `width` values, which lie at `from` in rows `stride` floats apart, as vectors: the first `count`,
/// times their factors, to where `to` says.
///
/// # Safety
/// All rows of sixteen, up to the next multiple of 16, can be read; vectors can be written; the caller has AVX-512 F.
#[target_feature(enable = "avx512f")]
#[inline]
pub unsafe fn write_columns(
    from: *const f32,
    stride: usize,
    width: usize,
    count: usize,
    factors: __m512,
    to: impl Fn(usize) -> *mut f32,
) {
    for d in (0..width).step_by(16) {
        let there = 0xffff_u16 >> (16 - (width - d).min(16));
        let mut rows = [_mm512_setzero_si512(); 16];
        // SAFETY: by the contract; masked lanes are not touched.
        unsafe {
            for (i, row) in rows.iter_mut().enumerate() {
                *row = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(from.add((d + i) * stride)), factors));
            }
            for (i, x) in transpose(rows).into_iter().enumerate().take(count) {
                _mm512_mask_storeu_ps(to(i).add(d), there, _mm512_castsi512_ps(x));
            }
        }
    }
}

/// Turns a pair of tiles: rows become columns, dword by dword.
///
/// # Safety
/// `at` is a pair of tiles; the caller has AVX-512 F.
#[target_feature(enable = "avx512f")]
#[inline]
pub unsafe fn turn(at: *mut u8) {
    for tile in [at, at.wrapping_add(TILE_BYTES)] {
        // SAFETY: by the contract.
        unsafe {
            let mut rows = [_mm512_setzero_si512(); 16];
            for (r, row) in rows.iter_mut().enumerate() {
                *row = _mm512_load_si512(tile.add(64 * r).cast());
            }
            for (r, row) in transpose(rows).into_iter().enumerate() {
                _mm512_store_si512(tile.add(64 * r).cast(), row);
            }
        }
    }
}

/// Rows become columns.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut by_two = rows;
    for i in (0..16).step_by(2) {
        by_two[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        by_two[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // Four rows side by side: in lane `l` of vector 4·i + c is column 4·l + c of rows 4·i and on.
    let mut by_four = by_two;
    for i in (0..16).step_by(4) {
        by_four[i] = _mm512_unpacklo_epi64(by_two[i], by_two[i + 2]);
        by_four[i + 1] = _mm512_unpackhi_epi64(by_two[i], by_two[i + 2]);
        by_four[i + 2] = _mm512_unpacklo_epi64(by_two[i + 1], by_two[i + 3]);
        by_four[i + 3] = _mm512_unpackhi_epi64(by_two[i + 1], by_two[i + 3]);
    }
    let mut columns = by_four;
    for c in 0..4 {
        let (a, b) = (by_four[c], by_four[4 + c]);
        let (d, e) = (by_four[8 + c], by_four[12 + c]);
        let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (even_2, odd_2) = (_mm512_shuffle_i32x4::<0x88>(d, e), _mm512_shuffle_i32x4::<0xdd>(d, e));
        columns[c] = _mm512_shuffle_i32x4::<0x88>(even, even_2);
        columns[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even, even_2);
        columns[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd, odd_2);
        columns[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_2);
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Avx512;

    /// A buffer of `pairs` pairs of tiles, on a cache line.
    fn tiles(pairs: usize) -> (Vec<u8>, usize) {
        let bytes = vec![0xff; pairs * PAIR_BYTES + 64];
        let skip = bytes.as_ptr().align_offset(64);
        (bytes, skip)
    }

    /// All four ways to lay a factor out, in products of two steps beside f64.
    #[test]
    fn products_agree_with_f64_however_the_factors_lie() {
        #[target_feature(enable = "avx512f")]
        unsafe fn product(a: &[f32], b: &[f32], turned: bool, accumulate: bool, out: &mut [f32]) {
            let ((mut left, l), (mut right, r)) = (tiles(4), tiles(4));
            // SAFETY: 32 × 64 values of both, four pairs of tiles each; the caller has AMX.
            unsafe {
                let (left, right) = (left[l..].as_mut_ptr(), right[r..].as_mut_ptr());
                for (step, half) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    let at = (2 * step + half) * PAIR_BYTES;
                    if turned {
                        // `a` is the sum's values × rows, `b` columns × the sum's values.
                        across(a.as_ptr().add(32 * step * 32 + 16 * half), 32, left.add(at));
                        turn(left.add(at));
                        along(b.as_ptr().add(16 * half * 64 + 32 * step), 64, right.add(at));
                        turn(right.add(at));
                    } else {
                        along(a.as_ptr().add(16 * half * 64 + 32 * step), 64, left.add(at));
                        across(b.as_ptr().add(32 * step * 32 + 16 * half), 32, right.add(at));
                    }
                }
                let factor = |at: *mut u8| Factor { at, step: 2 * PAIR_BYTES, other: PAIR_BYTES };
                let unit = Unit::open();
                unit.multiply_split(factor(left), factor(right), 2, out.as_mut_ptr(), 32, accumulate);
            }
        }
        if !Avx512::detect().is_some_and(|token| token.amx) {
            return;
        }
        let noise = |i: usize| ((i * 7919 % 2003) as f32 - 1001.0) * 1.234_567e-3;
        let (a, b): (Vec<f32>, Vec<f32>) = (0..2048).map(|i| (noise(i), noise(i * i + 1))).unzip();
        for (turned, accumulate) in [(false, false), (true, false), (false, true), (true, true)] {
            let mut out = vec![1.0; 1024];
            // SAFETY: there is AMX.
            unsafe { product(&a, &b, turned, accumulate, &mut out) };
            for (i, out) in out.iter().enumerate() {
                let (row, column) = (i / 32, i % 32);
                let term = |k: usize| {
                    let (x, y) = if turned {
                        (a[32 * k + row], b[64 * column + k])
                    } else {
                        (a[64 * row + k], b[32 * k + column])
                    };
                    (f64::from(x) * f64::from(y), f64::from(x * y).abs())
                };
                let (sum, size) = (0..64).map(term).fold((0.0, 0.0), |s, t| (s.0 + t.0, s.1 + t.1));
                let want = sum + f64::from(u8::from(accumulate));
                assert!((f64::from(*out) - want).abs() < 1e-5 * size, "{turned} {accumulate} [{i}]: {out} {want}");
            }
        }
    }
}
