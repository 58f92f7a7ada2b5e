//! Token ids against llama.cpp on the same files: a corpus of over 10,000 strings made to be difficult, in the four
//! combinations of "add special tokens" and "parse special tokens", and every piece of every vocabulary.

use kinglet_engine::gguf::Gguf;
use kinglet_engine::text::{EncodeOptions, Tokenizer};
use kinglet_tests::data::{MODELS, file, model};
use kinglet_tests::{oracle, strings};

fn both(id: &str) -> (Tokenizer, oracle::Model) {
    let path = model(id);
    let gguf = Gguf::open(&path).expect("the model opens");
    let ours = Tokenizer::from_gguf(&gguf).expect("a tokenizer");
    (ours, oracle::Model::load_vocabulary(&path).expect("llama.cpp loads the vocabulary"))
}

/// Every combination of the two switches.
const SWITCHES: [(bool, bool); 4] = [(false, false), (true, false), (false, true), (true, true)];

fn compare(id: &str, ours: &Tokenizer, theirs: &oracle::Model, text: &[u8], differences: &mut Vec<String>) {
    for (add_special, parse_special) in SWITCHES {
        let expected = theirs.tokenize(text, add_special, parse_special);
        let found = ours.encode_bytes(text, EncodeOptions { add_special, parse_special });
        if found != expected {
            let shown = String::from_utf8_lossy(&text[..text.len().min(200)]);
            differences.push(format!(
                "{id}, add_special {add_special}, parse_special {parse_special}: {shown:?}\n  ours      {found:?}\n  \
                 llama.cpp {expected:?}"
            ));
        }
    }
}

#[test]
fn strings_tokenize_alike() {
    let corpus = strings::corpus(2026, 12_000);
    assert!(corpus.len() >= 10_000, "the corpus has {} strings only", corpus.len());
    for id in MODELS {
        let (ours, theirs) = both(id);
        let mut differences = Vec::new();
        for text in &corpus {
            compare(id, &ours, &theirs, text.as_ref(), &mut differences);
        }
        assert!(differences.is_empty(), "{} differ, the first:\n{}", differences.len(), differences[0]);
    }
}

#[test]
fn a_long_text_tokenizes_alike() {
    let text = std::fs::read(file("handbook.txt")).expect("the handbook");
    for id in MODELS {
        let (ours, theirs) = both(id);
        let mut differences = Vec::new();
        compare(id, &ours, &theirs, &text, &mut differences);
        assert!(differences.is_empty(), "{}", differences[0]);
    }
}

#[test]
fn every_piece_stands_for_the_same_bytes() {
    for id in MODELS {
        let (ours, theirs) = both(id);
        assert_eq!(ours.vocab_size(), theirs.vocab_size(), "{id}");
        for token in 0..theirs.vocab_size() as u32 {
            for special in [false, true] {
                let expected = theirs.piece(token, special);
                let found = ours.token_bytes(token, special).unwrap_or_else(|| panic!("{id}: no token {token}"));
                assert_eq!(found, expected, "{id}, token {token}, special {special}");
            }
            assert_eq!(ours.is_end_of_generation(token), theirs.is_end_of_generation(token), "{id}, token {token}");
        }
    }
}
