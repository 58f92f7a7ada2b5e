// `out = cap(magnitude/norms ∘ y + bias + residual)`, a row a workgroup; what is NONE is left out, a norm of 0 makes 0.
struct Op {
    y: u32, width: u32, stride: u32, out: u32,
    magnitude: u32, norms: u32, bias: u32, residual: u32,
    cap: f32, unused0: u32, unused1: u32, unused2: u32,
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let at = group.z * op.stride;
    for (var i = t; i < op.width; i += 64u) {
        var v = arena[op.y + at + i];
        if op.magnitude != NONE {
            var norm = 1.0;
            if op.norms != NONE { norm = arena[op.norms + i]; }
            if norm > 0.0 { v *= params[op.magnitude + i] / norm; } else { v = 0.0; }
        }
        if op.bias != NONE { v += constants[op.bias + i]; }
        if op.residual != NONE { v += arena[op.residual + at + i]; }
        if op.cap > 0.0 { v = op.cap * tanh(clamp(v / op.cap, -15.0, 15.0)); }
        arena[op.out + at + i] = v;
    }
}
