//! `kinglet create`: a model of random weights, to be trained from nothing.

use crate::args::{Global, MODEL_HELP, positive};
use crate::{models, output};
use clap::Args;
use kinglet_engine::gguf::Gguf;
use kinglet_engine::quant::DType;
use kinglet_models::scratch::write_scratch;
use kinglet_models::tiny::TinyConfig;
use serde_json::json;
use std::path::PathBuf;

/// Write a model of random weights, for `kinglet train --full`
#[derive(Args, Debug)]
#[command(after_help = "\
The new model takes tokenizer and chat template from another one. Most of a small model is its vocabulary:
width × tokens weights, twice where the head is not tied.

Examples:
  kinglet create --tokenizer smollm2 --layers 4 --width 128 -o small.gguf
  kinglet train --model small.gguf --full --data book.txt --lr 1e-3 -o small-trained")]
pub struct Arguments {
    /// The file to write; must not exist
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// The model whose tokenizer it takes
    #[arg(long, help = MODEL_HELP, value_name = "MODEL")]
    tokenizer: String,
    /// Architecture: llama, qwen2, qwen3, gemma, gemma2, gemma3, chatglm, glm4, internlm2 or phi3
    #[arg(long, value_name = "NAME", default_value = "llama")]
    arch: String,
    /// Decoder layers
    #[arg(long, value_name = "N", default_value = "4", value_parser = positive)]
    layers: usize,
    /// Elements of the residual stream
    #[arg(long, value_name = "N", default_value = "128", value_parser = positive)]
    width: usize,
    /// Query heads
    #[arg(long, value_name = "N", default_value = "4", value_parser = positive)]
    heads: usize,
    /// Key and value heads; divides the heads [default: as many as heads]
    #[arg(long, value_name = "N", value_parser = positive)]
    kv_heads: Option<usize>,
    /// Inner elements of the feed-forward part [default: about 8/3 of the width]
    #[arg(long, value_name = "N", value_parser = positive)]
    ffn: Option<usize>,
    /// Longest context, in tokens
    #[arg(long, value_name = "N", default_value = "512", value_parser = positive)]
    context: usize,
    /// A head of its own instead of the embedding
    #[arg(long)]
    untied: bool,
    /// Type of the matrices: F32, F16 or BF16
    #[arg(long = "type", value_name = "TYPE", default_value = "F32")]
    dtype: DType,
    /// Determines the weights
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
}

pub fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<()> {
    super::refuse_existing(&arguments.output)?;
    let a = arguments;
    let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let config = TinyConfig {
        layers: small(a.layers),
        width: small(a.width),
        heads: small(a.heads),
        kv_heads: small(a.kv_heads.unwrap_or(a.heads)),
        head_dim: small(a.width / a.heads),
        // A multiple of 32 suits every type that the model may be quantized to later.
        ffn: small(a.ffn.unwrap_or((a.width * 8 / 3).next_multiple_of(32))),
        context: small(a.context),
        sliding_window: small(a.context.div_ceil(4)),
        tied: !a.untied,
        dtype: a.dtype,
        embedding: a.dtype,
        seed: a.seed,
        ..TinyConfig::new(&a.arch)
    };
    write_scratch(&a.output, &config, &models::gguf_of(&a.tokenizer)?)?;
    let weights: u64 = Gguf::open(&a.output)?.tensors().iter().map(|t| t.elements() as u64).sum();
    if global.json {
        return output::json(&json!({ "output": a.output, "weights": weights }));
    }
    Ok(output::text(&format!("{} weights\n{}\n", output::count(weights), a.output.display()))?)
}
