// A few rows times up to three matrices: `out = x·Wᵀ + b`, for decoding. LANES invocations share a row of the matrix,
// sixteen weights at a time: PRODUCTS are those of single precision (`matvec_single.wgsl`) or of eight bits
// (`matvec_int8.wgsl`) for all ROWS rows of x, which `matvec_tree.wgsl` or `matvec_subgroup.wgsl` add up. With NORMED x is
// RMS-normed on the way: the norm's weights multiply the matrix' and the root is taken from sums that run along. With GATED the
// two matrices are a gate and its other half. The arena is read and written by four.

struct Part { weight: u32, row_bytes: u32, rows: u32, out: u32, bias: u32, kind: u32, stride: u32, unused: u32 }
struct Op {
    x: u32, k: u32, rows: u32, parts: u32,
    norm: u32, eps: f32, residual: u32, out: u32,
    cap: f32, total: u32, unused0: u32, unused1: u32,
    part: array<Part, 3>,
}

const MATRICES = select(1u, 2u, GATED);
const SUMS = ROWS * MATRICES + select(0u, ROWS, NORMED);
const PER_GROUP = THREADS / LANES;
var<workgroup> partial: array<f32, THREADS * SUMS>;

// A row's sum, once its lanes have added theirs up.
fn total(sum: u32, row: u32) -> f32 { return partial[sum * THREADS + row * LANES]; }

// The same for four rows of a matrix.
fn four(sum: u32, row: u32) -> vec4<f32> {
    return vec4(total(sum, row), total(sum, row + 1u), total(sum, row + 2u), total(sum, row + 3u));
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let first = (group.y * groups.x + group.x) * PER_GROUP;
    let lane = t % LANES;
    var row = first + t / LANES;
    var p = 0u;
    if !GATED {
        while p + 1u < op.parts && row >= op.part[p].rows { row -= op.part[p].rows; p++; }
    }
    var sums: array<f32, SUMS>;
    if row < op.part[p].rows {
        let base = op.part[p].weight + row * op.part[p].row_bytes;
        let other = op.part[1].weight + row * op.part[1].row_bytes;
        /* PRODUCTS */
    }
    for (var s = 0u; s < SUMS; s++) { partial[s * THREADS + t] = across(sums[s]); }
    workgroupBarrier();
    add_lanes(t, lane);
    // Four rows of the matrix and one of x an invocation.
    let quads = PER_GROUP / 4u;
    for (var job = t; job < quads * ROWS; job += THREADS) {
        let m = job / quads;
        let r = (job % quads) * 4u;
        var o = first + r;
        var q = 0u;
        if !GATED {
            while q + 1u < op.parts && o >= op.part[q].rows { o -= op.part[q].rows; q++; }
        }
        if m >= run[op.rows] || o >= op.part[q].rows { continue; }
        var y = four(m, r);
        var scale = 1.0;
        if NORMED {
            scale = inverseSqrt(total(ROWS * MATRICES + m, r) / f32(op.k) + op.eps);
            y *= scale;
        }
        if op.part[q].bias != NONE { y += constants[(op.part[q].bias + o) >> 2u]; }
        if GATED {
            var u = four(ROWS + m, r) * scale;
            if op.part[1].bias != NONE { u += constants[(op.part[1].bias + o) >> 2u]; }
            arena[(op.out + m * op.part[0].stride + o) >> 2u] = vec4(gate(y.x), gate(y.y), gate(y.z), gate(y.w)) * u;
        } else {
            let i = (op.part[q].out + m * op.part[q].stride + o) >> 2u;
            if op.residual != NONE { y += arena[(op.residual + m * op.part[q].stride + o) >> 2u]; }
            if op.cap > 0.0 { y = op.cap * tanh(clamp(y / op.cap, vec4(-15.0), vec4(15.0))); }
            arena[i] = y;
        }
    }
}
