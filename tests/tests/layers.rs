//! The layers of `ARCHITECTURE.md`, held by reading the sources: who may import whom, where `unsafe` may stand, which
//! words the engine may not know, how long a file may be. A rule that is broken names the file and the line.

use std::collections::BTreeSet;
use std::path::PathBuf;

use kinglet_tests::source::{code, files, is_test_file, read, relative, root, without_tests, words};

/// Crate folder → the crates of this workspace it may depend on.
const CRATES: [(&str, &[&str]); 6] = [
    ("runtime/engine", &[]),
    ("models", &["kinglet-engine"]),
    ("runtime/train", &["kinglet-engine", "kinglet-models"]),
    ("runtime/assistant", &["kinglet-engine", "kinglet-models", "kinglet-train"]),
    ("ffi", &["kinglet-engine", "kinglet-models", "kinglet-train", "kinglet-assistant"]),
    ("bindings/cli", &["kinglet-engine", "kinglet-models", "kinglet-train", "kinglet-assistant"]),
];

/// Module of the engine → the modules it may import. `error` may be imported by all.
const MODULES: [(&str, &[&str]); 16] = [
    ("error", &[]),
    ("system", &[]),
    ("deep", &["system"]),
    ("file", &[]),
    ("random", &[]),
    ("quant", &[]),
    ("gguf", &["file", "quant", "system"]),
    ("text", &["deep", "gguf", "quant", "system"]),
    ("sampling", &["text", "random"]),
    ("grammar", &["deep", "text"]),
    ("tape", &["gguf", "quant", "text", "random"]),
    ("cpu", &["gguf", "quant", "text", "tape", "random", "system"]),
    ("gpu", &["file", "gguf", "quant", "text", "tape", "random"]),
    ("adapter", &["gguf", "quant", "text", "tape"]),
    ("session", &["file", "gguf", "quant", "text", "tape", "cpu", "gpu", "sampling", "grammar", "adapter", "system"]),
    ("generate", &["gguf", "quant", "text", "tape", "cpu", "gpu", "sampling", "grammar", "adapter", "session"]),
];

/// Where `unsafe` may stand: kernels, maps, the C boundary; and, in what does not ship, llama.cpp, single
/// kernels, an allocator that counts, and calls of the C ABI.
const UNSAFE: [&str; 13] = [
    "runtime/engine/src/cpu/",
    "runtime/engine/src/gguf/map.rs",
    "runtime/engine/src/gguf/pages.rs",
    "runtime/engine/src/gpu/device.rs",
    "runtime/engine/src/gpu/import.rs",
    "runtime/engine/src/gpu/pipelines.rs",
    "ffi/",
    "runtime/engine/examples/",
    "runtime/engine/tests/",
    "models/tests/allocations.rs",
    "tests/src/oracle.rs",
    "benches/src/peer.rs",
    "fuzz/src/ffi.rs",
];

/// Families of models. Which of them a file is, `kinglet-models` knows; the engine runs what a `Spec` says.
const FAMILIES: [&str; 10] =
    ["llama", "qwen", "gemma", "mistral", "baichuan", "chatglm", "internlm", "deepseek", "smollm", "glm4"];

fn rust_files() -> Vec<PathBuf> {
    ["runtime", "models", "ffi", "bindings", "tests", "benches", "fuzz"]
        .into_iter()
        .flat_map(|f| files(f, "rs"))
        .collect()
}

