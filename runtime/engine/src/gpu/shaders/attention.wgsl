// Attention of a sequence's newest row, a query head of a row a workgroup: a page of scores at a time, a position an
// invocation, then their part of the result, four elements of the head an invocation. Query and key are normed and turned
// here, and key and value of the row's own position enter the cache on the way (by the first query head of their group).
//
// Long windows are divided: each of SPLITS workgroups of a head has some of the pages and leaves its sums at `parts`, for
// `attention_merge.wgsl`.
struct Op {
    q: u32, k: u32, v: u32, out: u32,
    parts: u32, scale: f32, cap: f32, slopes: u32,
    kv: Kv,
    first_head: u32, unused0: u32, unused1: u32, unused2: u32,
    turn: Turning,
}

const FOURS = D / 4u;
// Invocations that share four elements of the result, each with some of the positions.
const SHARES = GROUP / FOURS;

var<workgroup> query: array<vec4<f32>, FOURS>;
var<workgroup> key: array<vec4<f32>, FOURS>;
var<workgroup> scores: array<f32, GROUP>;
var<workgroup> parts: array<vec4<f32>, GROUP>;

fn number(at: u32) -> vec4<f32> { return vec4(arena[at], arena[at + 1u], arena[at + 2u], arena[at + 3u]); }

@compute @workgroup_size(GROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let h = op.first_head + group.x / SPLITS;
    let split = group.x % SPLITS;
    let row = group.z;
    let kv = op.kv;
    let kv_head = h / (kv.heads / kv.kv_heads);
    let record = row_record(row);
    let mine = (row * kv.heads + h) * D;
    let own = (row * kv.kv_heads + kv_head) * D;
    let position = record.position;
    // The first position the row sees.
    var first = 0u;
    if kv.window > 0u && position + 1u > kv.window { first = position + 1u - kv.window; }
    load_head(op.turn.k_norm, op.turn.eps, t, op.k + own, D);
    for (var i = t; i < D; i += GROUP) { key[i >> 2u][i & 3u] = turned(op.turn, row, i, 1.0); }
    load_head(op.turn.q_norm, op.turn.eps, t, op.q + mine, D);
    for (var i = t; i < D; i += GROUP) { query[i >> 2u][i & 3u] = turned(op.turn, row, i, 1.0); }
    workgroupBarrier();
    // Pages of this workgroup; the row's own position is in the last.
    let page = first / PAGE;
    let pages = position / PAGE + 1u - page;
    let begin = page + pages * split / SPLITS;
    let end = page + pages * (split + 1u) / SPLITS;
    let writes = split + 1u == SPLITS && h % (kv.heads / kv.kv_heads) == 0u;
    let four_of_row = min(t, FOURS - 1u);
    kv_store(D, kv_row(kv, record.start, position, 0u, kv_head), t, key[four_of_row], writes);
    kv_store(D, kv_row(kv, record.start, position, 1u, kv_head), t, number(op.v + own + 4u * four_of_row), writes);
    let four = t % FOURS;
    let share = t / FOURS;
    var highest = LOWEST;
    var sum = 0.0;
    var result = vec4<f32>();
    for (var base = begin * PAGE; base < end * PAGE; base += PAGE) {
        let keys = kv_row(kv, record.start, base, 0u, kv_head);
        let values = kv_row(kv, record.start, base, 1u, kv_head);
        let j = base + t;
        let seen = j >= first && j <= position;
        var s = LOWEST;
        if seen {
            var y = vec4<f32>();
            if j == position {
                for (var i = 0u; i < FOURS; i++) { y += query[i] * key[i]; }
            } else {
                for (var i = 0u; i < FOURS; i++) { y += query[i] * kv_load(D, keys + t, 4u * i); }
            }
            s = (y.x + y.y + y.z + y.w) * op.scale;
            if op.cap > 0.0 { s = op.cap * tanh(clamp(s / op.cap, -15.0, 15.0)); }
            if op.slopes != NONE { s += constants[op.slopes + h] * (f32(j) - f32(position)); }
        }
        let top = max(highest, max_all(t, s));
        let e = select(0.0, exp(s - top), seen);
        scores[t] = e;
        let shrink = exp(highest - top);
        highest = top;
        sum = sum * shrink + sum_all(t, e);
        result *= shrink;
        if share < SHARES {
            // The row's own value is not in the cache yet, as far as other workgroups know.
            let before = min(PAGE, position - base);
            var n = share;
            if first > base { n += (first - base) / SHARES * SHARES; }
            for (; n < before; n += SHARES) { result += scores[n] * kv_load(D, values + n, 4u * four); }
            if position - base < PAGE && (position - base) % SHARES == share {
                result += scores[position - base] * number(op.v + own + 4u * four);
            }
        }
        workgroupBarrier();
    }
    parts[t] = result;
    workgroupBarrier();
    if t >= FOURS { return; }
    var all = vec4<f32>();
    for (var i = 0u; i < SHARES; i++) { all += parts[i * FOURS + t]; }
    var at = op.out + mine + 4u * t;
    if SPLITS > 1u {
        let part = op.parts + ((row * kv.heads + h) * SPLITS + split) * (D + 4u);
        at = part + 4u * t;
        if t == 0u {
            arena[part + D] = highest;
            arena[part + D + 1u] = sum;
        }
    } else {
        all /= sum;
    }
    arena[at] = all.x;
    arena[at + 1u] = all.y;
    arena[at + 2u] = all.z;
    arena[at + 3u] = all.w;
}
