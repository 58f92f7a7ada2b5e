//! `kinglet estimate`: the memory a session will need, before it is started.

use crate::args::{Global, MODEL_HELP, SessionArgs};
use crate::models;
use crate::output::{self, Table};
use clap::Args;
use kinglet_engine::session::Session;
use serde_json::json;

/// Tell how much memory a session will need, without starting it
#[derive(Args, Debug)]
#[command(after_help = "\
Weights are mapped from the file: read in place, shared by all programs that use the model, and given
back by the system under pressure. The rest is allocated. On a GPU everything is allocated there, but
for weights that it reads from the mapped file (--gpu-import); where its memory does not hold all
layers, the last ones are there and the others on the CPU.

Examples:
  kinglet estimate smollm2
  kinglet estimate qwen2.5-coder --context 32768 --kv-type Q8_0
  kinglet estimate smollm2 --backend gpu
  kinglet estimate model.gguf --gpu-memory 4G         how many layers a GPU gets
  kinglet estimate model.gguf --memory-budget 2G      exits with 1 if that is not enough")]
pub struct Arguments {
    #[arg(help = MODEL_HELP, value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    session: SessionArgs,
}

pub fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<()> {
    let model = models::open(&arguments.model)?;
    let mut options = arguments.session.memory.options(arguments.session.context, global);
    if options.context == 0 {
        options.context = model.spec().context;
    }
    let estimate = Session::estimate(&model, &options)?;
    if let Some(budget) = options.memory_budget
        && estimate.resident() > budget
    {
        anyhow::bail!(
            "{} are needed, more than the budget of {}; ask for a smaller context, a Q8_0 KV cache or smaller chunks",
            output::bytes(estimate.resident()),
            output::bytes(budget)
        );
    }
    let layers = model.spec().layers.len();
    let gpu_layers = match estimate.shared {
        Some(shared) => shared.gpu_layers,
        None if estimate.on_gpu => layers,
        None => 0,
    };
    if global.json {
        return output::json(&json!({
            "model": arguments.model,
            "context": options.context,
            "kv_type": options.kv_type.name(),
            "chunk": options.chunk,
            "on_gpu": estimate.on_gpu,
            "layers": layers,
            "gpu_layers": gpu_layers,
            "gpu_bytes": estimate.on_gpu_bytes(),
            "weights": estimate.weights,
            "mapped": estimate.mapped(),
            "kv_cache": estimate.kv_cache,
            "arena": estimate.arena,
            "scratch": estimate.scratch,
            "allocated": estimate.allocated(),
            "resident": estimate.resident(),
        }));
    }
    let mut table = Table::new(&["what", ">bytes", ""]);
    let mut row = |what: &str, bytes: u64, note: String| table.row(vec![what.into(), output::bytes(bytes), note]);
    let weights = match (estimate.on_gpu, estimate.shared) {
        (true, _) if estimate.imported == 0 => "on the GPU, as is all of this".into(),
        (false, None) => "mapped from the file".into(),
        _ => format!("{} of them mapped from the file", output::bytes(estimate.mapped())),
    };
    row("weights", estimate.weights, weights);
    let cache = format!("{} tokens of {}, taken as the window fills", options.context, options.kv_type);
    row("KV cache", estimate.kv_cache, cache);
    row("activations", estimate.arena, format!("for {} tokens at a time", options.chunk));
    if !estimate.on_gpu {
        row("scratch", estimate.scratch, "of all threads".into());
    }
    if estimate.mapped() > 0 {
        row("allocated", estimate.allocated(), "all but the mapped weights".into());
    }
    row(if estimate.mapped() > 0 { "resident" } else { "allocated" }, estimate.resident(), "all".into());
    if estimate.shared.is_some() {
        let note = format!("of all: {gpu_layers} of {layers} layers and the head");
        row("on the GPU", estimate.on_gpu_bytes(), note);
    }
    Ok(output::text(&table.aligned())?)
}
