//! The second half of a low-rank correction: `y[t][c] += Σⱼ h[t][j] · B[c][j]`, with few `j` and many `c`.
//!
//! `B` lies in tiles of 32 columns, `[tile][rank][32]` with zeros behind the last column, so that a thread streams its
//! columns front to back and a column's sum stays in a register without a horizontal addition. Values are f16, which
//! halves the traffic of decoding, or f32 beside f32 weights. (The first half, `h = x·Aᵀ`, is a dense linear map.)
//!
//! The scalar form is the specification: sums start from `y` and go up in `j`. A column's result depends neither on the
//! range of columns it is in nor on the number of rows.

use std::ops::Range;

use half::f16;

use crate::cpu::isa::Isa;

/// Columns of a tile.
pub const TILE: usize = 32;

/// `B` in tiles.
#[derive(Clone, Debug)]
pub struct Tiles {
    rank: usize,
    columns: usize,
    values: Values,
}

#[derive(Clone, Debug)]
enum Values {
    /// Bits of an f16.
    F16(Vec<u16>),
    F32(Vec<f32>),
}

impl Tiles {
    /// From `b`, `[columns][rank]`; as f16 when `half` and everything is in its range.
    pub fn new(b: &[f32], rank: usize, half: bool) -> Tiles {
        let columns = b.len() / rank.max(1);
        let mut tiled = vec![0.0f32; columns.div_ceil(TILE) * TILE * rank];
        for (c, row) in b.chunks_exact(rank.max(1)).enumerate() {
            for (j, value) in row.iter().enumerate() {
                tiled[(c / TILE * rank + j) * TILE + c % TILE] = *value;
            }
        }
        let values = if half && fits_f16(b) {
            Values::F16(tiled.iter().map(|v| f16::from_f32(*v).to_bits()).collect())
        } else {
            Values::F32(tiled)
        };
        Tiles { rank, columns, values }
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        match &self.values {
            Values::F16(v) => v.len() * 2,
            Values::F32(v) => v.len() * 4,
        }
    }

    fn get(&self, j: usize, c: usize) -> f32 {
        let at = (c / TILE * self.rank + j) * TILE + c % TILE;
        match &self.values {
            Values::F16(v) => f16::from_bits(v[at]).to_f32(),
            Values::F32(v) => v[at],
        }
    }
}

/// Whether all of `values` keep their size as f16.
pub fn fits_f16(values: &[f32]) -> bool {
    values.iter().all(|v| v.abs() <= 65_504.0)
}

/// The rows that are corrected: `h[t]` at `hidden[t · stride ..][.. rank]`, `y[t]` at `out + t · out_stride`, which is
/// column `columns.start` of the map.
#[derive(Clone, Debug)]
pub struct LowRankTask<'a> {
    /// `B`.
    pub tiles: &'a Tiles,
    /// `x·Aᵀ`.
    pub hidden: &'a [f32],
    /// Floats from one row of it to the next.
    pub stride: usize,
    /// Number of rows.
    pub rows: usize,
    /// The columns to compute; they start at a multiple of [`TILE`].
    pub columns: Range<usize>,
    /// First result.
    pub out: *mut f32,
    /// Floats from one row of results to the next.
    pub out_stride: usize,
}

/// Adds the correction of the task's rows and columns.
///
/// # Safety
/// `out` must be valid for reads and writes of every row's columns, and nobody else may use them meanwhile.
///
/// # Panics
/// When the sizes do not fit: a mistake of the program.
pub unsafe fn add_low_rank(isa: Isa, task: &LowRankTask<'_>) {
    let LowRankTask { tiles, columns, rows, .. } = task;
    assert!(columns.start % TILE == 0 && columns.end <= tiles.columns && task.stride >= tiles.rank);
    if columns.is_empty() || *rows == 0 || tiles.rank == 0 {
        return;
    }
    assert!(task.hidden.len() >= (rows - 1) * task.stride + tiles.rank);
    #[cfg(target_arch = "x86_64")]
    if crate::cpu::kernels::vector::has_avx2(isa) {
        // SAFETY: the token proves the features; sizes were checked, the output is the caller's promise.
        unsafe {
            match &tiles.values {
                Values::F16(v) => avx2::run(task, v.as_slice()),
                Values::F32(v) => avx2::run(task, v.as_slice()),
            }
        }
        return;
    }
    let _ = isa;
    // SAFETY: by the caller's promise.
    unsafe { scalar(task) }
}

