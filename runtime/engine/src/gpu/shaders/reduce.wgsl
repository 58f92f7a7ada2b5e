// Sums and maxima over a workgroup of GROUP invocations.
var<workgroup> shared_values: array<f32, GROUP>;

fn sum_all(t: u32, value: f32) -> f32 {
    workgroupBarrier();
    shared_values[t] = value;
    workgroupBarrier();
    for (var half = GROUP / 2u; half > 0u; half >>= 1u) {
        if t < half { shared_values[t] += shared_values[t + half]; }
        workgroupBarrier();
    }
    return shared_values[0];
}

fn max_all(t: u32, value: f32) -> f32 {
    workgroupBarrier();
    shared_values[t] = value;
    workgroupBarrier();
    for (var half = GROUP / 2u; half > 0u; half >>= 1u) {
        if t < half { shared_values[t] = max(shared_values[t], shared_values[t + half]); }
        workgroupBarrier();
    }
    return shared_values[0];
}
