//! Makes what is released.
//!
//! ```text
//! cargo run -p xtask -- dist [OUT]        everything, in the folder OUT (target/packages)
//! ```
//!
//! Builds the libraries with the profile `dist`, with the GPU and without, checks how large they are and what they need, and
//! lays out packages for C and C++, Python and Node. Libraries for Android and Apple's systems take their makers' tools:
//! `packaging/android/` and `packaging/apple/` have scripts for these.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use xtask::{Result, VERSION, install, npm, root, run, wheel};

/// Most bytes of the stripped shared library, with the GPU and without.
const LARGEST: [(&str, u64); 2] = [("gpu", 12_000_000), ("cpu", 6_000_000)];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        ["dist"] => dist(&target().join("packages")),
        ["dist", out] => dist(Path::new(out)),
        _ => Err("usage: cargo run -p xtask -- dist [OUT]".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Cargo's folder.
fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

fn dist(out: &Path) -> Result<()> {
    if !cfg!(target_os = "linux") {
        return Err("these packages are made on Linux; see packaging/ for other systems".into());
    }
    fs::create_dir_all(out).map_err(|e| format!("{}: {e}", out.display()))?;
    let out = out.canonicalize()?;
    let work = out.join("work");
    let mut made = Vec::new();
    for (kind, largest) in LARGEST {
        let built = build(kind)?;
        check(&built.join("libkinglet.so"), largest)?;
        let name = if kind == "gpu" { "kinglet" } else { "kinglet-cpu" };
        let package = out.join(format!("{name}-{VERSION}-{}-linux", std::env::consts::ARCH));
        install(&built, &package)?;
        made.push(package);
        // People who install these cannot choose, and the library with the GPU runs without one.
        if kind == "gpu" {
            made.push(wheel(&built, &out, &work)?);
            made.push(npm(&built, &out, &work)?);
        }
    }
    fs::remove_dir_all(work)?;
    made.iter().for_each(|path| println!("{}", path.display()));
    Ok(())
}

/// Builds the libraries; the folder they are in until the next build.
fn build(kind: &str) -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root()).args(["rustc", "--lib", "--profile", "dist", "-p", "kinglet-ffi"]);
    if kind == "cpu" {
        cargo.arg("--no-default-features");
    }
    // The linker that Rust brings along on this machine holds functions of the same code once.
    if cfg!(target_arch = "x86_64") {
        cargo.args(["--", "-C", "link-arg=-Wl,--icf=all"]);
    }
    run(&mut cargo)?;
    Ok(target().join("dist"))
}

/// Says how large the shared library is and what it needs, and refuses what was not promised.
fn check(library: &Path, largest: u64) -> Result<()> {
    let bytes = fs::metadata(library)?.len();
    let dynamic = run(Command::new("objdump").arg("-p").arg(library))?;
    let needed: Vec<&str> = dynamic.lines().filter_map(|l| l.trim().strip_prefix("NEEDED")).map(str::trim).collect();
    let megabytes = |n: u64| n as f64 / 1e6;
    println!("libkinglet.so.1: {:.2} MB of {}, needs {}", megabytes(bytes), megabytes(largest), needed.join(", "));
    if bytes > largest {
        return Err(format!("{} has {bytes} bytes, {largest} were promised", library.display()).into());
    }
    // What every Linux has; no C++ runtime among it.
    let system = ["libc.so", "libm.so", "libgcc_s.so", "libdl.so", "libpthread.so", "ld-linux"];
    match needed.iter().find(|name| !system.iter().any(|known| name.starts_with(known))) {
        Some(name) => Err(format!("{} needs {name}, which not every system has", library.display()).into()),
        None if !dynamic.contains("libkinglet.so.1") => Err("the library has no SONAME libkinglet.so.1".into()),
        None => Ok(()),
    }
}
