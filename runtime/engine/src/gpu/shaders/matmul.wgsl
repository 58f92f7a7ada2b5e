// Tiles of 64 × 64 results, 16 products at a time: 64 invocations with 8 × 8 sums each. A block of weights is unpacked once
// for a tile. One of three operands' layouts, which `load` and `multiply` of `matmul_*.wgsl` know:
//   rows   C[m][n] = Σₖ X[m][k]·W[n][k]: a linear map
//   turned C[m][n] = Σₖ X[m][k]·W[k][n]: its gradient
//   outer  C[m][n] = Σₖ P[k][m]·Q[k][n]: the gradient of a matrix, k the rows of the run

struct Op {
    x: u32, x_stride: u32, rows: u32, k: u32,
    weight: u32, row_bytes: u32, columns: u32, out: u32,
    out_stride: u32, bias: u32, residual: u32, scale: f32,
    cap: f32, m: u32, w_stride: u32, first: u32,
}

// Rows of `left` and columns of `right`, five or sixteen vectors apart: no two invocations wait for one bank.
var<workgroup> left: array<vec4<f32>, 320>;
var<workgroup> right: array<vec4<f32>, 320>;
