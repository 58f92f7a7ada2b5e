//! One answer in the making, whoever computes the logits: chooses tokens, turns them into whole UTF-8, and knows when to
//! end. [`Generation`](super::Generation) holds one, [`Batcher`](super::Batcher) as many as it has requests.

use std::time::Duration;

use super::{Model, Speculation};
use crate::grammar::{Constraint, Grammar};
use crate::sampling::{Sampler, SamplerOptions};
use crate::text::{Utf8Stream, overlap};
use crate::{Error, Result};

/// What to generate.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// How tokens are chosen.
    pub sampler: SamplerOptions,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Go on behind tokens that end an answer.
    pub ignore_end: bool,
    /// Whether control tokens appear in the text.
    pub special: bool,
    /// Control tokens that appear in the text in any case, such as [`ToolFormat::marks`](crate::text::ToolFormat::marks).
    pub shown: Vec<u32>,
    /// Whether to guess tokens ahead and check them together; it changes the time an answer takes, not the answer.
    pub speculation: Speculation,
    /// Where the window is full, keep so many tokens at its start, drop half of those behind them and go on, instead of
    /// ending; see [`Engine::shift`](super::Engine::shift).
    pub shift: Option<usize>,
    /// What the answer may be, from [`Model::grammar`]. Where only its end may follow, the answer ends, as with
    /// [`EndReason::EndOfText`].
    pub grammar: Option<Grammar>,
}

impl Default for GenerateOptions {
    fn default() -> GenerateOptions {
        GenerateOptions {
            sampler: SamplerOptions::default(),
            max_tokens: usize::MAX,
            stop: Vec::new(),
            ignore_end: false,
            special: false,
            shown: Vec::new(),
            speculation: Speculation::Off,
            shift: None,
            grammar: None,
        }
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// The model ended its answer.
    EndOfText,
    /// `max_tokens` were generated.
    Length,
    /// A stop text came up.
    Stop,
    /// The context window is full.
    ContextFull,
    /// It was cancelled.
    Cancelled,
}

impl EndReason {
    /// Name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            EndReason::EndOfText => "end_of_text",
            EndReason::Length => "length",
            EndReason::Stop => "stop",
            EndReason::ContextFull => "context_full",
            EndReason::Cancelled => "cancelled",
        }
    }
}

/// A piece of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Whole UTF-8; may be empty while a character or a possible stop text is incomplete.
    pub text: &'a str,
    /// The token behind it; `None` for text that was held back and comes at the end.
    pub token: Option<u32>,
}

/// Counts and times of a generation.
#[derive(Clone, Debug, Default)]
pub struct GenerationStats {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, taken from the window or the prefix cache without computing.
    pub reused_tokens: usize,
    /// Tokens generated.
    pub output_tokens: usize,
    /// Tokens that were guessed ahead and checked.
    pub drafted_tokens: usize,
    /// Of these, right.
    pub accepted_tokens: usize,
    /// Tokens that were dropped from the window to make room.
    pub dropped_tokens: usize,
    /// Time for the prompt.
    pub prefill: Duration,
    /// Time for the tokens behind the first.
    pub decode: Duration,
    /// Why it ended; `None` while it goes on.
    pub end: Option<EndReason>,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Answer {
    options: GenerateOptions,
    pub sampler: Sampler,
    constraint: Option<Constraint>,
    stream: Utf8Stream,
    /// The last piece, and behind it text that may be the start of a stop text.
    text: String,
    /// Bytes of the last piece.
    given: usize,
    pub stats: GenerationStats,
}

impl Answer {
    /// An answer to `prompt` in a window of so many tokens.
    ///
    /// # Errors
    /// Sampler parameters out of range, a prompt that is empty or longer than the window, a grammar for another model or
    /// one whose end is to be ignored.
    pub fn new(model: &Model, window: usize, prompt: &[u32], options: GenerateOptions) -> Result<Answer> {
        if prompt.is_empty() {
            return Err(Error::argument("the prompt is empty"));
        }
        if prompt.len() > window {
            return Err(Error::ContextFull { window, used: 0, asked: prompt.len() });
        }
        if let Some(keep) = options.shift
            && keep + 2 > window
        {
            return Err(Error::argument(format!(
                "of a window of {window} tokens {keep} cannot be kept: nothing would be left to drop"
            )));
        }
        if let Some(grammar) = &options.grammar {
            if !model.knows(grammar) {
                return Err(Error::argument("the grammar was compiled for another model; compile it for this one"));
            }
            if options.ignore_end {
                return Err(Error::argument("an answer under a grammar ends with it: leave ignore_end off"));
            }
        }
        let constraint = options.grammar.as_ref().map(Grammar::start);
        let mut sampler = Sampler::new(&options.sampler, model.spec().vocab)?;
        prompt.iter().for_each(|t| sampler.accept(*t));
        let stats = GenerationStats { prompt_tokens: prompt.len(), ..Default::default() };
        let (stream, text) = (Utf8Stream::default(), String::new());
        Ok(Answer { options, sampler, constraint, stream, text, given: 0, stats })
    }

