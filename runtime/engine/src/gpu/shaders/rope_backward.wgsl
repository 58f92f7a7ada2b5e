// Gradient of the rotation and the head norms, a head of a row a workgroup.
struct Op {
    q: u32, k: u32, dq: u32, dk: u32,
    q_out: u32, k_out: u32, unused0: u32, unused1: u32,
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
    load_head(NONE, op.turn.eps, t, select(op.dk, op.dq, is_query) + at, dim);
    let to = select(op.k_out, op.q_out, is_query) + at;
    let x = select(op.k, op.q, is_query) + at;
    if norm == NONE {
        for (var i = t; i < dim; i += 64u) { arena[to + i] = turned(op.turn, row, i, -1.0); }
        return;
    }
    var squares = 0.0;
    var products = 0.0;
    for (var i = t; i < dim; i += 64u) {
        let v = arena[x + i];
        squares += v * v;
        products += v * turned(op.turn, row, i, -1.0) * constants[norm + i];
    }
    let n = f32(dim);
    let rho = inverseSqrt(sum_all(t, squares) / n + op.turn.eps);
    let shift = rho * rho * rho * sum_all(t, products) / n;
    for (var i = t; i < dim; i += 64u) {
        arena[to + i] = rho * turned(op.turn, row, i, -1.0) * constants[norm + i] - shift * arena[x + i];
    }
}
