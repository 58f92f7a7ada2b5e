//! The second half of a low-rank correction: `y[t][c] += Σⱼ h[t][j] · B[c][j]`, with few `j` and many `c`.
//!
//! `B` lies in tiles of 32 columns, `[tile][rank][32]` with zeros behind the last column, so that a thread streams its
//! columns front to back and a column's sum stays in a register without a horizontal addition. Values are kept as the base's
//! weights are ([`Precision`]): in decoding each is read once, so their bytes are what a correction costs. (The first half,
//! `h = x·Aᵀ`, is a linear map like any other, but in 8 bits, where it has a kernel of its own: [`hidden`].)
//!
//! The scalar form is the specification: sums start from 0, go up in `j`, are multiplied with the column's scale, where there is
//! one, and added to `y`. A column's result depends neither on the range of columns it is in nor on the number of rows.

pub mod hidden;

use std::ops::Range;

use half::f16;

use crate::cpu::isa::Isa;

/// Columns of a tile.
pub const TILE: usize = 32;

/// How the copies of a correction are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 32 bits, beside weights of 32.
    Single,
    /// 16 bits, beside weights of 16.
    Half,
    /// 8-bit integers with a scale for each column of `B`, and for every 32 values of `A`: beside quantized weights.
    Byte,
}

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
    /// Integers, and the scale of each column.
    I8(Vec<i8>, Vec<f32>),
}

impl Tiles {
    /// From `b`, `[columns][rank]`; as f32 where it is out of f16's range.
    pub fn new(b: &[f32], rank: usize, precision: Precision) -> Tiles {
        let columns = b.len() / rank.max(1);
        let padded = columns.div_ceil(TILE) * TILE;
        let mut tiled = vec![0.0f32; padded * rank];
        let mut scales = vec![0.0f32; padded];
        for (c, row) in b.chunks_exact(rank.max(1)).enumerate() {
            scales[c] = row.iter().fold(0.0f32, |most, v| most.max(v.abs())) / 127.0;
            for (j, value) in row.iter().enumerate() {
                tiled[(c / TILE * rank + j) * TILE + c % TILE] = *value;
            }
        }
        let values = match precision {
            Precision::Half if fits_f16(b) => Values::F16(tiled.iter().map(|v| f16::from_f32(*v).to_bits()).collect()),
            Precision::Byte if fits_f16(b) => {
                let mut integers = Vec::with_capacity(tiled.len());
                for (tile, scales) in tiled.chunks_exact((rank * TILE).max(1)).zip(scales.chunks_exact(TILE)) {
                    let byte = |(v, scale): (&f32, &f32)| if *scale > 0.0 { (v / scale).round() as i8 } else { 0 };
                    integers.extend(tile.iter().zip(scales.iter().cycle()).map(byte));
                }
                Values::I8(integers, scales)
            }
            _ => Values::F32(tiled),
        };
        Tiles { rank, columns, values }
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        match &self.values {
            Values::F16(v) => v.len() * 2,
            Values::F32(v) => v.len() * 4,
            Values::I8(v, scales) => v.len() + scales.len() * 4,
        }
    }

    /// What the sum of a column is multiplied with.
    fn scale(&self, c: usize) -> f32 {
        match &self.values {
            Values::I8(_, scales) => scales[c],
            _ => 1.0,
        }
    }

