//! Generation: prefill, then one token after the other, as a pull iterator of whole UTF-8 text.
//!
//! With [`Speculation`] a run of the tape takes the last token and guesses of what follows it; the rows' logits are then
//! sampled from in order for as long as the guesses prove right. The sampler sees the same logits in the same order as
//! without, so nothing about the answer changes.

use super::answer::Answer;
use super::speculate::Speculator;
use super::{EndReason, GenerateOptions, GenerationStats, Piece, Session, Speculation};
use crate::system::Stopwatch;
use crate::{Error, Result};

/// A running generation. Dropping it stops it; the session keeps what was fed.
#[derive(Debug)]
pub struct Generation<'s> {
    session: &'s mut Session,
    answer: Answer,
    speculator: Option<Speculator>,
    /// Tokens of the next run, or of the last: those that are part of the text, then guesses, which are on trial.
    tokens: Vec<u32>,
    /// Where the guesses begin.
    drafts: usize,
    /// The row of the last run's results to sample from next: so many guesses were right. None when there is none.
    row: Option<usize>,
}

impl<'s> Generation<'s> {
    pub(super) fn new(session: &'s mut Session, prompt: &[u32], options: GenerateOptions) -> Result<Generation<'s>> {
        let mut answer = Answer::new(session.model(), session.options().context, prompt, options)?;
        let speculator = match answer.options().speculation {
            Speculation::Off => None,
            kind => Some(Speculator::new(kind, session, &answer.sampler)?),
        };
        // The last token is fed again even if it is held: its logits are what comes next.
        let reused = session.reuse_prefix(&prompt[..prompt.len() - 1]);
        session.cancel_handle().reset();
        answer.stats.reused_tokens = reused;
        let tokens = prompt[reused..].to_vec();
        Ok(Generation { session, answer, speculator, drafts: tokens.len(), tokens, row: None })
    }

    /// Counts and times so far.
    pub fn stats(&self) -> &GenerationStats {
        &self.answer.stats
    }

    /// The session.
    pub fn session(&self) -> &Session {
        self.session
    }

    /// As [`Session::park`].
    ///
    /// # Errors
    /// As [`Session::park`].
    pub fn park(&mut self) -> Result<u64> {
        self.session.park()
    }

    /// The next piece, or `None` at the end; [`GenerationStats::end`] says why then.
    ///
    /// # Errors
    /// Whatever stops the computation but a full context and cancellation, which are ends.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<Piece<'_>>> {
        if self.answer.stats.end.is_some() {
            return Ok(None);
        }
        if self.answer.room() == 0 {
            return Ok(self.answer.end(EndReason::Length));
        }
        let started = Stopwatch::start();
        let first = self.answer.stats.output_tokens == 0;
        let token = match self.token() {
            Ok(token) => token,
            Err(Error::Cancelled) => return Ok(self.answer.end(EndReason::Cancelled)),
            Err(Error::ContextFull { .. }) if !first => return Ok(self.answer.end(EndReason::ContextFull)),
            Err(e) => return Err(e),
        };
        let stats = &mut self.answer.stats;
        *if first { &mut stats.prefill } else { &mut stats.decode } += started.elapsed();
        Ok(self.answer.add(self.session.model(), token))
    }

    /// The next token: from a row that is there, or from a new run.
    fn token(&mut self) -> Result<u32> {
        let row = match self.row {
            Some(row) => row,
            None => self.compute()?,
        };
        self.row = Some(row);
        let token = match self.session.largest(row) {
            Some(largest) => self.answer.choose_among(largest)?,
            None => self.answer.choose(self.session.logits_row(row)?)?,
        };
        if self.tokens.get(self.drafts + row) == Some(&token) {
            self.answer.stats.accepted_tokens += 1;
            self.row = Some(row + 1);
        } else {
            self.settle();
            self.tokens.clear();
            self.tokens.push(token);
            self.drafts = 1;
        }
        Ok(token)
    }

    /// Feeds the tokens, and guesses behind them if there are any; gives the first row.
    fn compute(&mut self) -> Result<usize> {
        let done = self.make_room().and_then(|()| self.guess()).and_then(|()| match self.tokens[..] {
            [token] => self.session.feed_one(token, self.answer.largest()),
            _ if self.tokens.len() == self.drafts => self.session.feed(&self.tokens).map(|_| ()),
            _ => self.session.feed_alone(&self.tokens),
        });
        match done {
            Ok(()) if self.answer.stats.output_tokens == 0 => self.session.remember(),
            Ok(()) => self.answer.stats.drafted_tokens += self.tokens.len() - self.drafts,
            Err(_) => self.tokens.truncate(self.drafts),
        }
        done.map(|()| 0)
    }

    /// Drops a part of a full window, if that is wanted.
    fn make_room(&mut self) -> Result<()> {
        if self.session.room() > 0 || self.drafts > 1 {
            return Ok(());
        }
        let (held, session) = (self.session.position(), &mut *self.session);
        self.answer.make_room(held, |keep, drop| session.shift(keep, drop))
    }

    fn guess(&mut self) -> Result<()> {
        let Some(speculator) = &mut self.speculator else { return Ok(()) };
        if self.drafts > 1 {
            // The prompt: kernels for many rows compute it, not those that check guesses.
            return speculator.prepare(self.session, &self.tokens);
        }
        // A token comes in any case; a guess has to fit the window, and be of use.
        let room = self.session.room().saturating_sub(1).min(self.answer.room() - 1);
        speculator.draft(self.session, &self.answer.sampler, room, &mut self.tokens)
    }

    /// Drops the guesses that were wrong, or not looked at, from the window.
    fn settle(&mut self) {
        let drafted = self.tokens.len() - self.drafts;
        if let Some(right) = self.row.take()
            && drafted > 0
        {
            self.session.forget(drafted - right);
            self.tokens.truncate(self.drafts);
            if let Some(speculator) = &mut self.speculator {
                speculator.learn(drafted, right);
            }
        }
    }
}

impl Drop for Generation<'_> {
    fn drop(&mut self) {
        self.settle();
    }
}
