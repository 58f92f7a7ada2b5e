// A row's lanes are a subgroup: each has the sum at once.
fn across(value: f32) -> f32 { return subgroupAdd(value); }

fn add_lanes(t: u32, lane: u32) {}
