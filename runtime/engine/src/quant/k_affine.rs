//! K-quants with a scale and a minimum per group: `Q2_K`, `Q4_K`, `Q5_K`. 256 values form a super-block; every group of
//! 16 (`Q2_K`) or 32 has a small integer scale and minimum, and two halves, `d` and `dmin`, scale those:
//!
//! value = `d · scale[group] · code − dmin · min[group]`
//!
//! | type | group | codes | scales, minima |
//! | --- | --- | --- | --- |
//! | `Q2_K` | 16 | 2 bits: per 128 elements 32 bytes, four runs of 32 | 4 bits each, scale low, minimum high |
//! | `Q4_K` | 32 | nibbles: per 64 elements 32 bytes, first 32 low | 6 bits each in 12 bytes, see [`unpack_scales`] |
//! | `Q5_K` | 32 | nibbles as `Q4_K`; fifth bits: bit `g` of `qh[l]` is element `32·g + l` | as `Q4_K` |

use super::DType;
use super::block::{Block, F16, Importance, block_struct, pack, unpack};
use super::search::{Steps, damped_weights, fit_affine, fit_positive, nearest, sum_of_squares};

block_struct! {
    /// 256 values of 2 bits with 16 scales and minima.
    BlockQ2K: Q2_K {
        /// Per group of 16: scale in the low nibble, minimum in the high one.
        scales: [u8; 16],
        /// Codes.
        qs: [u8; 64],
        /// Scale of the scales.
        d: F16,
        /// Scale of the minima.
        dmin: F16,
    }
}
block_struct! {
    /// 256 values of 4 bits with 8 scales and minima.
    BlockQ4K: Q4_K {
        /// Scale of the scales.
        d: F16,
        /// Scale of the minima.
        dmin: F16,
        /// Eight scales and eight minima of 6 bits.
        scales: [u8; 12],
        /// Codes.
        qs: [u8; 128],
    }
}
block_struct! {
    /// 256 values of 5 bits with 8 scales and minima.
    BlockQ5K: Q5_K {
        /// Scale of the scales.
        d: F16,
        /// Scale of the minima.
        dmin: F16,
        /// Eight scales and eight minima of 6 bits.
        scales: [u8; 12],
        /// Fifth bits.
        qh: [u8; 32],
        /// Lower four bits.
        qs: [u8; 128],
    }
}

impl BlockQ2K {
    /// The codes in element order, 0–3.
    pub fn codes(&self) -> [u8; 256] {
        let mut codes = [0; 256];
        unpack(&self.qs, 2, 32, 0, &mut codes);
        codes
    }
}

impl BlockQ4K {
    /// The codes in element order, 0–15.
    pub fn codes(&self) -> [u8; 256] {
        let mut codes = [0; 256];
        unpack(&self.qs, 4, 32, 0, &mut codes);
        codes
    }

    /// The integer scales and minima of the eight groups.
    pub fn scales_and_mins(&self) -> ([u8; 8], [u8; 8]) {
        unpack_scales(&self.scales)
    }
}

impl BlockQ5K {
    /// The codes in element order, 0–31.
    pub fn codes(&self) -> [u8; 256] {
        let mut codes = [0; 256];
        unpack(&self.qs, 4, 32, 0, &mut codes);
        unpack(&self.qh, 1, 32, 4, &mut codes);
        codes
    }

    /// The integer scales and minima of the eight groups.
    pub fn scales_and_mins(&self) -> ([u8; 8], [u8; 8]) {
        unpack_scales(&self.scales)
    }
}

/// The eight scales and eight minima (0–63) of `Q4_K` and `Q5_K`.
///
/// Bytes 0–3 hold scales 0–3 and bytes 4–7 minima 0–3 in their lower six bits. Bytes 8–11 hold the lower nibbles of
/// scales 4–7 (low) and minima 4–7 (high), whose upper two bits are the top bits of bytes 0–3 and 4–7.
pub fn unpack_scales(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let [s0, s1, s2, s3, m0, m1, m2, m3, n0, n1, n2, n3] = *packed;
    let low = |b: u8| b & 63;
    let scale = |n: u8, top: u8| (n & 15) | (top >> 6) << 4;
    let min = |n: u8, top: u8| (n >> 4) | (top >> 6) << 4;
    (
        [low(s0), low(s1), low(s2), low(s3), scale(n0, s0), scale(n1, s1), scale(n2, s2), scale(n3, s3)],
        [low(m0), low(m1), low(m2), low(m3), min(n0, m0), min(n1, m1), min(n2, m2), min(n3, m3)],
    )
}

