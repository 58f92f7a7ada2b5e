//! The contract of the command line: what scripts may rely on.

use kinglet_engine::gguf::Gguf;
use kinglet_engine::text::{EncodeOptions, Tokenizer};
use kinglet_tests::data::{Scratch, model};
use kinglet_tests::process::{kinglet, stdout};

fn smollm2() -> String {
    model("smollm2").to_string_lossy().into_owned()
}

#[test]
fn help_and_version_go_to_standard_output() {
    for flag in ["--help", "--version"] {
        let output = kinglet(&[flag]);
        assert_eq!(output.code, Some(0));
        assert!(output.stdout.contains("kinglet"), "{flag}: {}", output.stdout);
        assert_eq!(output.stderr, "");
    }
}

#[test]
fn tokenize_prints_a_json_array_of_ids() {
    let (path, text) = (smollm2(), "Hello,  wörld! 中文 <|im_end|>");
    let printed = stdout(&["tokenize", &path, text, "--ids"]);
    let ids: Vec<u32> = serde_json::from_str(&printed).expect("a JSON array of numbers");
    let gguf = Gguf::open(&path).expect("the model opens");
    let tokenizer = Tokenizer::from_gguf(&gguf).expect("a tokenizer");
    let with = |parse_special| tokenizer.encode(text, EncodeOptions { add_special: false, parse_special });
    assert_eq!(ids, with(true));
    assert_eq!(
        stdout(&["tokenize", &path, text, "--ids", "--plain"]).trim(),
        serde_json::json!(with(false)).to_string()
    );
}

#[test]
fn a_raw_run_prints_the_continuation_alone() {
    let path = smollm2();
    let arguments = ["run", &path, "The capital of France is", "--raw", "--temperature", "0", "-n", "16"];
    let first = stdout(&arguments);
    assert!(first.contains("Paris"), "{first:?}");
    assert!(!first.contains("The capital of France is"), "the prompt is repeated: {first:?}");
    assert_eq!(stdout(&arguments), first, "greedy runs differ");
}

#[test]
fn the_number_of_tokens_is_kept() {
    let path = smollm2();
    let run = |n: &str| stdout(&["run", &path, "One two three four", "--raw", "--temperature", "0", "-n", n]);
    let (short, long) = (run("4"), run("12"));
    assert!(long.starts_with(short.trim_end()), "{short:?} is no beginning of {long:?}");
    assert!(long.len() > short.len());
}

#[test]
fn guessing_ahead_prints_the_same() {
    let path = smollm2();
    let run = |how: &str| {
        let sampling = ["--temperature", "0.8", "--seed", "3", "-n", "16", "--backend", "cpu", "--json"];
        let arguments =
            [&["run", &path, "Count: one two three one two three one", "--raw", "--speculate", how][..], &sampling[..]];
        let printed: serde_json::Value = serde_json::from_str(&stdout(&arguments.concat())).expect("JSON");
        (printed["text"].as_str().expect("a text").to_string(), printed["drafted_tokens"].as_u64().expect("a number"))
    };
    let (plain, none) = run("off");
    assert_eq!(none, 0);
    for how in ["lookup", &path] {
        let (text, drafted) = run(how);
        assert_eq!(text, plain, "{how}");
        assert!(drafted > 0, "{how}");
    }
}

#[test]
fn a_session_file_goes_on_where_it_was() {
    let (path, scratch) = (smollm2(), Scratch::new("cli-session"));
    let file = scratch.path("chat.kinglet").to_string_lossy().into_owned();
    let run = |prompt: &str| {
        let arguments = ["run", &path, prompt, "--session", &file, "-n", "8", "--temperature", "0", "--json"];
        let printed: serde_json::Value = serde_json::from_str(&stdout(&arguments)).expect("JSON");
        (printed["prompt_tokens"].as_u64().expect("a number"), printed["reused_tokens"].as_u64().expect("a number"))
    };
    let (first, none) = run("Name a river.");
    let (second, reused) = run("Another one.");
    assert!(none == 0 && reused >= first && second > reused, "{reused} of {second} tokens were there, {first} before");
    std::fs::write(&file, b"kinglet").expect("a file");
    let output = kinglet(&["run", &path, "More?", "--session", &file]);
    assert_eq!(output.code, Some(1), "{output:?}");
    assert!(output.stderr.contains("no saved session"), "{}", output.stderr);
}

