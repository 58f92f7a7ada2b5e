//! `kinglet perplexity`: how well a model predicts a text.

use crate::args::{Global, MODEL_HELP, MemoryArgs, positive};
use crate::interrupt::{self, Interrupted};
use crate::{adapters, models, output, progress};
use clap::Args;
use kinglet_assistant::eval::perplexity::{Perplexity, perplexity};
use kinglet_engine::Error;
use kinglet_engine::text::EncodeOptions;
use serde_json::{Value, json};
use std::time::Instant;

/// Measure how well a model predicts a text, as llama.cpp's perplexity tool does
#[derive(Args, Debug)]
#[command(after_help = "\
The text is cut into disjoint windows and the second half of each is scored. Lower is better; compare
only figures of the same text, context and tokenizer.

Examples:
  kinglet perplexity smollm2 book.txt
  kinglet perplexity model.gguf book.txt --context 2048 --json | jq .perplexity")]
pub struct Arguments {
    #[arg(help = MODEL_HELP, value_name = "MODEL")]
    model: String,
    /// The text; - reads standard input
    file: String,
    /// Tokens in a window
    #[arg(short, long, value_name = "N", default_value_t = 512, value_parser = positive)]
    context: usize,
    /// Stop after so many windows
    #[arg(long, value_name = "N", value_parser = positive)]
    windows: Option<usize>,
    /// Apply a LoRA adapter, a .gguf file or a PEFT folder, with an optional factor; may be given again
    #[arg(long, value_name = "FILE[:SCALE]")]
    adapter: Vec<String>,
    #[command(flatten)]
    memory: MemoryArgs,
}

pub fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<()> {
    let text = super::file_or_stdin(&arguments.file)?;
    let model = models::open(&arguments.model)?;
    let tokenizer = model.tokenizer();
    let mut tokens = tokenizer.encode_bytes(&text, EncodeOptions { add_special: true, parse_special: false });
    if let Some(windows) = arguments.windows {
        tokens.truncate(windows.saturating_mul(arguments.context));
    }
    let options = arguments.memory.options(arguments.context, global);
    let mut session = adapters::session(&model, options, &arguments.adapter)?;
    let cancel = session.cancel_handle();
    interrupt::listen(move || cancel.cancel());
    let bos = if tokenizer.adds_bos() { tokenizer.bos() } else { None };
    let bar = progress::steps("windows", (tokens.len() / arguments.context) as u64);
    let start = Instant::now();
    let result = perplexity(&mut session, &tokens, bos, arguments.context, &mut |done, _, so_far| {
        bar.set_position(done as u64);
        bar.set_message(format!("perplexity so far {so_far:.4}"));
    });
    bar.finish_and_clear();
    let result = match result {
        Err(Error::Cancelled) => return Err(Interrupted.into()),
        other => other?,
    };
    let seconds = start.elapsed().as_secs_f64();
    if global.json { as_json(&result, arguments, seconds) } else { as_text(&result, seconds) }
}

fn as_json(result: &Perplexity, arguments: &Arguments, seconds: f64) -> anyhow::Result<()> {
    let mut value = serde_json::to_value(result)?;
    if let Value::Object(object) = &mut value {
        object.insert("model".into(), json!(arguments.model));
        object.insert("seconds".into(), json!(seconds));
    }
    output::json(&value)
}

fn as_text(p: &Perplexity, seconds: f64) -> anyhow::Result<()> {
    Ok(output::text(&format!(
        "perplexity {:.4} ± {:.4}\n{} windows of {} tokens, {} tokens scored ({}), {:.1} s, {:.0} tokens/s\n",
        p.perplexity,
        p.uncertainty,
        p.windows,
        p.context,
        p.scored,
        p.protocol,
        seconds,
        (p.windows * p.context) as f64 / seconds
    ))?)
}
