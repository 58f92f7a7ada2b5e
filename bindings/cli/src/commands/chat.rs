//! The chat of `kinglet run`: lines from the keyboard (or a pipe), answers as they come, and commands with a slash.
//!
//! The conversation is a list of messages; each turn renders all of it and the session computes only what is new. When
//! it outgrows the window its oldest turns are left out, and that is said.

use super::run::{conversation_ids, generate, summary};
use crate::output;
use anyhow::{Context, bail};
use kinglet_engine::sampling::SamplerOptions;
use kinglet_engine::session::{EndReason, GenerateOptions, GenerationStats, Session};
use kinglet_engine::text::Message;
use rustyline::error::ReadlineError;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, IsTerminal};
use std::path::Path;

const HELP: &str = "\
/help                 this
/clear                forget the conversation
/system [TEXT]        show or set what the model is told to be, and start afresh
/undo                 take back the last question and answer
/regenerate           answer the last question again
/set [NAME VALUE]     show or set how tokens are chosen, such as /set top_k 20
/temperature X        the same as /set temperature X
/tokens N             most tokens of an answer; 0 for no limit
/stats                counts and times of the last answer
/save FILE            write the conversation as JSON
/load FILE            go on with a saved conversation
/exit                 leave (Ctrl-D too)
A line that ends with \\ goes on in the next. Ctrl-C stops an answer.";

/// A conversation on disk: of `/save`, and in what `--session` keeps.
#[derive(Default, Deserialize, Serialize)]
pub struct Saved {
    pub model: String,
    pub messages: Vec<Message>,
    /// Text that was continued without a chat template.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub text: String,
}

struct Chat<'a> {
    name: &'a str,
    session: &'a mut Session,
    options: GenerateOptions,
    /// The system message, if there is one, then questions and answers in turn.
    messages: &'a mut Vec<Message>,
    last: Option<GenerationStats>,
    show_stats: bool,
}

/// Chats until the user leaves, and leaves the conversation in `messages`, which may hold the beginning of one.
pub fn run(
    name: &str,
    session: &mut Session,
    options: GenerateOptions,
    messages: &mut Vec<Message>,
    show_stats: bool,
) -> anyhow::Result<()> {
    if session.model().chat_template()?.is_none() {
        bail!(
            "{name} has no chat template: it is a base model, which continues text; use kinglet run {name} \"some text\" --raw"
        );
    }
    let mut chat = Chat { name, session, options, messages, last: None, show_stats };
    let mut lines = Lines::new()?;
    if lines.is_keyboard() {
        eprintln!("{name}, window of {} tokens; /help for commands", chat.session.options().context);
    }
    while let Some(line) = lines.next()? {
        let text = line.trim();
        let done = match text.strip_prefix('/') {
            _ if text.is_empty() => continue,
            Some("exit" | "quit" | "bye") => break,
            Some(command) => chat.command(command),
            None => chat.ask(text),
        };
        match done {
            Ok(()) => {}
            // The reader of the answers went away.
            Err(error) if output::is_closed_pipe(&error) => return Err(error),
            Err(error) => eprintln!("{error:#}"),
        }
    }
    Ok(())
}

