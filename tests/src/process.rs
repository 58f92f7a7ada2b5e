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

/// Runs `kinglet` with `arguments` and no input.
pub fn kinglet(arguments: &[&str]) -> Output {
    let output = Command::new(program())
        .args(arguments)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .output()
        .expect("the program starts");
    Output {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("output is UTF-8"),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
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
