// The gradient of a matrix of the model: `G[n][j] += scale·Σₘ W[m][n]·H[m][j]`, with the operands of `lora_outer.wgsl`. Tiles of
// 64 × 64, sixteen rows at a time: 64 invocations with 8 × 8 sums each, of all rows of the run.
var<workgroup> left: array<f32, 1024>;
var<workgroup> right: array<f32, 1024>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let across = (op.k + 63u) / 64u;
    let tile = group.y * groups.x + group.x;
    let n0 = (tile / across) * 64u;
    let j0 = (tile % across) * 64u;
    let rows = run[op.rows];
    let tx = t % 8u;
    let ty = t / 8u;
    var sums: array<array<f32, 8>, 8>;
    for (var first = 0u; first < rows; first += 16u) {
        workgroupBarrier();
        for (var i = 0u; i < 16u; i++) {
            let m = first + i;
            var w = 0.0;
            var h = 0.0;
            if m < rows && n0 + t < op.columns { w = arena[op.x + m * op.x_stride + n0 + t]; }
            if m < rows && j0 + t < op.k { h = arena[op.weight + m * op.w_stride + j0 + t]; }
            left[i * 64u + t] = w;
            right[i * 64u + t] = h;
        }
        workgroupBarrier();
        for (var i = 0u; i < 16u; i++) {
            var r: array<f32, 8>;
            for (var b = 0u; b < 8u; b++) { r[b] = right[i * 64u + tx + 8u * b]; }
            for (var a = 0u; a < 8u; a++) {
                let l = left[i * 64u + ty + 8u * a];
                for (var b = 0u; b < 8u; b++) { sums[a][b] += l * r[b]; }
            }
        }
    }
    for (var a = 0u; a < 8u; a++) {
        let n = n0 + ty + 8u * a;
        if n >= op.columns { continue; }
        for (var b = 0u; b < 8u; b++) {
            let j = j0 + tx + 8u * b;
            if j < op.k { gradients[op.out + n * op.k + j] += op.scale * sums[a][b]; }
        }
    }
}
