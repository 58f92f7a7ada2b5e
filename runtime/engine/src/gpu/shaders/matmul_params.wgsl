// A trained matrix of any width, `row_bytes` being its elements per row.
fn weight(row: u32, k: u32) -> Unit {
    var v: array<vec4<f32>, 4>;
    for (var j = 0u; j < 16u; j++) {
        if k + j < op.row_bytes { v[j >> 2u][j & 3u] = params[op.weight + row * op.row_bytes + k + j]; }
    }
    return Unit(v[0], v[1], v[2], v[3]);
}
