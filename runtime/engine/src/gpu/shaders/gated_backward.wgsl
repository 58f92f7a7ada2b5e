// `d_gate = dy ∘ up ∘ act'(gate)`, `d_up = dy ∘ act(gate)`, a row a workgroup.
struct Op { gate: u32, up: u32, dy: u32, d_gate: u32, d_up: u32, width: u32, unused0: u32, unused1: u32 }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let at = group.z * op.width;
    for (var i = t; i < op.width; i += 64u) {
        let g = arena[op.gate + at + i];
        let u = arena[op.up + at + i];
        let dy = arena[op.dy + at + i];
        arena[op.d_gate + at + i] = dy * u * gate_slope(g);
        arena[op.d_up + at + i] = dy * gate(g);
    }
}
