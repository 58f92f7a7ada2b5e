// A trained matrix with few columns: `out[m][n] = residual[m][n] + scale·Σⱼ x[m][j]·P[n][j]`, with TURNED `P[j][n]`. An
// invocation has one n and eight rows of x.
const ROWS = 8u;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let n = group.x * 64u + t;
    let first = group.z * ROWS;
    let rows = run[op.rows];
    if n >= op.columns { return; }
    var sums: array<f32, ROWS>;
    for (var begin = 0u; begin < op.k; begin += 8u) {
        var p: array<f32, 8>;
        for (var j = 0u; j < 8u; j++) {
            let k = min(begin + j, op.k - 1u);
            let at = select(n * op.row_bytes + k, k * op.row_bytes + n, TURNED);
            p[j] = select(0.0, params[op.weight + at], begin + j < op.k);
        }
        for (var i = 0u; i < ROWS; i++) {
            let at = op.x + min(first + i, rows - 1u) * op.x_stride;
            for (var j = 0u; j < 8u; j++) { sums[i] += arena[at + min(begin + j, op.k - 1u)] * p[j]; }
        }
    }
    for (var i = 0u; i < ROWS; i++) {
        if first + i < rows { store(first + i, n, sums[i]); }
    }
}
