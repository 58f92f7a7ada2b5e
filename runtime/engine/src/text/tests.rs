//! The tokenizer and the templates as a whole, on vocabularies small enough to read.

use serde_json::json;

use super::*;
use crate::Error;
use crate::gguf::{Array, Metadata, Value};

/// Metadata with these tokens and kinds.
fn metadata(model: &str, tokens: &[(&str, i32)]) -> Metadata {
    let mut metadata = Metadata::new("test.gguf");
    metadata.set("tokenizer.ggml.model", Value::String(model.into()));
    let texts = tokens.iter().map(|(text, _)| (*text).to_owned()).collect();
    metadata.set("tokenizer.ggml.tokens", Value::Array(Array::String(texts)));
    let kinds = tokens.iter().map(|(_, kind)| *kind).collect();
    metadata.set("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds)));
    metadata
}

const CHAT: &[(&str, i32)] = &[
    ("<unk>", 2),
    ("<bos>", 3),
    ("<eos>", 3),
    ("<|im_start|>", 3),
    ("<|im_end|>", 4),
    ("<0x0A>", 6),
    ("▁", 1),
    ("a", 1),
    ("b", 1),
    ("ab", 1),
    ("▁a", 1),
    ("▁ab", 1),
    ("  ", 4),
];

fn spm() -> Metadata {
    let mut metadata = metadata("llama", CHAT);
    let scores = (0..CHAT.len()).map(|id| if id == 9 { -1.0 } else { -(id as f32) }).collect();
    metadata.set("tokenizer.ggml.scores", Value::Array(Array::F32(scores)));
    metadata.set("tokenizer.ggml.bos_token_id", Value::U32(1));
    metadata.set("tokenizer.ggml.eos_token_id", Value::U32(2));
    metadata
}

/// Byte-level BPE with the 256 bytes as tokens 0–255, then a few merges.
fn bpe(pre: &str) -> Metadata {
    let byte =
        |code: u32| (0x21..=0x7E).contains(&code) || (0xA1..=0xAC).contains(&code) || (0xAE..=0xFF).contains(&code);
    let mut others = 0x100..;
    let spell = |code: u32| if byte(code) { Some(code) } else { others.next() };
    let alphabet: Vec<String> = (0..256).filter_map(spell).filter_map(char::from_u32).map(String::from).collect();
    let mut tokens: Vec<(&str, i32)> = alphabet.iter().map(|text| (text.as_str(), 1)).collect();
    tokens.extend([("he", 1), ("ll", 1), ("hell", 1), ("hello", 1), ("Ġhello", 1), ("12", 1), ("123", 1)]);
    tokens.extend([("<|endoftext|>", 3), ("<|im_end|>", 3), ("<tool_call>", 4)]);
    let mut metadata = metadata("gpt2", &tokens);
    let merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3"].map(String::from).to_vec();
    metadata.set("tokenizer.ggml.merges", Value::Array(Array::String(merges)));
    metadata.set("tokenizer.ggml.pre", Value::String(pre.into()));
    metadata
}

fn tokenizer(metadata: &Metadata) -> Tokenizer {
    Tokenizer::from_metadata(metadata, None).unwrap()
}

const ADD: EncodeOptions = EncodeOptions { add_special: true, parse_special: true };

#[test]
fn spm_joins_by_score_and_falls_back_to_bytes() {
    let tokenizer = tokenizer(&spm());
    assert_eq!(tokenizer.encode("ab", EncodeOptions::TEXT), [11], "with the space before it");
    assert_eq!(tokenizer.encode("ab ab", ADD), [1, 11, 11]);
    assert_eq!(tokenizer.encode("b\n", EncodeOptions::TEXT), [6, 8, 5]);
    assert_eq!(tokenizer.encode("a  a", EncodeOptions::TEXT), [10, 12, 10], "a user-defined token is always cut out");
    assert_eq!(tokenizer.encode("", ADD), [1]);
    assert_eq!((tokenizer.encode_prompt("<bos>a"), tokenizer.encode_prompt("a")), (vec![1, 10], vec![1, 10]));
    assert_eq!(tokenizer.decode(&[1, 11, 5], false), b" ab\n");
    assert_eq!(tokenizer.decode(&[1, 11], true), b"<bos> ab");
}

#[test]
fn control_tokens_are_text_unless_parsed() {
    let tokenizer = tokenizer(&spm());
    assert_eq!(tokenizer.encode("<bos>a<eos>", EncodeOptions::PROMPT), [1, 10, 2]);
    assert!(!tokenizer.encode("<bos>a", EncodeOptions::TEXT).contains(&1));
    // A wrong kind is mended: <|im_end|> ends a turn, so it is a control token.
    assert!(tokenizer.is_control(4) && tokenizer.is_end_of_generation(4));
    assert_eq!((tokenizer.eot(), tokenizer.ends_of_generation()), (Some(4), &[2, 4][..]));
    assert_eq!(
        (tokenizer.token_id("<|im_start|>"), tokenizer.token_id(" ab"), tokenizer.token_id("x")),
        (Some(3), Some(11), None)
    );
}

#[test]
fn bpe_pre_tokenizers_differ_in_digits() {
    let encode = |pre: &str, text: &str| tokenizer(&bpe(pre)).encode(text, EncodeOptions::TEXT);
    let digits = [u32::from(b'1'), u32::from(b'2'), u32::from(b'3')];
    assert_eq!(encode("smollm", "hello hello"), [259, 260]);
    assert_eq!(encode("smollm", "123"), digits);
    assert_eq!(encode("qwen2", "123"), digits);
    assert_eq!(encode("llama-bpe", "123123"), [262, 262]);
    assert_eq!(encode("gpt-2", "123"), [262]);
    assert_eq!(encode("gpt-2", "中"), [0xE4, 0xB8, 0xAD]);
    let tokenizer = tokenizer(&bpe("smollm"));
    assert_eq!(tokenizer.encode_bytes(b"\xFFhe", EncodeOptions::TEXT), [0xEF, 0xBF, 0xBD, 256], "U+FFFD");
    assert_eq!(tokenizer.encode("<tool_call><|im_end|>", EncodeOptions::PROMPT), [265, 264]);
    assert_eq!(tokenizer.fill_in_middle(), FillInMiddle::default());
    for text in ["", "hello  \n\t x", "中文 emoji 😀\u{200D}", "\0\u{7F}é ½", "it's I'LL"] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text, EncodeOptions::TEXT), false), text.as_bytes());
    }
}

