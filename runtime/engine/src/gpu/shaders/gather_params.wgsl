// Rows of a trained table by token.
struct Op { table: u32, width: u32, out: u32, unused: u32 }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row = op.table + row_record(group.z).token * op.width;
    for (var i = t; i < op.width; i += 64u) { arena[op.out + group.z * op.width + i] = params[row + i]; }
}
