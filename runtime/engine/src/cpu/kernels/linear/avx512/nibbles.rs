//! A few tokens times weights whose blocks have a scale and 32 nibbles in 16 bytes (Q4_0, Q4_1, Q5_0, Q5_1). As in `matvec` a row
//! after the other, but the nibbles of four blocks come into one register, and low and high ones are multiplied into the same sums.
//! Processors that permute bytes (VBMI, GFNI) get the nibbles by one permutation and the scales of eight blocks by two or three,
//! instead of one load each: per 256 weights of Q4_1 24 instructions on the two ports for such vectors, where pairs took 40.
//!
//! The activations are put in the order of the nibbles before, once for all rows: per unit of 256 values 16 of each of four groups
//! that meet low nibbles, 16 that meet the high ones, the same of the next four groups, and the scales with the sums.

// Registers are numbered: `for r in 0..R` says what happens better than zipped iterators do.
#![allow(clippy::needless_range_loop)]

use super::super::avx2;
use super::super::avx2::unpack::{self, Block};
use super::super::tile::XRow;
use super::super::{LinearTask, Q8, Scratch};
use crate::cpu::isa::Avx512;
use crate::cpu::kernels::{ask_ahead, asks_ahead};
use std::arch::x86_64::*;
use std::marker::PhantomData;

/// A format of such blocks: `d: f16`, perhaps a minimum, perhaps the fifth bits, then the nibbles.
pub(in super::super) trait Nibbled: Block {
    /// Bytes of a block.
    const BLOCK: usize = Self::BYTES / 8;
    /// `m: f16` follows `d`. Else weights lie around zero: the minimum is `CENTRE · d`.
    const MINIMUM: bool;
    /// Times `d`, the minimum of a format that has none of its own; 1 for the others.
    const CENTRE: f32;
    /// `qh: u32` is before the nibbles.
    const FIFTH: bool;
}

macro_rules! nibbled {
    ($($name:ident: minimum $minimum:expr, centre $centre:expr, fifth bits $fifth:expr;)*) => {
        $(impl Nibbled for unpack::$name {
            const MINIMUM: bool = $minimum;
            const CENTRE: f32 = $centre;
            const FIFTH: bool = $fifth;
        })*
    };
}

nibbled!(
    Q4_0: minimum false, centre -8.0, fifth bits false;
    Q4_1: minimum true, centre 1.0, fifth bits false;
    Q5_0: minimum false, centre -16.0, fifth bits true;
    Q5_1: minimum true, centre 1.0, fifth bits true;
);

/// Which bytes the permutations take.
struct Places<B>(PhantomData<B>);

impl<B: Nibbled> Places<B> {
    /// Bytes before the nibbles.
    const HEAD: usize = B::BLOCK - 16;
    /// Whole heads within 64 bytes, and the windows of 64 bytes that have those of a unit.
    const PER_WINDOW: usize = (64 - Self::HEAD) / B::BLOCK + 1;
    const WINDOWS: usize = 8usize.div_ceil(Self::PER_WINDOW);

    /// Of the last 64 bytes of four blocks, the nibbles of blocks 1, 2 and 3; those of block 0 are put before them.
    const NIBBLES: [u8; 64] = {
        let mut places = [0; 64];
        let mut i = 16;
        while i < 64 {
            places[i] = (i / 16 * B::BLOCK + Self::HEAD + i % 16 + 64 - 4 * B::BLOCK) as u8;
            i += 1;
        }
        places
    };

    /// Where window `w` begins.
    const fn window(w: usize) -> usize {
        let at = w * Self::PER_WINDOW * B::BLOCK;
        if at > 8 * B::BLOCK - 64 { 8 * B::BLOCK - 64 } else { at }
    }

    /// The place in a unit of byte `i` of the heads together: eight scales, eight minima (or the scales again), eight words of
    /// fifth bits.
    const fn head(i: usize) -> usize {
        if i < 16 {
            i / 2 * B::BLOCK + i % 2
        } else if i < 32 {
            (i - 16) / 2 * B::BLOCK + if B::MINIMUM { 2 } else { 0 } + i % 2
        } else {
            (i - 32) / 4 * B::BLOCK + Self::HEAD - 4 + i % 4
        }
    }

