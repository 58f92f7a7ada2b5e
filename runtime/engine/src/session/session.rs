//! One conversation: an engine with one sequence.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::engine::Wanted;
use super::saved;
use super::speculate::same_vocabulary;
use super::{
    AdapterReport, Engine, Estimate, GenerateOptions, Generation, Model, ScaledAdapter, Sequence, SessionOptions,
};
use crate::tape::Timing;
use crate::{Error, Result};

/// Stops what a session is doing, from any thread: the running call ends with [`Error::Cancelled`] between two ops.
#[derive(Clone, Debug, Default)]
pub struct CancelHandle(Arc<AtomicBool>);

impl CancelHandle {
    /// Asks to stop. One atomic store: safe in a signal handler.
    // Inlined, so that a caller's proof that it cannot unwind sees the store.
    #[inline]
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Withdraws the wish.
    pub fn reset(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// The flag itself, which [`Engine::step`] looks at between two ops.
    pub fn flag(&self) -> &AtomicBool {
        &self.0
    }

    /// Whether it was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A model, a window of tokens, and what may be asked of them.
#[derive(Debug)]
pub struct Session {
    engine: Engine,
    sequence: Sequence,
    cancel: CancelHandle,
    /// A smaller model that guesses ahead.
    draft: Option<Box<Session>>,
}

impl Session {
    /// Opens a session.
    ///
    /// # Errors
    /// Parameters out of range, [`Error::Memory`] with figures when over budget.
    pub fn new(model: &Model, options: &SessionOptions) -> Result<Session> {
        let engine = Engine::new(model, options)?;
        let sequence = engine.sequence();
        Ok(Session { engine, sequence, cancel: CancelHandle::default(), draft: None })
    }

    /// The memory [`Session::new`] with the same arguments will come to need, as [`Engine::estimate`] says it.
    ///
    /// # Errors
    /// As [`Engine::estimate`].
    pub fn estimate(model: &Model, options: &SessionOptions) -> Result<Estimate> {
        Engine::estimate(model, options)
    }

    /// The memory that this session comes to need, adapters apart: what [`Session::estimate`] said of it.
    pub fn needs(&self) -> Estimate {
        self.engine.needs()
    }

    /// The model.
    pub fn model(&self) -> &Model {
        self.engine.model()
    }

    /// The options in force, with zeros replaced by what they stand for.
    pub fn options(&self) -> &SessionOptions {
        self.engine.options()
    }

    /// Tokens in the window.
    pub fn position(&self) -> usize {
        self.sequence.tokens.len()
    }

    /// The tokens in the window.
    pub fn tokens(&self) -> &[u32] {
        &self.sequence.tokens
    }

    /// Bytes of the KV cache in use.
    pub fn cache_bytes(&self) -> usize {
        self.sequence.cache_bytes()
    }

    /// Forgets all tokens from position `len` on.
    ///
    /// # Errors
    /// `len` beyond the tokens held.
    pub fn rewind(&mut self, len: usize) -> Result<()> {
        if len > self.position() {
            return Err(Error::argument(format!("cannot rewind to token {len}: the window holds {}", self.position())));
        }
        self.sequence.truncate(len);
        Ok(())
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.sequence.truncate(0);
    }

    /// A second session that holds the same tokens, under the same adapters: it shares their keys and values until one of
    /// the two writes, on a GPU the weights too, and has threads and activations of its own.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`].
    pub fn fork(&self) -> Result<Session> {
        let mut engine = self.engine.fork()?;
        engine.set_adapters(self.adapters())?;
        Ok(Session { engine, sequence: self.sequence.clone(), cancel: CancelHandle::default(), draft: None })
    }

    /// Keeps the longest common start of the window and `tokens`, forgets the rest, and says how long it is.
    pub fn keep_prefix(&mut self, tokens: &[u32]) -> usize {
        let common = self.sequence.common_prefix(tokens);
        self.sequence.truncate(common);
        common
    }

    /// As [`Session::keep_prefix`], but takes the start from the prefix cache where that has more of it.
    pub fn reuse_prefix(&mut self, tokens: &[u32]) -> usize {
        if let Some(longer) = self.engine.recall(tokens, self.sequence.common_prefix(tokens)) {
            self.sequence = longer;
        }
        self.keep_prefix(tokens)
    }

    /// Keeps the window in the prefix cache, if there is one.
    pub(super) fn remember(&self) {
        self.engine.remember(&self.sequence);
    }

    /// Makes room: forgets `drop` tokens from token `keep` on; see [`Engine::shift`].
    ///
    /// # Errors
    /// As [`Engine::shift`].
    pub fn shift(&mut self, keep: usize, drop: usize) -> Result<()> {
        self.engine.shift(&mut self.sequence, keep, drop)
    }

    /// Writes the window to `path`, whole or not at all, with `note`, which is the caller's own; [`Session::load`] gives it
    /// back. What the file holds is in the text of the module `saved`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Device`] on a GPU.
    pub fn save(&self, path: impl AsRef<Path>, note: &str) -> Result<()> {
        saved::save(&self.engine, &self.sequence, note, path.as_ref())
    }

    /// Takes the window from a file of [`Session::save`], in place of this one, and gives the note. What is generated then
    /// is what the session that was saved would have generated.
    ///
    /// # Errors
    /// A file that is no session's, is cut short or damaged; one of another model, type of cache or set of adapters, or too
    /// long for this window: the message says which. The window is as before then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<String> {
        let (sequence, note) = saved::load(&mut self.engine, path.as_ref())?;
        self.sequence = sequence;
        Ok(note)
    }

    /// A handle that stops calls on this session.
    pub fn cancel_handle(&self) -> CancelHandle {
        self.cancel.clone()
    }

    /// Appends `tokens` to the window, in chunks, and gives the logits after the last one: `[vocab]`.
    ///
    /// # Errors
    /// No tokens, ids outside the vocabulary, a full context, [`Error::Cancelled`] (whole chunks that were done stay).
    pub fn feed(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.feed_with(tokens, |_| {})
    }

    /// As [`Session::feed`]; `progress` is called with the number of tokens done after each chunk.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn feed_with(&mut self, tokens: &[u32], mut progress: impl FnMut(usize)) -> Result<&[f32]> {
        let Some(last_chunk) = self.check(tokens)? else {
            return Err(Error::argument("there are no tokens to feed"));
        };
        let (head, tail) = tokens.split_at(last_chunk);
        let mut done = 0;
        for chunk in head.chunks(self.options().chunk) {
            self.engine.feed(&mut [(&mut self.sequence, chunk)], &self.cancel.0)?;
            done += chunk.len();
            progress(done);
        }
        let logits = self.engine.step(&mut [(&mut self.sequence, tail)], &self.cancel.0)?;
        Ok(logits)
    }

