//! The 4-bit types with a fixed table: codes index 16 values that are denser around zero, as weights are. `IQ4_NL` has 32
//! values under a half; `IQ4_XS` 256 values, whose eight groups of 32 have signed 6-bit scales under one half.
//!
//! `IQ4_NL`: value = `d · table[code]`; `IQ4_XS`: value = `d · (scale − 32) · table[code]`. Both put element `j` of a
//! group of 32 in the low nibble of byte `j` and element `j + 16` in the high one.

use super::DType;
use super::block::{Block, F16, Importance, block_struct, pack, unpack};
use super::search::{SMALLEST_PEAK, damped_weights, inverse, nearest, peak, sum_of_squares};

/// What the sixteen codes of `IQ4_NL` and `IQ4_XS` stand for.
pub const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

block_struct! {
    /// 32 values of the table under one scale.
    BlockIq4Nl: IQ4_NL {
        /// Scale.
        d: F16,
        /// Nibbles: elements 0–15 low, 16–31 high.
        qs: [u8; 16],
    }
}
block_struct! {
    /// 256 values of the table with eight scales.
    BlockIq4Xs: IQ4_XS {
        /// Scale of the scales.
        d: F16,
        /// Upper two bits of the scales: bits `2·g` and `2·g + 1` of this little-endian word.
        scales_h: [u8; 2],
        /// Lower four bits of the scales: group `2·i` in the low nibble of byte `i`, `2·i + 1` in the high one.
        scales_l: [u8; 4],
        /// Nibbles, 16 bytes per group of 32.
        qs: [u8; 128],
    }
}

impl BlockIq4Nl {
    /// The codes in element order, 0–15.
    pub fn codes(&self) -> [u8; 32] {
        let mut codes = [0; 32];
        unpack(&self.qs, 4, 16, 0, &mut codes);
        codes
    }
}

impl BlockIq4Xs {
    /// The codes in element order, 0–15.
    pub fn codes(&self) -> [u8; 256] {
        let mut codes = [0; 256];
        unpack(&self.qs, 4, 16, 0, &mut codes);
        codes
    }

    /// The scales of the eight groups, 0–63; 32 stands for zero.
    pub fn scales(&self) -> [u8; 8] {
        let mut scales = [0; 8];
        unpack(&self.scales_l, 4, 1, 0, &mut scales);
        unpack(&self.scales_h, 2, 1, 4, &mut scales);
        scales
    }
}

impl Block for BlockIq4Nl {
    const DTYPE: DType = DType::IQ4_NL;
    const LARGEST: f32 = F16::MAX * 127.0;

    fn decode(&self, out: &mut [f32]) {
        decode(self.d.get(), &self.codes(), out);
    }

    fn encode(x: &[f32], importance: Option<Importance<'_>>) -> Self {
        let d = fit(x, importance.map(|i| i.weights), 2.0 / 32.0 * sum_of_squares(x));
        let mut block = BlockIq4Nl { d: F16::new(d), qs: [0; 16] };
        let mut codes = [0u8; 32];
        nearest_codes(inverse(d), x, &mut codes);
        pack(&codes, 4, 16, 0, &mut block.qs);
        block
    }

    fn is_finite(&self) -> bool {
        self.d.get().is_finite()
    }
}

impl Block for BlockIq4Xs {
    const DTYPE: DType = DType::IQ4_XS;
    const LARGEST: f32 = F16::MAX * 32.0 * 127.0;

    fn decode(&self, out: &mut [f32]) {
        let d = self.d.get();
        let codes = self.codes();
        for ((out, codes), scale) in out.chunks_exact_mut(32).zip(codes.chunks_exact(32)).zip(self.scales()) {
            decode(d * (i32::from(scale) - 32) as f32, codes, out);
        }
    }

