// The gradient of a table's rows by token: `G[token of m] += scale·dy[m]`. A row of the run and 64 columns a workgroup; the
// first row that has a token adds up what all rows with it give, in order.
struct Op { dy: u32, width: u32, out: u32, scale: f32 }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let i = group.x * 64u + t;
    if i >= op.width { return; }
    let token = row_record(group.z).token;
    let rows = run[0];
    var sum = 0.0;
    for (var m = 0u; m < rows; m++) {
        if row_record(m).token != token { continue; }
        if m < group.z { return; }
        sum += arena[op.dy + m * op.width + i];
    }
    gradients[op.out + token * op.width + i] += op.scale * sum;
}
