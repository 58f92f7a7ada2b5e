//! The training loop as a whole, on tiny models: it learns, it can be interrupted anywhere, it says what is wrong.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kinglet_engine::Error;
use kinglet_engine::adapter::Adapter;
use kinglet_engine::quant::DType;
use kinglet_engine::session::{Device, LearnBatch, Model, Session, SessionOptions};
use kinglet_models::peft;
use kinglet_models::tiny::{TinyConfig, write_tiny};
use kinglet_tests::data::Scratch;
use kinglet_tests::process::{kinglet, start};
use kinglet_train::batch::Packing;
use kinglet_train::config::{Target, TrainConfig};
use kinglet_train::metrics::{self, StepMetrics};
use kinglet_train::preference::Loss;
use kinglet_train::trainer::{Ending, Finished, Progress, Trainer, TrainerOptions};
use kinglet_train::{data, keep};

/// A tiny model and some questions and answers.
pub(crate) struct Bench {
    pub scratch: Scratch,
    pub model: Model,
    /// Where it is trained.
    pub device: Device,
    /// As [`TrainerOptions::gpu_import`].
    pub gpu_import: bool,
    /// Texts on which the model is to stay as it is.
    pub keep: Vec<PathBuf>,
}

fn write_model(arch: &str, scratch: &Scratch) -> PathBuf {
    let path = scratch.path("model.gguf");
    write_tiny(&path, &TinyConfig::new(arch).with_bpe()).expect("a tiny model");
    path
}

pub(crate) fn write_pairs(scratch: &Scratch) -> PathBuf {
    let path = scratch.path("pairs.jsonl");
    let lines: Vec<String> = (0..40)
        .map(|i| {
            format!(
                "{{\"prompt\": \"number {i} is\", \"completion\": \" {}\"}}",
                "even odd".split(' ').nth(i % 2).unwrap_or("")
            )
        })
        .collect();
    std::fs::write(&path, lines.join("\n")).expect("a file");
    path
}

impl Bench {
    pub fn new(name: &str) -> Bench {
        Bench::of("llama", name)
    }

    pub fn of(arch: &str, name: &str) -> Bench {
        let scratch = Scratch::new(name);
        let model = kinglet_models::open(write_model(arch, &scratch)).expect("the model opens");
        Bench { scratch, model, device: Device::Cpu, gpu_import: false, keep: Vec::new() }
    }

    /// With texts that the model writes itself.
    pub fn keeping(name: &str, texts: usize) -> Bench {
        let mut bench = Bench::new(name);
        let out = bench.scratch.path("own");
        let options = keep::Options { threads: 1, ..keep::Options::default() };
        let path = keep::own_texts(&bench.model, &out, texts, 3, &options, &AtomicBool::new(false), |_| {});
        bench.keep = vec![path.expect("texts")];
        bench
    }

    pub fn trainer(&self, config: &TrainConfig, data: &Path, output: &str, resume: bool) -> Result<Trainer, Error> {
        let options = TrainerOptions {
            output: self.scratch.path(output),
            title: "a test".into(),
            resume,
            threads: 1,
            device: self.device.clone(),
            gpu_import: self.gpu_import,
            probe: Some("A wren is a small brown bird.".into()),
            ..TrainerOptions::default()
        };
        let (data, go) = ([data.to_path_buf()], AtomicBool::new(false));
        let files = data::Files { data: &data, validation: &[], keep: &self.keep };
        let mut data = data::load(files, &self.model, config)?;
        data.predict(&self.model, &keep::Options { threads: 1, ..keep::Options::default() }, &go, |_, _| {})?;
        Trainer::new(&self.model, config, data, options)
    }

    /// All steps and the end.
    pub fn train(&self, config: &TrainConfig, data: &Path, output: &str) -> (Vec<StepMetrics>, Finished) {
        let mut trainer = self.trainer(config, data, output, false).expect("a trainer");
        let finished = complete(&mut trainer).expect("a finished training");
        (metrics::read(&self.scratch.path(output).join("metrics.jsonl")).expect("metrics"), finished)
    }
}

