//! Many tokens: 32 rows are unpacked once and multiplied with six tokens at a time. Eight tokens or fewer are `few`'s.

use super::super::tile::{Ahead, Place, Tile, TileMemory, XRow};
use super::super::{LinearTask, Scratch};
use super::turn::{Turn, unpack};
use crate::cpu::isa::Avx512;
use std::arch::x86_64::*;

/// Runs a task.
pub(in super::super) fn run<B: Turn>(_proof: Avx512, task: &LinearTask<'_>, scratch: &mut Scratch) {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn inner<B: Turn>(task: &LinearTask<'_>, scratch: &mut Scratch) {
        // SAFETY: the features are enabled here, and `linear` checked the task.
        unsafe {
            match task.x.tokens {
                0..=4 => super::few::run::<B, 4>(task, scratch),
                5..=8 => super::few::run::<B, 8>(task, scratch),
                _ => super::super::tile::run::<Avx512Tile<B>>(task, scratch),
            }
        }
    }
    // SAFETY: the token proves the features.
    unsafe { inner::<B>(task, scratch) }
}

/// Rows of a tile: two vectors of 16 lanes.
const ROWS: usize = 32;

/// The AVX-512 tile kernel of a type.
struct Avx512Tile<B>(std::marker::PhantomData<B>);

impl<B: Turn> Tile for Avx512Tile<B> {
    const ROWS: usize = ROWS;
    const TOKENS: usize = 6;
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
                [a, b, c, d, e, f] => micro::<B, 6>(tile, groups, &[a, b, c, d, e, f], sums, ahead),
                [a, b, c, d, e] => micro::<B, 5>(tile, groups, &[a, b, c, d, e], sums, ahead),
                [a, b, c, d] => micro::<B, 4>(tile, groups, &[a, b, c, d], sums, ahead),
                // More than eight tokens are divided into parts of four at least.
                _ => debug_assert!(false, "{} tokens for a tile", x.len()),
            }
        }
    }
}

/// `T` tokens times the tile's 32 rows over `groups` groups of 32.
///
/// # Safety
/// The caller has the instructions; the tile holds `groups` groups; `x` points at the tokens' first value of the chunk.
#[inline(always)]
unsafe fn micro<B: Turn, const T: usize>(
    tile: &TileMemory,
    groups: usize,
    x: &[XRow; T],
    to: Place,
    ahead: &mut Ahead<'_>,
) {
    let wide = if B::HALVES { 2 } else { 1 };
    // Unseen by the compiler, for the reason given at the AVX2 form.
    let steps = std::hint::black_box(8 / wide);
    // SAFETY: by the contract.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); 2]; T];
        if !to.before.is_null() {
            for (t, acc) in acc.iter_mut().enumerate() {
                *acc = [_mm512_load_ps(to.before.add(ROWS * t)), _mm512_load_ps(to.before.add(ROWS * t + 16))];
            }
        }
        for at in 0..if B::CENTRED { 0 } else { groups * wide } {
            let (m0, m1) = (_mm512_load_ps(tile.m.add(at * ROWS)), _mm512_load_ps(tile.m.add(at * ROWS + 16)));
            for (x, acc) in x.iter().zip(&mut acc) {
                let s = _mm512_set1_ps(*if B::HALVES { x.s16 } else { x.s }.add(at));
                acc[0] = _mm512_fmadd_ps(m0, s, acc[0]);
                acc[1] = _mm512_fmadd_ps(m1, s, acc[1]);
            }
        }
        let mut w = tile.q.cast_const();
        for at in 0..groups * wide {
            ahead.step();
            let mut offset = 32 / wide * at;
            let mut sums = [[_mm512_setzero_si512(); 2]; T];
            if B::CENTRED {
                for (x, sums) in x.iter().zip(&mut sums) {
                    *sums = [_mm512_set1_epi32(*if B::HALVES { x.c16 } else { x.c }.add(at)); 2];
                }
            }
            for _ in 0..steps {
                let (w0, w1) = (_mm512_load_si512(w.cast()), _mm512_load_si512(w.add(64).cast()));
                for (x, sums) in x.iter().zip(&mut sums) {
                    let q = _mm512_set1_epi32(x.q.add(offset).cast::<i32>().read_unaligned());
                    sums[0] = _mm512_dpbusd_epi32(sums[0], w0, q);
                    sums[1] = _mm512_dpbusd_epi32(sums[1], w1, q);
                }
                (w, offset) = (w.add(4 * ROWS), offset + 4);
            }
            let (d0, d1) = (_mm512_load_ps(tile.d.add(at * ROWS)), _mm512_load_ps(tile.d.add(at * ROWS + 16)));
            for ((x, acc), sums) in x.iter().zip(&mut acc).zip(&sums) {
                let dx = _mm512_set1_ps(*x.d.add(at / wide));
                acc[0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[0]), _mm512_mul_ps(d0, dx), acc[0]);
                acc[1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[1]), _mm512_mul_ps(d1, dx), acc[1]);
            }
        }
        for (t, acc) in acc.iter().enumerate() {
            for (h, &sum) in acc.iter().enumerate() {
                let at = to.to.add(to.stride * t + 16 * h);
                _mm512_storeu_ps(at, if to.add { _mm512_add_ps(_mm512_loadu_ps(at), sum) } else { sum });
            }
        }
    }
}
