//! `train`: how fast a step of LoRA training is, alone.
//!
//! ```text
//! cargo run --release -p kinglet-benches --no-default-features --bin train -- --model smollm2 --threads 2 [--json]
//! ```
//!
//! Adapters of all seven linear maps of every layer, sequences of real text, AdamW: one step is forward, backward and
//! the optimizer, as `peers/peft.py` times it for PyTorch with PEFT. The floating-point operations counted are those the
//! mathematics asks for (nothing that is computed twice): forward and input gradient of every frozen map, the head
//! included, the adapters' three products each way, causal attention. Their rate is compared with the roof of this
//! machine's f32 arithmetic; integer arithmetic may exceed it.
//!
//! Prints Markdown, or with `--json` one object. Needs `handbook.txt` of the tests, or any `--text`.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use kinglet_benches::memory::Memory;
use kinglet_benches::model;
use kinglet_benches::stats::Samples;
use kinglet_engine::cpu::roof;
use kinglet_engine::quant::DType;
use kinglet_engine::session::{Arithmetic, Device, LearnBatch, Learner, LearnerOptions, Model};
use kinglet_engine::tape::{LoraSpec, Timing};
use kinglet_engine::text::EncodeOptions;
use kinglet_models::tiny::{TinyConfig, write_tiny};
use kinglet_train::init::golden_init;
use kinglet_train::optimizer::{AdamW, Options, Parameter};
use serde_json::{Value, json};

/// Times steps of LoRA training on one model file.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The GGUF file, or the name of a known model in the cache.
    #[arg(long, value_parser = model::file, required_unless_present = "random")]
    model: Option<PathBuf>,
    /// Train on random weights of this type instead, 4 layers of 1024 × 3072, to compare types with.
    #[arg(long, conflicts_with = "model")]
    random: Option<DType>,
    /// Rank of the adapters.
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// Sequences per step.
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens per sequence.
    #[arg(long, default_value_t = 256)]
    seq: usize,
    /// Timed steps, after one that is not.
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Threads.
    #[arg(long, default_value_t = std::thread::available_parallelism().map_or(1, usize::from))]
    threads: usize,
    /// Megabytes the whole may take, the mapped file included.
    #[arg(long)]
    memory: Option<u64>,
    /// Arithmetic of the frozen maps.
    #[arg(long, value_enum, default_value_t = Choice::Narrow)]
    arithmetic: Choice,
    /// Where gradients are computed: cpu, gpu or gpu:N.
    #[arg(long, default_value = "cpu")]
    backend: Device,
    /// Text to train on.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/handbook.txt"))]
    text: PathBuf,
    /// Print one JSON object instead of Markdown.
    #[arg(long)]
    json: bool,
    /// Leave the roofs out, which take a second.
    #[arg(long)]
    no_roof: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Choice {
    Exact,
    Wide,
    Narrow,
}

impl From<Choice> for Arithmetic {
    fn from(choice: Choice) -> Arithmetic {
        match choice {
            Choice::Exact => Arithmetic::Exact,
            Choice::Wide => Arithmetic::Wide,
            Choice::Narrow => Arithmetic::Narrow,
        }
    }
}

/// Writes a model whose rows are whole blocks of every type, but for a head of Q8_0 in all of them.
fn random_model(dtype: DType) -> anyhow::Result<PathBuf> {
    let path = std::env::temp_dir().join(format!("random-{dtype}-{}.gguf", std::process::id()));
    let shape = TinyConfig {
        layers: 4,
        width: 1024,
        heads: 16,
        kv_heads: 4,
        head_dim: 64,
        ffn: 3072,
        context: 4096,
        dtype,
        embedding: DType::Q8_0,
        ..TinyConfig::new("llama").with_bpe()
    };
    write_tiny(&path, &shape)?;
    Ok(path)
}

