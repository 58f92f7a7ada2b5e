//! K-quants around zero: `Q3_K` and `Q6_K`, whose 256 values have 16 signed integer scales under one half, and `Q8_K`,
//! the 8-bit form of activations that the K-quants are multiplied with in ggml.
//!
//! | type | value | codes | scales |
//! | --- | --- | --- | --- |
//! | `Q3_K` | `d · (scale − 32) · (code − 4)` | lower 2 bits as `Q2_K`; third bits: bit `g` of `hmask[l]` is element `32·g + l` | 6 bits in 12 bytes, see [`BlockQ3K::scales`] |
//! | `Q6_K` | `d · scale · (code − 32)` | nibbles: per 128 elements 64 bytes, first 64 low; upper 2 bits: per 128 elements 32 bytes, four runs of 32 | signed bytes |
//! | `Q8_K` | `d · code`, `d` in single precision | signed bytes | none; `bsums` are the sums of 16 codes each |

use super::DType;
use super::block::{Block, F16, Importance, block_struct, pack, unpack};
use super::dense::F32;
use super::search::{
    SMALLEST_PEAK, damped_weights, fit_symmetric, fit_symmetric_greedy, nearest, peak, sum_of_squares,
};

block_struct! {
    /// 256 values of 3 bits with 16 scales.
    BlockQ3K: Q3_K {
        /// Third bits.
        hmask: [u8; 32],
        /// Lower two bits.
        qs: [u8; 64],
        /// Sixteen scales of 6 bits.
        packed_scales: [u8; 12],
        /// Scale of the scales.
        d: F16,
    }
}
block_struct! {
    /// 256 values of 6 bits with 16 scales.
    BlockQ6K: Q6_K {
        /// Lower four bits.
        ql: [u8; 128],
        /// Upper two bits.
        qh: [u8; 64],
        /// Scales of the groups of 16.
        scales: [i8; 16],
        /// Scale of the scales.
        d: F16,
    }
}
block_struct! {
    /// 256 signed bytes with their partial sums.
    BlockQ8K: Q8_K {
        /// Scale.
        d: F32,
        /// Codes, in order.
        qs: [i8; 256],
        /// Sums of the groups of 16 codes: little-endian `i16`.
        bsums: [[u8; 2]; 16],
    }
}

impl BlockQ3K {
    /// The codes in element order, 0–7.
    pub fn codes(&self) -> [u8; 256] {
        let mut codes = [0; 256];
        unpack(&self.qs, 2, 32, 0, &mut codes);
        unpack(&self.hmask, 1, 32, 2, &mut codes);
        codes
    }

    /// The scales of the groups of 16, 0–63; 32 stands for zero.
    ///
    /// Bytes 0–7 hold the lower nibbles of scales 0–7 (low) and 8–15 (high); bytes 8–11 the upper two bits of scales
    /// 0–3, 4–7, 8–11 and 12–15 from the lowest bits up.
    pub fn scales(&self) -> [u8; 16] {
        let mut scales = [0; 16];
        unpack(&self.packed_scales[..8], 4, 8, 0, &mut scales);
        unpack(&self.packed_scales[8..], 2, 4, 4, &mut scales);
        scales
    }
}

impl BlockQ6K {
    /// The codes in element order, 0–63; 32 stands for zero.
    pub fn codes(&self) -> [u8; 256] {
        let mut codes = [0; 256];
        unpack(&self.ql, 4, 64, 0, &mut codes);
        unpack(&self.qh, 2, 32, 4, &mut codes);
        codes
    }
}

impl BlockQ8K {
    /// The sum of codes `16·group .. 16·group + 16` for all groups.
    pub fn sums(&self) -> [i16; 16] {
        self.bsums.map(i16::from_le_bytes)
    }
}

impl Block for BlockQ3K {
    const DTYPE: DType = DType::Q3_K;
    const LARGEST: f32 = F16::MAX * 32.0 * 4.0;

    fn decode(&self, out: &mut [f32]) {
        decode(self.d, self.scales().map(|s| s as i8 - 32), &self.codes(), 4, out);
    }

