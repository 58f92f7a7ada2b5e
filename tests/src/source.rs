//! The repository as text, for the tests that hold its structure.
//!
//! Rust is not parsed; it is cut into code and comments well enough to ask which words a file uses. [`code`] blanks
//! comments, [`without_tests`] drops the unit tests at the end of a file, [`words`] splits what is left.

use std::path::{Path, PathBuf};

/// The repository's root directory.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the repository").to_path_buf()
}

/// `path` relative to the root, with `/`, for messages.
pub fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).to_string_lossy().replace('\\', "/")
}

/// Every file under `folder` (relative to the root) with `extension`, in order; build outputs and hidden folders are
/// left out.
pub fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    fn walk(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
        let Ok(entries) = std::fs::read_dir(folder) else { return };
        for entry in entries.flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy();
            if name.starts_with('.') || ["target", "node_modules", "shared"].contains(&&*name) {
                continue;
            }
            if path.is_dir() {
                walk(&path, extension, found);
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(folder), extension, &mut found);
    found.sort();
    found
}

/// The text of `path`.
pub fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Rust source with its comments blanked; with `keep_strings` false, the contents of string literals too.
pub fn code(text: &str, keep_strings: bool) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    let blank = |out: &mut Vec<u8>, from: usize, to: usize| {
        out.extend(bytes[from..to].iter().map(|b| if *b == b'\n' { b'\n' } else { b' ' }));
    };
    while i < bytes.len() {
        let rest = &bytes[i..];
        if rest.starts_with(b"//") {
            let end = i + rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
            blank(&mut out, i, end);
            i = end;
        } else if rest.starts_with(b"/*") {
            let (mut depth, mut end) = (1, i + 2);
            while depth > 0 && end < bytes.len() {
                if bytes[end..].starts_with(b"/*") {
                    (depth, end) = (depth + 1, end + 2);
                } else if bytes[end..].starts_with(b"*/") {
                    (depth, end) = (depth - 1, end + 2);
                } else {
                    end += 1;
                }
            }
            let end = end.min(bytes.len());
            blank(&mut out, i, end);
            i = end;
        } else if let Some(length) = string_literal(rest) {
            if keep_strings {
                out.extend_from_slice(&rest[..length]);
            } else {
                blank(&mut out, i, i + length);
            }
            i += length;
        } else if rest.starts_with(b"'\"'") {
            out.extend_from_slice(b"' '");
            i += 3;
        } else if rest.starts_with(b"'\\\"'") || rest.starts_with(b"'\\''") {
            out.extend_from_slice(b"'  '");
            i += 4;
        } else {
            out.push(bytes[i]);
            i += 1;
        }
    }
    String::from_utf8(out).expect("whole characters were copied or blanked")
}

/// Length of the string literal `text` starts with, quotes included.
fn string_literal(text: &[u8]) -> Option<usize> {
    if text.first() == Some(&b'"') {
        let mut i = 1;
        while i < text.len() {
            match text[i] {
                b'\\' => i += 2,
                b'"' => return Some(i + 1),
                _ => i += 1,
            }
        }
        return Some(text.len());
    }
    let hashes = text.strip_prefix(b"r")?.iter().take_while(|b| **b == b'#').count();
    if text.get(1 + hashes) != Some(&b'"') {
        return None;
    }
    let close: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
    let start = 2 + hashes;
    let end = text[start..].windows(close.len()).position(|w| w == close)?;
    Some(start + end + close.len())
}

/// `code` up to the unit tests at its end.
pub fn without_tests(code: &str) -> &str {
    let end = code.match_indices("#[cfg(test)]").find(|(at, marker)| {
        let rest = code[at + marker.len()..].trim_start();
        rest.starts_with("mod ")
            && rest.split(['{', ';']).next().is_some_and(|head| rest[head.len()..].starts_with('{'))
    });
    end.map_or(code, |(at, _)| &code[..at])
}

/// Whether `path` holds nothing but tests.
pub fn is_test_file(path: &Path) -> bool {
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    name == "tests" || name.ends_with("_tests") || path.components().any(|c| c.as_os_str() == "tests")
}

/// The identifiers, keywords and words of string literals in `code`, with their line numbers.
pub fn words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    code.lines().enumerate().flat_map(|(line, text)| {
        text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|w| !w.is_empty()).map(move |w| (line + 1, w))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_strings_are_told_from_code() {
        let text = "let a = \"// unsafe \\\" \"; // unsafe\n/* unsafe /* nested */ */ let b = r#\"un\"safe\"#; 'x'";
        assert!(!words(&code(text, false)).any(|(_, w)| w == "unsafe"));
        assert!(words(&code(text, true)).any(|(_, w)| w == "unsafe"));
        assert_eq!(code(text, true).len(), text.len());
        assert_eq!(words(&code("a\nunsafe {}", false)).find(|(_, w)| *w == "unsafe"), Some((2, "unsafe")));
    }

    #[test]
    fn a_quote_character_opens_no_string() {
        assert!(code("if c == '\"' { unsafe_word() } // x", false).contains("unsafe_word"));
    }

    #[test]
    fn unit_tests_are_cut_off() {
        assert_eq!(without_tests("a\n#[cfg(test)]\nmod tests {\n b }"), "a\n");
        let declared = "#[cfg(test)]\nmod tests;\npub use x;";
        assert_eq!(without_tests(declared), declared);
    }
}
