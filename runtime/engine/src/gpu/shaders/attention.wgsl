// Causal attention with online softmax, a query head of a row a workgroup: 64 scores at a time, then their part of the
// result, two elements of the head an invocation. CACHED: keys and values of all positions so far lie in the cache; else
// they are rows of the run. With FUSED the row is its sequence's only one: query and key are normed and turned here, and
// key and value of the row's own position enter the cache on the way (by the first query head of their group).
struct Op {
    q: u32, k: u32, v: u32, out: u32,
    lse: u32, scale: f32, cap: f32, slopes: u32,
    kv: Kv,
    turn: Turning,
}

var<workgroup> query: array<f32, 256>;
var<workgroup> key: array<f32, 256>;
var<workgroup> scores: array<f32, 64>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let h = group.x;
    let row = group.z;
    let kv = op.kv;
    let dim = kv.head_dim;
    let kv_head = h / (kv.heads / kv.kv_heads);
    let record = row_record(row);
    let mine = (row * kv.heads + h) * dim;
    let own = (row * kv.kv_heads + kv_head) * dim;
    // Position of the row in its sequence, and of the first it sees.
    var position = record.position;
    if !CACHED { position = row - record.start; }
    var first = 0u;
    if kv.window > 0u && position + 1u > kv.window { first = position + 1u - kv.window; }
    if FUSED {
        load_head(op.turn.k_norm, op.turn.eps, t, op.k + own, dim);
        for (var i = t; i < dim; i += 64u) { key[i] = turned(op.turn, row, i, 1.0); }
        load_head(op.turn.q_norm, op.turn.eps, t, op.q + mine, dim);
        for (var i = t; i < dim; i += 64u) { query[i] = turned(op.turn, row, i, 1.0); }
    } else {
        for (var i = t; i < dim; i += 64u) { query[i] = arena[op.q + mine + i]; }
    }
    workgroupBarrier();
    if FUSED && h % (kv.heads / kv.kv_heads) == 0u {
        let key_at = kv_index(kv, record.start, position, 0u, kv_head);
        let value_at = kv_index(kv, record.start, position, 1u, kv_head);
        for (var i = 2u * t; i < dim; i += 128u) {
            kv_store(key_at + i, vec2(key[i], key[i + 1u]));
            kv_store(value_at + i, vec2(arena[op.v + own + i], arena[op.v + own + i + 1u]));
        }
    }
    var highest = LOWEST;
    var sum = 0.0;
    var result: array<vec2<f32>, 2>;
    for (var base = first; base <= position; base += 64u) {
        let j = base + t;
        var s = LOWEST;
        if j <= position {
            s = 0.0;
            if FUSED && j == position {
                for (var i = 0u; i < dim; i++) { s += query[i] * key[i]; }
            } else if CACHED {
                let at = kv_index(kv, record.start, j, 0u, kv_head);
                for (var i = 0u; i < dim; i += 2u) {
                    let k = kv_load(at + i);
                    s += query[i] * k.x + query[i + 1u] * k.y;
                }
            } else {
                let at = op.k + ((record.start + j) * kv.kv_heads + kv_head) * dim;
                for (var i = 0u; i < dim; i++) { s += query[i] * arena[at + i]; }
            }
            s *= op.scale;
            if op.cap > 0.0 { s = op.cap * tanh(clamp(s / op.cap, -15.0, 15.0)); }
            if op.slopes != NONE { s += constants[op.slopes + h] * (f32(j) - f32(position)); }
        }
        let top = max(highest, max_all(t, s));
        let e = select(0.0, exp(s - top), j <= position);
        scores[t] = e;
        let shrink = exp(highest - top);
        highest = top;
        sum = sum * shrink + sum_all(t, e);
        let count = min(64u, position + 1u - base);
        for (var part = 0u; part < 2u; part++) {
            let i = 2u * t + part * 128u;
            if i >= dim { continue; }
            var r = result[part] * shrink;
            for (var n = 0u; n < count; n++) {
                var v: vec2<f32>;
                if FUSED && base + n == position {
                    v = vec2(arena[op.v + own + i], arena[op.v + own + i + 1u]);
                } else if CACHED {
                    v = kv_load(kv_index(kv, record.start, base + n, 1u, kv_head) + i);
                } else {
                    let at = op.v + ((record.start + base + n) * kv.kv_heads + kv_head) * dim + i;
                    v = vec2(arena[at], arena[at + 1u]);
                }
                r += scores[n] * v;
            }
            result[part] = r;
        }
        workgroupBarrier();
    }
    for (var part = 0u; part < 2u; part++) {
        let i = 2u * t + part * 128u;
        if i < dim {
            arena[op.out + mine + i] = result[part].x / sum;
            arena[op.out + mine + i + 1u] = result[part].y / sum;
        }
    }
    if op.lse != NONE && t == 0u { arena[op.lse + row * kv.heads + h] = highest + log(sum); }
}
