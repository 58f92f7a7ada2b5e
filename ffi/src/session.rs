//! Sessions: one conversation with its window of tokens.

use std::ffi::c_char;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kinglet_engine::quant::DType;
use kinglet_engine::session::{CancelHandle, Model, ScaledAdapter, Session, SessionOptions};

use crate::adapter::kinglet_adapter;
use crate::args::{self, Versioned};
use crate::fence::{
    Failure, KINGLET_ERR_CANCELLED, KINGLET_ERR_TOO_SMALL, KINGLET_ERR_UNSUPPORTED, KINGLET_OK, Outcome, enter,
    enter_after, fence, fence_void, kinglet_error, kinglet_status,
};
use crate::gate::suspended;
use crate::model::{Settings, Shared, kinglet_memory, kinglet_model};
use crate::slot::Slot;

/// Keys and values in half precision, the default.
pub const KINGLET_KV_F16: i32 = 1;
/// Keys and values in single precision.
pub const KINGLET_KV_F32: i32 = 2;
/// Keys and values in 8 bits, at half the memory of the default.
pub const KINGLET_KV_Q8_0: i32 = 3;

/// How a session is set up; all zeros is a good default.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types)]
pub struct kinglet_session_options {
    /// `sizeof(kinglet_session_options)`.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Tokens that the window holds; 0 for as many as the model was trained for.
    pub context_tokens: i32,
    /// `KINGLET_KV_*`; 0 for the default.
    pub kv_type: i32,
    /// Most tokens of a prompt that are computed at once; 0 for 512.
    pub chunk_tokens: i32,
    /// 0.
    pub reserved: i32,
}

// SAFETY: `repr(C)`, a `u32` first, numbers only.
unsafe impl Versioned for kinglet_session_options {
    const NAME: &'static str = "kinglet_session_options";
}

/// A session; free in any order.
#[allow(non_camel_case_types)]
pub struct kinglet_session {
    pub(crate) model: Model,
    pub(crate) slot: Mutex<Slot>,
    /// Held by whoever gives the session's memory back, for as long as it is in the slot.
    trimming: Mutex<()>,
    pub(crate) cancel: CancelHandle,
    pub(crate) shared: Arc<Shared>,
}

impl kinglet_session {
    fn new(session: Session, shared: &Arc<Shared>) -> Arc<kinglet_session> {
        let session = Arc::new(kinglet_session {
            model: session.model().clone(),
            cancel: session.cancel_handle(),
            slot: Mutex::new(Slot::new(session)),
            trimming: Mutex::default(),
            shared: shared.clone(),
        });
        shared.add(&session);
        session
    }

    /// The inside, for a call of the caller's on this session.
    ///
    /// # Errors
    /// As [`enter`].
    pub(crate) fn enter(&self) -> Outcome<MutexGuard<'_, Slot>> {
        enter_after(&self.trimming, &self.slot, "session")
    }

    /// Runs `body`, which reads tokens and may be cancelled, on a session that nobody else uses. Logits of before are gone
    /// if the window has changed.
    fn compute<T>(&self, body: impl FnOnce(&mut Session, &mut Vec<f32>) -> Outcome<T>) -> Outcome<T> {
        let mut slot = self.enter()?;
        let (session, logits) = slot.idle_with_logits()?;
        self.cancel.reset();
        let pass = self.shared.gate.enter(Some(&self.cancel))?;
        let before = session.position();
        let result = body(session, logits);
        match result {
            Err(_) if session.position() != before => logits.clear(),
            _ => {}
        }
        match result {
            // What was asked to stop by suspending is to be called again.
            Err(failure) if failure.code == KINGLET_ERR_CANCELLED && pass.stopped() => Err(suspended()),
            result => result,
        }
    }

    /// Gives back memory that can be had again, unless a call is running; gives its bytes.
    pub(crate) fn trim(&self) -> Outcome<u64> {
        let _trimming = self.trimming.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(mut slot) = enter(&self.slot, "session") else { return Ok(0) };
        let Ok(session) = slot.idle() else { return Ok(0) };
        Ok(session.trim()? as u64)
    }

    /// Gives back what it holds of a GPU, a generation's too; for a model that is suspended.
    pub(crate) fn park(&self) -> Outcome<()> {
        let _trimming = self.trimming.lock().unwrap_or_else(PoisonError::into_inner);
        // Nothing computes: whoever has the slot is soon done. One that has panicked is left as it is.
        let Ok(mut slot) = self.slot.lock() else { return Ok(()) };
        slot.park()
    }
}

