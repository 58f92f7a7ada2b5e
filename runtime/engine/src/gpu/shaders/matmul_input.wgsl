// Sixteen elements of a row of the input, zeros behind its end.
fn load_x(m: u32, rows: u32, k: u32) -> Unit {
    if m >= rows { return Unit(); }
    let i = op.x + m * op.x_stride + k;
    if k + 16u <= op.k {
        return Unit(vec4(arena[i], arena[i + 1u], arena[i + 2u], arena[i + 3u]),
            vec4(arena[i + 4u], arena[i + 5u], arena[i + 6u], arena[i + 7u]),
            vec4(arena[i + 8u], arena[i + 9u], arena[i + 10u], arena[i + 11u]),
            vec4(arena[i + 12u], arena[i + 13u], arena[i + 14u], arena[i + 15u]));
    }
    var v: array<vec4<f32>, 4>;
    for (var j = 0u; j < 16u; j++) {
        if k + j < op.k { v[j >> 2u][j & 3u] = arena[i + j]; }
    }
    return Unit(v[0], v[1], v[2], v[3]);
}
