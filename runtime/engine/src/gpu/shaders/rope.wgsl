// Head norm and rotation of queries and keys, a head of a row a workgroup; keys and values then enter the cache.
struct Op {
    q: u32, k: u32, v: u32, q_out: u32,
    k_out: u32, cached: u32, unused0: u32, unused1: u32,
    kv: Kv,
    turn: Turning,
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row = group.z;
    let dim = op.kv.head_dim;
    let is_query = group.x < op.kv.heads;
    let h = select(group.x - op.kv.heads, group.x, is_query);
    let heads = select(op.kv.kv_heads, op.kv.heads, is_query);
    let at = (row * heads + h) * dim;
    let norm = select(op.turn.k_norm, op.turn.q_norm, is_query);
    load_head(norm, op.turn.eps, t, select(op.k, op.q, is_query) + at, dim);
    let to = select(op.k_out, op.q_out, is_query) + at;
    for (var i = t; i < dim; i += 64u) { arena[to + i] = turned(op.turn, row, i, 1.0); }
    if is_query || op.cached == 0u { return; }
    let record = row_record(row);
    let i = 4u * t;
    var key = vec4<f32>();
    var value = vec4<f32>();
    if i < dim {
        let turn = op.turn;
        key = vec4(turned(turn, row, i, 1.0), turned(turn, row, i + 1u, 1.0), turned(turn, row, i + 2u, 1.0), turned(turn, row, i + 3u, 1.0));
        let source = op.v + at + i;
        value = vec4(arena[source], arena[source + 1u], arena[source + 2u], arena[source + 3u]);
    }
    kv_store(dim, kv_row(op.kv, record.start, record.position, 0u, h), t, key, true);
    kv_store(dim, kv_row(op.kv, record.start, record.position, 1u, h), t, value, true);
}
