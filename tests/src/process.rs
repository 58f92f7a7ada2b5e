//! The `kinglet` program, run as a user runs it.
//!
//! It is built on first use by the cargo that runs the tests, in the profile and with the features the tests have, so it is
//! never older than the sources and seldom has to be built at all.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use crate::source::root;

/// Path of the program.
pub fn program() -> &'static PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
        let output = Command::new(cargo)
            .current_dir(root())
            .args(["build", "--quiet", "--workspace", "--bin", "kinglet", "--message-format", "json"])
            .args(["--profile", &profile()])
            .args(cfg!(feature = "oracle").then_some("--features=kinglet-tests/oracle"))
            .stdin(Stdio::null())
            .output()
            .expect("cargo runs");
        let messages = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success(),
            "the program does not build: {messages}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        messages
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter(|message| message["target"]["name"] == "kinglet")
            .find_map(|message| message["executable"].as_str().map(PathBuf::from))
            .expect("cargo names the program")
    })
}

/// The profile of the tests: they lie in `target/PROFILE/deps`.
fn profile() -> String {
    let exe = std::env::current_exe().expect("a test program has a path");
    let folder = exe.parent().and_then(|deps| deps.parent()).and_then(|folder| folder.file_name());
    match folder.and_then(|name| name.to_str()) {
        None | Some("debug") => "test".into(),
        Some(name) => name.into(),
    }
}

/// What a run printed, and how it ended.
#[derive(Debug)]
pub struct Output {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    fn of(output: std::process::Output) -> Output {
        Output {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("output is UTF-8"),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Runs `kinglet` with `arguments` and no input.
pub fn kinglet(arguments: &[&str]) -> Output {
    run(Command::new(program()).args(arguments))
}

/// Runs a command without input.
pub fn run(command: &mut Command) -> Output {
    Output::of(command.env_remove("RUST_LOG").stdin(Stdio::null()).output().expect("the program starts"))
}

/// As [`kinglet`], with the most memory that was resident, in bytes. Reads /proc: Linux.
pub fn with_peak(arguments: &[&str]) -> (Output, u64) {
    let mut command = Command::new(program());
    command.args(arguments).env_remove("RUST_LOG").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("the program starts");
    let status = format!("/proc/{}/status", child.id());
    let waiting = std::thread::spawn(move || child.wait_with_output().expect("the program ends"));
    let mut peak = 0;
    while !waiting.is_finished() {
        // The system keeps the maximum; only what is taken in the last milliseconds may be missed.
        let status = std::fs::read_to_string(&status).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        peak = peak.max(kilobytes.unwrap_or(0) * 1024);
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    (Output::of(waiting.join().expect("the program was waited for")), peak)
}

/// Starts `kinglet` with `arguments` and no input, and lets it run; what it prints is lost.
pub fn start(arguments: &[&str]) -> Child {
    Command::new(program())
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program starts")
}

/// Runs `kinglet` and gives its standard output.
///
/// # Panics
/// When it does not end with 0.
pub fn stdout(arguments: &[&str]) -> String {
    let output = kinglet(arguments);
    assert_eq!(output.code, Some(0), "kinglet {} failed: {}", arguments.join(" "), output.stderr);
    output.stdout
}