pub(crate) fn complete(trainer: &mut Trainer) -> Result<Finished, Error> {
    let go = AtomicBool::new(false);
    while !matches!(trainer.advance(&go)?, Progress::Done(_)) {}
    trainer.finish(&go)
}

/// A configuration in which everything that has a state of its own takes part.
pub(crate) fn config() -> TrainConfig {
    TrainConfig {
        rank: 4,
        dropout: 0.1,
        batch: 3,
        seq: 32,
        accumulation: 2,
        steps: Some(12),
        warmup: 2,
        lr: 1e-2,
        state_8bit: true,
        eval_every: 4,
        checkpoint_every: 3,
        early_stop: Some(5),
        ..TrainConfig::default()
    }
}

/// Without what depends on the clock.
pub(crate) fn timeless(mut lines: Vec<StepMetrics>) -> Vec<StepMetrics> {
    lines.iter_mut().for_each(|line| line.tokens_per_second = 0.0);
    lines
}

#[test]
fn a_model_learns_what_it_is_told() {
    let bench = Bench::new("learns");
    let config = TrainConfig { steps: Some(60), accumulation: 1, state_8bit: false, ..config() };
    let (lines, finished) = bench.train(&config, &write_pairs(&bench.scratch), "out");
    assert_eq!(lines.len(), 60);
    assert!(lines.iter().map(|line| line.step).eq(1..=60));
    assert!(finished.loss < 0.5 * lines[0].loss, "{} to {}", lines[0].loss, finished.loss);
    let [before, after] = finished.validation.expect("validation data");
    assert!(after < 0.7 * before, "validation {before} to {after}");
    assert_eq!(finished.ending, Ending::Steps);
    for file in ["adapter.gguf", "adapter_config.json", "adapter_model.safetensors", "report.html", "train.json"] {
        assert!(bench.scratch.path("out").join(file).exists(), "{file} is missing");
    }
}

/// Queries, keys and values are trained apart where the model stacks them, and lie in one pair in the files: what a session
/// makes of these is what was trained.
#[test]
fn adapters_of_stacked_matrices_are_in_the_files() {
    for (rslora, dora, targets) in [
        (false, false, Target::LAYER.to_vec()),
        (true, false, Target::LAYER.to_vec()),
        (false, true, vec![Target::Q, Target::V, Target::Up]),
    ] {
        let bench = Bench::of("phi3", "stacked");
        let config = TrainConfig { rslora, dora, targets, eval_every: 0, early_stop: None, dropout: 0.0, ..config() };
        let mut trainer = bench.trainer(&config, &write_pairs(&bench.scratch), "out", false).expect("a trainer");
        complete(&mut trainer).expect("a finished training");
        let tokens: Vec<u32> = (0..32).map(|i| i * 37 % 250).collect();
        let batch = LearnBatch {
            lengths: vec![32],
            outputs: (0..31).collect(),
            targets: tokens[1..].to_vec(),
            weights: vec![1.0; 31],
            tokens: tokens.clone(),
            ..LearnBatch::default()
        };
        let params = trainer.params().expect("they are here").to_vec();
        let go = AtomicBool::new(false);
        let trained = trainer.learner_mut().score(&batch, &params, &go).expect("scores").to_vec();
        let options = SessionOptions { context: 64, kv_type: DType::F32, ..SessionOptions::default() };
        let mut session = Session::new(&bench.model, &options).expect("a session");
        let base = session.score(&tokens, 0).expect("scores");
        let out = bench.scratch.path("out");
        for adapter in [Adapter::open(out.join("adapter.gguf")), peft::read(&out, &bench.model)] {
            session.set_adapters(&[(Arc::new(adapter.expect("an adapter")), 1.0)]).expect("it is applied");
            session.reset();
            let found = session.score(&tokens, 0).expect("scores");
            let far = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let (apart, moved) = (far(&found, &trained), far(&found, &base));
            assert!(apart < 0.02 * moved && moved > 0.1, "{rslora} {dora}: {apart} apart, {moved} from the base");
        }
    }
}

/// Interrupted at every place where it can be, a run gives the same numbers and the same file.
#[test]
fn a_resumed_run_is_the_run() {
    resumes(&Bench::new("resumes"), config());
    resumes(&Bench::keeping("resumes-keeping", 6), config());
}

