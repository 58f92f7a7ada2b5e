//! The bindings against the library of this build: one list of values, one script for each language.

use std::path::PathBuf;
use std::process::Command;

use crate::support::{Link, Scratch, compile, file, have, installed, run, shared_library, succeed};

/// Runs a script with what it takes: values, model, lessons, a folder to write to.
pub fn conforms(command: &mut Command, scratch: &Scratch) {
    command.arg(file("../bindings/conformance.tsv"));
    command.arg(scratch.model()).arg(scratch.lessons()).arg(scratch.path("learned"));
    assert_eq!(succeed(command), "conforms\n");
}

#[test]
fn the_binding_for_cpp_conforms() {
    let scratch = Scratch::new("cpp");
    let folder = file("../bindings/cpp");
    let program = compile(&folder.join("conformance.cpp"), &folder, Link::Shared, &scratch);
    conforms(&mut Command::new(program), &scratch);
}

#[test]
fn the_binding_for_python_conforms() {
    assert!(have("python3"), "python3 is missing; this test needs it: apt-get install python3 python3-cffi");
    let cffi = Command::new("python3").args(["-c", "import cffi"]).output().expect("python3 starts");
    assert!(cffi.status.success(), "python3 lacks cffi; this test needs it: python3 -m pip install cffi");
    let scratch = Scratch::new("python");
    let folder = file("../bindings/python");
    let mut python = Command::new("python3");
    python.env("PYTHONPATH", folder.join("src")).env("KINGLET_LIBRARY", shared_library());
    python.env("PYTHONDONTWRITEBYTECODE", "1").arg(folder.join("conformance.py"));
    conforms(&mut python, &scratch);
}

#[test]
fn the_binding_for_node_conforms_and_so_do_its_types() {
    assert!(have("node"), "node is missing; this test needs version 20 or later: https://nodejs.org, or tests/run");
    let folder = file("../bindings/node");
    let compiler = folder.join("node_modules/typescript/bin/tsc");
    assert!(
        compiler.is_file(),
        "koffi and typescript are missing; this test needs them: npm install --prefix bindings/node"
    );
    succeed(Command::new("node").arg(compiler).arg("-p").arg(&folder));
    let scratch = Scratch::new("node");
    let mut node = Command::new("node");
    node.env("KINGLET_LIBRARY", shared_library()).arg(folder.join("conformance.js"));
    conforms(&mut node, &scratch);
}

/// The sources in the folder `name` of this crate's neighbours.
fn sources(name: &str) -> Vec<PathBuf> {
    std::fs::read_dir(file(name)).expect(name).map(|entry| entry.expect("a file").path()).collect()
}

#[test]
fn the_binding_for_java_conforms() {
    assert!(have("javac"), "javac is missing; this test needs a JDK: apt-get install default-jdk-headless");
    let scratch = Scratch::new("java");
    let folder = file("../bindings/java");
    let (classes, headers) = (scratch.path("classes"), scratch.path("headers"));
    let mut javac = Command::new("javac");
    javac.args(["--release", "11", "-Xlint:all", "-Werror", "-h"]).arg(&headers).arg("-d").arg(&classes);
    javac.args(sources("../bindings/java/src/kinglet")).arg(folder.join("examples/Chat.java"));
    succeed(javac.arg(folder.join("Conformance.java")));

    let settings = run(Command::new("javac").args(["-J-XshowSettings:properties", "-version"]));
    let settings = String::from_utf8_lossy(&settings.stderr).into_owned();
    let home = settings.lines().find_map(|line| line.trim().strip_prefix("java.home = ")).expect("a Java home");
    let (include, lib) = (PathBuf::from(home).join("include"), installed(&scratch));
    let library = scratch.path("libkinglet_jni.so");
    let mut gcc = Command::new("gcc");
    gcc.args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-shared", "-fPIC", "-Wl,-z,defs"]);
    gcc.arg(folder.join("jni/kinglet_jni.c")).arg("-I").arg(headers).arg("-I").arg(file("include"));
    gcc.arg("-I").arg(&include).arg("-I").arg(include.join("linux")).arg("-L").arg(&lib);
    succeed(gcc.arg(format!("-Wl,-rpath,{}", lib.display())).arg("-lkinglet").arg("-o").arg(&library));

    // The JVM looks at what the C file does with its objects.
    let mut java = Command::new("java");
    java.args(["-Xcheck:jni", "-XX:+UseSerialGC"]).arg(format!("-Dkinglet.jni={}", library.display()));
    conforms(java.arg("-cp").arg(classes).arg("Conformance"), &scratch);
}
