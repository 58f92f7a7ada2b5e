// Tiles of 64 × 64 results by products of eight bits, 32 at a time: 64 invocations with 8 × 8 sums each, rows ty + 8·i, columns
// tx + 8·j. X comes quantized (`quantize.wgsl`), in whole tiles of rows: `x` and `x_stride` count vectors. A row of `left` and a
// column of `right` are three vectors: quants, and what they stand for. With HALVES sixteen weights have a scale of their own,
// else 32.
var<workgroup> left: array<vec4<u32>, 192>;
var<workgroup> right: array<vec4<u32>, 192>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let n0 = (group.y * groups.x + group.x) * 64u;
    let m0 = group.z * 64u;
    let rows = run[op.rows];
    let tx = t % 8u;
    let ty = t / 8u;
    var sums: array<array<f32, 8>, 8>;
    for (var k = 0u; k < op.k; k += 32u) {
        let x = op.x + (m0 + t) * op.x_stride + k / 32u * 3u;
        let x0 = packed[x];
        let x1 = packed[x + 1u];
        let x2 = packed[x + 2u];
        var w = Codes();
        var v = Codes();
        if n0 + t < op.columns {
            let row = op.weight + (n0 + t) * op.row_bytes;
            w = codes(0u, row, k);
            v = codes(0u, row, k + 16u);
        }
        workgroupBarrier();
        left[t * 3u] = x0;
        left[t * 3u + 1u] = x1;
        left[t * 3u + 2u] = x2;
        right[t * 3u] = w.q;
        right[t * 3u + 1u] = v.q;
        right[t * 3u + 2u] = bitcast<vec4<u32>>(vec4(w.scale, w.offset, v.scale, v.offset));
        workgroupBarrier();
        // Four columns at a time: all eight would take too many registers.
        for (var part = 0u; part < 8u; part += 4u) {
            var q0: array<vec4<u32>, 4>;
            var q1: array<vec4<u32>, 4>;
            var standing: array<vec4<f32>, 4>;
            for (var j = 0u; j < 4u; j++) {
                let at = (tx + 8u * (part + j)) * 3u;
                q0[j] = right[at];
                q1[j] = right[at + 1u];
                standing[j] = bitcast<vec4<f32>>(right[at + 2u]);
            }
            for (var i = 0u; i < 8u; i++) {
                let at = (ty + 8u * i) * 3u;
                let l0 = left[at];
                let l1 = left[at + 1u];
                let about = bitcast<vec4<f32>>(left[at + 2u]);
                for (var j = 0u; j < 4u; j++) {
                    let first = products(l0, q0[j]);
                    let second = products(l1, q1[j]);
                    var sum = 0.0;
                    if HALVES {
                        sum = (standing[j].x * f32(first) + standing[j].z * f32(second)) * about.x;
                        sum += standing[j].y * about.y + standing[j].w * about.z;
                    } else {
                        sum = standing[j].x * f32(first + second) * about.x + standing[j].y * (about.y + about.z);
                    }
                    sums[i][part + j] += sum;
                }
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
