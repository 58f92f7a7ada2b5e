//! The legacy types: 32 values under one half-precision scale, without or with a minimum.
//!
//! | type | bytes | value |
//! | --- | --- | --- |
//! | `Q4_0` | d, 16 × 2 nibbles | `d · (code − 8)` |
//! | `Q4_1` | d, m, 16 × 2 nibbles | `d · code + m` |
//! | `Q5_0` | d, 32 fifth bits, 16 × 2 nibbles | `d · (code − 16)` |
//! | `Q5_1` | d, m, 32 fifth bits, 16 × 2 nibbles | `d · code + m` |
//! | `Q8_0` | d, 32 signed bytes | `d · code` |
//!
//! Nibble `j` low is element `j`, nibble `j` high is element `j + 16`; bit `j` of `qh` belongs to element `j`. Without an
//! importance matrix the peak (or the range) alone decides the scale; with one, the searches of the K-quants do.

use super::DType;
use super::block::{Block, F16, Importance, block_struct, pack, unpack};
use super::search::{Steps, damped_weights, fit_affine, fit_symmetric, inverse, peak};

block_struct! {
    /// 32 values of 4 bits around zero.
    BlockQ4_0: Q4_0 {
        /// Scale.
        d: F16,
        /// Nibbles: elements 0–15 low, 16–31 high.
        qs: [u8; 16],
    }
}
block_struct! {
    /// 32 values of 4 bits above a minimum.
    BlockQ4_1: Q4_1 {
        /// Scale.
        d: F16,
        /// Minimum.
        m: F16,
        /// Nibbles: elements 0–15 low, 16–31 high.
        qs: [u8; 16],
    }
}
block_struct! {
    /// 32 values of 5 bits around zero.
    BlockQ5_0: Q5_0 {
        /// Scale.
        d: F16,
        /// The fifth bits: bit `j` of this little-endian word belongs to element `j`.
        qh: [u8; 4],
        /// Lower four bits: elements 0–15 low, 16–31 high.
        qs: [u8; 16],
    }
}
block_struct! {
    /// 32 values of 5 bits above a minimum.
    BlockQ5_1: Q5_1 {
        /// Scale.
        d: F16,
        /// Minimum.
        m: F16,
        /// The fifth bits: bit `j` of this little-endian word belongs to element `j`.
        qh: [u8; 4],
        /// Lower four bits: elements 0–15 low, 16–31 high.
        qs: [u8; 16],
    }
}
block_struct! {
    /// 32 signed bytes.
    BlockQ8_0: Q8_0 {
        /// Scale.
        d: F16,
        /// Codes, in order.
        qs: [i8; 32],
    }
}

impl BlockQ4_0 {
    /// The codes in element order, 0–15.
    pub fn codes(&self) -> [u8; 32] {
        nibbles(&self.qs)
    }
}

impl BlockQ4_1 {
    /// The codes in element order, 0–15.
    pub fn codes(&self) -> [u8; 32] {
        nibbles(&self.qs)
    }
}

impl BlockQ5_0 {
    /// The codes in element order, 0–31.
    pub fn codes(&self) -> [u8; 32] {
        five_bits(&self.qs, &self.qh)
    }
}

impl BlockQ5_1 {
    /// The codes in element order, 0–31.
    pub fn codes(&self) -> [u8; 32] {
        five_bits(&self.qs, &self.qh)
    }
}

impl Block for BlockQ4_0 {
    const DTYPE: DType = DType::Q4_0;
    const LARGEST: f32 = F16::MAX * 8.0;

    fn decode(&self, out: &mut [f32]) {
        decode_symmetric(self.d, &self.codes(), 8, out);
    }

    fn encode(x: &[f32], importance: Option<Importance<'_>>) -> Self {
        let (d, codes) = encode_symmetric(x, 8, importance);
        BlockQ4_0 { d, qs: pack_nibbles(&codes) }
    }

    fn is_finite(&self) -> bool {
        self.d.get().is_finite()
    }
}

impl Block for BlockQ4_1 {
    const DTYPE: DType = DType::Q4_1;
    const LARGEST: f32 = F16::MAX * 15.0;

    fn decode(&self, out: &mut [f32]) {
        decode_affine(self.d, self.m, &self.codes(), out);
    }

    fn encode(x: &[f32], importance: Option<Importance<'_>>) -> Self {
        let (d, m, codes) = encode_affine(x, 15, importance);
        BlockQ4_1 { d, m, qs: pack_nibbles(&codes) }
    }

    fn is_finite(&self) -> bool {
        self.d.get().is_finite() && self.m.get().is_finite()
    }
}

impl Block for BlockQ5_0 {
    const DTYPE: DType = DType::Q5_0;
    const LARGEST: f32 = F16::MAX * 16.0;

    fn decode(&self, out: &mut [f32]) {
        decode_symmetric(self.d, &self.codes(), 16, out);
    }

