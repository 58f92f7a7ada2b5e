//! What stands between C and Rust at every exported function: status codes, the caller's error struct, and the fence that
//! no panic crosses.
//!
//! An export checks nothing itself. Its body is a closure that gives a status or a [`Failure`]; [`fence`] runs it under
//! `catch_unwind` and writes what went wrong into the caller's `kinglet_error`. A caught payload is forgotten, not
//! dropped: its destructor is foreign code that could panic again. Built with `--cfg kinglet_prove`, every export carries
//! `no_panic`, and the linker proves that nothing outside the closure can unwind.

use std::ffi::c_char;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use kinglet_engine::Error;

use crate::log;

/// What a function returns: 0 done, 1 nothing more to come, below 0 an error.
#[allow(non_camel_case_types)]
pub type kinglet_status = i32;

/// Done.
pub const KINGLET_OK: kinglet_status = 0;
/// Nothing more will come.
pub const KINGLET_DONE: kinglet_status = 1;
/// An argument is wrong.
pub const KINGLET_ERR_ARG: kinglet_status = -1;
/// The operating system refused a file operation.
pub const KINGLET_ERR_IO: kinglet_status = -2;
/// A file is damaged or of another kind.
pub const KINGLET_ERR_FORMAT: kinglet_status = -3;
/// Valid, but this build or version cannot do it.
pub const KINGLET_ERR_UNSUPPORTED: kinglet_status = -4;
/// The memory budget, or the system's memory, does not hold it.
pub const KINGLET_ERR_MEMORY: kinglet_status = -5;
/// The context window is full.
pub const KINGLET_ERR_CONTEXT_FULL: kinglet_status = -6;
/// Another call on the object is running, or a generation holds the session.
pub const KINGLET_ERR_BUSY: kinglet_status = -7;
/// Somebody asked to stop.
pub const KINGLET_ERR_CANCELLED: kinglet_status = -8;
/// The GPU or its driver failed.
pub const KINGLET_ERR_DEVICE_LOST: kinglet_status = -9;
/// The model is suspended.
pub const KINGLET_ERR_SUSPENDED: kinglet_status = -10;
/// The caller's array does not hold the result; how long it must be was written.
pub const KINGLET_ERR_TOO_SMALL: kinglet_status = -11;
/// A struct is of another version.
pub const KINGLET_ERR_ABI: kinglet_status = -12;
/// A computation gave NaN or infinity.
pub const KINGLET_ERR_NUMERIC: kinglet_status = -13;
/// A fault of the library's; the object cannot be used any more.
pub const KINGLET_ERR_INTERNAL: kinglet_status = -99;

/// Bytes of a message, its NUL included.
const MESSAGE: usize = 508;

/// What went wrong; the caller's memory, 512 bytes for ever.
#[repr(C)]
#[allow(non_camel_case_types)]
pub struct kinglet_error {
    /// The status that was returned.
    pub code: i32,
    /// For people: UTF-8, NUL-terminated, cut at a whole character.
    pub message: [c_char; 508],
}

/// An error on its way to the caller.
#[derive(Clone, Debug)]
pub struct Failure {
    pub code: kinglet_status,
    pub message: String,
}

impl Failure {
    pub fn new(code: kinglet_status, message: impl Into<String>) -> Failure {
        Failure { code, message: message.into() }
    }

    pub fn argument(message: impl Into<String>) -> Failure {
        Failure::new(KINGLET_ERR_ARG, message)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let code = match error {
            Error::Io { .. } => KINGLET_ERR_IO,
            Error::Format { .. } | Error::Template(_) => KINGLET_ERR_FORMAT,
            Error::Unsupported(_) => KINGLET_ERR_UNSUPPORTED,
            Error::Argument(_) | Error::Grammar(_) => KINGLET_ERR_ARG,
            Error::Memory { .. } => KINGLET_ERR_MEMORY,
            Error::ContextFull { .. } => KINGLET_ERR_CONTEXT_FULL,
            Error::Cancelled => KINGLET_ERR_CANCELLED,
            Error::Numeric(_) => KINGLET_ERR_NUMERIC,
            Error::Device { .. } => KINGLET_ERR_DEVICE_LOST,
            _ => KINGLET_ERR_INTERNAL,
        };
        Failure::new(code, error.to_string())
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Failure {
        Failure::new(KINGLET_ERR_INTERNAL, error.to_string())
    }
}

/// How a body of an export ends.
pub type Outcome<T = kinglet_status> = Result<T, Failure>;

const PANICKED: &str = "internal error: the library panicked; free the object and report what the log says\0";

/// Runs the body of an export. See the module's text.
///
/// # Safety
/// `err` is NULL or points to a `kinglet_error` of the caller's that nobody else uses meanwhile.
#[inline(always)]
pub unsafe fn fence(err: *mut kinglet_error, body: impl FnOnce() -> Outcome) -> kinglet_status {
    let caught = catch_unwind(AssertUnwindSafe(|| {
        let _inside = log::enter();
        // SAFETY: passed on.
        unsafe { write(err, KINGLET_OK, "") };
        match body() {
            Ok(status) => status,
            Err(failure) => {
                // SAFETY: passed on.
                unsafe { write(err, failure.code, &failure.message) };
                failure.code
            }
        }
    }));
    match caught {
        Ok(status) => status,
        Err(payload) => {
            mem::forget(payload);
            if !err.is_null() {
                // SAFETY: not NULL, and passed on otherwise; the message with its NUL is shorter than the array.
                unsafe {
                    (&raw mut (*err).code).write(KINGLET_ERR_INTERNAL);
                    let message = (&raw mut (*err).message).cast::<u8>();
                    message.copy_from_nonoverlapping(PANICKED.as_ptr(), PANICKED.len());
                }
            }
            KINGLET_ERR_INTERNAL
        }
    }
}

/// As [`fence`], for functions that return nothing.
#[inline(always)]
pub fn fence_void(body: impl FnOnce()) {
    // SAFETY: NULL is allowed.
    unsafe {
        fence(std::ptr::null_mut(), || {
            body();
            Ok(KINGLET_OK)
        });
    }
}

/// Fills the caller's struct; cuts the message at a whole character.
///
/// # Safety
/// As [`fence`].
unsafe fn write(err: *mut kinglet_error, code: kinglet_status, message: &str) {
    if err.is_null() {
        return;
    }
    let len = message.floor_char_boundary(MESSAGE - 1);
    // SAFETY: not NULL, and passed on otherwise; `len` and the NUL fit the array.
    unsafe {
        (&raw mut (*err).code).write(code);
        let out = (&raw mut (*err).message).cast::<u8>();
        out.copy_from_nonoverlapping(message.as_ptr(), len);
        out.add(len).write(0);
    }
}

/// The inside of an object that takes one call at a time; `what` names the object in messages.
///
/// # Errors
/// [`KINGLET_ERR_BUSY`] while another call is running, [`KINGLET_ERR_INTERNAL`] once one has panicked.
pub fn enter<'a, T>(object: &'a Mutex<T>, what: &str) -> Outcome<MutexGuard<'a, T>> {
    match object.try_lock() {
        Ok(guard) => Ok(guard),
        Err(TryLockError::WouldBlock) => Err(Failure::new(
            KINGLET_ERR_BUSY,
            format!("another call on this {what} is running; wait for it, or cancel it"),
        )),
        Err(TryLockError::Poisoned(_)) => Err(unusable(what)),
    }
}

