//! Both halves of a low-rank correction in 4 bits, for weights that are kept as coarsely: indices into the values of IQ4_NL,
//! which lie as numbers of a bell curve do, with a bf16 scale for 32 of them in a row of `A` or all of a column of `B`.
//!
//! Rows of `A` lie side by side as in [`hidden`](super::hidden), sixteen to a tile, which has for each 32 values of its rows the
//! scales `[16]` and then, for every eight of the values, a line `[16 rows][4]` with values 0 to 3 in the low halves of its bytes
//! and 4 to 7 in the high ones. Columns of `B` make tiles of 32 with their scales in front; for every eight of the rank follow
//! two such lines, of 16 columns each. `h` is rounded to 8 bits for it.
//!
//! The scalar forms are the specification: integers are summed exactly, in `A` 32 at a time and the sums as f32 in order.

use std::ops::Range;

use half::bf16;

use super::hidden::{Token, each_tile};
use super::{LowRankTask, SCALES, TILE};
use crate::Result;
use crate::cpu::buffer::{Shelf, Table};
use crate::cpu::isa::Isa;
use crate::cpu::kernels::linear::{GROUP, Q8};
use crate::quant::IQ4_VALUES;

/// Rows of a tile of `A`.
pub const ROWS: usize = 16;
/// Bytes of a tile of `A` for every 32 values of its rows.
const STEP: usize = 2 * ROWS + ROWS * GROUP / 2;
/// Values of a row of `A`, and ranks of `B`, that lie together.
const OCTET: usize = 8;
/// Most ranks whose `h` is rounded on the stack.
pub(super) const MAX_RANK: usize = 512;

/// The index of the value nearest to each of -128 to 127.
const NEAREST: [u8; 256] = {
    let mut nearest = [0; 256];
    let (mut v, mut index) = (0, 0);
    while v < 256 {
        // Beyond the middle between a value and the next.
        while index < 15 && 2 * (v as i32 - 128) > IQ4_VALUES[index] as i32 + IQ4_VALUES[index + 1] as i32 {
            index += 1;
        }
        nearest[v] = index as u8;
        v += 1;
    }
    nearest
};

/// The index of the value nearest to `v`.
fn nearest(v: f32) -> u8 {
    NEAREST[(v + 128.5).clamp(0.0, 255.0) as usize]
}

