//! Quantization of activations: sixteen groups at a time, so that what there is one of for a group, its scale and its sums, is computed
//! in lanes as well.

use super::super::activations::{GROUP, Row, SMALLEST};
use super::super::avx2;
use crate::cpu::isa::Avx512;
use std::arch::x86_64::*;

/// Quantizes one row exactly as the scalar form does.
pub(in super::super) fn quantize_row(proof: Avx512, x: &[f32], row: Row<'_>) {
    if x.len() < PAYS_FROM {
        return avx2::quantize_row(proof.avx2(), x, row);
    }
    assert!(x.len() == row.qs.len());
    // SAFETY: the token proves the features.
    unsafe { quantize(x, row) }
}

/// From how many values on this is quicker than a group after the other: a quarter of what is computed at a time.
const PAYS_FROM: usize = GROUP * GROUPS / 4;

/// Groups at a time.
const GROUPS: usize = 16;

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn quantize(x: &[f32], row: Row<'_>) {
    let n = x.len() / GROUP;
    for (first, x) in (0..n).step_by(GROUPS).zip(x.chunks(GROUP * GROUPS)) {
        let m = x.len() / GROUP;
        // Absolute values compare as their bit patterns do, with infinities and NaNs on top. All sums and maxima stay in registers: what
        // was stored in parts would be waited for.
        let mut fours = [_mm512_setzero_si512(); 4];
        for (i, four) in fours.iter_mut().enumerate() {
            let mut tops = [_mm512_setzero_si512(); 4];
            for (top, x) in tops.iter_mut().zip(x.chunks_exact(GROUP).skip(4 * i)) {
                let size = |v| _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fff_ffff));
                let [a, b] = halves(x);
                *top = _mm512_max_epi32(size(a), size(b));
            }
            let [a, b, c, d] = tops;
            let ab = _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let cd = _mm512_max_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            *four = _mm512_max_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        }
        let [a, b, c, d] = fours;
        let ab = _mm512_max_epi32(_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0xee>(a, b));
        let cd = _mm512_max_epi32(_mm512_shuffle_i32x4::<0x44>(c, d), _mm512_shuffle_i32x4::<0xee>(c, d));
        let tops = _mm512_max_epi32(_mm512_shuffle_i32x4::<0x88>(ab, cd), _mm512_shuffle_i32x4::<0xdd>(ab, cd));
        let most = _mm512_castsi512_ps(tops);
        let infinite = _mm512_cmpge_epi32_mask(tops, _mm512_set1_epi32(0x7f80_0000));
        let keep = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(most, _mm512_set1_ps(SMALLEST)) & !infinite;
        let scale = _mm512_maskz_div_ps(keep, most, _mm512_set1_ps(127.0));
        let scale = _mm512_mask_mov_ps(scale, infinite, _mm512_set1_ps(f32::NAN));
        let mut inverses = [0f32; GROUPS];
        // SAFETY: as many values as lanes.
        unsafe { _mm512_storeu_ps(inverses.as_mut_ptr(), _mm512_maskz_div_ps(keep, _mm512_set1_ps(127.0), most)) };

        // Of each four groups the sums of the first halves, then of the others.
        let mut sums = [_mm256_setzero_si256(); 4];
        for (i, sums) in sums.iter_mut().enumerate() {
            let mut quads = [_mm256_setzero_si256(); 4];
            for (g, quads) in (4 * i..m).zip(&mut quads) {
                // Zeros where nothing is kept: what is not finite would not become one.
                let lanes = if keep >> g & 1 == 1 { !0 } else { 0 };
                let by = _mm512_set1_ps(inverses[g]);
                let byte = |v| _mm512_cvtepi32_epi8(_mm512_maskz_cvtps_epi32(lanes, _mm512_mul_ps(v, by)));
                let [a, b] = halves(&x[GROUP * g..GROUP * (g + 1)]);
                let bytes = _mm256_set_m128i(byte(b), byte(a));
                let to = &mut row.qs[GROUP * (first + g)..GROUP * (first + g + 1)];
                // SAFETY: 32 bytes.
                unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), bytes) };
                *quads = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), bytes);
            }
            let [a, b, c, d] = quads;
            *sums = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
        }
        let pair = |a, b| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b);
        let (ab, cd) = (pair(sums[0], sums[1]), pair(sums[2], sums[3]));
        let (a, b) = (_mm512_shuffle_i32x4::<0x88>(ab, cd), _mm512_shuffle_i32x4::<0xdd>(ab, cd));
        let offset = |sum| _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32::<7>(sum));
        let whole = _mm512_add_epi32(a, b);
        let there = ((1u32 << m) - 1) as __mmask16;
        let (d, s, c) = (&mut row.d[first..first + m], &mut row.s[first..first + m], &mut row.c[first..first + m]);
        // SAFETY: the lanes that are there are as many as the slices have values.
        unsafe {
            _mm512_mask_storeu_ps(d.as_mut_ptr(), there, scale);
            _mm512_mask_storeu_ps(s.as_mut_ptr(), there, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(whole)));
            _mm512_mask_storeu_epi32(c.as_mut_ptr(), there, offset(whole));
        }
        let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        let (s16, c16) = (&mut row.s16[2 * first..2 * (first + m)], &mut row.c16[2 * first..2 * (first + m)]);
        for (i, order) in [low, high].into_iter().enumerate() {
            let halves = _mm512_permutex2var_epi32(a, order, b);
            let scales = _mm512_permutexvar_ps(_mm512_and_si512(order, _mm512_set1_epi32(15)), scale);
            let there = ((1u32 << (2 * m).saturating_sub(16 * i).min(16)) - 1) as __mmask16;
            // SAFETY: as above.
            unsafe {
                let sums = _mm512_mul_ps(scales, _mm512_cvtepi32_ps(halves));
                _mm512_mask_storeu_ps(s16.as_mut_ptr().wrapping_add(16 * i), there, sums);
                _mm512_mask_storeu_epi32(c16.as_mut_ptr().wrapping_add(16 * i), there, offset(halves));
            }
        }
    }
    row.pad(n);
}

/// The 32 values of a group.
#[target_feature(enable = "avx512f")]
#[inline]
fn halves(x: &[f32]) -> [__m512; 2] {
    assert!(x.len() == GROUP);
    // SAFETY: as many values.
    unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))] }
}