    /// The bytes of the heads that window `w` has.
    const fn heads_of(w: usize) -> u64 {
        let mut mask = 0;
        let mut i = 0;
        while i < if B::FIFTH { 64 } else { 32 } {
            let block = Self::head(i) / B::BLOCK;
            if block / Self::PER_WINDOW == w {
                mask |= 1 << i;
            }
            i += 1;
        }
        mask
    }

    /// Their places in their windows.
    const HEADS: [u8; 64] = {
        let mut places = [0; 64];
        let mut w = 0;
        while w < Self::WINDOWS {
            let mut i = 0;
            while i < 64 {
                if Self::heads_of(w) >> i & 1 == 1 {
                    places[i] = (Self::head(i) - Self::window(w)) as u8;
                }
                i += 1;
            }
            w += 1;
        }
        places
    };

    /// The bytes of the heads with the fifth bits of eight nibbles each, for the low nibbles of the first four blocks and the high
    /// ones (16 bits further), each in byte 3 of eight: the row of a matrix that gives bit 4 of a product.
    const FIFTHS: [[u8; 64]; 2] = {
        let mut places = [[0; 64]; 2];
        let mut q = 0;
        while q < 8 {
            places[0][8 * q + 3] = (32 + q / 2 * 4 + q % 2) as u8;
            places[1][8 * q + 3] = (34 + q / 2 * 4 + q % 2) as u8;
            q += 1;
        }
        places
    };
}

/// Bytes of a unit's activations: 256 values, eight scales, eight sums.
const X_BYTES: usize = 256 + 64;

/// Runs the task.
pub(in super::super) fn run<B: Nibbled>(proof: Avx512, task: &LinearTask<'_>, scratch: &mut Scratch) {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,gfni")]
    fn bytes<B: Nibbled>(task: &LinearTask<'_>, x: &Q8<'_>, room: usize, to: *mut u8) {
        let mut t = 0;
        while t < task.x.tokens {
            // SAFETY: the features are enabled here, `linear` checked the task, and there is room for so many tokens.
            t += unsafe {
                match (task.x.tokens - t).min(room) {
                    1 => some::<B, 1, true>(task, x, t, to),
                    _ => some::<B, 2, true>(task, x, t, to),
                }
            };
        }
    }
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn words<B: Nibbled>(task: &LinearTask<'_>, x: &Q8<'_>, to: *mut u8) {
        for t in 0..task.x.tokens {
            // SAFETY: as above, with room for one.
            unsafe { some::<B, 1, false>(task, x, t, to) };
        }
    }
    let Some(x) = &task.x.q8 else { return };
    let room = size_of_val(scratch.lines.as_slice()) / (task.k.div_ceil(256) * X_BYTES).max(1);
    let to = scratch.lines.as_mut_ptr().cast::<u8>();
    // SAFETY: the token proves the features.
    unsafe {
        match room {
            // No model has rows of so many values.
            0 => avx2::run_matvec::<B>(proof.avx2(), task),
            _ if proof.bytes => bytes::<B>(task, x, room, to),
            _ => words::<B>(task, x, to),
        }
    }
}