/// Endings of the maps that are adapted.
const MAPS: [&str; 7] = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    anyhow::ensure!(args.batch > 0 && args.seq > 1 && args.steps > 0, "batch, steps and length must be positive");
    let path = match args.random {
        Some(dtype) => random_model(dtype)?,
        None => args.model.clone().context("a model or a type is wanted: --model, --random")?,
    };
    let opened = kinglet_models::open(&path);
    if args.random.is_some() {
        // The map keeps what it holds.
        std::fs::remove_file(&path)?;
    }
    let model = opened?;
    let is_map = |name: &str| name.starts_with("blk.") && MAPS.iter().any(|m| name.ends_with(&format!(".{m}.weight")));
    let weights = model.weights().iter().map(|(_, w)| w.name.clone()).filter(|name| is_map(name)).collect();
    let options = LearnerOptions {
        trained: LoraSpec { rank: args.rank, scale: 2.0, weights, ..LoraSpec::default() }.into(),
        tokens: args.batch * args.seq,
        sequence: args.seq,
        arithmetic: args.arithmetic.into(),
        threads: args.threads,
        device: args.backend.clone(),
        gpu_import: false,
        memory_budget: args.memory.map(|mb| mb * 1_000_000),
    };
    let mut learner = Learner::new(&model, &options)?;
    let tokens = tokens(&args, &model)?;
    let run = run(&args, &mut learner, &tokens)?;
    let memory = Memory::of_this_process()?;
    let per_token = operations_per_token(&args, &model);
    let (roof, wide_roof) = match args.no_roof {
        true => (0.0, 0.0),
        false => (roof::f32(args.threads).0, roof::int16(args.threads).0),
    };
    let bf16_roof = roof::bf16(args.threads).filter(|_| !args.no_roof).map(|r| r.0 / 1e9);
    let estimate = learner.estimate();
    let report = json!({
        "model": path.file_name().unwrap_or_default().to_string_lossy(),
        "rank": args.rank, "batch": args.batch, "seq": args.seq, "threads": args.threads,
        "arithmetic": format!("{:?}", args.arithmetic).to_lowercase(),
        "tokens_per_second": run.speeds.median(),
        "range": run.speeds.range(),
        "samples": run.speeds.0,
        "first_loss": run.losses.first(), "last_loss": run.losses.last(),
        "peak_bytes": memory.peak, "anonymous_bytes": memory.anonymous,
        "estimated_bytes": estimate.resident(), "arena_bytes": estimate.arena,
        "gflop_per_token": per_token / 1e9,
        "gflop_per_second": run.speeds.median() * per_token / 1e9,
        "f32_roof_gflop_per_second": roof / 1e9,
        "int16_roof_gop_per_second": wide_roof / 1e9,
        "bf16_roof_gflop_per_second": bf16_roof,
        "share_of_f32_roof": if roof > 0.0 { run.speeds.median() * per_token / roof } else { 0.0 },
        "share_of_int16_roof": if roof > 0.0 { run.speeds.median() * per_token / wide_roof } else { 0.0 },
        "ops": run.timings.iter().map(|t| json!({
            "op": t.op, "count": t.count, "milliseconds_per_step": t.total.as_secs_f64() * 1e3,
        })).collect::<Vec<_>>(),
        "optimizer_milliseconds_per_step": run.optimizer * 1e3 / args.steps as f64,
    });
    if args.json {
        println!("{report}");
    } else {
        print!("{}", to_markdown(&report));
    }
    Ok(())
}

/// Token ids of the text: enough for every step, from its beginning again when it ends.
fn tokens(args: &Args, model: &Model) -> anyhow::Result<Vec<u32>> {
    let text = std::fs::read_to_string(&args.text).with_context(|| args.text.display().to_string())?;
    let ids = model.tokenizer().encode(&text, EncodeOptions { add_special: false, parse_special: false });
    anyhow::ensure!(!ids.is_empty(), "{} has no text", args.text.display());
    Ok(ids.into_iter().cycle().take((args.steps + 2) * args.batch * args.seq).collect())
}

/// What the steps gave.
#[derive(Default)]
struct Run {
    speeds: Samples,
    losses: Vec<f64>,
    timings: Vec<Timing>,
    /// Seconds of all timed steps together.
    optimizer: f64,
}

