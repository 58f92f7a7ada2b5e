// Gradient of attention over the run's own rows, in three kernels without atomics. With P = exp(S − lse), dP = dO·Vᵀ and
// Δ = rowsum(dO ∘ O): dS = P ∘ (dP − Δ) times the slope of the soft cap; dQ = scale·dS·K, dK = scale·dSᵀ·Q, dV = Pᵀ·dO.
//   DELTA   Δ, a head of a row a workgroup
//   QUERIES dQ, a query head of a row a workgroup, over the rows it sees
//   else    dK and dV, a key head of a row a workgroup, over the rows that see it and the query heads of its group
struct Op {
    q: u32, k: u32, v: u32, o: u32,
    lse: u32, d_o: u32, dq: u32, dk: u32,
    dv: u32, delta: u32, scale: f32, cap: f32,
    kv: Kv,
    slopes: u32, unused0: u32, unused1: u32, unused2: u32,
}

var<workgroup> own: array<f32, 256>;
var<workgroup> other: array<f32, 256>;
var<workgroup> weights_p: array<f32, 64>;
var<workgroup> weights_s: array<f32, 64>;

// The products of `own` and of `other` with vectors of the arena.
fn products(first: u32, second: u32, dim: u32) -> vec2<f32> {
    var s = vec2<f32>();
    for (var i = 0u; i < dim; i++) { s += vec2(own[i] * arena[first + i], other[i] * arena[second + i]); }
    return s;
}

// Probability and gradient of the score of query head h at row i for key row j, from q·k and dP.
fn gradient(h: u32, i: u32, j: u32, products: vec2<f32>) -> vec2<f32> {
    var s = products.x * op.scale;
    var slope = 1.0;
    if op.cap > 0.0 {
        let y = tanh(clamp(s / op.cap, -15.0, 15.0));
        s = op.cap * y;
        slope = 1.0 - y * y;
    }
    if op.slopes != NONE { s += constants[op.slopes + h] * (f32(j) - f32(i)); }
    let p = exp(s - arena[op.lse + i * op.kv.heads + h]);
    return vec2(p, p * (products.y - arena[op.delta + i * op.kv.heads + h]) * slope * op.scale);
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row = group.z;
    let kv = op.kv;
    let dim = kv.head_dim;
    let record = row_record(row);
    let shared_by = kv.heads / kv.kv_heads;
    if DELTA {
        let at = (row * kv.heads + group.x) * dim;
        var s = 0.0;
        for (var i = t; i < dim; i += 64u) { s += arena[op.o + at + i] * arena[op.d_o + at + i]; }
        s = sum_all(t, s);
        if t == 0u { arena[op.delta + row * kv.heads + group.x] = s; }
        return;
    }
    var first: array<vec2<f32>, 2>;
    var second: array<vec2<f32>, 2>;
    if QUERIES {
        let h = group.x;
        let at = (row * kv.heads + h) * dim;
        let kv_head = h / shared_by;
        for (var i = t; i < dim; i += 64u) { own[i] = arena[op.q + at + i]; other[i] = arena[op.d_o + at + i]; }
        workgroupBarrier();
        var begin = record.start;
        if kv.window > 0u && row + 1u > begin + kv.window { begin = row + 1u - kv.window; }
        for (var base = begin; base <= row; base += 64u) {
            let j = base + t;
            var g = vec2<f32>();
            if j <= row {
                let key = (j * kv.kv_heads + kv_head) * dim;
                g = gradient(h, row, j, products(op.k + key, op.v + key, dim));
            }
            workgroupBarrier();
            weights_s[t] = g.y;
            workgroupBarrier();
            let count = min(64u, row + 1u - base);
            for (var part = 0u; part < 2u; part++) {
                let i = 2u * t + part * 128u;
                if i >= dim { continue; }
                for (var n = 0u; n < count; n++) {
                    let key = op.k + ((base + n) * kv.kv_heads + kv_head) * dim + i;
                    first[part] += weights_s[n] * vec2(arena[key], arena[key + 1u]);
                }
            }
        }
        for (var part = 0u; part < 2u; part++) {
            let i = 2u * t + part * 128u;
            if i < dim {
                arena[op.dq + at + i] = first[part].x;
                arena[op.dq + at + i + 1u] = first[part].y;
            }
        }
        return;
    }
    let at = (row * kv.kv_heads + group.x) * dim;
    for (var i = t; i < dim; i += 64u) { own[i] = arena[op.k + at + i]; other[i] = arena[op.v + at + i]; }
    workgroupBarrier();
    var end = record.end;
    if kv.window > 0u { end = min(end, row + kv.window); }
    for (var h = group.x * shared_by; h < (group.x + 1u) * shared_by; h++) {
        for (var base = row; base < end; base += 64u) {
            let i = base + t;
            var g = vec2<f32>();
            if i < end {
                let query = (i * kv.heads + h) * dim;
                g = gradient(h, i, row, products(op.q + query, op.d_o + query, dim));
            }
            workgroupBarrier();
            weights_p[t] = g.x;
            weights_s[t] = g.y;
            workgroupBarrier();
            let count = min(64u, end - base);
            for (var part = 0u; part < 2u; part++) {
                let d = 2u * t + part * 128u;
                if d >= dim { continue; }
                for (var n = 0u; n < count; n++) {
                    let query = ((base + n) * kv.heads + h) * dim + d;
                    first[part] += weights_s[n] * vec2(arena[op.q + query], arena[op.q + query + 1u]);
                    second[part] += weights_p[n] * vec2(arena[op.d_o + query], arena[op.d_o + query + 1u]);
                }
            }
        }
    }
    for (var part = 0u; part < 2u; part++) {
        let d = 2u * t + part * 128u;
        if d < dim {
            arena[op.dk + at + d] = first[part].x;
            arena[op.dk + at + d + 1u] = first[part].y;
            arena[op.dv + at + d] = second[part].x;
            arena[op.dv + at + d + 1u] = second[part].y;
        }
    }
}
