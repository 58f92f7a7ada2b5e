//! AVX-512 with VNNI: sums of products are one instruction, at either level.

mod bytes;
mod words;

use super::super::source::{Source, by_type};
use super::super::{LinearTask, Scratch};
use super::blocks::{self, Backward, Forward, LANES, Rows, Target, Vectors};
use super::{Level, Rounded, RoundedBackwardTask, SMALLEST};
use crate::quant::DType;
use std::arch::x86_64::*;

/// The forward map for a type; to be called with the instructions of the token `Avx512`, and a task that has been checked.
pub(super) fn forward_of(dtype: DType) -> Forward {
    by_type!(dtype, forward)
}

/// The backward pass for a type, likewise.
pub(super) fn backward_of<Q: Level>(dtype: DType) -> Backward<Q>
where
    Avx512: Vectors<Q>,
{
    by_type!(dtype, backward, Q)
}

/// # Safety
/// As for [`blocks::forward`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn forward<S: Source>(task: &LinearTask<'_>, x: &Rounded<'_, i16>, scratch: &mut Scratch) {
    // SAFETY: the caller's promise.
    unsafe { blocks::forward::<S, Avx512>(task, x, scratch) }
}

/// # Safety
/// As for [`blocks::backward`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn backward<S: Source, Q: Level>(task: &RoundedBackwardTask<'_, Rounded<'_, Q>>, scratch: &mut Scratch)
where
    Avx512: Vectors<Q>,
{
    // SAFETY: the caller's promise.
    unsafe { blocks::backward::<S, Q, Avx512>(task, scratch) }
}

/// The kernels of both levels.
pub(super) struct Avx512;

/// Rows and where their results go in parts of `most` tokens, or a little fewer, as equal as can be: few sums at a time would wait for
/// each other.
fn in_tiles<Q: Copy>(x: Rows<Q>, to: Target, most: usize) -> impl Iterator<Item = (Rows<Q>, Target)> {
    let tiles = x.tokens.div_ceil(most);
    (0..tiles).scan(0, move |t, i| {
        let n = (x.tokens - *t).div_ceil(tiles - i);
        let part = (x.from(*t, n), to.from(*t));
        *t += n;
        Some(part)
    })
}

/// Writes the lanes of slab `s` of token `t`, times `by`, or adds them.
///
/// # Safety
/// The target has room; the caller has the instructions.
#[inline(always)]
unsafe fn write(to: Target, t: usize, s: usize, lanes: __m512, by: __m512) {
    let columns = to.columns.saturating_sub(LANES * s).min(LANES);
    let mask = ((1u32 << columns) - 1) as __mmask16;
    let at = to.at.wrapping_add(t * to.row + LANES * s);
    // SAFETY: the caller's promise; nothing behind the columns is touched.
    unsafe {
        let old = if to.add { _mm512_maskz_loadu_ps(mask, at) } else { _mm512_setzero_ps() };
        _mm512_mask_storeu_ps(at, mask, _mm512_fmadd_ps(lanes, by, old));
    }
}

/// Scales of sixteen lanes.
struct Scales {
    /// What a rounded value is to be multiplied with.
    scale: __m512,
    /// What a value is multiplied with to be rounded.
    inverse: __m512,
    /// The lanes of which anything is to be multiplied: those of finite values that are not all tiny.
    keep: __mmask16,
}

/// Scales by which the largest of each lane's `steps` values becomes a level's most.
///
/// # Safety
/// `step` may be called for each of the steps; the caller has the instructions.
#[inline(always)]
unsafe fn scales_of<Q: Level>(step: impl Fn(usize) -> __m512, steps: usize) -> Scales {
    // SAFETY: register arithmetic.
    unsafe {
        let size = |v: __m512| _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fff_ffff));
        let mut top = [_mm512_setzero_si512(); 2];
        for i in (0..steps / 2 * 2).step_by(2) {
            top[0] = _mm512_max_epi32(top[0], size(step(i)));
            top[1] = _mm512_max_epi32(top[1], size(step(i + 1)));
        }
        if steps % 2 == 1 {
            top[0] = _mm512_max_epi32(top[0], size(step(steps - 1)));
        }
        let top = _mm512_max_epi32(top[0], top[1]);
        let most = _mm512_castsi512_ps(top);
        let infinite = _mm512_cmpgt_epi32_mask(top, _mm512_set1_epi32(0x7f7f_ffff));
        let tiny = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(most, _mm512_set1_ps(SMALLEST));
        let keep = !(infinite | tiny);
        let scale = _mm512_maskz_div_ps(keep, most, _mm512_set1_ps(Q::MOST_WEIGHT));
        let inverse = _mm512_maskz_div_ps(keep, _mm512_set1_ps(Q::MOST_WEIGHT), most);
        Scales { scale: _mm512_mask_mov_ps(scale, infinite, _mm512_set1_ps(f32::NAN)), inverse, keep }
    }
}
