//! `versus`: Kinglet against llama.cpp, in one process, taking turns.
//!
//! ```text
//! cargo run --release -p kinglet-benches --bin versus -- --model PATH --threads 2 [--json]
//! ```
//!
//! 1. Measures the memory roof.
//! 2. Tries llama.cpp with flash attention on and off, on one thread and on all asked for, and keeps its best settings
//!    for prefill and for decode separately.
//! 3. Runs both engines in the order A B B A, several rounds, prefill and decode, and forms the ratio over neighbours.
//! 4. Starts itself once per engine to measure peak memory in a process of its own.
//!
//! Prints Markdown, or with `--json` one object with `decode_ratio` and `prefill_ratio` (above 1 means Kinglet is
//! faster). Progress goes to the standard error.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use kinglet_benches::contender::{Contender, Shape, measure, settle};
use kinglet_benches::memory::Memory;
use kinglet_benches::peer::{Peer, Settings, without_matrix_unit};
use kinglet_benches::stats::{Samples, paired};
use kinglet_benches::{kinglet, model};
use serde_json::{Value, json};

/// Compares Kinglet with llama.cpp on one model file.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The GGUF file both engines run, or the name of a known model in the cache.
    #[arg(long, value_parser = model::file)]
    model: PathBuf,
    /// Threads for Kinglet; llama.cpp may also use one if it is faster so.
    #[arg(long, default_value_t = std::thread::available_parallelism().map_or(1, usize::from))]
    threads: usize,
    /// Tokens of the prefill run.
    #[arg(long, default_value_t = 512)]
    prefill: usize,
    /// Tokens of the decode run.
    #[arg(long, default_value_t = 64)]
    decode: usize,
    /// Rounds of A B B A.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Deny both engines the matrix unit (AMX), to compare them on AVX-512.
    #[arg(long)]
    without_matrix_unit: bool,
    /// Measure one engine alone.
    #[arg(long, value_enum)]
    only: Option<Engine>,
    /// Print one JSON object instead of Markdown.
    #[arg(long)]
    json: bool,
    /// Run one engine once and print its memory as JSON (what the parent process asks of its children).
    #[arg(long, value_enum, hide = true)]
    memory_of: Option<Engine>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Engine {
    Kinglet,
    Llama,
}

impl Engine {
    fn label(self) -> &'static str {
        match self {
            Engine::Kinglet => "kinglet",
            Engine::Llama => "llama",
        }
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    anyhow::ensure!(args.prefill > 0 && args.decode > 0 && args.rounds > 0, "lengths and rounds must be positive");
    if args.without_matrix_unit {
        without_matrix_unit().context("denying the matrix unit")?;
    }
    if let Some(engine) = args.memory_of {
        return print_memory(engine, &args);
    }
    let missing = Peer::missing_features();
    if !missing.is_empty() {
        eprintln!("warning: this CPU has {}, llama.cpp was built without: its figures are too low", missing.join(", "));
    }

    eprintln!("memory roof …");
    let roof = (1..=args.threads).map(|t| kinglet_engine::cpu::roof::memory(t, 512 << 20, 4)).fold(0.0, f64::max);
    let with = |engine| args.only.is_none_or(|only| only == engine);

    let peer = if with(Engine::Llama) { Some(Peer::open(&args.model)?) } else { None };
    let mut ours =
        if with(Engine::Kinglet) { Some(kinglet::open(&args.model, args.threads, context(&args))?) } else { None };

    let mut report = Vec::new();
    for shape in [Shape::Prefill(args.prefill), Shape::Decode(args.decode)] {
        let mut theirs = match &peer {
            Some(peer) => {
                let settings = best_settings(peer, shape, &args)?;
                Some(peer.contender(settings, context(&args))?)
            }
            None => None,
        };
        let engines = [
            ours.as_mut().map(|engine| engine as &mut dyn Contender),
            theirs.as_mut().map(|engine| engine as &mut dyn Contender),
        ];
        report.push(compare(shape, engines, args.rounds)?);
    }

