// Rows of the cache in Q8_0: the row's quants, four a word, and behind them the scales of its blocks of 32, two a word in
// half precision.
var<workgroup> stored: array<vec4<f32>, 64>;

fn kv_at(dim: u32, row: u32) -> u32 { return row * (dim / 4u + (dim + 63u) / 64u); }

fn kv_load(dim: u32, row: u32, i: u32) -> vec4<f32> {
    let at = kv_at(dim, row);
    let scales = unpack2x16float(cache[at + dim / 4u + i / 64u]);
    return vec4<f32>(unpack4xI8(cache[at + i / 4u])) * select(scales.x, scales.y, (i & 32u) != 0u);
}

// The scale of a block of what is stored.
fn kv_scale(block: u32) -> f32 {
    var most = vec4<f32>();
    for (var i = 0u; i < 8u; i++) { most = max(most, abs(stored[8u * block + i])); }
    return min(max(max(most.x, most.y), max(most.z, most.w)) / 127.0, 65504.0);
}

fn kv_store(dim: u32, row: u32, t: u32, v: vec4<f32>, wanted: bool) {
    workgroupBarrier();
    if 4u * t < dim { stored[t] = v; }
    workgroupBarrier();
    if !wanted || 4u * t >= dim { return; }
    let at = kv_at(dim, row);
    let scale = kv_scale(t / 8u);
    // Halves away from zero, as ggml rounds.
    let x = v * select(1.0 / scale, 0.0, scale == 0.0);
    cache[at + t] = pack4xI8(vec4<i32>(clamp(trunc(x + 0.5 * sign(x)), vec4(-127.0), vec4(127.0))));
    if (t & 15u) != 0u { return; }
    var scales = vec2(scale, 0.0);
    if 4u * t + 32u < dim { scales.y = kv_scale(t / 8u + 1u); }
    cache[at + dim / 4u + t / 16u] = pack2x16float(scales);
}
