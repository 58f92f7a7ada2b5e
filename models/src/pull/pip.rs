//! Fetches a wheel with the user's own `pip`, and so from the index, proxy and certificates that pip is set up for. No host
//! is named here.
//!
//! `--only-binary=:all:` matters: without it pip may run the build script of a source package. The temporary directory of
//! the process is ours, which puts the bytes on the right disk and lets the progress bar follow them as they grow.

use super::{Progress, PullError};
use crate::catalogue::Part;
use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Something that can put the wheel of a part on disk; tests have one that needs no pip.
pub(super) trait Wheels {
    /// Fetches the wheel of `part` into `work` and says where it is. `seen` is told the bytes there so far.
    fn fetch(
        &mut self,
        part: &Part,
        work: &Path,
        progress: &mut dyn Progress,
        seen: &mut dyn FnMut(u64, &mut dyn Progress),
    ) -> Result<PathBuf, PullError>;
}

/// A working `pip`.
pub(super) struct Pip {
    command: Vec<OsString>,
}

/// The ways pip is called, in order of trial.
const NAMES: [&[&str]; 5] =
    [&["pip"], &["pip3"], &["python3", "-m", "pip"], &["python", "-m", "pip"], &["py", "-m", "pip"]];

impl Pip {
    /// The first pip that answers.
    pub(super) fn find() -> Result<Pip, PullError> {
        NAMES
            .iter()
            .map(|words| Pip { command: words.iter().map(OsString::from).collect() })
            .find(Pip::answers)
            .ok_or(PullError::NoPip)
    }

    fn command(&self) -> Command {
        let mut words = self.command.iter();
        let mut command = Command::new(words.next().cloned().unwrap_or_default());
        command.args(words);
        command
    }

    fn answers(&self) -> bool {
        let quiet = |c: &mut Command| {
            c.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()
        };
        quiet(&mut self.command()).is_ok_and(|s| s.success())
    }
}

impl Wheels for Pip {
    fn fetch(
        &mut self,
        part: &Part,
        work: &Path,
        progress: &mut dyn Progress,
        seen: &mut dyn FnMut(u64, &mut dyn Progress),
    ) -> Result<PathBuf, PullError> {
        // What an earlier run left here is unfinished: finished wheels are moved away.
        let here = work.join("pip");
        if here.exists() {
            fs::remove_dir_all(&here).map_err(PullError::io(&here, 0))?;
        }
        let (temporary, out) = (here.join("tmp"), here.join("out"));
        for dir in [&temporary, &out] {
            fs::create_dir_all(dir).map_err(PullError::io(dir, part.wheel_bytes))?;
        }
        let requirement = format!("{}=={}", part.package, part.version);
        let mut command = self.command();
        command
            .args(["download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--no-deps"])
            .args(["--only-binary=:all:", "--dest"])
            .arg(&out)
            .arg(&requirement)
            .envs(["TMPDIR", "TEMP", "TMP"].map(|name| (name, &temporary)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        log::debug!("{command:?}");
        let failed = |message: String| PullError::Pip { requirement: requirement.clone(), message };
        let mut child = command.spawn().map_err(|e| failed(e.to_string()))?;
        // A thread empties the pipe, so that pip never waits for us; a file could be on the disk that is full.
        let errors = child.stderr.take().map(|pipe| std::thread::spawn(move || tail(pipe)));
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if progress.cancelled() => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(PullError::Cancelled);
                }
                Ok(None) => {
                    seen(largest_file(&here), progress);
                    std::thread::sleep(Duration::from_millis(60));
                }
                Err(e) => return Err(failed(e.to_string())),
            }
        };
        if !status.success() {
            let said = errors.and_then(|thread| thread.join().ok()).unwrap_or_default();
            let _ = fs::remove_dir_all(&here);
            if said.contains("No space left on device") || said.contains("Disk quota exceeded") {
                // pip has the wheel twice for a moment: in its temporary directory and where it is to go.
                return Err(PullError::DiskFull { path: out, needed: 2 * part.wheel_bytes });
            }
            return Err(failed(explain(&said, status.to_string())));
        }
        let wheel = fs::read_dir(&out)
            .map_err(PullError::io(&out, 0))?
            .filter_map(|e| e.ok().map(|e| e.path()))
            .find(|p| p.extension().is_some_and(|e| e == "whl"))
            .ok_or_else(|| failed("it ended well but left no wheel".into()))?;
        Ok(wheel)
    }
}

