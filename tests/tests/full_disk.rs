//! A full disk: the error names the file and the reason, what was whole stays whole, nothing is left half, and once there
//! is room the same command goes on.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use kinglet_engine::Error;
use kinglet_models::tiny::{TinyConfig, write_tiny};
use kinglet_tests::data::Scratch;
use kinglet_tests::disk::Disk;
use kinglet_tests::process::{Output, kinglet, stdout};
use kinglet_train::checkpoint::Checkpoints;
use kinglet_train::config::TrainConfig;
use kinglet_train::trainer::{Progress, Trainer, TrainerOptions};
use kinglet_train::{data, metrics};

const PAGE: u64 = 4096;

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// What lies in a folder and its folders, hidden files included.
fn names(folder: &Path) -> Vec<String> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.expect("an entry").path();
        all.push(path.file_name().expect("a name").to_string_lossy().into_owned());
        if path.is_dir() {
            all.extend(names(&path));
        }
    }
    all
}

/// The program has failed for want of room, says so, and has cleared away what it had begun.
fn full(disk: &Disk, output: &Output, what: &str) {
    assert_eq!(output.code, Some(1), "{what}: {}", output.stderr);
    assert!(disk.names_the_reason(&output.stderr), "{what}: {}", output.stderr);
    assert!(output.stderr.contains(text(&disk.path(""))), "{what}: no path in: {}", output.stderr);
    let left: Vec<String> = names(&disk.path("")).into_iter().filter(|n| n.starts_with('.')).collect();
    assert!(left.is_empty(), "{what}: {left:?} was left behind");
}

/// Trained on disks that are full at one place after the other, from the first file on: whatever could be written of the
/// checkpoints is whole, and with room the training ends as if there had always been some.
#[test]
fn a_training_goes_on_once_there_is_room() {
    let scratch = Scratch::new("full-train");
    let (model, data) = (scratch.path("model.gguf"), scratch.path("data.jsonl"));
    write_tiny(&model, &TinyConfig::new("llama").with_bpe()).expect("a tiny model");
    let line = r#"{"prompt": "what is on the table", "completion": "the other hat"}"#;
    std::fs::write(&data, format!("{line}\n").repeat(8)).expect("a file");
    let arguments = |output: &Path| -> Vec<String> {
        let options = "--rank 4 --batch 2 --seq 32 --steps 12 --checkpoint-every 2 --eval-every 0 --threads 1 --resume";
        let paths = ["train", "--model", text(&model), "--data", text(&data), "--output", text(output)];
        paths.into_iter().chain(options.split(' ')).map(String::from).collect()
    };
    let whole = scratch.path("whole");
    stdout(&arguments(&whole).iter().map(String::as_str).collect::<Vec<_>>());
    let wanted = std::fs::read(whole.join("adapter.gguf")).expect("an adapter");
    let checkpoint = std::fs::read_dir(whole.join("checkpoints/step-00000012")).expect("a checkpoint");
    let bytes: u64 =
        checkpoint.map(|e| e.expect("an entry").metadata().expect("a file").len().div_ceil(PAGE) * PAGE).sum();

    let mut ends = Vec::new();
    for share in [0.02, 0.5, 1.0, 1.5, 2.3, 2.7, 3.0, 3.3, 4.0, 8.0] {
        let room = ((bytes as f64 * share) as u64).next_multiple_of(PAGE);
        let mut disk = Disk::new(&scratch, &format!("disk-{share}"), room);
        let out = disk.path("out");
        let arguments = arguments(&out);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let first = disk.kinglet(&arguments);
        let what = format!("room for {share} checkpoints");
        let (latest, broken) = Checkpoints::new(out.join("checkpoints"), 2).latest().expect("a folder");
        assert!(broken.is_empty(), "{what}: {broken:?}");
        let step = latest.map_or(0, |c| c.step);
        ends.push((first.code, step));
        if first.code != Some(0) {
            full(&disk, &first, &what);
            disk.make_room();
            let second = disk.kinglet(&arguments);
            assert_eq!(second.code, Some(0), "{what}: {}", second.stderr);
            let resumed = second.stderr.contains(&format!("resumed at step {step}"));
            assert_eq!(resumed, step > 0, "{what}: {}", second.stderr);
        }
        assert!(std::fs::read(out.join("adapter.gguf")).expect("an adapter") == wanted, "{what}: another adapter");
        let lines = metrics::read(&out.join("metrics.jsonl")).expect("metrics");
        assert!(lines.iter().map(|line| line.step).eq(1..=12), "{what}");
    }
    println!("ends and last checkpoints: {ends:?}");
    // Some of the disks have been full before, some behind the first checkpoint, and one never.
    assert!(ends.contains(&(Some(1), 0)) && ends.iter().any(|(code, step)| *code == Some(1) && *step > 0), "{ends:?}");
    assert!(ends.contains(&(Some(0), 12)), "{ends:?}");
}

