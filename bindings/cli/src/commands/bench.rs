//! `kinglet bench`: how fast a model runs here, in the terms of llama-bench, and how near to what the machine can do.
//!
//! `pp512` feeds 512 tokens to an empty window; `tg64` feeds 64 tokens one after the other, the first to an empty window.
//! `tg64×8` feeds 64 tokens to each of 8 windows, one each at a time, and counts all of them (`--sequences 8`).
//! Each is run once to warm up and then `-r` times. The roofs are measured before: a decoded token reads every weight
//! once, so `bytes per token / memory roof` is the time no program beats; a prompt's token costs two operations per
//! weight of the layers.

mod kernels;

use crate::args::{Global, MODEL_HELP, MemoryArgs, Usage, positive};
use crate::interrupt::{self, Interrupted};
use crate::output::{self, Table};
use crate::{adapters, models};
use clap::{Args, Subcommand};
use kinglet_engine::cpu::roof;
use kinglet_engine::gguf::{Gguf, TensorInfo};
#[cfg(feature = "gpu")]
use kinglet_engine::gpu::TunedKernel;
use kinglet_engine::session::{CancelHandle, Engine, ScaledAdapter, SessionOptions};
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
  kinglet bench smollm2 -p 0 -n 64 --sequences 8       8 answers at once against one
  kinglet bench smollm2 --adapter mine                 what an adapter beside the weights costs
  kinglet bench smollm2 -p 512 -n 0 --ops              with the time of each kind of operation
  kinglet bench smollm2 --backend gpu --tune           which kernels the GPU is quickest with
  kinglet bench smollm2 --backend gpu --kernels usual  and with those that are taken untimed
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
    /// Generate for so many windows together as well
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive)]
    sequences: usize,
    /// Repetitions of each
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = positive)]
    repetitions: usize,
    /// Measure with this LoRA adapter as well, in turns; may be given again
    #[arg(long, value_name = "FILE[:FACTOR]")]
    adapter: Vec<String>,
    /// Show where the time goes
    #[arg(long)]
    ops: bool,
    /// Time the kernels a GPU may multiply with, show them all, and keep what is found; with --kernels int8 those too
    #[cfg(feature = "gpu")]
    #[arg(long)]
    tune: bool,
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
    /// Tokens for each sequence.
    tokens: usize,
    /// Sequences that are decoded together.
    sequences: usize,
    /// Mean tokens per second, of all sequences together.
    mean: f64,
    /// Sample standard deviation.
    deviation: f64,
    samples: Vec<f64>,
    /// Share of the roof that bounds it, 1 being all, and which it is; unknown of a GPU.
    share: Option<f64>,
    roof: Option<&'static str>,
    /// Bytes of weights that generating reads a second.
    read: Option<f64>,
}

