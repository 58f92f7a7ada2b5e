//! The first half of a low-rank correction in 8 bits: `h[t][r] = Σₖ x[t][k] · A[r][k]`, with few `r` and many `k`.
//!
//! A map of few rows is no matter for the kernels that take a row after the other: reducing a register to one number and
//! beginning a row anew would be half of their work. So the rows of a tile lie side by side, `[tile][k / 4][8 rows][4]`, each
//! lane sums one of them, and a tile is read front to back. Its integers count with a scale for each row, and the
//! activations with theirs for every 32 values. A tile begins with the scales of its rows.
//!
//! The scalar form is the specification, up to the order of sums: the integers of 32 values are summed exactly, the sums as
//! f32. A row's result depends neither on the range of rows it is in nor on the number of tokens.

use std::ops::Range;

use crate::Result;
use crate::cpu::buffer::{Shelf, Table};
use crate::cpu::isa::Isa;
use crate::cpu::kernels::linear::{GROUP, Q8};

/// Rows of a tile.
pub const ROWS: usize = 8;
/// Values of a row that lie together.
const DEPTH: usize = 4;
/// What makes the integers unsigned, as the instructions want one factor to be.
pub(super) const OFFSET: u8 = 128;
/// Bytes of a tile's scales, an f32 for each row, zero for those behind the last.
const SCALES: usize = 4 * ROWS;

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
        let mut tiles = vec![0; Rows::size(rows, k)];
        for (tile, rows) in tiles.chunks_exact_mut(SCALES + ROWS * k).zip(a.chunks(ROWS * k)) {
            let (scales, values) = tile.split_at_mut(SCALES);
            values.fill(OFFSET);
            for ((r, row), to) in rows.chunks_exact(k).enumerate().zip(scales.chunks_exact_mut(4)) {
                let scale = row.iter().fold(0.0f32, |most, v| most.max(v.abs())) / 127.0;
                to.copy_from_slice(&scale.to_le_bytes());
                for (i, v) in row.iter().enumerate().filter(|_| scale > 0.0) {
                    values[(i / DEPTH * ROWS + r) * DEPTH + i % DEPTH] =
                        ((v / scale).round() as i8 as u8).wrapping_add(OFFSET);
                }
            }
        }
        Ok(Rows { rows, k, tiles: shelf.put(&tiles)? })
    }

    /// Bytes that tiles take.
    pub fn size(rows: usize, k: usize) -> usize {
        rows.div_ceil(ROWS) * (SCALES + ROWS * k)
    }

    /// All tiles.
    pub fn bytes(&self) -> &[u8] {
        &self.tiles
    }

    /// Scales and values of a tile.
    fn tile(&self, index: usize) -> ([f32; ROWS], &[u8]) {
        let bytes = SCALES + ROWS * self.k;
        let (scales, values) = self.tiles[index * bytes..][..bytes].split_at(SCALES);
        let scale = |r: usize| f32::from_le_bytes([0, 1, 2, 3].map(|i| scales[4 * r + i]));
        (std::array::from_fn(scale), values)
    }
}

/// A token's activations, and what their sums come to.
pub(super) struct Token<'a> {
    pub q: &'a [i8],
    /// Scale of every 32 values.
    pub d: &'a [f32],
    /// Scale times sum of every 32 values: what offsets of integers have added is taken off by them.
    #[cfg(target_arch = "x86_64")]
    pub sums: &'a [f32],
    /// Of all values.
    pub sum: f32,
}

