//! `kinglet bench`: how fast a model runs here, in the terms of llama-bench, and how near to what the machine can do.
//!
//! `pp512` feeds 512 tokens to an empty window; `tg64` feeds 64 tokens one after the other, the first to an empty window.
//! Each is run once to warm up and then `-r` times. The roofs are measured before: a decoded token reads every weight
//! once, so `bytes per token / memory roof` is the time no program beats; a prompt's token costs two operations per
//! weight of the layers.

mod kernels;

use crate::args::{Global, MODEL_HELP, MemoryArgs, Usage, positive};
use crate::interrupt::{self, Interrupted};
use crate::models;
use crate::output::{self, Table};
use clap::{Args, Subcommand};
use kinglet_engine::cpu::roof;
use kinglet_engine::gguf::{Gguf, TensorInfo};
use kinglet_engine::session::Session;
use kinglet_engine::{Error, cpu::isa::Isa};
use serde::Serialize;
use serde_json::json;
use std::time::Instant;

/// Measure prompt and generation speed
#[derive(Args, Debug)]
#[command(after_help = "\
The names are llama-bench's: pp512 is a prompt of 512 tokens, tg64 the generation of 64.
Timings on a busy machine mean little: look at the spread.

Examples:
  kinglet bench smollm2
  kinglet bench model.gguf -p 512,2048 -n 128 -r 10 --threads 4 --json
  kinglet bench smollm2 -p 512 -n 0 --ops              with the time of each kind of operation
  kinglet bench kernels --types Q4_K,Q8_0              the kernels of linear maps, one by one")]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
    #[arg(help = MODEL_HELP, value_name = "MODEL", required = true)]
    model: Option<String>,
    /// Lengths of prompts; 0 for none
    #[arg(short = 'p', long = "prompt", value_name = "N,…", value_delimiter = ',', default_value = "512")]
    prompts: Vec<usize>,
    /// Numbers of tokens to generate; 0 for none
    #[arg(short = 'n', long = "generate", value_name = "N,…", value_delimiter = ',', default_value = "64")]
    generate: Vec<usize>,
    /// Repetitions of each
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = positive)]
    repetitions: usize,
    /// Show where the time goes
    #[arg(long)]
    ops: bool,
    #[command(flatten)]
    memory: MemoryArgs,
}

/// What else than a model can be measured.
#[derive(Subcommand, Debug)]
enum What {
    Kernels(kernels::Arguments),
}

/// One row of the result.
#[derive(Serialize)]
struct Row {
    test: String,
    tokens: usize,
    /// Mean tokens per second.
    mean: f64,
    /// Sample standard deviation.
    deviation: f64,
    samples: Vec<f64>,
    /// Share of the roof that bounds it, 1 being all.
    share: f64,
    roof: &'static str,
}

