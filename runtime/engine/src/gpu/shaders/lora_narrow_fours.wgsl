// `lora_narrow.wgsl` for ranks that are multiples of eight: everything is read by four.

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let m = group.z * 8u + t / 32u;
    let first = group.x * COLUMNS;
    let rows = run[op.rows];
    var sums: array<vec4<f32>, 8>;
    if m < rows {
        let x_at = (op.x + m * op.x_stride) >> 2u;
        for (var k = t % 32u; k < op.k / 4u; k += 32u) {
            let x = arena[x_at + k];
            if TURNED {
                // Four rows of P, eight columns of each: two vectors of sums.
                for (var i = 0u; i < 4u; i++) {
                    let at = (op.weight + (4u * k + i) * op.row_bytes + first) >> 2u;
                    sums[0] += x[i] * params[at];
                    sums[1] += x[i] * params[at + 1u];
                }
            } else {
                for (var j = 0u; j < 8u; j++) {
                    sums[j] += x * params[((op.weight + (first + j) * op.row_bytes) >> 2u) + k];
                }
            }
        }
    }
    for (var j = 0u; j < COLUMNS; j++) {
        var sum = dot(sums[j], vec4(1.0));
        if TURNED { sum = sums[j >> 2u][j & 3u]; }
        partial[j * STRIDE + t] = sum;
    }
    workgroupBarrier();
    if t >= 64u { return; }
    let row = group.z * 8u + t / 8u;
    if row < rows {
        let at = op.out + row * op.out_stride + first + t % 8u;
        var y = narrow_sum(t) * op.scale;
        if op.residual != NONE {
            let r = op.residual + row * op.out_stride + first + t % 8u;
            y += arena[r >> 2u][r & 3u];
        }
        arena[at >> 2u][at & 3u] = y;
    }
}