/// What bounds the speed of a processor.
struct Roofs {
    /// Bytes a second.
    memory: f64,
    /// 8-bit operations a second, and the instruction for them.
    int8: f64,
    instruction: &'static str,
    /// The same of a matrix unit in bf16, where there is one: prompts run on it then.
    unit: Option<(f64, &'static str)>,
}

impl Roofs {
    /// What bounds a prompt: its name, and operations a second.
    fn prompt(&self) -> (&'static str, f64) {
        self.unit.map_or(("int8", self.int8), |(unit, _)| ("bf16", unit))
    }
}

/// Where a model runs.
struct Place {
    /// The processor's instructions, or the GPU's name.
    name: String,
    /// Of a processor; a GPU's are on its data sheet.
    roofs: Option<Roofs>,
    /// What a decoded token moves on a GPU, and which kernels were chosen there.
    traffic: String,
    /// Times of a GPU's kernels.
    kernels: Vec<serde_json::Value>,
}

impl Place {
    fn of(engine: &mut Engine, threads: usize, arguments: &Arguments) -> anyhow::Result<Place> {
        #[cfg(feature = "gpu")]
        if let Some(t) = engine.decode_traffic()? {
            let traffic = format!(
                "\nOn the GPU a generated token takes {} dispatches, which read {} of weights and move {} of values.",
                t.dispatches,
                output::bytes(t.weight_bytes),
                output::bytes(t.value_bytes)
            );
            let tuned = engine.gpu().map(|device| device.tuned()).unwrap_or_default();
            let text = if arguments.tune { tuned_table(&tuned) } else { tuned_lines(&tuned) };
            let kernels = tuned.iter().map(serde_json::to_value).collect::<Result<_, _>>()?;
            return Ok(Place { name: engine.device_name(), roofs: None, traffic: traffic + &text, kernels });
        }
        #[cfg(feature = "gpu")]
        if arguments.tune {
            return Err(Usage("--tune is about a GPU's kernels; choose one with --backend".into()).into());
        }
        #[cfg(not(feature = "gpu"))]
        let _ = (engine, arguments);
        eprintln!("measuring the roofs of this machine");
        let (int8, instruction) = roof::int8(threads);
        let roofs =
            Roofs { memory: roof::memory(threads, 512 << 20, 4), int8, instruction, unit: roof::matrix_unit(threads) };
        let (traffic, kernels) = (String::new(), Vec::new());
        Ok(Place { name: Isa::detect().name().to_string(), roofs: Some(roofs), traffic, kernels })
    }
}

/// All candidates with their times.
#[cfg(feature = "gpu")]
fn tuned_table(tuned: &[TunedKernel]) -> String {
    let mut table = Table::new(&["rows", "weights", "shape", "kernel", ">µs", ">worst", ""]);
    for t in tuned {
        let mark = match (t.chosen, t.default) {
            (true, true) => "chosen, usual",
            (true, false) => "chosen",
            (false, true) => "usual",
            (false, false) => t.note.as_str(),
        };
        table.row(vec![
            t.family.into(),
            t.weights.into(),
            shape(t),
            t.kernel.clone(),
            t.microseconds.map_or("-".into(), |us| format!("{us:.1}")),
            format!("{:.5}", t.worst),
            mark.into(),
        ]);
    }
    format!("\n\n{}\nWorst: largest difference from the plain kernel, in root mean squares of a row.", table.markdown())
}

/// Where something else than the usual was chosen.
#[cfg(feature = "gpu")]
fn tuned_lines(tuned: &[TunedKernel]) -> String {
    let chosen = tuned.iter().filter(|t| t.chosen && !t.default);
    let lines = chosen.map(|t| {
        let alike = |o: &&TunedKernel| (o.weights, o.shape, o.timed) == (t.weights, t.shape, t.timed) && o.default;
        let usual = tuned.iter().find(alike).and_then(|usual| usual.microseconds);
        let gain = match (t.microseconds, usual) {
            (Some(us), Some(usual)) => format!(", {us:.1} µs, not {usual:.1} µs"),
            _ => String::new(),
        };
        format!("\nTuned for {} times {}: {}{gain}.", shape(t), t.weights, t.kernel)
    });
    lines.collect()
}

/// A class of shapes, with the one that was timed.
#[cfg(feature = "gpu")]
fn shape(t: &TunedKernel) -> String {
    let (rows, (n, k)) = t.timed;
    format!("{} ({rows} × {n} × {k})", t.shape)
}

pub fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<()> {
    let name = match (&arguments.what, &arguments.model) {
        (Some(What::Kernels(arguments)), _) => return kernels::run(arguments, global),
        (None, Some(name)) => name,
        (None, None) => return Err(Usage("a model is needed".into()).into()),
    };
    let model = models::open(name)?;
    let longest = arguments.prompts.iter().chain(&arguments.generate).copied().max().unwrap_or(0);
    #[cfg_attr(not(feature = "gpu"), allow(unused_mut))]
    let mut options =
        SessionOptions { logit_rows: arguments.sequences, ..arguments.memory.options(longest.max(1), global) };
    #[cfg(feature = "gpu")]
    if arguments.tune {
        options.device = global.tuned_anew();
    }
    let mut engine = Engine::new(&model, &options)?;
    let threads = engine.options().threads;
    let cancel = CancelHandle::default();
    let handle = cancel.clone();
    interrupt::listen(move || handle.cancel());

    let Place { name: place, roofs, traffic, kernels } = Place::of(&mut engine, threads, arguments)?;
    let (per_token, ops) = cost(model.gguf());
    let adapters = arguments.adapter.iter().map(|a| adapters::open(a, &model)).collect::<anyhow::Result<Vec<_>>>()?;
    let sets = if adapters.is_empty() { vec![vec![]] } else { vec![vec![], adapters] };

    let mut rows = Vec::new();
    let prompts = arguments.prompts.iter().map(|n| Test { tokens: *n, decode: false, sequences: 1 });
    let counts = if arguments.sequences > 1 { vec![1, arguments.sequences] } else { vec![1] };
    let generate = arguments
        .generate
        .iter()
        .flat_map(|n| counts.iter().map(|sequences| Test { tokens: *n, decode: true, sequences: *sequences }));
    for test in prompts.chain(generate).filter(|test| test.tokens > 0) {
        eprintln!("{}: {} runs", test.name(), arguments.repetitions);
        for (adapters, samples) in sets.iter().zip(series(test, &mut engine, &sets, arguments, &cancel)?) {
            let name = format!("{}{}", test.name(), if adapters.is_empty() { "" } else { " adapted" });
            let mean = samples.iter().sum::<f64>() / samples.len() as f64;
            let squares: f64 = samples.iter().map(|s| (s - mean).powi(2)).sum();
            let deviation = (squares / (samples.len() - 1).max(1) as f64).sqrt();
            // The weights are read once for all sequences.
            let read = test.decode.then(|| mean * per_token as f64 / test.sequences as f64);
            let share = roofs.as_ref().map(|roofs| match read {
                Some(read) => read / roofs.memory,
                None => mean * ops as f64 / roofs.prompt().1,
            });
            let roof = roofs.as_ref().map(|roofs| if test.decode { "memory" } else { roofs.prompt().0 });
            let (tokens, sequences) = (test.tokens, test.sequences);
            rows.push(Row { test: name, tokens, sequences, mean, deviation, samples, share, roof, read });
        }
    }
    let large_pages = model.gguf().large_page_bytes();
    if global.json {
        return output::json(&json!({
            "model": name,
            "file_bytes": model.gguf().file_bytes(),
            "large_page_bytes": large_pages,
            "bytes_per_token": per_token,
            "operations_per_prompt_token": ops,
            "threads": threads,
            "place": place,
            "chunk": engine.options().chunk,
            "kv_type": engine.options().kv_type.name(),
            "roofs": roofs.as_ref().map(|r| json!({
                "memory_bytes_per_second": r.memory, "int8_operations_per_second": r.int8, "int8_instruction": r.instruction,
                "bf16_operations_per_second": r.unit.map(|u| u.0), "bf16_instruction": r.unit.map(|u| u.1),
            })),
            "tests": rows,
            "kernels": kernels,
        }));
    }
    let mut table =
        Table::new(&["model", ">size", ">threads", "on", ">test", ">tokens/s", ">weights read", "roof", ">share"]);
    for row in &rows {
        table.row(vec![
            name.clone(),
            output::bytes(model.gguf().file_bytes()),
            threads.to_string(),
            place.clone(),
            row.test.clone(),
            format!("{:.2} ± {:.2}", row.mean, row.deviation),
            row.read.map_or(String::new(), |read| format!("{:.1} GB/s", read / 1e9)),
            row.roof.unwrap_or_default().into(),
            row.share.map_or(String::new(), |share| format!("{:.0} %", share * 100.0)),
        ]);
    }
    let roofs = roofs.map_or(String::new(), |r| {
        let Roofs { memory, int8, instruction, unit } = r;
        format!(
            "Roofs of this machine with {threads} threads: memory {:.1} GB/s; int8 {:.0} Gop/s ({instruction}){}.\n",
            memory / 1e9,
            int8 / 1e9,
            unit.map_or(String::new(), |(rate, name)| format!("; bf16 {:.0} Gop/s ({name})", rate / 1e9)),
        )
    });
    // Of a GPU this says nothing.
    let pages = large_pages.filter(|_| traffic.is_empty()).map_or(String::new(), |bytes| {
        format!(" ({:.0} % of the file in large pages)", 100.0 * bytes as f64 / model.gguf().file_bytes().max(1) as f64)
    });
    Ok(output::text(&format!(
        "{}\n{roofs}A generated token reads {}{pages}, a prompt token takes {:.2} Gop.{traffic}\n",
        table.markdown(),
        output::bytes(per_token),
        ops as f64 / 1e9
    ))?)
}

/// Tokens per second of every repetition, for each set of adapters; the sets take turns, so that a machine that changes its
/// speed does so for all.
fn series(
    test: Test,
    engine: &mut Engine,
    sets: &[Vec<ScaledAdapter>],
    arguments: &Arguments,
    cancel: &CancelHandle,
) -> anyhow::Result<Vec<Vec<f64>>> {
    let mut samples = vec![Vec::with_capacity(arguments.repetitions); sets.len()];
    for repetition in 0..arguments.repetitions {
        for (adapters, samples) in sets.iter().zip(&mut samples) {
            if repetition == 0 || sets.len() > 1 {
                engine.set_adapters(adapters)?;
                test.run(engine, cancel)?;
                engine.take_timings();
            }
            engine.set_timing(arguments.ops);
            samples.push(test.run(engine, cancel)?);
            if arguments.ops && repetition + 1 == arguments.repetitions {
                show_ops(&test.name(), engine);
            }
        }
    }
    Ok(samples)
}

/// What is measured.
#[derive(Clone, Copy)]
struct Test {
    tokens: usize,
    decode: bool,
    sequences: usize,
}

impl Test {
    fn name(&self) -> String {
        let name = format!("{}{}", if self.decode { "tg" } else { "pp" }, self.tokens);
        if self.sequences > 1 { format!("{name}×{}", self.sequences) } else { name }
    }

