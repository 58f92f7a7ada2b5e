//! The command line: what every command shares. A command's own arguments stand beside its code.

use crate::commands::Command;
use clap::{Args, Parser};
#[cfg(feature = "gpu")]
use kinglet_engine::gpu::Tuning;
use kinglet_engine::quant::DType;
use kinglet_engine::session::{Device, SessionOptions};
#[cfg(feature = "gpu")]
use kinglet_models::pull::Cache;

/// Text that every model argument shows.
pub const MODEL_HELP: &str =
    "A known name (see `kinglet models`), a .gguf file, owner/repo/file.gguf or owner/repo:Q4_K_M";

#[derive(Debug, Parser)]
#[command(name = "kinglet", version, about, long_about = None, max_term_width = 100, after_help = EXAMPLES)]
#[command(propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  kinglet run smollm2                                  chat (the model is fetched on first use)
  kinglet run smollm2 \"Name three rivers.\"             one answer
  cat notes.txt | kinglet run qwen2.5-coder -          the prompt from standard input
  kinglet train --model smollm2 --data my.jsonl -o mine   teach it, then: kinglet run smollm2 --adapter mine
  kinglet inspect model.gguf                           what is in a file
  kinglet bench smollm2 -p 512 -n 64                   how fast, and how near to the limit of this machine

Models are kept in the cache directory; KINGLET_HOME names another one.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.";

/// Options of every command.
#[derive(Args, Debug)]
pub struct Global {
    /// Print JSON for programs instead of text for people
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// Threads to compute with [default: one per core]
    #[arg(long, global = true, value_name = "N", help_heading = "Global options", value_parser = positive)]
    pub threads: Option<usize>,
    /// Where to compute: auto, cpu, gpu or gpu:N (see `kinglet devices`)
    #[arg(long, global = true, value_name = "WHERE", default_value = "auto", help_heading = "Global options")]
    pub backend: Device,
    /// Which kernels a GPU multiplies with
    #[cfg(feature = "gpu")]
    #[arg(long, global = true, value_name = "WHICH", default_value = "timed", help_heading = "Global options")]
    pub kernels: Kernels,
    /// Say more on standard error; twice for details
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Global options")]
    pub verbose: u8,
}

/// Which of its kernels a GPU multiplies with.
#[cfg(feature = "gpu")]
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernels {
    /// The usual ones; nothing is timed
    Usual,
    /// Those that are clearly quicker than the usual ones on this card; timed once, for a few seconds
    Timed,
    /// As timed, and products of eight bits compete too: quicker for some, but rounded more
    Int8,
}

impl Global {
    /// Where to compute; a GPU's kernels are timed once, and the times kept in the cache directory.
    #[cfg(feature = "gpu")]
    pub fn device(&self) -> Device {
        match (self.kernels, tuning_folder()) {
            (Kernels::Usual, _) | (_, None) => self.backend.clone(),
            (_, folder) => self.tuned(Tuning { folder, ..Tuning::default() }),
        }
    }

    /// Where to compute.
    #[cfg(not(feature = "gpu"))]
    pub fn device(&self) -> Device {
        self.backend.clone()
    }

    /// Where to compute, with kernels timed anew, whatever the device.
    #[cfg(feature = "gpu")]
    pub fn tuned_anew(&self) -> Device {
        self.tuned(Tuning { folder: tuning_folder(), software: true, again: true, ..Tuning::default() })
    }

    #[cfg(feature = "gpu")]
    fn tuned(&self, tuning: Tuning) -> Device {
        let int8 = self.kernels == Kernels::Int8;
        Device::Tuned(Box::new(self.backend.clone()), Tuning { int8, ..tuning })
    }
}

/// Where times of kernels are kept: beside the models. Without a cache directory kernels are not timed.
#[cfg(feature = "gpu")]
fn tuning_folder() -> Option<std::path::PathBuf> {
    Cache::from_env().ok().map(|cache| cache.root().join("tuning"))
}

/// A wrong combination of arguments that clap cannot see; exits with 2 like its own errors.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// An integer of at least 1.
pub fn positive(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(n) if n >= 1 => Ok(n),
        _ => Err("a whole number of at least 1 is needed".into()),
    }
}

/// How a session is opened.
#[derive(Args, Debug)]
#[command(next_help_heading = "Session")]
pub struct SessionArgs {
    /// Tokens the window may hold; 0 for as many as the model was made for
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    pub context: usize,
    #[command(flatten)]
    pub memory: MemoryArgs,
}

/// What else decides how much memory a session takes.
#[derive(Args, Debug)]
#[command(next_help_heading = "Session")]
pub struct MemoryArgs {
    /// Element type of the KV cache: F16, F32 or Q8_0
    #[arg(long, value_name = "TYPE", default_value = "F16")]
    pub kv_type: DType,
    /// Tokens of a prompt that are computed at a time
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = positive)]
    pub chunk: usize,
    /// Refuse to start if more memory would be needed, such as 800M or 2G
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub memory_budget: Option<u64>,
    /// Layers that the GPU runs, the last ones; the CPU runs the others [default: all, or as many as fit with --backend auto]
    #[arg(long, value_name = "N")]
    pub gpu_layers: Option<usize>,
    /// Most memory of the GPU to take: it gets as many layers as that holds
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub gpu_memory: Option<u64>,
    /// Read the weights on the GPU from the mapped file, without a copy, where the driver allows that; for GPUs that share the
    /// processor's memory
    #[arg(long)]
    pub gpu_import: bool,
}

impl MemoryArgs {
    /// The library's options for a window of `context` tokens.
    pub fn options(&self, context: usize, global: &Global) -> SessionOptions {
        SessionOptions {
            context,
            threads: global.threads.unwrap_or(0),
            kv_type: self.kv_type,
            chunk: self.chunk,
            device: global.device(),
            memory_budget: self.memory_budget,
            gpu_layers: self.gpu_layers,
            gpu_memory: self.gpu_memory,
            gpu_import: self.gpu_import,
            ..SessionOptions::default()
        }
    }
}

/// A number of bytes with an optional decimal unit: `500000`, `800M`, `1.5G`.
pub fn size(text: &str) -> Result<u64, String> {
    let lower = text.trim().to_lowercase();
    let lower = lower.strip_suffix('b').unwrap_or(&lower);
    let (digits, unit) = match lower.chars().last() {
        Some('k') => (&lower[..lower.len() - 1], 1e3),
        Some('m') => (&lower[..lower.len() - 1], 1e6),
        Some('g') => (&lower[..lower.len() - 1], 1e9),
        _ => (lower, 1.0),
    };
    match digits.parse::<f64>() {
        Ok(n) if n > 0.0 && n * unit < 1e18 => Ok((n * unit) as u64),
        _ => Err("a size such as 800M or 2G is needed".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes() {
        assert_eq!(size("800M"), Ok(800_000_000));
        assert_eq!(size("1.5gb"), Ok(1_500_000_000));
        assert_eq!(size("4096"), Ok(4096));
        assert!(size("-1").is_err() && size("x").is_err() && size("").is_err() && size("G").is_err());
    }
}