/// Tokens `t0 .. t0 + T`; gives `T`. Here and below, `BYTES` says whether there are VBMI and GFNI; sums have the same bits without.
///
/// # Safety
/// The caller has the instructions, `linear` has checked the task, and `to` has room for the tokens.
#[inline(always)]
unsafe fn some<B: Nibbled, const T: usize, const BYTES: bool>(
    task: &LinearTask<'_>,
    x: &Q8<'_>,
    t0: usize,
    to: *mut u8,
) -> usize {
    let Some(row_bytes) = task.dtype.row_bytes(task.k) else { return T };
    let (units, tail) = (task.k / 256, task.k % 256 / 32);
    let x_bytes = task.k.div_ceil(256) * X_BYTES;
    // SAFETY: rows and tokens in range, `linear` checked; units and their tail stay within the row.
    unsafe {
        for (t, x) in XRow::some::<T>(x, t0).into_iter().enumerate() {
            arrange::<B>(x, task.k / 32, to.add(t * x_bytes));
        }
        let asks = asks_ahead();
        let mut first = task.rows.start;
        while first < task.rows.end {
            // Four rows' lanes are added up together.
            let rows = (task.rows.end - first).min(4);
            let mut all = [[_mm512_setzero_ps(); 4]; T];
            let mut p = task.weight.as_ptr().add(first * row_bytes);
            for r in 0..rows {
                let mut sums = [[_mm512_setzero_ps(); 2]; T];
                let mut from = to.cast_const();
                for _ in 0..units {
                    if asks {
                        ask_ahead(p, B::BYTES);
                    }
                    unit::<B, T, BYTES, true>(p, 8, from, x_bytes, &mut sums);
                    p = p.add(B::BYTES);
                    from = from.add(X_BYTES);
                }
                if tail > 0 {
                    if asks {
                        ask_ahead(p, tail * B::BLOCK);
                    }
                    match tail {
                        // Known numbers make shorter code of the widths that small models have.
                        2 if T == 1 && BYTES => half::<B, T, BYTES>(p, 2, from, x_bytes, &mut sums),
                        4 if T == 1 && BYTES => half::<B, T, BYTES>(p, 4, from, x_bytes, &mut sums),
                        0..=4 => half::<B, T, BYTES>(p, tail, from, x_bytes, &mut sums),
                        _ => unit::<B, T, BYTES, false>(p, tail, from, x_bytes, &mut sums),
                    }
                    p = p.add(tail * B::BLOCK);
                }
                for t in 0..T {
                    // Below the minima's lanes are products of scales, which mean nothing.
                    let [products, minima] = sums[t];
                    all[t][r] = _mm512_mask_add_ps(products, 0xff00, products, minima);
                }
            }
            for t in 0..T.min(task.x.tokens - t0) {
                let mut four = [0f32; 4];
                _mm_storeu_ps(four.as_mut_ptr(), add_up(&all[t]));
                for r in 0..rows {
                    task.out.write(t0 + t, first + r, four[r], task.accumulate);
                }
            }
            first += rows;
        }
    }
    T
}

/// The sums over the lanes of four vectors.
#[inline(always)]
unsafe fn add_up(v: &[__m512; 4]) -> __m128 {
    // SAFETY: register arithmetic.
    unsafe {
        let ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
        let cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
        let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        let (low, high) = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
        let four = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
        let half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps::<1>(four));
        _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half))
    }
}

/// 64 bytes at `p`, of which `there` may be read; the others are zero.
#[inline(always)]
unsafe fn window<const WHOLE: bool>(p: *const u8, there: usize) -> __m512i {
    // SAFETY: by the caller's promise; what is masked is not touched.
    unsafe {
        if WHOLE || there >= 64 {
            _mm512_loadu_si512(p.cast())
        } else {
            _mm512_maskz_loadu_epi8((1 << there) - 1, p.cast())
        }
    }
}

/// The 16 bytes at `p`, and zeros. In assembly, for the compiler would join this with the permutation that follows and make four
/// instructions of one load.
///
/// # Safety
/// The bytes are there.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn sixteen(p: *const u8) -> __m512i {
    let v: __m512i;
    // SAFETY: by the caller's promise.
    unsafe {
        std::arch::asm!("vmovdqu {v:x}, [{p}]", v = out(zmm_reg) v, p = in(reg) p,
            options(pure, readonly, nostack, preserves_flags));
    }
    v
}

/// Writes the `groups` groups of a token in the order that the kernels read.
#[inline(always)]
unsafe fn arrange<B: Nibbled>(x: XRow, groups: usize, to: *mut u8) {
    // SAFETY: the token has the values, its scales are padded to a multiple of eight, and `to` has room for whole units.
    unsafe {
        let mut to = to;
        for first in (0..groups).step_by(8) {
            for half in [first, first + 4] {
                let bytes = 32 * groups.saturating_sub(half);
                let q = x.q.cast::<u8>().wrapping_add(32 * half);
                let a = window::<false>(q, bytes);
                let b = window::<false>(q.wrapping_add(64), bytes.saturating_sub(64));
                _mm512_storeu_si512(to.cast(), _mm512_shuffle_i64x2::<0b10_00_10_00>(a, b));
                _mm512_storeu_si512(to.add(64).cast(), _mm512_shuffle_i64x2::<0b11_01_11_01>(a, b));
                to = to.add(128);
            }
            _mm256_storeu_ps(to.cast(), _mm256_loadu_ps(x.d.add(first)));
            let sums = _mm256_loadu_ps(x.s.add(first));
            _mm256_storeu_ps(to.cast::<f32>().add(8), _mm256_mul_ps(sums, _mm256_set1_ps(B::CENTRE)));
            to = to.add(64);
        }
    }
}

