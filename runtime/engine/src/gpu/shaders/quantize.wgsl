// Rows of a value as eight-bit numbers in blocks of 32, as the CPU has them, zeros behind the end: twelve words a block, eight of
// quants, their scale, and the sums of the first sixteen and the last, times the scale. With NORMED a row is RMS-normed before.
// What kernels of eight-bit products multiply. A row a workgroup, a block eight invocations; all is read by four.
struct Op { x: u32, stride: u32, k: u32, packed: u32, norm: u32, eps: f32, unused0: u32, unused1: u32 }

var<workgroup> tops: array<f32, 64>;
var<workgroup> sums: array<i32, 64>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row = group.z;
    let at = (op.x + row * op.stride) >> 2u;
    let vectors = op.k / 4u;
    var root = 1.0;
    if NORMED {
        var squares = 0.0;
        for (var i = t; i < vectors; i += 64u) { squares += dot(arena[at + i], arena[at + i]); }
        root = inverseSqrt(sum_all(t, squares) / f32(op.k) + op.eps);
    }
    let blocks = (op.k + 31u) / 32u;
    // The first of the block's invocations, and this one's word.
    let lead = t & 56u;
    let mine = t & 7u;
    for (var first = 0u; first < blocks; first += 8u) {
        let i = first * 8u + t;
        var v = vec4<f32>();
        if i < vectors {
            v = arena[at + i];
            if NORMED { v *= root * constants[(op.norm >> 2u) + i]; }
        }
        let size = abs(v);
        tops[t] = max(max(size.x, size.y), max(size.z, size.w));
        workgroupBarrier();
        var top = 0.0;
        for (var j = 0u; j < 8u; j++) { top = max(top, tops[lead + j]); }
        // What is next to nothing is nothing: its reciprocal would be infinite.
        let q = vec4<i32>(round(v * select(0.0, 127.0 / top, top > 1e-30)));
        sums[t] = q.x + q.y + q.z + q.w;
        workgroupBarrier();
        let block = first + t / 8u;
        if block < blocks {
            let to = (op.packed + (row * blocks + block) * 3u) * 4u;
            packed[to + mine] = pack4xI8(q);
            let scale = top / 127.0;
            if mine == 0u { packed[to + 8u] = bitcast<u32>(scale); }
            if (mine & 3u) == 0u {
                let sum = sums[t] + sums[t + 1u] + sums[t + 2u] + sums[t + 3u];
                packed[to + 9u + mine / 4u] = bitcast<u32>(scale * f32(sum));
            }
        }
    }
}
