//! The bindings against the library of this build: one list of values, one script for each language.

use std::process::Command;

use crate::support::{Link, Scratch, compile, file, have, shared_library, succeed};

/// Runs a script with what it takes: values, model, lessons, a folder to write to.
fn conforms(command: &mut Command, scratch: &Scratch) {
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
