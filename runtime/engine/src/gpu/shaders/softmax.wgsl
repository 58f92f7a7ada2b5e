// Cross-entropy chunk by chunk. A row of logits a workgroup; `state` has maximum, sum and the target's logit of a row.
// With GRADIENT the logits become g·(softmax − onehot), times the slope of the soft cap; else they update the state, and
// the last chunk writes the cross-entropy.
struct Op { logits: u32, stride: u32, state: u32, out: u32, first: u32, count: u32, last: u32, cap: f32 }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let s = group.z;
    let record = output_record(s);
    let at = op.logits + s * op.stride;
    let state = op.state + s * 4u;
    if GRADIENT {
        let lse = arena[state] + log(arena[state + 1u]);
        for (var i = t; i < op.count; i += 64u) {
            let z = arena[at + i];
            var p = exp(z - lse);
            if op.first + i == record.target_token { p -= 1.0; }
            if op.cap > 0.0 { p *= 1.0 - (z / op.cap) * (z / op.cap); }
            arena[at + i] = p * record.weight;
        }
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
    if t != 0u { return; }
    if record.target_token >= op.first && record.target_token - op.first < op.count {
        wanted = arena[at + record.target_token - op.first];
    }
    arena[state] = top;
    arena[state + 1u] = sum;
    arena[state + 2u] = wanted;
    if op.last == 1u { arena[op.out + s] = top + log(sum) - wanted; }
}
