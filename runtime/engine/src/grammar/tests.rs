//! Grammars over two small vocabularies: GPT-2's bytes, and SentencePiece's pieces with bytes beside them. What an answer
//! may be is read back by `serde_json`, not by the library that held it.

use std::sync::Arc;

use serde_json::Value as Json;

use super::*;
use crate::Error;
use crate::gguf::{Array, Metadata, Value};
use crate::text::Tokenizer;

fn metadata(model: &str, tokens: &[(String, i32)]) -> Metadata {
    let mut metadata = Metadata::new("test.gguf");
    metadata.set("tokenizer.ggml.model", Value::String(model.into()));
    metadata.set("tokenizer.ggml.pre", Value::String("smollm".into()));
    metadata.set("tokenizer.ggml.merges", Value::Array(Array::String(vec!["a b".into()])));
    let texts = tokens.iter().map(|(text, _)| text.clone()).collect();
    metadata.set("tokenizer.ggml.tokens", Value::Array(Array::String(texts)));
    let kinds = tokens.iter().map(|(_, kind)| *kind).collect();
    metadata.set("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds)));
    metadata
}

/// The bytes in GPT-2's alphabet are tokens 0 to 255, but not in the order of bytes; then some of several bytes, a token
/// that is called like a mark of SentencePiece's but ends nothing, and the ends.
fn bpe() -> Tokenizer {
    let printable = |code: &u32| matches!(code, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let alphabet = (0..256).filter(printable).chain(0x100..0x100 + 68).filter_map(char::from_u32);
    let mut tokens: Vec<(String, i32)> = alphabet.map(|c| (c.to_string(), 1)).collect();
    for text in ["ab", "{\"", "\":", "Ġ\"", "æĹ", "Ġ", "ab\"", "Ġab"] {
        tokens.push((text.into(), 1));
    }
    tokens.extend([("<|endoftext|>".into(), 3), ("<|im_end|>".into(), 3), ("<|tool|>".into(), 3)]);
    let mut metadata = metadata("gpt2", &tokens);
    metadata.set("tokenizer.ggml.eos_token_id", Value::U32(tokens.len() as u32 - 2));
    Tokenizer::from_metadata(&metadata, None).unwrap()
}

/// SentencePiece: `▁` for the space, bytes as `<0x41>`, and an end that the file takes for ordinary text.
fn spm() -> Tokenizer {
    let mut tokens: Vec<(String, i32)> = vec![("<unk>".into(), 2), ("<s>".into(), 3), ("</s>".into(), 1)];
    tokens.extend((0..256).map(|byte| (format!("<0x{byte:02X}>"), 6)));
    let pieces =
        ["▁", "{", "}", "\"", ":", ",", "a", "b", "ab", "▁ab", "{\"", "\":", "▁\"", "[", "]", "1", "0", "日", "<"];
    tokens.extend(pieces.map(|text| (text.into(), 1)));
    let mut metadata = metadata("llama", &tokens);
    metadata.set("tokenizer.ggml.eos_token_id", Value::U32(2));
    Tokenizer::from_metadata(&metadata, None).unwrap()
}

fn both() -> [(Tokenizer, Arc<Vocabulary>); 2] {
    [bpe(), spm()].map(|tokenizer| {
        let vocabulary = Arc::new(Vocabulary::new(&tokenizer).unwrap());
        (tokenizer, vocabulary)
    })
}

fn schema(text: &str) -> GrammarSource {
    GrammarSource::JsonSchema(text.into())
}

fn lark(text: &str) -> GrammarSource {
    GrammarSource::Lark(text.into())
}

/// The tokens that may come next, of a vocabulary with `more` logits than tokens.
fn allowed(constraint: &mut Constraint, tokenizer: &Tokenizer) -> Vec<u32> {
    let mut logits = vec![1.5; tokenizer.vocab_size() + 7];
    constraint.mask(&mut logits).unwrap();
    assert!(logits.iter().all(|z| *z == 1.5 || *z == f32::NEG_INFINITY));
    (0..).zip(&logits).filter(|(_, z)| z.is_finite()).map(|(id, _)| id).collect()
}

/// The tokens that stand for one of `texts`.
fn spelled(tokenizer: &Tokenizer, texts: &[&str]) -> Vec<u32> {
    let is = |id: &u32| texts.iter().any(|text| tokenizer.token_bytes(*id, false) == Some(text.as_bytes()));
    (0..tokenizer.vocab_size() as u32).filter(is).collect()
}

/// A text of the grammar: tokens by chance until the end, or `None` where that is far.
fn walk(grammar: &Grammar, tokenizer: &Tokenizer, seed: u64) -> Option<String> {
    let mut constraint = grammar.start();
    let mut bytes = Vec::new();
    for step in 0..300 {
        if constraint.is_complete() {
            return Some(String::from_utf8(bytes).expect("whole UTF-8"));
        }
        let allowed = allowed(&mut constraint, tokenizer);
        let token = allowed[crate::random::splitmix64(seed, step) as usize % allowed.len()];
        constraint.accept(token).unwrap();
        bytes.extend_from_slice(tokenizer.token_bytes(token, false).unwrap());
        if tokenizer.is_end_of_generation(token) {
            return Some(String::from_utf8(bytes).expect("whole UTF-8"));
        }
    }
    None
}

#[test]
fn a_schema_is_held_to_the_last_byte() {
    let source = r##"{
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 2, "maxLength": 4},
            "age": {"type": "integer", "minimum": -3, "maximum": 120},
            "tag": {"enum": ["日本", "é\"", null, 7]},
            "rest": {"$ref": "#/$defs/list"}
        },
        "required": ["name", "age", "rest"],
        "additionalProperties": false,
        "$defs": {"list": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}}
    }"##;
    for (tokenizer, vocabulary) in both() {
        let grammar = Grammar::compile(&vocabulary, schema(source)).unwrap();
        let mut ended = 0;
        for seed in 0..60 {
            let Some(text) = walk(&grammar, &tokenizer, seed) else { continue };
            let json: Json = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
            let fields = json.as_object().unwrap();
            assert!(fields.keys().all(|key| ["name", "age", "tag", "rest"].contains(&key.as_str())), "{text}");
            let length = fields["name"].as_str().unwrap().chars().count();
            assert!((2..=4).contains(&length), "{text}");
            // `-0` is an integer that `i64` does not have.
            let age = fields["age"].as_f64().unwrap();
            assert!((-3.0..=120.0).contains(&age) && age.fract() == 0.0, "{text}");
            let tags = [json!("日本"), json!("é\""), Json::Null, json!(7)];
            assert!(fields.get("tag").is_none_or(|tag| tags.contains(tag)), "{text}");
            let list = fields["rest"].as_array().unwrap();
            assert!((1..=3).contains(&list.len()) && list.iter().all(Json::is_boolean), "{text}");
            ended += 1;
        }
        assert!(ended > 50, "{ended} of 60 came to an end");
    }
}

