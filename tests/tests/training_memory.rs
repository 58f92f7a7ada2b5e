//! What a training is said to take before its first step, and what it takes.

use kinglet_tests::data::{Scratch, alone, file, heavy, model};
use kinglet_tests::process::with_peak;

/// Trains for a step and compares the plan with the most that was resident.
fn check(id: &str, options: &str) {
    let _alone = alone();
    let scratch = Scratch::new(&format!("memory-{id}"));
    let (model, text, output) = (model(id), file("handbook.txt"), scratch.path("out"));
    let paths = [("--model", &model), ("--data", &text), ("--output", &output)];
    let mut arguments =
        vec!["train", "--json", "--backend", "cpu", "--steps", "1", "--val-fraction", "0", "--threads", "2"];
    arguments.extend(paths.iter().flat_map(|(name, path)| [*name, path.to_str().expect("UTF-8")]));
    arguments.extend(options.split(' '));
    let (printed, peak) = with_peak(&arguments);
    assert_eq!(printed.code, Some(0), "{}", printed.stderr);
    let report: serde_json::Value = serde_json::from_str(&printed.stdout).expect("one JSON object");
    let planned = report["preflight"]["memory"].as_u64().expect("bytes");
    let share = planned as f64 / peak as f64;
    println!("{id} {options}: {planned} bytes planned, {peak} taken, {share:.3}");
    assert!((0.9..1.1).contains(&share), "{id} {options}: {planned} bytes were planned, {peak} taken");
}

#[test]
fn the_plan_is_what_is_taken() {
    check("smollm2", "--batch 4 --seq 256");
    check("smollm2", "--batch 4 --seq 256 --memory-budget 400M");
    if heavy() {
        for options in ["--batch 1 --seq 128", "--batch 2 --seq 1024", "--batch 4 --seq 256 --dora"] {
            check("smollm2", options);
        }
        for options in ["--batch 2 --seq 256", "--batch 1 --seq 1024", "--batch 4 --seq 128 --rank 16"] {
            check("qwen2.5-coder", options);
        }
        for options in ["--batch 2 --seq 256", "--batch 1 --seq 128 --dora"] {
            check("gemma3", options);
        }
    }
}
