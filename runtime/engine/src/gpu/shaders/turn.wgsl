// Norm and rotation of one head of a row, D ≤ 256, by GROUP invocations.
struct Turning { q_norm: u32, k_norm: u32, eps: f32, dims: u32, table: u32, halves: u32, unused0: u32, unused1: u32 }

var<workgroup> head: array<f32, 256>;

// Component i of a head that lies in `head`, turned by the row's angles (backwards with sign −1).
fn turned(turn: Turning, row: u32, i: u32, sign: f32) -> f32 {
    if i >= turn.dims { return head[i]; }
    let pairs = turn.dims / 2u;
    var pair = i / 2u;
    var other = i ^ 1u;
    var first = (i & 1u) == 0u;
    if turn.halves == 1u {
        pair = i % pairs;
        first = i < pairs;
        other = select(i - pairs, i + pairs, first);
    }
    let at = run[4] + row * run[5] + turn.table;
    let c = bitcast<f32>(run[at + pair]);
    let s = bitcast<f32>(run[at + pairs + pair]) * select(sign, -sign, first);
    return head[i] * c + head[other] * s;
}

// Brings a head into `head`, normed if there is a norm.
fn load_head(norm: u32, eps: f32, t: u32, at: u32, dim: u32) {
    var sum = 0.0;
    workgroupBarrier();
    for (var i = t; i < dim; i += GROUP) {
        let v = arena[at + i];
        head[i] = v;
        sum += v * v;
    }
    workgroupBarrier();
    if norm != NONE {
        let rho = inverseSqrt(sum_all(t, sum) / f32(dim) + eps);
        for (var i = t; i < dim; i += GROUP) { head[i] *= rho * constants[norm + i]; }
        workgroupBarrier();
    }
}
