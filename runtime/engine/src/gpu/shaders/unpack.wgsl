// Sixteen consecutive weights of a row, of the byte address of the row in `weights` and the index of the first, a multiple
// of 16: `codes_TYPE(row, k)` where they are whole numbers with a scale, else `unpack_TYPE(row, k)`. The layouts are those of
// `quant`.

// What is in a block: numbers of eight bits, signed or small enough to be, that stand for scale·q + offset.
struct Codes { q: vec4<u32>, scale: f32, offset: f32 }

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

// What codes of no sign stand for.
fn unit(c: Codes) -> Unit {
    return Unit(bytes(c.q.x) * c.scale + c.offset, bytes(c.q.y) * c.scale + c.offset,
        bytes(c.q.z) * c.scale + c.offset, bytes(c.q.w) * c.scale + c.offset);
}

// What signed codes, which have no offset, stand for.
fn signed_unit(c: Codes) -> Unit {
    return Unit(vec4<f32>(unpack4xI8(c.q.x)) * c.scale, vec4<f32>(unpack4xI8(c.q.y)) * c.scale,
        vec4<f32>(unpack4xI8(c.q.z)) * c.scale, vec4<f32>(unpack4xI8(c.q.w)) * c.scale);
}

fn words(at: u32) -> vec4<u32> { return vec4(word(at), word(at + 4u), word(at + 8u), word(at + 12u)); }

// Nibbles of the words at `at`, shifted.
fn nibbles(at: u32, shift: u32) -> vec4<u32> { return (words(at) >> vec4(shift)) & vec4(0x0f0f0f0fu); }

// Fifth bits of sixteen codes, the lowest sixteen of `high`.
fn fifth_bits(high: u32) -> vec4<u32> {
    return vec4(spread(high), spread(high >> 4u), spread(high >> 8u), spread(high >> 12u)) << vec4(4u);
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

fn codes_q4_0(row: u32, k: u32) -> Codes {
    let at = row + (k >> 5u) * 18u;
    let d = half(at);
    return Codes(nibbles(at + 2u, (k & 16u) >> 2u), d, -8.0 * d);
}

fn codes_q4_1(row: u32, k: u32) -> Codes {
    let at = row + (k >> 5u) * 20u;
    return Codes(nibbles(at + 4u, (k & 16u) >> 2u), half(at), half(at + 2u));
}

fn codes_q5_0(row: u32, k: u32) -> Codes {
    let at = row + (k >> 5u) * 22u;
    let d = half(at);
    return Codes(nibbles(at + 6u, (k & 16u) >> 2u) | fifth_bits(word(at + 2u) >> (k & 16u)), d, -16.0 * d);
}

fn codes_q5_1(row: u32, k: u32) -> Codes {
    let at = row + (k >> 5u) * 24u;
    let q = nibbles(at + 8u, (k & 16u) >> 2u) | fifth_bits(word(at + 4u) >> (k & 16u));
    return Codes(q, half(at), half(at + 2u));
}

fn codes_q8_0(row: u32, k: u32) -> Codes {
    let at = row + (k >> 5u) * 34u;
    return Codes(words(at + 2u + (k & 16u)), half(at), 0.0);
}

fn codes_q8_k(row: u32, k: u32) -> Codes {
    let at = row + (k >> 8u) * 292u;
    return Codes(words(at + 4u + (k & 255u)), bitcast<f32>(weights[at >> 2u]), 0.0);
}

fn codes_q2_k(row: u32, k: u32) -> Codes {
    let at = row + (k >> 8u) * 84u;
    let u = (k >> 4u) & 15u;
    let s = byte(at + u);
    let q = at + 16u + (u >> 3u) * 32u + (u & 1u) * 16u;
    return Codes((words(q) >> vec4(u & 6u)) & vec4(0x03030303u), half(at + 80u) * f32(s & 15u), -half(at + 82u) * f32(s >> 4u));
}

fn codes_q3_k(row: u32, k: u32) -> Codes {
    let at = row + (k >> 8u) * 110u;
    let u = (k >> 4u) & 15u;
    let s = ((byte(at + 96u + (u & 7u)) >> ((u >> 3u) * 4u)) & 15u) | (((byte(at + 104u + (u & 3u)) >> ((u >> 2u) * 2u)) & 3u) << 4u);
    let d = half(at + 108u) * (f32(s) - 32.0);
    let low = words(at + 32u + (u >> 3u) * 32u + (u & 1u) * 16u) >> vec4(u & 6u);
    let high = words(at + (u & 1u) * 16u) >> vec4(u >> 1u);
    return Codes((low & vec4(0x03030303u)) | ((high & vec4(0x01010101u)) << vec4(2u)), d, -4.0 * d);
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

fn codes_q4_k(row: u32, k: u32) -> Codes {
    let at = row + (k >> 8u) * 144u;
    let u = (k >> 4u) & 15u;
    let s = k_scale(at, u >> 1u);
    return Codes(nibbles(at + 16u + (u >> 2u) * 32u + (u & 1u) * 16u, (u & 2u) * 2u), s.x, s.y);
}

fn codes_q5_k(row: u32, k: u32) -> Codes {
    let at = row + (k >> 8u) * 176u;
    let u = (k >> 4u) & 15u;
    let s = k_scale(at, u >> 1u);
    let low = nibbles(at + 48u + (u >> 2u) * 32u + (u & 1u) * 16u, (u & 2u) * 2u);
    let high = (words(at + 16u + (u & 1u) * 16u) >> vec4(u >> 1u)) & vec4(0x01010101u);
    return Codes(low | (high << vec4(4u)), s.x, s.y);
}

fn codes_q6_k(row: u32, k: u32) -> Codes {
    let at = row + (k >> 8u) * 210u;
    let u = (k >> 4u) & 15u;
    let d = half(at + 208u) * signed_byte(at + 192u + u);
    let low = nibbles(at + (u >> 3u) * 64u + (u & 3u) * 16u, u & 4u);
    let high = (words(at + 128u + (u >> 3u) * 32u + (u & 1u) * 16u) >> vec4(u & 6u)) & vec4(0x03030303u);
    return Codes(low | (high << vec4(4u)), d, -32.0 * d);
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
