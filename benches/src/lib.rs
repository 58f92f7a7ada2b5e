//! Benchmarks of Kinglet, alone and side by side with llama.cpp.
//!
//! A tokens-per-second figure moves with the machine, its neighbours and its temperature; a ratio of two engines that
//! took turns in one process does not. So everything here is built around [`Contender`](contender::Contender), the one thing both engines
//! can do, and around interleaved runs (A B B A). The peer is llama.cpp through the crate `llama-cpp-2`, built for
//! the CPU at hand (see `.cargo/config.toml`), with its own best settings.
//!
//! * [`contender`]: what is measured, and how: `pp` (prefill) and `tg` (decode), as llama.cpp's own benchmark does.
//! * [`kinglet`] and [`peer`]: the two engines.
//! * [`stats`]: medians and spreads.
//! * [`model`]: from a name to a file.
//! * [`memory`]: the peak memory of a process.

pub mod contender;
pub mod kinglet;
pub mod memory;
pub mod model;
#[cfg(feature = "llama-cpp")]
pub mod peer;
pub mod stats;