    pub fn options(&self) -> &GenerateOptions {
        &self.options
    }

    /// Of a full window of `held` tokens, if it is to be shifted: how many stay at its start, and how many behind them go,
    /// the older half; `shift(stay, go)` does it.
    pub fn make_room(&mut self, held: usize, shift: impl FnOnce(usize, usize) -> Result<()>) -> Result<()> {
        let Some(keep) = self.options.shift else { return Ok(()) };
        let drop = (held - keep).div_ceil(2);
        shift(keep, drop)?;
        self.stats.dropped_tokens += drop;
        Ok(())
    }

    /// Tokens that may still come.
    pub fn room(&self) -> usize {
        self.options.max_tokens.saturating_sub(self.stats.output_tokens)
    }

    /// Chooses the next token by its logits, which the sampler changes.
    pub fn choose(&mut self, logits: &mut [f32]) -> Result<u32> {
        if let Some(constraint) = &mut self.constraint {
            constraint.mask(logits)?;
        }
        let token = self.sampler.sample(logits)?;
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(token)?;
        }
        self.sampler.accept(token);
        Ok(token)
    }

    /// How many of the largest logits decide the next token; 0 where all may.
    pub fn largest(&self) -> usize {
        if self.constraint.is_some() { 0 } else { self.sampler.largest() }
    }

    /// As [`Answer::choose`], by the [`Answer::largest`] logits.
    pub fn choose_among(&mut self, largest: &[(u32, f32)]) -> Result<u32> {
        let token = self.sampler.sample_among(largest)?;
        self.sampler.accept(token);
        Ok(token)
    }

    /// Appends a chosen token and gives the piece it makes; none where it ends the answer and nothing was held back.
    pub fn add(&mut self, model: &Model, token: u32) -> Option<Piece<'_>> {
        let tokenizer = model.tokenizer();
        if !self.options.ignore_end && tokenizer.is_end_of_generation(token) {
            return self.end(EndReason::EndOfText);
        }
        self.stats.output_tokens += 1;
        self.text.drain(..std::mem::take(&mut self.given));
        let special = self.options.special || self.options.shown.contains(&token);
        let bytes = tokenizer.token_bytes(token, special).unwrap_or_default();
        self.stream.push(bytes, &mut self.text);
        let stops = || self.options.stop.iter().filter(|s| !s.is_empty());
        if let Some(at) = stops().filter_map(|stop| self.text.find(stop)).min() {
            self.text.truncate(at);
            self.stats.end = Some(EndReason::Stop);
            self.given = at;
        } else if self.constraint.as_ref().is_some_and(Constraint::is_complete) {
            self.stats.end = Some(EndReason::EndOfText);
            self.stream.finish(&mut self.text);
            self.given = self.text.len();
        } else {
            self.given = self.text.len() - stops().map(|stop| overlap(&self.text, stop)).max().unwrap_or(0);
        }
        Some(Piece { text: self.text(), token: Some(token) })
    }

    /// The text of the last piece.
    pub fn text(&self) -> &str {
        &self.text[..self.given]
    }

    /// Ends the answer and gives what was held back, if anything.
    pub fn end(&mut self, reason: EndReason) -> Option<Piece<'_>> {
        self.stats.end = Some(reason);
        self.text.drain(..std::mem::take(&mut self.given));
        self.stream.finish(&mut self.text);
        self.given = self.text.len();
        (!self.text.is_empty()).then_some(Piece { text: &self.text, token: None })
    }
}