/// Indices of the values nearest to `values` over a scale, and the scale: the one with the least error among some.
fn quantize(values: &[f32], indices: &mut [u8]) -> bf16 {
    let largest = values.iter().fold(0.0f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    // By how much the error shrinks, and the scale with which it does.
    let mut best = (0.0, 0.0);
    // The largest becomes about the longest of the values, which is a negative one, or goes somewhat beyond it.
    for longest in [-139.0, -127.0, -117.0, -108.0, -100.0] {
        let inverse = if largest == 0.0 { 0.0 } else { longest / largest };
        let (mut xy, mut yy) = (0.0, 0.0);
        for v in values {
            let value = f32::from(IQ4_VALUES[nearest(v * inverse) as usize]);
            (xy, yy) = (xy + v * value, yy + value * value);
        }
        if xy * xy / yy > best.0 {
            best = (xy * xy / yy, xy / yy);
        }
    }
    let scale = bf16::from_f32(best.1);
    let inverse = if scale == bf16::ZERO { 0.0 } else { 1.0 / scale.to_f32() };
    indices.iter_mut().zip(values).for_each(|(index, v)| *index = nearest(v * inverse));
    scale
}

/// `A` in tiles.
#[derive(Clone, Debug)]
pub struct Rows {
    rows: usize,
    k: usize,
    tiles: Table<u8>,
}

impl Rows {
    /// From `a`, `[rows][k]`, `k` being a multiple of 32, put on a shelf.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::Error::Memory).
    pub fn new(a: &[f32], k: usize, shelf: &mut Shelf) -> Result<Rows> {
        assert!(k > 0 && k.is_multiple_of(GROUP) && a.len().is_multiple_of(k), "{} values in rows of {k}", a.len());
        let rows = a.len() / k;
        let mut tiles = vec![0u8; Rows::size(rows, k)];
        for (tile, rows) in tiles.chunks_exact_mut(k / GROUP * STEP).zip(a.chunks(ROWS * k)) {
            for (r, row) in rows.chunks_exact(k).enumerate() {
                for (step, values) in tile.chunks_exact_mut(STEP).zip(row.chunks_exact(GROUP)) {
                    let mut indices = [0; GROUP];
                    let scale = quantize(values, &mut indices);
                    step[2 * r..2 * r + 2].copy_from_slice(&scale.to_le_bytes());
                    for (i, index) in indices.into_iter().enumerate() {
                        let (line, high, at) = (i / OCTET, i / 4 % 2, i % 4);
                        step[2 * ROWS + 64 * line + 4 * r + at] |= index << (4 * high);
                    }
                }
            }
        }
        Ok(Rows { rows, k, tiles: shelf.put(&tiles)? })
    }

    /// Bytes that tiles take.
    pub fn size(rows: usize, k: usize) -> usize {
        rows.div_ceil(ROWS) * (k / GROUP) * STEP
    }

    /// All tiles.
    pub fn bytes(&self) -> &[u8] {
        &self.tiles
    }
}

/// As [`hidden`](super::hidden::hidden), in 4 bits.
///
/// # Safety
/// As there.
///
/// # Panics
/// As there.
pub unsafe fn hidden(isa: Isa, a: &Rows, x: &Q8<'_>, rows: Range<usize>, out: *mut f32, stride: usize) {
    let tile_bytes = a.k / GROUP * STEP;
    let of_tile = |token: &Token<'_>, index: usize| {
        let tile = &a.tiles[index * tile_bytes..][..tile_bytes];
        match isa {
            // SAFETY: the token proves the features; `each_tile` has checked the sizes.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => unsafe { x86::hidden_vnni(tile, token.q, token.d, token.sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => unsafe { x86::hidden_avx2(tile, token.q, token.d) },
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => neon::hidden(isa, tile, token.q, token.d),
            _ => scalar_hidden(tile, token.q, token.d),
        }
    };
    // SAFETY: by the caller's promise.
    unsafe { each_tile((a.rows, a.k), x, rows, out, stride, of_tile) }
}

fn scalar_hidden(tile: &[u8], q: &[i8], d: &[f32]) -> [f32; ROWS] {
    let mut h = [0.0; ROWS];
    for ((step, q), d) in tile.chunks_exact(STEP).zip(q.chunks_exact(GROUP)).zip(d) {
        for (r, h) in h.iter_mut().enumerate() {
            let value = |i: usize| {
                let byte = step[2 * ROWS + 64 * (i / OCTET) + 4 * r + i % 4];
                i32::from(IQ4_VALUES[(byte >> (4 * (i / 4 % 2)) & 15) as usize])
            };
            let sum: i32 = q.iter().enumerate().map(|(i, q)| value(i) * i32::from(*q)).sum();
            *h += scale_of(step, r) * (d * sum as f32);
        }
    }
    h
}

/// The bf16 number `index` of those that `bytes` begin with.
fn scale_of(bytes: &[u8], index: usize) -> f32 {
    bf16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]).to_f32()
}

/// Bytes of a tile of `B`.
pub(super) fn tile_bytes(rank: usize) -> usize {
    SCALES + rank.div_ceil(OCTET) * 2 * 64
}

/// Tiles of `b`, `[columns][rank]`.
pub(super) fn tiles(b: &[f32], rank: usize) -> Vec<u8> {
    let columns = b.len() / rank.max(1);
    let mut tiles = vec![0u8; columns.div_ceil(TILE) * tile_bytes(rank)];
    let mut indices = vec![0; rank];
    for (tile, rows) in tiles.chunks_exact_mut(tile_bytes(rank)).zip(b.chunks((TILE * rank).max(1))) {
        for (c, row) in rows.chunks_exact(rank.max(1)).enumerate() {
            let scale = quantize(row, &mut indices);
            tile[2 * c..2 * c + 2].copy_from_slice(&scale.to_le_bytes());
            for (j, index) in indices.iter().enumerate() {
                let (octet, high, at) = (j / OCTET, j / 4 % 2, j % 4);
                tile[SCALES + 128 * octet + 4 * c + at] |= index << (4 * high);
            }
        }
    }
    tiles
}

