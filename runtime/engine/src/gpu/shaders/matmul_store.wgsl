fn store(m: u32, n: u32, sum: f32) {
    var y = sum * op.scale;
    if op.bias != NONE { y += constants[op.bias + n]; }
    if op.residual != NONE { y += arena[op.residual + m * op.out_stride + n]; }
    if op.cap > 0.0 { y = op.cap * tanh(clamp(y / op.cap, -15.0, 15.0)); }
    arena[op.out + m * op.out_stride + n] = y;
}
