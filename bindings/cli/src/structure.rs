//! The options that say what an answer is to be: JSON by a schema, a text of a grammar, calls of tools.

use anyhow::{Context, bail};
use clap::Args;
use kinglet_engine::grammar::{Grammar, GrammarSource};
use kinglet_engine::session::Model;
use kinglet_engine::text::{Tool, ToolFormat};
use serde_json::Value;

/// What is held while the answer is written, so that it cannot be otherwise.
#[derive(Args, Debug)]
#[command(next_help_heading = "Structured answers")]
pub struct StructureArgs {
    /// Answer in JSON by this schema: a file, or the schema itself; {} is any JSON
    #[arg(long, value_name = "FILE|SCHEMA", conflicts_with_all = ["grammar", "tools"])]
    json_schema: Option<String>,
    /// Answer with a text of the grammar in this file, in the dialect of Lark that llguidance reads
    #[arg(long, value_name = "FILE", conflicts_with = "tools")]
    grammar: Option<String>,
    /// Offer the model the tools in this file, as the OpenAI API has them; calls are printed as JSON, one a line
    #[arg(long, value_name = "FILE", conflicts_with = "raw")]
    tools: Option<String>,
    /// Who says whether a tool is called: auto (the model), required, none, or the NAME of the one to call [default: auto]
    #[arg(long, value_name = "CHOICE", requires = "tools")]
    tool_choice: Option<String>,
}

/// Tools on offer, and how the model calls them.
pub struct Tools {
    /// As the template gets them.
    pub json: Value,
    pub format: ToolFormat,
}

impl StructureArgs {
    /// Whether there are tools.
    pub fn has_tools(&self) -> bool {
        self.tools.is_some()
    }

    /// The tools on offer to `model`; none where they are not to be called.
    pub fn tools(&self, model: &Model) -> anyhow::Result<Option<Tools>> {
        let Some(path) = self.tools.as_deref().filter(|_| self.tool_choice.as_deref() != Some("none")) else {
            return Ok(None);
        };
        let text = std::fs::read_to_string(path).with_context(|| path.to_string())?;
        let json: Value = serde_json::from_str(&text).with_context(|| path.to_string())?;
        Tool::list(&json).with_context(|| path.to_string())?;
        let Some(format) = model.chat_template()?.and_then(|template| template.tool_format()) else {
            bail!("this model's chat template shows no way to call tools that is known; qwen2.5-coder has one");
        };
        Ok(Some(Tools { json, format }))
    }

    /// What the answer is held to, compiled for `model`.
    pub fn grammar(&self, model: &Model, tools: Option<&Tools>) -> anyhow::Result<Option<Grammar>> {
        let read = |path: &str| std::fs::read_to_string(path).with_context(|| path.to_string());
        let source = if let Some(schema) = &self.json_schema {
            let inline = schema.trim_start().starts_with('{');
            GrammarSource::JsonSchema(if inline { schema.clone() } else { read(schema)? })
        } else if let Some(path) = &self.grammar {
            GrammarSource::Lark(read(path)?)
        } else if let (Some(tools), Some(choice)) = (tools, self.tool_choice.as_deref().filter(|c| *c != "auto")) {
            let only = (choice != "required").then_some(choice);
            GrammarSource::tool_calls(tools.format, model.tokenizer(), &Tool::list(&tools.json)?, only)?
        } else {
            return Ok(None);
        };
        Ok(Some(model.grammar(source)?))
    }
}