    let mut memory = Vec::new();
    for engine in [Engine::Kinglet, Engine::Llama] {
        if with(engine) {
            memory.push((engine, child_memory(engine, &args)?));
        }
    }
    let file = std::fs::metadata(&args.model)?.len();
    let read = kinglet::bytes_per_token(&args.model)?;
    if args.json {
        println!("{}", to_json(&args, roof, file, read, &report, &memory));
    } else {
        print!("{}", to_markdown(&args, roof, file, read, &report, &memory));
    }
    Ok(())
}

/// Tokens of context both engines are given: the longer run and some room.
fn context(args: &Args) -> usize {
    (args.prefill.max(args.decode) + 64).next_multiple_of(256)
}

/// Figures of one shape. An engine that was left out has no samples.
struct Comparison {
    shape: Shape,
    ours: Samples,
    theirs: Samples,
    ratio: Samples,
    names: [String; 2],
}

/// Runs both engines in the order A B B A; alone, an engine runs as often.
fn compare(shape: Shape, mut engines: [Option<&mut dyn Contender>; 2], rounds: usize) -> anyhow::Result<Comparison> {
    let mut samples = [Samples::default(), Samples::default()];
    let names = engines.each_ref().map(|engine| engine.as_ref().map_or_else(String::new, |e| e.name()));
    // One untimed run each: page faults, thread start, lazy tables.
    for engine in engines.iter_mut().flatten() {
        measure(&mut **engine, shape)?;
    }
    for round in 0..rounds {
        eprintln!("{} round {}/{rounds} …", shape.label(), round + 1);
        for which in [0, 1, 1, 0] {
            if let Some(engine) = &mut engines[which] {
                settle();
                samples[which].0.push(measure(&mut **engine, shape)?);
            }
        }
    }
    let [ours, theirs] = samples;
    Ok(Comparison { shape, ratio: paired(&ours, &theirs), ours, theirs, names })
}

/// The settings with which llama.cpp is fastest at `shape`.
fn best_settings(peer: &Peer, shape: Shape, args: &Args) -> anyhow::Result<Settings> {
    let mut best = (0.0, Settings { threads: args.threads, flash_attention: false });
    let trial = match shape {
        Shape::Prefill(n) => Shape::Prefill(n.min(256)),
        Shape::Decode(n) => Shape::Decode(n),
    };
    let mut threads = vec![args.threads, 1];
    threads.dedup();
    for threads in threads {
        for flash_attention in [false, true] {
            let settings = Settings { threads, flash_attention };
            let mut engine = peer.contender(settings, context(args))?;
            measure(&mut engine, Shape::Decode(4))?;
            let mut speed = 0.0f64;
            for _ in 0..2 {
                settle();
                speed = speed.max(measure(&mut engine, trial)?);
            }
            eprintln!("llama.cpp {} with {}: {speed:.1} tokens/s", trial.label(), settings.label());
            if speed > best.0 {
                best = (speed, settings);
            }
        }
    }
    Ok(best.1)
}

