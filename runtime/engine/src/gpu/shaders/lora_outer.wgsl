// The gradient of a trained matrix: `G[n][j] += scale·Σₘ W[m][n]·H[m][j]` of a wide and a narrow value, or with TURNED
// `G[j][n]`. Eight columns of W and eight of H a workgroup; 32 invocations to a column of W share the rows of the run.
// `x` is W, `weight` H, `k` H's width. Every slice of the gradients gets the sum of some of the rows (`add_slices.wgsl`).
const COLUMNS = 8u;
const STRIDE = 264u;
var<workgroup> partial: array<f32, COLUMNS * STRIDE>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let across = (op.k + 7u) / 8u;
    let tile = group.y * groups.x + group.x;
    let n = (tile / across) * 8u + t % 8u;
    let first = (tile % across) * COLUMNS;
    let rows = run[op.rows];
    var sums: array<f32, COLUMNS>;
    if n < op.columns {
        for (var m = group.z * 32u + t / 8u; m < rows; m += 32u * op.slices) {
            let w = arena[op.x + m * op.x_stride + n];
            for (var j = 0u; j < COLUMNS; j++) {
                sums[j] += w * arena[op.weight + m * op.w_stride + min(first + j, op.k - 1u)];
            }
        }
    }
    for (var j = 0u; j < COLUMNS; j++) { partial[j * STRIDE + t] = sums[j]; }
    workgroupBarrier();
    let j = first + t / 8u;
    if t >= 64u || n >= op.columns || j >= op.k { return; }
    var sum = 0.0;
    for (var l = 0u; l < 32u; l++) { sum += partial[(t / 8u) * STRIDE + l * 8u + t % 8u]; }
    gradients[group.z * op.slice + op.out + select(n * op.k + j, j * op.columns + n, TURNED)] += op.scale * sum;
}
