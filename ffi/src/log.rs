//! The library's messages: silent by default, else through one callback of the caller's.
//!
//! Messages of this workspace's crates only. Those of panics come here too, instead of on standard error: a hook passes on
//! what panics inside a call of ours or on one of our threads, and leaves every other panic of the process to the hook
//! that was there before.

use std::cell::Cell;
use std::ffi::{c_char, c_void};
use std::panic;
use std::sync::{Once, OnceLock, PoisonError, RwLock, TryLockError};

use ::log::{LevelFilter, Log, Metadata, Record};

use crate::fence::{Failure, KINGLET_ERR_UNSUPPORTED, KINGLET_OK, fence, kinglet_error, kinglet_status};

/// Names of our threads begin so.
const THREADS: [&str; 2] = ["kinglet-", "chat template"];

/// Gets one message, NUL-terminated UTF-8, valid during the call. Level 1 is an error, 5 a trace.
#[allow(non_camel_case_types)]
pub type kinglet_log_callback = Option<unsafe extern "C" fn(user: *mut c_void, level: i32, message: *const c_char)>;

/// Where messages go.
struct Sink {
    callback: unsafe extern "C" fn(*mut c_void, i32, *const c_char),
    user: *mut c_void,
}

// SAFETY: the caller of `kinglet_set_log` promises that the callback may be called with `user` from any thread.
unsafe impl Send for Sink {}
// SAFETY: as above.
unsafe impl Sync for Sink {}

static SINK: RwLock<Option<Sink>> = RwLock::new(None);

struct ToCallback;

impl Log for ToCallback {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("kinglet")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        // Never waits: what is said while the callback is exchanged is lost.
        let sink = match SINK.try_read() {
            Ok(sink) => sink,
            Err(TryLockError::Poisoned(sink)) => sink.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let Some(sink) = sink.as_ref() else { return };
        let mut message = record.args().to_string().replace('\0', "\u{FFFD}");
        message.push('\0');
        // SAFETY: the message is NUL-terminated and lives until the call returns; the rest is the caller's promise.
        unsafe { (sink.callback)(sink.user, record.level() as i32, message.as_ptr().cast()) };
    }

    fn flush(&self) {}
}

thread_local! {
    /// How many of our calls this thread is in. It has no destructor, so access cannot fail.
    static INSIDE: Cell<u32> = const { Cell::new(0) };
}

/// Counts a call until it is dropped.
pub struct Inside(());

/// Marks the thread as inside a call of ours, and installs the hook for panics.
pub fn enter() -> Inside {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let thread = std::thread::current();
            let ours = thread.name().is_some_and(|name| THREADS.iter().any(|start| name.starts_with(start)));
            match ours || INSIDE.get() > 0 {
                true => ::log::error!("{info}"),
                false => before(info),
            }
        }));
    });
    INSIDE.set(INSIDE.get().wrapping_add(1));
    Inside(())
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(INSIDE.get().wrapping_sub(1));
    }
}

/// Sends messages up to `level` (1 errors, 2 warnings, 3 information, 4 details, 5 all) to `callback`; NULL for silence.
///
/// # Safety
/// `callback` may be called with `user` from any thread until this function has returned from a later call. It must not
/// unwind and must not call this function.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_set_log(
    callback: kinglet_log_callback,
    user: *mut c_void,
    level: i32,
    err: *mut kinglet_error,
) -> kinglet_status {
    let body = || {
        let filter = match level {
            1 => LevelFilter::Error,
            2 => LevelFilter::Warn,
            3 => LevelFilter::Info,
            4 => LevelFilter::Debug,
            5 => LevelFilter::Trace,
            _ if callback.is_none() => LevelFilter::Off,
            _ => return Err(Failure::argument(format!("level is {level}; it must be from 1 (errors) to 5 (all)"))),
        };
        static IS_OURS: OnceLock<bool> = OnceLock::new();
        if !*IS_OURS.get_or_init(|| ::log::set_logger(&ToCallback).is_ok()) {
            let what = "the program has a logger already, which gets the messages";
            return Err(Failure::new(KINGLET_ERR_UNSUPPORTED, what));
        }
        // Waits until no message is on its way to the callback before.
        *SINK.write().unwrap_or_else(PoisonError::into_inner) = callback.map(|callback| Sink { callback, user });
        ::log::set_max_level(if callback.is_some() { filter } else { LevelFilter::Off });
        Ok(KINGLET_OK)
    };
    // SAFETY: `err` is the caller's.
    unsafe { fence(err, body) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fence::KINGLET_ERR_INTERNAL;
    use std::ffi::CStr;
    use std::ptr::null_mut;
    use std::sync::Mutex;

    static HEARD: Mutex<Vec<(i32, String)>> = Mutex::new(Vec::new());

    unsafe extern "C" fn hear(user: *mut c_void, level: i32, message: *const c_char) {
        assert_eq!(user as usize, 5);
        // SAFETY: messages are NUL-terminated.
        let message = unsafe { CStr::from_ptr(message) }.to_str().unwrap().to_owned();
        HEARD.lock().unwrap().push((level, message));
    }

    #[test]
    fn a_panic_within_a_call_is_a_message_to_the_callback() {
        let heard = |word: &str| HEARD.lock().unwrap().iter().any(|(level, m)| *level == 1 && m.contains(word));
        let panics = |word: &'static str| {
            // SAFETY: NULL is allowed.
            let status = unsafe { fence(null_mut(), || std::panic::panic_any(word)) };
            assert_eq!(status, KINGLET_ERR_INTERNAL);
        };
        // SAFETY: the callback takes what it gets.
        assert_eq!(unsafe { kinglet_set_log(Some(hear), 5 as *mut c_void, 1, null_mut()) }, KINGLET_OK);
        panics("planted for the callback");
        assert!(heard("planted for the callback"));
        // SAFETY: NULL is silence.
        assert_eq!(unsafe { kinglet_set_log(None, null_mut(), 0, null_mut()) }, KINGLET_OK);
        panics("planted in silence");
        assert!(!heard("planted in silence"));
    }
}
