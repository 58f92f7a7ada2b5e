// Rows of the cache in half precision.
fn kv_load(dim: u32, row: u32, i: u32) -> vec4<f32> {
    let w = cache[(row * dim + i) >> 2u];
    return vec4(unpack2x16float(w.x), unpack2x16float(w.y));
}

fn kv_store(dim: u32, row: u32, t: u32, v: vec4<f32>, wanted: bool) {
    if !wanted || 4u * t >= dim { return; }
    let x = clamp(v, vec4(-65504.0), vec4(65504.0));
    cache[(row * dim >> 2u) + t] = vec2(pack2x16float(x.xy), pack2x16float(x.zw));
}
