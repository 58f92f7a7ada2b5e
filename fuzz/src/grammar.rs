//! Grammars, which come from whoever asks, and what models say of tools.
//!
//! The first byte chooses: a JSON schema, a grammar, a regular expression, or an answer with calls. The source ends at the
//! first NUL; each byte behind it chooses a token, most of them one that the mask allows. Behind the last one the answer ends
//! as soon as it may.

use std::sync::{Arc, OnceLock};

use kinglet_engine::grammar::{Grammar, GrammarSource, Vocabulary};
use kinglet_engine::text::{Said, Tokenizer, ToolFormat, ToolParser};

use crate::input::Input;
use crate::seeds;

/// Most tokens of one answer.
const STEPS: usize = 200;

/// The tokens that grammars are compiled for.
fn tokens() -> &'static (Tokenizer, Arc<Vocabulary>) {
    static TOKENS: OnceLock<(Tokenizer, Arc<Vocabulary>)> = OnceLock::new();
    TOKENS.get_or_init(|| {
        let file = crate::gguf::open(&seeds::chatting()).expect("the seed is sound");
        let tokenizer = Tokenizer::from_gguf(&file).expect("the seed has a tokenizer");
        let vocabulary = Arc::new(Vocabulary::new(&tokenizer).expect("its tokens have text"));
        (tokenizer, vocabulary)
    })
}

/// See the crate's text.
pub fn grammar(data: &[u8]) {
    let mut input = Input(data);
    let choice = input.byte();
    let text = String::from_utf8_lossy(input.until(0)).into_owned();
    match choice % 4 {
        0 => answer(GrammarSource::JsonSchema(text), &mut input),
        1 => answer(GrammarSource::Lark(text), &mut input),
        2 => answer(GrammarSource::Regex(text), &mut input),
        _ => calls(choice / 4, &text),
    }
}

/// An answer under the grammar, if there is one.
fn answer(source: GrammarSource, input: &mut Input<'_>) {
    let (tokenizer, vocabulary) = tokens();
    // Its options may turn JSON into something else.
    let is_json = matches!(&source, GrammarSource::JsonSchema(text) if !text.contains("x-guidance"));
    let Ok(grammar) = Grammar::compile(vocabulary, source) else { return };
    let mut constraint = grammar.start();
    let mut logits = vec![0.0; tokenizer.vocab_size()];
    let mut bytes = Vec::new();
    for _ in 0..STEPS {
        if constraint.is_complete() {
            return ended(is_json, &bytes);
        }
        logits.fill(0.0);
        // What is too much is an error, at any step.
        if constraint.mask(&mut logits).is_err() {
            return;
        }
        let allowed: Vec<u32> = (0..).zip(&logits).filter(|(_, z)| **z == 0.0).map(|(id, _)| id).collect();
        let end = allowed.iter().find(|token| tokenizer.is_end_of_generation(**token));
        let token = match (input.byte(), end) {
            (0, Some(end)) if input.is_empty() => *end,
            (250.., _) => input.number() as u32,
            (byte, _) => allowed[usize::from(byte) % allowed.len()],
        };
        let accepted = constraint.accept(token).is_ok();
        assert!(!accepted || allowed.contains(&token), "token {token} was masked");
        if !accepted {
            return;
        }
        if tokenizer.is_end_of_generation(token) {
            return ended(is_json, &bytes);
        }
        bytes.extend_from_slice(tokenizer.token_bytes(token, false).expect("a token of the vocabulary"));
    }
}

/// A whole answer under a schema is JSON.
fn ended(is_json: bool, bytes: &[u8]) {
    let json = serde_json::from_slice::<&serde_json::value::RawValue>(bytes);
    assert!(!is_json || json.is_ok(), "{json:?}: {}", String::from_utf8_lossy(bytes));
}

/// Text and calls are the same however an answer is cut, and text without calls is all of it.
fn calls(choice: u8, text: &str) {
    let formats = [ToolFormat::Tagged, ToolFormat::List, ToolFormat::Named, ToolFormat::Bare];
    let format = formats[usize::from(choice) % formats.len()];
    let whole = ToolParser::new(format, 1).message(text);
    let mut parser = ToolParser::new(format, 1);
    let mut said: Vec<Said> = text.chars().flat_map(|c| parser.push(c.encode_utf8(&mut [0; 4]))).collect();
    said.extend(parser.finish());
    let (mut content, mut calls) = (String::new(), Vec::new());
    for said in said {
        match said {
            Said::Text(piece) => content.push_str(&piece),
            Said::Call(call) => calls.push(call),
        }
    }
    assert_eq!((&content, &calls), (&whole.content, &whole.tool_calls));
    assert!(!calls.is_empty() || content == text, "{content:?}");
}
