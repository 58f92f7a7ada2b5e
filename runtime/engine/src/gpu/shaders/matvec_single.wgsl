// Products in single precision.
for (var k = lane * 16u; k < op.k; k += LANES * 16u) {
    var w = unpack(op.part[p].kind, base, k);
    var v = w;
    if GATED { v = unpack(op.part[1].kind, other, k); }
    if NORMED {
        let n = (op.norm + k) >> 2u;
        let g = Unit(constants[n], constants[n + 1u], constants[n + 2u], constants[n + 3u]);
        w = Unit(w.a * g.a, w.b * g.b, w.c * g.c, w.d * g.d);
        if GATED { v = Unit(v.a * g.a, v.b * g.b, v.c * g.c, v.d * g.d); }
    }
    for (var m = 0u; m < ROWS; m++) {
        let i = (op.x + m * op.k + k) >> 2u;
        let x = Unit(arena[i], arena[i + 1u], arena[i + 2u], arena[i + 3u]);
        sums[m] += dot(w.a, x.a) + dot(w.b, x.b) + dot(w.c, x.c) + dot(w.d, x.d);
        if GATED { sums[ROWS + m] += dot(v.a, x.a) + dot(v.b, x.b) + dot(v.c, x.c) + dot(v.d, x.d); }
        if NORMED {
            sums[ROWS * MATRICES + m] += dot(x.a, x.a) + dot(x.b, x.b) + dot(x.c, x.c) + dot(x.d, x.d);
        }
    }
}
