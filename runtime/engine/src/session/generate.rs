//! Generation: prefill, then one token after the other, as a pull iterator of whole UTF-8 text.

use std::time::{Duration, Instant};

use super::Session;
use crate::sampling::{Sampler, SamplerOptions};
use crate::text::Utf8Stream;
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
}

impl Default for GenerateOptions {
    fn default() -> GenerateOptions {
        GenerateOptions {
            sampler: SamplerOptions::default(),
            max_tokens: usize::MAX,
            stop: Vec::new(),
            ignore_end: false,
            special: false,
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Whole UTF-8; may be empty while a character or a possible stop text is incomplete.
    pub text: String,
    /// The token behind it; `None` for text that was held back and comes at the end.
    pub token: Option<u32>,
}

/// Counts and times of a generation.
#[derive(Clone, Debug, Default)]
pub struct GenerationStats {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, taken from the window without computing.
    pub reused_tokens: usize,
    /// Tokens generated.
    pub output_tokens: usize,
    /// Time for the prompt.
    pub prefill: Duration,
    /// Time for the tokens behind the first.
    pub decode: Duration,
    /// Why it ended; `None` while it goes on.
    pub end: Option<EndReason>,
}

/// A running generation. Dropping it stops it; the session keeps what was fed.
#[derive(Debug)]
pub struct Generation<'s> {
    session: &'s mut Session,
    sampler: Sampler,
    options: GenerateOptions,
    /// Tokens to feed before the next is sampled.
    pending: Vec<u32>,
    stream: Utf8Stream,
    /// Text that may be the start of a stop text.
    held: String,
    logits: Vec<f32>,
    stats: GenerationStats,
}

impl<'s> Generation<'s> {
    pub(super) fn new(session: &'s mut Session, prompt: &[u32], options: GenerateOptions) -> Result<Generation<'s>> {
        let window = session.options().context;
        if prompt.is_empty() {
            return Err(Error::argument("the prompt is empty"));
        }
        if prompt.len() > window {
            return Err(Error::ContextFull { window, used: 0, asked: prompt.len() });
        }
        let mut sampler = Sampler::new(&options.sampler, session.model().spec().vocab)?;
        prompt.iter().for_each(|t| sampler.accept(*t));
        // The last token is fed again even if it is held: its logits are what comes next.
        let reused = session.keep_prefix(&prompt[..prompt.len() - 1]);
        session.cancel_handle().reset();
        Ok(Generation {
            pending: prompt[reused..].to_vec(),
            stats: GenerationStats { prompt_tokens: prompt.len(), reused_tokens: reused, ..Default::default() },
            session,
            sampler,
            options,
            stream: Utf8Stream::default(),
            held: String::new(),
            logits: Vec::new(),
        })
    }

    /// Counts and times so far.
    pub fn stats(&self) -> &GenerationStats {
        &self.stats
    }

    /// The session.
    pub fn session(&self) -> &Session {
        self.session
    }

    /// The next piece, or `None` at the end; [`GenerationStats::end`] says why then.
    ///
    /// # Errors
    /// Whatever stops the computation but a full context and cancellation, which are ends.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<Piece>> {
        if self.stats.end.is_some() {
            return Ok(None);
        }
        if self.stats.output_tokens >= self.options.max_tokens {
            return Ok(self.end(EndReason::Length));
        }
        let started = Instant::now();
        let first = self.stats.output_tokens == 0;
        match self.session.feed(&self.pending) {
            Ok(logits) => {
                self.logits.clear();
                self.logits.extend_from_slice(logits);
            }
            Err(Error::Cancelled) => return Ok(self.end(EndReason::Cancelled)),
            Err(Error::ContextFull { .. }) if !first => return Ok(self.end(EndReason::ContextFull)),
            Err(e) => return Err(e),
        }
        let token = self.sampler.sample(&mut self.logits)?;
        self.sampler.accept(token);
        let elapsed = started.elapsed();
        match first {
            true => self.stats.prefill += elapsed,
            false => self.stats.decode += elapsed,
        }
        let tokenizer = self.session.model().tokenizer();
        if !self.options.ignore_end && tokenizer.is_end_of_generation(token) {
            return Ok(self.end(EndReason::EndOfText));
        }
        self.stats.output_tokens += 1;
        self.pending.clear();
        self.pending.push(token);
        let bytes = tokenizer.token_bytes(token, self.options.special).unwrap_or_default();
        let text = self.stream.push(bytes);
        self.held.push_str(&text);
        if let Some(at) = self.options.stop.iter().filter(|s| !s.is_empty()).filter_map(|s| self.held.find(s)).min() {
            self.held.truncate(at);
            return Ok(self.end(EndReason::Stop).map(|piece| Piece { token: Some(token), ..piece }));
        }
        let keep = self.options.stop.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let text = self.held.drain(..self.held.len() - keep).collect();
        Ok(Some(Piece { text, token: Some(token) }))
    }

    fn end(&mut self, reason: EndReason) -> Option<Piece> {
        self.stats.end = Some(reason);
        let mut text = std::mem::take(&mut self.held);
        if reason != EndReason::Stop {
            text.push_str(&self.stream.finish());
        }
        (!text.is_empty()).then_some(Piece { text, token: None })
    }
}

/// Length in bytes of the longest end of `text` that is a proper start of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices().map(|(i, _)| i).skip(1).filter(|n| text.ends_with(&stop[..*n])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::overlap;

    #[test]
    fn overlap_finds_the_longest_started_stop_text() {
        assert_eq!(overlap("abc<|e", "<|end|>"), 3);
        assert_eq!(overlap("abc", "<|end|>"), 0);
        assert_eq!(overlap("答", "答案"), 3);
        assert_eq!(overlap("aab", "abab"), 2);
    }
}
