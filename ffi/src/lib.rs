//! The C ABI of Kinglet: `include/kinglet.h` is its documentation, and the one contract that every binding stands on.
//!
//! | file | what |
//! | --- | --- |
//! | `fence` | status codes, the caller's error struct, no panic crosses; one call at a time |
//! | `args` | what C passes, made safe; structs that carry their size; results on the way back |
//! | `library`, `log` | versions, devices, strings; messages |
//! | `model`, `tokens` | models by path, descriptor or memory; text to tokens and back |
//! | `session`, `slot` | one conversation; the generation that borrows it |
//! | `gate` | what a suspended model keeps out |
//! | `request`, `generation` | from JSON to events, pulled one by one |
//! | `adapter`, `training` | LoRA at run time; training step by step |
//!
//! A handle is an `Arc` given out as a pointer, and objects hold what they need of their parents, so any order of freeing
//! is right. Session, generation and trainer are a `Mutex` that is only ever tried: a second call is told that the object
//! is busy, and a panic leaves it poisoned. Nothing prints, exits or reads the environment.
//!
//! `include/kinglet.h` is written by hand; `tests/header.rs` compares it with these sources.

#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::todo, clippy::unreachable)
)]
// What a caller has to keep to stands in the header, and on every function once more as `# Safety`.
#![allow(clippy::too_many_arguments)]

mod adapter;
mod args;
mod fence;
mod gate;
mod generation;
mod library;
mod log;
mod model;
mod request;
mod session;
mod slot;
mod tokens;
mod training;

pub use adapter::*;
pub use fence::{
    KINGLET_DONE, KINGLET_ERR_ABI, KINGLET_ERR_ARG, KINGLET_ERR_BUSY, KINGLET_ERR_CANCELLED, KINGLET_ERR_CONTEXT_FULL,
    KINGLET_ERR_DEVICE_LOST, KINGLET_ERR_FORMAT, KINGLET_ERR_INTERNAL, KINGLET_ERR_IO, KINGLET_ERR_MEMORY,
    KINGLET_ERR_NUMERIC, KINGLET_ERR_SUSPENDED, KINGLET_ERR_TOO_SMALL, KINGLET_ERR_UNSUPPORTED, KINGLET_OK,
    kinglet_error, kinglet_status,
};
pub use generation::*;
pub use library::*;
pub use log::{kinglet_log_callback, kinglet_set_log};
pub use model::*;
pub use session::*;
pub use tokens::*;
pub use training::*;