fn run(args: &Args, learner: &mut Learner, tokens: &[u32]) -> anyhow::Result<Run> {
    let mut params = vec![0.0; learner.param_count()];
    for p in learner.params().iter().filter(|p| p.name.ends_with(".lora_a")) {
        params[p.offset..p.end()].copy_from_slice(&golden_init(&p.name, &[p.rows, p.width], 42));
    }
    let all = Parameter { name: "adapters".into(), len: params.len(), decay: false };
    let mut optimizer = AdamW::new(Options::default(), &[all]);
    let mut gradients = vec![0.0; params.len()];
    let mut run = Run::default();
    let never = AtomicBool::new(false);
    for (step, tokens) in tokens.chunks_exact(args.batch * args.seq).enumerate() {
        let outputs: Vec<u32> = (0..tokens.len()).filter(|i| i % args.seq != args.seq - 1).map(|i| i as u32).collect();
        let batch = LearnBatch {
            targets: outputs.iter().map(|i| tokens[*i as usize + 1]).collect(),
            weights: vec![1.0 / outputs.len() as f32; outputs.len()],
            tokens: tokens.to_vec(),
            lengths: vec![args.seq; args.batch],
            outputs,
            ..LearnBatch::default()
        };
        let start = Instant::now();
        gradients.fill(0.0);
        let scores = learner.learn(&batch, &params, &mut gradients, &never)?;
        let loss = scores.iter().map(|s| f64::from(*s)).sum::<f64>() / scores.len() as f64;
        let learned = Instant::now();
        optimizer.step(1e-4, &mut [&mut params], &[&gradients])?;
        run.losses.push(loss);
        // The first step warms up; the last is for the table of ops, whose clocks slow a GPU down.
        if (1..=args.steps).contains(&step) {
            run.speeds.0.push(tokens.len() as f64 / start.elapsed().as_secs_f64());
            run.optimizer += learned.elapsed().as_secs_f64();
            eprintln!("step {step}: loss {loss:.4}, {:.1} tokens/s", run.speeds.0[step - 1]);
        }
        learner.set_timing(step >= args.steps);
    }
    run.timings = learner.take_timings();
    run.timings.sort_by_key(|t| std::cmp::Reverse(t.total));
    Ok(run)
}

/// Additions and multiplications that a token of a training step needs, on average.
fn operations_per_token(args: &Args, model: &Model) -> f64 {
    let spec = model.spec();
    let predicted = (args.seq - 1) as f64 / args.seq as f64;
    let weights = model.weights();
    let maps = weights.iter().filter(|(_, w)| w.name.starts_with("blk.") && w.rows > 1 && w.width > 1);
    let (mut frozen, mut adapters) = (0, 0);
    for (_, w) in maps {
        frozen += w.rows * w.width;
        adapters += args.rank * (w.rows + w.width);
    }
    let head = (spec.vocab * spec.width) as f64 * predicted;
    // Two products forward, five backward, over half of the pairs of positions on average.
    let attention = (spec.layers.len() * spec.heads * spec.head_dim) as f64 * 7.0 * (args.seq + 1) as f64 / 2.0;
    2.0 * (2.0 * (frozen as f64 + head) + 3.0 * adapters as f64 + attention)
}

fn to_markdown(report: &Value) -> String {
    use std::fmt::Write;
    let number = |key: &str| report[key].as_f64().unwrap_or(0.0);
    let mut text = String::new();
    // Writing to a `String` cannot fail.
    let _ = writeln!(
        text,
        "### {}, rank {}, {} × {} tokens, {} threads, {} arithmetic\n\n\
         * {:.1} tokens/s ({:.1}–{:.1}), loss {:.4} → {:.4}\n\
         * peak memory {:.0} MB resident, {:.0} MB of it its own; planned {:.0} MB\n\
         * {:.3} GFLOP per token, {:.1} GFLOP/s: {:.0} % of the f32 roof of {:.0} GFLOP/s, {:.0} % of the 16-bit \
         integer roof of {:.0}\n\n\
         | op | runs | ms per step |\n| --- | --- | --- |",
        report["model"].as_str().unwrap_or_default(),
        report["rank"],
        report["batch"],
        report["seq"],
        report["threads"],
        report["arithmetic"].as_str().unwrap_or_default(),
        number("tokens_per_second"),
        report["range"][0].as_f64().unwrap_or(0.0),
        report["range"][1].as_f64().unwrap_or(0.0),
        number("first_loss"),
        number("last_loss"),
        number("peak_bytes") / 1e6,
        number("anonymous_bytes") / 1e6,
        number("estimated_bytes") / 1e6,
        number("gflop_per_token"),
        number("gflop_per_second"),
        100.0 * number("share_of_f32_roof"),
        number("f32_roof_gflop_per_second"),
        100.0 * number("share_of_int16_roof"),
        number("int16_roof_gop_per_second"),
    );
    for op in report["ops"].as_array().into_iter().flatten() {
        let ms = op["milliseconds_per_step"].as_f64().unwrap_or(0.0);
        let _ = writeln!(text, "| {} | {} | {ms:.1} |", op["op"].as_str().unwrap_or_default(), op["count"]);
    }
    let _ = writeln!(text, "| (optimizer) | 1 | {:.1} |", number("optimizer_milliseconds_per_step"));
    text
}
