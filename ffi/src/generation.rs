//! Generation as a pull iterator: the prompt chunk by chunk, then token by token, then the end.
//!
//! A generation holds its session from `kinglet_generate` until it has given its last event, fails or is freed. Its state
//! is this file's; the session's engine is borrowed in [`Slot`](crate::slot::Slot).

use std::ffi::{c_char, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kinglet_engine::session::{EndReason, GenerateOptions};
use kinglet_engine::text::{Message, ToolParser};
use kinglet_engine::{Error, Stopwatch};
use serde_json::Value;

use crate::args::{self, Versioned};
use crate::fence::{
    Failure, KINGLET_DONE, KINGLET_ERR_SUSPENDED, KINGLET_OK, Outcome, enter, fence, fence_void, kinglet_error,
    kinglet_status, unusable,
};
use crate::gate::suspended;
use crate::request::{self, Asked};
use crate::session::kinglet_session;
use crate::slot::Slot;

/// A piece of the answer.
pub const KINGLET_EVENT_TEXT: i32 = 1;
/// A chunk of the prompt is done.
pub const KINGLET_EVENT_PREFILL: i32 = 2;
/// The end; `end_reason` says why.
pub const KINGLET_EVENT_END: i32 = 3;

/// The model ended its answer.
pub const KINGLET_END_OF_TEXT: i32 = 1;
/// `max_tokens` were generated.
pub const KINGLET_END_LENGTH: i32 = 2;
/// A stop text came up.
pub const KINGLET_END_STOP: i32 = 3;
/// The window is full.
pub const KINGLET_END_CONTEXT_FULL: i32 = 4;
/// It was cancelled.
pub const KINGLET_END_CANCELLED: i32 = 5;

/// What a call of `kinglet_generation_next` gave.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types)]
pub struct kinglet_event {
    /// `sizeof(kinglet_event)`.
    pub struct_size: u32,
    /// `KINGLET_EVENT_*`.
    pub kind: i32,
    /// Whole UTF-8, NUL-terminated; the library's until the next call on the generation. NULL where there is none.
    pub text: *const c_char,
    /// Its bytes, without the NUL; 0 while a character or a possible stop text is incomplete.
    pub text_len: usize,
    /// The tokens behind the text; the library's until the next call on the generation.
    pub tokens: *const i32,
    /// How many.
    pub n_tokens: usize,
    /// `KINGLET_END_*` at the end, else 0.
    pub end_reason: i32,
    /// Tokens of the prompt.
    pub prompt_tokens: i32,
    /// Of these, taken from the window without computing.
    pub reused_tokens: i32,
    /// Of these, in the window by now.
    pub prefilled_tokens: i32,
    /// Tokens generated so far.
    pub output_tokens: i32,
    /// 0.
    pub reserved: i32,
    /// Milliseconds for the prompt so far, the first token included.
    pub prefill_ms: f64,
    /// Milliseconds for the tokens behind the first so far.
    pub decode_ms: f64,
}

// SAFETY: `repr(C)`, a `u32` first, numbers and pointers.
unsafe impl Versioned for kinglet_event {
    const NAME: &'static str = "kinglet_event";
}

/// Gets each event, valid during the call; anything but 0 cancels.
#[allow(non_camel_case_types)]
pub type kinglet_event_callback = Option<unsafe extern "C" fn(user: *mut c_void, event: *const kinglet_event) -> i32>;

/// A generation; free in any order.
#[allow(non_camel_case_types)]
pub struct kinglet_generation {
    session: Arc<kinglet_session>,
    state: Mutex<State>,
    /// Somebody asked to stop. Kept beside the session's own flag, which the engine's generation clears when it begins.
    cancelled: AtomicBool,
    /// The session is not this generation's any more: cancelling would hit somebody else.
    over: AtomicBool,
}

/// Where a generation is.
enum Phase {
    /// Feeding the prompt.
    Prompt { tokens: Vec<u32>, options: Box<GenerateOptions> },
    /// Generating.
    Answer,
    /// Ended, which has not been told yet.
    Ended(EndReason),
    /// Told.
    Done,
    /// Failed; every further call says so.
    Failed(Failure),
}

struct State {
    phase: Phase,
    /// What the event in the caller's hands points to.
    text: Vec<u8>,
    token: i32,
    counts: Counts,
    /// The whole answer so far, and what tells calls of tools in it.
    answer: String,
    calls: Option<ToolParser>,
}

/// Counts and times so far.
#[derive(Clone, Copy, Default)]
struct Counts {
    prompt: usize,
    reused: usize,
    prefilled: usize,
    output: usize,
    /// For the chunks that were fed ahead of the engine's own generation.
    fed: Duration,
    prefill: Duration,
    decode: Duration,
}

impl kinglet_generation {
    /// Reads the request and takes the session.
    fn start(session: Arc<kinglet_session>, json: &str) -> Outcome<kinglet_generation> {
        let mut slot = session.enter()?;
        let window = slot.idle()?.options().context;
        let Asked { prompt: tokens, options, calls } = request::read(json, &session.model)?;
        match tokens.len() {
            0 => return Err(Failure::argument("the prompt has no tokens")),
            asked if asked > window => return Err(Error::ContextFull { window, used: 0, asked }.into()),
            _ => {}
        }
        // The last token is fed in any case: its logits are what comes next.
        let reused = slot.hold()?.reuse_prefix(&tokens[..tokens.len() - 1]);
        session.cancel.reset();
        drop(slot);
        let counts = Counts { prompt: tokens.len(), reused, prefilled: reused, ..Counts::default() };
        let phase = Phase::Prompt { tokens, options: Box::new(options) };
        let state = State { phase, text: Vec::new(), token: 0, counts, answer: String::new(), calls };
        Ok(kinglet_generation {
            session,
            state: Mutex::new(state),
            cancelled: AtomicBool::new(false),
            over: AtomicBool::new(false),
        })
    }

    /// The next event, or `None` when the end has been told.
    fn next(&self) -> Outcome<Option<kinglet_event>> {
        let mut state = enter(&self.state, "generation")?;
        match &state.phase {
            Phase::Done => return Ok(None),
            Phase::Failed(failure) => return Err(failure.clone()),
            Phase::Prompt { .. } | Phase::Answer => {
                // Who else asks for the session now is sent away at once: waiting for that takes no time.
                let mut slot = self.session.slot.lock().map_err(|_| unusable("session"))?;
                match state.advance(&mut slot, &self.cancelled, &self.session) {
                    Ok(Some(event)) => return Ok(Some(event)),
                    // Nothing has changed.
                    Err(failure) if failure.code == KINGLET_ERR_SUSPENDED => return Err(failure),
                    Ok(None) => self.give_back(&mut slot),
                    Err(failure) => {
                        self.give_back(&mut slot);
                        state.phase = Phase::Failed(failure.clone());
                        return Err(failure);
                    }
                }
            }
            Phase::Ended(_) => {}
        }
        let Phase::Ended(reason) = state.phase else { return Ok(None) };
        state.phase = Phase::Done;
        Ok(Some(kinglet_event { end_reason: number(reason), ..state.event(KINGLET_EVENT_END) }))
    }

    /// The answer so far as a message.
    fn message(&self) -> Outcome<Value> {
        let state = enter(&self.state, "generation")?;
        let message = match &state.calls {
            Some(calls) => calls.clone().message(&state.answer),
            None => Message::new("assistant", state.answer.as_str()),
        };
        let mut json = serde_json::to_value(&message)?;
        if message.content.is_empty() && !message.tool_calls.is_empty() {
            json["content"] = Value::Null;
        }
        Ok(json)
    }

    /// Ends the generation's hold on the session.
    fn give_back(&self, slot: &mut Slot) {
        self.over.store(true, Ordering::Relaxed);
        slot.let_go();
        self.session.cancel.reset();
    }

    fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        if !self.over.load(Ordering::Relaxed) {
            self.session.cancel.cancel();
        }
    }
}

