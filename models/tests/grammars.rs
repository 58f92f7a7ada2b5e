//! Answers under a grammar, sampled from models that know nothing: whatever the logits, the text is of the grammar. What
//! comes out is read by `serde` types that say the same as the schema, not by what held it.

mod common;

use common::Folder;
use kinglet_engine::Error;
use kinglet_engine::grammar::{Grammar, GrammarSource};
use kinglet_engine::sampling::{Mirostat, SamplerOptions};
use kinglet_engine::session::{
    Batcher, EndReason, Engine, GenerateOptions, Model, Session, SessionOptions, Speculation,
};
use kinglet_engine::text::{EncodeOptions, Tool, ToolFormat, ToolParser};
use kinglet_models::tiny::TinyConfig;

const SCHEMA: &str = r##"{
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "colour": {"enum": ["rouge", "grün", "蓝"]},
        "size": {"type": "integer", "minimum": -5, "exclusiveMaximum": 6},
        "friends": {"type": "array", "items": {"$ref": "#/$defs/friend"}, "maxItems": 2}
    },
    "required": ["name", "age", "colour", "friends"],
    "additionalProperties": false,
    "$defs": {"friend": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"name": {"type": "string", "maxLength": 4}},
        "required": ["name"], "additionalProperties": false}]}}
}"##;

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Person {
    name: String,
    age: f64,
    colour: Colour,
    size: Option<f64>,
    friends: Vec<Option<Friend>>,
}

#[derive(serde::Deserialize)]
enum Colour {
    #[serde(rename = "rouge")]
    Rouge,
    #[serde(rename = "grün")]
    Grün,
    #[serde(rename = "蓝")]
    Blue,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Friend {
    name: String,
}

fn check(text: &str) {
    let person: Person = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
    assert!((1..=8).contains(&person.name.chars().count()), "{text}");
    // `-0` is an integer that integers do not have.
    let whole = |number: f64, range: std::ops::Range<f64>| range.contains(&number) && number.fract() == 0.0;
    assert!(whole(person.age, 0.0..131.0) && person.size.is_none_or(|size| whole(size, -5.0..6.0)), "{text}");
    assert!(person.friends.len() <= 2, "{text}");
    assert!(person.friends.iter().flatten().all(|friend| friend.name.chars().count() <= 4), "{text}");
    let (Colour::Rouge | Colour::Grün | Colour::Blue) = person.colour;
}

fn tiny(folder: &Folder) -> Model {
    folder.model(&TinyConfig { context: 2048, ..TinyConfig::new("llama") }.with_bpe())
}

fn options() -> SessionOptions {
    SessionOptions { context: 2048, threads: 2, logit_rows: 6, ..SessionOptions::default() }
}

fn prompt(model: &Model) -> Vec<u32> {
    model.tokenizer().encode("the hat and the hat", EncodeOptions::TEXT)
}

fn under(grammar: &Grammar, sampler: SamplerOptions) -> GenerateOptions {
    GenerateOptions { sampler, max_tokens: 1500, grammar: Some(grammar.clone()), ..Default::default() }
}

/// The text of an answer, and how it ended.
fn answer(session: &mut Session, prompt: &[u32], options: GenerateOptions) -> (String, Option<EndReason>) {
    let mut generation = session.generate(prompt, options).unwrap();
    let mut text = String::new();
    while let Some(piece) = generation.next().unwrap() {
        text.push_str(piece.text);
    }
    (text, generation.stats().end)
}

fn samplers() -> [SamplerOptions; 6] {
    let hot = SamplerOptions { temperature: 1.5, ..SamplerOptions::default() };
    [
        SamplerOptions::greedy(),
        SamplerOptions { top_k: 0, top_p: 1.0, min_p: 0.0, ..hot.clone() },
        SamplerOptions { top_k: 1, ..hot.clone() },
        SamplerOptions { top_p: 0.01, typical_p: 0.1, min_p: 1.0, ..hot.clone() },
        SamplerOptions { repeat_penalty: 1.5, presence_penalty: 2.0, dry_multiplier: 1.0, ..hot.clone() },
        SamplerOptions { mirostat: Some(Mirostat { tau: 6.0, eta: 0.3 }), ..hot },
    ]
}

#[test]
fn whatever_the_sampler_a_schema_holds() {
    let folder = Folder::new("schema");
    let model = tiny(&folder);
    let grammar = model.grammar(GrammarSource::JsonSchema(SCHEMA.into())).unwrap();
    let mut session = Session::new(&model, &options()).unwrap();
    for (i, sampler) in samplers().into_iter().enumerate() {
        for seed in 0..if i == 0 { 1 } else { 5 } {
            let sampler = SamplerOptions { seed: Some(seed), ..sampler.clone() };
            let (text, end) = answer(&mut session, &prompt(&model), under(&grammar, sampler));
            assert_eq!(end, Some(EndReason::EndOfText), "sampler {i}, seed {seed}: {text}");
            check(&text);
        }
    }
}

#[test]
fn what_is_forced_comes_out_whole() {
    let folder = Folder::new("forced");
    let model = tiny(&folder);
    let mut session = Session::new(&model, &options()).unwrap();
    let text = "the user said: 你好, \"hello\" 😀\n";
    let source = GrammarSource::Lark(format!("start: {}", serde_json::json!(text)));
    let grammar = model.grammar(source).unwrap();
    for sampler in samplers() {
        assert_eq!(
            answer(&mut session, &prompt(&model), under(&grammar, sampler)),
            (text.to_string(), Some(EndReason::EndOfText))
        );
    }
    // A stop text and a limit end it before that; what begins like a stop text and is none comes out at the end.
    let stopped = GenerateOptions { stop: vec!["said".into()], ..under(&grammar, SamplerOptions::greedy()) };
    assert_eq!(answer(&mut session, &prompt(&model), stopped), ("the user ".into(), Some(EndReason::Stop)));
    let held = GenerateOptions { stop: vec!["\nmore".into()], ..under(&grammar, SamplerOptions::greedy()) };
    assert_eq!(answer(&mut session, &prompt(&model), held).0, text);
    let short = GenerateOptions { max_tokens: 2, ..under(&grammar, SamplerOptions::greedy()) };
    assert_eq!(answer(&mut session, &prompt(&model), short).1, Some(EndReason::Length));
}

#[test]
fn guessing_ahead_and_answering_together_change_nothing() {
    let folder = Folder::new("together");
    let model = tiny(&folder);
    let draft =
        folder.named("draft.gguf", &TinyConfig { seed: 2, context: 2048, ..TinyConfig::new("llama") }.with_bpe());
    let grammar = model.grammar(GrammarSource::JsonSchema(SCHEMA.into())).unwrap();
    let with = |seed| under(&grammar, SamplerOptions { seed: Some(seed), temperature: 1.2, ..Default::default() });
    let alone = |seed| answer(&mut Session::new(&model, &options()).unwrap(), &prompt(&model), with(seed)).0;
    let want: Vec<String> = (0..4).map(alone).collect();

    for speculation in [Speculation::Lookup, Speculation::Model] {
        for (seed, want) in (0..).zip(&want) {
            let mut session = Session::new(&model, &options()).unwrap();
            session.set_draft(Some(Session::new(&draft, &options()).unwrap())).unwrap();
            let found = answer(&mut session, &prompt(&model), GenerateOptions { speculation, ..with(seed) });
            assert_eq!(&found.0, want, "{speculation:?}, seed {seed}");
        }
    }

    let mut batcher = Batcher::new(Engine::new(&model, &options()).unwrap());
    batcher.set_alone(true);
    let ids: Vec<_> = (0..4).map(|seed| batcher.submit(&prompt(&model), with(seed)).unwrap()).collect();
    let mut found = vec![String::new(); 4];
    batcher
        .run_all(|progress| {
            let which = ids.iter().position(|id| *id == progress.request).unwrap();
            found[which].push_str(progress.text);
        })
        .unwrap();
    assert_eq!(found, want);
}

#[test]
fn what_does_not_go_with_a_grammar_is_refused() {
    let folder = Folder::new("refused");
    let model = tiny(&folder);
    let other = folder.named("other.gguf", &TinyConfig { context: 2048, ..TinyConfig::new("llama") }.with_bpe());
    let grammar = other.grammar(GrammarSource::Regex("a+".into())).unwrap();
    let mut session = Session::new(&model, &options()).unwrap();
    let mut refusal = |options| session.generate(&[1, 2], options).map(|_| ()).unwrap_err().to_string();
    assert!(refusal(under(&grammar, SamplerOptions::greedy())).contains("another model"));
    let grammar = model.grammar(GrammarSource::Regex("a+".into())).unwrap();
    let endless = GenerateOptions { ignore_end: true, ..under(&grammar, SamplerOptions::greedy()) };
    assert!(refusal(endless).contains("ignore_end"));
    let without = folder.named("ids.gguf", &TinyConfig::new("llama"));
    let error = without.grammar(GrammarSource::Regex("a+".into())).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error:?}");
}