/// The inverse of [`unpack_scales`]; the numbers are at most 63.
pub fn pack_scales(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for j in 0..4 {
        packed[j] = scales[j] | (scales[j + 4] >> 4) << 6;
        packed[j + 4] = mins[j] | (mins[j + 4] >> 4) << 6;
        packed[j + 8] = (scales[j + 4] & 15) | (mins[j + 4] & 15) << 4;
    }
    packed
}

impl Block for BlockQ2K {
    const DTYPE: DType = DType::Q2_K;
    const LARGEST: f32 = F16::MAX * 15.0 * 3.0;

    fn decode(&self, out: &mut [f32]) {
        let scales = self.scales.map(|s| (s & 15, s >> 4));
        decode(self.d, self.dmin, scales, &self.codes(), out);
    }

    fn encode(x: &[f32], importance: Option<Importance<'_>>) -> Self {
        let fit = Scheme::Q2_K.encode(x, importance);
        let mut block = BlockQ2K { scales: [0; 16], qs: [0; 64], d: fit.d, dmin: fit.dmin };
        for ((packed, scale), min) in block.scales.iter_mut().zip(fit.scales).zip(fit.mins) {
            *packed = scale | min << 4;
        }
        pack(&fit.codes, 2, 32, 0, &mut block.qs);
        block
    }

    fn is_finite(&self) -> bool {
        self.d.get().is_finite() && self.dmin.get().is_finite()
    }
}

impl Block for BlockQ4K {
    const DTYPE: DType = DType::Q4_K;
    const LARGEST: f32 = F16::MAX * 63.0 * 15.0;

    fn decode(&self, out: &mut [f32]) {
        decode(self.d, self.dmin, pairs(&self.scales), &self.codes(), out);
    }

    fn encode(x: &[f32], importance: Option<Importance<'_>>) -> Self {
        let fit = Scheme::Q4_K.encode(x, importance);
        let mut block = BlockQ4K { d: fit.d, dmin: fit.dmin, scales: fit.packed_scales(), qs: [0; 128] };
        pack(&fit.codes, 4, 32, 0, &mut block.qs);
        block
    }

    fn is_finite(&self) -> bool {
        self.d.get().is_finite() && self.dmin.get().is_finite()
    }
}

impl Block for BlockQ5K {
    const DTYPE: DType = DType::Q5_K;
    const LARGEST: f32 = F16::MAX * 63.0 * 31.0;

    fn decode(&self, out: &mut [f32]) {
        decode(self.d, self.dmin, pairs(&self.scales), &self.codes(), out);
    }

    fn encode(x: &[f32], importance: Option<Importance<'_>>) -> Self {
        let fit = Scheme::Q5_K.encode(x, importance);
        let mut block = BlockQ5K { d: fit.d, dmin: fit.dmin, scales: fit.packed_scales(), qh: [0; 32], qs: [0; 128] };
        pack(&fit.codes, 4, 32, 0, &mut block.qs);
        pack(&fit.codes, 1, 32, 4, &mut block.qh);
        block
    }

    fn is_finite(&self) -> bool {
        self.d.get().is_finite() && self.dmin.get().is_finite()
    }
}

fn pairs(packed: &[u8; 12]) -> [(u8, u8); 8] {
    let (scales, mins) = unpack_scales(packed);
    std::array::from_fn(|j| (scales[j], mins[j]))
}

fn decode<const GROUPS: usize>(d: F16, dmin: F16, scales: [(u8, u8); GROUPS], codes: &[u8; 256], out: &mut [f32]) {
    let group = 256 / GROUPS;
    let (d, dmin) = (d.get(), dmin.get());
    for ((out, codes), (scale, min)) in out.chunks_exact_mut(group).zip(codes.chunks_exact(group)).zip(scales) {
        let (scale, min) = (d * f32::from(scale), dmin * f32::from(min));
        for (v, &code) in out.iter_mut().zip(codes) {
            *v = scale * f32::from(code) - min;
        }
    }
}

/// What distinguishes the three quantizers.
struct Scheme {
    /// Values per group.
    group: usize,
    /// Greatest code.
    levels: i32,
    /// Greatest integer scale and minimum.
    scale_levels: i32,
    /// The search without importance matrix.
    steps: Steps,
    /// Weight of a value without importance matrix: `|x|` plus this times the root mean square of the group.
    rms_weight: f32,
    /// With one: the share of twice the super-block's mean square that damps small values.
    damping: f32,
}

/// A super-block before packing. `Q4_K` and `Q5_K` use the first eight scales and minima.
struct Fit {
    d: F16,
    dmin: F16,
    scales: [u8; 16],
    mins: [u8; 16],
    codes: [u8; 256],
}