impl Drop for kinglet_generation {
    fn drop(&mut self) {
        if !*self.over.get_mut()
            // A session in which a call panicked stays as it is.
            && let Ok(mut slot) = self.session.slot.lock()
        {
            slot.let_go();
            self.session.cancel.reset();
        }
    }
}

impl State {
    /// One chunk of the prompt, or one token; `None` at the end, which is in `phase` then.
    ///
    /// # Errors
    /// Whatever stops the computation; `KINGLET_ERR_SUSPENDED`, after which it can be called again.
    fn advance(
        &mut self,
        slot: &mut Slot,
        cancelled: &AtomicBool,
        owner: &kinglet_session,
    ) -> Outcome<Option<kinglet_event>> {
        let gate = &owner.shared.gate;
        if let Phase::Prompt { tokens, options } = &mut self.phase {
            let session = slot.feeding()?;
            let (at, chunk) = (session.position(), session.options().chunk);
            if tokens.len() - at > chunk {
                let pass = gate.enter(Some(&owner.cancel))?;
                let started = Stopwatch::start();
                let fed = session.feed(&tokens[at..at + chunk]).map(|_| ());
                self.counts.fed += started.elapsed();
                let stopped = pass.stopped() && !cancelled.load(Ordering::Acquire);
                if stopped {
                    owner.cancel.reset();
                    // Who asked meanwhile has said so before.
                    if cancelled.load(Ordering::Acquire) {
                        owner.cancel.cancel();
                    }
                }
                match fed {
                    Ok(()) => {}
                    // The chunk has not been read; the next call reads it.
                    Err(Error::Cancelled) if stopped => return Err(suspended()),
                    Err(Error::Cancelled) => {
                        self.phase = Phase::Ended(EndReason::Cancelled);
                        return Ok(None);
                    }
                    Err(error) => return Err(error.into()),
                }
                self.counts.prefilled = at + chunk;
                return Ok(Some(self.event(KINGLET_EVENT_PREFILL)));
            }
            let cancel = session.cancel_handle();
            slot.answer_to(tokens, (**options).clone())?;
            if cancelled.load(Ordering::Acquire) {
                cancel.cancel();
            }
            self.phase = Phase::Answer;
        }
        // Stopping would end the answer, and a token comes soon.
        let _pass = gate.enter(None)?;
        let generation = slot.answer()?;
        self.text.clear();
        let token = generation.next()?.map(|piece| {
            self.text.extend_from_slice(piece.text.as_bytes());
            self.answer.push_str(piece.text);
            piece.token
        });
        let stats = generation.stats();
        self.counts.output = stats.output_tokens;
        self.counts.prefilled = self.counts.prompt;
        (self.counts.prefill, self.counts.decode) = (stats.prefill, stats.decode);
        let Some(token) = token else {
            self.phase = Phase::Ended(stats.end.unwrap_or(EndReason::EndOfText));
            return Ok(None);
        };
        let text_len = self.text.len();
        self.text.push(0);
        self.token = token.unwrap_or(0) as i32;
        Ok(Some(kinglet_event {
            text: self.text.as_ptr().cast(),
            text_len,
            tokens: &raw const self.token,
            n_tokens: usize::from(token.is_some()),
            ..self.event(KINGLET_EVENT_TEXT)
        }))
    }

