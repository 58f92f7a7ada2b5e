//! Answers that are held to a form, and calls of tools.

use std::ffi::CStr;
use std::ptr::null_mut;

use kinglet::*;
use serde_json::{Value, json};

use crate::hard::{chunks_of, generate, open, pull, session};
use crate::support::{Scratch, error, message};

fn message_of(generation: *mut kinglet_generation) -> Value {
    let (mut text, mut err) = (null_mut(), error());
    // SAFETY: all pointers are ours.
    unsafe {
        let status = kinglet_generation_message_json(generation, &mut text, &mut err);
        assert_eq!(status, KINGLET_OK, "{}", message(&err));
        let json = serde_json::from_str(CStr::from_ptr(text).to_str().expect("UTF-8")).expect("JSON");
        kinglet_string_free(text);
        json
    }
}

/// The whole text of an answer, its message and its end.
fn told(session: *mut kinglet_session, request: &Value) -> (String, Value, i32) {
    let generation = generate(session, &request.to_string()).expect("a generation");
    let answer = pull(generation);
    let message = message_of(generation);
    // SAFETY: it is ours.
    unsafe { kinglet_generation_free(generation) };
    (answer.pieces.concat(), message, answer.end)
}

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "weather", "description": "What it is like outside.", "parameters": {
            "type": "object", "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["days"], "additionalProperties": false}}},
        {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "additionalProperties": false}}},
    ])
}

#[test]
fn what_is_asked_for_is_what_comes() {
    let scratch = Scratch::new("structured");
    let model = open(&scratch.model());
    let s = session(model, None);
    let hot = json!({"temperature": 1.5, "top_k": 0});
    let schema = json!({"type": "array", "items": {"enum": ["a", 1, null]}, "minItems": 2, "maxItems": 3});
    for _ in 0..5 {
        let format = json!({"type": "json_schema", "json_schema": {"name": "list", "strict": true, "schema": schema}});
        let (text, message, end) = told(s, &json!({"prompt": "a", "sampling": hot, "response_format": format}));
        let list: Vec<Value> = serde_json::from_str(&text).expect("a list");
        assert!((2..=3).contains(&list.len()), "{text}");
        assert!(list.iter().all(|item| [json!("a"), json!(1), json!(null)].contains(item)), "{text}");
        assert_eq!((message, end), (json!({"role": "assistant", "content": text}), KINGLET_END_OF_TEXT));

        let grammar = "start: \"yes\" | \"no\" \"!\"?";
        let (text, _, end) = told(s, &json!({"prompt": "a", "sampling": hot, "grammar": grammar}));
        assert!(["yes", "no", "no!"].contains(&text.as_str()), "{text}");
        assert_eq!(end, KINGLET_END_OF_TEXT);
    }
    // SAFETY: they are ours.
    unsafe {
        kinglet_session_free(s);
        kinglet_model_free(model);
    }
}

#[test]
fn calls_of_tools_are_told_from_text() {
    let scratch = Scratch::new("tools");
    let model = open(&scratch.model());
    // A conversation with tools is longer than the tiny model's window.
    let s = session(model, Some(kinglet_session_options { context_tokens: 2_048, ..chunks_of(0).expect("options") }));
    let mut messages = vec![json!({"role": "user", "content": "What is it like?"})];
    let request = |messages: &[Value], choice: Value| json!({"messages": messages, "tools": tools(), "tool_choice": choice, "max_tokens": 300, "sampling": {"seed": 3}});
    let only = |name: &str| json!({"type": "function", "function": {"name": name}});
    for (number, name) in [(1, "weather"), (2, "time")] {
        let (text, message, end) = told(s, &request(&messages, only(name)));
        assert_eq!((end, &message["content"]), (KINGLET_END_OF_TEXT, &Value::Null), "{text}");
        assert!(text.starts_with("<tool_call>\n") && text.ends_with("\n</tool_call>"), "{text}");
        let calls = message["tool_calls"].as_array().expect("calls");
        assert_eq!(calls.len(), 1, "{message}");
        assert_eq!((&calls[0]["id"], &calls[0]["type"]), (&json!(format!("call{number:05}")), &json!("function")));
        assert_eq!(calls[0]["function"]["name"], name);
        let arguments: Value =
            serde_json::from_str(calls[0]["function"]["arguments"].as_str().expect("a string")).expect("JSON");
        match name {
            "weather" => assert!((1..=9).contains(&arguments["days"].as_i64().expect("a number")), "{arguments}"),
            _ => assert_eq!(arguments, json!({})),
        }
        // What came goes back, with the tool's answer.
        let id = calls[0]["id"].clone();
        messages.push(message);
        messages.push(json!({"role": "tool", "tool_call_id": id, "content": "rain"}));
    }
    // Whoever leaves the choice to the model gets what it says; this one knows nothing of tools.
    let (text, message, _) = told(s, &request(&messages, json!("auto")));
    assert_eq!(message, json!({"role": "assistant", "content": text}));
    // SAFETY: they are ours.
    unsafe {
        kinglet_session_free(s);
        kinglet_model_free(model);
    }
}