/// Starts this program once more to run `engine` alone, and reads its memory.
fn child_memory(engine: Engine, args: &Args) -> anyhow::Result<Value> {
    eprintln!("memory of {} …", engine.label());
    let output = Command::new(std::env::current_exe()?)
        .arg("--model")
        .arg(&args.model)
        .args(["--threads", &args.threads.to_string()])
        .args(["--prefill", &args.prefill.to_string()])
        .args(["--decode", &args.decode.to_string()])
        .args(["--memory-of", engine.label()])
        .output()?;
    anyhow::ensure!(
        output.status.success(),
        "{} failed in its own process: {}",
        engine.label(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    serde_json::from_slice(&output.stdout).context("the child's memory report")
}

fn print_memory(engine: Engine, args: &Args) -> anyhow::Result<()> {
    fn run(contender: &mut dyn Contender, args: &Args) -> anyhow::Result<Memory> {
        measure(contender, Shape::Prefill(args.prefill))?;
        measure(contender, Shape::Decode(args.decode))?;
        Memory::of_this_process()
    }
    let memory = match engine {
        Engine::Kinglet => run(&mut kinglet::open(&args.model, args.threads, context(args))?, args)?,
        Engine::Llama => {
            let peer = Peer::open(&args.model)?;
            let settings = Settings { threads: args.threads, flash_attention: true };
            run(&mut peer.contender(settings, context(args))?, args)?
        }
    };
    println!("{}", json!({ "peak_bytes": memory.peak, "anonymous_bytes": memory.anonymous }));
    Ok(())
}

fn to_json(args: &Args, roof: f64, file: u64, read: u64, report: &[Comparison], memory: &[(Engine, Value)]) -> Value {
    let mut object = json!({
        "model": file_name(&args.model),
        "file_bytes": file,
        "bytes_read_per_token": read,
        "threads": args.threads,
        "without_matrix_unit": args.without_matrix_unit,
        "memory_roof_bytes_per_second": roof,
        "llama_cpp_features": Peer::features(),
        "llama_cpp_missing_features": Peer::missing_features(),
    });
    for comparison in report {
        let key = match comparison.shape {
            Shape::Prefill(_) => "prefill",
            Shape::Decode(_) => "decode",
        };
        if !comparison.ratio.0.is_empty() {
            object[format!("{key}_ratio")] = json!(comparison.ratio.median());
            object[format!("{key}_ratio_range")] = json!(comparison.ratio.range());
        }
        let side = |name: &str, samples: &Samples| {
            if samples.0.is_empty() {
                return Value::Null;
            }
            json!({ "engine": name, "tokens_per_second": samples.median(), "range": samples.range(),
                    "samples": samples.0 })
        };
        object[key] = json!({
            "shape": comparison.shape.label(),
            "kinglet": side(&comparison.names[0], &comparison.ours),
            "llama_cpp": side(&comparison.names[1], &comparison.theirs),
        });
    }
    for (engine, value) in memory {
        object[format!("{}_memory", engine.label())] = value.clone();
    }
    object
}

fn to_markdown(
    args: &Args,
    roof: f64,
    file: u64,
    read: u64,
    report: &[Comparison],
    memory: &[(Engine, Value)],
) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    let mega = |bytes: f64| bytes / 1e6;
    // Writing to a `String` cannot fail.
    let _ = writeln!(
        text,
        "### {} ({:.1} MB, {:.1} MB read per decoded token), {} threads\n\n\
         Memory roof {:.1} GB/s. {}llama.cpp built for: {}\n",
        file_name(&args.model),
        mega(file as f64),
        mega(read as f64),
        args.threads,
        roof / 1e9,
        if args.without_matrix_unit { "Neither may use the matrix unit. " } else { "" },
        Peer::features(),
    );
    let _ = writeln!(text, "| run | Kinglet tokens/s | llama.cpp tokens/s (its best) | ratio | share of roof |");
    let _ = writeln!(text, "| --- | --- | --- | --- | --- |");
    for c in report {
        let figure = |samples: &Samples| {
            if samples.0.is_empty() {
                return "–".to_owned();
            }
            let (low, high) = samples.range();
            format!("{:.1} ({low:.1}–{high:.1})", samples.median())
        };
        let ratio = if c.ratio.0.is_empty() {
            "–".to_owned()
        } else {
            let (low, high) = c.ratio.range();
            format!("**{:.2}** ({low:.2}–{high:.2})", c.ratio.median())
        };
        let share = |samples: &Samples| format!("{:.0} %", 100.0 * samples.median() * read as f64 / roof);
        let shares = match c.shape {
            Shape::Prefill(_) => "–".to_owned(),
            Shape::Decode(_) => format!("{} / {}", share(&c.ours), share(&c.theirs)),
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {ratio} | {shares} |",
            c.shape.label(),
            figure(&c.ours),
            figure(&c.theirs)
        );
    }
    let _ = writeln!(text);
    for (engine, value) in memory {
        let bytes = |key: &str| mega(value[key].as_f64().unwrap_or(0.0));
        let _ = writeln!(
            text,
            "* Peak memory of {}: {:.0} MB resident, {:.0} MB of it its own.",
            engine.label(),
            bytes("peak_bytes"),
            bytes("anonymous_bytes")
        );
    }
    for c in report.iter().filter(|c| !c.theirs.0.is_empty()) {
        let _ = writeln!(text, "* {}: {}", c.shape.label(), c.names[1]);
    }
    text
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
