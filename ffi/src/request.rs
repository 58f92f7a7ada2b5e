//! The JSON of `kinglet_generate`, read strictly: an unknown key is an error that names it.

use kinglet_engine::grammar::GrammarSource;
use kinglet_engine::sampling::{DRY_BREAKERS, SamplerOptions};
use kinglet_engine::session::{GenerateOptions, Model};
use kinglet_engine::text::{EncodeOptions, Message, RenderOptions, Tool, ToolFormat, ToolParser};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::fence::{Failure, KINGLET_ERR_UNSUPPORTED, Outcome};

/// The keys of a message that chat templates get.
const MESSAGE_KEYS: [&str; 6] = ["role", "content", "tool_calls", "name", "tool_call_id", "reasoning_content"];

/// The whole request; each field is a key of the same name.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    /// The conversation, in the shape of the OpenAI API.
    messages: Option<Vec<Value>>,
    /// In place of messages: text to continue.
    prompt: Option<String>,
    /// Tools on offer: JSON schemas in the shape of the OpenAI API.
    tools: Option<Value>,
    /// Whether one of them is called.
    tool_choice: Option<Value>,
    /// What the answer is to be: text, JSON, JSON by a schema.
    response_format: Option<Format>,
    /// In place of that: a grammar.
    grammar: Option<String>,
    /// Further variables of the chat template, such as `enable_thinking`.
    template: Option<Map<String, Value>>,
    /// How tokens are chosen: fields of [`SamplerOptions`], and `dry_breakers` as texts.
    sampling: Option<Map<String, Value>>,
    /// Texts that end the answer.
    #[serde(default)]
    stop: Stop,
    /// Most tokens to generate.
    max_tokens: Option<usize>,
    /// Go on behind tokens that end an answer.
    #[serde(default)]
    ignore_end: bool,
    /// Whether control tokens appear in the text.
    #[serde(default)]
    special: bool,
}

/// One text or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Many(Vec<String>),
}

impl Default for Stop {
    fn default() -> Stop {
        Stop::Many(Vec::new())
    }
}

/// As the OpenAI API has it.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum Format {
    Text,
    JsonObject,
    JsonSchema { json_schema: JsonSchema },
}

/// What of a schema's wrapping counts; name, description and strictness are for people and other programs.
#[derive(Deserialize)]
struct JsonSchema {
    schema: Value,
}

/// Whether a tool is called: a word of the OpenAI API, or the tool by its name.
enum Choice {
    Auto,
    None,
    Required,
    Named(String),
}

impl Choice {
    fn read(value: Option<&Value>) -> Outcome<Choice> {
        let name = |value: &Value| value["function"]["name"].as_str().map(String::from);
        match value {
            None => Ok(Choice::Auto),
            Some(value) => match (value.as_str(), name(value)) {
                (Some("auto"), _) => Ok(Choice::Auto),
                (Some("none"), _) => Ok(Choice::None),
                (Some("required"), _) => Ok(Choice::Required),
                (_, Some(name)) => Ok(Choice::Named(name)),
                _ => Err(Failure::argument(format!(
                    "tool_choice is {value}; it must be \"auto\", \"none\", \"required\" or {{\"type\": \"function\", \
                     \"function\": {{\"name\": ...}}}}"
                ))),
            },
        }
    }
}

/// A request that was read.
pub struct Asked {
    /// The prompt's tokens.
    pub prompt: Vec<u32>,
    pub options: GenerateOptions,
    /// What tells calls of tools from text, where there are tools.
    pub calls: Option<ToolParser>,
}

/// Reads a request for `model`.
///
/// # Errors
/// JSON that is none, unknown keys, values out of range, messages that the model's template rejects or a model without one,
/// grammars that cannot be held.
pub fn read(json: &str, model: &Model) -> Outcome<Asked> {
    let mut request: Request =
        serde_json::from_str(json).map_err(|e| Failure::argument(format!("the request's JSON: {e}")))?;
    let sampler = sampler(request.sampling.take().unwrap_or_default(), model)?;
    let choice = Choice::read(request.tool_choice.as_ref())?;
    if matches!(choice, Choice::None) {
        request.tools = None;
    }
    let format = request.tools.as_ref().and(model.chat_template()?).and_then(|template| template.tool_format());
    let source = source(&request, &choice, format, model)?;
    let called = request.messages.iter().flatten().filter_map(|message| message.get("tool_calls")?.as_array());
    let first = 1 + called.map(Vec::len).sum::<usize>();
    let prompt = match (request.messages, request.prompt) {
        (Some(messages), None) => conversation(&messages, request.tools.as_ref(), request.template.as_ref(), model)?,
        (None, Some(text)) => {
            if request.tools.is_some() || request.template.is_some() {
                return Err(Failure::argument("tools and template go with messages, not with prompt"));
            }
            model.tokenizer().encode(&text, EncodeOptions { add_special: true, parse_special: true })
        }
        _ => return Err(Failure::argument("the request needs either messages or prompt")),
    };
    let stop = match request.stop {
        Stop::One(text) => vec![text],
        Stop::Many(texts) => texts,
    };
    let options = GenerateOptions {
        sampler,
        stop,
        max_tokens: request.max_tokens.unwrap_or(usize::MAX),
        ignore_end: request.ignore_end,
        special: request.special,
        shown: if format.is_some() { ToolFormat::marks(model.tokenizer()) } else { Vec::new() },
        grammar: source.map(|source| model.grammar(source)).transpose()?,
        ..GenerateOptions::default()
    };
    Ok(Asked { prompt, options, calls: format.map(|format| ToolParser::new(format, first)) })
}

