// `out = dx + ρ·u − x·ρ³·mean(u ∘ x)` with u = dy ∘ w and ρ = 1/√(mean x² + ε), a row a workgroup.
struct Op { x: u32, width: u32, norm: u32, eps: f32, dy: u32, dx: u32, out: u32, unused: u32 }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let at = group.z * op.width;
    var squares = 0.0;
    var products = 0.0;
    for (var i = t; i < op.width; i += 64u) {
        let x = arena[op.x + at + i];
        squares += x * x;
        products += x * arena[op.dy + at + i] * constants[op.norm + i];
    }
    let n = f32(op.width);
    let rho = inverseSqrt(sum_all(t, squares) / n + op.eps);
    let shift = rho * rho * rho * sum_all(t, products) / n;
    for (var i = t; i < op.width; i += 64u) {
        var v = rho * arena[op.dy + at + i] * constants[op.norm + i] - shift * arena[op.x + at + i];
        if op.dx != NONE { v += arena[op.dx + at + i]; }
        arena[op.out + at + i] = v;
    }
}
