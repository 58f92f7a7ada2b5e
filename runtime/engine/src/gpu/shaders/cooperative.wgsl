// A tile of ROWS × COLUMNS results, 32 products at a time, by PARTS subgroups of 32 with PART_ROWS × PART_COLUMNS each, which
// multiply 16 × 16 cooperative matrices of half precision and add in single. X comes packed (`pack.wgsl`): `x` and `x_stride`
// count vectors of four. A block of weights is unpacked once for a tile; while one pair of operands is multiplied, the next is
// on its way from memory. Written out by `kernel.rs`: DECLARE sums, MULTIPLY 32 products, STORE.
const THREADS = PARTS * 32u;
// Vectors of a row in workgroup memory, two more than it has, for its banks.
const LEFT = 10u;
const RIGHT = select(10u, COLUMNS / 4u + 2u, TURNED);
// What an invocation brings up: vectors of X, units of W.
const VECTORS = ROWS * 8u / THREADS;
const UNITS = COLUMNS * 2u / THREADS;

var<workgroup> left: array<vec4<f16>, ROWS * LEFT>;
var<workgroup> right: array<vec4<f16>, select(COLUMNS, 32u, TURNED) * RIGHT>;
var<workgroup> results: array<f32, PARTS * 256u>;

// Unit number i of the 32 products' weights from k on.
fn weights_unit(i: u32, n0: u32, k: u32) -> Unit {
    var row = n0 + i / 2u;
    var at = k + (i % 2u) * 16u;
    var inside = row < op.columns && at < op.k;
    if TURNED {
        row = k + i / (COLUMNS / 16u);
        at = n0 + (i % (COLUMNS / 16u)) * 16u;
        inside = row < op.k && at < op.columns;
    }
    if !inside { return Unit(); }
    if TURNED { at += op.first; }
    return unpack(0u, op.weight + row * op.row_bytes, at);
}

fn store_tile(part: u32, lane: u32, m0: u32, n0: u32) {
    for (var i = lane; i < 64u; i += 32u) {
        let m = m0 + i / 4u;
        let n = n0 + (i % 4u) * 4u;
        if m >= run[op.rows] || n >= op.columns { continue; }
        let at = part * 256u + i * 4u;
        var y = vec4(results[at], results[at + 1u], results[at + 2u], results[at + 3u]);
        y *= arena[(op.scales + m) >> 2u][(op.scales + m) & 3u] * op.scale;
        if op.bias != NONE { y += constants[(op.bias + n) >> 2u]; }
        if op.residual != NONE { y += arena[(op.residual + m * op.out_stride + n) >> 2u]; }
        if op.cap > 0.0 { y = op.cap * tanh(clamp(y / op.cap, vec4(-15.0), vec4(15.0))); }
        arena[(op.out + m * op.out_stride + n) >> 2u] = y;
    }
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
    @builtin(subgroup_id) part: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let n_tile = (group.y * groups.x + group.x) * COLUMNS;
    let m_tile = group.z * ROWS;
    let row = part / (COLUMNS / PART_COLUMNS) * PART_ROWS;
    let column = part % (COLUMNS / PART_COLUMNS) * PART_COLUMNS;
    var x: array<vec4<f16>, VECTORS>;
    var w: array<Unit, UNITS>;
    for (var i = 0u; i < VECTORS; i++) {
        let at = i * THREADS + t;
        x[i] = packed[op.x + (m_tile + at / 8u) * op.x_stride + at % 8u];
    }
    for (var i = 0u; i < UNITS; i++) { w[i] = weights_unit(i * THREADS + t, n_tile, 0u); }
    /* DECLARE */
    for (var k = 0u; k < op.k; k += 32u) {
        workgroupBarrier();
        for (var i = 0u; i < VECTORS; i++) {
            let at = i * THREADS + t;
            left[at / 8u * LEFT + at % 8u] = x[i];
        }
        for (var i = 0u; i < UNITS; i++) {
            let at = i * THREADS + t;
            var to = at / 2u * RIGHT + at % 2u * 4u;
            if TURNED { to = at / (COLUMNS / 16u) * RIGHT + at % (COLUMNS / 16u) * 4u; }
            right[to] = vec4<f16>(w[i].a);
            right[to + 1u] = vec4<f16>(w[i].b);
            right[to + 2u] = vec4<f16>(w[i].c);
            right[to + 3u] = vec4<f16>(w[i].d);
        }
        workgroupBarrier();
        if k + 32u < op.k {
            for (var i = 0u; i < VECTORS; i++) {
                let at = i * THREADS + t;
                x[i] = packed[op.x + (m_tile + at / 8u) * op.x_stride + k / 4u + 8u + at % 8u];
            }
            for (var i = 0u; i < UNITS; i++) { w[i] = weights_unit(i * THREADS + t, n_tile, k + 32u); }
        }
        /* MULTIPLY */
    }
    let m0 = m_tile + row;
    let n0 = n_tile + column;
    workgroupBarrier();
    /* STORE */
}
