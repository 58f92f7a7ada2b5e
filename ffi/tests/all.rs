//! The contract, from the other side: the header against the sources, C programs against the library, and the calls that
//! go wrong.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "all/abi.rs"]
mod abi;
#[path = "all/bindings.rs"]
mod bindings;
#[path = "all/clients.rs"]
mod clients;
#[path = "all/crowd.rs"]
mod crowd;
#[path = "all/gpu.rs"]
mod gpu;
#[path = "all/hard.rs"]
mod hard;
#[path = "all/header.rs"]
mod header;
#[path = "all/lasting.rs"]
mod lasting;
#[path = "all/packages.rs"]
mod packages;
#[cfg(feature = "grammar")]
#[path = "all/structured.rs"]
mod structured;
#[path = "all/support.rs"]
mod support;
#[path = "all/swift.rs"]
mod swift;
