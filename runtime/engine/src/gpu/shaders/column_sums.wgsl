// The gradient of a vector: `g[j] += Σₘ a[m][j]·b[m][j]·rho[m] / norms[j]`, 32 columns a workgroup, whose eight lanes share the
// rows. What is NONE is left out; a norm of 0 gives nothing. A row of the run has `per_row` rows here: heads, say.
struct Op {
    a: u32, a_stride: u32, b: u32, b_stride: u32,
    rows: u32, per_row: u32, columns: u32, out: u32,
    rho: u32, norms: u32, unused0: u32, unused1: u32,
}

var<workgroup> partial: array<f32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let j = group.x * 32u + t % 32u;
    let rows = run[op.rows] * op.per_row;
    var sum = 0.0;
    if j < op.columns {
        for (var m = t / 32u; m < rows; m += 8u) {
            var v = arena[op.a + m * op.a_stride + j];
            if op.b != NONE { v *= arena[op.b + m * op.b_stride + j]; }
            if op.rho != NONE { v *= arena[op.rho + m]; }
            sum += v;
        }
    }
    partial[t] = sum;
    workgroupBarrier();
    if t >= 32u || j >= op.columns { return; }
    var total = 0.0;
    for (var lane = 0u; lane < 8u; lane++) { total += partial[lane * 32u + t]; }
    if op.norms != NONE {
        let norm = arena[op.norms + j];
        if norm > 0.0 { total /= norm; } else { total = 0.0; }
    }
    gradients[op.out + j] += total;
}
