// The cache of one layer: pages of `[K, V][kv_head][PAGE][D]`, elements of half or single precision.
struct Kv { heads: u32, kv_heads: u32, head_dim: u32, window: u32 }

const PAGE = 128u;

// Index of element 0 of a head's vector at a position, counted in elements; `part` is 0 for keys and 1 for values.
fn kv_index(kv: Kv, pages: u32, position: u32, part: u32, head: u32) -> u32 {
    let page = run[pages + position / PAGE];
    return (((page * 2u + part) * kv.kv_heads + head) * PAGE + position % PAGE) * kv.head_dim;
}

// Elements i to i + 3, i a multiple of four.
fn kv_load(i: u32) -> vec4<f32> {
    if KV_HALF {
        let w = cache[i >> 2u];
        return vec4(unpack2x16float(w.x), unpack2x16float(w.y));
    }
    return bitcast<vec4<f32>>(vec4(cache[i >> 1u], cache[(i >> 1u) + 1u]));
}

fn kv_store(i: u32, v: vec4<f32>) {
    if KV_HALF {
        let x = clamp(v, vec4(-65504.0), vec4(65504.0));
        cache[i >> 2u] = vec2(pack2x16float(x.xy), pack2x16float(x.zw));
    } else {
        let w = bitcast<vec4<u32>>(v);
        cache[i >> 1u] = w.xy;
        cache[(i >> 1u) + 1u] = w.zw;
    }
}
