//! Chat templates, which are programs of whoever made the file. The source ends at the first NUL; the rest is said, turn
//! by turn up to each NUL.

use std::sync::OnceLock;

use kinglet_engine::text::{ChatTemplate, Message, RenderOptions, Tokenizer};
use serde_json::json;

use crate::input::Input;
use crate::seeds;

/// Turns of one conversation.
const TURNS: usize = 6;

/// The tokenizer whose control tokens templates get to know.
fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let file = crate::gguf::open(&seeds::chatting()).expect("the seed is sound");
        Tokenizer::from_gguf(&file).expect("the seed has a tokenizer")
    })
}

/// See the crate's text.
pub fn template(data: &[u8]) {
    let mut input = Input(data);
    let source = String::from_utf8_lossy(input.until(0));
    let Ok(template) = ChatTemplate::new(&source, tokenizer()) else { return };
    let roles = ["system", "user", "assistant", "user", "assistant", "tool"];
    let mut messages = vec![];
    for role in roles.into_iter().take(TURNS) {
        messages.push(Message::new(role, String::from_utf8_lossy(input.until(0))));
        if input.is_empty() {
            break;
        }
    }
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    let options = RenderOptions { tools: Some(&tools), add_generation_prompt: true, ..RenderOptions::default() };
    let _ = template.render_with(&messages, &options);
    if let Ok(segments) = template.render_masked(&messages, None) {
        let whole: String = segments.iter().map(|s| s.text.as_str()).collect();
        // A template may tell the time, and so render otherwise the second time.
        if !source.contains("now") {
            assert_eq!(Ok(whole), template.render(&messages, None, false).map_err(|e| e.to_string()));
        }
        assert!(segments.windows(2).all(|two| two[0].trained != two[1].trained));
    }
}
