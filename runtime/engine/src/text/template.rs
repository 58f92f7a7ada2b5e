//! The chat template: the Jinja program in the GGUF that turns a conversation into a prompt.
//!
//! It is rendered as transformers renders it, byte for byte: `trim_blocks` and `lstrip_blocks`, Python's string methods
//! and printing, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, loop controls. A template is a program
//! from a file: each rendering gets [`FUEL`], which bounds its steps and its memory, and a thread with a deep stack, so a
//! hostile one ends in an error. (Where there are no threads, in a browser, one that nests deep enough ends the instance.)
//!
//! Control tokens are plain text in what comes out; encode it with [`EncodeOptions::PROMPT`](super::EncodeOptions).

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value, context};

use super::message::Message;
use super::{Tokenizer, ToolFormat, python};
use crate::deep::on_deep_stack;
use crate::gguf::Gguf;
use crate::system;
use crate::{Error, Result};

/// What one rendering may spend: one unit per instruction, or per 64 bytes made (128 MB).
const FUEL: u64 = 2_000_000;

/// The longest template source in bytes; real ones have at most some 20,000.
const LONGEST_SOURCE: usize = 1 << 18;

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Gemma's turns; a system message goes before the first user's.
const GEMMA: &str = "{{ bos_token }}{% if messages and messages[0].role == 'system' %}\
{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% else %}\
{% set first = '' %}{% set rest = messages %}{% endif %}\
{% for message in rest %}{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' \
+ (first if loop.first else '') + (message.content | trim) + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}";

/// A model's chat template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
    /// The texts of the tokens that end a generation.
    pub(super) ends: Vec<String>,
    has_tool_use: bool,
    tool_format: Option<ToolFormat>,
}

/// What a rendering takes besides the messages.
#[derive(Debug, Clone, Copy, Default)]
pub struct RenderOptions<'a> {
    /// The tools on offer: a list of JSON schemas in OpenAI's shape.
    pub tools: Option<&'a serde_json::Value>,
    /// Documents to answer from, for templates that know them.
    pub documents: Option<&'a serde_json::Value>,
    /// End with what precedes the assistant's answer.
    pub add_generation_prompt: bool,
    /// Further variables by name, such as `enable_thinking`.
    pub variables: Option<&'a serde_json::Map<String, serde_json::Value>>,
}

impl ChatTemplate {
    /// The template of `gguf`, or `None` if it has none: a base model, which knows no turns.
    ///
    /// # Errors
    /// [`Error::Template`] where it does not compile, [`Error::Format`] where it is not text.
    pub fn from_gguf(gguf: &Gguf, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
        let metadata = gguf.metadata();
        let Some(source) = metadata.opt_str("tokenizer.chat_template")? else { return Ok(None) };
        let mut template = ChatTemplate::new(source, tokenizer)
            .map_err(|error| Error::Template(format!("{}: key tokenizer.chat_template: {error}", gguf.name())))?;
        if metadata.get("tokenizer.ggml.bos_token_id").is_none() {
            // Then the tokenizer's BOS is a guess; transformers has none.
            template.bos.clear();
        }
        if let Some(source) = metadata.opt_str("tokenizer.chat_template.tool_use")? {
            template.add("tool_use", source).map_err(|error| {
                Error::Template(format!("{}: key tokenizer.chat_template.tool_use: {error}", gguf.name()))
            })?;
            template.has_tool_use = true;
        }
        Ok(Some(template))
    }

