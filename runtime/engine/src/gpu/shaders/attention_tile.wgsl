// Causal attention with online softmax for many rows: OWN rows of a query head a workgroup, OTHER keys at a time. CACHED:
// keys and values of all positions so far lie in the cache; else they are rows of the run. Rows of several sequences are
// taken sequence by sequence.
struct Op {
    q: u32, k: u32, v: u32, out: u32,
    lse: u32, scale: f32, cap: f32, slopes: u32,
    kv: Kv,
    first_head: u32, unused0: u32, unused1: u32, unused2: u32,
}

var<workgroup> queries: array<vec4<f32>, OWN * STRIDE>;
var<workgroup> others: array<vec4<f32>, OTHER * STRIDE>;
var<workgroup> chances: array<f32, OWN * (OTHER + 1u)>;
var<workgroup> tops: array<f32, 128>;

// Vectors of keys or values an invocation brings up.
const LOADS = (OTHER * VECTORS + 127u) / 128u;

// Keys (part 0) or values (part 1) of positions `base` to `last` of a sequence, zeros behind: this invocation's part.
fn others_of(t: u32, start: u32, base: u32, last: u32, part: u32, kv_head: u32) -> array<vec4<f32>, LOADS> {
    var all: array<vec4<f32>, LOADS>;
    for (var n = 0u; n < LOADS; n++) {
        let i = n * 128u + t;
        let j = base + i / VECTORS;
        let v = i % VECTORS;
        if j > last || i >= OTHER * VECTORS { continue; }
        if CACHED {
            all[n] = kv_load(D, kv_row(op.kv, start, j, part, kv_head), 4u * v);
        } else {
            all[n] = arena[(select(op.k, op.v, part == 1u) >> 2u) + ((start + j) * op.kv.kv_heads + kv_head) * VECTORS + v];
        }
    }
    return all;
}

fn store_others(t: u32, all: array<vec4<f32>, LOADS>) {
    var values = all;
    for (var n = 0u; n < LOADS; n++) {
        let i = n * 128u + t;
        if i < OTHER * VECTORS { others[(i / VECTORS) * STRIDE + i % VECTORS] = values[n]; }
    }
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let h = op.first_head + group.x;
    let kv_head = h / (op.kv.heads / op.kv.kv_heads);
    let window = op.kv.window;
    let first = group.z * OWN;
    let end = min(first + OWN, run[0]);
    let r = t / PER_ROW;
    let lane = t % PER_ROW;
    let row = first + r;
    for (var i = t; i < OWN * VECTORS; i += 128u) {
        let m = first + i / VECTORS;
        var x = vec4<f32>();
        if m < end { x = arena[(op.q >> 2u) + (m * op.kv.heads + h) * VECTORS + i % VECTORS]; }
        queries[(i / VECTORS) * STRIDE + i % VECTORS] = x;
    }
    var highest = LOWEST;
    var sum = 0.0;
    var result: array<vec4<f32>, MINE>;
    var begin = first;
    while begin < end {
        // Rows `begin` to `stop` are of one sequence; positions are counted in it.
        let record = row_record(begin);
        let stop = min(end, record.end);
        let position = select(begin - record.start, record.position, CACHED);
        let last = position + stop - 1u - begin;
        let inside = row >= begin && row < stop;
        let mine = position + row - begin;
        var low = 0u;
        if window > 0u && position + 1u > window { low = position + 1u - window; }
        // What comes next is on its way from memory while what is here is computed with.
        var keys = others_of(t, record.start, low, last, 0u, kv_head);
        for (var base = low; base <= last; base += OTHER) {
            workgroupBarrier();
            store_others(t, keys);
            workgroupBarrier();
            let values = others_of(t, record.start, base, last, 1u, kv_head);
            var s: array<f32, COLUMNS>;
            for (var v = 0u; v < VECTORS; v++) {
                let q = queries[r * STRIDE + v];
                for (var c = 0u; c < COLUMNS; c++) {
                    s[c] += dot(q, others[min(lane + c * PER_ROW, OTHER - 1u) * STRIDE + v]);
                }
            }
            var top = LOWEST;
            for (var c = 0u; c < COLUMNS; c++) {
                let n = lane + c * PER_ROW;
                let j = base + n;
                let seen = inside && n < OTHER && j <= mine && (window == 0u || mine - j < window);
                s[c] = select(LOWEST, score(s[c], op.scale, op.cap, op.slopes, h, mine - j), seen);
                top = max(top, s[c]);
            }
            tops[t] = top;
            workgroupBarrier();
            for (var l = 0u; l < PER_ROW; l++) { top = max(top, tops[r * PER_ROW + l]); }
            top = max(top, highest);
            for (var c = 0u; c < COLUMNS; c++) {
                let n = lane + c * PER_ROW;
                if n < OTHER { chances[r * (OTHER + 1u) + n] = select(0.0, exp(s[c] - top), s[c] > 0.5 * LOWEST); }
            }
            store_others(t, values);
            workgroupBarrier();
            keys = others_of(t, record.start, base + OTHER, last, 0u, kv_head);
            let shrink = exp(highest - top);
            highest = top;
            sum *= shrink;
            for (var i = 0u; i < MINE; i++) { result[i] *= shrink; }
            for (var n = 0u; n < OTHER; n++) {
                let p = chances[r * (OTHER + 1u) + n];
                sum += p;
                for (var i = 0u; i < MINE; i++) {
                    result[i] += p * others[n * STRIDE + min(lane + i * PER_ROW, VECTORS - 1u)];
                }
            }
        }
        begin = stop;
    }
    if row >= end { return; }
    for (var i = 0u; i < MINE; i++) {
        let v = lane + i * PER_ROW;
        if v < VECTORS { arena[(op.out >> 2u) + (row * op.kv.heads + h) * VECTORS + v] = result[i] / sum; }
    }
    if op.lse != NONE && lane == 0u {
        let at = op.lse + row * op.kv.heads + h;
        arena[at >> 2u][at & 3u] = highest + log(sum);
    }
}