impl Chat<'_> {
    fn command(&mut self, line: &str) -> anyhow::Result<()> {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match name {
            "help" | "?" => eprintln!("{HELP}"),
            "clear" => self.forget_turns(),
            "system" if rest.is_empty() => match self.system() {
                Some(text) => eprintln!("{text}"),
                None => eprintln!("(no system prompt)"),
            },
            "system" => self.set_system(Some(rest)),
            "undo" => {
                let at = self.last_question()?;
                self.messages.truncate(at);
            }
            "regenerate" => {
                let at = self.last_question()?;
                self.messages.truncate(at + 1);
                // The same seed would give the same answer.
                self.options.sampler.seed = self.options.sampler.seed.map(|seed| seed.wrapping_add(1));
                self.answer()?;
            }
            "set" if rest.is_empty() => eprintln!("{}", serde_json::to_string_pretty(&self.options.sampler)?),
            "set" => {
                let (key, value) = rest.split_once(char::is_whitespace).context("a name and a value are needed")?;
                self.set(key, value.trim())?;
            }
            "temperature" => self.set("temperature", rest)?,
            "tokens" => {
                let n: usize = rest.parse().ok().context("a whole number is needed")?;
                self.options.max_tokens = if n == 0 { usize::MAX } else { n };
            }
            "stats" => match &self.last {
                Some(stats) => {
                    eprintln!("{}", summary(stats));
                    let window = self.session.options().context;
                    let cache = output::bytes(self.session.cache_bytes() as u64);
                    eprintln!("window {} of {window} tokens, KV cache {cache}", self.session.position());
                }
                None => eprintln!("no answer yet"),
            },
            "save" => self.save(path_of(rest)?)?,
            "load" => self.load(path_of(rest)?)?,
            _ => bail!("no command is called /{name}; /help lists them"),
        }
        Ok(())
    }

    fn ask(&mut self, text: &str) -> anyhow::Result<()> {
        self.messages.push(Message::new("user", text));
        let asked = self.answer();
        // A question without an answer would make the turns uneven.
        if self.messages.last().is_some_and(|m| m.role == "user") {
            self.messages.pop();
        }
        asked
    }

    /// Answers the question at the end of the conversation.
    fn answer(&mut self) -> anyhow::Result<()> {
        let ids = self.fitting_ids()?;
        let mut answer = String::new();
        let stats = generate(self.session, &ids, self.options.clone(), &mut |text| {
            answer.push_str(text);
            output::answer(text)
        });
        if !answer.ends_with('\n') {
            output::text("\n")?;
        }
        let stats = stats?;
        match stats.end {
            Some(EndReason::Cancelled) => eprintln!("(stopped)"),
            Some(EndReason::ContextFull) => {
                eprintln!("(the window of {} tokens is full)", self.session.options().context)
            }
            _ => {}
        }
        if self.show_stats {
            eprintln!("{}", summary(&stats));
        }
        self.last = Some(stats);
        self.messages.push(Message::new("assistant", answer));
        Ok(())
    }

    /// The conversation's tokens, without its oldest turns where they would leave no room for an answer.
    fn fitting_ids(&mut self) -> anyhow::Result<Vec<u32>> {
        let window = self.session.options().context;
        let room = self.options.max_tokens.min(window / 4);
        let mut dropped = 0;
        loop {
            let ids = conversation_ids(self.session.model(), self.messages, None)?;
            let first = usize::from(self.system().is_some());
            let turns = self.messages.len().saturating_sub(first);
            if ids.len() + room <= window || turns < 3 {
                if dropped > 0 {
                    eprintln!(
                        "(the window of {window} tokens is too small for all: the oldest {dropped} turns were left out)"
                    );
                }
                return Ok(ids);
            }
            self.messages.drain(first..first + 2);
            dropped += 1;
        }
    }

    fn system(&self) -> Option<&str> {
        self.messages.first().filter(|m| m.role == "system").map(|m| m.content.as_str())
    }

    fn set_system(&mut self, text: Option<&str>) {
        self.messages.clear();
        self.messages.extend(text.map(|text| Message::new("system", text)));
    }

    fn forget_turns(&mut self) {
        self.messages.retain(|m| m.role == "system");
    }

    fn last_question(&self) -> anyhow::Result<usize> {
        self.messages.iter().rposition(|m| m.role == "user").context("nothing was asked yet")
    }

    /// Sets one of the sampler's options by the name it has in the library.
    fn set(&mut self, key: &str, value: &str) -> anyhow::Result<()> {
        let options = with_option(&self.options.sampler, key, value)?;
        options.validate(self.session.model().spec().vocab)?;
        self.options.sampler = options;
        Ok(())
    }

    fn save(&self, path: &Path) -> anyhow::Result<()> {
        let saved = Saved { model: self.name.into(), messages: self.messages.clone(), text: String::new() };
        let text = serde_json::to_string_pretty(&saved)? + "\n";
        kinglet_engine::file::replace(path, text.as_bytes())?;
        eprintln!("{} messages in {}", self.messages.len(), path.display());
        Ok(())
    }

    fn load(&mut self, path: &Path) -> anyhow::Result<()> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let saved: Saved = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        if saved.model != self.name {
            eprintln!("(it was held with {})", output::printable(&saved.model));
        }
        *self.messages = saved.messages;
        eprintln!("{} messages", self.messages.len());
        Ok(())
    }
}

