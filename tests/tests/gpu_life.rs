//! A device's life: it is lost, it is full, it is opened and closed a thousand times.

use kinglet_engine::Error;
use kinglet_engine::quant::DType;
use kinglet_engine::session::{Device, Session, SessionOptions};
use kinglet_models::tiny::{TinyConfig, write_tiny};
use kinglet_tests::data::{Scratch, heavy, tiny};
use kinglet_tests::process::program;

use crate::gpu::{options, tokens, whole};

/// Whoever uses a lost device is told so, and goes on elsewhere with what it has.
#[test]
fn gpu_lost_device_is_an_error_and_the_chat_goes_on() {
    let scratch = Scratch::new("gpu-lost");
    let model = tiny(&scratch, &TinyConfig::new("llama"));
    let device = whole();
    let mut session = Session::new(&model, &options(Device::Open(device.clone()))).expect("a session");
    let prompt = tokens(&model, 1, 20);
    let before = session.feed(&prompt).expect("the prompt").to_vec();
    device.destroy();
    for _ in 0..2 {
        match session.feed(&[5]) {
            Err(e @ Error::Device { .. }) => assert!(e.to_string().contains("open the session again"), "{e}"),
            other => panic!("{other:?}"),
        }
    }
    assert!(Session::new(&model, &options(Device::Open(device))).is_err(), "a lost device opens no session");
    assert_eq!(session.tokens(), prompt, "the window is as it was");
    // On the CPU, and on the device opened anew.
    for device in [Device::Cpu, Device::Open(whole())] {
        let mut again = Session::new(&model, &options(device)).expect("a session");
        let after = again.feed(session.tokens()).expect("the same prompt").to_vec();
        let far = after.iter().zip(&before).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-3, "{far}");
    }
}

/// A device without room gives an error that names it and the remedy: a process that may hold little is one. With
/// KINGLET_HEAVY only, for a compiler within a software driver may find no room first, and ends the process.
#[test]
fn gpu_without_memory_is_an_error() {
    if !heavy() {
        return;
    }
    let scratch = Scratch::new("gpu-memory");
    let config = TinyConfig { width: 512, ffn: 4_096, dtype: DType::F32, ..TinyConfig::new("llama").with_bpe() };
    let path = scratch.path("large.gguf");
    write_tiny(&path, &config).expect("a file");
    let run = |limit: &str| {
        let command = format!("ulimit -v {limit}; exec \"$0\" run \"$1\" --raw hello -n 2 --backend gpu:0");
        let output = std::process::Command::new("bash").arg("-c").arg(command).arg(program()).arg(&path).output();
        let output = output.expect("bash runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, errors) = run("unlimited");
    assert_eq!(code, Some(0), "{errors}");
    let mut refused = 0;
    for limit in ["250000", "350000", "450000", "600000"] {
        let (code, errors) = run(limit);
        // A driver that finds no room for itself is no driver.
        let told = ["bytes but", "device is lost", "there is no GPU", "refuses to open", "Cannot allocate"];
        match code {
            Some(0) => {}
            Some(1) if told.iter().any(|t| errors.contains(t)) => refused += 1,
            code => panic!("{limit}: {code:?} {errors}"),
        }
    }
    assert!(refused > 0, "the limits limit nothing");
}

/// Bytes this process has resident.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).expect("pages") * 4096
}

/// A thousand sessions, each with a run: nothing of them stays.
#[test]
fn gpu_sessions_leave_nothing_behind() {
    // In a process of its own, which no other test makes grow.
    let program = std::env::current_exe().expect("a test program has a path");
    let output = std::process::Command::new(program)
        .args(["gpu_life::a_thousand_sessions", "--exact", "--ignored", "--nocapture"])
        .output()
        .expect("the test program runs");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("1 passed"), "{told}{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
#[ignore = "run by `gpu_sessions_leave_nothing_behind`"]
fn a_thousand_sessions() {
    let scratch = Scratch::new("gpu-rounds");
    let model = tiny(&scratch, &TinyConfig::new("llama"));
    let device = whole();
    let round = || {
        let options = SessionOptions { context: 128, ..options(Device::Open(device.clone())) };
        let mut session = Session::new(&model, &options).expect("a session");
        session.feed(&[1, 2, 3]).expect("a run");
    };
    (0..100).for_each(|_| round());
    let before = resident();
    (0..900).for_each(|_| round());
    let grown = resident().saturating_sub(before);
    assert!(grown < 4 << 20, "{grown} bytes more after 900 sessions");
}