#[test]
fn forms_that_cannot_be_held_are_refused_by_name() {
    let scratch = Scratch::new("forms");
    let model = open(&scratch.model());
    let s = session(model, None);
    let schema = |schema: Value| json!({"type": "json_schema", "json_schema": {"schema": schema}});
    let said = json!([{"role": "user", "content": "a"}]);
    for (request, word) in [
        (json!({"prompt": "a", "response_format": {"type": "xml"}}), "xml"),
        (json!({"prompt": "a", "response_format": {"type": "json_schema"}}), "json_schema"),
        (json!({"prompt": "a", "response_format": schema(json!({"type": "strnig"}))}), "strnig"),
        (json!({"prompt": "a", "response_format": schema(json!({"uniqueItems": true}))}), "uniqueItems"),
        (json!({"prompt": "a", "grammar": "start: more"}), "more"),
        (json!({"prompt": "a", "grammar": 3}), "3"),
        (json!({"prompt": "a", "grammar": "start: \"a\"", "ignore_end": true}), "ignore_end"),
        (
            json!({"prompt": "a", "grammar": "start: \"a\"", "response_format": {"type": "json_object"}}),
            "response_format",
        ),
        (json!({"messages": said, "tool_choice": "required"}), "no tools"),
        (json!({"messages": said, "tools": [{"name": "f"}], "tool_choice": "required"}), "tools[0]"),
        (json!({"messages": said, "tools": tools(), "tool_choice": {"function": {"name": "tide"}}}), "tide"),
        (json!({"messages": said, "tools": tools(), "tool_choice": "perhaps"}), "tool_choice"),
    ] {
        // The end of a grammar that is to be ignored comes up when the answer begins.
        let text = match generate(s, &request.to_string()) {
            Err((status, text)) => {
                assert_eq!(status, KINGLET_ERR_ARG, "{request}: {text}");
                text
            }
            Ok(generation) => {
                let mut err = error();
                // SAFETY: it is ours; the event is not touched by a call that fails.
                unsafe {
                    let mut event = crate::hard::event();
                    let status = kinglet_generation_next(generation, &mut event, &mut err);
                    assert_eq!(status, KINGLET_ERR_ARG, "{request}: {}", message(&err));
                    kinglet_generation_free(generation);
                }
                message(&err)
            }
        };
        assert!(text.contains(word), "{request}: {text:?} lacks {word:?}");
    }
    let (mut text, mut err) = (null_mut(), error());
    // SAFETY: NULL is what is tried.
    unsafe {
        assert_eq!(kinglet_generation_message_json(null_mut(), &mut text, &mut err), KINGLET_ERR_ARG);
        assert!(text.is_null() && message(&err).contains("generation"), "{}", message(&err));
        let generation = generate(s, r#"{"prompt": "a"}"#).expect("a generation");
        assert_eq!(kinglet_generation_message_json(generation, null_mut(), &mut err), KINGLET_ERR_ARG);
        assert_eq!(message_of(generation), json!({"role": "assistant", "content": ""}));
        kinglet_generation_free(generation);
        kinglet_session_free(s);
        kinglet_model_free(model);
    }
}
