//! What a session will need, known before anything is allocated.

use serde::Serialize;

use crate::{Error, Result};

/// Peak memory of a session, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Estimate {
    /// The mapped file: read in place, shared with other processes, and given back by the system under pressure. On a GPU
    /// what it reads of it, mapped or a copy, once for all sessions of a model.
    pub weights: u64,
    /// The KV cache with the context window full.
    pub kv_cache: u64,
    /// Activations, logits and tables.
    pub arena: u64,
    /// Scratch of all threads; none on a GPU.
    pub scratch: u64,
    /// Adapters in force; 0 before any is set.
    pub adapters: u64,
    /// Of the weights what a GPU reads from the mapped file, without a copy; 0 unless that was asked for. As far as a page of the
    /// file tells what the driver takes.
    pub imported: u64,
    /// Whether all of this is memory of a GPU, or what one reads from the mapped file.
    pub on_gpu: bool,
    /// How it is shared out where the model is divided between CPU and GPU.
    pub shared: Option<Shared>,
}

/// What of an [`Estimate`] is where, of a model whose last layers run on a GPU and the others on the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shared {
    /// Layers that run on the GPU; the head with them.
    pub gpu_layers: usize,
    /// Bytes of the GPU's memory.
    pub gpu_bytes: u64,
    /// Bytes of the weights that stay in the map, for the CPU.
    pub mapped: u64,
}

impl Estimate {
    /// Of the weights what is read in place from the mapped file, by the CPU or by a GPU.
    pub fn mapped(&self) -> u64 {
        match self.shared {
            Some(shared) => shared.mapped + self.imported,
            None if self.on_gpu => self.imported,
            None => self.weights,
        }
    }

    /// Everything that is allocated: the mapped weights are not, copies on a GPU are.
    pub fn allocated(&self) -> u64 {
        self.resident() - self.mapped()
    }

    /// What is memory of a GPU.
    pub fn on_gpu_bytes(&self) -> u64 {
        match self.shared {
            Some(shared) => shared.gpu_bytes,
            None if self.on_gpu => self.allocated(),
            None => 0,
        }
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
                    if self.on_gpu && self.imported == 0 { "uploaded" } else { "mapped" },
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