/// `options` with the value of `key` replaced; `value` is JSON, or a word.
fn with_option(options: &SamplerOptions, key: &str, value: &str) -> anyhow::Result<SamplerOptions> {
    let mut all = serde_json::to_value(options)?;
    let Some(slot) = all.get_mut(key) else {
        let names: Vec<String> = all.as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect();
        bail!("no option is called {key}; there are {}", names.join(", "));
    };
    *slot = serde_json::from_str(value).unwrap_or_else(|_| value.into());
    serde_json::from_value(all).with_context(|| format!("{key} cannot be {value}"))
}

fn path_of(rest: &str) -> anyhow::Result<&Path> {
    if rest.is_empty() {
        bail!("a file name is needed");
    }
    Ok(Path::new(rest))
}

/// What the user writes: edited at a keyboard, plain from a pipe.
enum Lines {
    Keyboard(Box<rustyline::DefaultEditor>),
    Pipe(std::io::StdinLock<'static>),
}

impl Lines {
    fn new() -> anyhow::Result<Lines> {
        if std::io::stdin().is_terminal() {
            return Ok(Lines::Keyboard(Box::new(rustyline::DefaultEditor::new()?)));
        }
        Ok(Lines::Pipe(std::io::stdin().lock()))
    }

    fn is_keyboard(&self) -> bool {
        matches!(self, Lines::Keyboard(_))
    }

    /// The next entry, of several lines where they end with a backslash; `None` when there are no more.
    fn next(&mut self) -> anyhow::Result<Option<String>> {
        let mut entry = String::new();
        loop {
            let prompt = if entry.is_empty() { "> " } else { ". " };
            let line = match self {
                Lines::Pipe(input) => {
                    let mut bytes = Vec::new();
                    if input.read_until(b'\n', &mut bytes)? == 0 {
                        return Ok((!entry.is_empty()).then_some(entry));
                    }
                    String::from_utf8_lossy(&bytes).trim_end_matches(['\n', '\r']).to_string()
                }
                Lines::Keyboard(editor) => match editor.readline(prompt) {
                    Ok(line) => line,
                    // Ctrl-C at the prompt throws the entry away.
                    Err(ReadlineError::Interrupted) => {
                        eprintln!("(/exit or Ctrl-D leaves)");
                        entry.clear();
                        continue;
                    }
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(e) => return Err(e.into()),
                },
            };
            match line.strip_suffix('\\') {
                Some(start) => {
                    entry.push_str(start);
                    entry.push('\n');
                }
                None => {
                    entry.push_str(&line);
                    if let Lines::Keyboard(editor) = self
                        && !entry.trim().is_empty()
                    {
                        editor.add_history_entry(entry.as_str())?;
                    }
                    return Ok(Some(entry));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_set_by_name() {
        let o = with_option(&SamplerOptions::default(), "top_k", "20").unwrap();
        assert_eq!(o.top_k, 20);
        let o = with_option(&o, "mirostat", r#"{"tau": 3.0, "eta": 0.2}"#).unwrap();
        assert_eq!((o.top_k, o.mirostat.unwrap().tau), (20, 3.0));
        assert_eq!(with_option(&o, "mirostat", "null").unwrap().mirostat, None);
        assert!(with_option(&o, "top_q", "1").unwrap_err().to_string().contains("top_k"));
        assert!(with_option(&o, "top_k", "many").unwrap_err().to_string().contains("top_k cannot be many"));
    }
}