    /// Appends `tokens` and hands the logits behind each of them to `row(index, logits)`.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn logits(&mut self, tokens: &[u32], row: impl FnMut(usize, &[f32])) -> Result<()> {
        self.rows(tokens, false, row)
    }

    /// As [`Session::logits`], but each token is computed as if it were fed by itself: on the CPU the logits are bit by bit
    /// those of feeding one token after the other. Meant for few tokens: it is the slower way for many.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn logits_alone(&mut self, tokens: &[u32], row: impl FnMut(usize, &[f32])) -> Result<()> {
        self.rows(tokens, true, row)
    }

    fn rows(&mut self, tokens: &[u32], alone: bool, mut row: impl FnMut(usize, &[f32])) -> Result<()> {
        self.check(tokens)?;
        let (rows, vocab) = (self.options().logit_rows, self.model().spec().vocab);
        for (i, chunk) in tokens.chunks(rows).enumerate() {
            let logits = self.engine.run(&mut [(&mut self.sequence, chunk)], Wanted::All, alone, &self.cancel.0)?;
            for (j, logits) in logits.chunks_exact(vocab).enumerate() {
                row(i * rows + j, logits);
            }
        }
        Ok(())
    }

    /// Appends `tokens` and gives `−ln p(tokens[i + 1] | everything up to tokens[i])` for `i` from `from` to the last
    /// but one, in nats.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn score(&mut self, tokens: &[u32], from: usize) -> Result<Vec<f32>> {
        self.check(tokens)?;
        let mut scores = Vec::with_capacity(tokens.len().saturating_sub(from + 1));
        let mut start = 0;
        for chunk in tokens.chunks(self.options().chunk) {
            let wanted = start.max(from)..(start + chunk.len()).min(tokens.len() - 1);
            let outputs: Vec<u32> = wanted.clone().map(|i| (i - start) as u32).collect();
            let targets: Vec<u32> = wanted.map(|i| tokens[i + 1]).collect();
            let feeds = &mut [(&mut self.sequence, chunk)];
            let wanted = Wanted::Scores { outputs: &outputs, targets: &targets };
            scores.extend_from_slice(self.engine.run(feeds, wanted, false, &self.cancel.0)?);
            start += chunk.len();
        }
        Ok(scores)
    }

    /// What a text means, as a direction: the mean, over all of its tokens, of the states that the head would read, scaled to
    /// length 1: `[width]`. The window is left as it is; the text's keys and values are beside it meanwhile.
    ///
    /// # Errors
    /// No tokens, ids outside the vocabulary, more tokens than a window holds, [`Error::Cancelled`]; [`Error::Numeric`] where
    /// the mean has no direction.
    pub fn embed(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        if tokens.is_empty() {
            return Err(Error::argument("there are no tokens to embed"));
        }
        let window = self.options().context;
        if tokens.len() > window {
            return Err(Error::ContextFull { window, used: 0, asked: tokens.len() });
        }
        let mut sequence = self.engine.sequence();
        let mut sum = vec![0f64; self.model().spec().width];
        for chunk in tokens.chunks(self.options().chunk) {
            let states = self.engine.run(&mut [(&mut sequence, chunk)], Wanted::States, false, &self.cancel.0)?;
            for state in states.chunks_exact(sum.len()) {
                sum.iter_mut().zip(state).for_each(|(sum, x)| *sum += f64::from(*x));
            }
        }
        let length = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
        match length.is_normal() {
            true => Ok(sum.iter().map(|x| (x / length) as f32).collect()),
            false => Err(Error::Numeric("the states of the text have no mean direction".into())),
        }
    }

    /// Gives back the memory that only computing needs, logits with it; the next call takes it anew. Gives its bytes.
    ///
    /// # Errors
    /// None but [`Error::Memory`], for a handful of bytes; [`Error::Device`] on a GPU.
    pub fn trim(&mut self) -> Result<usize> {
        self.engine.trim()
    }

    /// Gives the memory of a GPU back, that of forks and of the model that guesses ahead too, but for weights that other
    /// sessions use: keys and values wait in main memory, and the next call brings them and the weights up again. Gives its
    /// bytes; the CPU has none to give.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`]; the next call finds everything all the same.
    pub fn park(&mut self) -> Result<u64> {
        let draft = self.draft.as_mut().map_or(Ok(0), |draft| draft.park())?;
        Ok(draft + self.engine.park()?)
    }

    /// As [`Session::logits_alone`], for no more than `logit_rows` tokens, whose logits are then there as
    /// [`Session::logits_row`].
    pub(super) fn feed_alone(&mut self, tokens: &[u32]) -> Result<()> {
        self.check(tokens)?;
        self.engine.run(&mut [(&mut self.sequence, tokens)], Wanted::All, true, &self.cancel.0)?;
        Ok(())
    }

    /// A row of the logits of the last run, the sampler's to change.
    ///
    /// # Errors
    /// As [`Engine::logits_row`].
    pub(super) fn logits_row(&mut self, row: usize) -> Result<&mut [f32]> {
        self.engine.logits_row(row)
    }

    /// As [`Engine::largest`].
    pub(super) fn largest(&self, row: usize) -> Option<&[(u32, f32)]> {
        self.engine.largest(row)
    }

    /// As [`Session::feed`], for one token, of whose logits the `largest` decide; 0 where all do. They are there as
    /// [`Session::largest`] or [`Session::logits_row`].
    pub(super) fn feed_one(&mut self, token: u32, largest: usize) -> Result<()> {
        self.check(&[token])?;
        let wanted = Wanted::Logits { outputs: &[0], largest };
        self.engine.run(&mut [(&mut self.sequence, &[token])], wanted, false, &self.cancel.0)?;
        Ok(())
    }

    /// Tokens that the window still has room for.
    pub(super) fn room(&self) -> usize {
        self.options().context - self.position()
    }

    /// Forgets the last `n` tokens.
    pub(super) fn forget(&mut self, n: usize) {
        self.sequence.truncate(self.position().saturating_sub(n));
    }

    /// Checks that all of `tokens` fit the window; gives where the last chunk begins.
    fn check(&self, tokens: &[u32]) -> Result<Option<usize>> {
        let (window, used) = (self.options().context, self.position());
        if used + tokens.len() > window {
            return Err(Error::ContextFull { window, used, asked: tokens.len() });
        }
        Ok(tokens.len().checked_sub(1).map(|last| last / self.options().chunk * self.options().chunk))
    }

    /// Starts generating after `prompt`, which is the whole conversation: what the window already holds of it is not
    /// computed again.
    ///
    /// # Errors
    /// Sampler parameters out of range, a prompt that is empty or longer than the window.
    pub fn generate(&mut self, prompt: &[u32], options: GenerateOptions) -> Result<Generation<'_>> {
        Generation::new(self, prompt, options)
    }

    /// Lets the model of `draft`, which is smaller and has the same vocabulary, guess ahead for
    /// [`Speculation::Model`](super::Speculation::Model); none takes the last one away. Cancelling this session stops it too. Its window should be as long as this one's:
    /// where it is full, there are no guesses.
    ///
    /// # Errors
    /// Vocabularies that differ: the message names the first difference.
    pub fn set_draft(&mut self, draft: Option<Session>) -> Result<()> {
        self.draft = match draft {
            None => None,
            Some(mut draft) => {
                same_vocabulary(self.model(), draft.model())?;
                draft.cancel = self.cancel.clone();
                Some(Box::new(draft))
            }
        };
        Ok(())
    }

    /// The session that guesses ahead, with this one's tokens beside it.
    pub(super) fn with_draft(&mut self) -> (Option<&mut Session>, &[u32]) {
        (self.draft.as_deref_mut(), &self.sequence.tokens)
    }

    /// Puts `adapters`, each times its factor, in force in place of those before; none for the base model. When the set
    /// differs from the one before, the window is emptied: its keys and values belong to the other weights.
    ///
    /// # Errors
    /// As [`Engine::set_adapters`]; the set before stays in force then, and the window as it is.
    pub fn set_adapters(&mut self, adapters: &[ScaledAdapter]) -> Result<AdapterReport> {
        let changed = !super::adapters::same(adapters, self.engine.adapters());
        let report = self.engine.set_adapters(adapters)?;
        if changed {
            self.reset();
        }
        Ok(report)
    }

    /// The adapters in force.
    pub fn adapters(&self) -> &[ScaledAdapter] {
        self.engine.adapters()
    }

    /// Time spent by kind of op since the last call.
    pub fn take_timings(&mut self) -> Vec<Timing> {
        self.engine.take_timings()
    }

    /// Turns the op timing table on or off.
    pub fn set_timing(&mut self, on: bool) {
        self.engine.set_timing(on);
    }
}