#[test]
fn long_words_take_no_square_time() {
    let tokenizer = tokenizer(&bpe("gpt-2"));
    assert_eq!(tokenizer.encode(&"12".repeat(500_000), EncodeOptions::TEXT).len(), 500_000);
}

#[test]
fn unknown_kinds_are_named() {
    let message = |metadata: &Metadata| match Tokenizer::from_metadata(metadata, None) {
        Err(Error::Unsupported(text)) => text,
        other => panic!("{other:?}"),
    };
    let text = message(&bpe("nonesuch"));
    assert!(text.contains("nonesuch") && text.contains("smollm") && text.contains("test.gguf"), "{text}");
    assert!(message(&metadata("t5", CHAT)).contains("t5"));
}

#[test]
fn damaged_vocabularies_are_errors() {
    let mut short = spm();
    short.set("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![1; 3])));
    assert!(matches!(Tokenizer::from_metadata(&short, None), Err(Error::Format { .. })));
    let mut short = spm();
    short.set("tokenizer.ggml.scores", Value::Array(Array::F32(vec![1.0; 3])));
    assert!(matches!(Tokenizer::from_metadata(&short, None), Err(Error::Format { .. })));
    let mut odd = spm();
    odd.set("tokenizer.ggml.scores", Value::Array(Array::F32(vec![f32::NAN; CHAT.len()])));
    odd.set("tokenizer.ggml.bos_token_id", Value::U32(u32::MAX));
    odd.set("tokenizer.ggml.eot_token_id", Value::I32(-1));
    let tokenizer = tokenizer(&odd);
    assert_eq!(tokenizer.bos(), Some(1), "a number outside the vocabulary counts as none");
    tokenizer.encode("ab ab\u{1F600}", ADD);
    assert_eq!(tokenizer.token_bytes(99, true), None);
    assert!(Tokenizer::from_metadata(&metadata("gpt2", CHAT), None).is_err(), "no merges");
    assert!(
        Tokenizer::from_metadata(&metadata("llama", &[]), None).is_ok_and(|empty| empty.encode("ab", ADD).is_empty())
    );
}

#[test]
fn no_vocabulary_knows_its_size() {
    let mut metadata = Metadata::new("test.gguf");
    metadata.set("tokenizer.ggml.model", Value::String("no_vocab".into()));
    metadata.set("general.architecture", Value::String("llama".into()));
    assert_eq!(Tokenizer::from_metadata(&metadata, Some(7)).unwrap().vocab_size(), 7);
    metadata.set("llama.vocab_size", Value::U32(9));
    let tokenizer = tokenizer(&metadata);
    assert_eq!(
        (tokenizer.vocab_size(), tokenizer.token_bytes(8, true), tokenizer.token_bytes(9, true)),
        (9, Some(&[][..]), None)
    );
    assert!(tokenizer.encode("text", ADD).is_empty());
}

fn conversation() -> Vec<Message> {
    vec![
        Message::new("system", "S"),
        Message::new("user", "你好 <b> 'q'"),
        Message::new("assistant", "您好"),
        Message::new("user", "2"),
        Message::new("assistant", "two"),
    ]
}

#[test]
fn templates_print_as_in_python() {
    let tokenizer = tokenizer(&spm());
    let render = |source: &str, tools: &serde_json::Value| {
        ChatTemplate::new(source, &tokenizer).unwrap().render(&conversation(), Some(tools), false).unwrap()
    };
    let tools = json!([{ "n": "é<'\"", "x": [1, 2.0, null, true], "o": {} }]);
    // Expected: transformers 5.24 (jinja2 3.1.6), _compile_jinja_template(source).render(messages=…, tools=…).
    assert_eq!(render("{{ tools | tojson }}", &tools), r#"[{"n": "é<'\"", "x": [1, 2.0, null, true], "o": {}}]"#);
    assert_eq!(
        render("{{ tools[0] | tojson(indent=2) }}", &tools),
        "{\n  \"n\": \"é<'\\\"\",\n  \"x\": [\n    1,\n    2.0,\n    null,\n    true\n  ],\n  \"o\": {}\n}"
    );
    assert_eq!(
        render("{{ tools[0] | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}", &tools),
        r#"{"n":"\u00e9<'\"","o":{},"x":[1,2.0,null,true]}"#
    );
    assert_eq!(
        render("{{ true }} {{ none }} {{ [1, 'a', \"it's\", 2.5, false] }} {{ {'k': (1,)} }} {{ 1e20 }}", &tools),
        "True None [1, 'a', \"it's\", 2.5, False] {'k': (1,)} 1e+20"
    );
    let source = "  {% for m in messages %}\n    {% if m.role == 'system' %}{% continue %}{% endif %}\n{{ m.role.upper() }}\n  {% endfor %}\n";
    assert_eq!(render(source, &tools), "USER\nASSISTANT\nUSER\nASSISTANT\n");
    assert_eq!(render("{% generation %}\nx{% endgeneration %}{{ eos_token }}", &tools), "x<eos>");
    assert_eq!(render("{{ 'ab <|im_end|>'.title() }}{{ 'a-b'.split('-') }}", &tools), "Ab <|Im_End|>['a', 'b']");
}

#[test]
fn hostile_templates_end_in_errors() {
    let tokenizer = tokenizer(&spm());
    let error = |source: &str| match ChatTemplate::new(source, &tokenizer).and_then(|t| t.render(&[], None, false)) {
        Err(Error::Template(text)) => text,
        other => panic!("{source}: {other:?}"),
    };
    let forever = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}";
    assert!(error(forever).contains("budget"));
    let nested = "{% set ns = namespace(x=[]) %}{% for i in range(999) %}{% for j in range(999) %}\
                  {% set ns.x = [ns.x] %}{% endfor %}{% endfor %}";
    assert!(error(nested).contains("budget"));
    error("{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}");
    error("{% set ns = namespace(x=[]) %}{% for i in range(9000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}");
    error("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}");
    error("{{ 'a' * 100000000000 }}");
    error("{% if %}");
    error(&"{% if a %}".repeat(20_000));
    error(&format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000)));
    error(&" ".repeat(1 << 20));
    assert!(error("{{ raise_exception('roles must alternate') }}").contains("roles must alternate"));
}

