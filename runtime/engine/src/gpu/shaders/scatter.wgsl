// `out[output row s] = x[s]`; with CLEAR every row of `out` becomes zero, which is to be done before.
struct Op { x: u32, width: u32, out: u32, unused: u32 }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    var row = group.z;
    if !CLEAR { row = output_record(group.z).row; }
    for (var i = t; i < op.width; i += 64u) {
        var v = 0.0;
        if !CLEAR { v = arena[op.x + group.z * op.width + i]; }
        arena[op.out + row * op.width + i] = v;
    }
}
