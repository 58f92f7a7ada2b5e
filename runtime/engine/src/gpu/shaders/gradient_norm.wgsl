// Squares of the gradients, summed: each workgroup takes every `groups`-th stretch of 256 and adds up its own in a tree. What
// they give is added up by whoever reads it. Compilers may assume that there is no NaN, so its bits are looked for.
struct Op { count: u32, unused0: u32, unused1: u32, unused2: u32 }

@group(0) @binding(0) var<uniform> op: Op;
// Of each workgroup: the sum, and how many gradients were no finite numbers.
@group(0) @binding(4) var<storage, read_write> partials: array<vec2<f32>>;
@group(0) @binding(7) var<storage, read_write> gradients: array<f32>;

var<workgroup> sums: array<vec2<f32>, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    var sum = vec2(0.0);
    for (var i = group.x * 256u + t; i < op.count; i += groups.x * 256u) {
        let g = gradients[i];
        sum += vec2(g * g, select(0.0, 1.0, (bitcast<u32>(g) & 0x7f800000u) == 0x7f800000u));
    }
    sums[t] = sum;
    workgroupBarrier();
    for (var half = 128u; half > 0u; half >>= 1u) {
        if t < half { sums[t] += sums[t + half]; }
        workgroupBarrier();
    }
    if t == 0u { partials[group.x] = sums[0]; }
}