/// As [`add_low_rank`](super::add_low_rank), whose checks were made.
///
/// # Safety
/// As there.
pub(super) unsafe fn add(isa: Isa, task: &LowRankTask<'_>, tiles: &[u8]) {
    let rank = task.tiles.rank;
    let mut rounded = [0i8; MAX_RANK];
    let rounded = &mut rounded[..rank.next_multiple_of(OCTET)];
    for t in 0..task.rows {
        let h = &task.hidden[t * task.stride..][..rank];
        let largest = h.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        let scale = largest / 127.0;
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        // (A conversion, not `round`, which is a call where the instruction is not known to be there.)
        for (q, h) in rounded.iter_mut().zip(h) {
            let v = h * inverse;
            *q = (v + 0.5f32.copysign(v)) as i8;
        }
        let first = task.columns.start / TILE * tile_bytes(rank);
        let tiles = &tiles[first..][..task.columns.len().div_ceil(TILE) * tile_bytes(rank)];
        // SAFETY: columns of this row, by the caller's promise; the token proves the features.
        unsafe {
            let y = std::slice::from_raw_parts_mut(task.out.add(t * task.out_stride), task.columns.len());
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512(_) => x86::add_vnni(tiles, rounded, scale, y),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2(_) => x86::add_avx2(tiles, rounded, scale, y),
                #[cfg(target_arch = "aarch64")]
                Isa::Neon(isa) => neon::add(isa, tiles, rounded, scale, y),
                _ => scalar_add(tiles, rounded, scale, y),
            }
        }
    }
}

