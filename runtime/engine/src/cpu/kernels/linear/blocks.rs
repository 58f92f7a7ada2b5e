//! Every quantized block format in one common form, in plain Rust: the specification that the SIMD unpackers are
//! tested against.
//!
//! Rows are read in units of 256 values: one block of a K-quant, or eight consecutive blocks of a 32-value format (the
//! last unit of a row may have fewer). A unit is eight groups of 32 values `w = d·q + m`, where `q` is a byte (unsigned
//! for most types, signed for Q8_0, Q8_K and the IQ4 types) and `d`, `m` hold for 32 or, in Q2_K, Q3_K and Q6_K, for 16
//! values. A format with a zero point has it in `m` (Q4_0: `m = −8·d`): the product with an activation group is then
//! `d·dₓ·Σ q·qₓ + m·sₓ` for every type.

use crate::quant::DType;
use half::f16;

/// Groups of 32 in a unit.
pub(super) const UNIT: usize = 8;

/// How a type looks in the common form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    /// Bytes from one unit of eight groups to the next.
    pub unit_bytes: usize,
    /// Scales hold for 16 values instead of 32.
    pub halves: bool,
    /// `q` is an `i8`.
    pub signed: bool,
}

/// The common form of a quantized type; `None` for dense types.
pub(super) const fn form(dtype: DType) -> Option<Form> {
    use DType::*;
    let (halves, signed) = match dtype {
        Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q4_K | Q5_K | MXFP4 => (false, false),
        Q2_K | Q3_K | Q6_K => (true, false),
        Q8_0 | Q8_K | IQ4_NL | IQ4_XS => (false, true),
        _ => return None,
    };
    Some(Form { unit_bytes: 256 / dtype.block_len() * dtype.block_bytes(), halves, signed })
}

/// One unit: `q[32·g + i]`, and scale and minimum of the 16 halves (equal in pairs for 32-wide types). Groups past the
/// end of the row are zero.
pub(super) struct Unit {
    pub q: [u8; 256],
    pub d: [f32; 16],
    pub m: [f32; 16],
}

/// The values of IQ4_NL's and IQ4_XS's sixteen codes.
pub(super) use crate::quant::IQ4_VALUES as IQ4;

/// Twice the values of MXFP4's sixteen codes (E2M1), plus 12 to make them unsigned.
pub(super) const MXFP4_PLUS_12: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// 2^(e − 128): half the value of an E8M0 scale, as the values above are doubled.
pub(super) fn e8m0_half(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 })
}

pub(super) fn le16(b: &[u8]) -> u16 {
    u16::from_le_bytes([b[0], b[1]])
}

