//! Few tokens: a row after the other, 64 weights at a time.

// Registers are numbered: `for r in 0..R` says what happens better than zipped iterators do.
#![allow(clippy::needless_range_loop)]

use super::super::avx2::unpack::{self, Block, Sixteen};
use super::super::tile::XRow;
use super::super::{LinearTask, Q8};
use crate::cpu::isa::Avx512;
use crate::cpu::kernels::{ask_ahead, asks_ahead};
use std::arch::x86_64::*;

/// A format's bytes, 64 at a time.
pub(in super::super) trait Pair: Block {
    /// Groups `2·j` and `2·j + 1`.
    ///
    /// # Safety
    /// `p` points at a unit that has both; the caller has AVX-512 F, BW, DQ, VL.
    #[inline(always)]
    unsafe fn pair(p: *const u8, j: usize) -> __m512i {
        // SAFETY: the caller's contract.
        unsafe { _mm512_inserti64x4::<1>(_mm512_castsi256_si512(Self::group(p, 2 * j)), Self::group(p, 2 * j + 1)) }
    }

    /// What [`Block::scales`] gives, by fewer instructions where the format allows it.
    ///
    /// # Safety
    /// `p` points at a unit of `groups` groups; the caller has AVX-512 F, BW, DQ, VL.
    #[inline(always)]
    unsafe fn pick(p: *const u8, groups: usize) -> (Sixteen, Sixteen) {
        // SAFETY: the caller's contract.
        unsafe { Self::scales(p, groups) }
    }
}

/// Scales and minima of Q4_K and Q5_K, whose blocks begin with `d: f16, dmin: f16, scales: [u8; 12]`.
#[inline(always)]
unsafe fn six_bit(p: *const u8) -> (Sixteen, Sixteen) {
    // SAFETY: the block holds 16 bytes.
    unsafe {
        // Words: d and dmin, x, y, z. Scales are x's low six bits, then z's low nibbles under x's high bits; minima likewise
        // of y and z's high nibbles.
        let words = _mm_loadu_si128(p.cast());
        let top = _mm_srlv_epi32(_mm_shuffle_epi32::<0b10_10_01_01>(words), _mm_setr_epi32(0, 2, 0, 2));
        let top = _mm_and_si128(top, _mm_setr_epi32(0x3f3f_3f3f, 0x3030_3030, 0x3f3f_3f3f, 0x3030_3030));
        let nibbles = _mm_srlv_epi32(_mm_shuffle_epi32::<0b11_11_11_11>(words), _mm_setr_epi32(0, 0, 0, 4));
        let nibbles = _mm_and_si128(nibbles, _mm_setr_epi32(0, 0x0f0f_0f0f, 0, 0x0f0f_0f0f));
        let values = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_or_si128(top, nibbles)));
        // d, then dmin with its sign turned.
        let scales = _mm256_xor_si256(_mm256_broadcastd_epi32(words), _mm256_set1_epi32(1 << 31));
        let scales = _mm512_cvtph_ps(scales);
        let scales = _mm512_mask_movehdup_ps(_mm512_moveldup_ps(scales), 0xff00, scales);
        let both = _mm512_mul_ps(values, scales);
        ([_mm512_castps512_ps256(both); 2], [_mm512_extractf32x8_ps::<1>(both); 2])
    }
}

macro_rules! pair {
    ($($name:ident),*; $($own:ident $(pair |$p:ident, $j:ident| $pair:expr)? $(, pick |$q:ident| $pick:expr)?;)*) => {
        $(impl Pair for unpack::$name {})*
        $(impl Pair for unpack::$own {
            $(#[inline(always)]
            unsafe fn pair($p: *const u8, $j: usize) -> __m512i {
                // SAFETY: offsets within the unit, by the format's layout.
                unsafe { $pair }
            })?
            $(#[inline(always)]
            unsafe fn pick($q: *const u8, _groups: usize) -> (Sixteen, Sixteen) {
                // SAFETY: offsets within the unit, by the format's layout.
                unsafe { $pick }
            })?
        })*
    };
}

