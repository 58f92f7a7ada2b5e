//! Unpacking on AVX2: one [`Block`] per format gives a unit of 256 values (see [`blocks`](super::super::blocks)) as
//! eight vectors of bytes in natural order, and its scales and minima. Everything here is inlined into a function that
//! has the target features (so no intrinsic may sit in a closure that goes through the standard library: that one would
//! not be inlined, and each instruction become a call); `p` always points at a whole unit, or at `groups` blocks of one.

use super::super::blocks::{IQ4, MXFP4_PLUS_12, e8m0_half, scales_6bit, scales_q3k};
use std::arch::x86_64::*;

/// Scales or minima of the eight groups, or of the sixteen halves, in order.
pub(crate) type Sixteen = [__m256; 2];

/// A format in the common form.
pub(crate) trait Block {
    /// Bytes of a unit.
    const BYTES: usize;
    /// Scales hold for 16 values.
    const HALVES: bool = false;
    /// The bytes are signed.
    const SIGNED: bool = false;
    /// Groups after which `group` repeats itself at another address: its shifts depend on `g % STEP` only.
    const STEP: usize;
    /// How many `u8 · i8` pair sums fit into an i16: 8 for 4-bit values, 4 for 5 bits, 2 for 6 bits, 1 for 8.
    const RUN: usize;

    /// Bytes of group `g`.
    ///
    /// # Safety
    /// `p` points at a unit that has group `g`; the caller has AVX2, FMA and F16C.
    unsafe fn group(p: *const u8, g: usize) -> __m256i;

    /// Scales and minima (`w = d·q + m`); minima are zero for signed formats; groups from `groups` on are zero. The
    /// second vectors are used with `HALVES` only.
    ///
    /// # Safety
    /// As for `group`, for the first `groups` groups.
    unsafe fn scales(p: *const u8, groups: usize) -> (Sixteen, Sixteen);
}

/// 16 bytes to 32 nibbles: the low ones first.
#[inline(always)]
unsafe fn nibbles(p: *const u8) -> __m256i {
    // SAFETY: the callers' blocks hold 16 bytes at `p`.
    unsafe {
        let both = _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast()));
        _mm256_and_si256(_mm256_srlv_epi64(both, _mm256_setr_epi64x(0, 0, 4, 4)), _mm256_set1_epi8(15))
    }
}

/// Bit `i` of the word at `p` as 16 in byte `i`.
#[inline(always)]
unsafe fn fifth(p: *const u8) -> __m256i {
    // SAFETY: the callers' blocks hold 4 bytes at `p`.
    unsafe {
        let word = _mm256_set1_epi32(p.cast::<i32>().read_unaligned());
        let spread = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
        let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        let set = _mm256_and_si256(_mm256_shuffle_epi8(word, spread), bit);
        _mm256_and_si256(_mm256_cmpeq_epi8(set, bit), _mm256_set1_epi8(16))
    }
}

/// A table of 16 bytes looked up by nibbles.
#[inline(always)]
unsafe fn lookup(table: &[u8; 16], nibbles: __m256i) -> __m256i {
    // SAFETY: the table is 16 bytes.
    unsafe { _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())), nibbles) }
}

/// Bits `shift ..` of every byte under `mask`.
#[inline(always)]
unsafe fn field(v: __m256i, shift: usize, mask: i8) -> __m256i {
    // SAFETY: register arithmetic.
    unsafe { _mm256_and_si256(_mm256_srl_epi16(v, _mm_cvtsi32_si128(shift as i32)), _mm256_set1_epi8(mask)) }
}

/// Bit `bit` of every byte as `1 << to`.
#[inline(always)]
unsafe fn bit_to(v: __m256i, bit: usize, to: usize) -> __m256i {
    // SAFETY: register arithmetic.
    unsafe {
        let moved = if bit >= to {
            _mm256_srl_epi16(v, _mm_cvtsi32_si128((bit - to) as i32))
        } else {
            _mm256_sll_epi16(v, _mm_cvtsi32_si128((to - bit) as i32))
        };
        _mm256_and_si256(moved, _mm256_set1_epi8(1 << to))
    }
}

