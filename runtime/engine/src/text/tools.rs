//! Calls of tools in what a model says: told apart from text while the answer is still coming.
//!
//! Families write calls in their own ways, which are part of what they were trained on; the chat template shows which one.
//! A [`ToolParser`] takes the answer's text piece by piece and gives text and calls. Text that may be the beginning of a
//! call is held back; what began like a call and is none comes out as the text it is, so nothing is lost. White space
//! before a call goes with it.

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::stream::overlap;
use super::{FunctionCall, Message, Tokenizer, ToolCall};
use crate::{Error, Result};

/// How a model writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one after the other: Hermes 2 Pro, Qwen 2.5 and 3.
    Tagged,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`: Mistral.
    List,
    /// `[TOOL_CALLS]name[ARGS]{…}`, one after the other: Mistral since 2025.
    Named,
    /// The answer is `{"name": …, "parameters": {…}}`, perhaps behind `<|python_tag|>`: Llama 3.1 and later.
    Bare,
}

pub(crate) const OPEN_TAG: &str = "<tool_call>";
pub(crate) const CLOSE_TAG: &str = "</tool_call>";
pub(crate) const LIST_MARK: &str = "[TOOL_CALLS]";
pub(crate) const ARGUMENTS_MARK: &str = "[ARGS]";
const PYTHON_TAG: &str = "<|python_tag|>";

/// The longest name before arguments, in bytes.
const LONGEST_NAME: usize = 256;

impl ToolFormat {
    /// The format that a chat template's source shows; `None` where it shows none that is known.
    pub fn of_template(source: &str) -> Option<ToolFormat> {
        let has = |text: &str| source.contains(text);
        match () {
            () if has(LIST_MARK) && has(ARGUMENTS_MARK) => Some(ToolFormat::Named),
            () if has(LIST_MARK) => Some(ToolFormat::List),
            // With `<function=…>` inside, calls are no JSON.
            () if has(OPEN_TAG) && !has("<function=") => Some(ToolFormat::Tagged),
            () if has("\"parameters\"") && (has(PYTHON_TAG) || has("<|start_header_id|>")) => Some(ToolFormat::Bare),
            () => None,
        }
    }

    /// The marks of calls that are control tokens here: their text has to be part of the answer's, or calls are not seen.
    /// [`GenerateOptions::shown`](crate::session::GenerateOptions::shown) takes them.
    pub fn marks(tokenizer: &Tokenizer) -> Vec<u32> {
        let marks = [OPEN_TAG, CLOSE_TAG, LIST_MARK, ARGUMENTS_MARK, PYTHON_TAG];
        marks.iter().filter_map(|mark| tokenizer.token_id(mark)).filter(|id| tokenizer.is_control(*id)).collect()
    }

    fn mark(self) -> &'static str {
        match self {
            ToolFormat::Tagged => OPEN_TAG,
            ToolFormat::List | ToolFormat::Named => LIST_MARK,
            ToolFormat::Bare => PYTHON_TAG,
        }
    }
}

/// A tool on offer.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// The JSON schema of its arguments.
    pub parameters: Value,
}

impl Tool {
    /// The tools of a list in the OpenAI API's shape: `[{"type": "function", "function": {"name": …, "parameters": {…}}}]`.
    ///
    /// # Errors
    /// [`Error::Argument`] names the tool that is out of shape.
    pub fn list(tools: &Value) -> Result<Vec<Tool>> {
        let Some(tools) = tools.as_array() else { return Err(Error::argument("tools must be an array")) };
        let tool = |(i, tool): (usize, &Value)| {
            let function = &tool["function"];
            let Some(name) = function["name"].as_str().filter(|name| !name.is_empty()) else {
                let shape = r#"{"type": "function", "function": {"name": ..., "parameters": {...}}}"#;
                return Err(Error::argument(format!("tools[{i}] has no function.name; a tool is {shape}")));
            };
            let parameters = match &function["parameters"] {
                Value::Null => serde_json::json!({"type": "object"}),
                schema => schema.clone(),
            };
            Ok(Tool { name: name.into(), parameters })
        };
        tools.iter().enumerate().map(tool).collect()
    }
}

/// What comes out of a [`ToolParser`].
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    /// Text for people.
    Text(String),
    /// A whole call; its arguments are a string: the JSON that the model wrote.
    Call(ToolCall),
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct ToolParser {
    format: ToolFormat,
    /// Text that is not given out yet. A call that is being read stands at its start, with its mark.
    held: String,
    reading: Option<Reading>,
    /// The number of the next call.
    next: usize,
    /// Whether text or calls came out before.
    spoke: bool,
    called: bool,
}

/// How far the call at the start of the held text was read.
#[derive(Clone, Debug, Default)]
struct Reading {
    /// Where reading goes on: at first behind the mark.
    at: usize,
    /// What stood before the JSON, where names do.
    name: Option<String>,
    /// Where the JSON begins and ends, as soon as that is known.
    begin: Option<usize>,
    end: Option<usize>,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

/// What stands at the start of the held text.
enum Found {
    /// More text will tell.
    Undecided,
    /// Calls, in so many bytes.
    Calls(Vec<FunctionCall>, usize),
    /// So many bytes of text.
    Text(usize),
}

impl ToolParser {
    /// A parser of one answer. Calls are numbered from `first` on, and that makes their ids: `call00001`, nine letters and
    /// digits, as Mistral's templates want them. An id should come once in a conversation.
    pub fn new(format: ToolFormat, first: usize) -> ToolParser {
        ToolParser { format, held: String::new(), reading: None, next: first, spoke: false, called: false }
    }

    /// Takes the next text of the answer and gives what is decided by it.
    pub fn push(&mut self, text: &str) -> Vec<Said> {
        self.held.push_str(text);
        self.read(false)
    }

    /// Ends the answer: what was held back comes out.
    pub fn finish(&mut self) -> Vec<Said> {
        let mut said = self.read(true);
        // White space behind the last call is part of how calls are written.
        if !self.called || !self.held.trim().is_empty() {
            let rest = self.held.len();
            self.give(rest, &mut said);
        }
        self.held.clear();
        said
    }

    /// The message of an answer that is whole.
    pub fn message(mut self, answer: &str) -> Message {
        let mut said = self.push(answer);
        said.extend(self.finish());
        let mut message = Message::new("assistant", "");
        for said in said {
            match said {
                Said::Text(text) => message.content.push_str(&text),
                Said::Call(call) => message.tool_calls.push(call),
            }
        }
        message
    }

    fn read(&mut self, last: bool) -> Vec<Said> {
        let mut said = Vec::new();
        loop {
            let Some(reading) = &mut self.reading else {
                let Some((at, behind)) = self.call() else {
                    let free = if last { self.held.trim_end().len() } else { self.free() };
                    self.give(free, &mut said);
                    return said;
                };
                // White space before a call goes with it, if it is one.
                let free = self.held[..at].trim_end().len();
                self.give(free, &mut said);
                self.reading = Some(Reading { at: behind - free, ..Reading::default() });
                continue;
            };
            match reading.go_on(self.format, &self.held, last) {
                Found::Undecided if !last => return said,
                Found::Undecided => self.give(self.held.len(), &mut said),
                Found::Text(length) => self.give(length, &mut said),
                Found::Calls(calls, length) => {
                    self.held.drain(..length);
                    for function in calls {
                        let id = Some(format!("call{:05}", self.next));
                        self.next += 1;
                        self.called = true;
                        said.push(Said::Call(ToolCall { id, kind: "function".into(), function }));
                    }
                }
            }
            self.reading = None;
        }
    }

    /// Where the next call begins in the held text, and where its mark ends.
    fn call(&self) -> Option<(usize, usize)> {
        let rest = self.held.trim_start_matches(|c| self.is_between(c));
        if self.format == ToolFormat::Bare && !self.spoke && rest.starts_with('{') {
            return Some((0, self.held.len() - rest.len()));
        }
        let mark = self.format.mark();
        self.held.find(mark).map(|at| (at, at + mark.len()))
    }

    /// Bytes of the held text, in which no call begins, that are text whatever comes next.
    fn free(&self) -> usize {
        if self.format == ToolFormat::Bare && !self.spoke && self.held.chars().all(|c| self.is_between(c)) {
            return 0;
        }
        self.held[..self.held.len() - overlap(&self.held, self.format.mark())].trim_end().len()
    }

    /// Whether `c` may stand between bare calls: some models put a semicolon there.
    fn is_between(&self, c: char) -> bool {
        c.is_whitespace() || (self.called && c == ';')
    }

    /// Gives the first `length` bytes of the held text.
    fn give(&mut self, length: usize, said: &mut Vec<Said>) {
        if length > 0 {
            self.spoke = true;
            let text: String = self.held.drain(..length).collect();
            match said.last_mut() {
                Some(Said::Text(before)) => before.push_str(&text),
                _ => said.push(Said::Text(text)),
            }
        }
    }
}

impl Reading {
    /// Reads what of `held` was not read before.
    fn go_on(&mut self, format: ToolFormat, held: &str, last: bool) -> Found {
        if self.begin.is_none() {
            let rest = held[self.at..].trim_start();
            let start = held.len() - rest.len();
            let json = match format {
                ToolFormat::Tagged | ToolFormat::Bare => rest.starts_with('{').then_some(0),
                ToolFormat::List if rest.starts_with(['[', '{']) => Some(0),
                // A name comes first.
                ToolFormat::List | ToolFormat::Named => rest.find('{').filter(|at| *at < LONGEST_NAME),
            };
            match json {
                Some(at) => {
                    let name = rest[..at].trim_end().trim_end_matches(ARGUMENTS_MARK).trim_end();
                    self.name = (!name.is_empty()).then(|| name.into());
                    (self.begin, self.at) = (Some(start + at), start + at);
                }
                None if rest.is_empty() => return Found::Undecided,
                None if matches!(format, ToolFormat::List | ToolFormat::Named) && rest.len() < LONGEST_NAME => {
                    return Found::Undecided;
                }
                None => return Found::Text(self.at),
            }
        }
        while self.end.is_none() {
            let Some(byte) = held.as_bytes().get(self.at) else { return Found::Undecided };
            self.at += 1;
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                b'{' | b'[' if !self.in_string => self.depth += 1,
                b'}' | b']' if !self.in_string => {
                    self.depth = self.depth.saturating_sub(1);
                    self.end = (self.depth == 0).then_some(self.at);
                }
                _ => {}
            }
        }
        let (Some(begin), Some(end)) = (self.begin, self.end) else { return Found::Undecided };
        let mut length = end;
        if format == ToolFormat::Tagged {
            let rest = held[end..].trim_start();
            match rest.strip_prefix(CLOSE_TAG) {
                Some(after) => length = held.len() - after.len(),
                None if !last && CLOSE_TAG.starts_with(rest) => return Found::Undecided,
                // Some models forget it.
                None => {}
            }
        }
        match calls(&held[begin..end], self.name.as_deref()) {
            Some(calls) => Found::Calls(calls, length),
            None => Found::Text(length),
        }
    }
}

/// A call as models write it.
#[derive(Deserialize)]
struct Written<'a> {
    name: String,
    #[serde(borrow, default, alias = "parameters")]
    arguments: Option<&'a RawValue>,
}

/// The calls in `json`: one, several, or, where a name stood before it, the arguments of one.
fn calls(json: &str, name: Option<&str>) -> Option<Vec<FunctionCall>> {
    let call = |name: String, arguments: Option<&RawValue>| {
        let text = arguments.map_or("{}", |raw| if raw.get() == "null" { "{}" } else { raw.get() });
        // Some models put the object into a string, as the API has it.
        let inner = serde_json::from_str::<String>(text).ok().filter(|inner| inner.trim_start().starts_with('{'));
        FunctionCall { name, arguments: Value::String(inner.unwrap_or_else(|| text.into())) }
    };
    if let Some(name) = name {
        return Some(vec![call(name.into(), Some(serde_json::from_str(json).ok()?))]);
    }
    let written: Vec<Written<'_>> = match json.starts_with('[') {
        true => serde_json::from_str(json).ok()?,
        false => vec![serde_json::from_str(json).ok()?],
    };
    Some(written.into_iter().map(|written| call(written.name, written.arguments)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text for people and the calls (id, name, arguments) of an answer, the same however it is cut.
    fn parsed(format: ToolFormat, answer: &str) -> (String, Vec<(String, String, String)>) {
        let read = |size: usize| {
            let mut parser = ToolParser::new(format, 1);
            let chars: Vec<char> = answer.chars().collect();
            let pieces = chars.chunks(size).map(|piece| piece.iter().collect::<String>());
            let mut said: Vec<Said> = pieces.flat_map(|piece| parser.push(&piece)).collect();
            said.extend(parser.finish());
            let (mut text, mut calls) = (String::new(), Vec::new());
            for said in said {
                match said {
                    Said::Text(piece) => text.push_str(&piece),
                    Said::Call(call) => {
                        let arguments = call.function.arguments.as_str().unwrap().to_string();
                        calls.push((call.id.unwrap(), call.function.name, arguments));
                    }
                }
            }
            (text, calls)
        };
        let whole = read(usize::MAX);
        for size in [1, 2, 3, 7] {
            assert_eq!(read(size), whole, "{answer:?} by {size}");
        }
        whole
    }

    fn call(number: usize, name: &str, arguments: &str) -> (String, String, String) {
        (format!("call{number:05}"), name.into(), arguments.into())
    }

    #[test]
    fn calls_between_tags() {
        let weather = r#"{"city": "Köln \"}</tool_call>", "big": 12345678901234567890123, "x": [1, {}]}"#;
        let answer = format!(
            "Let me see.\n\n<tool_call>\n{{\"name\": \"weather\", \"arguments\": {weather}}}\n</tool_call>\n<tool_call>\
             {{\"arguments\": {{}}, \"name\": \"time\"}}</tool_call>\n"
        );
        let (text, calls) = parsed(ToolFormat::Tagged, &answer);
        assert_eq!(text, "Let me see.");
        assert_eq!(calls, [call(1, "weather", weather), call(2, "time", "{}")]);
        // The end of the answer stands for the tag.
        let (text, calls) = parsed(ToolFormat::Tagged, "<tool_call>\n{\"name\": \"f\", \"arguments\": null}");
        assert_eq!((text.as_str(), calls), ("", vec![call(1, "f", "{}")]));
        let inside = r#"<tool_call>{"name": "f", "arguments": "{\"a\": 1}"}</tool_call> Done."#;
        assert_eq!(parsed(ToolFormat::Tagged, inside), (" Done.".into(), vec![call(1, "f", r#"{"a": 1}"#)]));
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for text in [
            "a < b, <tool_ca",
            "<tool_call>",
            "<tool_call>\n{\"name\": \"f\", \"argu",
            "<tool_call>f(x)</tool_call>",
            "<tool_call>{\"nom\": 1}</tool_call> and more",
            "<tool_call>{\"name\": \"f\", \"arguments\": {]}</tool_call>",
            "  spaces  and\n\nlines \n",
            "space before \n<tool_call>nothing",
            "",
        ] {
            assert_eq!(parsed(ToolFormat::Tagged, text), (text.into(), vec![]), "{text:?}");
        }
        assert_eq!(parsed(ToolFormat::Bare, "\n{\"a\": 1} is JSON"), ("\n{\"a\": 1} is JSON".into(), vec![]));
        let said = "As said: {\"name\": \"f\", \"parameters\": {}}";
        assert_eq!(parsed(ToolFormat::Bare, said), (said.into(), vec![]));
        assert_eq!(parsed(ToolFormat::List, "[TOOL_CALLS] none"), ("[TOOL_CALLS] none".into(), vec![]));
    }

    #[test]
    fn lists_names_and_bare_objects() {
        let two = r#"[TOOL_CALLS] [{"name": "f", "arguments": {"a": "]"}}, {"name": "g", "arguments": {}}]"#;
        let calls = vec![call(1, "f", r#"{"a": "]"}"#), call(2, "g", "{}")];
        assert_eq!(parsed(ToolFormat::List, two), (String::new(), calls));
        let two = "Well.[TOOL_CALLS]f[ARGS]{\"a\": 1}[TOOL_CALLS]g[ARGS]{}";
        assert_eq!(
            parsed(ToolFormat::Named, two),
            ("Well.".into(), vec![call(1, "f", "{\"a\": 1}"), call(2, "g", "{}")])
        );
        let bare = "\n{\"name\": \"f\", \"parameters\": {\"a\": 1}}";
        assert_eq!(parsed(ToolFormat::Bare, bare), (String::new(), vec![call(1, "f", "{\"a\": 1}")]));
        let two = "<|python_tag|>{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\", \"parameters\": {}}";
        assert_eq!(parsed(ToolFormat::Bare, two), (String::new(), vec![call(1, "f", "{}"), call(2, "g", "{}")]));
        let code = "<|python_tag|>print(1)";
        assert_eq!(parsed(ToolFormat::Bare, code), (code.into(), vec![]));
    }

    #[test]
    fn templates_show_their_format() {
        let of = ToolFormat::of_template;
        assert_eq!(of("{{ '<tool_call>\\n{\"name\": ...}\\n</tool_call>' }}"), Some(ToolFormat::Tagged));
        assert_eq!(of("<tool_call><function=f>"), None);
        assert_eq!(of("{{ '[TOOL_CALLS]' + calls }}"), Some(ToolFormat::List));
        assert_eq!(of("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}"), Some(ToolFormat::Named));
        assert_eq!(of("<|start_header_id|> {\"name\": name, \"parameters\": p}"), Some(ToolFormat::Bare));
        assert_eq!(of("<|im_start|>{{ content }}"), None);
    }

    #[test]
    fn tools_are_read_in_the_shape_of_the_api() {
        let list = |json: &str| Tool::list(&serde_json::from_str(json).unwrap());
        let tools = list(r#"[{"type": "function", "function": {"name": "f"}}]"#).unwrap();
        assert_eq!(tools, [Tool { name: "f".into(), parameters: serde_json::json!({"type": "object"}) }]);
        assert!(list("{}").unwrap_err().to_string().contains("array"));
        assert!(list(r#"[{"name": "f"}]"#).unwrap_err().to_string().contains("tools[0] has no function.name"));
    }
}
