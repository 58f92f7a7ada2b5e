// Gradients are summed in slices, each of some of the run's rows: adds them up in the first and clears the others.
struct Op { count: u32, slices: u32, unused0: u32, unused1: u32 }

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let i = (group.y * groups.x + group.x) * 64u + t;
    if i >= op.count { return; }
    var sum = gradients[i];
    for (var slice = 1u; slice < op.slices; slice++) {
        sum += gradients[slice * op.count + i];
        gradients[slice * op.count + i] = 0.0;
    }
    gradients[i] = sum;
}
