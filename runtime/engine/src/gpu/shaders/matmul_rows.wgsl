// Sums of 8 × 8 results: rows ty + 8·i, columns tx + 8·j.
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let n0 = (group.y * groups.x + group.x) * 64u;
    let m0 = group.z * 64u;
    let rows = run[op.rows];
    let tx = t % 8u;
    let ty = t / 8u;
    var sums: array<array<f32, 8>, 8>;
    for (var k = 0u; k < op.k; k += 16u) {
        let x = load_x(m0 + t, rows, k);
        var w = Unit();
        if n0 + t < op.columns { w = weight(n0 + t, k); }
        workgroupBarrier();
        let at = t * 5u;
        left[at] = x.a; left[at + 1u] = x.b; left[at + 2u] = x.c; left[at + 3u] = x.d;
        right[at] = w.a; right[at + 1u] = w.b; right[at + 2u] = w.c; right[at + 3u] = w.d;
        workgroupBarrier();
        for (var q = 0u; q < 4u; q++) {
            var r: array<vec4<f32>, 8>;
            for (var j = 0u; j < 8u; j++) { r[j] = right[(tx + 8u * j) * 5u + q]; }
            for (var i = 0u; i < 8u; i++) {
                let l = left[(ty + 8u * i) * 5u + q];
                for (var j = 0u; j < 8u; j++) { sums[i][j] += dot(l, r[j]); }
            }
        }
    }
    for (var i = 0u; i < 8u; i++) {
        let m = m0 + ty + 8u * i;
        if m >= rows { continue; }
        for (var j = 0u; j < 8u; j++) {
            let n = n0 + tx + 8u * j;
            if n < op.columns { store(m, n, sums[i][j]); }
        }
    }
}
