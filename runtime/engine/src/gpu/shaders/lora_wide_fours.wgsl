// `lora_wide.wgsl` for ranks that are multiples of eight: an invocation has four columns and eight rows.
const ROWS = 8u;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let n = (group.x * 64u + t) * 4u;
    let first = group.z * ROWS;
    let rows = run[op.rows];
    if n >= op.columns { return; }
    var sums: array<vec4<f32>, ROWS>;
    for (var j = 0u; j < op.k; j += 8u) {
        // TURNED: P's rows j to j + 8 at four columns. Else eight elements of four rows.
        var p: array<vec4<f32>, 8>;
        for (var i = 0u; i < 8u; i++) {
            let at = select(op.weight + (n + i / 2u) * op.row_bytes + j + 4u * (i % 2u), op.weight + (j + i) * op.row_bytes + n, TURNED);
            p[i] = params[at >> 2u];
        }
        for (var i = 0u; i < ROWS; i++) {
            let at = (op.x + min(first + i, rows - 1u) * op.x_stride + j) >> 2u;
            let a = arena[at];
            let b = arena[at + 1u];
            if TURNED {
                sums[i] += a.x * p[0] + a.y * p[1] + a.z * p[2] + a.w * p[3] + b.x * p[4] + b.y * p[5] + b.z * p[6] + b.w * p[7];
            } else {
                sums[i] += vec4(dot(a, p[0]) + dot(b, p[1]), dot(a, p[2]) + dot(b, p[3]),
                    dot(a, p[4]) + dot(b, p[5]), dot(a, p[6]) + dot(b, p[7]));
            }
        }
    }
    for (var i = 0u; i < ROWS; i++) {
        let m = first + i;
        if m >= rows { return; }
        var y = sums[i] * op.scale;
        if op.residual != NONE { y += arena[(op.residual + m * op.out_stride + n) >> 2u]; }
        arena[(op.out + m * op.out_stride + n) >> 2u] = y;
    }
}