pub(crate) fn resumes(bench: &Bench, config: TrainConfig) {
    let data = write_pairs(&bench.scratch);
    let (lines, finished) = bench.train(&config, &data, "whole");
    let (go, stop) = (AtomicBool::new(false), AtomicBool::new(true));
    let mut trainer = bench.trainer(&config, &data, "parts", false).expect("a trainer");
    for step in 0..12 {
        // Cancelled before the step, which has not happened then, and lost without a word after it.
        assert!(matches!(trainer.advance(&stop), Err(Error::Cancelled)), "step {step}");
        assert!(matches!(trainer.advance(&go), Ok(Progress::Stepped(_))), "step {step}");
        if step % 2 == 0 {
            trainer.save().expect("a checkpoint");
        }
        if step == 5 || step == 6 || step == 10 {
            trainer = bench.trainer(&config, &data, "parts", true).expect("a trainer");
            assert_eq!(trainer.step(), [6, 7, 11][usize::from(step > 5) + usize::from(step > 6)]);
        }
    }
    let again = complete(&mut trainer).expect("a finished training");
    let parts = metrics::read(&bench.scratch.path("parts/metrics.jsonl")).expect("metrics");
    assert_eq!(timeless(parts), timeless(lines));
    assert_eq!((again.forgetting, again.validation), (finished.forgetting, finished.validation));
    let adapter = |folder: &str| std::fs::read(bench.scratch.path(folder).join("adapter.gguf")).expect("an adapter");
    assert_eq!(adapter("parts"), adapter("whole"));
}

