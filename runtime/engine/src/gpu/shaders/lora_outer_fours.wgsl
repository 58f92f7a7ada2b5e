// `lora_outer.wgsl` for ranks that are multiples of eight: 32 columns of W and eight of H a workgroup, an invocation with four
// and eight of them.
var<workgroup> partial: array<f32, 4096>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let across = op.k / 8u;
    let tile = group.y * groups.x + group.x;
    let quad = t % 8u;
    let lane = t / 8u;
    let n = (tile / across) * 32u + 4u * quad;
    let first = (tile % across) * 8u;
    let rows = run[op.rows];
    var sums: array<vec4<f32>, 8>;
    if n < op.columns {
        for (var m = group.z * 32u + lane; m < rows; m += 32u * op.slices) {
            let w = arena[(op.x + m * op.x_stride + n) >> 2u];
            let h = (op.weight + m * op.w_stride + first) >> 2u;
            let a = arena[h];
            let b = arena[h + 1u];
            for (var j = 0u; j < 4u; j++) {
                sums[j] += a[j] * w;
                sums[4u + j] += b[j] * w;
            }
        }
    }
    // Two of the four columns at a time: [column][j][lane][quad].
    for (var half = 0u; half < 4u; half += 2u) {
        workgroupBarrier();
        for (var j = 0u; j < 8u; j++) {
            partial[j * 256u + t] = sums[j][half];
            partial[2048u + j * 256u + t] = sums[j][half + 1u];
        }
        workgroupBarrier();
        let j = (t / 8u) % 8u;
        let column = (tile / across) * 32u + 4u * quad + half + t / 64u;
        if t < 128u && column < op.columns {
            var sum = 0.0;
            // Each begins elsewhere, so that no two wait for one bank.
            for (var l = 0u; l < 32u; l++) { sum += partial[(t / 64u) * 2048u + j * 256u + ((l + j) & 31u) * 8u + quad]; }
            let at = select(column * op.k + first + j, (first + j) * op.columns + column, TURNED);
            gradients[group.z * op.slice + op.out + at] += op.scale * sum;
        }
    }
}