/// The specification.
unsafe fn scalar(task: &LowRankTask<'_>) {
    for t in 0..task.rows {
        let h = &task.hidden[t * task.stride..][..task.tiles.rank];
        // SAFETY: this row's columns, by the caller's promise.
        let y = unsafe { std::slice::from_raw_parts_mut(task.out.add(t * task.out_stride), task.columns.len()) };
        for (y, c) in y.iter_mut().zip(task.columns.clone()) {
            for (j, h) in h.iter().enumerate() {
                *y += h * task.tiles.get(j, c);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    //! AVX2, FMA and F16C: a tile's 32 sums of two rows in eight registers.
    use super::{LowRankTask, TILE};
    use std::arch::x86_64::*;

    pub(super) trait Element: Copy {
        /// # Safety
        /// Eight values at `p`; the caller has AVX2 and F16C.
        unsafe fn load(p: *const Self) -> __m256;
    }

    impl Element for u16 {
        #[inline(always)]
        unsafe fn load(p: *const u16) -> __m256 {
            // SAFETY: by the contract.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
        }
    }

    impl Element for f32 {
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            // SAFETY: by the contract.
            unsafe { _mm256_loadu_ps(p) }
        }
    }

    /// # Safety
    /// The features, and as `add_low_rank`, whose checks were made.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn run<E: Element>(task: &LowRankTask<'_>, values: &[E]) {
        let rank = task.tiles.rank;
        for first in task.columns.clone().step_by(TILE) {
            let count = TILE.min(task.columns.end - first);
            let tile = values[first / TILE * rank * TILE..][..rank * TILE].as_ptr();
            let mut t = 0;
            while t < task.rows {
                let pair = t + 1 < task.rows;
                // SAFETY: rows and columns in range; short tiles go through a buffer.
                unsafe {
                    let h = task.hidden.as_ptr().add(t * task.stride);
                    let y = task.out.add(t * task.out_stride + first - task.columns.start);
                    match (count == TILE, pair) {
                        (true, true) => tile_rows::<E, 2>(tile, rank, h, task.stride, y, task.out_stride),
                        (true, false) => tile_rows::<E, 1>(tile, rank, h, task.stride, y, task.out_stride),
                        (false, _) => {
                            for i in 0..1 + usize::from(pair) {
                                let mut buffer = [0.0f32; TILE];
                                let y = y.add(i * task.out_stride);
                                std::ptr::copy_nonoverlapping(y, buffer.as_mut_ptr(), count);
                                let h = h.add(i * task.stride);
                                tile_rows::<E, 1>(tile, rank, h, 0, buffer.as_mut_ptr(), 0);
                                std::ptr::copy_nonoverlapping(buffer.as_ptr(), y, count);
                            }
                        }
                    }
                }
                t += 1 + usize::from(pair);
            }
        }
    }

    #[inline(always)]
    unsafe fn tile_rows<E: Element, const T: usize>(
        tile: *const E,
        rank: usize,
        h: *const f32,
        stride: usize,
        y: *mut f32,
        y_stride: usize,
    ) {
        // SAFETY: `T` rows of 32 results and `rank` factors, a whole tile: by the caller.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); 4]; T];
            for (t, acc) in acc.iter_mut().enumerate() {
                for (i, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm256_loadu_ps(y.add(t * y_stride + 8 * i));
                }
            }
            for j in 0..rank {
                for i in 0..4 {
                    let b = E::load(tile.add(j * TILE + 8 * i));
                    for (t, acc) in acc.iter_mut().enumerate() {
                        acc[i] = _mm256_fmadd_ps(_mm256_set1_ps(*h.add(t * stride + j)), b, acc[i]);
                    }
                }
            }
            for (t, acc) in acc.iter().enumerate() {
                for (i, acc) in acc.iter().enumerate() {
                    _mm256_storeu_ps(y.add(t * y_stride + 8 * i), *acc);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pseudo(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(next).collect()
    }

    #[test]
    fn every_instruction_set_meets_the_sum_in_double_precision() {
        for (rank, columns, rows) in [(1, 1, 1), (3, 31, 2), (16, 1100, 1), (17, 96, 5), (64, 2050, 3)] {
            for half in [false, true] {
                let (b, stride) = (pseudo(columns * rank, 1), rank + 3);
                let (hidden, start) = (pseudo(rows * stride, 2), pseudo(rows * columns, 3));
                let tiles = Tiles::new(&b, rank, half);
                for isa in Isa::available() {
                    let mut y = start.clone();
                    // Two shares, as two threads have them.
                    let cut = columns / 2 / TILE * TILE;
                    for columns_of_thread in [0..cut, cut..columns] {
                        let task = LowRankTask {
                            tiles: &tiles,
                            hidden: &hidden,
                            stride,
                            rows,
                            out: start_at(&mut y, columns_of_thread.start),
                            columns: columns_of_thread,
                            out_stride: columns,
                        };
                        // SAFETY: `y` holds every row's columns, and this thread alone uses it.
                        unsafe { add_low_rank(isa, &task) };
                    }
                    for t in 0..rows {
                        for c in 0..columns {
                            let exact: f64 = (0..rank)
                                .map(|j| f64::from(hidden[t * stride + j]) * f64::from(b[c * rank + j]))
                                .sum::<f64>()
                                + f64::from(start[t * columns + c]);
                            let bound = if half { 1e-3 } else { 1e-6 } * (1.0 + rank as f64);
                            let got = f64::from(y[t * columns + c]);
                            assert!((got - exact).abs() <= bound, "{isa:?} {rank} {columns} {t} {c}: {got} {exact}");
                        }
                    }
                }
            }
        }
    }

    fn start_at(y: &mut [f32], at: usize) -> *mut f32 {
        y[at..].as_mut_ptr()
    }
}
