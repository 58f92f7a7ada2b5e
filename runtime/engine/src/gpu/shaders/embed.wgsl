// Rows of the embedding table that lie in this piece of it, `first` to `first + count`.
struct Op { weight: u32, row_bytes: u32, k: u32, out: u32, scale: f32, first: u32, count: u32, unused: u32 }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row = group.z;
    let token = row_record(row).token;
    if token < op.first || token - op.first >= op.count { return; }
    let base = op.weight + (token - op.first) * op.row_bytes;
    for (var k = t * 16u; k < op.k; k += 1024u) {
        let w = unpack(0u, base, k);
        let o = op.out + row * op.k + k;
        for (var j = 0u; j < 4u; j++) {
            arena[o + j] = w.a[j] * op.scale;
            arena[o + 4u + j] = w.b[j] * op.scale;
            arena[o + 8u + j] = w.c[j] * op.scale;
            arena[o + 12u + j] = w.d[j] * op.scale;
        }
    }
}
