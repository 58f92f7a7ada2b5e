// Moves positions of a sequence's cache down by `drop`, a row a workgroup: values as they are, keys turned back by as many
// positions where the layer turns them. No more than `drop` rows are moved at once, so that none is written before it is
// read. The table of rotations has a single row, the angles of `drop` positions.
struct Op {
    pages: u32, first: u32, drop: u32, unused: u32,
    kv: Kv,
    turn: Turning,
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let dim = op.kv.head_dim;
    let part = group.x / op.kv.kv_heads;
    let h = group.x % op.kv.kv_heads;
    let to = op.first + group.z;
    let i = 4u * t;
    var v = vec4<f32>();
    if i < dim {
        v = kv_load(dim, kv_row(op.kv, op.pages, to + op.drop, part, h), i);
        for (var n = 0u; n < 4u; n++) { head[i + n] = v[n]; }
    }
    workgroupBarrier();
    if part == 0u && i < dim {
        let turn = op.turn;
        v = vec4(turned(turn, 0u, i, -1.0), turned(turn, 0u, i + 1u, -1.0), turned(turn, 0u, i + 2u, -1.0), turned(turn, 0u, i + 3u, -1.0));
    }
    kv_store(dim, kv_row(op.kv, op.pages, to, part, h), t, v, true);
}
