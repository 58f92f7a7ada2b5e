//! Unpacking on NEON: one [`Block`] per format gives a unit of 256 values (see [`blocks`](super::super::blocks)) as groups
//! of 32 bytes in natural order, and its scales and minima; `p` always points at a whole unit, or at `groups` blocks of one.
//!
//! Products are signed here, so a format with a zero point has it taken off its bytes: minima are left to those that store
//! them (Q4_1, Q5_1, Q2_K, Q4_K, Q5_K).

use super::super::blocks::{IQ4, MXFP4_PLUS_12, e8m0_half, scales_6bit, scales_q3k};
use crate::cpu::kernels::vector::neon::{load_f16, widen};
use std::arch::aarch64::*;

/// 32 values.
type Bytes = [uint8x16_t; 2];

/// Scales or minima of the eight groups, or of the sixteen halves, in order.
pub(crate) type Sixteen = [f32; 16];

/// A format in the common form.
pub(crate) trait Block {
    /// Bytes of a unit.
    const BYTES: usize;
    /// Scales hold for 16 values.
    const HALVES: bool = false;
    /// `w = d·q + m`; without it `w = d·q`.
    const MINIMA: bool = false;

    /// The values of group `g`.
    ///
    /// # Safety
    /// `p` points at a unit that has group `g`.
    unsafe fn group(p: *const u8, g: usize) -> [int8x16_t; 2];

    /// Writes the scales, and with `MINIMA` the minima: sixteen with `HALVES`, else eight; those from `groups` on are zero.
    ///
    /// # Safety
    /// As for `group`, for the first `groups` groups.
    unsafe fn scales(p: *const u8, groups: usize, d: &mut Sixteen, m: &mut Sixteen);
}

/// 32 bytes.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn load(p: *const u8) -> Bytes {
    // SAFETY: the callers' blocks hold 32 bytes at `p`.
    unsafe { [vld1q_u8(p), vld1q_u8(p.add(16))] }
}

/// 16 bytes to 32 nibbles: the low ones first.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn nibbles(p: *const u8) -> Bytes {
    // SAFETY: the callers' blocks hold 16 bytes at `p`.
    let both = unsafe { vld1q_u8(p) };
    [vandq_u8(both, vdupq_n_u8(15)), vshrq_n_u8::<4>(both)]
}

/// Bit `i` of the word at `p` as 16 in byte `i`.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn fifth(p: *const u8) -> Bytes {
    // SAFETY: the callers' blocks hold 4 bytes at `p`.
    let [a, b, c, d] = unsafe { p.cast::<[u8; 4]>().read_unaligned() };
    let bit = vcreate_u8(0x8040_2010_0804_0201);
    let bits = vcombine_u8(bit, bit);
    let set = |low, high| vandq_u8(vtstq_u8(vcombine_u8(vdup_n_u8(low), vdup_n_u8(high)), bits), vdupq_n_u8(16));
    [set(a, b), set(c, d)]
}

/// Every byte moved by `by` bits, to the left if positive, under `mask`.
#[target_feature(enable = "neon")]
#[inline]
fn moved(v: Bytes, by: i8, mask: u8) -> Bytes {
    v.map(|v| vandq_u8(vshlq_u8(v, vdupq_n_s8(by)), vdupq_n_u8(mask)))
}

/// Bits `shift ..` of every byte under `mask`.
#[target_feature(enable = "neon")]
#[inline]
fn field(v: Bytes, shift: usize, mask: u8) -> Bytes {
    moved(v, -(shift as i8), mask)
}

/// Bit `bit` of every byte as `1 << to`.
#[target_feature(enable = "neon")]
#[inline]
fn bit_to(v: Bytes, bit: usize, to: usize) -> Bytes {
    moved(v, to as i8 - bit as i8, 1 << to)
}

#[target_feature(enable = "neon")]
#[inline]
fn or(a: Bytes, b: Bytes) -> Bytes {
    [vorrq_u8(a[0], b[0]), vorrq_u8(a[1], b[1])]
}

/// The bytes less a zero point.
#[target_feature(enable = "neon")]
#[inline]
fn less(v: Bytes, zero: i8) -> [int8x16_t; 2] {
    v.map(|v| vsubq_s8(vreinterpretq_s8_u8(v), vdupq_n_s8(zero)))
}

#[target_feature(enable = "neon")]
#[inline]
fn signed(v: Bytes) -> [int8x16_t; 2] {
    v.map(|v| vreinterpretq_s8_u8(v))
}