pub(super) fn le32(b: &[u8]) -> u32 {
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

fn half(b: &[u8]) -> f32 {
    f16::from_bits(le16(b)).to_f32()
}

/// The eight 6-bit scales and eight 6-bit minima of Q4_K and Q5_K, as little-endian bytes of two words.
pub(super) fn scales_6bit(b: &[u8]) -> (u64, u64) {
    let (x, y, z) = (le32(b), le32(&b[4..]), le32(&b[8..]));
    let low = |v: u32| u64::from(v & 0x3f3f_3f3f);
    let high = |nibbles: u32, top: u32| u64::from((nibbles & 0x0f0f_0f0f) | ((top >> 2) & 0x3030_3030)) << 32;
    (low(x) | high(z, x), low(y) | high(z >> 4, y))
}

/// The sixteen 6-bit scales of Q3_K, before 32 is taken off.
pub(super) fn scales_q3k(b: &[u8]) -> [u8; 16] {
    let (x, y, top) = (le32(b), le32(&b[4..]), le32(&b[8..]));
    let word = |nibbles: u32, top: u32| (nibbles & 0x0f0f_0f0f) | ((top & 0x0303_0303) << 4);
    let words = [word(x, top), word(y, top >> 2), word(x >> 4, top >> 4), word(y >> 4, top >> 6)];
    let mut scales = [0; 16];
    for (s, w) in scales.chunks_exact_mut(4).zip(words) {
        s.copy_from_slice(&w.to_le_bytes());
    }
    scales
}

/// Reads the unit that starts at `b[0]`, of `groups` (1 to 8) groups.
pub(super) fn unit(dtype: DType, b: &[u8], groups: usize) -> Unit {
    let mut u = Unit { q: [0; 256], d: [0.0; 16], m: [0.0; 16] };
    let bytes = dtype.block_bytes();
    match dtype.block_len() {
        32 => {
            for (g, b) in b.chunks_exact(bytes).take(groups).enumerate() {
                let q = &mut u.q[32 * g..32 * g + 32];
                let (d, m) = small(dtype, b, q);
                (u.d[2 * g], u.d[2 * g + 1]) = (d, d);
                (u.m[2 * g], u.m[2 * g + 1]) = (m, m);
            }
        }
        256 => large(dtype, &b[..bytes], &mut u),
        _ => unreachable!("{dtype} has no blocks"),
    }
    u
}

/// One block of 32 values: fills `q`, gives scale and minimum.
fn small(dtype: DType, b: &[u8], q: &mut [u8]) -> (f32, f32) {
    let nibbles = |q: &mut [u8], from: &[u8], code: &dyn Fn(u8) -> u8| {
        for (i, b) in from[..16].iter().enumerate() {
            q[i] = code(b & 15);
            q[i + 16] = code(b >> 4);
        }
    };
    let fifth =
        |q: &mut [u8], bits: u32| q.iter_mut().enumerate().for_each(|(i, q)| *q |= (((bits >> i) & 1) as u8) << 4);
    let same = |v| v;
    match dtype {
        DType::Q4_0 => {
            nibbles(q, &b[2..], &same);
            (half(b), -8.0 * half(b))
        }
        DType::Q4_1 => {
            nibbles(q, &b[4..], &same);
            (half(b), half(&b[2..]))
        }
        DType::Q5_0 => {
            nibbles(q, &b[6..], &same);
            fifth(q, le32(&b[2..]));
            (half(b), -16.0 * half(b))
        }
        DType::Q5_1 => {
            nibbles(q, &b[8..], &same);
            fifth(q, le32(&b[4..]));
            (half(b), half(&b[2..]))
        }
        DType::Q8_0 => {
            q.copy_from_slice(&b[2..34]);
            (half(b), 0.0)
        }
        DType::IQ4_NL => {
            nibbles(q, &b[2..], &|v| IQ4[usize::from(v)] as u8);
            (half(b), 0.0)
        }
        DType::MXFP4 => {
            nibbles(q, &b[1..], &|v| MXFP4_PLUS_12[usize::from(v)]);
            (e8m0_half(b[0]), -12.0 * e8m0_half(b[0]))
        }
        _ => unreachable!("{dtype} has no blocks of 32"),
    }
}

/// One block of 256 values.
fn large(dtype: DType, b: &[u8], u: &mut Unit) {
    let each = |u: &mut Unit, f: &dyn Fn(usize, usize) -> u8| {
        for g in 0..UNIT {
            for i in 0..32 {
                u.q[32 * g + i] = f(g, i);
            }
        }
    };
    match dtype {
        DType::Q2_K => {
            let (scales, qs, d, dmin) = (&b[..16], &b[16..80], half(&b[80..]), half(&b[82..]));
            each(u, &|g, i| (qs[32 * (g / 4) + i] >> (2 * (g % 4))) & 3);
            for (h, s) in scales.iter().enumerate() {
                u.d[h] = d * f32::from(s & 15);
                u.m[h] = -dmin * f32::from(s >> 4);
            }
        }
        DType::Q3_K => {
            let (high, qs, d) = (&b[..32], &b[32..96], half(&b[108..]));
            each(u, &|g, i| ((qs[32 * (g / 4) + i] >> (2 * (g % 4))) & 3) | (((high[i] >> g) & 1) << 2));
            for (h, s) in scales_q3k(&b[96..108]).into_iter().enumerate() {
                u.d[h] = d * (f32::from(s) - 32.0);
                u.m[h] = -4.0 * u.d[h];
            }
        }
        DType::Q4_K | DType::Q5_K => {
            let (d, dmin) = (half(b), half(&b[2..]));
            let five = dtype == DType::Q5_K;
            let (high, qs) = if five { (&b[16..48], &b[48..176]) } else { (&b[16..16], &b[16..144]) };
            each(u, &|g, i| {
                let fifth = if five { ((high[i] >> g) & 1) << 4 } else { 0 };
                ((qs[32 * (g / 2) + i] >> (4 * (g % 2))) & 15) | fifth
            });
            let (scales, mins) = scales_6bit(&b[4..16]);
            for h in 0..16 {
                u.d[h] = d * f32::from(scales.to_le_bytes()[h / 2]);
                u.m[h] = -dmin * f32::from(mins.to_le_bytes()[h / 2]);
            }
        }
        DType::Q6_K => {
            let (low, high, scales, d) = (&b[..128], &b[128..192], &b[192..208], half(&b[208..]));
            each(u, &|g, i| {
                let (half, g) = (g / 4, g % 4);
                let nibble = (low[64 * half + 32 * (g % 2) + i] >> (4 * (g / 2))) & 15;
                nibble | (((high[32 * half + i] >> (2 * g)) & 3) << 4)
            });
            for (h, s) in scales.iter().enumerate() {
                u.d[h] = d * f32::from(*s as i8);
                u.m[h] = -32.0 * u.d[h];
            }
        }
        DType::Q8_K => {
            u.q.copy_from_slice(&b[4..260]);
            u.d = [f32::from_bits(le32(b)); 16];
        }
        DType::IQ4_XS => {
            let (d, high, low, qs) = (half(b), le16(&b[2..]), &b[4..8], &b[8..136]);
            each(u, &|g, i| IQ4[usize::from((qs[16 * g + i % 16] >> (4 * (i / 16))) & 15)] as u8);
            for h in 0..16 {
                let g = h / 2;
                let scale = ((low[g / 2] >> (4 * (g % 2))) & 15) | ((((high >> (2 * g)) & 3) as u8) << 4);
                u.d[h] = d * (f32::from(scale) - 32.0);
            }
        }
        _ => unreachable!("{dtype} has no blocks of 256"),
    }
}