    fn get(&self, j: usize, c: usize) -> f32 {
        let at = (c / TILE * self.rank + j) * TILE + c % TILE;
        match &self.values {
            Values::F16(v) => f16::from_bits(v[at]).to_f32(),
            Values::F32(v) => v[at],
            Values::I8(v, _) => f32::from(v[at]),
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
                Values::F16(v) => avx2::run(task, v.as_slice(), None),
                Values::F32(v) => avx2::run(task, v.as_slice(), None),
                Values::I8(v, scales) if matches!(isa, Isa::Avx512(_)) && task.rows == 1 => {
                    avx512::run(task, v, scales)
                }
                Values::I8(v, scales) => avx2::run(task, v.as_slice(), Some(scales)),
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
            let sum: f32 = h.iter().enumerate().map(|(j, h)| h * task.tiles.get(j, c)).sum();
            *y += task.tiles.scale(c) * sum;
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

    impl Element for i8 {
        #[inline(always)]
        unsafe fn load(p: *const i8) -> __m256 {
            // SAFETY: by the contract.
            unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
        }
    }

    /// # Safety
    /// The features, and as `add_low_rank`, whose checks were made; a scale for every column of all tiles.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn run<E: Element>(task: &LowRankTask<'_>, values: &[E], scales: Option<&[f32]>) {
        const ONES: [f32; TILE] = [1.0; TILE];
        let rank = task.tiles.rank;
        for first in task.columns.clone().step_by(TILE) {
            let count = TILE.min(task.columns.end - first);
            let tile = values[first / TILE * rank * TILE..][..rank * TILE].as_ptr();
            let scales = scales.map_or(ONES.as_ptr(), |scales| scales[first / TILE * TILE..][..TILE].as_ptr());
            let mut t = 0;
            while t < task.rows {
                let pair = t + 1 < task.rows;
                // SAFETY: rows and columns in range; short tiles go through a buffer.
                unsafe {
                    let h = task.hidden.as_ptr().add(t * task.stride);
                    let y = task.out.add(t * task.out_stride + first - task.columns.start);
                    match (count == TILE, pair) {
                        (true, true) => tile_rows::<E, 2>((tile, scales), rank, h, task.stride, y, task.out_stride),
                        (true, false) => tile_rows::<E, 1>((tile, scales), rank, h, task.stride, y, task.out_stride),
                        (false, _) => {
                            for i in 0..1 + usize::from(pair) {
                                let mut buffer = [0.0f32; TILE];
                                let y = y.add(i * task.out_stride);
                                std::ptr::copy_nonoverlapping(y, buffer.as_mut_ptr(), count);
                                let h = h.add(i * task.stride);
                                tile_rows::<E, 1>((tile, scales), rank, h, 0, buffer.as_mut_ptr(), 0);
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
        (tile, scales): (*const E, *const f32),
        rank: usize,
        h: *const f32,
        stride: usize,
        y: *mut f32,
        y_stride: usize,
    ) {
        // SAFETY: `T` rows of 32 results and `rank` factors, a whole tile: by the caller.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); 4]; T];
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
                    let (y, scale) = (y.add(t * y_stride + 8 * i), _mm256_loadu_ps(scales.add(8 * i)));
                    _mm256_storeu_ps(y, _mm256_fmadd_ps(scale, *acc, _mm256_loadu_ps(y)));
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    //! AVX-512, for decoding: one row, a tile's 32 sums in two registers. What is read is used once, in short streams, so it is
    //! asked for ahead.
    use super::{LowRankTask, TILE};
    use std::arch::x86_64::*;

    /// Bytes from what is computed to what is asked for.
    const AHEAD: usize = 4_096;

    /// # Safety
    /// The features, and as `add_low_rank`, whose checks were made; one row, and a scale for every column of all tiles.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn run(task: &LowRankTask<'_>, values: &[i8], scales: &[f32]) {
        let (rank, h) = (task.tiles.rank, task.hidden);
        for first in task.columns.clone().step_by(TILE) {
            let count = TILE.min(task.columns.end - first);
            let tile = &values[first / TILE * rank * TILE..][..rank * TILE];
            let (low, high) = tile_masks(count);
            // SAFETY: a whole tile, its scales, and of the results those that the masks name. A hint may point anywhere.
            unsafe {
                let mut sums = [_mm512_setzero_ps(); 2];
                for (j, h) in h[..rank].iter().enumerate() {
                    let b = tile.as_ptr().add(j * TILE);
                    if j % 2 == 0 {
                        _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(AHEAD));
                    }
                    let h = _mm512_set1_ps(*h);
                    let wide = |at: usize| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(b.add(at).cast())));
                    sums = [_mm512_fmadd_ps(h, wide(0), sums[0]), _mm512_fmadd_ps(h, wide(16), sums[1])];
                }
                let (y, scale) = (task.out.add(first - task.columns.start), scales[first / TILE * TILE..].as_ptr());
                for (i, (sum, mask)) in sums.into_iter().zip([low, high]).enumerate() {
                    let old = _mm512_maskz_loadu_ps(mask, y.wrapping_add(16 * i));
                    let new = _mm512_fmadd_ps(_mm512_loadu_ps(scale.add(16 * i)), sum, old);
                    _mm512_mask_storeu_ps(y.wrapping_add(16 * i), mask, new);
                }
            }
        }
    }

    /// The first `count` of 32 columns, by halves.
    fn tile_masks(count: usize) -> (u16, u16) {
        let all = ((1u64 << count) - 1) as u32;
        (all as u16, (all >> 16) as u16)
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
            for precision in [Precision::Single, Precision::Half, Precision::Byte] {
                let (b, stride) = (pseudo(columns * rank, 1), rank + 3);
                let (hidden, start) = (pseudo(rows * stride, 2), pseudo(rows * columns, 3));
                let tiles = Tiles::new(&b, rank, precision);
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
                            let bound = match precision {
                                Precision::Single => 1e-6,
                                Precision::Half => 1e-3,
                                // Half a step of the largest value's 127.
                                Precision::Byte => 4e-3,
                            } * (1.0 + rank as f64);
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