/// A table of 16 bytes looked up by nibbles.
#[target_feature(enable = "neon")]
#[inline]
fn lookup(table: &[i8; 16], nibbles: Bytes) -> [int8x16_t; 2] {
    // SAFETY: the table is 16 bytes.
    let table = unsafe { vld1q_s8(table.as_ptr()) };
    nibbles.map(|n| vqtbl1q_s8(table, n))
}

/// The f16 at `p`.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn half(p: *const u8) -> f32 {
    // SAFETY: the callers' blocks hold 2 bytes at `p`.
    unsafe { vgetq_lane_f32::<0>(widen(vdup_n_u16(p.cast::<u16>().read_unaligned()))) }
}

/// The f16 at `p`, `p + STEP`, … of eight blocks, those from `n` on zero.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn halves<const STEP: usize>(p: *const u8, n: usize, to: &mut Sixteen) {
    let mut bits = [0u16; 8];
    for (i, bits) in bits.iter_mut().enumerate().take(n) {
        // SAFETY: the callers' units hold `n` blocks of `STEP` bytes at `p`.
        *bits = unsafe { p.add(i * STEP).cast::<u16>().read_unaligned() };
    }
    // SAFETY: eight values on both sides.
    unsafe {
        let [low, high] = load_f16(bits.as_ptr().cast());
        vst1q_f32(to.as_mut_ptr(), low);
        vst1q_f32(to.as_mut_ptr().add(4), high);
    }
}

/// Sixteen bytes, each times `by`.
#[inline(always)]
fn scaled(bytes: impl Iterator<Item = i8>, by: f32, to: &mut Sixteen) {
    to.iter_mut().zip(bytes).for_each(|(to, byte)| *to = f32::from(byte) * by);
}

