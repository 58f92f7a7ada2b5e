// Sixteen consecutive weights of a row, unpacked: `unpack_TYPE(row, k)` with the byte address of the row in `weights` and
// the index of the first, a multiple of 16. The layouts are those of `quant`.

// Four bytes at any address; no branch, so that all of a unit's words are asked for at once.
fn word(at: u32) -> u32 {
    let shift = (at & 3u) * 8u;
    return (weights[at >> 2u] >> shift) | ((weights[(at >> 2u) + 1u] << 1u) << (31u - shift));
}

fn byte(at: u32) -> u32 { return (weights[at >> 2u] >> ((at & 3u) * 8u)) & 0xffu; }

// A half-precision number at an even address.
fn half(at: u32) -> f32 { return unpack2x16float(weights[at >> 2u] >> ((at & 2u) * 8u)).x; }

fn signed_byte(at: u32) -> f32 { return f32(i32(byte(at) << 24u) >> 24u); }

// The four bytes as numbers.
fn bytes(w: u32) -> vec4<f32> { return vec4<f32>(unpack4xU8(w)); }

// Bits 0–3 as the lowest bits of four bytes.
fn spread(bits: u32) -> u32 { return ((bits & 15u) * 0x00204081u) & 0x01010101u; }

// What is left of four words of codes.
fn unit(a: u32, b: u32, c: u32, d: u32, scale: f32, offset: f32) -> Unit {
    return Unit(bytes(a) * scale + offset, bytes(b) * scale + offset, bytes(c) * scale + offset, bytes(d) * scale + offset);
}

// `size` is the bytes of 16 codes' word: nibbles at `at`, shifted.
fn nibble_unit(at: u32, shift: u32, scale: f32, offset: f32) -> Unit {
    const M = 0x0f0f0f0fu;
    return unit((word(at) >> shift) & M, (word(at + 4u) >> shift) & M, (word(at + 8u) >> shift) & M,
        (word(at + 12u) >> shift) & M, scale, offset);
}

// As `nibble_unit`, with fifth bits: those of the sixteen codes are the lowest sixteen of `high`.
fn five_bit_unit(at: u32, shift: u32, high: u32, scale: f32, offset: f32) -> Unit {
    const M = 0x0f0f0f0fu;
    return unit(((word(at) >> shift) & M) | (spread(high) << 4u), ((word(at + 4u) >> shift) & M) | (spread(high >> 4u) << 4u),
        ((word(at + 8u) >> shift) & M) | (spread(high >> 8u) << 4u),
        ((word(at + 12u) >> shift) & M) | (spread(high >> 12u) << 4u), scale, offset);
}

fn unpack_f32(row: u32, k: u32) -> Unit {
    let i = (row >> 2u) + k;
    return Unit(vec4(bitcast<f32>(weights[i]), bitcast<f32>(weights[i + 1u]), bitcast<f32>(weights[i + 2u]), bitcast<f32>(weights[i + 3u])),
        vec4(bitcast<f32>(weights[i + 4u]), bitcast<f32>(weights[i + 5u]), bitcast<f32>(weights[i + 6u]), bitcast<f32>(weights[i + 7u])),
        vec4(bitcast<f32>(weights[i + 8u]), bitcast<f32>(weights[i + 9u]), bitcast<f32>(weights[i + 10u]), bitcast<f32>(weights[i + 11u])),
        vec4(bitcast<f32>(weights[i + 12u]), bitcast<f32>(weights[i + 13u]), bitcast<f32>(weights[i + 14u]), bitcast<f32>(weights[i + 15u])));
}

fn halves(at: u32) -> vec4<f32> { return vec4(unpack2x16float(word(at)), unpack2x16float(word(at + 4u))); }

fn unpack_f16(row: u32, k: u32) -> Unit {
    let at = row + k * 2u;
    return Unit(halves(at), halves(at + 8u), halves(at + 16u), halves(at + 24u));
}

fn brain_floats(at: u32) -> vec4<f32> {
    let a = word(at);
    let b = word(at + 4u);
    return bitcast<vec4<f32>>(vec4(a << 16u, a & 0xffff0000u, b << 16u, b & 0xffff0000u));
}

fn unpack_bf16(row: u32, k: u32) -> Unit {
    let at = row + k * 2u;
    return Unit(brain_floats(at), brain_floats(at + 8u), brain_floats(at + 16u), brain_floats(at + 24u));
}

