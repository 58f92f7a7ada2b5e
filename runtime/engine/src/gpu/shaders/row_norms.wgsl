// Lengths of a matrix' rows with an adapter, `‖W[o] + scale·B[o]·A‖`, a row a workgroup; `first` is the piece's first row.
struct Op {
    weight: u32, row_bytes: u32, width: u32, first: u32,
    rows: u32, a: u32, b: u32, rank: u32,
    scale: f32, out: u32, unused0: u32, unused1: u32,
}

fn four(at: u32) -> vec4<f32> { return vec4(params[at], params[at + 1u], params[at + 2u], params[at + 3u]); }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let o = group.y * groups.x + group.x;
    if o >= op.rows { return; }
    let row = op.first + o;
    var sum = 0.0;
    for (var k = t * 16u; k < op.width; k += 1024u) {
        var w = unpack(0u, op.weight + o * op.row_bytes, k);
        for (var r = 0u; r < op.rank; r++) {
            let c = op.scale * params[op.b + row * op.rank + r];
            let at = op.a + r * op.width + k;
            w.a += c * four(at);
            w.b += c * four(at + 4u);
            w.c += c * four(at + 8u);
            w.d += c * four(at + 12u);
        }
        sum += dot(w.a, w.a) + dot(w.b, w.b) + dot(w.c, w.c) + dot(w.d, w.d);
    }
    sum = sum_all(t, sum);
    if t == 0u { arena[op.out + row] = sqrt(sum); }
}
