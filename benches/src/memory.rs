//! The memory of this process, as the Linux kernel counts it.
//!
//! `peak` includes the pages of the mapped model file, which the system may drop at any time; `anonymous` is what the
//! engine allocated for itself. Each engine is measured in a process of its own.

use anyhow::Context;

/// Bytes, from `/proc/self/status`.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Largest resident set so far (`VmHWM`).
    pub peak: u64,
    /// Resident now and not backed by a file (`RssAnon`).
    pub anonymous: u64,
}

impl Memory {
    /// The memory of the calling process. Fails where there is no `/proc`.
    pub fn of_this_process() -> anyhow::Result<Memory> {
        let status = std::fs::read_to_string("/proc/self/status").context("peak memory is measured on Linux only")?;
        let field = |name: &str| -> anyhow::Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).context(name.to_owned())?;
            let kib: u64 = line.trim_matches(|c: char| !c.is_ascii_digit()).parse().context(name.to_owned())?;
            Ok(kib * 1024)
        };
        Ok(Memory { peak: field("VmHWM:")?, anonymous: field("RssAnon:")? })
    }
}