#[test]
fn a_model_stays_as_it_was_where_it_is_told() {
    let bench = Bench::keeping("keeps", 40);
    let texts = std::fs::read_to_string(&bench.keep[0]).expect("texts");
    assert!(texts.lines().count() > 20 && texts.contains("\"completion\"") && texts.contains("\"text\""), "{texts}");
    let data = write_pairs(&bench.scratch);
    let [free, kept] = [0.0, 3.0].map(|keep_weight| {
        let config = TrainConfig {
            steps: Some(60),
            keep_weight,
            keep_share: 1.0,
            accumulation: 1,
            state_8bit: false,
            ..config()
        };
        let (lines, finished) = bench.train(&config, &data, &format!("weight-{keep_weight}"));
        let all: Vec<f64> = lines.iter().filter_map(|line| line.keep_kl).collect();
        // The untrained model is the one it is compared with: nothing but the rounding of its 8-bit activations.
        assert!(all[0].abs() < 0.02, "{}", all[0]);
        let [before, after] = finished.validation.expect("validation data");
        assert!(after < 0.8 * before, "{keep_weight}: validation {before} to {after}");
        all[all.len() - 10..].iter().sum::<f64>() / 10.0
    });
    assert!(kept < 0.3 * free && free > 0.1, "{free} nats a token apart without, {kept} with");

    let preference = TrainConfig { loss: Loss::dpo(), early_stop: None, ..config() };
    let pairs = bench.scratch.path("preferences.jsonl");
    std::fs::write(&pairs, r#"{"prompt": "1 is", "chosen": " odd", "rejected": " even"}"#).expect("a file");
    let refused = |config: &TrainConfig, data: &Path| {
        bench.trainer(config, data, "refused", false).err().expect("a refusal").to_string()
    };
    assert!(refused(&preference, &pairs).contains("reference"));
    let head = TrainConfig { targets: vec![Target::Q, Target::Head], ..config() };
    assert!(refused(&head, &data).contains("output layer"));
    assert!(refused(&TrainConfig { full: true, ..config() }, &data).contains("output layer"));
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let bench = Bench::new("threads");
    let (config, data) = (config(), write_pairs(&bench.scratch));
    let (lines, _) = bench.train(&config, &data, "one");
    let options = TrainerOptions { output: bench.scratch.path("two"), threads: 2, ..TrainerOptions::default() };
    let examples = data::load([&data].as_slice().into(), &bench.model, &config).expect("data");
    complete(&mut Trainer::new(&bench.model, &config, examples, options).expect("a trainer")).expect("finished");
    let two = metrics::read(&bench.scratch.path("two/metrics.jsonl")).expect("metrics");
    assert_eq!(timeless(two), timeless(lines));
}

/// The gradient of a step does not depend on how its examples are divided into batches.
#[test]
fn accumulated_batches_are_one_batch() {
    let bench = Bench::new("accumulates");
    let data = write_pairs(&bench.scratch);
    let plain = TrainConfig { dropout: 0.0, state_8bit: false, steps: Some(1), warmup: 0, ..config() };
    let small = TrainConfig { batch: 2, accumulation: 3, ..plain.clone() };
    let large = TrainConfig { batch: 6, accumulation: 1, ..plain };
    let (a, _) = bench.train(&small, &data, "small");
    let (b, _) = bench.train(&large, &data, "large");
    assert!((a[0].loss - b[0].loss).abs() < 1e-5 * a[0].loss, "{} {}", a[0].loss, b[0].loss);
    assert!((a[0].grad_norm - b[0].grad_norm).abs() < 1e-3 * a[0].grad_norm, "{} {}", a[0].grad_norm, b[0].grad_norm);
}

#[test]
fn preferences_are_learned_by_every_loss() {
    let bench = Bench::new("prefers");
    let data = bench.scratch.path("votes.jsonl");
    let line = |i: usize| {
        format!("{{\"prompt\": \"number {i} is\", \"chosen\": \" nice and round\", \"rejected\": \" dull\"}}")
    };
    std::fs::write(&data, (0..30).map(line).collect::<Vec<_>>().join("\n")).expect("a file");
    let losses = r#"[{"dpo": {}}, {"robust": {}}, {"hinge": {}}, {"ipo": {"beta": 0.5}}, {"orpo": {}}, {"simpo": {}}, {"kto": {}}]"#;
    let losses: Vec<Loss> = serde_json::from_str(losses).expect("losses");
    for (i, loss) in losses.into_iter().enumerate() {
        let config = TrainConfig {
            loss,
            steps: Some(30),
            accumulation: 1,
            batch: 4,
            eval_every: 0,
            early_stop: None,
            ..config()
        };
        let (lines, finished) = bench.train(&config, &data, &format!("loss-{i}"));
        let (first, last) = (&lines[0], &lines[29]);
        assert!(last.loss < first.loss, "{loss:?}: {} to {}", first.loss, last.loss);
        assert!(last.reward_accuracy.is_some_and(|a| a > 0.9), "{loss:?}: {last:?}");
        assert!(last.reward_margin > first.reward_margin, "{loss:?}: {first:?} {last:?}");
        assert!(finished.validation.is_some(), "{loss:?}");
        // Policy and reference are the same at first.
        if let Loss::Dpo { .. } = loss {
            assert!((first.loss - std::f64::consts::LN_2).abs() < 1e-5, "{}", first.loss);
        }
    }
}

/// Data that suddenly are of another kind: the step is dropped, training goes on behind them from the last checkpoint, at
/// half the rate. If it happens again and again it ends with a message, and the last checkpoint is there.
#[test]
fn a_spike_is_rolled_back() {
    rolls_back(&Bench::new("spikes"), config());
}

pub(crate) fn rolls_back(bench: &Bench, config: TrainConfig) {
    let data = bench.scratch.path("text.jsonl");
    let easy = "{\"text\": \"one two one two one two\"}\n";
    let config = TrainConfig {
        dropout: 0.0,
        accumulation: 1,
        packing: Packing::None,
        shuffle: false,
        val_fraction: 0.0,
        steps: Some(130),
        checkpoint_every: 20,
        early_stop: None,
        ..config
    };
    for (name, strange, rolled_back) in [("once", 3, 1), ("often", 15, 3)] {
        let noise: String =
            (0..strange).map(|i| format!("{{\"text\": \"\\u00{:02x}\\u4e2d#{i}~\\u00e9Q&%\"}}\n", 161 + i)).collect();
        std::fs::write(&data, easy.repeat(300) + &noise + &easy.repeat(120)).expect("a file");
        let mut trainer = bench.trainer(&config, &data, name, false).expect("a trainer");
        let go = AtomicBool::new(false);
        let mut back = 0;
        let end = loop {
            match trainer.advance(&go) {
                Ok(Progress::RolledBack { step, why }) => {
                    back += 1;
                    assert_eq!((trainer.step(), step), (100, 100));
                    assert!(why.contains("step 101"), "{why}");
                }
                Ok(Progress::Stepped(_)) => {}
                Ok(Progress::Done(_)) => break None,
                Err(error) => break Some(error.to_string()),
            }
        };
        assert_eq!((back, trainer.notes().len()), (rolled_back, rolled_back), "{name}");
        let last =
            metrics::read(&bench.scratch.path(name).join("metrics.jsonl")).expect("metrics").pop().expect("a line");
        match end {
            None => assert_eq!((name, last.step), ("once", 130)),
            Some(message) => {
                assert!(message.contains("rolled back 3 times"), "{message}");
                assert_eq!((name, last.step), ("often", 100));
                let resumed = bench.trainer(&config, &data, name, true).expect("a trainer");
                assert_eq!(resumed.step(), 100);
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let bench = Bench::new("refuses");
    let (config, data) = (config(), write_pairs(&bench.scratch));
    bench.train(&TrainConfig { steps: Some(3), ..config.clone() }, &data, "out");
    let error = |config: &TrainConfig, data: &Path, resume| match bench.trainer(config, data, "out", resume) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    };
    assert!(error(&config, &data, false).contains("--resume"));
    let begun = TrainConfig { steps: Some(3), ..config.clone() };
    assert!(error(&TrainConfig { rank: 5, ..begun.clone() }, &data, true).contains("rank"));
    let other = bench.scratch.path("other.jsonl");
    let text = std::fs::read_to_string(&data).expect("the data");
    std::fs::write(&other, text.replace("odd", "strange")).expect("a file");
    assert!(error(&begun, &other, true).contains("other data"));
    let options = TrainerOptions {
        output: bench.scratch.path("small"),
        memory_budget: Some(100_000),
        ..TrainerOptions::default()
    };
    let examples = data::load([&data].as_slice().into(), &bench.model, &config).expect("data");
    assert!(matches!(Trainer::new(&bench.model, &config, examples, options), Err(Error::Memory { .. })));
}

/// Killed where it likes, the program goes on with `--resume` and ends up with the same adapter.
#[test]
#[cfg(unix)]
fn a_killed_program_goes_on() {
    let scratch = Scratch::new("killed");
    let (model, data) = (write_model("llama", &scratch), write_pairs(&scratch));
    let arguments = |folder: &str| -> Vec<String> {
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        let mut all: Vec<String> =
            vec!["train".into(), "--model".into(), text(model.clone()), "--data".into(), text(data.clone())];
        all.extend(["--output".into(), text(scratch.path(folder)), "--resume".into()]);
        let more =
            "--rank 4 --batch 3 --seq 32 --steps 400 --checkpoint-every 20 --eval-every 0 --threads 1 --lr 0.001";
        all.extend(more.split(' ').map(String::from));
        all
    };
    let run = |folder: &str| {
        let arguments = arguments(folder);
        kinglet(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let whole = run("whole");
    assert_eq!(whole.code, Some(0), "{}", whole.stderr);
    let first = scratch.path("parts/checkpoints/step-00000020");
    let mut child = start(&arguments("parts").iter().map(String::as_str).collect::<Vec<_>>());
    while !first.exists() {
        assert!(child.try_wait().expect("a process").is_none(), "ended before its first checkpoint");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().expect("it can be killed");
    child.wait().expect("it ends");
    assert!(!scratch.path("parts/adapter.gguf").exists(), "it was done before it was killed");
    let parts = run("parts");
    assert_eq!(parts.code, Some(0), "{}", parts.stderr);
    assert!(parts.stderr.contains("resumed at step"), "{}", parts.stderr);
    let file = |path: &str| std::fs::read(scratch.path(path)).expect("an adapter");
    assert_eq!(file("parts/adapter.gguf"), file("whole/adapter.gguf"));
    let steps = metrics::read(&scratch.path("parts/metrics.jsonl")).expect("metrics");
    assert!(steps.iter().map(|line| line.step).eq(1..=400));
}