    fn encode(x: &[f32], importance: Option<Importance<'_>>) -> Self {
        let mean_square = 2.0 / 256.0 * sum_of_squares(x);
        let mut scales = [0.0f32; 8];
        for (j, (scale, x)) in scales.iter_mut().zip(x.chunks_exact(32)).enumerate() {
            let weights = importance.and_then(|i| i.weights.chunks_exact(32).nth(j));
            *scale = fit(x, weights, mean_square);
        }
        let d = -peak(&scales) / 32.0;
        let inverse_d = inverse(d);
        let mut block = BlockIq4Xs { d: F16::new(d), scales_h: [0; 2], scales_l: [0; 4], qs: [0; 128] };
        let mut codes = [0u8; 256];
        let mut integers = [0u8; 8];
        let groups = x.chunks_exact(32).zip(codes.chunks_exact_mut(32));
        for ((x, codes), (integer, scale)) in groups.zip(integers.iter_mut().zip(scales)) {
            let l = nearest(inverse_d * scale).clamp(-32, 31);
            nearest_codes(inverse(d * l as f32), x, codes);
            *integer = (l + 32) as u8;
        }
        pack(&integers, 4, 1, 0, &mut block.scales_l);
        pack(&integers, 2, 1, 4, &mut block.scales_h);
        pack(&codes, 4, 16, 0, &mut block.qs);
        block
    }

    fn is_finite(&self) -> bool {
        self.d.get().is_finite()
    }
}

fn decode(scale: f32, codes: &[u8], out: &mut [f32]) {
    for (v, &code) in out.iter_mut().zip(codes) {
        *v = scale * table(code);
    }
}

fn table(code: u8) -> f32 {
    f32::from(IQ4_VALUES[usize::from(code & 15)])
}

/// The code whose table value is nearest; the upper one of a tie.
fn nearest_code(v: f32) -> u8 {
    let above = IQ4_VALUES.partition_point(|&t| f32::from(t) <= v);
    match above {
        0 => 0,
        16.. => 15,
        _ => {
            let (low, high) = (f32::from(IQ4_VALUES[above - 1]), f32::from(IQ4_VALUES[above]));
            if v - low < high - v { above as u8 - 1 } else { above as u8 }
        }
    }
}

fn nearest_codes(inverse_scale: f32, x: &[f32], codes: &mut [u8]) {
    for (code, v) in codes.iter_mut().zip(x) {
        *code = nearest_code(inverse_scale * v);
    }
}

/// The scale of a group of 32: of 16 candidates around the peak's, the weighted least-squares fit of least error.
/// `mean_square` damps the weights of an importance matrix; without one a value weighs its square.
fn fit(x: &[f32], importance: Option<&[f32]>, mean_square: f32) -> f32 {
    let peak = peak(x);
    if peak.abs() < SMALLEST_PEAK {
        return 0.0;
    }
    let mut weights = [0.0f32; 32];
    match importance {
        Some(importance) => damped_weights(importance, x, mean_square, &mut weights),
        None => weights.iter_mut().zip(x).for_each(|(w, x)| *w = x * x),
    }
    let project = |inverse_scale: f32| {
        let (mut xq, mut qq) = (0.0f32, 0.0f32);
        for (&v, &w) in x.iter().zip(&weights) {
            let q = table(nearest_code(inverse_scale * v));
            xq += w * q * v;
            qq += w * q * q;
        }
        (xq, qq)
    };
    let lowest = f32::from(IQ4_VALUES[0]);
    let (xq, qq) = project(1.0 / (-peak / lowest));
    let mut scale = if qq > 0.0 { xq / qq } else { 0.0 };
    let mut best = scale * xq;
    for step in -7..=7i8 {
        let (xq, qq) = project((f32::from(step) + lowest) / peak);
        if qq > 0.0 && xq * xq > best * qq {
            scale = xq / qq;
            best = scale * xq;
        }
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_code_is_nearest() {
        for i in -1400..1400 {
            let v = i as f32 / 10.0;
            let found = (table(nearest_code(v)) - v).abs();
            let best = IQ4_VALUES.iter().map(|&t| (f32::from(t) - v).abs()).fold(f32::MAX, f32::min);
            assert_eq!(found, best, "{v}");
        }
        assert_eq!(nearest_code(-115.5), 1, "of a tie, the upper");
    }
}