pair!(
    Q8_0, Iq4Nl, Mxfp4, Q2K, Q3K, Q8K, Iq4Xs;
    Q4K pair |p, j| {
        // 32 bytes: the low nibbles are one group, the high ones the next.
        let both = _mm512_broadcast_i64x4(_mm256_loadu_si256(p.add(16 + 32 * j).cast()));
        let shift = _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4);
        _mm512_and_si512(_mm512_srlv_epi64(both, shift), _mm512_set1_epi8(15))
    }, pick |p| six_bit(p);
    Q5K, pick |p| six_bit(p);
    Q6K pair |p, j| {
        let (half, j) = (j / 2, j % 2);
        let low = _mm512_loadu_si512(p.add(64 * half).cast());
        let low = if j == 0 { low } else { _mm512_srli_epi16::<4>(low) };
        let low = _mm512_and_si512(low, _mm512_set1_epi8(15));
        // Two bits of each of four groups in 32 bytes; they go to bits 4 and 5.
        let high = _mm512_broadcast_i64x4(_mm256_loadu_si256(p.add(128 + 32 * half).cast()));
        let high = if j == 0 {
            _mm512_sllv_epi64(high, _mm512_setr_epi64(4, 4, 4, 4, 2, 2, 2, 2))
        } else {
            _mm512_srlv_epi64(high, _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2))
        };
        _mm512_or_si512(low, _mm512_and_si512(high, _mm512_set1_epi8(0x30)))
    };
);

/// A few tokens: row after row, so that a thread reads one stream. Two rows at a time would share the loads of the activations,
/// but read from memory at half the rate: the hardware prefetches one stream of whole pages better than two that jump.
pub(in super::super) fn run<B: Pair>(_proof: Avx512, task: &LinearTask<'_>) {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn inner<B: Pair>(task: &LinearTask<'_>) {
        let Some(x) = task.x.q8 else { return };
        let mut t = 0;
        while t < task.x.tokens {
            // SAFETY: the features are enabled here, and `linear` checked the task.
            unsafe {
                match task.x.tokens - t {
                    1 => matvec::<B, 1>(task, &x, t),
                    _ => matvec::<B, 2>(task, &x, t),
                }
            }
            t += 2;
        }
    }
    // SAFETY: the token proves the features.
    unsafe { inner::<B>(task) }
}

/// Tokens `t0 .. t0 + T`.
#[inline(always)]
unsafe fn matvec<B: Pair, const T: usize>(task: &LinearTask<'_>, x: &Q8<'_>, t0: usize) {
    let Some(row_bytes) = task.dtype.row_bytes(task.k) else { return };
    // SAFETY: rows and tokens in range, `linear` checked; units and their tail stay within the row.
    unsafe {
        let x = XRow::some::<T>(x, t0);
        let asks = asks_ahead();
        for row in task.rows.clone() {
            let mut p = task.weight.as_ptr().add(row * row_bytes);
            let mut sums = [[_mm512_setzero_ps(); 2]; T];
            for u in 0..task.k / 256 {
                if asks {
                    ask_ahead(p, B::BYTES);
                }
                unit::<B, T>(p, u, 8, &x, &mut sums);
                p = p.add(B::BYTES);
            }
            if asks {
                ask_ahead(p, task.k % 256 / 32 * B::BYTES / 8);
            }
            // Known numbers make shorter code of the widths that small models have.
            match task.k % 256 / 32 {
                0 => {}
                2 => unit::<B, T>(p, task.k / 256, 2, &x, &mut sums),
                4 => unit::<B, T>(p, task.k / 256, 4, &x, &mut sums),
                groups => unit::<B, T>(p, task.k / 256, groups, &x, &mut sums),
            }
            for (t, [a, b]) in sums.iter().enumerate().take(task.x.tokens - t0) {
                task.out.write(t0 + t, row, _mm512_reduce_add_ps(_mm512_add_ps(*a, *b)), task.accumulate);
            }
        }
    }
}