    fn encode(x: &[f32], importance: Option<Importance<'_>>) -> Self {
        let (d, codes) = encode_symmetric(x, 16, importance);
        BlockQ5_0 { d, qh: pack_fifth_bits(&codes), qs: pack_nibbles(&codes) }
    }

    fn is_finite(&self) -> bool {
        self.d.get().is_finite()
    }
}

impl Block for BlockQ5_1 {
    const DTYPE: DType = DType::Q5_1;
    const LARGEST: f32 = F16::MAX * 31.0;

    fn decode(&self, out: &mut [f32]) {
        decode_affine(self.d, self.m, &self.codes(), out);
    }

    fn encode(x: &[f32], importance: Option<Importance<'_>>) -> Self {
        let (d, m, codes) = encode_affine(x, 31, importance);
        BlockQ5_1 { d, m, qh: pack_fifth_bits(&codes), qs: pack_nibbles(&codes) }
    }

    fn is_finite(&self) -> bool {
        self.d.get().is_finite() && self.m.get().is_finite()
    }
}

impl Block for BlockQ8_0 {
    const DTYPE: DType = DType::Q8_0;
    const LARGEST: f32 = F16::MAX * 127.0;

    fn decode(&self, out: &mut [f32]) {
        let d = self.d.get();
        for (v, &code) in out.iter_mut().zip(&self.qs) {
            *v = f32::from(code) * d;
        }
    }

    fn encode(x: &[f32], _: Option<Importance<'_>>) -> Self {
        let d = peak(x).abs() / 127.0;
        let inverse = inverse(d);
        let mut qs = [0i8; 32];
        for (code, v) in qs.iter_mut().zip(x) {
            *code = (v * inverse).round() as i8;
        }
        BlockQ8_0 { d: F16::new(d), qs }
    }

    fn is_finite(&self) -> bool {
        self.d.get().is_finite()
    }
}

fn nibbles(qs: &[u8; 16]) -> [u8; 32] {
    let mut codes = [0; 32];
    unpack(qs, 4, 16, 0, &mut codes);
    codes
}

fn five_bits(qs: &[u8; 16], qh: &[u8; 4]) -> [u8; 32] {
    let mut codes = nibbles(qs);
    unpack(qh, 1, 1, 4, &mut codes);
    codes
}

fn pack_nibbles(codes: &[u8; 32]) -> [u8; 16] {
    let mut qs = [0; 16];
    pack(codes, 4, 16, 0, &mut qs);
    qs
}

fn pack_fifth_bits(codes: &[u8; 32]) -> [u8; 4] {
    let mut qh = [0; 4];
    pack(codes, 1, 1, 4, &mut qh);
    qh
}

fn decode_symmetric(d: F16, codes: &[u8; 32], half: i32, out: &mut [f32]) {
    let d = d.get();
    for (v, &code) in out.iter_mut().zip(codes) {
        *v = (i32::from(code) - half) as f32 * d;
    }
}

fn decode_affine(d: F16, m: F16, codes: &[u8; 32], out: &mut [f32]) {
    let (d, m) = (d.get(), m.get());
    for (v, &code) in out.iter_mut().zip(codes) {
        *v = f32::from(code) * d + m;
    }
}

/// Maps the peak to code 0 (−half), so that the sign of the scale is the peak's opposite.
fn encode_symmetric(x: &[f32], half: u8, importance: Option<Importance<'_>>) -> (F16, [u8; 32]) {
    let mut codes = [0u8; 32];
    if let Some(importance) = importance {
        let mut weights = [0.0; 32];
        damped_weights(importance.weights, x, importance.row_mean_square, &mut weights);
        let d = fit_symmetric(x, &weights, i32::from(half), &mut codes);
        return (F16::new(d), codes);
    }
    let half = f32::from(half);
    let d = peak(x) / -half;
    let inverse = inverse(d);
    for (code, v) in codes.iter_mut().zip(x) {
        *code = (v * inverse + (half + 0.5)).clamp(0.0, 2.0 * half - 1.0) as u8;
    }
    (F16::new(d), codes)
}

/// Maps the least value to code 0 and the greatest to `levels`.
fn encode_affine(x: &[f32], levels: u8, importance: Option<Importance<'_>>) -> (F16, F16, [u8; 32]) {
    let mut codes = [0u8; 32];
    if let Some(importance) = importance {
        let mut weights = [0.0; 32];
        damped_weights(importance.weights, x, importance.row_mean_square, &mut weights);
        let (d, min) = fit_affine(x, &weights, i32::from(levels), Steps::IMPORTANCE, &mut codes);
        return (F16::new(d), F16::new(-min), codes);
    }
    let low = x.iter().copied().fold(f32::MAX, |low, v| if v < low { v } else { low });
    let high = x.iter().copied().fold(f32::MIN, |high, v| if v > high { v } else { high });
    let levels = f32::from(levels);
    let d = (high - low) / levels;
    let inverse = inverse(d);
    for (code, v) in codes.iter_mut().zip(x) {
        *code = ((v - low) * inverse + 0.5).clamp(0.0, levels) as u8;
    }
    (F16::new(d), F16::new(low), codes)
}
