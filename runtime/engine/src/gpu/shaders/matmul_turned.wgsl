// Sums of 8 × 8 results: rows ty + 8·i, columns 4·tx … and 32 + 4·tx ….
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let n0 = (group.y * groups.x + group.x) * 64u;
    let m0 = group.z * 64u;
    let rows = run[op.rows];
    let tx = t % 8u;
    let ty = t / 8u;
    var low: array<vec4<f32>, 8>;
    var high: array<vec4<f32>, 8>;
    for (var k = 0u; k < op.k; k += 16u) {
        let x = load_x(m0 + t, rows, k);
        // Sixteen columns of one row of the matrix an invocation.
        let wr = k + t / 4u;
        let wc = n0 + (t % 4u) * 16u;
        var w = Unit();
        if wr < op.k && wc < op.columns { w = weight(wr, op.first + wc); }
        workgroupBarrier();
        let at = t * 5u;
        left[at] = x.a; left[at + 1u] = x.b; left[at + 2u] = x.c; left[at + 3u] = x.d;
        let to = t * 4u;
        right[to] = w.a; right[to + 1u] = w.b; right[to + 2u] = w.c; right[to + 3u] = w.d;
        workgroupBarrier();
        for (var q = 0u; q < 4u; q++) {
            var a: array<vec4<f32>, 4>;
            var b: array<vec4<f32>, 4>;
            for (var j = 0u; j < 4u; j++) {
                a[j] = right[(q * 4u + j) * 16u + tx];
                b[j] = right[(q * 4u + j) * 16u + 8u + tx];
            }
            for (var i = 0u; i < 8u; i++) {
                let l = left[(ty + 8u * i) * 5u + q];
                low[i] += l.x * a[0] + l.y * a[1] + l.z * a[2] + l.w * a[3];
                high[i] += l.x * b[0] + l.y * b[1] + l.z * b[2] + l.w * b[3];
            }
        }
    }
    for (var i = 0u; i < 8u; i++) {
        let m = m0 + ty + 8u * i;
        if m >= rows { continue; }
        for (var j = 0u; j < 4u; j++) {
            let n = n0 + 4u * tx + j;
            if n < op.columns { store(m, n, low[i][j]); }
            if n + 32u < op.columns { store(m, n + 32u, high[i][j]); }
        }
    }
}