    /// A template from its source, for a model with this tokenizer.
    ///
    /// # Errors
    /// [`Error::Template`] where it does not compile.
    pub fn new(source: &str, tokenizer: &Tokenizer) -> Result<ChatTemplate> {
        let text = |id: u32| String::from_utf8_lossy(tokenizer.token_bytes(id, true).unwrap_or_default()).into_owned();
        let mut environment = Environment::new();
        environment
            .set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(template_error)?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.set_formatter(python::print);
        environment.set_unknown_method_callback(python::method);
        environment.add_filter("tojson", python::to_json);
        environment.add_filter("string", |value: &Value| python::string(value));
        // Templates ask whether there is such a function, and do without the date where there is none.
        if system::unix_seconds().is_some() {
            environment.add_function("strftime_now", |format: &str| python::strftime_now(format));
        }
        environment.add_function("raise_exception", |message: &str| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.to_owned()))
        });
        let mut template = ChatTemplate {
            environment,
            bos: tokenizer.bos().map(text).unwrap_or_default(),
            eos: tokenizer.eos().map(text).unwrap_or_default(),
            ends: tokenizer.ends_of_generation().iter().map(|&id| text(id)).filter(|text| !text.is_empty()).collect(),
            has_tool_use: false,
            tool_format: None,
        };
        template.add("chat", source)?;
        Ok(template)
    }

    /// ChatML (`<|im_start|>role … <|im_end|>`), for a model that was trained on it but carries no template.
    ///
    /// # Errors
    /// None in practice.
    pub fn chatml(tokenizer: &Tokenizer) -> Result<ChatTemplate> {
        ChatTemplate::new(CHATML, tokenizer)
    }

    /// Gemma's turns (`<start_of_turn>role … <end_of_turn>`), for a model that carries no template. The base models were
    /// not trained on turns: fine-tune before chatting.
    ///
    /// # Errors
    /// None in practice.
    pub fn gemma(tokenizer: &Tokenizer) -> Result<ChatTemplate> {
        ChatTemplate::new(GEMMA, tokenizer)
    }

    fn add(&mut self, name: &'static str, source: &str) -> Result<()> {
        if source.len() > LONGEST_SOURCE {
            return Err(Error::Template(format!("its source of {} bytes exceeds {LONGEST_SOURCE}", source.len())));
        }
        self.tool_format = ToolFormat::of_template(source).or(self.tool_format);
        self.environment.add_template_owned(name, without_generation_tags(source)).map_err(template_error)
    }

    /// How the model writes calls of tools; `None` where its template shows no way that is known.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        self.tool_format
    }

    /// The prompt for `messages`; with `add_generation_prompt`, up to where the assistant's answer begins.
    ///
    /// # Errors
    /// [`Error::Template`] where the template rejects the conversation, fails or exceeds its budget.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        self.render_with(messages, &RenderOptions { tools, add_generation_prompt, ..RenderOptions::default() })
    }

    /// As [`ChatTemplate::render`], with all that a template may be given.
    ///
    /// # Errors
    /// [`Error::Template`], as above.
    pub fn render_with(&self, messages: &[Message], options: &RenderOptions<'_>) -> Result<String> {
        let messages: Vec<_> = messages.iter().map(Message::to_template).collect();
        let name = if self.has_tool_use && options.tools.is_some() { "tool_use" } else { "chat" };
        let template = self.environment.get_template(name).map_err(template_error)?;
        let optional = |value: Option<&serde_json::Value>| value.map(|value| Value::from(Serde(value)));
        let arguments = context! {
            messages => Value::from(Serde(messages)),
            tools => optional(options.tools),
            documents => optional(options.documents),
            add_generation_prompt => options.add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            ..Value::from(Serde(options.variables.unwrap_or(&serde_json::Map::new())))
        };
        // A template can wrap a list in a list as often as its fuel allows, and dropping such a value recurses: about 110
        // bytes a level, 300,000 levels at most.
        on_deep_stack("chat template", Error::Template, || {
            let arguments = arguments;
            template.render(arguments).map_err(template_error)
        })
    }
}

/// The error with the reasons behind it, in one line.
fn template_error(error: minijinja::Error) -> Error {
    if error.kind() == ErrorKind::OutOfFuel {
        return Error::Template(format!("the rendering exceeds its budget of {FUEL} steps; the template may not end"));
    }
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    Error::Template(text)
}

/// Makes blocks that always apply of transformers' `{% generation %}` … `{% endgeneration %}`, which only mark text.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let Some(end) = tag.find("%}").map(|end| end + 2) else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end);
        let word = tag.trim_start_matches(['{', '%', '-', '+']).trim_end_matches(['}', '%', '-', '+']).trim();
        match word {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}