#[test]
fn masks_cover_what_the_assistant_said() {
    let tokenizer = tokenizer(&spm());
    let chatml = ChatTemplate::chatml(&tokenizer).unwrap();
    let segments = chatml.render_masked(&conversation(), None).unwrap();
    let all: String = segments.iter().map(|segment| segment.text.as_str()).collect();
    assert_eq!(all, chatml.render(&conversation(), None, false).unwrap());
    let trained: Vec<&str> = segments.iter().filter(|s| s.trained).map(|s| s.text.as_str()).collect();
    assert_eq!(trained, ["您好<|im_end|>", "two<|im_end|>"]);
    assert!(segments[0].text.ends_with("<|im_start|>assistant\n"));
    // Without a generation prompt the content is looked for.
    let plain = ChatTemplate::new("{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}", &tokenizer);
    let trained = plain.unwrap().render_masked(&conversation(), None).unwrap();
    let trained: Vec<&str> = trained.iter().filter(|s| s.trained).map(|s| s.text.as_str()).collect();
    assert_eq!(trained, ["您好<eos>", "two<eos>"]);
    // A template that shortens earlier turns has no mask.
    let unstable = "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}";
    let error = ChatTemplate::new(unstable, &tokenizer).unwrap().render_masked(&conversation(), None).unwrap_err();
    assert!(error.to_string().contains("message 2"), "{error}");
    // Nor has one that leaves the assistant out, behind an end with white space after it.
    let deaf = "{% for m in messages if m.role == 'user' %}{{ m.content }}<eos>\n\n{% endfor %}";
    let error = ChatTemplate::new(deaf, &tokenizer).unwrap().render_masked(&conversation(), None).unwrap_err();
    assert!(error.to_string().contains("message 2"), "{error}");
}

#[test]
fn fallback_templates() {
    let tokenizer = tokenizer(&spm());
    let messages = &conversation()[..2];
    assert_eq!(
        ChatTemplate::chatml(&tokenizer).unwrap().render(messages, None, true).unwrap(),
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n你好 <b> 'q'<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(
        ChatTemplate::gemma(&tokenizer).unwrap().render(messages, None, true).unwrap(),
        "<bos><start_of_turn>user\nS\n\n你好 <b> 'q'<end_of_turn>\n<start_of_turn>model\n"
    );
}