/// Writes `h[t][rows]` of every token to `out + t · stride`, which is row 0 of token `t`, from what `tile` makes of a token and
/// the tile of `R` rows with that index. `a` has as many rows, of as many values.
///
/// # Safety
/// `out` must be valid for writes of those rows of every token, and nobody else may use them meanwhile.
///
/// # Panics
/// When the sizes do not fit, or `rows` begins within a tile: a mistake of the program.
pub(super) unsafe fn each_tile<const R: usize>(
    a: (usize, usize),
    x: &Q8<'_>,
    rows: Range<usize>,
    out: *mut f32,
    stride: usize,
    tile: impl Fn(&Token<'_>, usize) -> [f32; R],
) {
    let (layout, k) = (x.layout(), a.1);
    assert!(rows.start.is_multiple_of(R) && rows.end <= a.0 && layout.k == k && rows.end <= stride);
    for t in 0..layout.tokens {
        let sums = &x.sums()[t * layout.groups..][..k / GROUP];
        let token = Token {
            q: &x.values()[t * k..][..k],
            d: &x.scales()[t * layout.groups..][..k / GROUP],
            #[cfg(target_arch = "x86_64")]
            sums,
            sum: sums.iter().sum(),
        };
        for first in rows.clone().step_by(R) {
            for (r, h) in tile(&token, first / R).into_iter().enumerate().take(rows.end - first) {
                // SAFETY: by the caller's promise.
                unsafe { *out.add(t * stride + first + r) = h };
            }
        }
    }
}

/// Writes `h[t][rows]` of every token to `out + t · stride`, which is row 0 of token `t`.
///
/// # Safety
/// As [`each_tile`].
///
/// # Panics
/// As there.
pub unsafe fn hidden(isa: Isa, a: &Rows, x: &Q8<'_>, rows: Range<usize>, out: *mut f32, stride: usize) {
    let of_tile = |token: &Token<'_>, index: usize| {
        let (scales, tile) = a.tile(index);
        let mut h = match isa {
            // SAFETY: the token proves the features; `each_tile` has checked the sizes.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => unsafe { x86::with_vnni(tile, token.q, token.d) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => unsafe { x86::with_avx2(tile, token.q, token.d) },
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => neon::run(isa, tile, token.q, token.d),
            _ => scalar(tile, token.q, token.d),
        };
        // What the offset has added to every row; NEON multiplies signed bytes.
        let offset = if matches!(isa, Isa::Neon(_)) { 0.0 } else { f32::from(OFFSET) };
        let excess = offset * token.sum;
        h.iter_mut().zip(scales).for_each(|(h, scale)| *h = scale * (*h - excess));
        h
    };
    // SAFETY: by the caller's promise.
    unsafe { each_tile((a.rows, a.k), x, rows, out, stride, of_tile) }
}

