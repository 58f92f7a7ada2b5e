//! Continuous batching: many answers from one engine, decoded together, so that the weights are read once for all.
//!
//! Requests come and go between steps. A step is one run of the tape: a row for every answer that is being written, and
//! in what is left of the chunk, prompts of the requests that were admitted last, oldest first. As many requests are
//! admitted as the engine gives rows of logits ([`SessionOptions::logit_rows`]); the others wait.
//!
//! Rows of a run are computed with the kernels for so many, whose sums round in another order than those for one row: an
//! answer may part from the one it would be alone where two tokens are all but equally likely. With
//! [`Batcher::set_alone`] it does not, on the CPU: rows of answers then run apart from prompts, with the kernels for
//! single rows, and prompts in the chunks that a session cuts. That costs speed.
//!
//! [`SessionOptions::logit_rows`]: super::SessionOptions::logit_rows

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::answer::Answer;
use super::engine::Wanted;
use super::{CancelHandle, EndReason, Engine, GenerateOptions, GenerationStats, Sequence, Speculation};
use crate::system::Stopwatch;
use crate::{Error, Result};

/// A request's number, unique within its batcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

/// What a step has brought a request.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The request.
    pub request: RequestId,
    /// The next text of its answer: whole UTF-8, perhaps empty.
    pub text: &'a str,
    /// The token behind it; `None` for text that was held back and comes at the end.
    pub token: Option<u32>,
    /// Its counts and times; where [`GenerationStats::end`] is set, this was the last of it.
    pub stats: &'a GenerationStats,
}

/// Answers requests together. See the module's text.
#[derive(Debug)]
pub struct Batcher {
    engine: Engine,
    /// Admitted ones first, in the order they came.
    requests: Vec<Request>,
    next: u64,
    alone: bool,
    cancel: CancelHandle,
    /// Rows whose logits are wanted.
    outputs: Vec<u32>,
}

#[derive(Debug)]
struct Request {
    id: RequestId,
    sequence: Sequence,
    answer: Answer,
    /// Tokens that are not in the sequence yet: of the prompt, or the last that was chosen.
    pending: Vec<u32>,
    /// Whether it may be computed: as many are as there are rows of logits.
    admitted: bool,
    /// Tokens of `pending` in the run at hand.
    fed: usize,
}

impl Request {
    /// Whether its prompt is computed, so that its next row is a token of the answer.
    fn is_decoding(&self) -> bool {
        self.answer.stats.output_tokens > 0
    }
}