#[inline(always)]
unsafe fn load(p: *const u8) -> __m256i {
    // SAFETY: the callers' blocks hold 32 bytes at `p`.
    unsafe { _mm256_loadu_si256(p.cast()) }
}

/// One f16 at `p`.
#[inline(always)]
unsafe fn half(p: *const u8) -> f32 {
    // SAFETY: the callers' blocks hold 2 bytes at `p`.
    unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(p.cast::<u16>().read_unaligned())))) }
}

/// The f16 at `p`, `p + STEP`, … of eight blocks, those from `n` on zero.
#[inline(always)]
unsafe fn halves<const STEP: usize>(p: *const u8, n: usize) -> __m256 {
    // SAFETY: the callers' units hold `n` blocks of `STEP` bytes at `p`.
    unsafe {
        let at = |i: usize| if i < n { p.add(i * STEP).cast::<i16>().read_unaligned() } else { 0 };
        _mm256_cvtph_ps(_mm_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)))
    }
}

/// The pairs of f16 (scale, minimum) at `p`, `p + STEP`, … of eight blocks.
#[inline(always)]
unsafe fn pairs<const STEP: usize>(p: *const u8, n: usize) -> (__m256, __m256) {
    // SAFETY: the callers' units hold `n` blocks of `STEP` bytes at `p`.
    unsafe {
        let at = |i: usize| if i < n { p.add(i * STEP).cast::<i32>().read_unaligned() } else { 0 };
        let sort = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
        let low = _mm_shuffle_epi8(_mm_setr_epi32(at(0), at(1), at(2), at(3)), sort);
        let high = _mm_shuffle_epi8(_mm_setr_epi32(at(4), at(5), at(6), at(7)), sort);
        (_mm256_cvtph_ps(_mm_unpacklo_epi64(low, high)), _mm256_cvtph_ps(_mm_unpackhi_epi64(low, high)))
    }
}

/// Eight bytes as f32.
#[inline(always)]
unsafe fn floats(bytes: __m128i) -> __m256 {
    // SAFETY: register arithmetic.
    unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)) }
}

/// Eight signed bytes as f32.
#[inline(always)]
unsafe fn signed_floats(bytes: __m128i) -> __m256 {
    // SAFETY: register arithmetic.
    unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)) }
}

#[inline(always)]
unsafe fn scaled(v: __m256, by: f32) -> __m256 {
    // SAFETY: register arithmetic.
    unsafe { _mm256_mul_ps(v, _mm256_set1_ps(by)) }
}

#[inline(always)]
unsafe fn zero() -> Sixteen {
    // SAFETY: register arithmetic.
    unsafe { [_mm256_setzero_ps(); 2] }
}

