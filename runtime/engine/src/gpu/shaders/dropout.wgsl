// `out = residual + mask ∘ x / (1 − rate)`: element i of a row takes 16 bits of number ⌊i/4⌋ of the row's part of a stream,
// as on the CPU (`cpu/kernels/dropout.rs`). The stream is the run's seed and the map's, the numbers are SplitMix64's.
struct Op { x: u32, width: u32, residual: u32, out: u32, rows: u32, stream_low: u32, stream_high: u32, threshold: u32, factor: f32, unused0: u32, unused1: u32, unused2: u32 }

// 64-bit numbers as (low, high).
fn times(a: u32, b: u32) -> vec2<u32> {
    let al = a & 0xffffu; let ah = a >> 16u;
    let bl = b & 0xffffu; let bh = b >> 16u;
    let low = al * bl;
    let middle = ah * bl + (low >> 16u);
    let cross = al * bh + (middle & 0xffffu);
    return vec2((cross << 16u) | (low & 0xffffu), ah * bh + (middle >> 16u) + (cross >> 16u));
}

fn multiply(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = times(a.x, b.x);
    return vec2(low.x, low.y + a.x * b.y + a.y * b.x);
}

fn add(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = a.x + b.x;
    return vec2(low, a.y + b.y + select(0u, 1u, low < a.x));
}

fn shift_xor(a: vec2<u32>, n: u32) -> vec2<u32> {
    return a ^ vec2((a.x >> n) | (a.y << (32u - n)), a.y >> n);
}

fn splitmix64(seed: vec2<u32>, index: vec2<u32>) -> vec2<u32> {
    var z = add(seed, multiply(add(index, vec2(1u, 0u)), vec2(0x7f4a7c15u, 0x9e3779b9u)));
    z = multiply(shift_xor(z, 30u), vec2(0x1ce4e5b9u, 0xbf58476du));
    z = multiply(shift_xor(z, 27u), vec2(0x133111ebu, 0x94d049bbu));
    return shift_xor(z, 31u);
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let at = group.z * op.width;
    // Of the token, whichever rows these are.
    var row = group.z;
    if op.rows == 1u { row = output_record(group.z).row; }
    let seed = vec2(op.stream_low ^ run[6], op.stream_high ^ run[7]);
    let first = times(row, (op.width + 3u) / 4u);
    for (var i = t; i < op.width; i += 64u) {
        let bits = splitmix64(seed, add(first, vec2(i / 4u, 0u)));
        let word = select(bits.x, bits.y, (i & 2u) != 0u);
        let sixteen = (word >> ((i & 1u) * 16u)) & 0xffffu;
        var v = select(0.0, op.factor, sixteen >= op.threshold) * arena[op.x + at + i];
        if op.residual != NONE { v += arena[op.residual + at + i]; }
        arena[op.out + at + i] = v;
    }
}
