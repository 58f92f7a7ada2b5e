//! `kinglet train`: teach a model on one's own data.

use crate::args::{Global, MODEL_HELP, positive, size};
use crate::interrupt::{self, Interrupted};
use crate::{models, output, progress};
use anyhow::Context;
use clap::{Args, ValueEnum};
use kinglet_engine::Error;
use kinglet_engine::session::Model;
use kinglet_train::config::{Arithmetic, Target, TrainConfig};
use kinglet_train::data::{self, Dataset};
use kinglet_train::preference::Loss;
use kinglet_train::schedule::Shape;
use kinglet_train::trainer::{Ending, Finished, Preflight, Progress, Trainer, TrainerOptions};
use kinglet_train::{keep, metrics::StepMetrics};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Teach a model on your own data: a LoRA adapter over the quantized file, or all weights of a small model
#[derive(Args, Debug)]
#[command(after_help = "\
DATA is .jsonl, .json or plain text; each line of .jsonl is one of
  {\"messages\": [{\"role\": \"user\", \"content\": …}, {\"role\": \"assistant\", \"content\": …}]}
  {\"instruction\": …, \"input\": …, \"output\": …}      {\"prompt\": …, \"completion\": …}      {\"text\": …}
  {\"prompt\": …, \"chosen\": …, \"rejected\": …}         for --loss dpo, ipo, orpo, simpo, kto
Answers are learned behind the model's own chat template, exactly as they will be served.

OUTPUT gets adapter.gguf and the same adapter as PEFT files, metrics.jsonl (a line per step), report.html
and checkpoints. After Ctrl-C or a crash, the same command with --resume goes on, bit by bit the same.

Examples:
  kinglet train --model smollm2 --data chats.jsonl --output my-adapter
  kinglet run smollm2 --adapter my-adapter \"A question from my field\"
  kinglet train --model gemma3 --data law.jsonl --rank 16 --seq 512 --epochs 2 --early-stop 3 -o law
  kinglet train --model smollm2 --data faq.jsonl --epochs 6 --keep 900 -o faq   # forgets less
  kinglet train --model smollm2 --data votes.jsonl --loss dpo --lr 5e-6 -o preferred
  kinglet train --model tiny.gguf --full --data book.txt --lr 1e-3 -o tiny-trained")]
pub struct Arguments {
    /// The model to teach
    #[arg(short, long, help = MODEL_HELP, value_name = "MODEL")]
    model: String,
    /// Files to learn from; may be given again
    #[arg(short, long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// Files to validate on, in place of a share of the data; may be given again
    #[arg(long, value_name = "FILE", conflicts_with = "val_fraction")]
    validation: Vec<PathBuf>,
    /// Against forgetting: texts on which the model is to stay as it is, in a file or so many that it writes itself
    #[arg(long, value_name = "N|FILE")]
    keep: Option<PathBuf>,
    /// Folder for the result; made where it is missing
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Go on from the last checkpoint in the output folder, if there is one
    #[arg(long)]
    resume: bool,
    /// Settings from a JSON file such as OUTPUT/train.json; what is given here as well wins
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Refuse to start if more memory would be needed, such as 800M or 2G; what is free is used for speed
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory_budget: Option<u64>,
    /// Read the frozen weights on the GPU from the mapped file, without a copy, where the driver allows that; for GPUs that share
    /// the processor's memory
    #[arg(long)]
    gpu_import: bool,
    /// Text whose perplexity before and after shows what was forgotten [default: a built-in one]
    #[arg(long, value_name = "FILE")]
    probe: Option<PathBuf>,
    /// Print the table of times by kind of op at the end
    #[arg(long)]
    timing: bool,
    #[command(flatten)]
    adapter: AdapterArgs,
    #[command(flatten)]
    batch: BatchArgs,
    #[command(flatten)]
    descent: DescentArgs,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "What is trained")]
struct AdapterArgs {
    /// Rank of the adapter [default: 8]
    #[arg(short, long, value_name = "R", value_parser = positive)]
    rank: Option<usize>,
    /// The adapter counts alpha/rank [default: 16]
    #[arg(long, value_name = "X")]
    alpha: Option<f64>,
    /// The adapter counts alpha/√rank
    #[arg(long)]
    rslora: bool,
    /// Learn magnitudes apart from directions
    #[arg(long)]
    dora: bool,
    /// Share of the adapter's inputs that a step leaves out [default: 0]
    #[arg(long, value_name = "P")]
    dropout: Option<f64>,
    /// Maps that get an adapter, of q,k,v,o,gate,up,down,embedding,head [default: the first seven]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = target)]
    targets: Option<Vec<Target>>,
    /// Train all weights in f32 instead, and write OUTPUT/model.gguf
    #[arg(long, conflicts_with_all = ["rank", "alpha", "rslora", "dora", "dropout", "targets"])]
    full: bool,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Batches")]
struct BatchArgs {
    /// Rows of a batch [default: 4]
    #[arg(short, long, value_name = "B", value_parser = positive)]
    batch: Option<usize>,
    /// Most tokens of a row [default: 256]
    #[arg(short, long, value_name = "T", value_parser = positive)]
    seq: Option<usize>,
    /// Batches that make one step [default: 1]
    #[arg(long, value_name = "N", value_parser = positive)]
    accumulation: Option<usize>,
    /// Share of the data kept for validation [default: 0.1]
    #[arg(long, value_name = "P")]
    val_fraction: Option<f64>,
    /// Take the data in the order of the files
    #[arg(long)]
    no_shuffle: bool,
    /// All chance follows from it [default: 42]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Descent")]
struct DescentArgs {
    /// Steps [default: as many as the epochs take]
    #[arg(short = 'n', long, value_name = "N")]
    steps: Option<u64>,
    /// Passes over the data [default: 3]
    #[arg(short, long, value_name = "N", conflicts_with = "steps")]
    epochs: Option<f64>,
    /// Highest learning rate [default: 0.0002]
    #[arg(long, value_name = "X")]
    lr: Option<f64>,
    /// How the learning rate falls [default: cosine]
    #[arg(long, value_enum)]
    schedule: Option<ShapeArg>,
    /// Steps over which the learning rate rises [default: 10, at most a tenth of all]
    #[arg(long, value_name = "N")]
    warmup: Option<u64>,
    /// Decoupled weight decay [default: 0]
    #[arg(long, value_name = "X")]
    weight_decay: Option<f64>,
    /// Longest gradient; 0 for no limit [default: 1]
    #[arg(long, value_name = "X")]
    clip: Option<f64>,
    /// Keep the optimizer's state in 8 bits
    #[arg(long)]
    state_8bit: bool,
    /// How exactly the model's own maps are computed [default: narrow]
    #[arg(long, value_enum)]
    arithmetic: Option<ArithmeticArg>,
    /// What is minimised [default: cross-entropy]
    #[arg(long, value_enum)]
    loss: Option<LossArg>,
    /// β of the loss, where it has one
    #[arg(long, value_name = "X", requires = "loss")]
    beta: Option<f64>,
    /// Tokens of --keep in a pass for each of the data; passes take turns with the texts [default: 0.5]
    #[arg(long, value_name = "X", requires = "keep")]
    keep_share: Option<f64>,
    /// How much a token of --keep counts beside a learned one [default: 1]
    #[arg(long, value_name = "X", requires = "keep")]
    keep_weight: Option<f64>,
    /// Steps between validations; 0: only at the end [default: 50]
    #[arg(long, value_name = "N")]
    eval_every: Option<u64>,
    /// Steps between checkpoints; 0: only at the end [default: 50]
    #[arg(long, value_name = "N")]
    checkpoint_every: Option<u64>,
    /// Stop after so many validations without progress, and keep the best state
    #[arg(long, value_name = "N")]
    early_stop: Option<u32>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ShapeArg {
    Cosine,
    Linear,
    Constant,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ArithmeticArg {
    /// In 8-bit integers, as where the adapter will be used: fastest
    Narrow,
    /// In 16-bit integers
    Wide,
    /// In f32
    Exact,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LossArg {
    /// Predict the trained tokens
    CrossEntropy,
    /// Direct preference optimization
    Dpo,
    /// With a share of pairs the wrong way round
    Robust,
    /// A hinge instead of the logistic curve
    Hinge,
    /// Identity preference optimization
    Ipo,
    /// Odds ratios, without a reference
    Orpo,
    /// Averages with a margin, without a reference
    Simpo,
    /// Answers that are good or bad by themselves
    Kto,
}

fn target(text: &str) -> Result<Target, String> {
    serde_json::from_value(json!(text.trim()))
        .map_err(|_| "one of q, k, v, o, gate, up, down, embedding, head is needed".into())
}

impl Arguments {
    /// The settings: the defaults, the file's, the command line's.
    fn config(&self) -> anyhow::Result<TrainConfig> {
        let mut c = match &self.config {
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
                TrainConfig::from_json(&text, &path.display().to_string())?
            }
            None => TrainConfig::default(),
        };
        fn set<T: Clone>(field: &mut T, given: &Option<T>) {
            if let Some(value) = given {
                field.clone_from(value);
            }
        }
        let (a, b, d) = (&self.adapter, &self.batch, &self.descent);
        set(&mut c.rank, &a.rank);
        set(&mut c.alpha, &a.alpha);
        set(&mut c.dropout, &a.dropout);
        set(&mut c.targets, &a.targets);
        c.rslora |= a.rslora;
        c.dora |= a.dora;
        c.full |= a.full;
        set(&mut c.batch, &b.batch);
        set(&mut c.seq, &b.seq);
        set(&mut c.accumulation, &b.accumulation);
        set(&mut c.val_fraction, &b.val_fraction);
        set(&mut c.seed, &b.seed);
        c.shuffle &= !b.no_shuffle;
        if d.steps.is_some() {
            c.steps = d.steps;
            c.warmup = c.warmup.min(d.steps.unwrap_or(0) / 10);
        }
        if let Some(epochs) = d.epochs {
            (c.epochs, c.steps) = (epochs, None);
        }
        set(&mut c.lr, &d.lr);
        set(&mut c.warmup, &d.warmup);
        set(&mut c.weight_decay, &d.weight_decay);
        set(&mut c.clip, &d.clip);
        set(&mut c.keep_weight, &d.keep_weight);
        set(&mut c.keep_share, &d.keep_share);
        set(&mut c.eval_every, &d.eval_every);
        set(&mut c.checkpoint_every, &d.checkpoint_every);
        c.state_8bit |= d.state_8bit;
        if let Some(arithmetic) = d.arithmetic {
            c.arithmetic = match arithmetic {
                ArithmeticArg::Narrow => Arithmetic::Narrow,
                ArithmeticArg::Wide => Arithmetic::Wide,
                ArithmeticArg::Exact => Arithmetic::Exact,
            };
        }
        if d.early_stop.is_some() {
            c.early_stop = d.early_stop;
        }
        if let Some(shape) = d.schedule {
            c.schedule = match shape {
                ShapeArg::Cosine => Shape::Cosine,
                ShapeArg::Linear => Shape::Linear,
                ShapeArg::Constant => Shape::Constant,
            };
        }
        if let Some(loss) = d.loss {
            c.loss = loss_of(loss, d.beta)?;
        }
        c.validate()?;
        Ok(c)
    }
}

/// The loss with its defaults but for β.
fn loss_of(loss: LossArg, beta: Option<f64>) -> anyhow::Result<Loss> {
    let name = match loss {
        LossArg::CrossEntropy => return Ok(Loss::CrossEntropy),
        LossArg::Dpo => "dpo",
        LossArg::Robust => "robust",
        LossArg::Hinge => "hinge",
        LossArg::Ipo => "ipo",
        LossArg::Orpo => "orpo",
        LossArg::Simpo => "simpo",
        LossArg::Kto => "kto",
    };
    let parameters = beta.map_or(json!({}), |beta| json!({ "beta": beta }));
    Ok(serde_json::from_value(json!({ name: parameters }))?)
}

pub fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<()> {
    let config = arguments.config()?;
    let probe = match &arguments.probe {
        Some(path) => Some(std::fs::read_to_string(path).with_context(|| path.display().to_string())?),
        None => None,
    };
    let model = models::open(&arguments.model)?;
    let cancel = Arc::new(AtomicBool::new(false));
    let stop = cancel.clone();
    interrupt::listen(move || stop.store(true, Ordering::Relaxed));
    let data = match load(arguments, global, &model, &config, &cancel) {
        Err(Error::Cancelled) => return Err(Interrupted.into()),
        other => other?,
    };
    let names: Vec<String> =
        arguments.data.iter().map(|p| p.file_name().unwrap_or_default().to_string_lossy().into()).collect();
    let options = TrainerOptions {
        output: arguments.output.clone(),
        title: format!("{} learns {}", arguments.model, names.join(", ")),
        resume: arguments.resume,
        threads: global.threads.unwrap_or(0),
        device: global.device(),
        gpu_import: arguments.gpu_import,
        memory_budget: arguments.memory_budget,
        probe,
    };
    let mut trainer = Trainer::new(&model, &config, data, options)?;
    trainer.learner_mut().set_timing(arguments.timing);
    announce(&trainer);
    let finished = match steps(&mut trainer, &cancel) {
        Err(Error::Cancelled) => {
            let path = trainer.save()?;
            eprintln!(
                "stopped after {} steps, saved in {}; the same command with --resume goes on",
                trainer.step(),
                path.display()
            );
            return Err(Interrupted.into());
        }
        other => other?,
    };
    if arguments.timing {
        eprint!("{}", output::timings("training", trainer.learner_mut().take_timings()));
    }
    match global.json {
        true => output::json(&json!({ "preflight": trainer.preflight(), "result": finished })),
        false => Ok(output::text(&summary(&finished, &arguments.model, trainer.output()))?),
    }
}

/// Reads the data; lets the model write and predict what it is to stay the same on.
fn load(
    arguments: &Arguments,
    global: &Global,
    model: &Model,
    config: &TrainConfig,
    cancel: &AtomicBool,
) -> Result<Dataset, Error> {
    let (threads, gpu_import) = (global.threads.unwrap_or(0), arguments.gpu_import);
    let runs = keep::Options { threads, device: global.device(), gpu_import };
    let own = arguments.keep.as_ref().and_then(|keep| keep.to_str()?.parse::<usize>().ok());
    let kept: Vec<PathBuf> = match (own, &arguments.keep) {
        (Some(0), _) | (_, None) => Vec::new(),
        (Some(count), _) => {
            let bar = progress::steps("texts of the model's own", count as u64);
            let report = |done| bar.set_position(done as u64);
            let path = keep::own_texts(model, &arguments.output, count, config.seed, &runs, cancel, report)?;
            bar.finish_and_clear();
            vec![path]
        }
        (None, Some(file)) => vec![file.clone()],
    };
    let files = data::Files { data: &arguments.data, validation: &arguments.validation, keep: &kept };
    let mut data = data::load(files, model, config)?;
    let bar = progress::steps("tokens predicted in what is kept", 0);
    data.predict(model, &runs, cancel, |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    Ok(data)
}

/// What is known before the first step.
fn announce(trainer: &Trainer) {
    let Preflight { parameters, steps, data, validation, keep, memory, mapped, .. } = trainer.preflight();
    eprintln!(
        "{} examples to learn from, {validation} to validate on ({} tokens, {} of them trained{}){}\n\
         {} parameters, {} steps, {} at the peak{}",
        data.examples - validation,
        data.tokens,
        data.trained,
        match (data.truncated, data.dropped) {
            (0, 0) => String::new(),
            (cut, out) => format!("; {cut} examples were cut, {out} left out"),
        },
        match keep {
            0 => String::new(),
            kept => format!(", {kept} to stay the same on"),
        },
        output::count(*parameters as u64),
        steps,
        output::bytes(*memory),
        match mapped {
            0 => String::new(),
            mapped => format!(", {} of them the mapped model", output::bytes(*mapped)),
        },
    );
    for note in trainer.notes() {
        eprintln!("note: {note}");
    }
}

/// How often the report is written anew while training goes on.
const REPORT_EVERY: Duration = Duration::from_secs(20);

fn steps(trainer: &mut Trainer, cancel: &AtomicBool) -> Result<Finished, Error> {
    let total = trainer.preflight().steps;
    let bar = progress::training(total);
    bar.set_position(trainer.step());
    bar.reset_eta();
    let mut written = Instant::now();
    loop {
        match trainer.advance(cancel)? {
            Progress::Stepped(line) => {
                bar.set_position(line.step);
                bar.set_message(status(&line));
                // Where there is no bar, a line now and then.
                if bar.is_hidden() && (line.step <= 3 || line.step.is_multiple_of(10) || line.step == total) {
                    eprintln!("step {}/{total}: {}", line.step, status(&line));
                }
                if let Some(loss) = line.val_loss {
                    progress::say(&bar, &format!("step {}: validation loss {loss:.4}", line.step));
                }
            }
            Progress::RolledBack { step, why } => {
                progress::say(&bar, &format!("{why}; back to step {step} with half the learning rate"));
            }
            Progress::Done(_) => break,
        }
        if written.elapsed() >= REPORT_EVERY {
            trainer.report(None)?;
            written = Instant::now();
        }
    }
    bar.finish_and_clear();
    trainer.finish(cancel)
}

fn status(line: &StepMetrics) -> String {
    let StepMetrics { loss, lr, grad_norm, tokens_per_second, keep_kl, .. } = line;
    let kept = keep_kl.map_or(String::new(), |kl| format!("  kept within {kl:.4}"));
    let accuracy = line.reward_accuracy.map_or(String::new(), |a| format!("  right {:.0} %", 100.0 * a));
    format!("loss {loss:.4}{kept}{accuracy}  lr {lr:.2e}  gradient {grad_norm:.3}  {tokens_per_second:.0} tokens/s")
}

fn summary(f: &Finished, model: &str, output: &std::path::Path) -> String {
    let mut text = format!("{} steps, {} tokens in {:.0} s", f.steps, f.tokens, f.seconds);
    if f.ending == Ending::EarlyStop {
        text += &format!(", stopped early; the state of step {} was kept", f.written_step);
    }
    if let Some([before, after]) = f.validation {
        text += &format!("\nvalidation loss {before:.4} → {after:.4}");
    }
    text += &format!(
        "\nperplexity on general text {:.2} → {:.2} ({:+.1} %)\n",
        f.forgetting.before,
        f.forgetting.after,
        100.0 * f.forgetting.change()
    );
    for note in &f.notes {
        text += &format!("note: {note}\n");
    }
    for file in &f.files {
        text += &format!("{}\n", file.display());
    }
    text += &format!("{}\n", output.join("report.html").display());
    let adapter = f.files.iter().any(|file| file.ends_with("adapter.gguf"));
    text += &match adapter {
        true => format!("try it: kinglet run {model} --adapter {}\n", output.display()),
        false => format!("try it: kinglet run {}\n", output.join("model.gguf").display()),
    };
    text
}
