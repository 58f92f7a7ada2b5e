//! `MXFP4`, the 4-bit floats of the OCP Microscaling formats (version 1.0): 32 values of sign, two exponent bits and one
//! mantissa bit (E2M1) share a power of two (E8M0). Values are kept doubled, as integers, and the scale halved:
//! value = `2^(e − 128) · table[code]`. Element `j` is the low nibble of byte `j`, element `j + 16` the high one.

use super::DType;
use super::block::{Block, Importance, block_struct, pack, unpack};
use super::search::peak;

/// Twice what the sixteen E2M1 codes stand for.
pub const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

block_struct! {
    /// 32 four-bit floats under a power of two.
    BlockMxfp4: MXFP4 {
        /// Exponent of the scale, biased by 127.
        e: u8,
        /// Nibbles: elements 0–15 low, 16–31 high.
        qs: [u8; 16],
    }
}

impl BlockMxfp4 {
    /// The codes in element order, 0–15.
    pub fn codes(&self) -> [u8; 32] {
        let mut codes = [0; 32];
        unpack(&self.qs, 4, 16, 0, &mut codes);
        codes
    }

    /// Half the block's scale, `2^(e − 128)`: what [`MXFP4_VALUES`] are multiplied with.
    pub fn half_scale(&self) -> f32 {
        // 2^-128 and 2^-127 are subnormal: a single mantissa bit.
        let bits = if self.e < 2 { 0x0020_0000 << self.e } else { u32::from(self.e - 1) << 23 };
        f32::from_bits(bits)
    }
}

impl Block for BlockMxfp4 {
    const DTYPE: DType = DType::MXFP4;

    fn decode(&self, out: &mut [f32]) {
        let scale = self.half_scale();
        for (v, code) in out.iter_mut().zip(self.codes()) {
            *v = table(code) * scale;
        }
    }

    fn encode(x: &[f32], _: Option<Importance<'_>>) -> Self {
        // The biased exponent of the peak is that of its power of two; 2 is the largest exponent of an E2M1 value.
        let exponent = (peak(x).abs().to_bits() >> 23) as u8;
        let mut block = BlockMxfp4 { e: exponent.saturating_sub(2), qs: [0; 16] };
        let scale = block.half_scale();
        let mut codes = [0u8; 32];
        for (code, &v) in codes.iter_mut().zip(x) {
            let distance = |code: u8| (table(code) * scale - v).abs();
            *code = (1..16).fold(0, |best, code| if distance(code) < distance(best) { code } else { best });
        }
        pack(&codes, 4, 16, 0, &mut block.qs);
        block
    }

    fn is_finite(&self) -> bool {
        self.e < 255
    }
}

fn table(code: u8) -> f32 {
    f32::from(MXFP4_VALUES[usize::from(code & 15)])
}
