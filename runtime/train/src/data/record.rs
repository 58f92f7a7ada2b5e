//! Records: the lines of a `.jsonl` file, the elements of a `.json` list, or a `.txt` file as a whole.
//!
//! What a record is follows from its keys, the first that fit:
//!
//! | keys | what it is |
//! | --- | --- |
//! | `messages` (with `tools`), or `conversations` | a conversation, of `role`/`content` or of `from`/`value` |
//! | `chosen`, `rejected` (with `prompt`) | two answers to one prompt; texts or messages |
//! | `prompt`, `completion`, `label` | an answer judged good (`true`) or bad |
//! | `prompt`, `completion` | an instruction |
//! | `instruction`, `output` (with `input`) | an instruction |
//! | `question`, `answer` | an instruction |
//! | `text` | plain text |
//!
//! Instructions are conversations of two messages, with a third, `system`, where there is such a key. Further keys are
//! ignored. Each record may be of a kind of its own.

use std::path::Path;
use std::sync::Arc;

use kinglet_engine::text::Message;
use serde_json::{Map, Value};

use crate::{Error, Result};

const KINDS: &str = "messages; prompt, chosen, rejected; prompt, completion, label; prompt, completion; instruction, \
                     input, output; question, answer; or text";

/// One record of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The file, for messages.
    pub file: Arc<str>,
    /// Its line, or the number of the element, from 1.
    pub line: usize,
    /// What it holds.
    pub sample: Sample,
    /// What stands between a prompt and its answer for a model without a chat template.
    pub separator: &'static str,
}

/// What a record holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Sample {
    /// A conversation, in which the assistant's messages are learned.
    Chat {
        /// Its messages.
        messages: Vec<Message>,
        /// The tools on offer in it.
        tools: Option<Value>,
    },
    /// Text, learned as a whole.
    Text(String),
    /// Two answers to one prompt.
    Pair {
        /// The conversation so far.
        prompt: Vec<Message>,
        /// The better answer.
        chosen: Vec<Message>,
        /// The worse one.
        rejected: Vec<Message>,
    },
    /// A judged answer.
    Rated {
        /// The conversation so far.
        prompt: Vec<Message>,
        /// The answer.
        completion: Vec<Message>,
        /// Whether it is good.
        good: bool,
    },
}

impl Record {
    /// An error that names the file, the line and the key.
    pub(super) fn error(&self, key: &str, what: &str) -> Error {
        Place { file: &self.file, line: self.line }.error(key, what)
    }
}

/// Where a value stands, for messages.
#[derive(Clone, Copy)]
struct Place<'a> {
    file: &'a Arc<str>,
    line: usize,
}

impl Place<'_> {
    fn error(&self, key: &str, what: &str) -> Error {
        Error::Format { file: format!("{}:{}", self.file, self.line), at: key.into(), what: what.into() }
    }
}

/// Reads the records of `path`; its ending says what it is (`.txt`, `.md`: text; `.json`: a list; else JSON lines).
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] as [`parse`].
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    parse(&path.display().to_string(), &bytes)
}