    /// An event without text, with the counts so far.
    fn event(&self, kind: i32) -> kinglet_event {
        let c = &self.counts;
        let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
        kinglet_event {
            struct_size: size_of::<kinglet_event>() as u32,
            kind,
            text: ptr::null(),
            text_len: 0,
            tokens: ptr::null(),
            n_tokens: 0,
            end_reason: 0,
            prompt_tokens: count(c.prompt),
            reused_tokens: count(c.reused),
            prefilled_tokens: count(c.prefilled),
            output_tokens: count(c.output),
            reserved: 0,
            prefill_ms: (c.fed + c.prefill).as_secs_f64() * 1e3,
            decode_ms: c.decode.as_secs_f64() * 1e3,
        }
    }
}

fn number(reason: EndReason) -> i32 {
    match reason {
        EndReason::EndOfText => KINGLET_END_OF_TEXT,
        EndReason::Length => KINGLET_END_LENGTH,
        EndReason::Stop => KINGLET_END_STOP,
        EndReason::ContextFull => KINGLET_END_CONTEXT_FULL,
        EndReason::Cancelled => KINGLET_END_CANCELLED,
    }
}

/// Begins to answer a request; nothing of the prompt is computed yet.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_generate(
    session: *mut kinglet_session,
    request_json: *const c_char,
    out: *mut *mut kinglet_generation,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::place(out, "generation")?;
            let session = args::share(session.cast_const(), "session")?;
            let json = args::text(request_json, "request_json")?;
            Ok(args::give(out, kinglet_generation::start(session, json)?))
        })
    }
}

/// Computes until there is something to tell: `KINGLET_OK` with an event, `KINGLET_DONE` behind the last.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_generation_next(
    generation: *mut kinglet_generation,
    event: *mut kinglet_event,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::check_out(event)?;
            match args::handle(generation.cast_const(), "generation")?.next()? {
                None => Ok(KINGLET_DONE),
                Some(next) => {
                    args::write(event, &next)?;
                    Ok(KINGLET_OK)
                }
            }
        })
    }
}

/// The answer so far as a message of the OpenAI API, calls of tools told from text.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_generation_message_json(
    generation: *mut kinglet_generation,
    out: *mut *mut c_char,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::place(out, "text")?;
            let message = args::handle(generation.cast_const(), "generation")?.message()?;
            args::give_json(out, &message)
        })
    }
}

/// Ends the generation, from any thread and from a signal handler: `kinglet_generation_next` stops between two operations
/// and gives the end. Atomic stores only.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_generation_cancel(generation: *const kinglet_generation) {
    // SAFETY: the caller's promise.
    if let Some(generation) = unsafe { generation.as_ref() } {
        generation.cancel();
    }
}

/// Ends the generation if it has not ended, and gives it up. NULL is fine.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_generation_free(generation: *mut kinglet_generation) {
    // SAFETY: the caller's promise.
    fence_void(|| unsafe { args::release(generation) });
}

/// As `kinglet_generate` and the pulling of all events, each of which `callback` gets on the caller's thread.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_generate_with(
    session: *mut kinglet_session,
    request_json: *const c_char,
    callback: kinglet_event_callback,
    user: *mut c_void,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            let Some(callback) = callback else { return Err(Failure::argument("callback is NULL")) };
            let session = args::share(session.cast_const(), "session")?;
            let generation = kinglet_generation::start(session, args::text(request_json, "request_json")?)?;
            while let Some(event) = generation.next()? {
                if callback(user, &event) != 0 {
                    generation.cancel();
                }
            }
            Ok(KINGLET_OK)
        })
    }
}