/// Sums of a tile's rows, the offset included.
fn scalar(tile: &[u8], q: &[i8], d: &[f32]) -> [f32; ROWS] {
    let mut sums = [0.0; ROWS];
    for ((tile, q), d) in tile.chunks_exact(GROUP * ROWS).zip(q.chunks_exact(GROUP)).zip(d) {
        for (r, sum) in sums.iter_mut().enumerate() {
            let value = |i: usize| i32::from(tile[(i / DEPTH * ROWS + r) * DEPTH + i % DEPTH]);
            *sum += d * q.iter().enumerate().map(|(i, q)| value(i) * i32::from(*q)).sum::<i32>() as f32;
        }
    }
    sums
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{DEPTH, GROUP, OFFSET, ROWS};
    use std::arch::x86_64::*;

    /// Bytes from what is computed to what is asked for: a tile is read once, and is short for what prefetches by itself.
    const AHEAD: usize = 2_048;
    const STEP: usize = ROWS * DEPTH;

    /// Both kernels: `dot` adds the products of 8 rows' four values with four of the activations, given as one word.
    macro_rules! tile {
        ($tile:ident, $q:ident, $d:ident, $dot:expr) => {{
            let mut sum = _mm256_setzero_ps();
            for ((tile, q), d) in $tile.chunks_exact(GROUP * ROWS).zip($q.chunks_exact(GROUP)).zip($d) {
                let mut acc = _mm256_setzero_si256();
                for j in 0..GROUP / DEPTH {
                    // SAFETY: chunks of that size; a hint may point anywhere.
                    unsafe {
                        let a = tile.as_ptr().add(j * STEP);
                        if j % 2 == 0 {
                            _mm_prefetch::<_MM_HINT_T0>(a.wrapping_add(AHEAD).cast());
                        }
                        let q = _mm256_set1_epi32(q.as_ptr().add(j * DEPTH).cast::<i32>().read_unaligned());
                        acc = $dot(acc, _mm256_loadu_si256(a.cast()), q);
                    }
                }
                sum = _mm256_fmadd_ps(_mm256_set1_ps(*d), _mm256_cvtepi32_ps(acc), sum);
            }
            let mut sums = [0.0; ROWS];
            // SAFETY: eight floats.
            unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), sum) };
            sums
        }};
    }

    /// # Safety
    /// The features; whole groups, with a scale each.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
    pub(super) unsafe fn with_vnni(tile: &[u8], q: &[i8], d: &[f32]) -> [f32; ROWS] {
        tile!(tile, q, d, |acc, a, q| _mm256_dpbusd_epi32(acc, a, q))
    }

    /// # Safety
    /// As [`with_vnni`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn with_avx2(tile: &[u8], q: &[i8], d: &[f32]) -> [f32; ROWS] {
        let (offset, ones) = (_mm256_set1_epi8(OFFSET as i8), _mm256_set1_epi16(1));
        let dot = |acc, a, q| {
            // The sign of q goes to a: pairs then stay within 16 bits (2·127·127), and what the offset adds is put back by
            // a product of its own.
            let signed = _mm256_sign_epi8(_mm256_xor_si256(a, offset), q);
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(q), signed);
            let excess = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q), _mm256_set1_epi16(128));
            _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(pairs, ones), excess))
        };
        tile!(tile, q, d, dot)
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    //! NEON: a lane is a row, as on x86-64, but its bytes are signed, so the offset comes off them.
    use super::{DEPTH, GROUP, OFFSET, ROWS};
    use crate::cpu::isa::Neon;
    use crate::cpu::kernels::lanes::{fma, splat, store, zero};
    use crate::cpu::kernels::linear::neon::dot::{Dot, Sdot, Widening};
    use std::arch::aarch64::*;

    /// Sums of a tile's rows: whole groups, with a scale each.
    pub(super) fn run(token: Neon, tile: &[u8], q: &[i8], d: &[f32]) -> [f32; ROWS] {
        #[target_feature(enable = "dotprod")]
        fn with_dotprod(tile: &[u8], q: &[i8], d: &[f32]) -> [f32; ROWS] {
            // SAFETY: the feature is enabled here.
            unsafe { with::<Sdot>(tile, q, d) }
        }
        // SAFETY: the token proves the feature; the baseline needs none.
        unsafe { if token.dotprod { with_dotprod(tile, q, d) } else { with::<Widening>(tile, q, d) } }
    }

    /// # Safety
    /// The caller has what `D` needs.
    #[inline(always)]
    unsafe fn with<D: Dot>(tile: &[u8], q: &[i8], d: &[f32]) -> [f32; ROWS] {
        let mut sum = zero();
        for ((tile, q), d) in tile.chunks_exact(GROUP * ROWS).zip(q.chunks_exact(GROUP)).zip(d) {
            // SAFETY: chunks of that size; neither factor is -128.
            unsafe {
                let mut acc = [vdupq_n_s32(0); 2];
                for i in (0..GROUP).step_by(16) {
                    let (a, q) = (tile.as_ptr().add(i * ROWS), vld1q_s8(q.as_ptr().add(i)));
                    macro_rules! step {
                        ($lane:literal) => {
                            for (h, acc) in acc.iter_mut().enumerate() {
                                let a = vld1q_u8(a.add(($lane * ROWS + 4 * h) * DEPTH));
                                let a = vreinterpretq_s8_u8(veorq_u8(a, vdupq_n_u8(OFFSET)));
                                *acc = D::dot_lane::<$lane>(*acc, a, q);
                            }
                        };
                    }
                    step!(0);
                    step!(1);
                    step!(2);
                    step!(3);
                }
                sum = fma(splat(*d), [vcvtq_f32_s32(acc[0]), vcvtq_f32_s32(acc[1])], sum);
            }
        }
        let mut sums = [0.0; ROWS];
        // SAFETY: eight floats.
        unsafe { store(sums.as_mut_ptr(), sum) };
        sums
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cpu::kernels::linear::{Q8Mut, activation_bytes, quantize_rows};

    /// Holds a first half of numbers that `value` gives against the product in double precision, its error of `k` values being
    /// less than `bound` · √k, and instruction sets against each other; two shares at a time, as two threads have them.
    pub fn meets_the_product<A>(
        value: impl Fn(u64, usize) -> f32,
        bound: f64,
        pack: impl Fn(&[f32], usize) -> A,
        run: impl Fn(Isa, &A, &Q8<'_>, Range<usize>, *mut f32, usize),
    ) {
        for (rows, k, tokens) in [(1, 32, 1), (16, 576, 1), (7, 96, 3), (48, 1536, 2), (20, 4864, 1)] {
            let a: Vec<f32> = (0..rows * k).map(|i| value(1, i)).collect();
            let x: Vec<f32> = (0..tokens * k).map(|i| value(2, i) * 3.0 + 0.5).collect();
            let mut buffer = vec![0u64; activation_bytes(tokens, k).div_ceil(8)];
            // SAFETY: as large as asked for, and used by this thread alone.
            let to = unsafe { Q8Mut::new(buffer.as_mut_ptr().cast(), tokens, k) };
            quantize_rows(Isa::Scalar, &x, k, 0..tokens, &to).unwrap();
            let q8 = Q8::new(bytemuck::cast_slice(&buffer), tokens, k).unwrap();
            let packed = pack(&a, k);
            let mut first: Option<Vec<f32>> = None;
            for isa in Isa::available() {
                let mut h = vec![f32::NAN; tokens * (rows + 3)];
                // Whole tiles of either kind.
                let cut = rows / 2 / 16 * 16;
                for part in [0..cut, cut..rows] {
                    run(isa, &packed, &q8, part, h.as_mut_ptr(), rows + 3);
                }
                for t in 0..tokens {
                    for r in 0..rows {
                        let exact: f64 = (0..k).map(|i| f64::from(x[t * k + i]) * f64::from(a[r * k + i])).sum();
                        let got = f64::from(h[t * (rows + 3) + r]);
                        assert!((got - exact).abs() < bound * (k as f64).sqrt(), "{isa:?} {k} {t} {r}: {got} {exact}");
                    }
                    assert!(h[t * (rows + 3) + rows..][..3].iter().all(|v| v.is_nan()));
                }
                let h: Vec<f32> = h.into_iter().filter(|v| !v.is_nan()).collect();
                let same = first.get_or_insert_with(|| h.clone());
                let near = |(a, b): (&f32, &f32)| (a - b).abs() < 2e-4 * (k as f32).sqrt();
                assert!(h.iter().zip(same.iter()).all(near), "{isa:?}: {h:?} {same:?}");
            }
        }
    }

    #[test]
    fn every_instruction_set_meets_the_product_in_double_precision() {
        let value = |seed: u64, i: usize| crate::random::uniform(seed, i as u64) as f32 * 2.0 - 1.0;
        let pack = |a: &[f32], k: usize| {
            let mut shelf = Shelf::new(Rows::size(a.len() / k, k), "tiles").unwrap();
            Rows::new(a, k, &mut shelf).unwrap()
        };
        // Both factors are rounded to 8 bits, at random.
        meets_the_product(value, 0.05, pack, |isa, a, x, rows, out, stride| {
            // SAFETY: the rows of all tokens, this thread's alone.
            unsafe { hidden(isa, a, x, rows, out, stride) }
        });
    }
}
