// `out = act(gate) ∘ up`, a row a workgroup.
struct Op { gate: u32, up: u32, out: u32, width: u32 }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let at = group.z * op.width;
    for (var i = t; i < op.width; i += 64u) { arena[op.out + at + i] = gate(arena[op.gate + at + i]) * arena[op.up + at + i]; }
}