fn unpack_q4_0(row: u32, k: u32) -> Unit {
    let at = row + (k >> 5u) * 18u;
    let d = half(at);
    return nibble_unit(at + 2u, (k & 16u) >> 2u, d, -8.0 * d);
}

fn unpack_q4_1(row: u32, k: u32) -> Unit {
    let at = row + (k >> 5u) * 20u;
    return nibble_unit(at + 4u, (k & 16u) >> 2u, half(at), half(at + 2u));
}

fn unpack_q5_0(row: u32, k: u32) -> Unit {
    let at = row + (k >> 5u) * 22u;
    let d = half(at);
    return five_bit_unit(at + 6u, (k & 16u) >> 2u, word(at + 2u) >> (k & 16u), d, -16.0 * d);
}

fn unpack_q5_1(row: u32, k: u32) -> Unit {
    let at = row + (k >> 5u) * 24u;
    return five_bit_unit(at + 8u, (k & 16u) >> 2u, word(at + 4u) >> (k & 16u), half(at), half(at + 2u));
}

fn signed_unit(at: u32, d: f32) -> Unit {
    return Unit(vec4<f32>(unpack4xI8(word(at))) * d, vec4<f32>(unpack4xI8(word(at + 4u))) * d,
        vec4<f32>(unpack4xI8(word(at + 8u))) * d, vec4<f32>(unpack4xI8(word(at + 12u))) * d);
}

fn unpack_q8_0(row: u32, k: u32) -> Unit {
    let at = row + (k >> 5u) * 34u;
    return signed_unit(at + 2u + (k & 16u), half(at));
}

fn unpack_q8_k(row: u32, k: u32) -> Unit {
    let at = row + (k >> 8u) * 292u;
    return signed_unit(at + 4u + (k & 255u), bitcast<f32>(weights[at >> 2u]));
}

fn unpack_q2_k(row: u32, k: u32) -> Unit {
    let at = row + (k >> 8u) * 84u;
    let u = (k >> 4u) & 15u;
    let s = byte(at + u);
    let q = at + 16u + (u >> 3u) * 32u + (u & 1u) * 16u;
    let shift = u & 6u;
    const M = 0x03030303u;
    return unit((word(q) >> shift) & M, (word(q + 4u) >> shift) & M, (word(q + 8u) >> shift) & M,
        (word(q + 12u) >> shift) & M, half(at + 80u) * f32(s & 15u), -half(at + 82u) * f32(s >> 4u));
}

fn unpack_q3_k(row: u32, k: u32) -> Unit {
    let at = row + (k >> 8u) * 110u;
    let u = (k >> 4u) & 15u;
    let s = ((byte(at + 96u + (u & 7u)) >> ((u >> 3u) * 4u)) & 15u) | (((byte(at + 104u + (u & 3u)) >> ((u >> 2u) * 2u)) & 3u) << 4u);
    let d = half(at + 108u) * (f32(s) - 32.0);
    let q = at + 32u + (u >> 3u) * 32u + (u & 1u) * 16u;
    let h = at + (u & 1u) * 16u;
    let shift = u & 6u;
    let bit = u >> 1u;
    const M = 0x03030303u;
    const B = 0x01010101u;
    return unit(((word(q) >> shift) & M) | (((word(h) >> bit) & B) << 2u),
        ((word(q + 4u) >> shift) & M) | (((word(h + 4u) >> bit) & B) << 2u),
        ((word(q + 8u) >> shift) & M) | (((word(h + 8u) >> bit) & B) << 2u),
        ((word(q + 12u) >> shift) & M) | (((word(h + 12u) >> bit) & B) << 2u), d, -4.0 * d);
}

// Scale and minimum of group `j` of Q4_K and Q5_K; `at` is the block.
fn k_scale(at: u32, j: u32) -> vec2<f32> {
    let s = at + 4u;
    var scale = byte(s + j) & 63u;
    var low = byte(s + j + 4u) & 63u;
    if j >= 4u {
        let n = byte(s + j + 4u);
        scale = (n & 15u) | ((byte(s + j - 4u) >> 6u) << 4u);
        low = (n >> 4u) | ((byte(s + j) >> 6u) << 4u);
    }
    return vec2(half(at) * f32(scale), -half(at + 2u) * f32(low));
}

fn unpack_q4_k(row: u32, k: u32) -> Unit {
    let at = row + (k >> 8u) * 144u;
    let u = (k >> 4u) & 15u;
    let s = k_scale(at, u >> 1u);
    return nibble_unit(at + 16u + (u >> 2u) * 32u + (u & 1u) * 16u, (u & 2u) * 2u, s.x, s.y);
}

