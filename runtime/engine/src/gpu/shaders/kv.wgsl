// The cache of one layer: pages of `[K, V][kv_head][PAGE][D]`, elements of half or single precision.
struct Kv { heads: u32, kv_heads: u32, head_dim: u32, window: u32 }

const PAGE = 128u;

// Index of element 0 of a head's vector at a position, counted in elements; `part` is 0 for keys and 1 for values.
fn kv_index(kv: Kv, pages: u32, position: u32, part: u32, head: u32) -> u32 {
    let page = run[pages + position / PAGE];
    return (((page * 2u + part) * kv.kv_heads + head) * PAGE + position % PAGE) * kv.head_dim;
}

// Elements i and i + 1, i even.
fn kv_load(i: u32) -> vec2<f32> {
    if KV_HALF { return unpack2x16float(cache[i >> 1u]); }
    return bitcast<vec2<f32>>(vec2(cache[i], cache[i + 1u]));
}

fn kv_store(i: u32, v: vec2<f32>) {
    if KV_HALF {
        cache[i >> 1u] = pack2x16float(clamp(v, vec2(-65504.0), vec2(65504.0)));
    } else {
        cache[i] = bitcast<u32>(v.x);
        cache[i + 1u] = bitcast<u32>(v.y);
    }
}
