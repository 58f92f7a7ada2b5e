//! Moments in 8 bits: blocks of 256 values, each with its largest magnitude as the scale (Dettmers and others 2021,
//! arXiv:2110.02861, "8-bit optimizers via block-wise quantization").
//!
//! A code stands for one of 256 numbers in −1…1 ([`Code::Signed`], first moment) or 0…1 ([`Code::Unsigned`], second
//! moment). They are the paper's dynamic tree: seven decades from 10⁻⁶ to 1, each decade divided more finely the larger
//! it is, so that both a block's outliers and its many small values keep their relative precision. To them come 0 and 1.
//!
//! A second moment that is not zero never becomes code 0 here: it would, divided by, make a step of any size out of a
//! small first moment.

use std::sync::LazyLock;

/// Values with a common scale.
pub const BLOCK: usize = 256;

/// Which 256 numbers the codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// −1 to 1.
    Signed,
    /// 0 to 1.
    Unsigned,
}

/// The numbers of a code, and where one gives way to the next.
struct Table {
    values: [f32; 256],
    /// Number `i` stands for what lies above `limits[i − 1]` up to `limits[i]`.
    limits: [f32; 255],
    zero: u8,
}

static SIGNED: LazyLock<Table> = LazyLock::new(|| Table::new(true));
static UNSIGNED: LazyLock<Table> = LazyLock::new(|| Table::new(false));

impl Table {
    fn new(signed: bool) -> Table {
        let mut numbers = vec![0.0, 1.0];
        for decade in 0..7 {
            // The middles of 2^decade (signed) or 2^(decade + 1) equal parts of 0.1…1, scaled into the decade.
            let parts = if signed { 1 << decade } else { 2 << decade };
            let scale = 10f64.powi(decade - 6);
            for part in 0..parts {
                let middle = scale * (0.1 + 0.9 * (f64::from(part) + 0.5) / f64::from(parts));
                numbers.push(middle as f32);
                if signed {
                    numbers.push(-middle as f32);
                }
            }
        }
        numbers.sort_by(f32::total_cmp);
        let values: [f32; 256] = std::array::from_fn(|code| numbers[code]);
        let limits = std::array::from_fn(|code| 0.5 * (values[code] + values[code + 1]));
        let zero = numbers.iter().position(|&number| number == 0.0).unwrap_or(0) as u8;
        Table { values, limits, zero }
    }

    /// The code of the nearest number.
    fn nearest(&self, value: f32) -> u8 {
        self.limits.partition_point(|&limit| limit < value) as u8
    }
}

impl Code {
    fn table(self) -> &'static Table {
        match self {
            Code::Signed => &SIGNED,
            Code::Unsigned => &UNSIGNED,
        }
    }
}

/// A vector in 8 bits.
#[derive(Clone, Debug)]
pub struct Quantized {
    code: Code,
    codes: Vec<u8>,
    /// One for each block.
    scales: Vec<f32>,
}

impl Quantized {
    /// `len` zeros.
    pub fn zeros(code: Code, len: usize) -> Quantized {
        Quantized { code, codes: vec![code.table().zero; len], scales: vec![0.0; len.div_ceil(BLOCK)] }
    }

    /// From codes and one scale for each 256 of them.
    pub fn from_parts(code: Code, codes: Vec<u8>, scales: Vec<f32>) -> Quantized {
        Quantized { code, codes, scales }
    }

    /// The codes and the scales.
    pub fn parts(&self) -> (&[u8], &[f32]) {
        (&self.codes, &self.scales)
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.codes.len() + 4 * self.scales.len()
    }

    /// The values of block `block` to `out`, which has the block's length.
    pub fn read(&self, block: usize, out: &mut [f32]) {
        let (table, scale) = (self.code.table(), self.scales[block]);
        let codes = &self.codes[block * BLOCK..];
        out.iter_mut().zip(codes).for_each(|(out, &code)| *out = table.values[usize::from(code)] * scale);
    }

    /// Replaces block `block` by `values`, which has the block's length.
    pub fn write(&mut self, block: usize, values: &[f32]) {
        let table = self.code.table();
        let scale = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
        self.scales[block] = scale;
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let floor = match self.code {
            Code::Signed => 0,
            Code::Unsigned => table.zero + 1,
        };
        for (code, &value) in self.codes[block * BLOCK..].iter_mut().zip(values) {
            *code = if value == 0.0 { table.zero } else { table.nearest(value * inverse).max(floor) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    #[test]
    fn tables_are_those_of_the_paper() {
        for (table, zero) in [(&SIGNED, 127), (&UNSIGNED, 0)] {
            assert!(table.values.windows(2).all(|pair| pair[0] < pair[1]));
            assert_eq!((table.values[usize::from(table.zero)], table.values[255], table.zero), (0.0, 1.0, zero));
        }
        // The smallest decade is one part of 10⁻⁷…10⁻⁶, and signed codes are symmetric but for 1.
        assert!((SIGNED.values[128] - 0.55e-6).abs() < 1e-12 && (UNSIGNED.values[1] - 0.325e-6).abs() < 1e-12);
        assert!((1..128).all(|i| SIGNED.values[127 - i] == -SIGNED.values[127 + i]));
        // The largest decade has 64 parts of 0.1…1 (signed).
        assert!((SIGNED.values[254] - (1.0 - 0.9 / 128.0)).abs() < 1e-6);
    }

    #[test]
    fn every_number_is_its_own_nearest() {
        for code in [Code::Signed, Code::Unsigned] {
            let table = code.table();
            assert!((0..=255u8).all(|i| table.nearest(table.values[usize::from(i)]) == i));
            for index in 0..2000 {
                let value = 2.0 * uniform(3, index) as f32 - if code == Code::Signed { 1.0 } else { 0.0 };
                let got = (table.values[usize::from(table.nearest(value))] - value).abs();
                let least = table.values.iter().map(|number| (number - value).abs()).fold(f32::MAX, f32::min);
                assert_eq!(got, least);
            }
        }
    }

    #[test]
    fn blocks_keep_their_scale_and_the_tail_its_length() {
        let len = BLOCK + 44;
        let values: Vec<f32> =
            (0..len).map(|i| (2.0 * uniform(5, i as u64) as f32 - 1.0) * if i < BLOCK { 1e-3 } else { 1e3 }).collect();
        let mut quantized = Quantized::zeros(Code::Signed, len);
        let mut out = vec![1.0; len];
        quantized.read(1, &mut out[BLOCK..]);
        assert!(out[BLOCK..].iter().all(|&value| value == 0.0));
        for (block, part) in values.chunks(BLOCK).enumerate() {
            quantized.write(block, part);
            quantized.read(block, &mut out[block * BLOCK..block * BLOCK + part.len()]);
        }
        for (block, (wanted, got)) in values.chunks(BLOCK).zip(out.chunks(BLOCK)).enumerate() {
            let scale = if block == 0 { 1e-3 } else { 1e3 };
            // Half of a part of the largest decade.
            assert!(wanted.iter().zip(got).all(|(w, g)| (w - g).abs() <= 0.0072 * scale), "block {block}");
        }
        assert_eq!(quantized.bytes(), len + 8);
    }

    #[test]
    fn small_second_moments_do_not_vanish() {
        let mut quantized = Quantized::zeros(Code::Unsigned, 3);
        quantized.write(0, &[1.0, 1e-12, 0.0]);
        let mut out = [0.0; 3];
        quantized.read(0, &mut out);
        assert!(out[0] == 1.0 && out[1] > 0.0 && out[2] == 0.0, "{out:?}");
    }
}
