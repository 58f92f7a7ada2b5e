//! What is released, laid out from libraries that are built: a folder for C and C++ as an installed package has it, a Python
//! wheel, an npm package. `main.rs` builds the libraries; the tests of `kinglet-ffi` lay out those of their own build and use
//! the packages.
//!
//! ```text
//! include/kinglet.h, kinglet.hpp          lib/libkinglet.so → libkinglet.so.1, libkinglet.a
//! lib/pkgconfig/kinglet.pc                lib/cmake/Kinglet/KingletConfig.cmake, KingletConfigVersion.cmake
//! share/kinglet/examples/*                share/kinglet/LICENSE-MIT, LICENSE-APACHE
//! ```
//!
//! A folder may be moved: pkg-config and CMake find everything from where their files lie.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What goes wrong here is for the person at the terminal.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The version of everything that is released.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The folder of the workspace.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Runs `command`, shows what it shows, and gives what it prints.
///
/// # Errors
/// It does not start, or fails.
pub fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stderr(Stdio::inherit()).output().map_err(|e| format!("{name} does not start: {e}"))?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}", output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Copies `from` to `to`, and makes the folders above it.
///
/// # Errors
/// The system refuses, which names both.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::copy(from, to).map_err(|e| format!("{} to {}: {e}", from.display(), to.display()))?;
    Ok(())
}

/// Copies the folder `from`, but for what `skip` says.
fn copy_folder(from: &Path, to: &Path, skip: &[&str]) -> Result<()> {
    for entry in fs::read_dir(from).map_err(|e| format!("{}: {e}", from.display()))? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        match name.to_str() {
            Some(name) if skip.contains(&name) => {}
            _ if path.is_dir() => copy_folder(&path, &to.join(name), skip)?,
            _ => copy(&path, &to.join(name))?,
        }
    }
    Ok(())
}

/// An empty folder at `path`.
fn fresh(path: &Path) -> Result<PathBuf> {
    if path.exists() {
        fs::remove_dir_all(path)?;
    }
    fs::create_dir_all(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(path.to_path_buf())
}

/// A template of `packaging/` with the version in it.
fn fill(template: &str, to: &Path) -> Result<()> {
    let text = fs::read_to_string(root().join("packaging").join(template))?;
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    Ok(fs::write(to, text.replace("@VERSION@", VERSION))?)
}

/// Lays out the package for C and C++ in the folder `out`, from `libkinglet.so` and `libkinglet.a` in the folder `built`.
///
/// # Errors
/// A library is missing, or the system refuses to write.
pub fn install(built: &Path, out: &Path) -> Result<()> {
    let (root, out) = (root(), fresh(out)?);
    let lib = out.join("lib");
    copy(&root.join("ffi/include/kinglet.h"), &out.join("include/kinglet.h"))?;
    copy(&root.join("bindings/cpp/kinglet.hpp"), &out.join("include/kinglet.hpp"))?;
    copy(&built.join("libkinglet.so"), &lib.join("libkinglet.so.1"))?;
    copy(&built.join("libkinglet.a"), &lib.join("libkinglet.a"))?;
    #[cfg(unix)]
    std::os::unix::fs::symlink("libkinglet.so.1", lib.join("libkinglet.so"))?;
    fill("kinglet.pc.in", &lib.join("pkgconfig/kinglet.pc"))?;
    for name in ["KingletConfig.cmake", "KingletConfigVersion.cmake"] {
        fill(&format!("{name}.in"), &lib.join("cmake/Kinglet").join(name))?;
    }
    for name in ["chat.c", "train.c", "CMakeLists.txt"] {
        copy(&root.join("ffi/examples").join(name), &out.join("share/kinglet/examples").join(name))?;
    }
    licences(&out.join("share/kinglet"))
}

fn licences(folder: &Path) -> Result<()> {
    ["LICENSE-MIT", "LICENSE-APACHE"].iter().try_for_each(|name| copy(&root().join(name), &folder.join(name)))
}

/// The newest glibc that the shared library asks for, such as `(2, 34)`: what the wheel's name promises.
fn glibc(library: &Path) -> Result<(u32, u32)> {
    let symbols = run(Command::new("objdump").arg("-T").arg(library))?;
    let versions = symbols.split("GLIBC_").skip(1).filter_map(|rest| {
        let number = rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
        let (major, minor) = number.split_once('.')?;
        Some((major.parse().ok()?, minor.split('.').next()?.parse().ok()?))
    });
    versions.max().ok_or_else(|| format!("{} asks for no glibc", library.display()).into())
}

/// Makes the Python wheel in the folder `out`, with the shared library in the folder `built` inside; `work` is for what is
/// only needed meanwhile.
///
/// # Errors
/// `python3 -m pip` is missing or fails.
pub fn wheel(built: &Path, out: &Path, work: &Path) -> Result<PathBuf> {
    let (root, library) = (root(), built.join("libkinglet.so"));
    let sources = fresh(&work.join("python"))?;
    copy_folder(&root.join("bindings/python"), &sources, &["__pycache__", "build", "conformance.py"])?;
    copy(&root.join("ffi/include/kinglet.h"), &sources.join("src/kinglet/kinglet.h"))?;
    copy(&library, &sources.join("src/kinglet/libkinglet.so.1"))?;
    licences(&sources)?;
    let (major, minor) = glibc(&library)?;
    let platform = format!("manylinux_{major}_{minor}_{}", std::env::consts::ARCH);
    let folder = fresh(&work.join("wheel"))?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "wheel", "--quiet", "--no-deps", "--disable-pip-version-check"]);
    pip.arg(format!("--config-settings=--build-option=--plat-name={platform}"));
    run(pip.arg("--wheel-dir").arg(&folder).arg(&sources))?;
    deliver(&folder, "whl", out)
}

/// Makes the npm package in the folder `out`, with the shared library in the folder `built` inside; `work` as for [`wheel`].
///
/// # Errors
/// `npm` is missing or fails.
pub fn npm(built: &Path, out: &Path, work: &Path) -> Result<PathBuf> {
    let root = root();
    let sources = fresh(&work.join("node"))?;
    copy_folder(&root.join("bindings/node"), &sources, &["node_modules", ".npmrc", "conformance.js", "tsconfig.json"])?;
    copy(&root.join("ffi/include/kinglet.h"), &sources.join("kinglet.h"))?;
    let arch = match std::env::consts::ARCH {
        "x86_64" => "x64",
        "aarch64" => "arm64",
        other => return Err(format!("Node has no name for {other}").into()),
    };
    copy(&built.join("libkinglet.so"), &sources.join(format!("native/linux-{arch}/libkinglet.so.1")))?;
    licences(&sources)?;
    // With a cache of its own: another npm at the same time may be tidying the user's.
    let cache = work.join("npm-cache");
    let flags = ["pack", "--loglevel", "error", "--ignore-scripts", "--cache"];
    run(Command::new("npm").args(flags).arg(cache).current_dir(&sources))?;
    deliver(&sources, "tgz", out)
}

/// Moves the one file with `extension` in `from` to the folder `out`.
fn deliver(from: &Path, extension: &str, out: &Path) -> Result<PathBuf> {
    let files = fs::read_dir(from)?.collect::<std::result::Result<Vec<_>, _>>()?;
    let made = files.iter().map(fs::DirEntry::path).find(|path| path.extension().is_some_and(|e| e == extension));
    let made = made.ok_or_else(|| format!("{} has no .{extension}", from.display()))?;
    let to = out.join(made.file_name().unwrap_or_default());
    copy(&made, &to)?;
    Ok(to)
}