/// Adds to `y` the tiles' columns times `h`, which has whole octets, times `scale`.
fn scalar_add(tiles: &[u8], h: &[i8], scale: f32, y: &mut [f32]) {
    for (tile, y) in tiles.chunks_exact(tile_bytes(h.len())).zip(y.chunks_mut(TILE)) {
        for (c, y) in y.iter_mut().enumerate() {
            let value = |j: usize| {
                let byte = tile[SCALES + 128 * (j / OCTET) + 4 * c + j % 4];
                i32::from(IQ4_VALUES[(byte >> (4 * (j / 4 % 2)) & 15) as usize])
            };
            let sum: i32 = h.iter().enumerate().map(|(j, h)| value(j) * i32::from(*h)).sum();
            *y += scale_of(tile, c) * (scale * sum as f32);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::hidden::OFFSET;
    use super::{GROUP, IQ4_VALUES, OCTET, ROWS, SCALES, STEP, TILE, tile_bytes};
    use std::arch::x86_64::*;

    /// The values, made unsigned, as one factor of `vpdpbusd` has to be.
    const UNSIGNED: [u8; 16] = {
        let mut values = [0; 16];
        let mut i = 0;
        while i < 16 {
            values[i] = (IQ4_VALUES[i] as u8).wrapping_add(OFFSET);
            i += 1;
        }
        values
    };

    /// The values whose indices are the low halves of bytes, and the high ones.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn values(table: __m512i, bytes: __m512i) -> [__m512i; 2] {
        let low = _mm512_set1_epi8(15);
        let of = |indices| _mm512_shuffle_epi8(table, _mm512_and_si512(indices, low));
        [of(bytes), of(_mm512_srli_epi16::<4>(bytes))]
    }

    /// # Safety
    /// The features; whole steps, each with 32 of `q`, one of `d` and of `sums`, which are `d` times the sum of those `q`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
    pub(super) unsafe fn hidden_vnni(tile: &[u8], q: &[i8], d: &[f32], sums: &[f32]) -> [f32; ROWS] {
        // SAFETY: sixteen bytes.
        let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(UNSIGNED.as_ptr().cast()) });
        // A lane is a row; what the offset has added is summed apart.
        let (mut h, mut excess) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for (((step, q), d), sum) in tile.chunks_exact(STEP).zip(q.chunks_exact(GROUP)).zip(d).zip(sums) {
            let mut acc = [_mm512_setzero_si512(); 2];
            for line in 0..GROUP / OCTET {
                // SAFETY: within the step and its values.
                unsafe {
                    let bytes = _mm512_loadu_si512(step.as_ptr().add(2 * ROWS + 64 * line).cast());
                    let q = q.as_ptr().add(OCTET * line).cast::<i32>();
                    for (half, values) in values(table, bytes).into_iter().enumerate() {
                        let q = _mm512_set1_epi32(q.add(half).read_unaligned());
                        acc[half] = _mm512_dpbusd_epi32(acc[half], values, q);
                    }
                }
            }
            // SAFETY: sixteen scales.
            let scales = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(step.as_ptr().cast()) });
            let scales = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(scales));
            let sums = _mm512_cvtepi32_ps(_mm512_add_epi32(acc[0], acc[1]));
            h = _mm512_fmadd_ps(scales, _mm512_mul_ps(_mm512_set1_ps(*d), sums), h);
            excess = _mm512_fmadd_ps(scales, _mm512_set1_ps(*sum), excess);
        }
        h = _mm512_fnmadd_ps(_mm512_set1_ps(f32::from(OFFSET)), excess, h);
        let mut lanes = [0.0; ROWS];
        // SAFETY: sixteen floats.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), h) };
        lanes
    }

    /// Adds products of four bytes of each lane with four of the activations, given in each lane.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn dot(acc: __m256i, values: __m256i, q: __m256i) -> __m256i {
        // The sign of q goes to the values: pairs then stay within 16 bits (2 · 127 · 127).
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(values, q));
        _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn signed_table() -> __m256i {
        // SAFETY: sixteen bytes.
        _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(IQ4_VALUES.as_ptr().cast()) })
    }

    /// # Safety
    /// As [`hidden_vnni`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn hidden_avx2(tile: &[u8], q: &[i8], d: &[f32]) -> [f32; ROWS] {
        let (table, low) = (signed_table(), _mm256_set1_epi8(15));
        let mut h = [_mm256_setzero_ps(); 2];
        for ((step, q), d) in tile.chunks_exact(STEP).zip(q.chunks_exact(GROUP)).zip(d) {
            for (half, h) in h.iter_mut().enumerate() {
                let mut acc = _mm256_setzero_si256();
                for line in 0..GROUP / OCTET {
                    // SAFETY: within the step and its values.
                    unsafe {
                        let at = step.as_ptr().add(2 * ROWS + 64 * line + 32 * half);
                        let bytes = _mm256_loadu_si256(at.cast());
                        let q = q.as_ptr().add(OCTET * line).cast::<i32>();
                        let first = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, low));
                        let second = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low);
                        acc = dot(acc, first, _mm256_set1_epi32(q.read_unaligned()));
                        let second = _mm256_shuffle_epi8(table, second);
                        acc = dot(acc, second, _mm256_set1_epi32(q.add(1).read_unaligned()));
                    }
                }
                // SAFETY: eight scales.
                let scales = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(step.as_ptr().add(16 * half).cast()) });
                let scales = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(scales));
                *h = _mm256_fmadd_ps(scales, _mm256_mul_ps(_mm256_set1_ps(*d), _mm256_cvtepi32_ps(acc)), *h);
            }
        }
        let mut lanes = [0.0; ROWS];
        // SAFETY: twice eight floats.
        unsafe {
            _mm256_storeu_ps(lanes.as_mut_ptr(), h[0]);
            _mm256_storeu_ps(lanes.as_mut_ptr().add(8), h[1]);
        }
        lanes
    }

    /// As [`scalar_add`](super::scalar_add).
    ///
    /// # Safety
    /// The features.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
    pub(super) unsafe fn add_vnni(tiles: &[u8], h: &[i8], scale: f32, y: &mut [f32]) {
        // SAFETY: sixteen bytes.
        let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(UNSIGNED.as_ptr().cast()) });
        // What the offset adds to every column.
        let excess: i32 = h.iter().map(|h| i32::from(*h)).sum::<i32>() * i32::from(OFFSET);
        for (tile, y) in tiles.chunks_exact(tile_bytes(h.len())).zip(y.chunks_mut(TILE)) {
            let mut acc = [_mm512_set1_epi32(-excess); 2];
            for (octet, h) in h.chunks_exact(OCTET).enumerate() {
                for (half, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: within the tile and `h`.
                    unsafe {
                        let at = tile.as_ptr().add(SCALES + 128 * octet + 64 * half);
                        let [low, high] = values(table, _mm512_loadu_si512(at.cast()));
                        let h = h.as_ptr().cast::<i32>();
                        *acc = _mm512_dpbusd_epi32(*acc, low, _mm512_set1_epi32(h.read_unaligned()));
                        *acc = _mm512_dpbusd_epi32(*acc, high, _mm512_set1_epi32(h.add(1).read_unaligned()));
                    }
                }
            }
            let all = ((1u64 << y.len()) - 1) as u32;
            for (half, (acc, mask)) in acc.into_iter().zip([all as u16, (all >> 16) as u16]).enumerate() {
                // SAFETY: the tile's scales, and of the results those that the mask names.
                unsafe {
                    let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(tile.as_ptr().add(32 * half).cast()));
                    let scales = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits));
                    let sum = _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_cvtepi32_ps(acc));
                    let y = y.as_mut_ptr().wrapping_add(16 * half);
                    let new = _mm512_fmadd_ps(scales, sum, _mm512_maskz_loadu_ps(mask, y));
                    _mm512_mask_storeu_ps(y, mask, new);
                }
            }
        }
    }

    /// As [`scalar_add`](super::scalar_add).
    ///
    /// # Safety
    /// The features.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn add_avx2(tiles: &[u8], h: &[i8], scale: f32, y: &mut [f32]) {
        let (table, low) = (signed_table(), _mm256_set1_epi8(15));
        for (tile, y) in tiles.chunks_exact(tile_bytes(h.len())).zip(y.chunks_mut(TILE)) {
            let mut sums = [0.0f32; TILE];
            for (quarter, sums) in sums.chunks_exact_mut(8).enumerate() {
                let mut acc = _mm256_setzero_si256();
                for (octet, h) in h.chunks_exact(OCTET).enumerate() {
                    // SAFETY: within the tile and `h`.
                    unsafe {
                        let at = tile.as_ptr().add(SCALES + 128 * octet + 32 * quarter);
                        let bytes = _mm256_loadu_si256(at.cast());
                        let h = h.as_ptr().cast::<i32>();
                        let first = _mm256_shuffle_epi8(table, _mm256_and_si256(bytes, low));
                        acc = dot(acc, first, _mm256_set1_epi32(h.read_unaligned()));
                        let second = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low);
                        let second = _mm256_shuffle_epi8(table, second);
                        acc = dot(acc, second, _mm256_set1_epi32(h.add(1).read_unaligned()));
                    }
                }
                // SAFETY: eight scales, eight sums.
                unsafe {
                    let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(tile.as_ptr().add(16 * quarter).cast()));
                    let scales = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits));
                    let sum = _mm256_mul_ps(_mm256_set1_ps(scale), _mm256_cvtepi32_ps(acc));
                    _mm256_storeu_ps(sums.as_mut_ptr(), _mm256_mul_ps(scales, sum));
                }
            }
            y.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum);
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    //! NEON: values are looked up, and a lane is a row of `A` or a column of `B`.
    use super::{GROUP, IQ4_VALUES, OCTET, ROWS, SCALES, STEP, TILE, tile_bytes};
    use crate::cpu::isa::Neon;
    use crate::cpu::kernels::linear::neon::dot::{Dot, Sdot, Widening};
    use std::arch::aarch64::*;

    /// `h` of a tile's rows: whole steps, each with 32 of `q` and one of `d`.
    pub(super) fn hidden(token: Neon, tile: &[u8], q: &[i8], d: &[f32]) -> [f32; ROWS] {
        #[target_feature(enable = "dotprod")]
        fn with_dotprod(tile: &[u8], q: &[i8], d: &[f32]) -> [f32; ROWS] {
            // SAFETY: the feature is enabled here.
            unsafe { hidden_with::<Sdot>(tile, q, d) }
        }
        // SAFETY: the token proves the feature; the baseline needs none.
        unsafe { if token.dotprod { with_dotprod(tile, q, d) } else { hidden_with::<Widening>(tile, q, d) } }
    }

    /// As [`scalar_add`](super::scalar_add).
    pub(super) fn add(token: Neon, tiles: &[u8], h: &[i8], scale: f32, y: &mut [f32]) {
        #[target_feature(enable = "dotprod")]
        fn with_dotprod(tiles: &[u8], h: &[i8], scale: f32, y: &mut [f32]) {
            // SAFETY: the feature is enabled here.
            unsafe { add_with::<Sdot>(tiles, h, scale, y) }
        }
        // SAFETY: the token proves the feature; the baseline needs none.
        unsafe {
            if token.dotprod { with_dotprod(tiles, h, scale, y) } else { add_with::<Widening>(tiles, h, scale, y) }
        }
    }

    /// # Safety
    /// The caller has what `D` needs.
    #[inline(always)]
    unsafe fn hidden_with<D: Dot>(tile: &[u8], q: &[i8], d: &[f32]) -> [f32; ROWS] {
        let mut lanes = [0.0; ROWS];
        // SAFETY: whole steps and their values; as many floats as there are rows.
        unsafe {
            let table = vld1q_s8(IQ4_VALUES.as_ptr());
            let mut h = [vdupq_n_f32(0.0); ROWS / 4];
            for ((step, q), d) in tile.chunks_exact(STEP).zip(q.chunks_exact(GROUP)).zip(d) {
                let mut acc = [vdupq_n_s32(0); 4];
                for half in 0..2 {
                    let q = vld1q_s8(q.as_ptr().add(16 * half));
                    let lines = step.as_ptr().add(2 * ROWS + 128 * half);
                    line::<D, 0, 1>(&mut acc, table, lines, q);
                    line::<D, 2, 3>(&mut acc, table, lines.add(64), q);
                }
                for (i, (h, acc)) in h.iter_mut().zip(acc).enumerate() {
                    *h = vfmaq_f32(*h, scales(step.as_ptr().add(8 * i)), vmulq_n_f32(vcvtq_f32_s32(acc), *d));
                }
            }
            for (i, h) in h.into_iter().enumerate() {
                vst1q_f32(lanes.as_mut_ptr().add(4 * i), h);
            }
        }
        lanes
    }

    /// # Safety
    /// The caller has what `D` needs.
    #[inline(always)]
    unsafe fn add_with<D: Dot>(tiles: &[u8], h: &[i8], scale: f32, y: &mut [f32]) {
        // SAFETY: whole tiles, octets of `h`, and 32 floats: short tiles go through a buffer.
        unsafe {
            let table = vld1q_s8(IQ4_VALUES.as_ptr());
            for (tile, y) in tiles.chunks_exact(tile_bytes(h.len())).zip(y.chunks_mut(TILE)) {
                let mut acc = [[vdupq_n_s32(0); 4]; 2];
                for (octet, h) in h.chunks_exact(OCTET).enumerate() {
                    let q = vld1_s8(h.as_ptr());
                    let lines = tile.as_ptr().add(SCALES + 128 * octet);
                    for (half, acc) in acc.iter_mut().enumerate() {
                        line::<D, 0, 1>(acc, table, lines.add(64 * half), vcombine_s8(q, q));
                    }
                }
                let mut buffer = [0.0; TILE];
                buffer[..y.len()].copy_from_slice(y);
                for (i, acc) in acc.as_flattened().iter().enumerate() {
                    let (at, by) = (buffer.as_mut_ptr().add(4 * i), scales(tile.as_ptr().add(8 * i)));
                    let sums = vmulq_n_f32(vcvtq_f32_s32(*acc), scale);
                    vst1q_f32(at, vfmaq_f32(vld1q_f32(at), by, sums));
                }
                y.copy_from_slice(&buffer[..y.len()]);
            }
        }
    }

    /// Adds a line's products with eight values of `q`: the four of lane `LOW` and those of lane `HIGH`.
    ///
    /// # Safety
    /// 64 bytes at `line`; the caller has what `D` needs.
    #[inline(always)]
    unsafe fn line<D: Dot, const LOW: i32, const HIGH: i32>(
        acc: &mut [int32x4_t; 4],
        table: int8x16_t,
        line: *const u8,
        q: int8x16_t,
    ) {
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: within the line; neither the values nor `q` are -128.
            unsafe {
                let bytes = vld1q_u8(line.add(16 * i));
                let low = vqtbl1q_s8(table, vandq_u8(bytes, vdupq_n_u8(15)));
                let high = vqtbl1q_s8(table, vshrq_n_u8::<4>(bytes));
                *acc = D::dot_lane::<HIGH>(D::dot_lane::<LOW>(*acc, low, q), high, q);
            }
        }
    }

    /// Four bf16 as f32.
    ///
    /// # Safety
    /// 8 bytes at `p`.
    #[inline(always)]
    unsafe fn scales(p: *const u8) -> float32x4_t {
        // SAFETY: by the contract; the load needs no alignment.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::kernels::lora::hidden::tests::meets_the_product;
    use crate::cpu::kernels::lora::{Precision, Tiles, add_low_rank};

    /// Near enough a normal number.
    fn normal(seed: u64, i: usize) -> f32 {
        (0..4).map(|j| crate::random::uniform(seed, (4 * i + j) as u64) - 0.5).sum::<f64>() as f32
    }

    #[test]
    fn four_bits_keep_bell_curves_to_a_thirteenth() {
        let values: Vec<f32> = (0..32 * 500).map(|i| 1e-6 * normal(3, i)).collect();
        let (mut error, mut size) = (0.0f64, 0.0f64);
        for group in values.chunks_exact(32) {
            let mut indices = [0; 32];
            let scale = quantize(group, &mut indices).to_f32();
            for (v, i) in group.iter().zip(indices) {
                error += f64::from(v - scale * f32::from(IQ4_VALUES[i as usize])).powi(2);
                size += f64::from(*v).powi(2);
            }
        }
        let relative = (error / size).sqrt();
        assert!(relative < 1.0 / 13.0, "{relative}");
        let mut indices = [7; 4];
        assert_eq!(quantize(&[0.0; 4], &mut indices).to_f32(), 0.0);
    }

    #[test]
    fn first_halves_agree_on_every_instruction_set() {
        let pack = |a: &[f32], k: usize| {
            let mut shelf = Shelf::new(Rows::size(a.len() / k, k), "tiles").unwrap();
            Rows::new(a, k, &mut shelf).unwrap()
        };
        // Five times the error of a thirteenth of each value of A, at random.
        meets_the_product(normal, 0.4, pack, |isa, a, x, rows, out, stride| {
            // SAFETY: the rows of all tokens, this thread's alone.
            unsafe { hidden(isa, a, x, rows, out, stride) }
        });
    }

    #[test]
    fn second_halves_agree_on_every_instruction_set() {
        for (rank, columns, rows) in [(1, 1, 1), (3, 31, 2), (16, 1100, 1), (17, 96, 5), (64, 2050, 3)] {
            let b: Vec<f32> = (0..columns * rank).map(|i| 1e-3 * normal(1, i)).collect();
            let stride = rank + 3;
            let hidden: Vec<f32> = (0..rows * stride).map(|i| normal(2, i)).collect();
            let start: Vec<f32> = (0..rows * columns).map(|i| 1e-3 * normal(3, i)).collect();
            let mut shelf = Shelf::new(Tiles::size(columns, rank, Precision::Nibble), "tiles").unwrap();
            let tiles = Tiles::new(&b, rank, Precision::Nibble, &mut shelf).unwrap();
            assert_eq!(tiles.bytes(), Tiles::size(columns, rank, Precision::Nibble));
            let mut first: Option<Vec<f32>> = None;
            for isa in Isa::available() {
                let mut y = start.clone();
                let cut = columns / 2 / TILE * TILE;
                for part in [0..cut, cut..columns] {
                    let out = y[part.start..].as_mut_ptr();
                    let task = LowRankTask {
                        tiles: &tiles,
                        hidden: &hidden,
                        stride,
                        rows,
                        columns: part,
                        out,
                        out_stride: columns,
                    };
                    // SAFETY: `y` holds every row's columns, and this thread alone uses it.
                    unsafe { add_low_rank(isa, &task) };
                }
                let (mut error, mut size) = (0.0f64, 0.0f64);
                for t in 0..rows {
                    for c in 0..columns {
                        let term = |j: usize| f64::from(hidden[t * stride + j]) * f64::from(b[c * rank + j]);
                        let exact = (0..rank).map(term).sum::<f64>();
                        let got = f64::from(y[t * columns + c]) - f64::from(start[t * columns + c]);
                        error += (got - exact).powi(2);
                        size += (0..rank).map(|j| term(j).powi(2)).sum::<f64>();
                    }
                }
                // (A single value is kept to a few bits of its scale, and rounded with it.)
                assert!(error.sqrt() < size.sqrt() / 11.0, "{isa:?} {rank} {columns}: {error} {size}");
                let same = first.get_or_insert_with(|| y.clone());
                let near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-8;
                assert!(y.iter().zip(same.iter()).all(near), "{isa:?} {rank} {columns}");
            }
        }
    }
}
