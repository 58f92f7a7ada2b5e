//! Up to eight tokens, several answers at once: too few to pay for tiles that are written and read again, too many to take rows one
//! after the other. Sixteen rows are a vector's lanes; a group of theirs is unpacked into registers and multiplied there with all
//! tokens.
//!
//! The activations are arranged before, once for all rows: per group of 32 values four bytes of each token, the next four of each, and
//! so on, then the tokens' scales, then their sums or what sums of products begin at. So what is broadcast into a product lies one
//! behind the other, and needs no instruction of its own.

// Registers are numbered: `for i in 0..8` says what happens better than zipped iterators do.
#![allow(clippy::needless_range_loop)]

use super::super::avx2::tile::transpose;
use super::super::tile::{TileMemory, XRow};
use super::super::{LinearTask, Q8, Scratch, TILE_ROWS_MAX, TILE_TOKENS};
use super::turn::{LANES, Turn, Units, scales};
use std::arch::x86_64::*;

/// Bytes of a group's activations: values, scales, and for each half what [`Turn::CENTRED`] calls for.
const fn x_bytes(tokens: usize) -> usize {
    tokens * (32 + 4 + 8)
}

/// Runs a task of at most `T` tokens.
///
/// # Safety
/// The caller has AVX2, FMA, F16C and AVX-512 F, BW, DQ, VL, VNNI; `linear` checked the task.
#[inline(always)]
pub(super) unsafe fn run<B: Turn, const T: usize>(task: &LinearTask<'_>, scratch: &mut Scratch) {
    let (Some(x), Some(row_bytes)) = (&task.x.q8, task.dtype.row_bytes(task.k)) else { return };
    let tile = scratch.tile();
    let arranged = tile.sums.cast::<u8>();
    let units = task.k.div_ceil(256);
    // Chunks of equal size, as near as whole units allow, whose activations have room.
    let room = TILE_ROWS_MAX * TILE_TOKENS * 4 / (8 * x_bytes(T));
    let chunk = units.div_ceil(units.div_ceil(room));
    for u0 in (0..units).step_by(chunk) {
        let groups = (task.k / 32 - 8 * u0).min(8 * chunk);
        let at = |row: usize| task.weight.as_ptr().wrapping_add(row * row_bytes + u0 * B::BYTES);
        // They come while the activations are arranged.
        Lines::new(at(task.rows.start), row_bytes, groups * B::BYTES / 8, 1).step();
        // SAFETY: the tokens have the groups, and there is room for them.
        unsafe { arrange::<B, T>(x, task.x.tokens, 8 * u0, groups, arranged) };
        for r0 in task.rows.clone().step_by(LANES) {
            let rows = (task.rows.end - r0).min(LANES);
            let mut ahead = Lines::new(at(r0 + LANES), row_bytes, groups * B::BYTES / 8, groups);
            // Behind the last row there is none: it is repeated, and what that gives is dropped.
            let units: Units = std::array::from_fn(|i| at((r0 + i).min(task.rows.end - 1)));
            // SAFETY: the rows have the groups, whose activations are arranged; `linear` checked the output's size.
            unsafe {
                let sums = multiply::<B, T>(&units, groups, arranged, &tile, &mut ahead);
                let whole = ((1u32 << rows) - 1) as __mmask16;
                for (t, &sum) in sums.iter().enumerate().take(task.x.tokens) {
                    let to = task.out.base.add(t * task.out.stride + r0);
                    let sum = match task.accumulate || u0 > 0 {
                        true => _mm512_add_ps(_mm512_maskz_loadu_ps(whole, to), sum),
                        false => sum,
                    };
                    _mm512_mask_storeu_ps(to, whole, sum);
                }
            }
        }
    }
}

/// Asks for sixteen rows while others are multiplied, in the order in which they will be read: what is asked for last would else be
/// wanted first. Behind a thread's last rows are those of its next strip, or of another matrix.
struct Lines {
    /// The next line, and its row.
    at: *const u8,
    row: usize,
    row_bytes: usize,
    /// Lines a step.
    lines: usize,
}

impl Lines {
    /// For `bytes` bytes of each row, the first one's at `first`, in `steps` steps.
    fn new(first: *const u8, row_bytes: usize, bytes: usize, steps: usize) -> Lines {
        // A stretch may begin within a line.
        Lines { at: first, row: 0, row_bytes, lines: (LANES * (bytes / 64 + 1)).div_ceil(steps) }
    }

