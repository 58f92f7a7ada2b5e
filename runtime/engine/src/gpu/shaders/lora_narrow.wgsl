// A trained matrix with few rows: `out[m][j] = scale·Σₖ x[m][k]·P[j][k]`, with TURNED `P[k][j]`. Eight rows of x a workgroup,
// 32 invocations to each, which go along k side by side; eight columns at a time.

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let m = group.z * 8u + t / 32u;
    let first = group.x * COLUMNS;
    let rows = run[op.rows];
    var sums: array<f32, COLUMNS>;
    if m < rows {
        for (var k = t % 32u; k < op.k; k += 32u) {
            let x = arena[op.x + m * op.x_stride + k];
            for (var j = 0u; j < COLUMNS; j++) {
                // Columns behind the last are the last, and not stored.
                let column = min(first + j, op.columns - 1u);
                let at = select(column * op.row_bytes + k, k * op.row_bytes + column, TURNED);
                sums[j] += x * params[op.weight + at];
            }
        }
    }
    for (var j = 0u; j < COLUMNS; j++) { partial[j * STRIDE + t] = sums[j]; }
    workgroupBarrier();
    if t >= 64u { return; }
    let row = t / 8u;
    let column = first + t % 8u;
    if group.z * 8u + row < rows && column < op.columns { store(group.z * 8u + row, column, narrow_sum(t)); }
}
