//! The Swift package, which nothing here can compile, against the header that it is written for: names, numbers of
//! arguments, and where the module map says the header lies.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::header::{Declarations, declared};
use crate::support::file;

/// Swift files of a folder and those below it, without comments.
fn sources(folder: &Path) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("a file").path();
        if path.is_dir() {
            all.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "swift") {
            let text = std::fs::read_to_string(&path).expect("UTF-8");
            let code = text.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n");
            all.push((path.display().to_string(), code));
        }
    }
    all
}

/// The names in `code`, each with what stands before and behind it.
fn names(code: &str) -> impl Iterator<Item = (&str, &str, &str)> {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    let starts = code.char_indices().filter(move |(at, c)| part(*c) && !code[..*at].ends_with(part));
    starts.map(move |(at, _)| {
        let len = code[at..].find(|c| !part(c)).unwrap_or(code.len() - at);
        (&code[..at], &code[at..at + len], &code[at + len..])
    })
}

/// How many arguments stand between the parenthesis that `text` opens with and its partner.
fn arguments(text: &str) -> usize {
    let (mut depth, mut count) = (0, 0);
    for (at, c) in text.char_indices() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' if depth == 1 => return count + usize::from(!text[1..at].trim().is_empty()),
            ')' | ']' | '}' => depth -= 1,
            ',' if depth == 1 => count += 1,
            _ => {}
        }
    }
    panic!("an open parenthesis: {text}")
}

/// What in `code` the header does not have.
fn unknown(code: &str, header: &Declarations) -> Vec<String> {
    let functions: BTreeMap<&str, usize> = header
        .functions
        .iter()
        .map(|declaration| {
            let (head, parameters) = declaration.split_once('(').expect("a function");
            let name = head.rsplit([' ', '*']).next().expect("a name");
            (name, if parameters == "void)" { 0 } else { parameters.split(',').count() })
        })
        .collect();
    let fields: BTreeSet<&str> =
        header.structs.values().flat_map(|body| names(body).map(|(_, name, _)| name)).collect();
    let mut wrong = Vec::new();
    for (before, name, behind) in names(code) {
        if name.starts_with("KINGLET_") && !header.constants.contains_key(name) {
            wrong.push(format!("{name} is no constant"));
        } else if name.starts_with("kinglet_") && !header.structs.contains_key(name) && name != "kinglet_status" {
            match functions.get(name) {
                None => wrong.push(format!("{name} is no function")),
                Some(count) if behind.starts_with('(') && arguments(behind) != *count => {
                    wrong.push(format!("{name} takes {count} arguments, not {}", arguments(behind)));
                }
                Some(_) => {}
            }
        } else if before.ends_with('.') && name.contains('_') && !name.contains("kinglet") && !fields.contains(name) {
            wrong.push(format!("{name} is no field"));
        }
    }
    wrong
}

#[test]
fn the_swift_package_uses_what_the_header_has() {
    let header = declared();
    let symbols = std::fs::read_to_string(file("abi/symbols.txt")).expect("abi/symbols.txt");
    let sources = sources(&file("../bindings/swift"));
    let mut used = BTreeSet::new();
    for (path, code) in &sources {
        assert_eq!(unknown(code, &header), Vec::<String>::new(), "{path}");
        used.extend(names(code).map(|(_, name, _)| name).filter(|name| name.starts_with("kinglet_")));
    }
    let functions = used.iter().filter(|name| symbols.lines().any(|line| line == **name)).count();
    assert!(functions > 35, "the package uses {functions} functions: {used:?}");
}

#[test]
fn the_module_map_names_the_header() {
    let folder = file("../bindings/swift/Sources/CKinglet");
    let map = std::fs::read_to_string(folder.join("module.modulemap")).expect("the module map");
    let (_, rest) = map.split_once("header \"").expect("a header");
    let header = folder.join(rest.split_once('"').expect("a path").0);
    assert_eq!(
        header.canonicalize().expect("a header where the map says"),
        file("include/kinglet.h").canonicalize().expect("the header")
    );
}

#[test]
fn what_the_header_has_not_is_seen() {
    let header = declared();
    let wrong = "kinglet_sesion_reset(a, b); kinglet_session_reset(a, f(b, c), $0); KINGLET_FOO; native.kv_cash_size";
    assert_eq!(unknown(wrong, &header).len(), 4, "{:?}", unknown(wrong, &header));
    let right = "kinglet_session_reset(pointer, $0); KINGLET_OK; kinglet_error(); event.text_len; kinglet_version()";
    assert_eq!(unknown(right, &header), Vec::<String>::new());
}