fn unpack_q5_k(row: u32, k: u32) -> Unit {
    let at = row + (k >> 8u) * 176u;
    let u = (k >> 4u) & 15u;
    let s = k_scale(at, u >> 1u);
    let q = at + 48u + (u >> 2u) * 32u + (u & 1u) * 16u;
    let h = at + 16u + (u & 1u) * 16u;
    let shift = (u & 2u) * 2u;
    let bit = u >> 1u;
    const M = 0x0f0f0f0fu;
    const B = 0x01010101u;
    return unit(((word(q) >> shift) & M) | (((word(h) >> bit) & B) << 4u),
        ((word(q + 4u) >> shift) & M) | (((word(h + 4u) >> bit) & B) << 4u),
        ((word(q + 8u) >> shift) & M) | (((word(h + 8u) >> bit) & B) << 4u),
        ((word(q + 12u) >> shift) & M) | (((word(h + 12u) >> bit) & B) << 4u), s.x, s.y);
}

fn unpack_q6_k(row: u32, k: u32) -> Unit {
    let at = row + (k >> 8u) * 210u;
    let u = (k >> 4u) & 15u;
    let d = half(at + 208u) * signed_byte(at + 192u + u);
    let q = at + (u >> 3u) * 64u + (u & 3u) * 16u;
    let h = at + 128u + (u >> 3u) * 32u + (u & 1u) * 16u;
    let shift = u & 4u;
    let bits = u & 6u;
    const M = 0x0f0f0f0fu;
    const B = 0x03030303u;
    return unit(((word(q) >> shift) & M) | (((word(h) >> bits) & B) << 4u),
        ((word(q + 4u) >> shift) & M) | (((word(h + 4u) >> bits) & B) << 4u),
        ((word(q + 8u) >> shift) & M) | (((word(h + 8u) >> bits) & B) << 4u),
        ((word(q + 12u) >> shift) & M) | (((word(h + 12u) >> bits) & B) << 4u), d, -32.0 * d);
}

// A table of sixteen signed bytes at the four nibbles of `w`, which have a byte each.
fn look_up(table: vec4<u32>, w: u32) -> vec4<f32> {
    let i = unpack4xU8(w);
    let t = vec4(table[i.x >> 2u], table[i.y >> 2u], table[i.z >> 2u], table[i.w >> 2u]);
    return vec4<f32>(vec4<i32>(t << (vec4(24u) - (i & vec4(3u)) * 8u)) >> vec4(24u));
}

fn table_unit(table: vec4<u32>, at: u32, shift: u32, d: f32) -> Unit {
    const M = 0x0f0f0f0fu;
    return Unit(look_up(table, (word(at) >> shift) & M) * d, look_up(table, (word(at + 4u) >> shift) & M) * d,
        look_up(table, (word(at + 8u) >> shift) & M) * d, look_up(table, (word(at + 12u) >> shift) & M) * d);
}

// -127 -104 -83 -65 | -49 -35 -22 -10 | 1 13 25 38 | 53 69 89 113
const IQ4 = vec4<u32>(0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u);
// 0 1 2 3 | 4 6 8 12 | 0 -1 -2 -3 | -4 -6 -8 -12
const MXFP4 = vec4<u32>(0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu);

fn unpack_iq4_nl(row: u32, k: u32) -> Unit {
    let at = row + (k >> 5u) * 18u;
    return table_unit(IQ4, at + 2u, (k & 16u) >> 2u, half(at));
}

fn unpack_iq4_xs(row: u32, k: u32) -> Unit {
    let at = row + (k >> 8u) * 136u;
    let g = (k >> 5u) & 7u;
    let low = (byte(at + 4u + (g >> 1u)) >> ((g & 1u) * 4u)) & 15u;
    let high = (word(at + 2u) >> (g * 2u)) & 3u;
    let d = half(at) * (f32(low | (high << 4u)) - 32.0);
    return table_unit(IQ4, at + 8u + g * 16u, (k & 16u) >> 2u, d);
}

fn unpack_mxfp4(row: u32, k: u32) -> Unit {
    let at = row + (k >> 5u) * 17u;
    let e = byte(at);
    let d = bitcast<f32>(select((e - 1u) << 23u, 0x00200000u << e, e < 2u));
    return table_unit(MXFP4, at + 1u, (k & 16u) >> 2u, d);
}
