// `out = 1/√(mean x² + ε)` of every row of x, of which a row of the run has as many as there are workgroups side by side.
struct Op { x: u32, width: u32, out: u32, eps: f32 }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row = group.z * groups.x + group.x;
    var sum = 0.0;
    for (var i = t; i < op.width; i += 64u) {
        let x = arena[op.x + row * op.width + i];
        sum += x * x;
    }
    sum = sum_all(t, sum);
    if t == 0u { arena[op.out + row] = inverseSqrt(sum / f32(op.width) + op.eps); }
}
