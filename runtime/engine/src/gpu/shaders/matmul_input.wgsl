// Tiles of 64 × 64 results, 16 products at a time: 64 invocations with 8 × 8 sums each. A block of weights is unpacked once
// for a tile. Rows of `left` and columns of `right` are five or sixteen vectors apart: no two invocations wait for one bank.
var<workgroup> left: array<vec4<f32>, 320>;
var<workgroup> right: array<vec4<f32>, 320>;

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
