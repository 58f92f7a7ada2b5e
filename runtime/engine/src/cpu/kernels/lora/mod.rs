//! The second half of a low-rank correction: `y[t][c] += Σⱼ h[t][j] · B[c][j]`, with few `j` and many `c`.
//!
//! `B` lies in tiles of 32 columns, `[tile][rank][32]` with zeros behind the last column, so that a thread streams its
//! columns front to back and a column's sum stays in a register without a horizontal addition. Values are kept as the base's
//! weights are ([`Precision`]): in decoding each is read once, so their bytes are what a correction costs. A tile of bytes
//! begins with the scales of its columns. (The first half,
//! `h = x·Aᵀ`, is a linear map like any other, but in 8 bits, where it has a kernel of its own: [`hidden`].)
//!
//! The scalar form is the specification: sums start from 0, go up in `j`, are multiplied with the column's scale, where there is
//! one, and added to `y`. A column's result depends neither on the range of columns it is in nor on the number of rows.

pub mod hidden;
pub mod nibbles;

use std::ops::Range;

use half::{bf16, f16};

use crate::Result;
use crate::cpu::buffer::{Shelf, Table};
use crate::cpu::isa::Isa;

/// Columns of a tile.
pub const TILE: usize = 32;
/// Bytes of a tile's scales, one bf16 for each column.
const SCALES: usize = 2 * TILE;

/// How the copies of a correction are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 32 bits, beside weights of 32.
    Single,
    /// 16 bits, beside weights of 16.
    Half,
    /// 8-bit integers with a scale for each column of `B` and each row of `A`: beside quantized weights.
    Byte,
    /// 4 bits with a scale for each column of `B`, and for every 32 values of `A`: beside weights of as few. (See [`nibbles`].)
    Nibble,
}

impl Precision {
    /// What `B` of a rank is kept in.
    fn of_rank(self, rank: usize) -> Precision {
        match self {
            Precision::Nibble if rank > nibbles::MAX_RANK => Precision::Byte,
            precision => precision,
        }
    }
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
    F16(Table<u16>),
    F32(Table<f32>),
    /// Tiles of scales and integers.
    Bytes(Table<u8>),
    /// As [`nibbles`] has them.
    Nibbles(Table<u8>),
}

impl Tiles {
    /// From `b`, `[columns][rank]`, put on a shelf; as f32 where it is out of f16's range.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::Error::Memory).
    pub fn new(b: &[f32], rank: usize, precision: Precision, shelf: &mut Shelf) -> Result<Tiles> {
        let columns = b.len() / rank.max(1);
        let values = match precision.of_rank(rank) {
            Precision::Half if fits_f16(b) => {
                let bits: Vec<u16> = tiled(b, rank).iter().map(|v| f16::from_f32(*v).to_bits()).collect();
                Values::F16(shelf.put(&bits)?)
            }
            Precision::Nibble if fits_f16(b) => Values::Nibbles(shelf.put(&nibbles::tiles(b, rank))?),
            Precision::Byte if fits_f16(b) => {
                let mut bytes = Vec::with_capacity(Tiles::size(columns, rank, precision));
                for (tile, columns) in tiled(b, rank).chunks_exact((rank * TILE).max(1)).zip((0..columns).step_by(TILE))
                {
                    let rows = b.chunks_exact(rank.max(1)).skip(columns).take(TILE);
                    let largest = |row: &[f32]| row.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                    let mut scales = [bf16::ZERO; TILE];
                    scales.iter_mut().zip(rows).for_each(|(s, row)| *s = bf16::from_f32(largest(row) / 127.0));
                    bytes.extend(scales.iter().flat_map(|s| s.to_le_bytes()));
                    let byte = |(v, scale): (&f32, &bf16)| match scale.to_f32() {
                        scale if scale > 0.0 => (v / scale).round().clamp(-127.0, 127.0) as i8 as u8,
                        _ => 0,
                    };
                    bytes.extend(tile.iter().zip(scales.iter().cycle()).map(byte));
                }
                Values::Bytes(shelf.put(&bytes)?)
            }
            _ => Values::F32(shelf.put(&tiled(b, rank))?),
        };
        Ok(Tiles { rank, columns, values })
    }

