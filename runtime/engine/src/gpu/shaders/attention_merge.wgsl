// Puts the parts of a head's attention together: each has its sum of values, its highest score and its sum of weights.
struct Op { parts: u32, out: u32, heads: u32, unused: u32 }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let head = group.z * op.heads + group.x;
    let part = op.parts + head * SPLITS * (D + 4u);
    var highest = LOWEST;
    for (var s = 0u; s < SPLITS; s++) { highest = max(highest, arena[part + s * (D + 4u) + D]); }
    var sum = 0.0;
    for (var s = 0u; s < SPLITS; s++) {
        let at = part + s * (D + 4u) + D;
        sum += exp(arena[at] - highest) * arena[at + 1u];
    }
    for (var i = t; i < D; i += 64u) {
        var all = 0.0;
        for (var s = 0u; s < SPLITS; s++) {
            let at = part + s * (D + 4u);
            all += exp(arena[at + D] - highest) * arena[at + i];
        }
        arena[op.out + head * D + i] = all / sum;
    }
}