/// As [`enter`], for an object whose memory a call on its model may be giving back, which is held by `giving` meanwhile. That
/// is waited for: it takes no time, and the caller knows nothing of it.
///
/// # Errors
/// As [`enter`].
pub fn enter_after<'a, T>(giving: &Mutex<()>, object: &'a Mutex<T>, what: &str) -> Outcome<MutexGuard<'a, T>> {
    match enter(object, what) {
        Err(busy) if busy.code == KINGLET_ERR_BUSY => {
            // While this is held whoever is inside is a call on the object.
            let _nobody_gives = giving.lock().unwrap_or_else(PoisonError::into_inner);
            enter(object, what)
        }
        entered => entered,
    }
}

/// The failure of every call on an object in which one has panicked.
pub fn unusable(what: &str) -> Failure {
    Failure::new(
        KINGLET_ERR_INTERNAL,
        format!("an earlier call on this {what} failed inside the library; free it and make a new one"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn error() -> kinglet_error {
        kinglet_error { code: 7, message: [1; MESSAGE] }
    }

    fn message(err: &kinglet_error) -> String {
        // SAFETY: the fence terminates every message.
        unsafe { CStr::from_ptr(err.message.as_ptr()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn the_error_is_512_bytes_for_ever() {
        assert_eq!(mem::size_of::<kinglet_error>(), 512);
    }

    #[test]
    fn a_status_clears_the_error_and_a_failure_fills_it() {
        let mut err = error();
        // SAFETY: the struct is ours.
        let status = unsafe { fence(&mut err, || Ok(KINGLET_DONE)) };
        assert_eq!((status, err.code, message(&err).as_str()), (KINGLET_DONE, 0, ""));
        // SAFETY: the struct is ours.
        let status = unsafe { fence(&mut err, || Err(Failure::argument("x is 3"))) };
        assert_eq!((status, err.code, message(&err).as_str()), (KINGLET_ERR_ARG, KINGLET_ERR_ARG, "x is 3"));
    }

    #[test]
    fn long_messages_end_at_a_whole_character() {
        let mut err = error();
        let long = "é".repeat(400);
        // SAFETY: the struct is ours.
        unsafe { fence(&mut err, || Err(Failure::argument(long))) };
        assert_eq!(message(&err), "é".repeat(253));
    }

    #[test]
    fn a_panic_is_a_status_and_its_payload_is_never_dropped() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                std::process::abort();
            }
        }
        let mut err = error();
        // SAFETY: the struct is ours.
        let status = unsafe { fence(&mut err, || std::panic::panic_any(Bomb)) };
        assert_eq!((status, err.code), (KINGLET_ERR_INTERNAL, KINGLET_ERR_INTERNAL));
        assert!(message(&err).contains("panicked"));
    }

    #[test]
    fn an_object_is_busy_in_a_second_call_and_unusable_after_a_panic() {
        let object = Mutex::new(0);
        let guard = enter(&object, "thing").unwrap();
        assert_eq!(enter(&object, "thing").unwrap_err().code, KINGLET_ERR_BUSY);
        drop(guard);
        let panics = || -> Outcome {
            let _guard = enter(&object, "thing")?;
            panic!("planted")
        };
        // SAFETY: NULL is allowed.
        assert_eq!(unsafe { fence(std::ptr::null_mut(), panics) }, KINGLET_ERR_INTERNAL);
        let failure = enter(&object, "thing").unwrap_err();
        assert_eq!(failure.code, KINGLET_ERR_INTERNAL);
        assert!(failure.message.contains("thing"));
    }
}
