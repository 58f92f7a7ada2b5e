// `out = residual + y/√(mean y² + ε) ∘ w`, a row a workgroup; without residual when there is none.
struct Op { y: u32, width: u32, rows: u32, norm: u32, eps: f32, residual: u32, out: u32, unused: u32 }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let at = group.z * op.width;
    var sum = 0.0;
    for (var i = t; i < op.width; i += 64u) {
        let y = arena[op.y + at + i];
        sum += y * y;
    }
    let rho = inverseSqrt(sum_all(t, sum) / f32(op.width) + op.eps);
    for (var i = t; i < op.width; i += 64u) {
        var v = arena[op.y + at + i] * rho * constants[op.norm + i];
        if op.residual != NONE { v += arena[op.residual + at + i]; }
        arena[op.out + at + i] = v;
    }
}
