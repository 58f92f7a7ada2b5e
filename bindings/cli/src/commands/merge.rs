//! `kinglet merge`: adapters into a new model file.

use crate::args::{Global, MODEL_HELP};
use crate::{adapters, models, output};
use anyhow::Context;
use clap::Args;
use kinglet_engine::adapter;
use kinglet_engine::quant::DType;
use serde_json::json;
use std::path::PathBuf;

/// Write a new model file with adapters inside, for programs that know no adapters
#[derive(Args, Debug)]
#[command(after_help = "\
The matrices that an adapter changes are quantized anew, to the type they had or to --type; Q8_0 and F16
keep nearly all of what was learned. Sessions need no merging: `kinglet run MODEL --adapter FILE`.

Examples:
  kinglet merge smollm2 --adapter my-adapter -o mine.gguf
  kinglet merge smollm2 --adapter a.gguf:0.5 --adapter b.gguf:0.5 --type Q8_0 -o both.gguf")]
pub struct Arguments {
    #[arg(help = MODEL_HELP, value_name = "MODEL")]
    model: String,
    /// A LoRA adapter, a .gguf file or a PEFT folder, with an optional factor; may be given again
    #[arg(long, value_name = "FILE[:SCALE]", required = true)]
    adapter: Vec<String>,
    /// The file to write; must not exist
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Type of the changed matrices, such as Q8_0 or F16 [default: the one they had]
    #[arg(long = "type", value_name = "TYPE")]
    dtype: Option<DType>,
}

pub fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<()> {
    super::refuse_existing(&arguments.output)?;
    let model = models::open(&arguments.model)?;
    let adapters = arguments.adapter.iter().map(|a| adapters::open(a, &model)).collect::<anyhow::Result<Vec<_>>>()?;
    let scaled: Vec<_> = adapters.iter().map(|(adapter, scale)| (adapter.as_ref(), *scale)).collect();
    let merged = adapter::merge(model.gguf(), &scaled, arguments.dtype, &arguments.output)
        .with_context(|| arguments.output.display().to_string())?;
    if global.json {
        return output::json(&json!({ "output": arguments.output, "tensors": merged.tensors, "bytes": merged.bytes }));
    }
    Ok(output::text(&format!(
        "{} matrices changed, {}\n{}\n",
        merged.tensors,
        output::bytes(merged.bytes),
        arguments.output.display()
    ))?)
}