/// The records in `bytes`; `file` is the file's name, for its ending and for messages.
///
/// # Errors
/// [`Error::Format`] for what is not UTF-8, not JSON, or has none of the sets of keys; it names the file and the line.
pub fn parse(file: &str, bytes: &[u8]) -> Result<Vec<Record>> {
    let name: Arc<str> = file.into();
    let text = str::from_utf8(bytes).map_err(|error| {
        let line = 1 + bytes[..error.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count();
        Place { file: &name, line }.error("text", "not UTF-8; convert the file to UTF-8")
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let ending = Path::new(file).extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    match ending.to_ascii_lowercase().as_str() {
        "txt" | "md" => {
            let sample = Sample::Text(text.into());
            Ok(vec![Record { file: name, line: 1, sample, separator: "" }])
        }
        "json" if text.trim_start().starts_with('[') => {
            let values: Vec<Value> = serde_json::from_str(text).map_err(|error| {
                Place { file: &name, line: error.line() }.error("list", &format!("not a JSON list: {error}"))
            })?;
            let record = |(index, value)| record(Place { file: &name, line: index + 1 }, value);
            values.into_iter().enumerate().map(record).collect()
        }
        _ => {
            let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            let record = |(index, line): (usize, &str)| {
                let place = Place { file: &name, line: index + 1 };
                let value = serde_json::from_str(line).map_err(|error| {
                    place.error(
                        "line",
                        &format!("not a JSON object ({error}); each line must be one, with keys {KINDS}"),
                    )
                })?;
                record(place, value)
            };
            lines.map(record).collect()
        }
    }
}

/// The record that a JSON value is.
fn record(place: Place<'_>, value: Value) -> Result<Record> {
    let Value::Object(keys) = value else {
        return Err(place.error("record", &format!("not a JSON object with keys {KINDS}")));
    };
    let fields = Fields { place, keys };
    let mut separator = "\n";
    let sample = if fields.has("messages") {
        Sample::Chat { messages: fields.messages("messages", "user")?, tools: fields.keys.get("tools").cloned() }
    } else if fields.has("conversations") {
        Sample::Chat { messages: fields.messages("conversations", "user")?, tools: None }
    } else if fields.has("chosen") && fields.has("rejected") {
        separator = "";
        fields.pair()?
    } else if fields.has("prompt") && fields.has("completion") {
        separator = "";
        let (prompt, completion) = (fields.messages("prompt", "user")?, fields.messages("completion", "assistant")?);
        match fields.keys.get("label") {
            None | Some(Value::Null) => {
                Sample::Chat { messages: [fields.system()?, prompt, completion].concat(), tools: None }
            }
            Some(label) => {
                let good = label.as_bool().or(label.as_u64().filter(|n| *n < 2).map(|n| n == 1));
                let good = good.ok_or_else(|| place.error("label", "must be true (good) or false (bad)"))?;
                Sample::Rated { prompt: [fields.system()?, prompt].concat(), completion, good }
            }
        }
    } else if fields.has("instruction") && fields.has("output") {
        let mut prompt = fields.text("instruction")?;
        if fields.has("input") {
            let input = fields.text("input")?;
            if !input.is_empty() {
                prompt = format!("{prompt}\n{input}");
            }
        }
        fields.instruction(prompt, fields.text("output")?)?
    } else if fields.has("question") && fields.has("answer") {
        fields.instruction(fields.text("question")?, fields.text("answer")?)?
    } else if fields.has("text") {
        Sample::Text(fields.text("text")?)
    } else {
        let found: Vec<&str> = fields.keys.keys().map(String::as_str).take(12).collect();
        return Err(place.error("keys", &format!("found {:?}, but a record needs {KINDS}", found.join(", "))));
    };
    Ok(Record { file: place.file.clone(), line: place.line, sample, separator })
}

/// The keys of a record.
struct Fields<'a> {
    place: Place<'a>,
    keys: Map<String, Value>,
}

impl Fields<'_> {
    fn has(&self, key: &str) -> bool {
        self.keys.get(key).is_some_and(|value| !value.is_null())
    }

    fn text(&self, key: &str) -> Result<String> {
        match self.keys.get(key) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(Value::Number(number)) => Ok(number.to_string()),
            _ => Err(self.place.error(key, "must be a text")),
        }
    }

    fn system(&self) -> Result<Vec<Message>> {
        if !self.has("system") {
            return Ok(Vec::new());
        }
        let text = self.text("system")?;
        Ok(if text.is_empty() { Vec::new() } else { vec![Message::new("system", text)] })
    }

    fn instruction(&self, prompt: String, answer: String) -> Result<Sample> {
        let mut messages = self.system()?;
        messages.extend([Message::new("user", prompt), Message::new("assistant", answer)]);
        Ok(Sample::Chat { messages, tools: None })
    }

    /// The messages under `key`; a text is one message by `role`.
    fn messages(&self, key: &str, role: &str) -> Result<Vec<Message>> {
        let list = match self.keys.get(key) {
            Some(Value::String(text)) => return Ok(vec![Message::new(role, text.as_str())]),
            Some(Value::Array(list)) if !list.is_empty() => list,
            _ => return Err(self.place.error(key, "must be a text or a list of messages that is not empty")),
        };
        let message = |(index, value): (usize, &Value)| {
            if let (Some(from), Some(text)) = (value.get("from"), value.get("value").and_then(Value::as_str)) {
                let role = match from.as_str().unwrap_or_default() {
                    "human" => "user",
                    "gpt" | "model" => "assistant",
                    other => other,
                };
                return Ok(Message::new(role, text));
            }
            serde_json::from_value(value.clone()).map_err(|error| {
                let at = format!("{key}[{index}]");
                self.place.error(&at, &format!("{error}; a message has a role and a content"))
            })
        };
        list.iter().enumerate().map(message).collect()
    }

    /// Chosen and rejected answers; without a `prompt` they are whole conversations that begin alike.
    fn pair(&self) -> Result<Sample> {
        let (mut chosen, mut rejected) =
            (self.messages("chosen", "assistant")?, self.messages("rejected", "assistant")?);
        let mut prompt = if self.has("prompt") { self.messages("prompt", "user")? } else { Vec::new() };
        // Many files repeat the prompt in both answers, with or without a `prompt`.
        let alike = std::iter::zip(&chosen, &rejected).take_while(|(a, b)| a == b).count();
        let alike = alike.min(chosen.len().min(rejected.len()).saturating_sub(1));
        let shared: Vec<Message> = chosen.drain(..alike).collect();
        rejected.drain(..alike);
        if prompt.is_empty() {
            prompt = shared;
        } else if !shared.is_empty() && shared != prompt {
            prompt.extend(shared);
        }
        if prompt.is_empty() {
            return Err(self
                .place
                .error("prompt", "missing, and chosen and rejected do not begin with the same messages"));
        }
        Ok(Sample::Pair { prompt: [self.system()?, prompt].concat(), chosen, rejected })
    }
}
