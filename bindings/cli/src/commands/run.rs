//! `kinglet run`: one answer, or a chat.

use super::chat::{self, Saved};
use crate::args::{Global, MODEL_HELP, SessionArgs, Usage};
use crate::interrupt::{self, Interrupted};
use crate::sampling::SamplingArgs;
use crate::structure::{StructureArgs, Tools};
use crate::{adapters, models, output};
use anyhow::{Context, bail};
use clap::Args;
use kinglet_engine::session::{EndReason, GenerateOptions, GenerationStats, Model, Session, Speculation};
use kinglet_engine::text::{EncodeOptions, Message, Said, ToolFormat, ToolParser};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

/// Chat with a model, or let it answer one prompt
#[derive(Args, Debug)]
#[command(after_help = "\
Without PROMPT a chat begins; /help in it lists its commands. Only the answer goes to standard output.
Ctrl-C stops the answer.

Examples:
  kinglet run smollm2
  kinglet run smollm2 \"Name three rivers.\" --temperature 0
  git diff | kinglet run qwen2.5-coder - --system \"Write a commit message for this diff.\"
  kinglet run gemma3 \"Once upon a time\" --raw -n 100     continue the text, no chat template
  kinglet run smollm2 \"Why?\" --json                      the answer with counts and times
  kinglet run smollm2 \"And why red at dusk?\" --session sky.kinglet   goes on from the last time
  kinglet run qwen2.5-coder - --speculate lookup < f.rs   for answers that repeat much of the question