/// The 64 bytes of nibbles of four blocks at `p`; those of blocks from `blocks` on are zero.
#[inline(always)]
unsafe fn nibbles<B: Nibbled, const BYTES: bool, const WHOLE: bool>(p: *const u8, blocks: usize) -> __m512i {
    // SAFETY: the blocks are there.
    unsafe {
        let head = Places::<B>::HEAD;
        let first = if WHOLE || blocks > 0 { sixteen(p.add(head)) } else { _mm512_setzero_si512() };
        if BYTES {
            let back = 4 * B::BLOCK - 64;
            let others = window::<WHOLE>(p.wrapping_add(back), (blocks * B::BLOCK).saturating_sub(back));
            let places = _mm512_loadu_si512(Places::<B>::NIBBLES.as_ptr().cast());
            return _mm512_mask_permutexvar_epi8(first, !0xffff, places, others);
        }
        let at = |block: usize| p.wrapping_add(block * B::BLOCK + head).cast();
        let mut all = first;
        if WHOLE || blocks > 1 {
            all = _mm512_mask_broadcast_i32x4(all, 0x00f0, _mm_loadu_si128(at(1)));
        }
        if WHOLE || blocks > 2 {
            all = _mm512_mask_broadcast_i32x4(all, 0x0f00, _mm_loadu_si128(at(2)));
        }
        if WHOLE || blocks > 3 {
            all = _mm512_mask_broadcast_i32x4(all, 0xf000, _mm_loadu_si128(at(3)));
        }
        all
    }
}

/// The heads of eight blocks at `p` together, those from `blocks` on zero; without VBMI nothing, for each is read where it is used.
#[inline(always)]
unsafe fn heads<B: Nibbled, const BYTES: bool, const WHOLE: bool>(p: *const u8, blocks: usize) -> __m512i {
    // SAFETY: the blocks are there.
    unsafe {
        if !BYTES {
            return _mm512_setzero_si512();
        }
        let places = _mm512_loadu_si512(Places::<B>::HEADS.as_ptr().cast());
        let mut heads = _mm512_setzero_si512();
        for w in 0..Places::<B>::WINDOWS {
            let at = Places::<B>::window(w);
            let bytes = window::<WHOLE>(p.wrapping_add(at), (blocks * B::BLOCK).saturating_sub(at));
            heads = _mm512_mask_permutexvar_epi8(heads, Places::<B>::heads_of(w), places, bytes);
        }
        heads
    }
}

/// Bit 4 of 64 bytes: the fifth bits of the low nibbles (`HIGH` 0) or the high ones of four blocks at `p`, whose heads are in the
/// lower or the upper half (`UPPER`) of `heads`.
#[inline(always)]
unsafe fn fifths<B: Nibbled, const BYTES: bool, const HIGH: usize, const UPPER: bool>(
    p: *const u8,
    blocks: usize,
    heads: __m512i,
) -> __m512i {
    // SAFETY: the blocks are there.
    unsafe {
        if BYTES {
            let places = _mm512_loadu_si512(Places::<B>::FIFTHS[HIGH].as_ptr().cast());
            let places = if UPPER { _mm512_add_epi8(places, _mm512_set1_epi64(16 << 24)) } else { places };
            let row = _mm512_maskz_permutexvar_epi8(0x0808_0808_0808_0808, places, heads);
            let bits = _mm512_set1_epi64(0x8040_2010_0804_0201_u64 as i64);
            return _mm512_gf2p8affine_epi64_epi8::<0>(bits, row);
        }
        let mut mask = 0;
        for block in 0..blocks.min(4) {
            let bits = p.add(block * B::BLOCK + Places::<B>::HEAD - 4 + 2 * HIGH).cast::<u16>().read_unaligned();
            mask |= u64::from(bits) << (16 * block);
        }
        _mm512_maskz_set1_epi8(mask, 16)
    }
}

/// Low and high nibbles with their fifth bits of four blocks at `p`.
#[inline(always)]
unsafe fn weights<B: Nibbled, const BYTES: bool, const WHOLE: bool, const UPPER: bool>(
    p: *const u8,
    blocks: usize,
    heads: __m512i,
) -> [__m512i; 2] {
    // SAFETY: the blocks are there.
    unsafe {
        let raw = nibbles::<B, BYTES, WHOLE>(p, blocks);
        let (high, mask) = (_mm512_srli_epi16::<4>(raw), _mm512_set1_epi8(15));
        if !B::FIFTH {
            return [_mm512_and_si512(raw, mask), _mm512_and_si512(high, mask)];
        }
        let bits = [fifths::<B, BYTES, 0, UPPER>(p, blocks, heads), fifths::<B, BYTES, 1, UPPER>(p, blocks, heads)];
        // (nibbles & mask) | bits
        [_mm512_ternarylogic_epi64::<0xea>(raw, mask, bits[0]), _mm512_ternarylogic_epi64::<0xea>(high, mask, bits[1])]
    }
}

