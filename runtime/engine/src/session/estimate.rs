//! What a session will need, known before anything is allocated.

use serde::Serialize;

use crate::{Error, Result};

/// Peak memory of a session, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Estimate {
    /// The mapped file: read in place, shared with other processes, and given back by the system under pressure. On a GPU
    /// what lies there of it.
    pub weights: u64,
    /// The KV cache with the context window full.
    pub kv_cache: u64,
    /// Activations, logits and tables.
    pub arena: u64,
    /// Scratch of all threads; none on a GPU.
    pub scratch: u64,
    /// Adapters in force; 0 before any is set.
    pub adapters: u64,
    /// Whether all of this is memory of a GPU.
    pub on_gpu: bool,
}

impl Estimate {
    /// Everything that is allocated: the mapped weights are not, those on a GPU are.
    pub fn allocated(&self) -> u64 {
        self.resident() - if self.on_gpu { 0 } else { self.weights }
    }

    /// Everything that is resident when all weights have been read.
    pub fn resident(&self) -> u64 {
        self.weights + self.kv_cache + self.arena + self.scratch + self.adapters
    }

    /// Refuses what is over `budget`.
    pub(super) fn check(&self, budget: Option<u64>) -> Result<()> {
        match budget {
            Some(budget) if self.resident() > budget => Err(Error::Memory {
                needed: self.resident(),
                available: budget,
                what: format!(
                    "{} weights {}, KV cache {} at the full context, activations {}, thread scratch {}, adapters {}; ask for a \
                     smaller context, a Q8_0 KV cache or smaller prefill chunks",
                    if self.on_gpu { "uploaded" } else { "mapped" },
                    self.weights,
                    self.kv_cache,
                    self.arena,
                    self.scratch,
                    self.adapters
                ),
            }),
            _ => Ok(()),
        }
    }
}
