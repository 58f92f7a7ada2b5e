//! The documents say what is there: commands of the README exist, links lead somewhere, every crate has its place in
//! ARCHITECTURE.md.

use std::path::{Path, PathBuf};

use kinglet_tests::process::kinglet;
use kinglet_tests::source::{files, read, relative, root};

/// The documents written for readers (test data has notices of its own).
fn documents() -> Vec<PathBuf> {
    files("", "md")
}

#[test]
fn the_four_documents_exist() {
    for name in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"] {
        assert!(root().join(name).is_file(), "{name} is missing");
    }
}

/// Lines of fenced blocks, prompts (`$ `) and comments removed.
fn commands(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            inside = !inside;
        } else if inside {
            let line = line.trim().trim_start_matches("$ ");
            found.extend(line.split([';', '|']).flat_map(|part| part.split("&&")).map(|part| part.trim().to_owned()));
        }
    }
    found
}

#[test]
fn commands_of_the_documents_exist() {
    let mut broken = Vec::new();
    let mut seen = 0;
    for path in documents() {
        for command in commands(&read(&path)) {
            let Some(arguments) = command.strip_prefix("kinglet ") else { continue };
            let mut words = arguments.split_whitespace();
            let Some(name) = words.next().filter(|name| !name.starts_with('-')) else { continue };
            seen += 1;
            let help = kinglet(&[name, "--help"]);
            if help.code != Some(0) {
                broken.push(format!("{}: `{command}`: no such command", relative(&path)));
                continue;
            }
            for flag in words.filter(|word| word.starts_with("--")) {
                let flag = flag.split('=').next().unwrap_or(flag);
                if flag != "--" && !help.stdout.contains(flag) {
                    broken.push(format!("{}: `{command}`: no option {flag}", relative(&path)));
                }
            }
        }
    }
    assert!(seen > 0, "no document shows a `kinglet` command");
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

/// Targets of `[text](target)` outside code.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            inside = !inside;
        }
        if inside {
            continue;
        }
        // Odd pieces lie between backticks.
        let prose: String = line.split('`').step_by(2).collect::<Vec<_>>().join("`");
        found.extend(prose.split("](").skip(1).filter_map(|rest| rest.split(')').next()).map(str::to_owned));
    }
    found
}

/// The anchor that renderers make of a heading: lower case, words joined by hyphens, punctuation dropped.
fn anchor(heading: &str) -> String {
    heading
        .trim_start_matches('#')
        .trim()
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

#[test]
fn links_lead_somewhere() {
    let mut broken = Vec::new();
    for path in documents() {
        let folder = path.parent().unwrap_or(Path::new("."));
        for link in links(&read(&path)) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (file, fragment) = link.split_once('#').unwrap_or((&link, ""));
            let target = if file.is_empty() { path.clone() } else { folder.join(file) };
            if !target.exists() {
                broken.push(format!("{}: {link}", relative(&path)));
            } else if !fragment.is_empty() && target.extension().is_some_and(|e| e == "md") {
                let text = read(&target);
                if !text.lines().filter(|l| l.starts_with('#')).any(|l| anchor(l) == fragment) {
                    broken.push(format!("{}: {link}: no such heading", relative(&path)));
                }
            }
        }
    }
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

#[test]
fn architecture_has_a_place_for_every_crate() {
    let text = read(&root().join("ARCHITECTURE.md"));
    let workspace = read(&root().join("Cargo.toml"));
    let members = workspace.split("members = [").nth(1).and_then(|rest| rest.split(']').next()).expect("members");
    for member in members.split('"').skip(1).step_by(2) {
        // A tree shows the last part of the path under its parent.
        let last = member.rsplit('/').next().unwrap_or(member);
        assert!(
            text.contains(member) || text.contains(&format!("{last}/")),
            "ARCHITECTURE.md does not mention {member}"
        );
    }
}