    #[inline(always)]
    fn step(&mut self) {
        for _ in 0..self.lines {
            // SAFETY: a hint, which does nothing where the address is none.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.at.cast()) };
            (self.at, self.row) = (self.at.wrapping_add(self.row_bytes), self.row + 1);
            if self.row == LANES {
                (self.at, self.row) = (self.at.wrapping_sub(LANES * self.row_bytes).wrapping_add(64), 0);
            }
        }
    }
}

/// Writes `groups` groups of the tokens from group `first` on, in the order that [`multiply`] reads. What is missing of `T` tokens is
/// the last one again, and its products are dropped.
///
/// # Safety
/// The tokens have the groups, `to` has room for them, and the caller has AVX2.
#[inline(always)]
unsafe fn arrange<B: Turn, const T: usize>(x: &Q8<'_>, tokens: usize, first: usize, groups: usize, to: *mut u8) {
    // SAFETY: by the contract; eight tokens are turned, of which `T` are written.
    unsafe {
        let x: [XRow; 8] = std::array::from_fn(|t| XRow::new(x, t.min(tokens - 1), first));
        for g in 0..groups {
            let to = to.add(g * x_bytes(T)).cast::<u32>();
            let mut values = [_mm256_setzero_si256(); 8];
            for (values, x) in values.iter_mut().zip(&x) {
                *values = _mm256_loadu_si256(x.q.add(32 * g).cast());
            }
            for (i, four) in transpose(values).into_iter().enumerate() {
                match T {
                    8 => _mm256_storeu_si256(to.add(T * i).cast(), four),
                    _ => _mm_storeu_si128(to.add(T * i).cast(), _mm256_castsi256_si128(four)),
                }
            }
            for (t, x) in x.iter().enumerate().take(T) {
                to.add(8 * T + t).write((*x.d.add(g)).to_bits());
                for half in 0..if B::HALVES { 2 } else { 1 } {
                    let word = match (B::CENTRED, B::HALVES) {
                        (true, true) => *x.c16.add(2 * g + half) as u32,
                        (true, false) => *x.c.add(g) as u32,
                        (false, true) => (*x.s16.add(2 * g + half)).to_bits(),
                        (false, false) => (*x.s.add(g)).to_bits(),
                    };
                    to.add((9 + half) * T + t).write(word);
                }
            }
        }
    }
}

/// The products of sixteen rows with all tokens over `groups` groups.
///
/// # Safety
/// The rows have the groups, whose activations are arranged at `x`; the caller has the instructions.
#[inline(always)]
unsafe fn multiply<B: Turn, const T: usize>(
    rows: &Units,
    groups: usize,
    mut x: *const u8,
    tile: &TileMemory,
    ahead: &mut Lines,
) -> [__m512; T] {
    let halves = if B::HALVES { 2 } else { 1 };
    // SAFETY: by the contract.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); T];
        for unit in 0..groups.div_ceil(8) {
            let n = (groups - 8 * unit).min(8);
            let rows: Units = std::array::from_fn(|i| rows[i].add(unit * B::BYTES));
            if !B::EACH {
                scales::<B, LANES>(&rows, n, tile, 0, 0);
            }
            for g in 0..n {
                ahead.step();
                let w = B::group_of_rows(&rows, g);
                let (words, floats) = (x.cast::<i32>(), x.cast::<f32>());
                for half in 0..halves {
                    let begin = (9 + half) * T;
                    let mut sums = [_mm512_setzero_si512(); T];
                    if B::CENTRED {
                        for (t, sum) in sums.iter_mut().enumerate() {
                            *sum = _mm512_set1_epi32(*words.add(begin + t));
                        }
                    }
                    for i in 8 / halves * half..8 / halves * (half + 1) {
                        for (t, sum) in sums.iter_mut().enumerate() {
                            *sum = _mm512_dpbusd_epi32(*sum, w[i], _mm512_set1_epi32(*words.add(T * i + t)));
                        }
                    }
                    let at = (halves * g + half) * LANES;
                    let (d, m) = match (B::EACH, B::CENTRED) {
                        (true, _) => B::factors(&rows, g),
                        (_, true) => (_mm512_load_ps(tile.d.add(at)), _mm512_setzero_ps()),
                        _ => (_mm512_load_ps(tile.d.add(at)), _mm512_load_ps(tile.m.add(at))),
                    };
                    for (t, (acc, &sum)) in acc.iter_mut().zip(&sums).enumerate() {
                        let scale = _mm512_mul_ps(d, _mm512_set1_ps(*floats.add(8 * T + t)));
                        *acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, *acc);
                        if !B::CENTRED {
                            *acc = _mm512_fmadd_ps(m, _mm512_set1_ps(*floats.add(begin + t)), *acc);
                        }
                    }
                }
                x = x.add(x_bytes(T));
            }
        }
        acc
    }
}
