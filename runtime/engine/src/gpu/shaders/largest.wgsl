// The K largest logits of a chunk of a row or, with MERGE, of what the chunks of a row came to: largest first, of equals the
// lower token first, as pairs of floats: logit, and token, which is exact below 2^24. Places that nothing is left for have the
// token −1. A chunk a workgroup, or a row.
struct Op { logits: u32, stride: u32, count: u32, k: u32, lists: u32, chunks: u32, out: u32, unused: u32 }

const CHUNK = 2048u;
const THREADS = 256u;

struct Best { key: u32, token: u32 }

var<workgroup> keys: array<u32, CHUNK>;
var<workgroup> best_keys: array<u32, THREADS>;
var<workgroup> best_tokens: array<u32, THREADS>;

// Orders as logits do, in integers, whose comparisons no compiler takes lightly: what is no number is above infinity, and 0,
// which is no logit's, below all.
fn key(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    if (bits & 0x7fffffffu) > 0x7f800000u { return 0xffffffffu; }
    if bits == 0x80000000u { return 0x80000000u; }
    if bits > 0x80000000u { return ~bits; }
    return bits | 0x80000000u;
}

fn logit(key: u32) -> f32 {
    if key >= 0x80000000u { return bitcast<f32>(key ^ 0x80000000u); }
    return bitcast<f32>(~key);
}

fn better(a: Best, b: Best) -> bool {
    return a.key > b.key || (a.key == b.key && a.token < b.token);
}

// The best of all threads.
fn best_of_all(t: u32, mine: Best) -> Best {
    best_keys[t] = mine.key;
    best_tokens[t] = mine.token;
    workgroupBarrier();
    for (var half = THREADS / 2u; half > 0u; half /= 2u) {
        if t < half {
            let other = Best(best_keys[t + half], best_tokens[t + half]);
            if better(other, Best(best_keys[t], best_tokens[t])) {
                best_keys[t] = other.key;
                best_tokens[t] = other.token;
            }
        }
        workgroupBarrier();
    }
    let best = Best(best_keys[0], best_tokens[0]);
    workgroupBarrier();
    return best;
}

// The best of this thread's part of a chunk.
fn best_of_mine(t: u32, first: u32) -> Best {
    var best = Best(0u, NONE);
    for (var i = t; i < CHUNK; i += THREADS) {
        let candidate = Best(keys[i], first + i);
        if candidate.key > best.key { best = candidate; }
    }
    return best;
}

// Number `place` of a list; nothing behind its end.
fn of_list(list: u32, place: u32) -> Best {
    if place >= op.k { return Best(0u, NONE); }
    let at = list + 2u * place;
    if arena[at + 1u] < 0.0 { return Best(0u, NONE); }
    return Best(key(arena[at]), u32(arena[at + 1u]));
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let s = group.z;
    let lists = op.lists + s * op.chunks * 2u * op.k;
    let list = lists + t * 2u * op.k;
    let first = group.x * CHUNK;
    var out = op.out + s * 2u * op.k;
    var mine = Best(0u, NONE);
    var place = 0u;
    if MERGE {
        if t < op.chunks { mine = of_list(list, 0u); } else { place = op.k; }
    } else {
        out = lists + group.x * 2u * op.k;
        for (var i = t; i < CHUNK; i += THREADS) {
            keys[i] = 0u;
            if first + i < op.count { keys[i] = key(arena[op.logits + s * op.stride + first + i]); }
        }
        mine = best_of_mine(t, first);
    }
    for (var j = 0u; j < op.k; j++) {
        let best = best_of_all(t, mine);
        if t == 0u {
            arena[out + 2u * j] = logit(best.key);
            arena[out + 2u * j + 1u] = select(f32(best.token), -1.0, best.token == NONE);
        }
        if best.token != NONE && best.token == mine.token {
            if MERGE {
                place++;
                mine = of_list(list, place);
            } else {
                keys[best.token - first] = 0u;
                mine = best_of_mine(t, first);
            }
        }
    }
}