#[test]
fn an_answer_by_a_schema_is_json_of_that_schema() {
    let (path, scratch) = (smollm2(), Scratch::new("cli-schema"));
    let file = scratch.path("schema.json").to_string_lossy().into_owned();
    let schema = r#"{"type": "object", "properties": {"river": {"type": "string", "maxLength": 20}, "km": {"type":
        "integer", "minimum": 1, "maximum": 7000}}, "required": ["river", "km"], "additionalProperties": false}"#;
    std::fs::write(&file, schema).expect("a file");
    for schema in [schema, &file] {
        let printed = stdout(&["run", &path, "Name a river and its length.", "--json-schema", schema, "--seed", "1"]);
        let json: serde_json::Value = serde_json::from_str(&printed).expect("JSON");
        assert!(json["river"].as_str().is_some_and(|name| name.chars().count() <= 20), "{printed}");
        assert!(json["km"].as_i64().is_some_and(|km| (1..=7000).contains(&km)), "{printed}");
        assert_eq!(json.as_object().expect("an object").len(), 2, "{printed}");
    }
    std::fs::write(&file, "start: \"yes\" | \"no\"").expect("a file");
    let printed = stdout(&["run", &path, "Is water wet?", "--grammar", &file, "--temperature", "0"]);
    assert!(["yes\n", "no\n"].contains(&printed.as_str()), "{printed:?}");
}

/// Each with something its message must contain: what is wrong, not only that something is.
#[test]
fn mistakes_are_named_and_end_with_an_error() {
    let scratch = Scratch::new("cli");
    let (empty, garbage) = (scratch.path("empty.gguf"), scratch.path("garbage.gguf"));
    std::fs::write(&empty, b"").expect("a file");
    std::fs::write(&garbage, b"this is no model, but it is long enough to look at").expect("a file");
    let path = |p: &std::path::Path| p.to_string_lossy().into_owned();
    let (empty, garbage, absent) = (path(&empty), path(&garbage), path(&scratch.path("absent.gguf")));
    let smollm2 = smollm2();
    let cases: [(&[&str], &str); 9] = [
        (&["run", &absent, "hello"], "absent.gguf"),
        (&["run", &empty, "hello"], "empty.gguf"),
        (&["run", &garbage, "hello"], "garbage.gguf"),
        (&["inspect", &garbage], "garbage.gguf"),
        (&["frobnicate"], "frobnicate"),
        (&["pull", "no-such-model"], "no-such-model"),
        (&["run", &smollm2, "hello", "--json-schema", r#"{"type": "strnig"}"#], "strnig"),
        (&["run", &smollm2, "hello", "--grammar", &absent], "absent.gguf"),
        (&["run", &smollm2, "hello", "--tools", &garbage], "garbage.gguf"),
    ];
    for (arguments, word) in cases {
        let output = kinglet(arguments);
        assert!(matches!(output.code, Some(1 | 2)), "{arguments:?}: {output:?}");
        assert!(output.stderr.contains(word), "{arguments:?}: {}", output.stderr);
        assert_eq!(output.stdout, "", "{arguments:?}: an error belongs to standard error");
        assert!(!output.stderr.contains("panicked"), "{arguments:?}: {}", output.stderr);
    }
}

#[test]
fn inspect_names_what_is_in_the_file() {
    let report: serde_json::Value = serde_json::from_str(&stdout(&["inspect", &smollm2(), "--json"])).expect("JSON");
    assert!(report.to_string().contains("llama"), "{report}");
}
