// Rows of a value as half-precision numbers between −2 and 2 with a power of two for the row, which goes among the scales;
// rows are filled up with zeros to `padded`. What cooperative matrices multiply. A row a workgroup.
struct Op { x: u32, stride: u32, k: u32, padded: u32, scales: u32, packed: u32, unused0: u32, unused1: u32 }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row = group.z;
    let at = op.x + row * op.stride;
    var top = 0.0;
    for (var i = t; i < op.k; i += 64u) { top = max(top, abs(arena[at + i])); }
    let exponent = bitcast<u32>(max_all(t, top)) & 0x7f800000u;
    if t == 0u { arena[op.scales + row] = bitcast<f32>(exponent); }
    let down = bitcast<f32>(0x7f000000u - min(exponent, 0x7e800000u));
    let to = op.packed + row * op.padded / 4u;
    for (var i = t; i < op.padded / 4u; i += 64u) {
        var v = vec4<f32>();
        for (var j = 0u; j < 4u; j++) {
            if 4u * i + j < op.k { v[j] = arena[at + 4u * i + j] * down; }
        }
        packed[to + i] = vec4<f16>(v);
    }
}