/// The caller's options, in the engine's form.
///
/// # Safety
/// As [`args::read`].
pub(crate) unsafe fn session_options(
    options: *const kinglet_session_options,
    settings: &Settings,
) -> Outcome<SessionOptions> {
    // SAFETY: passed on.
    let options = unsafe { args::read(options)? };
    if options.flags != 0 || options.reserved != 0 {
        let what = "kinglet_session_options has flags or a reserved field set; leave them 0";
        return Err(Failure::new(KINGLET_ERR_UNSUPPORTED, what));
    }
    let default = SessionOptions::default();
    let kv_type = match options.kv_type {
        0 | KINGLET_KV_F16 => DType::F16,
        KINGLET_KV_F32 => DType::F32,
        KINGLET_KV_Q8_0 => DType::Q8_0,
        other => return Err(Failure::argument(format!("kv_type is {other}; it must be a KINGLET_KV_* value"))),
    };
    Ok(SessionOptions {
        context: args::count("context_tokens", options.context_tokens)?,
        threads: settings.threads,
        kv_type,
        chunk: match args::count("chunk_tokens", options.chunk_tokens)? {
            0 => default.chunk,
            chunk => chunk,
        },
        device: settings.device.clone(),
        gpu_layers: settings.gpu_layers,
        gpu_memory: settings.gpu_memory,
        gpu_import: settings.gpu_import,
        memory_budget: settings.memory_budget,
        prefix_cache: settings.prefix_cache.clone(),
        ..default
    })
}

/// Opens a session of `model`; `options` may be NULL.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_session_create(
    model: *const kinglet_model,
    options: *const kinglet_session_options,
    out: *mut *mut kinglet_session,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::place(out, "session")?;
            let model = args::handle(model, "model")?;
            let options = session_options(options, &model.settings)?;
            let _pass = model.shared.gate.enter(None)?;
            let session = Session::new(&model.model, &options)?;
            Ok(args::give_shared(out, kinglet_session::new(session, &model.shared)))
        })
    }
}

/// Gives up the session; a generation that is under way lives on. NULL is fine.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_session_free(session: *mut kinglet_session) {
    // SAFETY: the caller's promise.
    fence_void(|| unsafe { args::release(session) });
}

/// A second session that holds the same tokens, and shares their keys and values until one of the two writes.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_session_fork(
    session: *mut kinglet_session,
    out: *mut *mut kinglet_session,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::place(out, "session")?;
            let handle = args::handle(session, "session")?;
            let mut slot = handle.enter()?;
            let _pass = handle.shared.gate.enter(None)?;
            let fork = kinglet_session::new(slot.idle()?.fork()?, &handle.shared);
            fork.enter()?.adapter_bytes = slot.adapter_bytes;
            Ok(args::give_shared(out, fork))
        })
    }
}

/// Forgets all tokens.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_session_reset(
    session: *mut kinglet_session,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe { kinglet_session_rewind(session, 0, err) }
}

/// Keeps the first `n_tokens` tokens and forgets the rest.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_session_rewind(
    session: *mut kinglet_session,
    n_tokens: usize,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            let mut slot = args::handle(session, "session")?.enter()?;
            let (session, logits) = slot.idle_with_logits()?;
            session.rewind(n_tokens)?;
            logits.clear();
            Ok(KINGLET_OK)
        })
    }
}

/// How many tokens the window holds.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_session_token_count(
    session: *mut kinglet_session,
    count: *mut usize,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            let mut slot = args::handle(session, "session")?.enter()?;
            if count.is_null() {
                return Err(Failure::argument("the place for the count is NULL"));
            }
            count.write(slot.idle()?.position());
            Ok(KINGLET_OK)
        })
    }
}

/// The memory that the session takes now.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_session_memory(
    session: *mut kinglet_session,
    out: *mut kinglet_memory,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::check_out(out)?;
            let mut slot = args::handle(session, "session")?.enter()?;
            let session = slot.idle()?;
            let mut estimate = session.needs();
            estimate.kv_cache = session.cache_bytes() as u64;
            estimate.adapters = slot.adapter_bytes as u64;
            args::write(out, &kinglet_memory::new(estimate))?;
            Ok(KINGLET_OK)
        })
    }
}

/// Puts adapters, each times its scale, in force in place of those before; none for the model as it is. `scales` may be
/// NULL: all 1. Another set than before empties the window.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_session_set_adapters(
    session: *mut kinglet_session,
    adapters: *const *const kinglet_adapter,
    scales: *const f32,
    n_adapters: usize,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            let mut slot = args::handle(session, "session")?.enter()?;
            let adapters = scaled(adapters, scales, n_adapters)?;
            let (session, logits) = slot.idle_with_logits()?;
            let report = session.set_adapters(&adapters)?;
            logits.clear();
            slot.adapter_bytes = report.bytes;
            Ok(KINGLET_OK)
        })
    }
}