/// Unit `u` of a row, which lies at `p` and has `groups` groups.
#[inline(always)]
unsafe fn unit<B: Pair, const T: usize>(
    p: *const u8,
    u: usize,
    groups: usize,
    x: &[XRow; T],
    sums: &mut [[__m512; 2]; T],
) {
    // SAFETY: the row holds the groups; activation scales are padded to a multiple of eight groups.
    unsafe {
        let mut scales = [_mm512_setzero_ps(); T];
        let (d, m) = offset_scales::<B>(p, groups);
        // Pair j finds the scales of its four times four lanes at place j of each: a shuffle within lanes is cheap.
        let order = if B::HALVES {
            _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)
        } else {
            _mm512_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7)
        };
        for t in 0..T {
            let dx = _mm256_loadu_ps(x[t].d.add(8 * u));
            let products = if B::HALVES {
                let twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
                let dx = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(dx));
                let s = _mm512_loadu_ps(x[t].s16.add(16 * u));
                sums[t][1] = _mm512_fmadd_ps(join(m), s, sums[t][1]);
                _mm512_mul_ps(join(d), dx)
            } else {
                let minima = _mm256_mul_ps(m[0], _mm256_loadu_ps(x[t].s.add(8 * u)));
                sums[t][1] = _mm512_add_ps(sums[t][1], _mm512_zextps256_ps512(minima));
                _mm512_castps256_ps512(_mm256_mul_ps(d[0], dx))
            };
            scales[t] = _mm512_permutexvar_ps(order, products);
        }
        if B::RUN >= 4 && !B::HALVES && !B::SIGNED && groups == 8 {
            let w = [B::pair(p, 0), B::pair(p, 1), B::pair(p, 2), B::pair(p, 3)];
            for t in 0..T {
                let q = x[t].q.add(256 * u);
                let dots = dots_of_a_unit(&w, q);
                sums[t][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), scales[t], sums[t][0]);
            }
            return;
        }
        let flip = _mm512_set1_epi8(-128);
        for j in 0..groups.div_ceil(2) {
            let whole = 2 * j + 1 < groups;
            let w = if whole { B::pair(p, j) } else { _mm512_zextsi256_si512(B::group(p, 2 * j)) };
            let w = if B::SIGNED { _mm512_xor_si512(w, flip) } else { w };
            for t in 0..T {
                let q = x[t].q.add(256 * u + 64 * j);
                let q = if whole {
                    _mm512_loadu_si512(q.cast())
                } else {
                    _mm512_zextsi256_si512(_mm256_loadu_si256(q.cast()))
                };
                let dot = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), w, q));
                let scale = match j {
                    0 => _mm512_permute_ps::<0b00_00_00_00>(scales[t]),
                    1 => _mm512_permute_ps::<0b01_01_01_01>(scales[t]),
                    2 => _mm512_permute_ps::<0b10_10_10_10>(scales[t]),
                    _ => _mm512_permute_ps::<0b11_11_11_11>(scales[t]),
                };
                sums[t][j % 2] = _mm512_fmadd_ps(dot, scale, sums[t][j % 2]);
            }
        }
    }
}

/// The products of a unit's eight groups with their activations at `q`, for weights of five bits at most: four lanes hold the sums of
/// groups 0, 2, 4 and 6 over half their values, the next four those over the other half, and so on for groups 1, 3, 5 and 7. That is
/// the order in which the scales lie, and one conversion and one multiply-add for what would be four of each.
#[inline(always)]
unsafe fn dots_of_a_unit(w: &[__m512i; 4], q: *const i8) -> __m512i {
    // SAFETY: the caller has the instructions, and a unit of activations.
    unsafe {
        let dot =
            |j: usize| _mm512_dpbusd_epi32(_mm512_setzero_si512(), w[j], _mm512_loadu_si512(q.add(64 * j).cast()));
        // Eight products are 8 · 31 · 127 at most, which 16 bits hold.
        let joined = |a, b| _mm512_madd_epi16(_mm512_packs_epi32(a, b), _mm512_set1_epi16(1));
        joined(joined(dot(0), dot(1)), joined(dot(2), dot(3)))
    }
}

/// Scales and minima, the latter for bytes made unsigned.
#[inline(always)]
unsafe fn offset_scales<B: Pair>(p: *const u8, groups: usize) -> (Sixteen, Sixteen) {
    // SAFETY: the caller's contract.
    unsafe {
        let (d, m) = B::pick(p, groups);
        let by = _mm256_set1_ps(-128.0);
        (d, if B::SIGNED { [_mm256_mul_ps(d[0], by), _mm256_mul_ps(d[1], by)] } else { m })
    }
}

#[inline(always)]
unsafe fn join(v: Sixteen) -> __m512 {
    // SAFETY: register arithmetic.
    unsafe { _mm512_insertf32x8::<1>(_mm512_castps256_ps512(v[0]), v[1]) }
}
