// Sums of 8 × 8 results: rows 4·ty … and 32 + 4·ty …, columns likewise. `x` is P, [k][m], and `weight` the offset of Q,
// [k][n], both in the arena.
fn four(base: u32, row: u32, stride: u32, column: u32, columns: u32) -> vec4<f32> {
    var v = vec4<f32>();
    for (var j = 0u; j < 4u; j++) {
        if column + j < columns { v[j] = arena[base + row * stride + column + j]; }
    }
    return v;
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let tile = group.y * groups.x + group.x;
    let across = (op.columns + 63u) / 64u;
    let n0 = (tile % across) * 64u;
    let m0 = (tile / across) * 64u;
    let rows = run[op.rows];
    let tx = t % 8u;
    let ty = t / 8u;
    var sums: array<vec4<f32>, 16>;
    for (var k = 0u; k < rows; k += 16u) {
        workgroupBarrier();
        for (var i = 0u; i < 4u; i++) {
            let at = i * 64u + t;
            let r = k + at / 16u;
            let c = (at % 16u) * 4u;
            var l = vec4<f32>();
            var q = vec4<f32>();
            if r < rows {
                l = four(op.x, r, op.x_stride, m0 + c, op.m);
                q = four(op.weight, r, op.w_stride, n0 + c, op.columns);
            }
            left[at] = l;
            right[at] = q;
        }
        workgroupBarrier();
        for (var r = 0u; r < 16u; r++) {
            let l0 = left[r * 16u + ty];
            let l1 = left[r * 16u + 8u + ty];
            let q0 = right[r * 16u + tx];
            let q1 = right[r * 16u + 8u + tx];
            for (var i = 0u; i < 4u; i++) {
                sums[i * 4u] += l0[i] * q0;
                sums[i * 4u + 1u] += l0[i] * q1;
                sums[i * 4u + 2u] += l1[i] * q0;
                sums[i * 4u + 3u] += l1[i] * q1;
            }
        }
    }
    for (var i = 0u; i < 4u; i++) {
        for (var part = 0u; part < 4u; part++) {
            let m = m0 + 4u * ty + i + 32u * (part / 2u);
            if m >= op.m { continue; }
            for (var j = 0u; j < 4u; j++) {
                let n = n0 + 4u * tx + j + 32u * (part % 2u);
                if n < op.columns { gradients[op.out + m * op.out_stride + n] += op.scale * sums[i * 4u + part][j]; }
            }
        }
    }
}