    /// Bytes that tiles take.
    pub fn size(columns: usize, rank: usize, precision: Precision) -> usize {
        let per_tile = match precision.of_rank(rank) {
            Precision::Single => 4 * TILE * rank,
            Precision::Half => 2 * TILE * rank,
            Precision::Byte => SCALES + TILE * rank,
            Precision::Nibble => nibbles::tile_bytes(rank),
        };
        columns.div_ceil(TILE) * per_tile
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        match &self.values {
            Values::F16(v) => size_of_val(&**v),
            Values::F32(v) => size_of_val(&**v),
            Values::Bytes(v) | Values::Nibbles(v) => v.len(),
        }
    }

    /// Asks for some columns, which begin at a multiple of [`TILE`].
    pub fn prefetch(&self, columns: Range<usize>) {
        let tile = Tiles::size(TILE, self.rank, self.precision());
        let bytes: &[u8] = match &self.values {
            Values::F16(v) => bytemuck::cast_slice(v),
            Values::F32(v) => bytemuck::cast_slice(v),
            Values::Bytes(v) | Values::Nibbles(v) => v,
        };
        prefetch(&bytes[columns.start / TILE * tile..columns.end.div_ceil(TILE) * tile]);
    }

    fn precision(&self) -> Precision {
        match &self.values {
            Values::F16(_) => Precision::Half,
            Values::F32(_) => Precision::Single,
            Values::Bytes(_) => Precision::Byte,
            Values::Nibbles(_) => Precision::Nibble,
        }
    }

    /// What the sum of a column is multiplied with.
    fn scale(&self, c: usize) -> f32 {
        match &self.values {
            Values::Bytes(v) => {
                let at = c / TILE * (SCALES + self.rank * TILE) + 2 * (c % TILE);
                bf16::from_le_bytes([v[at], v[at + 1]]).to_f32()
            }
            _ => 1.0,
        }
    }

    fn get(&self, j: usize, c: usize) -> f32 {
        let at = (c / TILE * self.rank + j) * TILE + c % TILE;
        match &self.values {
            Values::F16(v) => f16::from_bits(v[at]).to_f32(),
            Values::F32(v) => v[at],
            Values::Bytes(v) => f32::from(v[at + (c / TILE + 1) * SCALES] as i8),
            Values::Nibbles(_) => unreachable!("has a kernel of its own"),
        }
    }
}

/// Asks for all lines of `bytes`.
pub fn prefetch(bytes: &[u8]) {
    bytes.chunks(64).for_each(|line| super::prefetch(line.as_ptr()));
}