/// The scales of eight blocks in lanes 0 to 7, their minima (or the scales again) behind.
#[inline(always)]
unsafe fn scales<B: Nibbled, const BYTES: bool>(p: *const u8, blocks: usize, heads: __m512i) -> __m512 {
    // SAFETY: the blocks are there.
    unsafe {
        if BYTES {
            return _mm512_cvtph_ps(_mm512_castsi512_si256(heads));
        }
        let (d, m) = B::scales(p, blocks);
        let m = if B::MINIMUM { m[0] } else { d[0] };
        _mm512_insertf32x8::<1>(_mm512_castps256_ps512(d[0]), m)
    }
}

/// Products of 64 low and 64 high nibbles, for each block in four lanes.
#[inline(always)]
unsafe fn dots(w: [__m512i; 2], x: *const u8) -> __m512i {
    // SAFETY: 128 values are there.
    unsafe {
        let low = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w[0], _mm512_loadu_si512(x.cast()));
        _mm512_dpbusd_epi32(low, w[1], _mm512_loadu_si512(x.add(64).cast()))
    }
}

/// Adds products, whose lanes are those of the blocks in `order`, under their scales `d` and those of the activations at `x`; minima
/// times sums go to the upper half of the second vector.
#[inline(always)]
unsafe fn add(sums: &mut [__m512; 2], dots: __m512i, order: __m512i, d: __m512, x: *const u8) {
    // SAFETY: the unit's activations are there.
    unsafe {
        let scales = _mm512_mul_ps(d, _mm512_loadu_ps(x.add(256).cast()));
        sums[1] = _mm512_add_ps(sums[1], scales);
        sums[0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), _mm512_permutexvar_ps(order, scales), sums[0]);
    }
}

/// A unit of `groups` blocks at `p` (eight, if `WHOLE`), times the tokens at `x`.
#[inline(always)]
unsafe fn unit<B: Nibbled, const T: usize, const BYTES: bool, const WHOLE: bool>(
    p: *const u8,
    groups: usize,
    x: *const u8,
    x_bytes: usize,
    sums: &mut [[__m512; 2]; T],
) {
    // SAFETY: the row holds the groups, and the arranged activations whole units.
    unsafe {
        let heads = heads::<B, BYTES, WHOLE>(p, groups);
        let (d, rest) = (scales::<B, BYTES>(p, groups, heads), groups.saturating_sub(4));
        let first = weights::<B, BYTES, WHOLE, false>(p, groups, heads);
        let second = weights::<B, BYTES, WHOLE, true>(p.wrapping_add(4 * B::BLOCK), rest, heads);
        // The order that packing leaves: two lanes of block b, two of b + 4.
        let order = _mm512_setr_epi32(0, 0, 4, 4, 1, 1, 5, 5, 2, 2, 6, 6, 3, 3, 7, 7);
        for t in 0..T {
            let x = x.add(t * x_bytes);
            // Eight products are 8 · 31 · 127 at most, which 16 bits hold.
            let words = _mm512_packs_epi32(dots(first, x), dots(second, x.add(128)));
            add(&mut sums[t], _mm512_madd_epi16(words, _mm512_set1_epi16(1)), order, d, x);
        }
    }
}

/// At most four blocks at the end of a row.
#[inline(always)]
unsafe fn half<B: Nibbled, const T: usize, const BYTES: bool>(
    p: *const u8,
    groups: usize,
    x: *const u8,
    x_bytes: usize,
    sums: &mut [[__m512; 2]; T],
) {
    // SAFETY: as for `unit`.
    unsafe {
        let heads = heads::<B, BYTES, false>(p, groups);
        let d = scales::<B, BYTES>(p, groups, heads);
        let w = weights::<B, BYTES, false, false>(p, groups, heads);
        let order = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        for t in 0..T {
            let x = x.add(t * x_bytes);
            add(&mut sums[t], dots(w, x), order, d, x);
        }
    }
}
