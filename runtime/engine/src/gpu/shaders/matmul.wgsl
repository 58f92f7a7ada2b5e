// A product of many rows, C[m][n] = scale·Σₖ X[m][k]·W: a linear map where W is [n][k], its gradient where it is [k][n].
struct Op {
    x: u32, x_stride: u32, rows: u32, k: u32,
    weight: u32, row_bytes: u32, columns: u32, out: u32,
    out_stride: u32, bias: u32, residual: u32, scale: f32,
    cap: f32, scales: u32, w_stride: u32, first: u32,
    slice: u32, slices: u32, unused0: u32, unused1: u32,
}
