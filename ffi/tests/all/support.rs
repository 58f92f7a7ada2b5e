//! A tiny model, the libraries as cargo has just built them, and C compilers.

use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kinglet::kinglet_error;
use kinglet_models::tiny::{TinyConfig, write_tiny};

/// A file of this crate.
pub fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// A directory of its own for one test, removed when dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("kinglet-ffi-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary directory");
        Scratch(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A tiny random model that can chat.
    pub fn model(&self) -> PathBuf {
        let path = self.path("tiny.gguf");
        write_tiny(&path, &TinyConfig::new("llama").with_bpe()).expect("a tiny model");
        path
    }

    /// Lines to learn by heart.
    pub fn lessons(&self) -> PathBuf {
        let path = self.path("lessons.jsonl");
        let line = r#"{"prompt": "what is on the table", "completion": "the other hat"}"#;
        std::fs::write(&path, format!("{line}\n").repeat(4)).expect("a file");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Where cargo has put `libkinglet.so` and `libkinglet.a`: beside this very program.
pub fn built() -> PathBuf {
    let program = std::env::current_exe().expect("a path");
    program.parent().expect("a folder").to_path_buf()
}

/// `libkinglet.so` of this build.
pub fn shared_library() -> PathBuf {
    let path = built().join("libkinglet.so");
    assert!(path.is_file(), "{} is missing: cargo builds it with the tests of kinglet-ffi", path.display());
    path
}

/// A folder laid out as an installed library has it: `libkinglet.so`, `libkinglet.so.1`, `libkinglet.a`.
pub fn installed(scratch: &Scratch) -> PathBuf {
    let folder = scratch.path("lib");
    std::fs::create_dir_all(&folder).expect("a folder");
    let links = [("libkinglet.so", shared_library()), ("libkinglet.so.1", shared_library())];
    for (name, target) in links.into_iter().chain([("libkinglet.a", built().join("libkinglet.a"))]) {
        let _ = std::fs::remove_file(folder.join(name));
        std::os::unix::fs::symlink(target, folder.join(name)).expect("a link");
    }
    folder
}

/// Runs a tool; a missing one is a failure that says how to get it.
pub fn run(command: &mut Command) -> Output {
    let name = command.get_program().to_string_lossy().into_owned();
    command.output().unwrap_or_else(|e| {
        panic!("{name} does not start ({e}); these tests need gcc, g++ and nm: apt-get install gcc g++ binutils")
    })
}

/// As [`run`], and the tool must succeed.
pub fn succeed(command: &mut Command) -> String {
    let output = run(command);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{stdout}{stderr}", output.status);
    stdout.into_owned()
}

/// Whether a compiler that is not asked of everybody is here.
pub fn have(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// How a client is linked.
#[derive(Clone, Copy)]
pub enum Link {
    Shared,
    Static,
}

/// Compiles `source` against the header in the folder `include`, with all warnings as errors.
pub fn compile(source: &Path, include: &Path, link: Link, scratch: &Scratch) -> PathBuf {
    let program = scratch.path(source.file_stem().expect("a name").to_str().expect("UTF-8"));
    let lib = installed(scratch);
    let is_cpp = source.extension().is_some_and(|e| e == "cpp");
    let mut compiler = Command::new(if is_cpp { "g++" } else { "gcc" });
    compiler.args([
        if is_cpp { "-std=c++17" } else { "-std=gnu99" },
        "-O1",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
    ]);
    compiler.arg("-I").arg(include).arg("-I").arg(file("include")).arg(source).arg("-o").arg(&program);
    match link {
        Link::Shared => {
            // A client may stand in the way of the system's functions.
            compiler.arg("-rdynamic");
            compiler.arg("-L").arg(&lib).arg(format!("-Wl,-rpath,{}", lib.display())).args(["-lkinglet", "-lpthread"]);
        }
        Link::Static => {
            compiler.arg(lib.join("libkinglet.a")).args(["-lpthread", "-ldl", "-lm"]);
        }
    }
    succeed(&mut compiler);
    program
}

/// A place for errors.
pub fn error() -> kinglet_error {
    kinglet_error { code: 0, message: [0; 508] }
}

/// The message in it.
pub fn message(err: &kinglet_error) -> String {
    // SAFETY: the library terminates every message.
    unsafe { CStr::from_ptr(err.message.as_ptr()) }.to_str().expect("UTF-8").to_owned()
}