/// Declares a format: its constants, `group(p, g)` and `scales(p, n, d, m)`.
macro_rules! block {
    ($(#[$doc:meta])* $name:ident, $bytes:expr $(, $flag:ident)*;
     |$p:ident, $g:ident| $group:expr; |$q:ident, $n:ident, $d:ident, $m:ident| $scales:expr) => {
        $(#[$doc])*
        pub(crate) struct $name;
        impl Block for $name {
            const BYTES: usize = $bytes;
            $(const $flag: bool = true;)*
            #[inline(always)]
            unsafe fn group($p: *const u8, $g: usize) -> [int8x16_t; 2] {
                // SAFETY: offsets within the unit, by the format's layout.
                unsafe { $group }
            }
            #[inline(always)]
            unsafe fn scales($q: *const u8, $n: usize, $d: &mut Sixteen, $m: &mut Sixteen) {
                let _ = (&$n, &$m);
                // SAFETY: offsets within the unit, by the format's layout.
                unsafe { $scales }
            }
        }
    };
}

block!(
    /// `d: f16, qs: [u8; 16]`.
    Q4_0, 8 * 18;
    |p, g| less(nibbles(p.add(18 * g + 2)), 8);
    |p, n, d, m| halves::<18>(p, n, d)
);
block!(
    /// `d: f16, m: f16, qs: [u8; 16]`.
    Q4_1, 8 * 20, MINIMA;
    |p, g| signed(nibbles(p.add(20 * g + 4)));
    |p, n, d, m| {
        halves::<20>(p, n, d);
        halves::<20>(p.add(2), n, m);
    }
);
block!(
    /// `d: f16, qh: u32, qs: [u8; 16]`.
    Q5_0, 8 * 22;
    |p, g| less(or(nibbles(p.add(22 * g + 6)), fifth(p.add(22 * g + 2))), 16);
    |p, n, d, m| halves::<22>(p, n, d)
);
block!(
    /// `d: f16, m: f16, qh: u32, qs: [u8; 16]`.
    Q5_1, 8 * 24, MINIMA;
    |p, g| signed(or(nibbles(p.add(24 * g + 8)), fifth(p.add(24 * g + 4))));
    |p, n, d, m| {
        halves::<24>(p, n, d);
        halves::<24>(p.add(2), n, m);
    }
);
block!(
    /// `d: f16, qs: [i8; 32]`.
    Q8_0, 8 * 34;
    |p, g| signed(load(p.add(34 * g + 2)));
    |p, n, d, m| halves::<34>(p, n, d)
);
block!(
    /// `d: f16, qs: [u8; 16]`, codes of a table.
    Iq4Nl, 8 * 18;
    |p, g| lookup(&IQ4, nibbles(p.add(18 * g + 2)));
    |p, n, d, m| halves::<18>(p, n, d)
);
block!(
    /// `e: u8, qs: [u8; 16]`, codes of a table.
    Mxfp4, 8 * 17;
    |p, g| lookup(&const { mxfp4() }, nibbles(p.add(17 * g + 1)));
    |p, n, d, m| for (i, d) in d[..8].iter_mut().enumerate() {
        *d = if i < n { e8m0_half(*p.add(17 * i)) } else { 0.0 };
    }
);
block!(
    /// `scales: [u8; 16], qs: [u8; 64], d: f16, dmin: f16`.
    Q2K, 84, HALVES, MINIMA;
    |p, g| signed(field(load(p.add(16 + 32 * (g / 4))), 2 * (g % 4), 3));
    |p, n, d, m| {
        let bytes = p.cast::<[u8; 16]>().read_unaligned();
        scaled(bytes.iter().map(|s| (s & 15) as i8), half(p.add(80)), d);
        scaled(bytes.iter().map(|s| (s >> 4) as i8), -half(p.add(82)), m);
    }
);
block!(
    /// `hmask: [u8; 32], qs: [u8; 64], scales: [u8; 12], d: f16`.
    Q3K, 110, HALVES;
    |p, g| less(or(field(load(p.add(32 + 32 * (g / 4))), 2 * (g % 4), 3), bit_to(load(p), g, 2)), 4);
    |p, n, d, m| {
        let bytes = scales_q3k(std::slice::from_raw_parts(p.add(96), 12));
        scaled(bytes.iter().map(|s| *s as i8 - 32), half(p.add(108)), d);
    }
);
block!(
    /// `d: f16, dmin: f16, scales: [u8; 12], qs: [u8; 128]`.
    Q4K, 144, MINIMA;
    |p, g| signed(field(load(p.add(16 + 32 * (g / 2))), 4 * (g % 2), 15));
    |p, n, d, m| six_bit(p, d, m)
);
block!(
    /// `d: f16, dmin: f16, scales: [u8; 12], qh: [u8; 32], qs: [u8; 128]`.
    Q5K, 176, MINIMA;
    |p, g| signed(or(field(load(p.add(48 + 32 * (g / 2))), 4 * (g % 2), 15), bit_to(load(p.add(16)), g, 4)));
    |p, n, d, m| six_bit(p, d, m)
);
block!(
    /// `ql: [u8; 128], qh: [u8; 64], scales: [i8; 16], d: f16`.
    Q6K, 210, HALVES;
    |p, g| {
        let (half, g) = (g / 4, g % 4);
        let low = field(load(p.add(64 * half + 32 * (g % 2))), 4 * (g / 2), 15);
        let high = moved(load(p.add(128 + 32 * half)), 4 - 2 * g as i8, 0x30);
        less(or(low, high), 32)
    };
    |p, n, d, m| {
        let bytes = p.add(192).cast::<[i8; 16]>().read_unaligned();
        scaled(bytes.into_iter(), half(p.add(208)), d);
    }
);
block!(
    /// `d: f32, qs: [i8; 256], sums: [i16; 16]`.
    Q8K, 292;
    |p, g| signed(load(p.add(4 + 32 * g)));
    |p, n, d, m| d.fill(p.cast::<f32>().read_unaligned())
);
block!(
    /// `d: f16, scales_h: u16, scales_l: [u8; 4], qs: [u8; 128]`.
    Iq4Xs, 136;
    |p, g| lookup(&IQ4, nibbles(p.add(8 + 16 * g)));
    |p, n, d, m| {
        // Group g: nibble g of the low word, two bits at 2·g of the high one.
        let low = p.add(4).cast::<u32>().read_unaligned();
        let high = u32::from(p.add(2).cast::<u16>().read_unaligned());
        let scale = |g: usize| (((low >> (4 * g)) & 15) | (((high >> (2 * g)) & 3) << 4)) as i8 - 32;
        scaled((0..8).map(scale), half(p), d);
    }
);

/// Twice the values of MXFP4's codes.
const fn mxfp4() -> [i8; 16] {
    let mut table = [0; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = MXFP4_PLUS_12[i] as i8 - 12;
        i += 1;
    }
    table
}

/// Scales and minima of Q4_K and Q5_K.
#[inline(always)]
unsafe fn six_bit(p: *const u8, d: &mut Sixteen, m: &mut Sixteen) {
    // SAFETY: both formats begin with `d: f16, dmin: f16, scales: [u8; 12]`.
    unsafe {
        let (scales, mins) = scales_6bit(std::slice::from_raw_parts(p.add(4), 12));
        scaled(scales.to_le_bytes().into_iter().map(|s| s as i8), half(p), d);
        scaled(mins.to_le_bytes().into_iter().map(|s| s as i8), -half(p.add(2)), m);
    }
}
