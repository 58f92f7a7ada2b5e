//! The roof of decoding: how fast this machine streams memory.
//!
//! Every decoded token reads all weights once, so bytes-per-token divided by this speed is a bound no engine beats
//! (unless the weights fit the last-level cache, where a share over 100 % is real). Each thread sums its own
//! contiguous part of a buffer much larger than the caches; the best of several passes counts.

use std::thread;
use std::time::Instant;

/// Streaming read speed in bytes per second, with `threads` threads over `bytes` of memory, best of `passes`.
pub fn streaming_read(threads: usize, bytes: usize, passes: usize) -> f64 {
    let threads = threads.max(1);
    let part = bytes / 8 / threads;
    // Written, not only reserved: untouched pages would all be the same page of zeros.
    let buffers: Vec<Vec<u64>> = (0..threads).map(|t| (0..part).map(|i| (i ^ t) as u64).collect()).collect();
    let mut best = 0.0f64;
    for _ in 0..passes {
        let start = Instant::now();
        thread::scope(|scope| {
            for buffer in &buffers {
                scope.spawn(move || std::hint::black_box(sum(buffer)));
            }
        });
        best = best.max((part * threads * 8) as f64 / start.elapsed().as_secs_f64());
    }
    best
}

/// Sums in 32 independent lanes, so that the additions never wait for each other and the loads are the bound.
fn sum(values: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    for chunk in values.chunks_exact(32) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*value);
        }
    }
    lanes.iter().fold(0, |a, b| a.wrapping_add(*b))
}