pub fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<()> {
    let name = match (&arguments.what, &arguments.model) {
        (Some(What::Kernels(arguments)), _) => return kernels::run(arguments, global),
        (None, Some(name)) => name,
        (None, None) => return Err(Usage("a model is needed".into()).into()),
    };
    let model = models::open(name)?;
    let longest = arguments.prompts.iter().chain(&arguments.generate).copied().max().unwrap_or(0);
    let mut session = Session::new(&model, &arguments.memory.options(longest.max(1), global))?;
    let threads = session.options().threads;
    let cancel = session.cancel_handle();
    interrupt::listen(move || cancel.cancel());

    eprintln!("measuring the roofs of this machine");
    let memory = roof::memory(threads, 512 << 20, 4);
    let (int8, instruction) = roof::int8(threads);
    let (per_token, ops) = cost(model.gguf());

    let vocab = model.spec().vocab as u32;
    let mut rows = Vec::new();
    for (&tokens, decode) in
        arguments.prompts.iter().map(|n| (n, false)).chain(arguments.generate.iter().map(|n| (n, true)))
    {
        if tokens == 0 {
            continue;
        }
        let test = format!("{}{tokens}", if decode { "tg" } else { "pp" });
        eprintln!("{test}: {} runs", arguments.repetitions);
        once(&mut session, tokens, decode, vocab)?;
        session.take_timings();
        session.set_timing(arguments.ops);
        let samples = (0..arguments.repetitions)
            .map(|_| once(&mut session, tokens, decode, vocab))
            .collect::<anyhow::Result<Vec<f64>>>()?;
        if arguments.ops {
            show_ops(&test, &mut session);
        }
        let mean = samples.iter().sum::<f64>() / samples.len() as f64;
        let squares: f64 = samples.iter().map(|s| (s - mean).powi(2)).sum();
        let deviation = (squares / (samples.len() - 1).max(1) as f64).sqrt();
        let (share, roof) = match decode {
            true => (mean * per_token as f64 / memory, "memory"),
            false => (mean * ops as f64 / int8, "int8"),
        };
        rows.push(Row { test, tokens, mean, deviation, samples, share, roof });
    }
    let isa = Isa::detect().name();
    if global.json {
        return output::json(&json!({
            "model": name,
            "file_bytes": model.gguf().file_bytes(),
            "bytes_per_token": per_token,
            "operations_per_prompt_token": ops,
            "threads": threads,
            "isa": isa,
            "chunk": session.options().chunk,
            "kv_type": session.options().kv_type.name(),
            "roofs": { "memory_bytes_per_second": memory, "int8_operations_per_second": int8, "int8_instruction": instruction },
            "tests": rows,
        }));
    }
    let mut table = Table::new(&["model", ">size", ">threads", "isa", ">test", ">tokens/s", "roof", ">share"]);
    for row in &rows {
        table.row(vec![
            name.clone(),
            output::bytes(model.gguf().file_bytes()),
            threads.to_string(),
            isa.into(),
            row.test.clone(),
            format!("{:.2} ± {:.2}", row.mean, row.deviation),
            row.roof.into(),
            format!("{:.0} %", row.share * 100.0),
        ]);
    }
    Ok(output::text(&format!(
        "{}\nRoofs of this machine with {threads} threads: memory {:.1} GB/s; int8 {:.0} Gop/s ({instruction}).\n\
         A generated token reads {}, a prompt token takes {:.2} Gop.\n",
        table.markdown(),
        memory / 1e9,
        int8 / 1e9,
        output::bytes(per_token),
        ops as f64 / 1e9
    ))?)
}

/// Runs one test and gives tokens per second.
fn once(session: &mut Session, tokens: usize, decode: bool, vocab: u32) -> anyhow::Result<f64> {
    // Arbitrary but the same in every run.
    let ids: Vec<u32> =
        (0..tokens as u32).map(|i| i.wrapping_mul(2_654_435_761).wrapping_add(17) % vocab.max(1)).collect();
    session.reset();
    let start = Instant::now();
    let result = match decode {
        true => ids.iter().try_for_each(|id| session.feed(&[*id]).map(|_| ())),
        false => session.feed(&ids).map(|_| ()),
    };
    match result {
        Err(Error::Cancelled) => Err(Interrupted.into()),
        Err(e) => Err(e.into()),
        Ok(()) => Ok(tokens as f64 / start.elapsed().as_secs_f64()),
    }
}

/// Bytes of weights that a generated token reads, and operations that a token of a prompt takes in the layers' linear
/// maps. Of an embedding that is not the head as well a token reads one row; the head is computed for a prompt's last
/// token only.
fn cost(gguf: &Gguf) -> (u64, u64) {
    let untied = gguf.tensor("output.weight").is_some();
    let read = |t: &&TensorInfo| !(untied && t.name == "token_embd.weight");
    let bytes = gguf.tensors().iter().filter(read).map(|t| t.len_bytes() as u64).sum();
    let linear = |t: &&TensorInfo| t.name.starts_with("blk.") && t.shape.len() > 1;
    let ops = gguf.tensors().iter().filter(linear).map(|t| 2 * t.elements() as u64).sum();
    (bytes, ops)
}

/// The table of operations, on standard error.
fn show_ops(test: &str, session: &mut Session) {
    let timings = session.take_timings();
    session.set_timing(false);
    eprintln!("{}", output::timings(test, timings));
}