#[test]
fn the_end_comes_where_the_grammar_may_end() {
    for (tokenizer, vocabulary) in both() {
        let (a, ab) = (spelled(&tokenizer, &["a"]), tokenizer.token_id("ab").unwrap());
        let ends = tokenizer.ends_of_generation();
        assert!(!ends.is_empty());
        let grammar = Grammar::compile(&vocabulary, lark("start: \"a\" \"a\"+")).unwrap();
        let mut constraint = grammar.start();
        for token in [a[0], a[a.len() - 1]] {
            assert_eq!(allowed(&mut constraint, &tokenizer), a);
            constraint.accept(token).unwrap();
        }
        let mut with_ends = [ends, &a].concat();
        with_ends.sort_unstable();
        assert_eq!(allowed(&mut constraint, &tokenizer), with_ends);
        assert!(!constraint.is_complete());

        // Two ways to spell it, then nothing but the end.
        let grammar = Grammar::compile(&vocabulary, GrammarSource::Regex("ab".into())).unwrap();
        let mut constraint = grammar.start();
        let ways = spelled(&tokenizer, &["a", "ab"]);
        assert_eq!(allowed(&mut constraint, &tokenizer), ways);
        constraint.accept(ab).unwrap();
        assert!(constraint.is_complete());
        assert_eq!(allowed(&mut constraint, &tokenizer), ends);
        // Another answer begins at the beginning.
        assert_eq!(allowed(&mut grammar.start(), &tokenizer), ways);
        assert!(grammar.start().accept(ends[0]).is_err());
    }
}