/// A program that trains step by step and has no room at every single one of them: a step that fails for that is finished
/// by the next call, and nothing of it is done twice.
#[test]
fn a_step_that_found_no_room_is_finished_later() {
    let scratch = Scratch::new("full-steps");
    let (path, data) = (scratch.path("model.gguf"), scratch.path("data.jsonl"));
    write_tiny(&path, &TinyConfig::new("llama").with_bpe()).expect("a tiny model");
    let line =
        |i: usize| format!("{{\"prompt\": \"number {i} is\", \"completion\": \" {}\"}}\n", ["even", "odd"][i % 2]);
    std::fs::write(&data, (0..20).map(line).collect::<String>()).expect("a file");
    let model = kinglet_models::open(&path).expect("the model opens");
    let config = TrainConfig {
        rank: 4,
        batch: 2,
        seq: 32,
        steps: Some(9),
        warmup: 0,
        lr: 3e-2,
        eval_every: 2,
        checkpoint_every: 3,
        early_stop: Some(2),
        ..TrainConfig::default()
    };
    let trainer = |output: &Path| {
        let options = TrainerOptions { output: output.into(), threads: 1, ..TrainerOptions::default() };
        let examples = data::load([&data].as_slice().into(), &model, &config).expect("data");
        Trainer::new(&model, &config, examples, options).expect("a trainer")
    };
    let disk = Disk::new(&scratch, "disk", 1024 * PAGE);
    if !disk.is_mounted() {
        return;
    }
    let go = AtomicBool::new(false);
    let (whole, starved) = (scratch.path("whole"), disk.path("starved"));
    let (mut a, mut b) = (trainer(&whole), trainer(&starved));
    let mut failed = 0;
    loop {
        disk.fill();
        let full = b.advance(&go);
        disk.clear();
        let found = match full {
            Err(Error::Io { path, source }) => {
                assert_eq!(source.kind(), std::io::ErrorKind::StorageFull, "{}: {source}", path.display());
                assert!(path.starts_with(&starved), "{}", path.display());
                failed += 1;
                b.advance(&go)
            }
            other => other,
        };
        let (wanted, found) = (a.advance(&go).expect("there is room"), found.expect("there is room now"));
        match (wanted, found) {
            (Progress::Stepped(a), Progress::Stepped(b)) => {
                assert_eq!((a.step, a.loss, a.val_loss), (b.step, b.loss, b.val_loss));
            }
            (a, b) => {
                assert_eq!(a, b);
                break;
            }
        }
    }
    println!("{failed} steps found no room");
    assert!(failed >= 4, "{failed} steps found no room");
    let (a, b) = (a.finish(&go).expect("an adapter"), b.finish(&go).expect("an adapter"));
    assert_eq!((a.written_step, a.validation, a.forgetting), (b.written_step, b.validation, b.forgetting));
    let adapter = |folder: &Path| std::fs::read(folder.join("adapter.gguf")).expect("an adapter");
    assert!(adapter(&whole) == adapter(&starved), "another adapter");
    let steps = |folder: &Path| -> Vec<u64> {
        metrics::read(&folder.join("metrics.jsonl")).expect("metrics").iter().map(|line| line.step).collect()
    };
    assert_eq!(steps(&whole), steps(&starved));
    assert_eq!(
        Checkpoints::new(whole.join("checkpoints"), 2).steps().expect("a folder"),
        Checkpoints::new(starved.join("checkpoints"), 2).steps().expect("a folder")
    );
}

#[test]
fn a_model_that_does_not_fit_is_not_there() {
    let scratch = Scratch::new("full-merge");
    let (model, data) = (scratch.path("model.gguf"), scratch.path("data.jsonl"));
    write_tiny(&model, &TinyConfig::new("llama").with_bpe()).expect("a tiny model");
    std::fs::write(&data, "{\"text\": \"the hat is in the house\"}\n").expect("a file");
    let (trained, options) = (scratch.path("trained"), "--steps 1 --val-fraction 0 --seq 32 --threads 1");
    let train = ["train", "--model", text(&model), "--data", text(&data), "--output", text(&trained)];
    stdout(&train.into_iter().chain(options.split(' ')).collect::<Vec<_>>());
    let length = std::fs::metadata(&model).expect("the model").len();
    let mut disk = Disk::new(&scratch, "disk", (length / 2).next_multiple_of(PAGE));
    let merged = disk.path("merged.gguf");
    let arguments = ["merge", text(&model), "--adapter", text(&trained), "-o", text(&merged)];
    full(&disk, &disk.kinglet(&arguments), "merge");
    assert!(names(&disk.path("")).is_empty());
    let create = ["create", "--tokenizer", text(&model), "-o", text(&merged)];
    full(&disk, &disk.kinglet(&create), "create");
    assert!(names(&disk.path("")).is_empty());
    disk.make_room();
    assert_eq!(disk.kinglet(&arguments).code, Some(0));
    assert_eq!(kinglet(&["inspect", text(&merged)]).code, Some(0));
}

#[test]
fn a_session_that_does_not_fit_leaves_the_one_before() {
    let scratch = Scratch::new("full-session");
    let model = scratch.path("model.gguf");
    write_tiny(&model, &TinyConfig::new("llama").with_bpe()).expect("a tiny model");
    // 128 positions a page of the cache; the file grows with the tokens.
    let mut disk = Disk::new(&scratch, "disk", 16 * PAGE);
    let saved = disk.path("chat.kinglet");
    let ask = |disk: &Disk, prompt: &str| {
        disk.kinglet(&["run", text(&model), prompt, "--session", text(&saved), "-n", "4", "--temperature", "0"])
    };
    let first = ask(&disk, "a hat");
    assert_eq!(first.code, Some(0), "{}", first.stderr);
    let before = std::fs::read(&saved).expect("a session");
    let long = "the other hat and the hat ".repeat(16);
    let second = ask(&disk, &long);
    full(&disk, &second, "session");
    assert!(!second.stdout.is_empty(), "the answer was given all the same");
    assert!(std::fs::read(&saved).expect("a session") == before, "the session before is another");
    disk.make_room();
    let third = ask(&disk, &long);
    assert_eq!((third.code, &third.stdout), (Some(0), &second.stdout), "{}", third.stderr);
    assert!(std::fs::metadata(&saved).expect("a session").len() > before.len() as u64);
}
