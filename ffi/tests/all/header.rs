//! `kinglet.h` says what the sources say: functions, structs, callbacks and constants as cbindgen derives them. And it is
//! clean under every compiler and standard that callers use.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use crate::support::{Scratch, file, have, succeed};

/// The parts of a header that count, without names of layout: one line each.
#[derive(Debug, Default)]
pub struct Declarations {
    pub functions: BTreeSet<String>,
    pub structs: BTreeMap<String, String>,
    typedefs: BTreeSet<String>,
    pub constants: BTreeMap<String, i64>,
}

/// What `kinglet.h` declares.
pub fn declared() -> Declarations {
    parse(&std::fs::read_to_string(file("include/kinglet.h")).expect("the header"))
}

fn without_comments(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("/*") {
        out.push_str(&rest[..start]);
        rest = rest[start..].split_once("*/").expect("a closed comment").1;
    }
    (out + rest).lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

/// One space between words, none around signs; `struct` left out where it only repeats a typedef.
fn normal(text: &str) -> String {
    let mut out = String::new();
    for word in text.replace("struct ", " ").split_whitespace() {
        out.push(' ');
        out.push_str(word);
    }
    for sign in ["*", "(", ")", ",", ";", "{", "}", "=", "[", "]"] {
        out = out.replace(&format!(" {sign}"), sign).replace(&format!("{sign} "), sign);
    }
    out.trim().to_owned()
}

/// Parts between semicolons outside of braces.
fn statements(text: &str) -> Vec<String> {
    let (mut depth, mut current, mut all) = (0, String::new(), Vec::new());
    for c in text.chars() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ';' if depth == 0 => {
                all.push(std::mem::take(&mut current));
                continue;
            }
            _ => {}
        }
        current.push(c);
    }
    all
}

fn parse(text: &str) -> Declarations {
    let mut found = Declarations::default();
    let text = without_comments(text).replace("extern \"C\" {", "");
    let (directives, text): (Vec<&str>, Vec<&str>) = text.lines().partition(|line| line.trim().starts_with('#'));
    for line in directives {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["#define", name, value] = words[..] {
            found.constants.extend(value.parse().ok().map(|value| (name.to_owned(), value)));
        }
    }
    for statement in statements(&text.join("\n")) {
        let plain = normal(&statement);
        let body = statement.split_once('{').map(|(head, rest)| {
            let (body, tail) = rest.rsplit_once('}').expect("a closed brace");
            (head.to_owned(), body.to_owned(), tail.trim().to_owned())
        });
        match body {
            Some((head, body, _)) if head.contains("enum") => {
                for entry in body.split(',').filter(|entry| !entry.trim().is_empty()) {
                    let (name, value) = entry.split_once('=').expect("a value");
                    found.constants.insert(name.trim().into(), value.trim().parse().expect("a number"));
                }
            }
            Some((head, body, _)) => {
                let name = head.split_whitespace().last().expect("a name").to_owned();
                found.structs.insert(name, normal(&body));
            }
            // What is opaque, or forward: `typedef struct a a`.
            None if statement.contains("typedef struct") && !statement.contains('(') => {}
            None if statement.contains("typedef") => {
                found.typedefs.insert(plain);
            }
            None if plain.contains('(') => {
                found.functions.insert(plain);
            }
            None => assert_eq!(plain, "", "what is this?"),
        }
    }
    found
}

/// The header that cbindgen derives from the sources.
fn derived() -> String {
    let mut builder = cbindgen::Builder::new().with_config(cbindgen::Config {
        language: cbindgen::Language::C,
        style: cbindgen::Style::Both,
        usize_is_size_t: true,
        documentation: false,
        ..cbindgen::Config::default()
    });
    for entry in std::fs::read_dir(file("src")).expect("sources") {
        builder = builder.with_src(entry.expect("a file").path());
    }
    let mut text = Vec::new();
    builder.generate().expect("cbindgen reads the sources").write(&mut text);
    String::from_utf8(text).expect("UTF-8")
}

#[test]
fn the_header_says_what_the_sources_say() {
    let header = declared();
    let sources = parse(&derived());
    assert!(header.functions.len() > 40, "{}", header.functions.len());
    assert_eq!(header.functions, sources.functions);
    assert_eq!(header.structs, sources.structs);
    assert_eq!(header.typedefs, sources.typedefs);
    let ours = |constants: BTreeMap<String, i64>| -> BTreeMap<String, i64> {
        constants.into_iter().filter(|(name, _)| name.starts_with("KINGLET_")).collect()
    };
    assert_eq!(ours(header.constants), ours(sources.constants));
}

#[test]
fn differences_are_seen() {
    let parsed = |text: &str| {
        let d = parse(text);
        (d.functions, d.structs, d.constants)
    };
    let one = parsed("int f(int a, char *b);\nstruct s { int x; };\nenum { A = 1, B = -2 };");
    assert_eq!(
        one,
        parsed("int f (int a , char* b) ; typedef struct s {\n  int x;\n} s;\n#define A 1\n#define B -2\n")
    );
    assert_ne!(one.0, parsed("int f(int a, const char *b);").0);
    assert_ne!(one.1, parsed("struct s { int y; };").1);
    assert_ne!(one.2, parsed("enum { A = 2 };").2);
}

#[test]
fn the_header_is_clean_under_every_standard() {
    let scratch = Scratch::new("clean");
    for (extension, standards) in
        [("c", ["c99", "c11", "c17"].as_slice()), ("cpp", ["c++11", "c++17", "c++20"].as_slice())]
    {
        let source = scratch.path(&format!("clean.{extension}"));
        std::fs::write(&source, "#include \"kinglet.h\"\nint main(void) { return 0; }\n").expect("a file");
        let compilers = if extension == "c" { ["gcc", "clang"] } else { ["g++", "clang++"] };
        for compiler in compilers {
            if compiler.starts_with("clang") && !have(compiler) {
                continue;
            }
            for standard in standards {
                let mut command = Command::new(compiler);
                command.args([
                    &format!("-std={standard}"),
                    "-fsyntax-only",
                    "-Werror",
                    "-Wall",
                    "-Wextra",
                    "-Wpedantic",
                ]);
                command.args(["-Wconversion", "-Wshadow", "-Wundef", "-Wold-style-cast"].iter().filter(|flag| {
                    // A warning of C++ only.
                    extension == "cpp" || **flag != "-Wold-style-cast"
                }));
                succeed(command.arg("-I").arg(file("include")).arg(&source));
            }
        }
    }
}