fn report(broken: Vec<String>) {
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

#[test]
fn crates_depend_downwards_only() {
    let mut broken = Vec::new();
    for (folder, allowed) in CRATES {
        let manifest = read(&root().join(folder).join("Cargo.toml"));
        let mut section = "";
        for line in manifest.lines().map(str::trim) {
            if line.starts_with('[') {
                section = line;
                continue;
            }
            let name = line.split(['=', '.', ' ']).next().unwrap_or_default();
            let runtime = section.ends_with("dependencies]") && !section.contains("dev-");
            if runtime && name.starts_with("kinglet-") && !allowed.contains(&name) {
                broken.push(format!("{folder}/Cargo.toml: {name} lies above or beside this crate"));
            }
            if runtime && name.starts_with("llama-cpp") {
                broken.push(format!("{folder}/Cargo.toml: {name} is for tests and benches only"));
            }
        }
    }
    report(broken);
}

#[test]
fn sources_import_only_what_their_crate_may() {
    let mut broken = Vec::new();
    for (folder, allowed) in CRATES {
        for path in files(&format!("{folder}/src"), "rs") {
            let text = code(&read(&path), false);
            let imports = |name: &str| words(&text).find(|(_, w)| *w == name).map(|(line, _)| line);
            for (_, others) in CRATES {
                for other in others.iter().filter(|other| !allowed.contains(other)) {
                    if let Some(line) = imports(&other.replace('-', "_")) {
                        broken.push(format!("{}:{line}: imports {other}", relative(&path)));
                    }
                }
            }
        }
    }
    broken.dedup();
    report(broken);
}

/// The module of the engine that `path` belongs to.
fn engine_module(path: &std::path::Path) -> String {
    let inside = path.strip_prefix(root().join("runtime/engine/src")).expect("a file of the engine");
    let first = inside.components().next().expect("a file").as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

#[test]
fn engine_modules_import_downwards_only() {
    let known: BTreeSet<&str> = MODULES.iter().map(|(name, _)| *name).collect();
    let mut broken = Vec::new();
    for path in files("runtime/engine/src", "rs") {
        let module = engine_module(&path);
        if module == "lib" || is_test_file(&path) {
            continue;
        }
        let Some((_, allowed)) = MODULES.iter().find(|(name, _)| *name == module) else {
            broken.push(format!("{}: module `{module}` has no place in the layers", relative(&path)));
            continue;
        };
        let text = code(&read(&path), false);
        for (line, used) in crate_paths(without_tests(&text)) {
            if known.contains(used) && used != module && used != "error" && !allowed.contains(&used) {
                broken.push(format!("{}:{line}: `{module}` imports `{used}`", relative(&path)));
            }
        }
    }
    report(broken);
}

/// The modules that `crate::…` paths in `code` name, groups (`crate::{a, b::c}`) included, with their lines.
fn crate_paths(code: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    for (at, marker) in code.match_indices("crate::") {
        let line = 1 + code[..at].matches('\n').count();
        let rest = &code[at + marker.len()..];
        let first = |text: &str| text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
        if let Some(group) = rest.strip_prefix('{') {
            // The names at depth 0 of the group are modules, or items of the crate's root.
            let mut depth = 0;
            let mut start = Some(0);
            for (i, c) in group.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => start = Some(i + 1),
                    _ => {}
                }
                if let Some(s) = start.take() {
                    let name = group[s..].trim_start();
                    found.push((line, &name[..first(name)]));
                }
            }
        } else {
            found.push((line, &rest[..first(rest)]));
        }
    }
    found
}

#[test]
fn grouped_imports_are_seen() {
    let names: Vec<_> = crate_paths("use crate::{cpu::{a, b}, gpu, Error};\ncrate::tape::Op").into_iter().collect();
    assert_eq!(names, [(1, "cpu"), (1, "gpu"), (1, "Error"), (2, "tape")]);
}

#[test]
fn the_engine_names_no_family_of_models() {
    let mut broken = Vec::new();
    for path in files("runtime/engine/src", "rs") {
        // Tokenizers are told apart by names that come from models (`tokenizer.ggml.pre`).
        if engine_module(&path) == "text" || is_test_file(&path) {
            continue;
        }
        // A message may name the program llama.cpp, which is no family.
        let text = code(&read(&path), true).replace("llama.cpp", "ggml");
        for (line, word) in words(without_tests(&text)) {
            let lower = word.to_lowercase();
            if lower.split('_').any(|part| FAMILIES.iter().any(|family| part.starts_with(family))) {
                broken.push(format!("{}:{line}: `{word}`", relative(&path)));
            }
        }
    }
    report(broken);
}

#[test]
fn the_engine_has_no_network_and_no_async() {
    let manifest = read(&root().join("runtime/engine/Cargo.toml"));
    for name in ["tokio", "async-std", "reqwest", "hyper", "ureq", "axum", "hf-hub"] {
        let found = manifest.lines().any(|line| line.trim_start().starts_with(name));
        assert!(!found, "runtime/engine/Cargo.toml: {name}");
    }
    for path in files("runtime/engine/src", "rs") {
        let text = code(&read(&path), false);
        let found = words(&text).find(|(_, w)| ["async", "await", "TcpStream", "TcpListener"].contains(w));
        assert_eq!(found, None, "{}", relative(&path));
    }
}

#[test]
fn unsafe_stands_where_it_may() {
    let mut broken = Vec::new();
    for path in rust_files() {
        let name = relative(&path);
        if UNSAFE.iter().any(|place| name.starts_with(place)) {
            continue;
        }
        let text = code(&read(&path), false);
        broken.extend(words(&text).filter(|(_, w)| *w == "unsafe").map(|(line, _)| format!("{name}:{line}: unsafe")));
    }
    report(broken);
}

#[test]
fn every_file_opens_with_what_it_is_and_ends_in_time() {
    let mut broken = Vec::new();
    for path in rust_files() {
        let text = read(&path);
        if !text.starts_with("//!") {
            broken.push(format!("{}: does not open with `//!`", relative(&path)));
        }
        let lines = text.lines().count();
        if lines > 1000 {
            broken.push(format!("{}: {lines} lines, more than 1000: split it by idea", relative(&path)));
        }
    }
    report(broken);
}