#[test]
fn structure_is_no_text() {
    for (tokenizer, vocabulary) in both() {
        let grammar = Grammar::compile(&vocabulary, schema(r#"{"type": "string"}"#)).unwrap();
        let mut constraint = grammar.start();
        constraint.accept(tokenizer.token_id("\"").unwrap()).unwrap();
        let inside = allowed(&mut constraint, &tokenizer);
        for id in 0..tokenizer.vocab_size() as u32 {
            if tokenizer.is_control(id) || tokenizer.is_end_of_generation(id) {
                assert!(!inside.contains(&id), "token {id}");
            }
        }
        assert!(inside.len() > 100, "bytes of characters are text");
    }
    // Called by its name it is allowed, and nothing else is.
    let [(tokenizer, vocabulary), _] = both();
    let tool = tokenizer.token_id("<|tool|>").unwrap();
    let grammar = Grammar::compile(&vocabulary, lark("start: <|tool|> \"a\"")).unwrap();
    assert_eq!(allowed(&mut grammar.start(), &tokenizer), [tool]);
    // The same letters are text.
    let grammar = Grammar::compile(&vocabulary, lark("start: \"<|tool|>\"")).unwrap();
    assert_eq!(allowed(&mut grammar.start(), &tokenizer), [tokenizer.token_id("<").unwrap()]);
}

#[test]
fn white_space_comes_to_an_end() {
    for (tokenizer, vocabulary) in both() {
        let token = |text: &str| tokenizer.token_id(text).unwrap();
        let next = |source: &str| {
            let grammar = Grammar::compile(&vocabulary, schema(source)).unwrap();
            let mut constraint = grammar.start();
            for text in ["[", " "] {
                if constraint.accept(token(text)).is_err() {
                    return None;
                }
            }
            Some(allowed(&mut constraint, &tokenizer))
        };
        assert!(!next(r#"{"type": "array"}"#).unwrap().contains(&token(" ")));
        let flexible = r#"{"type": "array", "x-guidance": {"whitespace_flexible": true}}"#;
        assert!(next(flexible).unwrap().contains(&token(" ")));
        assert_eq!(next(r#"{"type": "array", "x-guidance": {"whitespace_flexible": false}}"#), None);
    }
}

#[test]
fn what_cannot_be_held_is_named() {
    let [(_, vocabulary), _] = both();
    let deep = format!("start: {}\"a\"{}", "(".repeat(100_000), ")".repeat(100_000));
    let regex = format!("{}a{}", "(".repeat(100_000), ")".repeat(100_000));
    let cases = [
        (schema("{\"type\":"), "the JSON schema: is no JSON: EOF"),
        (schema("3"), "the JSON schema: "),
        (schema("false"), "the JSON schema: Unsatisfiable schema"),
        (schema(r#"{"type": "strnig"}"#), "strnig"),
        (schema(r#"{"type": "object", "if": {}, "then": {}}"#), "\"if\""),
        (schema(r#"{"$ref": "https://example.org/x.json"}"#), "example.org"),
        (schema(r#"{"x-guidance": {"whitspace": 1}}"#), "whitspace"),
        (schema(&"[".repeat(2 << 20)), "exceed 1048576"),
        (
            schema(r#"{"type": "array", "items": {"minItems": 4, "maxItems": 3, "type": "array"}, "minItems": 1}"#),
            "maxItems (3)",
        ),
        (lark("start: more"), "more"),
        (lark("rule: \"a\""), "start"),
        (lark("start: \"a"), "the grammar: "),
        (lark(&deep), "nested"),
        (lark("start: <|nothing|>"), "nothing"),
        (GrammarSource::Regex("(a".into()), "the regular expression: "),
        (GrammarSource::Regex(regex), "the regular expression: "),
    ];
    for (source, part) in cases {
        let short: String = source.text().chars().take(60).collect();
        let error = Grammar::compile(&vocabulary, source).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Grammar(_)), "{short}: {error:?}");
        let text = error.to_string();
        assert!(text.contains(part) && !text.contains("panic") && text.len() < 1000, "{short}: {text}");
    }
}

#[test]
fn what_is_too_much_stops_in_time() {
    let any: Vec<String> = (0..10).map(|i| format!(r#"{{"required": ["p{i}"], "maxProperties": {i}}}"#)).collect();
    let all = vec![format!(r#"{{"anyOf": [{}]}}"#, any.join(",")); 12].join(",");
    let cases = [
        schema(&format!(r#"{{"type": "object", "allOf": [{all}]}}"#)),
        schema(r#"{"type": "array", "items": {"type": "integer"}, "minItems": 1000000000}"#),
        schema(r#"{"type": "string", "maxLength": 1000000000}"#),
        schema(r##"{"allOf": [{"$ref": "#"}, {"type": "object"}]}"##),
        schema(r##"{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}"##),
        schema(r#"{"type": "string", "pattern": "^(a|b)*a(a|b){24}$"}"#),
        lark("start: s\ns: s s | s s s | \"a\" | \"b\" |"),
        lark("start: ((((A{1000}){1000}){1000}){1000}){1000}\nA: \"a\" | \"b\""),
        GrammarSource::Regex("((a{1,60000}b){1,60000}c){1,60000}".into()),
    ];
    let [(tokenizer, vocabulary), _] = both();
    for source in cases {
        let started = std::time::Instant::now();
        let short: String = source.text().chars().take(60).collect();
        if let Ok(grammar) = Grammar::compile(&vocabulary, source) {
            let mut constraint = grammar.start();
            let mut logits = vec![0.0; tokenizer.vocab_size()];
            for step in 0..100 {
                logits.fill(0.0);
                // Running out of fuel is an error like any other.
                if constraint.is_complete() || constraint.mask(&mut logits).is_err() {
                    break;
                }
                let open: Vec<u32> = (0..).zip(&logits).filter(|(_, z)| **z == 0.0).map(|(id, _)| id).collect();
                if constraint.accept(open[step * 31 % open.len()]).is_err() {
                    break;
                }
            }
        }
        // Without bounds these take for ever, or all memory.
        assert!(started.elapsed().as_secs() < 120, "{short}: {:?}", started.elapsed());
    }
}

#[test]
fn a_vocabulary_without_text_has_no_grammars() {
    let mut metadata = Metadata::new("test.gguf");
    metadata.set("tokenizer.ggml.model", Value::String("no_vocab".into()));
    let tokenizer = Tokenizer::from_metadata(&metadata, Some(32)).unwrap();
    assert!(matches!(Vocabulary::new(&tokenizer), Err(Error::Unsupported(_))));
    // Tokens longer than the trie holds are left out; the others are there.
    let tokens: Vec<(String, i32)> = [("x".repeat(5000), 1), ("a".into(), 1), ("<e>".repeat(900), 3)].into();
    let mut metadata = self::metadata("gpt2", &tokens);
    metadata.set("tokenizer.ggml.eos_token_id", Value::U32(2));
    let tokenizer = Tokenizer::from_metadata(&metadata, None).unwrap();
    let vocabulary = Arc::new(Vocabulary::new(&tokenizer).unwrap());
    let grammar = Grammar::compile(&vocabulary, GrammarSource::Regex("[ax]+".into())).unwrap();
    assert_eq!(allowed(&mut grammar.start(), &tokenizer), [1]);
}