Answers for programs, which cannot come out otherwise:
  kinglet run smollm2 \"A person, invented.\" --json-schema '{\"type\": \"object\", \"properties\": {\"name\":
    {\"type\": \"string\"}, \"age\": {\"type\": \"integer\"}}, \"required\": [\"name\", \"age\"]}'
  kinglet run smollm2 \"Is water wet?\" --grammar yes-or-no.lark      a file with: start: \"yes\" | \"no\"
  kinglet run qwen2.5-coder \"Weather in Oslo?\" --tools tools.json --tool-choice required
    tools.json: [{\"type\": \"function\", \"function\": {\"name\": \"weather\", \"parameters\": {...a schema...}}}]")]
pub struct Arguments {
    #[arg(help = MODEL_HELP, value_name = "MODEL")]
    model: String,
    /// What to answer; - reads standard input. Without it a chat begins
    prompt: Option<String>,
    /// Continue the text of PROMPT itself, without the model's chat template
    #[arg(long)]
    raw: bool,
    /// What the model is told to be
    #[arg(short, long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Most tokens of an answer [default: until the model ends it]
    #[arg(short = 'n', long, value_name = "N")]
    max_tokens: Option<usize>,
    /// End the answer before this text; may be given again
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on where the model would end its answer
    #[arg(long)]
    ignore_end: bool,
    /// Print control tokens as well
    #[arg(long)]
    special: bool,
    /// Print counts and times on standard error
    #[arg(long)]
    stats: bool,
    /// Apply a LoRA adapter, a .gguf file or a PEFT folder, with an optional factor; may be given again
    #[arg(long, value_name = "FILE[:SCALE]")]
    adapter: Vec<String>,
    /// Go on with the conversation in this file if it is there, and leave it there at the end, with what was computed
    #[arg(long, value_name = "FILE")]
    session: Option<PathBuf>,
    /// Where the window is full, keep its first N tokens, drop half of the others and go on instead of ending
    #[arg(long, value_name = "N")]
    context_shift: Option<usize>,
    /// Guess tokens ahead and check them together, which gives the same answer sooner where guesses are good: lookup
    /// (from the text so far) or a MODEL that is smaller and has the same vocabulary; off for neither
    #[arg(long, value_name = "lookup|MODEL|off", default_value = "off")]
    speculate: String,
    #[command(flatten)]
    structure: StructureArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    window: SessionArgs,
}

pub fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<()> {
    if arguments.prompt.is_none() && arguments.raw {
        return Err(Usage("--raw needs a PROMPT to continue".into()).into());
    }
    if arguments.prompt.is_none() && global.json {
        return Err(Usage("--json needs a PROMPT: a chat is for people".into()).into());
    }
    if arguments.prompt.is_none() && arguments.structure.has_tools() {
        return Err(Usage("--tools needs a PROMPT: in a chat nobody answers the calls".into()).into());
    }
    let prompt = arguments.prompt.as_deref().map(super::text_or_stdin).transpose()?;
    let model = models::open(&arguments.model)?;
    let tools = arguments.structure.tools(&model)?;
    let options = GenerateOptions {
        sampler: arguments.sampling.options(model.tokenizer(), model.spec().vocab)?,
        max_tokens: arguments.max_tokens.unwrap_or(usize::MAX),
        stop: arguments.stop.clone(),
        ignore_end: arguments.ignore_end,
        special: arguments.special,
        speculation: match arguments.speculate.as_str() {
            "off" => Speculation::Off,
            "lookup" => Speculation::Lookup,
            _ => Speculation::Model,
        },
        shift: arguments.context_shift,
        grammar: arguments.structure.grammar(&model, tools.as_ref())?,
        shown: if tools.is_some() { ToolFormat::marks(model.tokenizer()) } else { Vec::new() },
    };
    let mut session_options = arguments.window.memory.options(arguments.window.context, global);
    if options.speculation != Speculation::Off {
        session_options.logit_rows = Speculation::ROWS;
    }
    let mut session = adapters::session(&model, session_options.clone(), &arguments.adapter)?;
    if options.speculation == Speculation::Model {
        let draft = models::open(&arguments.speculate)?;
        session_options.logit_rows = 1;
        // Those are of the model.
        (session_options.gpu_layers, session_options.gpu_memory) = (None, None);
        // Adapters may have brought the session to the CPU.
        session_options.device = session.options().device.clone();
        session.set_draft(Some(Session::new(&draft, &session_options)?))?;
    }
    let cancel = session.cancel_handle();
    interrupt::listen(move || cancel.cancel());
    let mut saved = match &arguments.session {
        Some(path) if path.exists() => serde_json::from_str(&session.load(path)?)
            .with_context(|| format!("{}: its note is no conversation of this program", path.display()))?,
        _ => Saved { model: arguments.model.clone(), ..Saved::default() },
    };
    begin(&mut saved.messages, arguments.system.as_deref())?;
    let stats = match prompt {
        None => {
            chat::run(&arguments.model, &mut session, options, &mut saved.messages, arguments.stats)?;
            None
        }
        Some(prompt) => Some(one_answer(&mut session, prompt, &mut saved, options, tools.as_ref(), arguments, global)?),
    };
    if let Some(path) = &arguments.session {
        session.save(path, &serde_json::to_string(&saved)?)?;
    }
    match stats {
        Some(stats) if stats.end == Some(EndReason::Cancelled) => Err(Interrupted.into()),
        _ => Ok(()),
    }
}

/// Puts the system prompt in front of a conversation that has not begun.
fn begin(messages: &mut Vec<Message>, system: Option<&str>) -> anyhow::Result<()> {
    let Some(system) = system else { return Ok(()) };
    match messages.first() {
        None => messages.push(Message::new("system", system)),
        Some(first) if first.role == "system" && first.content == system => {}
        Some(_) => bail!("the conversation of this session has begun with another system prompt; leave --system out"),
    }
    Ok(())
}

/// Appends a prompt to what was said before, and gives the tokens of all: a conversation's next turn, or text to
/// continue, and whether it is that.
fn prompt_ids(
    model: &Model,
    prompt: Vec<u8>,
    saved: &mut Saved,
    tools: Option<&Tools>,
    arguments: &Arguments,
) -> anyhow::Result<(Vec<u32>, bool)> {
    if !arguments.raw {
        if model.chat_template()?.is_some() {
            let content = String::from_utf8(prompt).context("the prompt is not UTF-8; --raw takes any bytes")?;
            saved.messages.push(Message::new("user", content));
            return Ok((conversation_ids(model, &saved.messages, tools)?, false));
        }
        if arguments.system.is_some() {
            bail!(
                "{} has no chat template, so it knows no system prompt: it is a base model that continues text",
                arguments.model
            );
        }
        eprintln!("note: {} has no chat template; continuing the text as with --raw", arguments.model);
    }
    let options = EncodeOptions { add_special: true, parse_special: true };
    if arguments.session.is_none() {
        return Ok((model.tokenizer().encode_bytes(&prompt, options), true));
    }
    saved.text.push_str(std::str::from_utf8(&prompt).context("the prompt is not UTF-8, which --session needs")?);
    Ok((model.tokenizer().encode(&saved.text, options), true))
}

/// The tokens of a conversation, with tools on offer, up to where the next answer begins.
pub fn conversation_ids(model: &Model, messages: &[Message], tools: Option<&Tools>) -> anyhow::Result<Vec<u32>> {
    let Some(template) = model.chat_template()? else {
        bail!("this model has no chat template: it is a base model, which continues text; give it a PROMPT with --raw");
    };
    let text = template.render(messages, tools.map(|tools| &tools.json), true)?;
    Ok(model.tokenizer().encode_prompt(&text))
}

fn one_answer(
    session: &mut Session,
    prompt: Vec<u8>,
    saved: &mut Saved,
    options: GenerateOptions,
    tools: Option<&Tools>,
    arguments: &Arguments,
    global: &Global,
) -> anyhow::Result<GenerationStats> {
    let (ids, continues) = prompt_ids(session.model(), prompt, saved, tools, arguments)?;
    let calls: usize = saved.messages.iter().map(|message| message.tool_calls.len()).sum();
    let mut parser = tools.map(|tools| ToolParser::new(tools.format, calls + 1));
    let mut answer = Message::new("assistant", "");
    let mut hear = |said: Vec<Said>| -> std::io::Result<()> {
        for said in said {
            match said {
                Said::Text(text) => {
                    answer.content.push_str(&text);
                    if !global.json {
                        output::answer(&text)?;
                    }
                }
                Said::Call(call) => answer.tool_calls.push(call),
            }
        }
        Ok(())
    };
    let stats = generate(session, &ids, options, &mut |text| match &mut parser {
        Some(parser) => hear(parser.push(text)),
        None => hear(vec![Said::Text(text.into())]),
    })?;
    if let Some(parser) = &mut parser {
        hear(parser.finish())?;
    }
    if global.json {
        let mut result = json!({
            "text": answer.content,
            "end": stats.end.map(EndReason::name),
            "prompt_tokens": stats.prompt_tokens,
            "reused_tokens": stats.reused_tokens,
            "output_tokens": stats.output_tokens,
            "drafted_tokens": stats.drafted_tokens,
            "accepted_tokens": stats.accepted_tokens,
            "dropped_tokens": stats.dropped_tokens,
            "prefill_ms": stats.prefill.as_secs_f64() * 1e3,
            "decode_ms": stats.decode.as_secs_f64() * 1e3,
        });
        if tools.is_some() {
            result["tool_calls"] = json!(answer.tool_calls);
        }
        output::json(&result)?;
    } else {
        let said = !answer.content.is_empty() || answer.tool_calls.is_empty();
        // A raw continuation goes to a pipe byte for byte.
        if said && (output::to_terminal() || (!arguments.raw && !answer.content.ends_with('\n'))) {
            output::text("\n")?;
        }
        for call in &answer.tool_calls {
            output::text(&format!("{}\n", json!(call)))?;
        }
    }
    if arguments.stats || global.verbose > 0 {
        eprintln!("{}", summary(&stats));
    }
    match continues {
        true => saved.text.push_str(&answer.content),
        false => saved.messages.push(answer),
    }
    Ok(stats)
}

/// Generates after `ids` and hands every piece of text to `show`, until the end or Ctrl-C.
pub fn generate(
    session: &mut Session,
    ids: &[u32],
    options: GenerateOptions,
    show: &mut dyn FnMut(&str) -> std::io::Result<()>,
) -> anyhow::Result<GenerationStats> {
    let cancel = session.cancel_handle();
    let mut generation = session.generate(ids, options)?;
    // A Ctrl-C from before the generation began, which cleared the handle.
    if interrupt::pending() {
        cancel.cancel();
    }
    while let Some(piece) = generation.next()? {
        show(piece.text)?;
    }
    std::io::stdout().flush()?;
    let stats = generation.stats().clone();
    interrupt::take();
    Ok(stats)
}

/// One line of counts and speeds.
pub fn summary(stats: &GenerationStats) -> String {
    let rate = |tokens: usize, time: Duration| if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() };
    let computed = stats.prompt_tokens - stats.reused_tokens.min(stats.prompt_tokens);
    let decoded = stats.output_tokens.saturating_sub(1);
    let guessed = match stats.drafted_tokens {
        0 => String::new(),
        drafted => format!(" ({} of {drafted} guesses right)", stats.accepted_tokens),
    };
    format!(
        "prompt {} tokens ({} kept), {:.0} ms, {:.1} tokens/s; answer {} tokens, {:.1} tokens/s{guessed}; ended by {}",
        stats.prompt_tokens,
        stats.reused_tokens,
        stats.prefill.as_secs_f64() * 1e3,
        rate(computed, stats.prefill),
        stats.output_tokens,
        rate(decoded, stats.decode),
        stats.end.map_or("nothing", EndReason::name)
    )
}
