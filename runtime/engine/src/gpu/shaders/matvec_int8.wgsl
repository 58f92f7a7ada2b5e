// Products of eight bits: x is quantized (`quantize.wgsl`), three vectors to a block of 32, and normed already.
for (var k = lane * 16u; k < op.k; k += LANES * 16u) {
    let w = codes(op.part[p].kind, base, k);
    var v = w;
    if GATED { v = codes(op.part[1].kind, other, k); }
    for (var m = 0u; m < ROWS; m++) {
        let i = op.x + (m * ((op.k + 31u) / 32u) + k / 32u) * 3u;
        let x = packed[i + ((k >> 4u) & 1u)];
        let about = bitcast<vec4<f32>>(packed[i + 2u]);
        let sum = select(about.y, about.z, (k & 16u) != 0u);
        sums[m] += w.scale * about.x * f32(products(w.q, x)) + w.offset * sum;
        if GATED { sums[ROWS + m] += v.scale * about.x * f32(products(v.q, x)) + v.offset * sum; }
    }
}