impl Batcher {
    /// A batcher that runs `engine`.
    pub fn new(engine: Engine) -> Batcher {
        Batcher {
            engine,
            requests: Vec::new(),
            next: 0,
            alone: false,
            cancel: CancelHandle::default(),
            outputs: Vec::new(),
        }
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// A handle that stops the step at hand; the requests stay as they are.
    pub fn cancel_handle(&self) -> CancelHandle {
        self.cancel.clone()
    }

    /// Whether every answer has to be what it would be alone, to the last bit.
    pub fn set_alone(&mut self, alone: bool) {
        self.alone = alone;
    }

    /// Requests that have not ended.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Takes a request in; its answer comes from the steps that follow. What the engine's prefix cache has of the prompt
    /// is not computed again.
    ///
    /// # Errors
    /// As [`Session::generate`](super::Session::generate); options that are for a single answer: speculation.
    pub fn submit(&mut self, prompt: &[u32], options: GenerateOptions) -> Result<RequestId> {
        if options.speculation != Speculation::Off {
            return Err(Error::Unsupported("guessing ahead for several answers at once; leave speculation off".into()));
        }
        let answer = Answer::new(self.engine.model(), self.engine.options().context, prompt, options)?;
        let id = RequestId(self.next);
        self.next += 1;
        let (sequence, pending) = (self.engine.sequence(), prompt.to_vec());
        self.requests.push(Request { id, sequence, answer, pending, admitted: false, fed: 0 });
        Ok(id)
    }

    /// Takes a request out, whatever it was doing; gives its counts, or nothing if it has ended or never was.
    pub fn cancel(&mut self, request: RequestId) -> Option<GenerationStats> {
        let at = self.requests.iter().position(|r| r.id == request)?;
        let mut stats = self.requests.remove(at).answer.stats;
        stats.end = Some(EndReason::Cancelled);
        Some(stats)
    }

    /// One step for all; `report` is called for each request that got a token or ended. False when there is nothing to do.
    ///
    /// # Errors
    /// [`Error::Cancelled`] (nothing has changed then), [`Error::Memory`]; [`Error::Numeric`] for logits that cannot be
    /// sampled from, whose request is taken out.
    pub fn step(&mut self, mut report: impl FnMut(Progress<'_>)) -> Result<bool> {
        self.make_room(&mut report)?;
        self.admit();
        if self.alone {
            // A prompt's chunk, then the answers.
            if let Some(at) = self.requests.iter().position(|r| r.admitted && !r.is_decoding()) {
                let chunk = self.engine.options().chunk;
                let request = &mut self.requests[at];
                request.fed = request.pending.len().min(chunk);
                self.run(false, &mut report)?;
            }
            self.requests.iter_mut().filter(|r| r.admitted && r.is_decoding()).for_each(|r| r.fed = 1);
            self.run(true, &mut report)?;
        } else {
            let mut rows = self.engine.options().chunk;
            for decoding in [true, false] {
                for request in self.requests.iter_mut().filter(|r| r.admitted && r.is_decoding() == decoding) {
                    request.fed = request.pending.len().min(rows);
                    rows -= request.fed;
                }
            }
            self.run(false, &mut report)?;
        }
        Ok(!self.requests.is_empty())
    }

    /// Steps until everything is answered.
    ///
    /// # Errors
    /// As [`Batcher::step`].
    pub fn run_all(&mut self, mut report: impl FnMut(Progress<'_>)) -> Result<()> {
        while self.step(&mut report)? {}
        Ok(())
    }

    /// Ends answers that are full, and makes room in windows that are, or ends those too.
    fn make_room(&mut self, report: &mut impl FnMut(Progress<'_>)) -> Result<()> {
        let window = self.engine.options().context;
        for request in self.requests.iter_mut().filter(|r| r.is_decoding() || r.answer.room() == 0) {
            let held = request.sequence.tokens().len();
            match request.answer.options().shift {
                _ if request.answer.room() == 0 => request.end(EndReason::Length, report),
                _ if held < window => {}
                Some(_) => {
                    let Request { sequence, answer, .. } = request;
                    answer.make_room(held, |keep, drop| self.engine.shift(sequence, keep, drop))?;
                }
                None => request.end(EndReason::ContextFull, report),
            }
        }
        self.requests.retain(|r| r.answer.stats.end.is_none());
        Ok(())
    }

    /// Lets as many requests in as there are rows of logits.
    fn admit(&mut self) {
        let most = self.engine.options().logit_rows;
        for request in self.requests.iter_mut().take(most).filter(|r| !r.admitted) {
            request.admitted = true;
            // The last token is fed even if it is held: its logits are what comes next.
            let prompt = &request.pending[..request.pending.len() - 1];
            request.sequence = self.engine.sequence_of(prompt);
            let reused = request.sequence.tokens().len();
            request.pending.drain(..reused);
            request.answer.stats.reused_tokens = reused;
        }
    }

    /// One run with what each request is to be fed, and a token for those whose pending tokens are through.
    fn run(&mut self, alone: bool, report: &mut impl FnMut(Progress<'_>)) -> Result<()> {
        let started = Stopwatch::start();
        self.outputs.clear();
        // As many as the one that looks at most, which may be all.
        let chosen = self.requests.iter().filter(|r| r.fed > 0 && r.fed == r.pending.len());
        let largest = chosen.map(|r| r.answer.largest().wrapping_sub(1)).max().map_or(0, |most| most.wrapping_add(1));
        let mut rows = 0;
        let mut feeds = Vec::with_capacity(self.engine.options().logit_rows);
        for request in self.requests.iter_mut().filter(|r| r.fed > 0) {
            rows += request.fed;
            if request.fed == request.pending.len() {
                self.outputs.push(rows as u32 - 1);
            }
            feeds.push((&mut request.sequence, &request.pending[..request.fed]));
        }
        if feeds.is_empty() {
            return Ok(());
        }
        let cancel: &AtomicBool = self.cancel.flag();
        let wanted = Wanted::Logits { outputs: &self.outputs, largest };
        let done = self.engine.run(&mut feeds, wanted, alone, cancel).map(|_| ());
        if done.is_err() {
            self.requests.iter_mut().for_each(|r| r.fed = 0);
            return done;
        }
        let elapsed = started.elapsed();
        let mut row = 0;
        let mut failed = None;
        for request in self.requests.iter_mut().filter(|r| r.fed > 0) {
            request.pending.drain(..std::mem::take(&mut request.fed));
            let chosen = request.pending.is_empty();
            if let Err(e) = request.take(&mut self.engine, chosen.then_some(row), elapsed, report) {
                request.answer.stats.end = Some(EndReason::Cancelled);
                failed = Some(e);
            }
            row += usize::from(chosen);
        }
        self.requests.retain(|r| r.answer.stats.end.is_none());
        failed.map_or(Ok(()), Err)
    }
}

impl Request {
    /// Counts a run of `elapsed`, and chooses a token by the logits of its `row`, if there is one.
    fn take(
        &mut self,
        engine: &mut Engine,
        row: Option<usize>,
        elapsed: Duration,
        report: &mut impl FnMut(Progress<'_>),
    ) -> Result<()> {
        let first = !self.is_decoding();
        let stats = &mut self.answer.stats;
        *if first { &mut stats.prefill } else { &mut stats.decode } += elapsed;
        let Some(row) = row else { return Ok(()) };
        if first {
            engine.remember(&self.sequence);
        }
        let token = match engine.largest(row) {
            Some(largest) => self.answer.choose_among(largest)?,
            None => self.answer.choose(engine.logits_row(row)?)?,
        };
        self.pending.push(token);
        let token = self.answer.add(engine.model(), token).and_then(|piece| piece.token);
        report(Progress { request: self.id, text: self.answer.text(), token, stats: &self.answer.stats });
        Ok(())
    }

    fn end(&mut self, reason: EndReason, report: &mut impl FnMut(Progress<'_>)) {
        self.answer.end(reason);
        report(Progress { request: self.id, text: self.answer.text(), token: None, stats: &self.answer.stats });
    }
}
