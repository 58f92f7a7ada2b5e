//! What lets an application go to the background: while a model is suspended nothing computes with it.
//!
//! Every call that computes passes the gate and is known to it while it runs. Suspending keeps new calls out, stops those that
//! can be taken up again, and waits for the others, each of which ends after a token or a chunk of a prompt.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use kinglet_engine::session::CancelHandle;

use crate::fence::{Failure, KINGLET_ERR_SUSPENDED, Outcome};

/// The gate of one model.
#[derive(Default)]
pub struct Gate {
    state: Mutex<State>,
    /// The last call has left.
    empty: Condvar,
}

#[derive(Default)]
struct State {
    suspended: bool,
    running: Vec<Running>,
    next: u64,
}

/// A call that is inside.
struct Running {
    id: u64,
    /// How it is stopped; none for one that ends soon by itself.
    stop: Option<CancelHandle>,
    stopped: bool,
}

/// A call's stay inside, which ends when it is dropped.
pub struct Pass<'a> {
    gate: &'a Gate,
    id: u64,
}

impl Gate {
    /// Lets a call in; suspending the model stops it through `stop`, which must not be reset before the call has left.
    ///
    /// # Errors
    /// [`KINGLET_ERR_SUSPENDED`].
    pub fn enter(&self, stop: Option<&CancelHandle>) -> Outcome<Pass<'_>> {
        let mut state = self.lock();
        if state.suspended {
            return Err(suspended());
        }
        let id = state.next;
        state.next += 1;
        state.running.push(Running { id, stop: stop.cloned(), stopped: false });
        Ok(Pass { gate: self, id })
    }

    /// Keeps calls out, and returns when none is inside any more.
    pub fn suspend(&self) {
        let mut state = self.lock();
        state.suspended = true;
        for call in &mut state.running {
            if let Some(stop) = &call.stop {
                stop.cancel();
                call.stopped = true;
            }
        }
        while !state.running.is_empty() {
            state = self.empty.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets calls in again.
    pub fn resume(&self) {
        self.lock().suspended = false;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pass<'_> {
    /// Whether suspending has stopped this call.
    pub fn stopped(&self) -> bool {
        self.gate.lock().running.iter().any(|call| call.id == self.id && call.stopped)
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        state.running.retain(|call| call.id != self.id);
        if state.running.is_empty() {
            self.gate.empty.notify_all();
        }
    }
}

/// What a call on a suspended model comes to.
pub fn suspended() -> Failure {
    Failure::new(KINGLET_ERR_SUSPENDED, "the model is suspended; call kinglet_model_resume, then call this again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    #[test]
    fn suspending_stops_what_can_be_stopped_and_waits_for_the_rest() {
        let gate = Gate::default();
        let stop = CancelHandle::default();
        let left = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (stoppable, other) = (gate.enter(Some(&stop)).unwrap(), gate.enter(None).unwrap());
            let (stop, left) = (&stop, &left);
            scope.spawn(move || {
                while !stop.is_cancelled() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                assert!(stoppable.stopped() && !other.stopped());
                drop(stoppable);
                std::thread::sleep(Duration::from_millis(20));
                left.store(true, Ordering::SeqCst);
                drop(other);
            });
            gate.suspend();
            assert!(left.load(Ordering::SeqCst), "suspending has not waited");
        });
        assert_eq!(gate.enter(None).err().map(|f| f.code), Some(KINGLET_ERR_SUSPENDED));
        gate.resume();
        assert!(gate.enter(None).is_ok());
    }
}