impl Fit {
    fn packed_scales(&self) -> [u8; 12] {
        pack_scales(&std::array::from_fn(|j| self.scales[j]), &std::array::from_fn(|j| self.mins[j]))
    }
}

impl Scheme {
    const Q2_K: Scheme = Scheme {
        group: 16,
        levels: 3,
        scale_levels: 15,
        steps: Steps { first: -0.5, step: 0.1, count: 15, absolute: true },
        rms_weight: 0.0,
        damping: 1.0,
    };
    const Q4_K: Scheme = Scheme {
        group: 32,
        levels: 15,
        scale_levels: 63,
        steps: Steps { first: -1.0, step: 0.1, count: 20, absolute: false },
        rms_weight: 1.0,
        damping: 2.0,
    };
    const Q5_K: Scheme = Scheme {
        group: 32,
        levels: 31,
        scale_levels: 63,
        steps: Steps { first: -0.5, step: 0.1, count: 15, absolute: false },
        rms_weight: 1.0,
        damping: 2.0,
    };

    /// Fits every group, quantizes the groups' scales and minima, and rounds the values again to what is left of them.
    fn encode(&self, x: &[f32], importance: Option<Importance<'_>>) -> Fit {
        let groups = 256 / self.group;
        let mut fit = Fit { d: F16::default(), dmin: F16::default(), scales: [0; 16], mins: [0; 16], codes: [0; 256] };
        let (mut scales, mut mins, mut group_weights) = ([0.0f32; 16], [0.0f32; 16], [0.0f32; 16]);
        let mut buffer = [0.0f32; 32];
        let weights = &mut buffer[..self.group];
        let mean_square = self.damping * sum_of_squares(x) / 256.0;
        for (j, (x, codes)) in x.chunks_exact(self.group).zip(fit.codes.chunks_exact_mut(self.group)).enumerate() {
            let steps = match importance.and_then(|i| i.weights.chunks_exact(self.group).nth(j)) {
                Some(importance) => {
                    damped_weights(importance, x, mean_square, weights);
                    Steps::IMPORTANCE
                }
                None => {
                    let rms = self.rms_weight * (sum_of_squares(x) / self.group as f32).sqrt();
                    weights.iter_mut().zip(x).for_each(|(w, x)| *w = rms + x.abs());
                    self.steps
                }
            };
            group_weights[j] = weights.iter().fold(0.0, |sum, w| sum + w);
            (scales[j], mins[j]) = fit_affine(x, weights, self.levels, steps, codes);
        }
        let (scales, mins, group_weights) = (&scales[..groups], &mins[..groups], &group_weights[..groups]);
        let quantize = |x: &[f32], codes: &mut [u8]| match importance {
            Some(_) => fit_positive(x, group_weights, self.scale_levels, codes),
            None => self.round_scales(x, codes),
        };
        fit.d = F16::new(quantize(scales, &mut fit.scales[..groups]));
        fit.dmin = F16::new(quantize(mins, &mut fit.mins[..groups]));

        let (d, dmin) = (fit.d.get(), fit.dmin.get());
        let chunks = x.chunks_exact(self.group).zip(fit.codes.chunks_exact_mut(self.group));
        for ((x, codes), (scale, min)) in chunks.zip(fit.scales.iter().zip(&fit.mins)) {
            let (scale, min) = (d * f32::from(*scale), dmin * f32::from(*min));
            if scale == 0.0 {
                continue;
            }
            for (code, v) in codes.iter_mut().zip(x) {
                *code = nearest((v + min) / scale).clamp(0, self.levels) as u8;
            }
        }
        fit
    }

    /// Integer scales that map the greatest to the greatest code; returns their scale.
    fn round_scales(&self, x: &[f32], codes: &mut [u8]) -> f32 {
        let levels = self.scale_levels as f32;
        let max = x.iter().fold(0.0f32, |max, &v| if v > max { v } else { max });
        let inverse = if max > 0.0 { levels / max } else { 0.0 };
        for (code, v) in codes.iter_mut().zip(x) {
            *code = nearest(inverse * v).clamp(0, self.scale_levels) as u8;
        }
        max / levels
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn six_bit_scales_survive_packing() {
        for seed in 0..64u8 {
            let scales = std::array::from_fn(|j| (seed.wrapping_mul(37).wrapping_add(j as u8 * 11)) & 63);
            let mins = std::array::from_fn(|j| (seed.wrapping_mul(29).wrapping_add(j as u8 * 23)) & 63);
            assert_eq!(unpack_scales(&pack_scales(&scales, &mins)), (scales, mins));
        }
    }
}
