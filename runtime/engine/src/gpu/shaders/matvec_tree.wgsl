// A row's lanes add up in workgroup memory.
fn across(value: f32) -> f32 { return value; }

fn add_lanes(t: u32, lane: u32) {
    for (var half = LANES / 2u; half > 0u; half >>= 1u) {
        if lane < half {
            for (var s = 0u; s < SUMS; s++) { partial[s * THREADS + t] += partial[s * THREADS + t + half]; }
        }
        workgroupBarrier();
    }
}