/// `[columns][rank]` as `[tile][rank][32]`.
fn tiled(b: &[f32], rank: usize) -> Vec<f32> {
    let columns = b.len() / rank.max(1);
    let mut tiled = vec![0.0f32; columns.div_ceil(TILE) * TILE * rank];
    for (c, row) in b.chunks_exact(rank.max(1)).enumerate() {
        for (j, value) in row.iter().enumerate() {
            tiled[(c / TILE * rank + j) * TILE + c % TILE] = *value;
        }
    }
    tiled
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
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    let in_lanes = crate::cpu::kernels::lanes::runs(isa);
    // SAFETY: the token proves the features; sizes were checked, the output is the caller's promise.
    unsafe {
        match &tiles.values {
            Values::Nibbles(v) => nibbles::add(isa, task, v),
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            Values::F16(v) if in_lanes => lanes::run::<u16>(task, bytemuck::cast_slice(v)),
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            Values::F32(v) if in_lanes => lanes::run::<f32>(task, bytemuck::cast_slice(v)),
            #[cfg(target_arch = "x86_64")]
            Values::Bytes(v) if matches!(isa, Isa::Avx512(_)) && task.rows == 1 => avx512::run(task, v),
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            Values::Bytes(v) if in_lanes => lanes::run::<i8>(task, v),
            _ => scalar(task),
        }
    }
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

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod lanes {
    //! In lanes: a tile's 32 sums of two rows are eight of them.
    use super::{LowRankTask, SCALES, TILE};
    use crate::cpu::kernels::lanes::{F32x8, fma, load, load_f16, load_i8, splat, store, zero};

    pub(super) trait Element: Copy {
        /// Bytes of scales before a tile's values.
        const SCALES: usize = 0;
        const ONES: [f32; TILE] = [1.0; TILE];

        /// # Safety
        /// Eight values at `p`; the caller has the instructions of lanes.
        unsafe fn load(p: *const Self) -> F32x8;
    }

    impl Element for u16 {
        #[inline(always)]
        unsafe fn load(p: *const u16) -> F32x8 {
            // SAFETY: by the contract.
            unsafe { load_f16(p.cast()) }
        }
    }

    impl Element for f32 {
        #[inline(always)]
        unsafe fn load(p: *const f32) -> F32x8 {
            // SAFETY: by the contract.
            unsafe { load(p) }
        }
    }

    impl Element for i8 {
        const SCALES: usize = SCALES;

        #[inline(always)]
        unsafe fn load(p: *const i8) -> F32x8 {
            // SAFETY: by the contract.
            unsafe { load_i8(p.cast()) }
        }
    }

    /// # Safety
    /// The features, and as `add_low_rank`, whose checks were made; whole tiles of `E`, aligned to it.
    #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
    pub(super) unsafe fn run<E: Element>(task: &LowRankTask<'_>, values: &[u8]) {
        let rank = task.tiles.rank;
        let tile_bytes = E::SCALES + rank * TILE * size_of::<E>();
        for first in task.columns.clone().step_by(TILE) {
            let count = TILE.min(task.columns.end - first);
            let (scales, tile) = values[first / TILE * tile_bytes..][..tile_bytes].split_at(E::SCALES);
            let mut wide = E::ONES;
            for (wide, scale) in wide.iter_mut().zip(scales.chunks_exact(2)) {
                *wide = f32::from_bits(u32::from(u16::from_le_bytes([scale[0], scale[1]])) << 16);
            }
            let (tile, scales) = (tile.as_ptr().cast::<E>(), wide.as_ptr());
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
            let mut acc = [[zero(); 4]; T];
            for j in 0..rank {
                for i in 0..4 {
                    let b = E::load(tile.add(j * TILE + 8 * i));
                    for (t, acc) in acc.iter_mut().enumerate() {
                        acc[i] = fma(splat(*h.add(t * stride + j)), b, acc[i]);
                    }
                }
            }
            for (t, acc) in acc.iter().enumerate() {
                for (i, acc) in acc.iter().enumerate() {
                    let (y, scale) = (y.add(t * y_stride + 8 * i), load(scales.add(8 * i)));
                    store(y, fma(scale, *acc, load(y)));
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    //! AVX-512, for decoding: one row, a tile's 32 sums in two registers. What is read is used once, in short streams, so it is
    //! asked for ahead.
    use super::{LowRankTask, SCALES, TILE};
    use std::arch::x86_64::*;

    /// Bytes from what is computed to what is asked for.
    const AHEAD: usize = 4_096;

    /// # Safety
    /// The features, and as `add_low_rank`, whose checks were made; one row, whole tiles.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn run(task: &LowRankTask<'_>, values: &[u8]) {
        let (rank, h) = (task.tiles.rank, task.hidden);
        let tile_bytes = SCALES + rank * TILE;
        for first in task.columns.clone().step_by(TILE) {
            let count = TILE.min(task.columns.end - first);
            let (scales, tile) = values[first / TILE * tile_bytes..][..tile_bytes].split_at(SCALES);
            let (low, high) = tile_masks(count);
            // SAFETY: a whole tile, its scales, and of the results those that the masks name. A hint may point anywhere.
            unsafe {
                let mut sums = [_mm512_setzero_ps(); 2];
                for (j, h) in h[..rank].iter().enumerate() {
                    let b = tile.as_ptr().add(j * TILE).cast::<i8>();
                    if j % 2 == 0 {
                        _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(AHEAD));
                    }
                    let h = _mm512_set1_ps(*h);
                    let wide = |at: usize| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(b.add(at).cast())));
                    sums = [_mm512_fmadd_ps(h, wide(0), sums[0]), _mm512_fmadd_ps(h, wide(16), sums[1])];
                }
                let y = task.out.add(first - task.columns.start);
                let scale = |i: usize| {
                    let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(scales.as_ptr().add(32 * i).cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
                };
                for (i, (sum, mask)) in sums.into_iter().zip([low, high]).enumerate() {
                    let old = _mm512_maskz_loadu_ps(mask, y.wrapping_add(16 * i));
                    let new = _mm512_fmadd_ps(scale(i), sum, old);
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
                let mut shelf = Shelf::new(Tiles::size(columns, rank, precision), "tiles").unwrap();
                let tiles = Tiles::new(&b, rank, precision, &mut shelf).unwrap();
                assert_eq!(tiles.bytes(), Tiles::size(columns, rank, precision));
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
                                Precision::Byte | Precision::Nibble => 4e-3,
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
