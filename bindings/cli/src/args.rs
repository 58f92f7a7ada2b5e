//! The command line: what every command shares. A command's own arguments stand beside its code.

use crate::commands::Command;
use clap::{Args, Parser, ValueEnum};

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
    /// Where to compute
    #[arg(long, global = true, value_enum, default_value_t = Backend::Auto, help_heading = "Global options")]
    pub backend: Backend,
    /// Say more on standard error; twice for details
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Global options")]
    pub verbose: u8,
}

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// The fastest there is
    Auto,
    /// The processor
    Cpu,
    /// The graphics card
    Gpu,
}

/// A wrong combination of arguments that clap cannot see; exits with 2 like its own errors.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

impl Global {
    /// Refuses what this build cannot compute with.
    pub fn check_backend(&self) -> anyhow::Result<()> {
        if self.backend == Backend::Gpu {
            anyhow::bail!("the GPU backend is not built in yet; use --backend cpu or auto");
        }
        Ok(())
    }
}

/// An integer of at least 1.
pub fn positive(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(n) if n >= 1 => Ok(n),
        _ => Err("a whole number of at least 1 is needed".into()),
    }
}
