// Cross-entropy chunk by chunk. A row of logits a workgroup; `state` has maximum, sum and the target's logit of a row.
// With GRADIENT the logits become g·(softmax − onehot), times the slope of the soft cap; else they update the state, and
// the last chunk writes the cross-entropy.
// A target may be a distribution: at most as many tokens as there are threads, each with its share.
struct Op { logits: u32, stride: u32, state: u32, out: u32, first: u32, count: u32, last: u32, cap: f32 }

struct Target { at: u32, share: f32 }

// This thread's part of the row's target within the chunk: an index and its share, or NONE.
fn target_of(record: Output, t: u32) -> Target {
    var token = record.target_token;
    var share = 1.0;
    if record.soft_count > 0u {
        if t >= record.soft_count { return Target(NONE, 0.0); }
        token = run[record.soft + 2u * t];
        share = bitcast<f32>(run[record.soft + 2u * t + 1u]);
    } else if t > 0u { return Target(NONE, 0.0); }
    if token < op.first || token - op.first >= op.count { return Target(NONE, 0.0); }
    return Target(token - op.first, share);
}

fn slope(z: f32) -> f32 {
    if op.cap > 0.0 { return 1.0 - (z / op.cap) * (z / op.cap); }
    return 1.0;
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let s = group.z;
    let record = output_record(s);
    let at = op.logits + s * op.stride;
    let state = op.state + s * 4u;
    let mine = target_of(record, t);
    if GRADIENT {
        let lse = arena[state] + log(arena[state + 1u]);
        var less = 0.0;
        if mine.at != NONE { less = mine.share * slope(arena[at + mine.at]) * record.weight; }
        storageBarrier();
        for (var i = t; i < op.count; i += 64u) {
            let z = arena[at + i];
            arena[at + i] = exp(z - lse) * slope(z) * record.weight;
        }
        storageBarrier();
        if mine.at != NONE { arena[at + mine.at] -= less; }
        return;
    }
    var top = LOWEST;
    for (var i = t; i < op.count; i += 64u) { top = max(top, arena[at + i]); }
    top = max_all(t, top);
    var highest = LOWEST;
    var sum = 0.0;
    var wanted = 0.0;
    if op.first > 0u {
        highest = arena[state];
        sum = arena[state + 1u];
        wanted = arena[state + 2u];
    }
    top = max(top, highest);
    var more = 0.0;
    for (var i = t; i < op.count; i += 64u) { more += exp(arena[at + i] - top); }
    sum = sum * exp(highest - top) + sum_all(t, more);
    var part = 0.0;
    if mine.at != NONE { part = mine.share * arena[at + mine.at]; }
    wanted += sum_all(t, part);
    if t != 0u { return; }
    arena[state] = top;
    arena[state + 1u] = sum;
    arena[state + 2u] = wanted;
    if op.last == 1u { arena[op.out + s] = top + log(sum) - wanted; }
}
