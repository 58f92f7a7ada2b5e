// Gradient of the rotation and the head norms, a head of a row a workgroup.
struct Op {
    q: u32, k: u32, dq: u32, dk: u32,
    q_out: u32, k_out: u32, unused0: u32, unused1: u32,
    kv: Kv,
    q_norm: u32, k_norm: u32, eps: f32, dims: u32,
    table: u32, halves: u32, unused2: u32, unused3: u32,
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row = group.z;
    let dim = op.kv.head_dim;
    let is_query = group.x < op.kv.heads;
    let h = select(group.x - op.kv.heads, group.x, is_query);
    let heads = select(op.kv.kv_heads, op.kv.heads, is_query);
    let at = (row * heads + h) * dim;
    let norm = select(op.k_norm, op.q_norm, is_query);
    let turn = Turn(NONE, op.eps, op.dims, op.table, op.halves);
    load_head(turn, t, select(op.dk, op.dq, is_query) + at, dim);
    let to = select(op.k_out, op.q_out, is_query) + at;
    let x = select(op.k, op.q, is_query) + at;
    if norm == NONE {
        for (var i = t; i < dim; i += 64u) { arena[to + i] = turned(turn, row, i, -1.0); }
        return;
    }
    var squares = 0.0;
    var products = 0.0;
    for (var i = t; i < dim; i += 64u) {
        let v = arena[x + i];
        squares += v * v;
        products += v * turned(turn, row, i, -1.0) * constants[norm + i];
    }
    let n = f32(dim);
    let rho = inverseSqrt(sum_all(t, squares) / n + op.eps);
    let shift = rho * rho * rho * sum_all(t, products) / n;
    for (var i = t; i < dim; i += 64u) {
        arena[to + i] = rho * turned(turn, row, i, -1.0) * constants[norm + i] - shift * arena[x + i];
    }
}