/// What pip wrote to its error stream, as far as it tells a user something.
fn explain(said: &str, status: String) -> String {
    let errors: Vec<&str> = said.lines().filter_map(|l| l.trim().strip_prefix("ERROR: ")).collect();
    let text = if errors.is_empty() { said.trim().to_string() } else { errors.join("; ") };
    let mut text: String = if text.is_empty() { status } else { text.chars().take(600).collect() };
    if text.contains("No matching distribution") {
        text.push_str(" (the package index that pip is set up for does not have it; see `pip config list`)");
    }
    text
}

/// The last few kilobytes of a stream.
fn tail(mut stream: impl Read) -> String {
    const KEPT: usize = 4096;
    let mut kept = Vec::new();
    let mut buffer = [0; KEPT];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => kept.extend_from_slice(&buffer[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
        if kept.len() > KEPT {
            kept.drain(..kept.len() - KEPT);
        }
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// Size of the largest file under `dir`: the wheel, wherever pip has it at the moment.
fn largest_file(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => largest_file(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use super::super::Silent;
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const PART: Part = Part { package: "a-b", version: "1.2", member: "a/b", bytes: 3, sha256: "", wheel_bytes: 1000 };

    fn script(dir: &Path, text: &str) -> Pip {
        let path = dir.join("stand-in");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        // Through the shell: a just-written program may be "text busy" while another test forks.
        Pip { command: vec!["/bin/sh".into(), path.into_os_string()] }
    }

    fn fetch(pip: &mut Pip, work: &Path) -> Result<PathBuf, PullError> {
        pip.fetch(&PART, work, &mut Silent, &mut |_, _| {})
    }

    #[test]
    fn asks_for_the_exact_wheel_and_follows_its_bytes() {
        let dir = super::super::tests::scratch("pip-ok");
        let mut pip = script(
            &dir,
            r#"echo "$@" > "$0.args"
while [ "$1" != --dest ]; do shift; done
head -c 500 /dev/zero > "$TMPDIR/x.whl"
until [ -e "$0.seen" ]; do sleep 0.05; done
cp "$TMPDIR/x.whl" "$2/a_b-1.2-py3-none-any.whl""#,
        );
        let mut most = 0;
        let mut seen = |n: u64, _: &mut dyn Progress| {
            most = most.max(n);
            if n == 500 {
                fs::write(dir.join("stand-in.seen"), "").unwrap();
            }
        };
        let wheel = pip.fetch(&PART, &dir, &mut Silent, &mut seen).unwrap();
        assert_eq!(wheel.file_name().unwrap(), "a_b-1.2-py3-none-any.whl");
        assert_eq!(most, 500);
        let args = fs::read_to_string(dir.join("stand-in.args")).unwrap();
        assert!(args.starts_with("download "), "{args}");
        assert!(args.contains("--no-deps") && args.contains("--only-binary=:all:"), "{args}");
        assert!(args.trim_end().ends_with("a-b==1.2"), "{args}");
    }

    #[test]
    fn failure_tells_what_pip_said() {
        let dir = super::super::tests::scratch("pip-fail");
        let mut pip =
            script(&dir, "echo 'noise' >&2; echo 'ERROR: No matching distribution found for a-b' >&2; exit 1");
        let e = fetch(&mut pip, &dir).unwrap_err().to_string();
        assert!(e.contains("a-b==1.2") && e.contains("No matching distribution found") && !e.contains("noise"), "{e}");
        assert!(e.contains("pip config list"), "{e}");
    }

    #[test]
    fn a_full_disk_is_told_apart() {
        let dir = super::super::tests::scratch("pip-full");
        let mut pip = script(&dir, "echo 'ERROR: [Errno 28] No space left on device' >&2; exit 1");
        assert!(matches!(fetch(&mut pip, &dir), Err(PullError::DiskFull { needed: 2000, .. })));
    }

    #[test]
    fn cancelling_ends_pip() {
        struct Cancel;
        impl Progress for Cancel {
            fn cancelled(&self) -> bool {
                true
            }
        }
        let dir = super::super::tests::scratch("pip-cancel");
        let mut pip = script(&dir, "exec sleep 60");
        let start = std::time::Instant::now();
        let result = pip.fetch(&PART, &dir, &mut Cancel, &mut |_, _| {});
        assert!(matches!(result, Err(PullError::Cancelled)));
        assert!(start.elapsed() < Duration::from_secs(20));
    }
}