    fn encode(x: &[f32], importance: Option<Importance<'_>>) -> Self {
        let mut codes = [0u8; 256];
        let (mut scales, mut group_weights) = ([0.0f32; 16], [0.0f32; 16]);
        let mean_square = 2.0 * sum_of_squares(x) / 256.0;
        for (j, (x, codes)) in x.chunks_exact(16).zip(codes.chunks_exact_mut(16)).enumerate().take(16) {
            scales[j] = match importance.and_then(|i| i.weights.chunks_exact(16).nth(j)) {
                Some(importance) => {
                    let mut weights = [0.0; 16];
                    damped_weights(importance, x, mean_square, &mut weights);
                    group_weights[j] = weights.iter().fold(0.0, |sum, w| sum + w);
                    fit_symmetric(x, &weights, 4, codes)
                }
                None => fit_symmetric_greedy(x, 4, codes),
            };
        }
        let mut integers = [0u8; 16];
        let d = match importance {
            Some(_) => F16::new(fit_symmetric(&scales, &group_weights, 32, &mut integers)),
            None => {
                let max = peak(&scales);
                if max != 0.0 {
                    let inverse = -32.0 / max;
                    for (integer, scale) in integers.iter_mut().zip(scales) {
                        *integer = (nearest(inverse * scale).clamp(-32, 31) + 32) as u8;
                    }
                    F16::new(1.0 / inverse)
                } else {
                    F16::default()
                }
            }
        };
        round_again(x, d, integers.map(|s| s as i8 - 32), 4, &mut codes);
        let mut block = BlockQ3K { hmask: [0; 32], qs: [0; 64], packed_scales: [0; 12], d };
        pack(&integers, 4, 8, 0, &mut block.packed_scales[..8]);
        pack(&integers, 2, 4, 4, &mut block.packed_scales[8..]);
        pack(&codes, 2, 32, 0, &mut block.qs);
        pack(&codes, 1, 32, 2, &mut block.hmask);
        block
    }

    fn is_finite(&self) -> bool {
        self.d.get().is_finite()
    }
}

impl Block for BlockQ6K {
    const DTYPE: DType = DType::Q6_K;
    const LARGEST: f32 = F16::MAX * 128.0 * 32.0;

    fn decode(&self, out: &mut [f32]) {
        decode(self.d, self.scales, &self.codes(), 32, out);
    }

    fn encode(x: &[f32], importance: Option<Importance<'_>>) -> Self {
        let mut block = BlockQ6K { ql: [0; 128], qh: [0; 64], scales: [0; 16], d: F16::default() };
        let mut codes = [0u8; 256];
        let mut scales = [0.0f32; 16];
        for (j, (x, codes)) in x.chunks_exact(16).zip(codes.chunks_exact_mut(16)).enumerate().take(16) {
            scales[j] = match importance.and_then(|i| i.weights.chunks_exact(16).nth(j)) {
                Some(importance) => fit_symmetric(x, importance, 32, codes),
                None => {
                    let mut weights = [0.0; 16];
                    weights.iter_mut().zip(x).for_each(|(w, x)| *w = x * x);
                    fit_symmetric(x, &weights, 32, codes)
                }
            };
        }
        let max = peak(&scales);
        if max.abs() < SMALLEST_PEAK {
            return block;
        }
        let inverse = -128.0 / max;
        block.d = F16::new(1.0 / inverse);
        for (integer, scale) in block.scales.iter_mut().zip(scales) {
            *integer = nearest(inverse * scale).clamp(-128, 127) as i8;
        }
        round_again(x, block.d, block.scales, 32, &mut codes);
        pack(&codes, 4, 64, 0, &mut block.ql);
        pack(&codes, 2, 32, 4, &mut block.qh);
        block
    }

    fn is_finite(&self) -> bool {
        self.d.get().is_finite()
    }
}

impl Block for BlockQ8K {
    const DTYPE: DType = DType::Q8_K;

    fn decode(&self, out: &mut [f32]) {
        let d = self.d.get();
        for (v, &code) in out.iter_mut().zip(&self.qs) {
            *v = d * f32::from(code);
        }
    }

    fn encode(x: &[f32], _: Option<Importance<'_>>) -> Self {
        let mut block = BlockQ8K { d: F32::default(), qs: [0; 256], bsums: [[0; 2]; 16] };
        let peak = peak(x);
        if peak == 0.0 {
            return block;
        }
        let inverse = -127.0 / peak;
        block.d = F32::new(1.0 / inverse);
        for (code, v) in block.qs.iter_mut().zip(x) {
            *code = nearest(inverse * v).clamp(-128, 127) as i8;
        }
        for (sum, codes) in block.bsums.iter_mut().zip(block.qs.chunks_exact(16)) {
            *sum = codes.iter().map(|&c| i16::from(c)).sum::<i16>().to_le_bytes();
        }
        block
    }

    fn is_finite(&self) -> bool {
        self.d.get().is_finite()
    }
}

fn decode(d: F16, scales: [i8; 16], codes: &[u8; 256], half: i32, out: &mut [f32]) {
    let d = d.get();
    for ((out, codes), scale) in out.chunks_exact_mut(16).zip(codes.chunks_exact(16)).zip(scales) {
        let scale = d * f32::from(scale);
        for (v, &code) in out.iter_mut().zip(codes) {
            *v = scale * (i32::from(code) - half) as f32;
        }
    }
}

/// Rounds the values again to what the integer scales leave of the fitted ones; groups of scale zero keep their codes.
fn round_again(x: &[f32], d: F16, scales: [i8; 16], half: i32, codes: &mut [u8; 256]) {
    let d = d.get();
    for ((x, codes), scale) in x.chunks_exact(16).zip(codes.chunks_exact_mut(16)).zip(scales) {
        let scale = d * f32::from(scale);
        if scale == 0.0 {
            continue;
        }
        for (code, v) in codes.iter_mut().zip(x) {
            *code = (nearest(v / scale).clamp(-half, half - 1) + half) as u8;
        }
    }
}
