// Rows of the cache in single precision.
fn kv_load(dim: u32, row: u32, i: u32) -> vec4<f32> {
    let at = (row * dim + i) >> 1u;
    return bitcast<vec4<f32>>(vec4(cache[at], cache[at + 1u]));
}

fn kv_store(dim: u32, row: u32, t: u32, v: vec4<f32>, wanted: bool) {
    if !wanted || 4u * t >= dim { return; }
    let w = bitcast<vec4<u32>>(v);
    let at = (row * dim >> 1u) + 2u * t;
    cache[at] = w.xy;
    cache[at + 1u] = w.zw;
}
