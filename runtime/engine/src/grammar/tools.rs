//! The grammar of calls: what a model writes that has to call one of its tools.

use serde_json::Value;

use super::{GrammarSource, NARROW, with_whitespace};
use crate::text::{ARGUMENTS_MARK, CLOSE_TAG, LIST_MARK, OPEN_TAG, Tokenizer, Tool, ToolFormat};
use crate::{Error, Result};

impl GrammarSource {
    /// One or more calls of `tools` as a model with this tokenizer writes them, arguments by their schemas; with `only`,
    /// one call of the tool of that name.
    ///
    /// # Errors
    /// [`Error::Argument`] where there is no tool, or none of that name.
    pub fn tool_calls(
        format: ToolFormat,
        tokenizer: &Tokenizer,
        tools: &[Tool],
        only: Option<&str>,
    ) -> Result<GrammarSource> {
        let callable: Vec<&Tool> = tools.iter().filter(|tool| only.is_none_or(|name| name == tool.name)).collect();
        if callable.is_empty() {
            let names: Vec<&str> = tools.iter().map(|tool| tool.name.as_str()).collect();
            return Err(Error::argument(match only {
                Some(name) => format!("no tool is called {name:?}; there are {names:?}"),
                None => "a tool has to be called, but there are no tools".into(),
            }));
        }
        // A control token goes by its number, for its name may not be one that grammars can have.
        let mark = |text: &str| match tokenizer.token_id(text).filter(|id| tokenizer.is_control(*id)) {
            Some(id) => format!("<[{id}]>"),
            None => quoted(text),
        };
        let arguments = if format == ToolFormat::Bare { "parameters" } else { "arguments" };
        let mut bodies = Vec::new();
        let mut rules = String::new();
        for (i, tool) in callable.iter().enumerate() {
            let name = Value::from(tool.name.as_str()).to_string();
            bodies.push(match format {
                ToolFormat::Named => format!("{} {} arguments{i}", quoted(&tool.name), mark(ARGUMENTS_MARK)),
                _ => format!("{} arguments{i} \"}}\"", quoted(&format!("{{\"name\": {name}, \"{arguments}\": "))),
            });
            rules += &format!("arguments{i}: %json {}\n", with_whitespace(tool.parameters.clone(), NARROW));
        }
        let bodies = bodies.join(" | ");
        let many = |between: &str| if only.is_some() { String::new() } else { format!(" ({between} call)*") };
        let list = mark(LIST_MARK);
        let (start, call) = match format {
            ToolFormat::Tagged => {
                let (open, close) = (mark(OPEN_TAG), mark(CLOSE_TAG));
                (format!("call{}", many("\"\\n\"")), format!("{open} \"\\n\" ({bodies}) \"\\n\" {close}"))
            }
            ToolFormat::List => (format!("{list} \" \"? \"[\" call{} \"]\"", many("\", \"")), bodies),
            ToolFormat::Named => (format!("call{}", many("")), format!("{list} ({bodies})")),
            ToolFormat::Bare => ("call".into(), bodies),
        };
        Ok(GrammarSource::Lark(format!("start: {start}\ncall: {call}\n{rules}")))
    }
}

/// `text` as a literal.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
