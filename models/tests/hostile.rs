//! Models whose headers lie: well-formed files, each with one key that says something absurd. Whatever it says, the file
//! is refused with a message that names it, or it runs. (Files that are not well-formed: `gguf/tests.rs` of the engine.)

mod common;

use common::Temporary;
use kinglet_engine::gguf::{Gguf, Value};
use kinglet_engine::session::{Session, SessionOptions};
use kinglet_engine::{Error, Result};
use kinglet_models::families;
use kinglet_models::tiny::TinyConfig;

/// Bytes that a session may take: what an absurd number asks for is refused, not allocated.
const BUDGET: u64 = 64 << 20;

/// Opens and runs a file.
fn run(file: &Temporary) -> Result<()> {
    let model = kinglet_models::open(&file.0)?;
    let options =
        SessionOptions { context: 16, threads: 1, chunk: 4, memory_budget: Some(BUDGET), ..SessionOptions::default() };
    let mut session = Session::new(&model, &options)?;
    session.feed(&[1, 2, 3, 4, 5, 6])?;
    Ok(())
}

/// What a key may be changed to; `None` leaves it out.
fn absurd() -> Vec<Option<Value>> {
    let numbers = [0u32, 1, 3, 7, 255, 100_000, i32::MAX as u32, u32::MAX].map(|n| Some(Value::from(n)));
    let floats = [f32::NAN, f32::INFINITY, -1.0, 0.0, f32::MIN_POSITIVE].map(|x| Some(Value::from(x)));
    let others = [
        None,
        Some(Value::from("absurd")),
        Some(Value::from("")),
        Some(Value::from(true)),
        Some(Value::from(u64::MAX)),
        Some(Value::from(-1i32)),
        Some(Value::from(vec![0u32; 3])),
        Some(Value::from(vec![u32::MAX; 300])),
        Some(Value::from(vec![String::new(), "a".to_string()])),
    ];
    numbers.into_iter().chain(floats).chain(others).collect()
}

#[test]
fn every_key_may_lie() {
    for arch in families::known() {
        let tiny = TinyConfig::new(arch);
        let file = Temporary::tiny(&TinyConfig { layers: if tiny.layers > 6 { tiny.layers } else { 1 }, ..tiny });
        let keys: Vec<String> =
            Gguf::open(&file.0).unwrap().metadata().iter().map(|(key, _)| key.to_string()).collect();
        // Keys that families read where they are there.
        let optional = [
            "attention.sliding_window",
            "attention.key_length",
            "attention.value_length",
            "rope.scaling.type",
            "rope.scaling.factor",
            "rope.dimension_count",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "attention.scale",
            "expert_count",
        ];
        let optional = optional.map(|key| format!("{arch}.{key}"));
        let further = optional.iter().filter(|key| !keys.contains(key));
        for key in keys.iter().chain(further) {
            for value in absurd() {
                let what = format!("{arch}: {key} = {value:?}");
                let changed = file.changed(&[(key, value)], |_| {});
                let Err(error) = run(&changed) else { continue };
                let message = error.to_string();
                match error {
                    // Which key of an impossible shape is the wrong one nobody knows: the tensor is named then.
                    Error::Format { file, at, .. } => {
                        assert!(
                            file.ends_with(".gguf") && (at.starts_with("key ") || at.starts_with("tensor ")),
                            "{what}: {message}"
                        );
                    }
                    Error::Unsupported(_) | Error::Memory { .. } | Error::Numeric(_) | Error::Argument(_) => {}
                    _ => panic!("{what}: {message}"),
                }
            }
        }
        assert!(run(&file).is_ok(), "{arch}: what is not changed runs");
    }
}
