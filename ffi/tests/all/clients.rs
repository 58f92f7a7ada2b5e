//! C programs against the library: the examples that the README shows, and a client of version 1 of the ABI, which is
//! compiled against its own, frozen header and must run with every library to come.

use std::process::Command;

use crate::support::{Link, Scratch, compile, file, run, succeed};

#[test]
fn the_readme_shows_the_examples_as_they_are() {
    let readme = std::fs::read_to_string(file("../README.md")).expect("README.md");
    for (name, longest) in [("examples/chat.c", 40), ("examples/train.c", 60)] {
        let source = std::fs::read_to_string(file(name)).expect(name);
        assert!(readme.contains(&source), "README.md shows another {name}");
        assert!(source.lines().count() <= longest, "{name} is longer than {longest} lines");
    }
}

#[test]
fn the_example_streams_a_chat() {
    let scratch = Scratch::new("chat");
    let model = scratch.model();
    for link in [Link::Shared, Link::Static] {
        let program = compile(&file("examples/chat.c"), &file("include"), link, &scratch);
        let answer = succeed(Command::new(program).arg(&model).arg("What is on the \"table\"?\n\\ 你好"));
        assert!(!answer.is_empty());
    }
}

#[test]
fn the_example_trains_an_adapter_and_uses_it() {
    let scratch = Scratch::new("train");
    let program = compile(&file("examples/train.c"), &file("include"), Link::Shared, &scratch);
    let mut command = Command::new(program);
    command.arg(scratch.model()).arg(scratch.lessons()).arg(scratch.path("learned")).arg("what is on the table");
    let answers = succeed(&mut command);
    let (before, after) = answers.split_once('\n').expect("two answers");
    assert!(!before.contains("the other hat"), "{before:?}");
    assert!(after.starts_with("the other hat"), "{after:?}");
    assert!(scratch.path("learned/adapter.gguf").is_file() && scratch.path("learned/report.html").is_file());
}

#[test]
fn a_client_of_version_1_runs() {
    let scratch = Scratch::new("v1");
    for link in [Link::Shared, Link::Static] {
        let program = compile(&file("tests/abi/v1/client.c"), &file("tests/abi/v1"), link, &scratch);
        let mut command = Command::new(program);
        let folder = scratch.path(match link {
            Link::Shared => "shared",
            Link::Static => "static",
        });
        std::fs::create_dir_all(&folder).expect("a folder");
        let output = succeed(command.arg(scratch.model()).arg(scratch.lessons()).arg(&folder));
        assert!(output.ends_with("all calls of version 1 do what they did\n"), "{output}");
    }
}

#[test]
fn the_library_is_silent_and_rests_between_calls() {
    let scratch = Scratch::new("quiet");
    let program = compile(&file("tests/c/quiet.c"), &file("include"), Link::Shared, &scratch);
    let mut command = Command::new(program);
    command.arg(scratch.model()).arg(scratch.lessons()).arg(scratch.path("learned"));
    // As on every desktop: without it a layer of Mesa's drivers complains, which load when devices are asked for.
    command.env("XDG_RUNTIME_DIR", scratch.path("."));
    let output = run(&mut command);
    let printed = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), printed.as_str()), (Some(0), "silence\n"));
}
