// Gradient of attention over the run's own rows, in two kernels without atomics. With P = exp(S − lse), dP = dO·Vᵀ and
// Δ = rowsum(dO ∘ O): dS = P ∘ (dP − Δ) times the slope of the soft cap; dQ = scale·dS·K, dK = scale·dSᵀ·Q, dV = Pᵀ·dO.
//   QUERIES Δ and dQ: OWN rows of a query head a workgroup, over the keys they see
//   else    dK and dV: OWN rows of a key head a workgroup, over the rows that see them and the query heads of its group
struct Op {
    q: u32, k: u32, v: u32, o: u32,
    lse: u32, d_o: u32, dq: u32, dk: u32,
    dv: u32, delta: u32, scale: f32, cap: f32,
    kv: Kv,
    slopes: u32, first_head: u32, unused0: u32, unused1: u32,
}

struct Kv { heads: u32, kv_heads: u32, head_dim: u32, window: u32 }

// Queries and gradients of outputs on one side, keys and values on the other.
var<workgroup> own_first: array<vec4<f32>, OWN * STRIDE>;
var<workgroup> own_second: array<vec4<f32>, OWN * STRIDE>;
var<workgroup> other_first: array<vec4<f32>, OTHER * STRIDE>;
var<workgroup> other_second: array<vec4<f32>, OTHER * STRIDE>;
var<workgroup> chances: array<f32, OWN * (OTHER + 1u)>;
var<workgroup> slopes: array<f32, OWN * (OTHER + 1u)>;
// Of the query side's rows.
var<workgroup> lse: array<f32, 32>;
var<workgroup> delta: array<f32, 32>;
var<workgroup> sums: array<f32, 128>;

// Vector v of head h of row m of a value that has so many heads.
fn vector_at(value: u32, heads: u32, h: u32, m: u32, v: u32) -> u32 { return (value >> 2u) + (m * heads + h) * VECTORS + v; }

// Vectors of the other side an invocation brings up.
const LOADS = (OTHER * VECTORS + 127u) / 128u;

struct Others {
    first: array<vec4<f32>, LOADS>,
    second: array<vec4<f32>, LOADS>,
    lse: f32,
    delta: f32,
}

// The other side's rows `base` to `end`, and what is known of queries: this invocation's part.
fn others_of(t: u32, base: u32, end: u32, h: u32, kv_head: u32) -> Others {
    var all: Others;
    for (var n = 0u; n < LOADS; n++) {
        let i = n * 128u + t;
        let m = base + i / VECTORS;
        let v = i % VECTORS;
        if m >= end || i >= OTHER * VECTORS { continue; }
        if QUERIES {
            all.first[n] = arena[vector_at(op.k, op.kv.kv_heads, kv_head, m, v)];
            all.second[n] = arena[vector_at(op.v, op.kv.kv_heads, kv_head, m, v)];
        } else {
            all.first[n] = arena[vector_at(op.q, op.kv.heads, h, m, v)];
            all.second[n] = arena[vector_at(op.d_o, op.kv.heads, h, m, v)];
        }
    }
    if !QUERIES && t < OTHER && base + t < end {
        all.lse = number(op.lse + (base + t) * op.kv.heads + h);
        all.delta = number(op.delta + (base + t) * op.kv.heads + h);
    }
    return all;
}