    /// Runs it once and gives tokens per second.
    fn run(&self, engine: &mut Engine, cancel: &CancelHandle) -> anyhow::Result<f64> {
        let vocab = engine.model().spec().vocab as u32;
        // Arbitrary but the same in every run.
        let ids: Vec<u32> =
            (0..self.tokens as u32).map(|i| i.wrapping_mul(2_654_435_761).wrapping_add(17) % vocab.max(1)).collect();
        let mut sequences = vec![engine.sequence(); self.sequences];
        let chunk = if self.decode { 1 } else { engine.options().chunk };
        let start = Instant::now();
        for (i, tokens) in ids.chunks(chunk).enumerate() {
            let mut feeds: Vec<_> = sequences.iter_mut().map(|sequence| (sequence, tokens)).collect();
            // A prompt's logits are wanted at its end.
            let done = match self.decode || (i + 1) * chunk >= self.tokens {
                true => engine.step(&mut feeds, cancel.flag()).map(|_| ()),
                false => engine.feed(&mut feeds, cancel.flag()),
            };
            match done {
                Err(Error::Cancelled) => return Err(Interrupted.into()),
                done => done?,
            }
        }
        Ok((self.tokens * self.sequences) as f64 / start.elapsed().as_secs_f64())
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
fn show_ops(test: &str, engine: &mut Engine) {
    let timings = engine.take_timings();
    engine.set_timing(false);
    eprintln!("{}", output::timings(test, timings));
}
