// A step of AdamW on all parameters; the formula is that of `AdamWStep` (`tape/adamw.rs`), of gradients times `factor`.
struct Op {
    count: u32, flips: u32, factor: f32, beta1: f32,
    beta2: f32, rate: f32, root: f32, eps: f32,
    keep: f32, unused0: u32, unused1: u32, unused2: u32,
}

@group(0) @binding(0) var<uniform> op: Op;
// Where decay goes on, off, on …, ascending.
@group(0) @binding(1) var<storage, read> flips: array<u32>;
@group(0) @binding(4) var<storage, read_write> values: array<f32>;
@group(0) @binding(5) var<storage, read_write> first: array<f32>;
@group(0) @binding(7) var<storage, read_write> gradients: array<f32>;
@group(0) @binding(8) var<storage, read_write> second: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let i = (group.y * groups.x + group.x) * 256u + t;
    if i >= op.count { return; }
    // How many flips lie at or before this element.
    var low = 0u;
    var high = op.flips;
    while low < high {
        let middle = (low + high) / 2u;
        if flips[middle] <= i { low = middle + 1u; } else { high = middle; }
    }
    let keep = select(1.0, op.keep, (low & 1u) == 1u);
    let g = gradients[i] * op.factor;
    let m = first[i] + (1.0 - op.beta1) * (g - first[i]);
    let v = op.beta2 * second[i] + (1.0 - op.beta2) * g * g;
    first[i] = m;
    second[i] = v;
    values[i] = values[i] * keep - op.rate * (m / (sqrt(v) / op.root + op.eps));
}