#[test]
fn forced_calls_are_calls() {
    let folder = Folder::new("calls");
    let model = tiny(&folder);
    let mut session = Session::new(&model, &options()).unwrap();
    let tools = serde_json::json!([
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {
            "city": {"$ref": "#/$defs/city"}}, "required": ["city"], "additionalProperties": false,
            "$defs": {"city": {"enum": ["Köln", "Åbo"]}}}}},
        {"type": "function", "function": {"name": "ti\"me", "parameters": {"type": "object", "additionalProperties": false}}},
    ]);
    let tools = Tool::list(&tools).unwrap();
    let tokenizer = model.tokenizer();
    for format in [ToolFormat::Tagged, ToolFormat::List, ToolFormat::Named, ToolFormat::Bare] {
        for (only, seed) in [(None, 1), (None, 2), (Some("weather"), 3), (Some("ti\"me"), 4)] {
            let source = GrammarSource::tool_calls(format, tokenizer, &tools, only).unwrap();
            let grammar = model.grammar(source).unwrap();
            let sampler = SamplerOptions { seed: Some(seed), temperature: 1.5, ..Default::default() };
            let (text, _) = answer(&mut session, &prompt(&model), under(&grammar, sampler));
            let message = ToolParser::new(format, 1).message(&text);
            assert!(message.content.is_empty() || only.is_none(), "{format:?}: {text}");
            assert!(!message.tool_calls.is_empty(), "{format:?}: {text}");
            for call in &message.tool_calls {
                assert!(only.is_none_or(|name| name == call.function.name), "{format:?}: {text}");
                let arguments: serde_json::Value =
                    serde_json::from_str(call.function.arguments.as_str().unwrap()).unwrap();
                match call.function.name.as_str() {
                    "weather" => assert!(["Köln", "Åbo"].contains(&arguments["city"].as_str().unwrap()), "{text}"),
                    "ti\"me" => assert_eq!(arguments, serde_json::json!({})),
                    other => panic!("{other}: {text}"),
                }
            }
        }
        let error = GrammarSource::tool_calls(format, tokenizer, &tools, Some("tide")).unwrap_err();
        assert!(error.to_string().contains("tide") && error.to_string().contains("weather"), "{error}");
    }
}
