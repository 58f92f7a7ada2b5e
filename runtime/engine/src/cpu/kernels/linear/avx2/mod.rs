//! Linear kernels for AVX2 with FMA and F16C. What needs the instructions is written in functions that are inlined into
//! one entry per kernel; an entry can be reached with the capability token only.

mod matvec;
pub(super) mod source;
pub(super) mod tile;
pub(super) mod unpack;

use super::activations::{GROUP, Row, SMALLEST};
use super::tile::XRow;
use super::{LinearTask, Q8, Scratch};
use crate::cpu::isa::Avx2;
pub(super) use matvec::horizontal;
use matvec::{Maddubs, matvec};
use std::arch::x86_64::*;
use tile::Avx2Tile;
use unpack::Block;

/// One to four tokens.
pub(super) fn run_matvec<B: Block>(_proof: Avx2, task: &LinearTask<'_>) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn inner<B: Block>(task: &LinearTask<'_>) {
        // SAFETY: the features are enabled here, and `linear` checked the task.
        unsafe { by_tokens::<B, Maddubs>(task) }
    }
    // SAFETY: the token proves the features.
    unsafe { inner::<B>(task) }
}

/// Splits a task into at most four tokens at a time.
///
/// # Safety
/// The caller has AVX2, FMA, F16C and what `D` needs, and `linear` has checked the task.
#[inline(always)]
pub(super) unsafe fn by_tokens<B: Block, D: matvec::Dot>(task: &LinearTask<'_>) {
    let Some(x) = task.x.q8 else { return };
    let mut t = 0;
    while t < task.x.tokens {
        // SAFETY: by the contract.
        unsafe {
            match task.x.tokens - t {
                1 => some::<B, D, 1>(task, &x, t),
                2 => some::<B, D, 2>(task, &x, t),
                _ => some::<B, D, 4>(task, &x, t),
            }
        }
        t += 4;
    }
}

/// Tokens `t0 .. t0 + T`.
#[inline(always)]
unsafe fn some<B: Block, D: matvec::Dot, const T: usize>(task: &LinearTask<'_>, x: &Q8<'_>, t0: usize) {
    let Some(row_bytes) = task.dtype.row_bytes(task.k) else { return };
    // SAFETY: by `by_tokens`' contract.
    unsafe {
        let x = XRow::some::<T>(x, t0);
        matvec::<B, D, T>(task.weight.as_ptr(), row_bytes, task.k, task.rows.clone(), x, |t, row, value| {
            if t0 + t < task.x.tokens {
                task.out.write(t0 + t, row, value, task.accumulate);
            }
        });
    }
}

/// Many tokens.
pub(super) fn run_tile<B: Block>(_proof: Avx2, task: &LinearTask<'_>, scratch: &mut Scratch) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn inner<B: Block>(task: &LinearTask<'_>, scratch: &mut Scratch) {
        // SAFETY: the features are enabled here, and `linear` checked the task.
        unsafe { super::tile::run::<Avx2Tile<B>>(task, scratch) }
    }
    // SAFETY: the token proves the features.
    unsafe { inner::<B>(task, scratch) }
}

/// Quantizes one row exactly as the scalar form does.
pub(super) fn quantize_row(_proof: Avx2, x: &[f32], row: Row<'_>) {
    assert!(x.len() == row.qs.len());
    // SAFETY: the token proves the features.
    unsafe { quantize(x, row) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn quantize(x: &[f32], mut row: Row<'_>) {
    let n = row.qs.len() / GROUP;
    for (g, x) in x.chunks_exact(GROUP).enumerate() {
        let q = &mut row.qs[GROUP * g..GROUP * (g + 1)];
        let mut v = [_mm256_setzero_ps(); 4];
        let mut top = _mm256_setzero_si256();
        for (v, x) in v.iter_mut().zip(x.chunks_exact(8)) {
            // SAFETY: `x` is 8 long.
            *v = unsafe { _mm256_loadu_ps(x.as_ptr()) };
            top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(*v), _mm256_set1_epi32(0x7fff_ffff)));
        }
        let top = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256::<1>(top));
        let top = _mm_max_epi32(top, _mm_unpackhi_epi64(top, top));
        let top = _mm_max_epi32(top, _mm_shuffle_epi32::<1>(top));
        let amax = f32::from_bits(_mm_cvtsi128_si32(top) as u32);
        let (scale, inverse) = match amax {
            _ if !amax.is_finite() => (f32::NAN, 0.0),
            _ if amax < SMALLEST => (0.0, 0.0),
            _ => (amax / 127.0, 127.0 / amax),
        };
        let mut sums = [0; 2];
        if inverse == 0.0 {
            q.fill(0);
        } else {
            let by = _mm256_set1_ps(inverse);
            let mut int = [_mm256_setzero_si256(); 4];
            for (int, v) in int.iter_mut().zip(v) {
                *int = _mm256_cvtps_epi32(_mm256_mul_ps(v, by));
            }
            for half in 0..2 {
                let sum = _mm256_add_epi32(int[2 * half], int[2 * half + 1]);
                let sum = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
                let sum = _mm_add_epi32(sum, _mm_unpackhi_epi64(sum, sum));
                sums[half] = _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32::<1>(sum)));
            }
            let words = [_mm256_packs_epi32(int[0], int[1]), _mm256_packs_epi32(int[2], int[3])];
            let bytes = _mm256_packs_epi16(words[0], words[1]);
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            // SAFETY: `q` is 32 long.
            unsafe { _mm256_storeu_si256(q.as_mut_ptr().cast(), _mm256_permutevar8x32_epi32(bytes, order)) };
        }
        row.group(g, scale, sums);
    }
    row.pad(n);
}