/// What the answer is to be.
fn source(
    request: &Request,
    choice: &Choice,
    format: Option<ToolFormat>,
    model: &Model,
) -> Outcome<Option<GrammarSource>> {
    let only = match choice {
        Choice::Named(name) => Some(Some(name.as_str())),
        Choice::Required => Some(None),
        Choice::Auto | Choice::None => None,
    };
    let schema = match &request.response_format {
        None | Some(Format::Text) => None,
        Some(Format::JsonObject) => Some(r#"{"type": "object"}"#.into()),
        Some(Format::JsonSchema { json_schema }) => Some(json_schema.schema.to_string()),
    };
    match (only, schema, &request.grammar) {
        (None, None, None) => Ok(None),
        (None, Some(schema), None) => Ok(Some(GrammarSource::JsonSchema(schema))),
        (None, None, Some(grammar)) => Ok(Some(GrammarSource::Lark(grammar.clone()))),
        (Some(only), None, None) => {
            let Some(tools) = &request.tools else {
                return Err(Failure::argument("tool_choice asks for a call, but there are no tools"));
            };
            let tools = Tool::list(tools)?;
            let Some(format) = format else {
                let what = "the model's chat template shows no way to call tools that is known; leave tool_choice out";
                return Err(Failure::new(KINGLET_ERR_UNSUPPORTED, what));
            };
            Ok(Some(GrammarSource::tool_calls(format, model.tokenizer(), &tools, only)?))
        }
        _ => Err(Failure::argument("of response_format, grammar and a tool_choice that forces a call one can be held")),
    }
}

fn sampler(mut fields: Map<String, Value>, model: &Model) -> Outcome<SamplerOptions> {
    let wrong = |e: serde_json::Error| Failure::argument(format!("sampling: {e}"));
    let breakers = fields.remove("dry_breakers");
    let by_ids = fields.contains_key("dry_sequence_breakers");
    let mut options: SamplerOptions = serde_json::from_value(Value::Object(fields)).map_err(wrong)?;
    if !by_ids {
        let breakers: Vec<String> = match breakers {
            Some(texts) => serde_json::from_value(texts).map_err(wrong)?,
            None => DRY_BREAKERS.map(String::from).into(),
        };
        let tokens = breakers.iter().map(|text| model.tokenizer().encode(text, EncodeOptions::TEXT));
        options.dry_sequence_breakers = tokens.filter(|tokens| !tokens.is_empty()).collect();
    }
    options.validate(model.spec().vocab)?;
    Ok(options)
}

/// The tokens of a conversation up to where the next answer begins.
fn conversation(
    messages: &[Value],
    tools: Option<&Value>,
    variables: Option<&Map<String, Value>>,
    model: &Model,
) -> Outcome<Vec<u32>> {
    let Some(template) = model.chat_template()? else {
        return Err(Failure::new(
            KINGLET_ERR_UNSUPPORTED,
            "this is a base model without a chat template, which continues text; give it a prompt instead of messages",
        ));
    };
    let messages = messages.iter().enumerate().map(|(i, m)| message(i, m)).collect::<Outcome<Vec<Message>>>()?;
    let options = RenderOptions { tools, variables, add_generation_prompt: true, ..RenderOptions::default() };
    // What the template has against the conversation is for the caller to mend.
    let text = template.render_with(&messages, &options).map_err(|e| Failure::argument(e.to_string()))?;
    Ok(model.tokenizer().encode_prompt(&text))
}

/// Message `i`, with nothing in it that would get lost.
fn message(i: usize, value: &Value) -> Outcome<Message> {
    let Some(fields) = value.as_object() else {
        return Err(Failure::argument(format!("messages[{i}] is no object")));
    };
    if let Some(key) = fields.keys().find(|key| !MESSAGE_KEYS.contains(&key.as_str())) {
        return Err(Failure::argument(format!("messages[{i}]: unknown field `{key}`; known are {MESSAGE_KEYS:?}")));
    }
    for part in fields.get("content").and_then(Value::as_array).into_iter().flatten() {
        let kind = part.get("type").and_then(Value::as_str).unwrap_or("text");
        if kind != "text" {
            let what = format!("messages[{i}]: content of type {kind:?}; only text can be read");
            return Err(Failure::new(KINGLET_ERR_UNSUPPORTED, what));
        }
    }
    Message::deserialize(value).map_err(|e| Failure::argument(format!("messages[{i}]: {e}")))
}