/// Declares a format: its constants, `group(p, g)` and `scales(p, n)`.
macro_rules! block {
    ($(#[$doc:meta])* $name:ident, $bytes:expr, step $step:expr, run $run:expr $(, $flag:ident)*;
     |$p:ident, $g:ident| $group:expr; |$q:ident, $n:ident| $scales:expr) => {
        $(#[$doc])*
        pub(crate) struct $name;
        impl Block for $name {
            const BYTES: usize = $bytes;
            const RUN: usize = $run;
            const STEP: usize = $step;
            $(const $flag: bool = true;)*
            #[inline(always)]
            unsafe fn group($p: *const u8, $g: usize) -> __m256i {
                // SAFETY: offsets within the unit, by the format's layout.
                unsafe { $group }
            }
            #[inline(always)]
            unsafe fn scales($q: *const u8, $n: usize) -> (Sixteen, Sixteen) {
                let _ = $n;
                // SAFETY: offsets within the unit, by the format's layout.
                unsafe { $scales }
            }
        }
    };
}

block!(
    /// `d: f16, qs: [u8; 16]`.
    Q4_0, 8 * 18, step 1, run 8;
    |p, g| nibbles(p.add(18 * g + 2));
    |p, n| {
        let d = halves::<18>(p, n);
        ([d; 2], [scaled(d, -8.0); 2])
    }
);
block!(
    /// `d: f16, m: f16, qs: [u8; 16]`.
    Q4_1, 8 * 20, step 1, run 8;
    |p, g| nibbles(p.add(20 * g + 4));
    |p, n| {
        let (d, m) = pairs::<20>(p, n);
        ([d; 2], [m; 2])
    }
);
block!(
    /// `d: f16, qh: u32, qs: [u8; 16]`.
    Q5_0, 8 * 22, step 1, run 4;
    |p, g| _mm256_or_si256(nibbles(p.add(22 * g + 6)), fifth(p.add(22 * g + 2)));
    |p, n| {
        let d = halves::<22>(p, n);
        ([d; 2], [scaled(d, -16.0); 2])
    }
);
block!(
    /// `d: f16, m: f16, qh: u32, qs: [u8; 16]`.
    Q5_1, 8 * 24, step 1, run 4;
    |p, g| _mm256_or_si256(nibbles(p.add(24 * g + 8)), fifth(p.add(24 * g + 4)));
    |p, n| {
        let (d, m) = pairs::<24>(p, n);
        ([d; 2], [m; 2])
    }
);
block!(
    /// `d: f16, qs: [i8; 32]`.
    Q8_0, 8 * 34, step 1, run 1, SIGNED;
    |p, g| load(p.add(34 * g + 2));
    |p, n| ([halves::<34>(p, n); 2], zero())
);
block!(
    /// `d: f16, qs: [u8; 16]`, codes of a table.
    Iq4Nl, 8 * 18, step 1, run 1, SIGNED;
    |p, g| lookup(&IQ4.map(|v| v as u8), nibbles(p.add(18 * g + 2)));
    |p, n| ([halves::<18>(p, n); 2], zero())
);
block!(
    /// `e: u8, qs: [u8; 16]`, codes of a table.
    Mxfp4, 8 * 17, step 1, run 4;
    |p, g| lookup(&MXFP4_PLUS_12, nibbles(p.add(17 * g + 1)));
    |p, n| {
        let at = |i: usize| if i < n { e8m0_half(*p.add(17 * i)) } else { 0.0 };
        let d = _mm256_setr_ps(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
        ([d; 2], [scaled(d, -12.0); 2])
    }
);
block!(
    /// `scales: [u8; 16], qs: [u8; 64], d: f16, dmin: f16`.
    Q2K, 84, step 8, run 8, HALVES;
    |p, g| field(load(p.add(16 + 32 * (g / 4))), 2 * (g % 4), 3);
    |p, _n| {
        let (d, dmin) = (half(p.add(80)), half(p.add(82)));
        let bytes = _mm_loadu_si128(p.cast());
        let low = _mm_and_si128(bytes, _mm_set1_epi8(15));
        let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), _mm_set1_epi8(15));
        (
            [scaled(floats(low), d), scaled(floats(_mm_srli_si128::<8>(low)), d)],
            [scaled(floats(high), -dmin), scaled(floats(_mm_srli_si128::<8>(high)), -dmin)],
        )
    }
);
block!(
    /// `hmask: [u8; 32], qs: [u8; 64], scales: [u8; 12], d: f16`.
    Q3K, 110, step 8, run 8, HALVES;
    |p, g| _mm256_or_si256(field(load(p.add(32 + 32 * (g / 4))), 2 * (g % 4), 3), bit_to(load(p), g, 2));
    |p, _n| {
        let scales = scales_q3k(std::slice::from_raw_parts(p.add(96), 12));
        let bytes = _mm_sub_epi8(_mm_loadu_si128(scales.as_ptr().cast()), _mm_set1_epi8(32));
        let d = half(p.add(108));
        let d = [scaled(signed_floats(bytes), d), scaled(signed_floats(_mm_srli_si128::<8>(bytes)), d)];
        (d, [scaled(d[0], -4.0), scaled(d[1], -4.0)])
    }
);
block!(
    /// `d: f16, dmin: f16, scales: [u8; 12], qs: [u8; 128]`.
    Q4K, 144, step 8, run 8;
    |p, g| field(load(p.add(16 + 32 * (g / 2))), 4 * (g % 2), 15);
    |p, _n| six_bit(p)
);
block!(
    /// `d: f16, dmin: f16, scales: [u8; 12], qh: [u8; 32], qs: [u8; 128]`.
    Q5K, 176, step 8, run 4;
    |p, g| _mm256_or_si256(field(load(p.add(48 + 32 * (g / 2))), 4 * (g % 2), 15), bit_to(load(p.add(16)), g, 4));
    |p, _n| six_bit(p)
);
block!(
    /// `ql: [u8; 128], qh: [u8; 64], scales: [i8; 16], d: f16`.
    Q6K, 210, step 8, run 2, HALVES;
    |p, g| {
        let (half, g) = (g / 4, g % 4);
        let low = field(load(p.add(64 * half + 32 * (g % 2))), 4 * (g / 2), 15);
        let high = load(p.add(128 + 32 * half));
        let high = match g {
            0 => _mm256_slli_epi16::<4>(high),
            1 => _mm256_slli_epi16::<2>(high),
            2 => high,
            _ => _mm256_srli_epi16::<2>(high),
        };
        _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(0x30)))
    };
    |p, _n| {
        let bytes = _mm_loadu_si128(p.add(192).cast());
        let d = half(p.add(208));
        let d = [scaled(signed_floats(bytes), d), scaled(signed_floats(_mm_srli_si128::<8>(bytes)), d)];
        (d, [scaled(d[0], -32.0), scaled(d[1], -32.0)])
    }
);
block!(
    /// `d: f32, qs: [i8; 256], sums: [i16; 16]`.
    Q8K, 292, step 1, run 1, SIGNED;
    |p, g| load(p.add(4 + 32 * g));
    |p, _n| ([_mm256_set1_ps(p.cast::<f32>().read_unaligned()); 2], zero())
);
block!(
    /// `d: f16, scales_h: u16, scales_l: [u8; 4], qs: [u8; 128]`.
    Iq4Xs, 136, step 1, run 1, SIGNED;
    |p, g| lookup(&IQ4.map(|v| v as u8), nibbles(p.add(8 + 16 * g)));
    |p, _n| {
        // Group g: nibble g of the low word, two bits at 2·g of the high one.
        let low = _mm256_set1_epi32(p.add(4).cast::<i32>().read_unaligned());
        let high = _mm256_set1_epi32(i32::from(p.add(2).cast::<u16>().read_unaligned()));
        let low = _mm256_srlv_epi32(low, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
        let high = _mm256_srlv_epi32(high, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
        let low = _mm256_and_si256(low, _mm256_set1_epi32(15));
        let high = _mm256_slli_epi32::<4>(_mm256_and_si256(high, _mm256_set1_epi32(3)));
        let scale = _mm256_sub_epi32(_mm256_or_si256(low, high), _mm256_set1_epi32(32));
        ([scaled(_mm256_cvtepi32_ps(scale), half(p)); 2], zero())
    }
);

/// Scales and minima of Q4_K and Q5_K.
#[inline(always)]
unsafe fn six_bit(p: *const u8) -> (Sixteen, Sixteen) {
    // SAFETY: both formats begin with `d: f16, dmin: f16, scales: [u8; 12]`.
    unsafe {
        let (scales, mins) = scales_6bit(std::slice::from_raw_parts(p.add(4), 12));
        let d = scaled(floats(_mm_cvtsi64_si128(scales as i64)), half(p));
        let m = scaled(floats(_mm_cvtsi64_si128(mins as i64)), -half(p.add(2)));
        ([d; 2], [m; 2])
    }
}
