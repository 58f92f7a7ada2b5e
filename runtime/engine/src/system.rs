//! What the system beneath offers: threads, pages, clocks. A browser's `wasm32-unknown-unknown` has none of them, and the
//! standard library panics there when it is asked for the time; everything that would ask goes through here.

use std::time::Duration;

/// Whether threads can be started. Without them a team is its caller, and a template is rendered on the caller's stack.
pub(crate) const THREADS: bool = cfg!(not(all(target_family = "wasm", not(target_feature = "atomics"))));

/// Whether the system gives pages: maps of files, and memory that is zero and taken as it is touched.
pub(crate) const PAGES: bool = cfg!(any(unix, windows));

/// Whether there is a clock.
const CLOCK: bool = cfg!(not(all(target_family = "wasm", target_os = "unknown")));

/// How many threads the machine runs at once, as far as the system says; at least 1.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Seconds since 1970, UTC; `None` without a clock, or with one that is set to before.
pub(crate) fn unix_seconds() -> Option<u64> {
    use std::time::{SystemTime, UNIX_EPOCH};
    CLOCK.then(|| SystemTime::now().duration_since(UNIX_EPOCH).ok()).flatten().map(|since| since.as_secs())
}

/// Measures how long something takes.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch(Option<std::time::Instant>);

impl Stopwatch {
    /// Begins to measure.
    pub fn start() -> Stopwatch {
        Stopwatch(CLOCK.then(std::time::Instant::now))
    }

    /// The time since the start; zero without a clock.
    pub fn elapsed(self) -> Duration {
        self.0.map_or(Duration::ZERO, |start| start.elapsed())
    }
}
