// Sums of eight columns of eight rows, each shared by 32 invocations.
const COLUMNS = 8u;
// A column's sums, eight apart in banks.
const STRIDE = 264u;
var<workgroup> partial: array<f32, COLUMNS * STRIDE>;

// The sum of column t % 8 of row t / 8.
fn narrow_sum(t: u32) -> f32 {
    var sum = 0.0;
    // Each begins elsewhere, so that no two wait for one bank.
    for (var l = 0u; l < 32u; l++) { sum += partial[(t % 8u) * STRIDE + t / 8u * 32u + ((l + t) & 31u)]; }
    return sum;
}