/// Adapters of the caller's with their factors.
///
/// # Safety
/// The arrays have `count` elements, `scales` may be NULL, and the handles are alive.
pub(crate) unsafe fn scaled(
    adapters: *const *const kinglet_adapter,
    scales: *const f32,
    count: usize,
) -> Outcome<Vec<ScaledAdapter>> {
    // SAFETY: passed on.
    unsafe {
        let adapters = args::array(adapters, count, "adapters")?;
        let scales = match scales.is_null() {
            true => vec![1.0; count],
            false => args::array(scales, count, "scales")?.to_vec(),
        };
        let one = |(adapter, scale)| Ok((args::handle::<kinglet_adapter>(adapter, "adapter")?.adapter.clone(), scale));
        adapters.iter().copied().zip(scales).map(one).collect()
    }
}

/// Appends tokens to the window; `kinglet_session_logits` then gives what may come next.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_session_feed(
    session: *mut kinglet_session,
    tokens: *const i32,
    n_tokens: usize,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            let handle = args::handle(session, "session")?;
            let tokens = args::tokens(args::array(tokens, n_tokens, "tokens")?)?;
            handle.compute(|session, logits| {
                let next = session.feed(&tokens)?;
                logits.clear();
                logits.extend_from_slice(next);
                Ok(KINGLET_OK)
            })
        })
    }
}

/// The logits behind the last token that was fed, one for each token of the vocabulary.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_session_logits(
    session: *mut kinglet_session,
    out: *mut f32,
    capacity: usize,
    count: *mut usize,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            let mut slot = args::handle(session, "session")?.enter()?;
            let (_, logits) = slot.idle_with_logits()?;
            if logits.is_empty() {
                return Err(Failure::argument("there are no logits; call kinglet_session_feed first"));
            }
            args::give_array(logits, out, capacity, count)
        })
    }
}

/// Appends tokens to the window and gives `ln p` of each but the first: `n_tokens - 1` numbers.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_session_score(
    session: *mut kinglet_session,
    tokens: *const i32,
    n_tokens: usize,
    logprobs: *mut f32,
    capacity: usize,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            let handle = args::handle(session, "session")?;
            let tokens = args::tokens(args::array(tokens, n_tokens, "tokens")?)?;
            if tokens.len() < 2 {
                return Err(Failure::argument("at least 2 tokens are needed: the first is what the second follows"));
            }
            if tokens.len() - 1 > capacity || logprobs.is_null() {
                let what = format!("the array holds {capacity} numbers, but there will be {}", tokens.len() - 1);
                return Err(Failure::new(KINGLET_ERR_TOO_SMALL, what));
            }
            let scores = handle.compute(|session, logits| {
                let scores = session.score(&tokens, 0)?;
                logits.clear();
                Ok(scores)
            })?;
            let scores: Vec<f32> = scores.into_iter().map(|nll| -nll).collect();
            args::give_array(&scores, logprobs, capacity, std::ptr::null_mut())
        })
    }
}

/// What a text means, as a direction of length 1; the window is left as it is.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_session_embed(
    session: *mut kinglet_session,
    tokens: *const i32,
    n_tokens: usize,
    out: *mut f32,
    capacity: usize,
    count: *mut usize,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            let handle = args::handle(session, "session")?;
            let tokens = args::tokens(args::array(tokens, n_tokens, "tokens")?)?;
            let width = handle.model.spec().width;
            if capacity < width {
                // Without computing it first.
                return args::give_array(&vec![0f32; width], out, capacity, count);
            }
            let embedding = handle.compute(|session, _| Ok(session.embed(&tokens)?))?;
            args::give_array(&embedding, out, capacity, count)
        })
    }
}

/// Writes the window to a file, whole or not at all.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_session_save(
    session: *mut kinglet_session,
    path: *const c_char,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            let mut slot = args::handle(session, "session")?.enter()?;
            slot.idle()?.save(args::text(path, "path")?, "")?;
            Ok(KINGLET_OK)
        })
    }
}

/// Takes the window from a file of `kinglet_session_save`, in place of this one.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_session_load(
    session: *mut kinglet_session,
    path: *const c_char,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            let handle = args::handle(session, "session")?;
            let mut slot = handle.enter()?;
            let _pass = handle.shared.gate.enter(None)?;
            let (session, logits) = slot.idle_with_logits()?;
            session.load(args::text(path, "path")?)?;
            logits.clear();
            Ok(KINGLET_OK)
        })
    }
}

/// Stops the call on the session that is running on another thread: it returns `KINGLET_ERR_CANCELLED`. Where none is,
/// nothing happens. One atomic store.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_session_cancel(session: *const kinglet_session) {
    // SAFETY: the caller's promise.
    if let Some(session) = unsafe { session.as_ref() } {
        session.cancel.cancel();
    }
}
