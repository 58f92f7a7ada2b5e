//! Ctrl-C: the first one asks the current work to stop, a second one while that has not happened ends the program.
//!
//! Until [`listen`] is called the system's default holds and Ctrl-C ends the program: right for pulls, which may be
//! interrupted anywhere.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

static ASKED: AtomicBool = AtomicBool::new(false);
static STOP: Mutex<Option<Box<dyn Fn() + Send>>> = Mutex::new(None);
static LISTENING: OnceLock<()> = OnceLock::new();

/// The work was stopped by Ctrl-C.
#[derive(Debug, thiserror::Error)]
#[error("stopped")]
pub struct Interrupted;

/// Whether `error` says that Ctrl-C was pressed.
pub fn is_interruption(error: &anyhow::Error) -> bool {
    error.chain().any(|e| e.is::<Interrupted>())
}

/// From now on Ctrl-C calls `stop` (from another thread) and sets the flag that [`take`] reads.
pub fn listen(stop: impl Fn() + Send + 'static) {
    *STOP.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(stop));
    LISTENING.get_or_init(|| {
        let result = ctrlc::set_handler(|| {
            if ASKED.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
            if let Some(stop) = &*STOP.lock().unwrap_or_else(PoisonError::into_inner) {
                stop();
            }
        });
        if let Err(e) = result {
            log::warn!("Ctrl-C cannot be caught: {e}");
        }
    });
}

/// Whether Ctrl-C was pressed and not yet answered.
pub fn pending() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// Whether Ctrl-C was pressed since the last call.
pub fn take() -> bool {
    ASKED.swap(false, Ordering::SeqCst)
}