fn store_others(t: u32, others: Others) {
    var all = others;
    for (var n = 0u; n < LOADS; n++) {
        let i = n * 128u + t;
        let to = (i / VECTORS) * STRIDE + i % VECTORS;
        if i < OTHER * VECTORS {
            other_first[to] = all.first[n];
            other_second[to] = all.second[n];
        }
    }
    if !QUERIES && t < OTHER {
        lse[t] = all.lse;
        delta[t] = all.delta;
    }
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let own_head = op.first_head + group.x;
    let shared_by = op.kv.heads / op.kv.kv_heads;
    let window = op.kv.window;
    let kv_head = select(own_head, own_head / shared_by, QUERIES);
    let first_row = group.z * OWN;
    let end = min(first_row + OWN, run[0]);
    let r = t / PER_ROW;
    let lane = t % PER_ROW;
    let row = first_row + r;
    for (var i = t; i < OWN * VECTORS; i += 128u) {
        let m = first_row + i / VECTORS;
        let v = i % VECTORS;
        let to = (i / VECTORS) * STRIDE + v;
        var a = vec4<f32>();
        var b = vec4<f32>();
        if m < end {
            if QUERIES {
                a = arena[vector_at(op.q, op.kv.heads, own_head, m, v)];
                b = arena[vector_at(op.d_o, op.kv.heads, own_head, m, v)];
            } else {
                a = arena[vector_at(op.k, op.kv.kv_heads, kv_head, m, v)];
                b = arena[vector_at(op.v, op.kv.kv_heads, kv_head, m, v)];
            }
        }
        own_first[to] = a;
        own_second[to] = b;
    }
    if QUERIES {
        workgroupBarrier();
        var part = 0.0;
        if row < end {
            for (var v = lane; v < VECTORS; v += PER_ROW) {
                part += dot(own_second[r * STRIDE + v], arena[vector_at(op.o, op.kv.heads, own_head, row, v)]);
            }
        }
        sums[t] = part;
        workgroupBarrier();
        if row < end && lane == 0u {
            var whole = 0.0;
            for (var l = 0u; l < PER_ROW; l++) { whole += sums[t + l]; }
            let at = row * op.kv.heads + own_head;
            arena[(op.delta + at) >> 2u][(op.delta + at) & 3u] = whole;
            delta[r] = whole;
            lse[r] = number(op.lse + at);
        }
    }
    var first: array<vec4<f32>, MINE>;
    var second: array<vec4<f32>, MINE>;
    let first_head = select(own_head * shared_by, own_head, QUERIES);
    let last_head = select(first_head + shared_by, first_head + 1u, QUERIES);
    var begin = first_row;
    while begin < end {
        // Rows `begin` to `stop` are of one sequence.
        let record = row_record(begin);
        let stop = min(end, record.end);
        let inside = row >= begin && row < stop;
        // Rows of the other side: keys up to the last query, or queries from the first key on.
        var low = begin;
        var high = record.end;
        if QUERIES {
            low = record.start;
            if window > 0u && begin + 1u > low + window { low = begin + 1u - window; }
            high = stop;
        } else if window > 0u {
            high = min(high, stop - 1u + window);
        }
        // Tile by tile, head by head; the next tile is on its way from memory while one is computed with.
        var h = first_head;
        var base = low;
        var others = others_of(t, base, high, h, kv_head);
        while h < last_head {
            workgroupBarrier();
            store_others(t, others);
            workgroupBarrier();
            var next_h = h;
            var next = base + OTHER;
            if next >= high {
                next = low;
                next_h++;
            }
            if next_h < last_head { others = others_of(t, next, high, next_h, kv_head); }
            var a: array<f32, COLUMNS>;
            var b: array<f32, COLUMNS>;
            for (var v = 0u; v < VECTORS; v++) {
                let x = own_first[r * STRIDE + v];
                let y = own_second[r * STRIDE + v];
                for (var c = 0u; c < COLUMNS; c++) {
                    let at = min(lane + c * PER_ROW, OTHER - 1u) * STRIDE + v;
                    a[c] += dot(x, other_first[at]);
                    b[c] += dot(y, other_second[at]);
                }
            }
            for (var c = 0u; c < COLUMNS; c++) {
                let n = lane + c * PER_ROW;
                if n >= OTHER { continue; }
                // The query's row and the key's.
                let i = select(base + n, row, QUERIES);
                let j = select(row, base + n, QUERIES);
                var p = 0.0;
                var d = 0.0;
                if inside && base + n < high && j <= i && (window == 0u || i - j < window) {
                    let q = select(n, r, QUERIES);
                    let s = score(a[c], op.scale, op.cap, op.slopes, h, i - j);
                    p = exp(s - lse[q]);
                    d = p * (b[c] - delta[q]) * op.scale;
                    if op.cap > 0.0 {
                        let capped = score(a[c], op.scale, op.cap, NONE, h, 0u) / op.cap;
                        d *= 1.0 - capped * capped;
                    }
                }
                slopes[r * (OTHER + 1u) + n] = d;
                if !QUERIES { chances[r * (OTHER + 1u) + n] = p; }
            }
            workgroupBarrier();
            for (var n = 0u; n < OTHER; n++) {
                let d = slopes[r * (OTHER + 1u) + n];
                for (var i = 0u; i < MINE; i++) {
                    let at = n * STRIDE + min(lane + i * PER_ROW, VECTORS - 1u);
                    first[i] += d * other_first[at];
                    if !QUERIES { second[i] += chances[r * (OTHER + 1u) + n] * other_second[at]; }
                }
            }
            h = next_h;
            base = next;
        }
        begin = stop;
    }
    if row >= end { return; }
    for (var i = 0u; i < MINE; i++) {
        let v = lane + i * PER_ROW;
        if v >= VECTORS { continue; }
        if QUERIES {
            arena[vector_at(op.dq, op.kv.heads, own_head, row, v)] = first[i];
        } else {
            arena[vector_at(op.dk, op.kv.kv_heads, kv_head, row, v)] = first[i];
            arena[vector_at(op.dv, op.kv.kv_heads, kv_head, row, v)] = second[i];
        }
    }
}
