//! Deep recursion on a stack that holds it: programs and grammars from a file or a caller may nest as deep as their
//! budget allows, and the stack of the thread that calls is not ours to choose.

use crate::{Error, Result, system};

/// Bytes of stack; the system gives only what is touched.
const STACK: usize = 64 << 20;

/// Runs `body` on a thread of its own, with a deep stack, and waits for it; without threads on the caller's. `name` says what
/// failed in an error.
///
/// # Errors
/// Those of `body`; what `failed` makes of a thread that does not start, or of a panic.
pub(crate) fn on_deep_stack<T: Send>(
    name: &str,
    failed: fn(String) -> Error,
    body: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    if !system::THREADS {
        return body();
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(name.into()).stack_size(STACK);
        let running = thread.spawn_scoped(scope, body).map_err(|error| failed(format!("no thread for it: {error}")))?;
        running.join().unwrap_or_else(|_| Err(failed("it failed unexpectedly".into())))
    })
}
