//! A fork-join team of threads that walks a tape together.
//!
//! The whole tape is one job: every thread runs the same function, and between ops they meet at a [`Barrier`] that
//! spins. So the price of parallelism per op is one barrier among running threads (about 0.2 µs on one L3), not a wake-up.
//! A waiting thread spins for a short time, then yields its core between looks, so that a foreign process on the
//! machine costs its share and not more. Between jobs the workers park and use nothing.
//!
//! Work is divided statically ([`Team::share`]) so that each thread streams its own contiguous part of a matrix, or
//! claimed piece by piece ([`Team::claim`]) where pieces differ in size. Neither changes what is computed, so results do
//! not depend on the number of threads.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use crate::{Error, Result};

/// Looks at a flag before a waiting thread starts to yield: some ten microseconds.
const SPINS: u32 = 2_000;
/// Looks a worker takes for the next job before it parks: between two tokens it should still be awake.
const JOB_SPINS: u32 = 20_000;

/// A worker's stack in bytes. That of the standard library; unless it is said, RUST_MIN_STACK is read from the environment.
const STACK: usize = 2 << 20;

/// Spins on `done`, politely.
fn spin_until(mut done: impl FnMut() -> bool) {
    let mut spins = 0;
    while !done() {
        if spins < SPINS {
            spins += 1;
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

/// Alone in the lines that processors hand from core to core (two of 64 bytes at a time): whoever writes its neighbour would take it
/// from those who read it.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Apart<T>(T);

/// Where the threads of a team meet, in ⌈log₂ size⌉ rounds: in round `k` each tells the one `2ᵏ` further that it has come, and all that
/// it has heard of with it, and waits to be told. So two threads are one message apart, where a counter that both add to and a flag
/// that both look at were three. (Hensgen, Finkel, Manber: Two algorithms for barrier synchronization, 1988.)
#[derive(Debug)]
struct Barrier {
    threads: Box<[Apart<Place>]>,
    /// Set when a thread of the team panicked, so that the others do not wait for it.
    broken: Apart<AtomicBool>,
}

/// A thread's place at a barrier.
#[derive(Debug, Default)]
struct Place {
    /// How often it has come; its own.
    came: AtomicU32,
    /// For each round the number of the meeting it was last told of.
    told: [AtomicU32; ROUNDS],
}

/// Rounds that the largest team needs.
const ROUNDS: usize = Pool::MAX_THREADS.ilog2() as usize;

struct BrokenTeam;

impl Barrier {
    fn new(size: usize) -> Barrier {
        Barrier { threads: (0..size).map(|_| Apart::default()).collect(), broken: Apart::default() }
    }

    fn wait(&self, index: usize) {
        let size = self.threads.len();
        let Apart(own) = &self.threads[index];
        let meeting = own.came.load(Ordering::Relaxed).wrapping_add(1);
        own.came.store(meeting, Ordering::Relaxed);
        let rounds = (0..ROUNDS).map(|round| (round, 1 << round)).take_while(|(_, distance)| *distance < size);
        for (round, distance) in rounds {
            self.threads[(index + distance) % size].0.told[round].store(meeting, Ordering::Release);
            spin_until(|| {
                if self.broken.0.load(Ordering::Relaxed) {
                    resume_unwind(Box::new(BrokenTeam));
                }
                // Who tells may already be at the next meeting.
                own.told[round].load(Ordering::Acquire).wrapping_sub(meeting) as i32 >= 0
            });
        }
    }

    /// Makes it whole again, if a thread broke it; while no thread of the team uses it.
    fn mend(&self) {
        if self.broken.0.swap(false, Ordering::AcqRel) {
            for Apart(place) in &self.threads {
                place.came.store(0, Ordering::Relaxed);
                place.told.iter().for_each(|told| told.store(0, Ordering::Relaxed));
            }
        }
    }
}

/// A thread's view of its team during a job.
#[derive(Clone, Copy, Debug)]
pub struct Team<'a> {
    /// This thread, `0..size`; 0 is the caller's.
    pub index: usize,
    /// Threads in the team.
    pub size: usize,
    barrier: &'a Barrier,
    claims: &'a [Apart<AtomicUsize>; 2],
}

impl Team<'_> {
    /// Waits until every thread of the team is here.
    pub fn wait(&self) {
        self.barrier.wait(self.index);
    }

    /// This thread's contiguous share of `n` things, in multiples of `unit` (but for the last).
    pub fn share(&self, n: usize, unit: usize) -> Range<usize> {
        self.share_of(self.index, n, unit)
    }

    /// The share of `thread`.
    fn share_of(&self, thread: usize, n: usize, unit: usize) -> Range<usize> {
        let units = n.div_ceil(unit);
        let cut = |i: usize| (units * i / self.size * unit).min(n);
        cut(thread)..cut(thread + 1)
    }

    /// Runs `work` for all of `n` things: each thread for most of its share at once, and then for what is left of all shares, an
    /// eighth, piece by piece, whoever is free. Memory does not serve all threads alike, and the last one decides. To be called as
    /// [`Team::claim`] is.
    pub fn balance(&self, round: usize, n: usize, unit: usize, mut work: impl FnMut(Range<usize>)) {
        const PIECES: usize = 4;
        if self.size == 1 {
            return work(0..n);
        }
        let parts = |thread: usize| {
            let all = self.share_of(thread, n, unit);
            let left = all.start + all.len() / 8 * 7 / unit * unit;
            (all.start..left, left..all.end)
        };
        let mut some = |part: Range<usize>| {
            if !part.is_empty() {
                work(part);
            }
        };
        some(parts(self.index).0);
        self.claim(round, self.size * PIECES, |piece| {
            let left = parts(piece % self.size).1;
            let cut = |i: usize| (left.start + left.len().div_ceil(unit) * i / PIECES * unit).min(left.end);
            some(cut(piece / self.size)..cut(piece / self.size + 1));
        });
    }

    /// Runs `work` for every index in `0..n`, each on whichever thread is free. All threads of the team must call it,
    /// with the same `round`, which alternates between consecutive uses with a [`Team::wait`] between them.
    pub fn claim(&self, round: usize, n: usize, mut work: impl FnMut(usize)) {
        let Apart(counter) = &self.claims[round & 1];
        loop {
            let i = counter.fetch_add(1, Ordering::Relaxed);
            if i >= n {
                break;
            }
            work(i);
        }
    }

    /// Makes the other round's counter ready; to be called by one thread while nobody claims from it.
    pub fn reset_claims(&self, round: usize) {
        self.claims[round & 1].0.store(0, Ordering::Relaxed);
    }
}

type Job = &'static (dyn Fn(&Team<'_>) + Sync);

#[derive(Default)]
struct State {
    job: Option<Job>,
    /// Number of the current job.
    number: u64,
    stop: bool,
}

struct Shared {
    size: usize,
    state: Mutex<State>,
    wake: Condvar,
    /// `State::number`, to be read while spinning.
    number: AtomicUsize,
    stopping: AtomicBool,
    finished: AtomicUsize,
    barrier: Barrier,
    claims: [Apart<AtomicUsize>; 2],
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// A team of threads that waits for jobs.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({} threads)", self.shared.size)
    }
}

impl Pool {
    /// The most threads a team may have.
    pub const MAX_THREADS: usize = 256;

    /// A team of `threads`, the caller's among them.
    ///
    /// # Errors
    /// `threads` outside `1..=256`, or the system refuses a thread.
    pub fn new(threads: usize) -> Result<Pool> {
        if !(1..=Pool::MAX_THREADS).contains(&threads) {
            return Err(Error::argument(format!("threads must be between 1 and {}, not {threads}", Pool::MAX_THREADS)));
        }
        let shared = Arc::new(Shared {
            size: threads,
            state: Mutex::default(),
            wake: Condvar::new(),
            number: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
            finished: AtomicUsize::new(0),
            barrier: Barrier::new(threads),
            claims: Default::default(),
            panic: Mutex::new(None),
        });
        let mut pool = Pool { shared: shared.clone(), workers: Vec::with_capacity(threads - 1) };
        for index in 1..threads {
            let shared = shared.clone();
            let worker = std::thread::Builder::new()
                .name(format!("kinglet-{index}"))
                .stack_size(STACK)
                .spawn(move || worker(&shared, index))
                .map_err(|e| {
                    Error::argument(format!(
                        "the system refused thread {index} of {threads}: {e}; ask for fewer threads"
                    ))
                })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads in the team.
    pub fn threads(&self) -> usize {
        self.shared.size
    }

    /// Runs `job` on every thread of the team and returns when all have finished.
    ///
    /// # Panics
    /// With the panic of a thread of the team, after all have stopped. The pool remains usable.
    pub fn run(&mut self, job: impl Fn(&Team<'_>) + Sync) {
        let shared = &*self.shared;
        for claim in &shared.claims {
            claim.0.store(0, Ordering::Relaxed);
        }
        if shared.size > 1 {
            let job: &(dyn Fn(&Team<'_>) + Sync) = &job;
            // SAFETY: the reference is used by workers only until `finished` reaches their number, which this
            // function waits for before it returns.
            let job: Job = unsafe { std::mem::transmute(job) };
            shared.finished.store(0, Ordering::Relaxed);
            let mut state = lock(&shared.state);
            state.job = Some(job);
            state.number += 1;
            shared.number.store(state.number as usize, Ordering::Release);
            drop(state);
            shared.wake.notify_all();
        }
        let mine = catch_unwind(AssertUnwindSafe(|| job(&shared.team(0))));
        if mine.is_err() {
            shared.barrier.broken.0.store(true, Ordering::Release);
        }
        spin_until(|| shared.finished.load(Ordering::Acquire) == shared.size - 1 || shared.size == 1);
        shared.barrier.mend();
        let theirs = lock(&shared.panic).take();
        match (mine, theirs) {
            (_, Some(payload)) => resume_unwind(payload),
            (Err(payload), None) => resume_unwind(payload),
            (Ok(()), None) => {}
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        lock(&self.shared.state).stop = true;
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of jobs: there is nothing to pass on.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn team(&self, index: usize) -> Team<'_> {
        Team { index, size: self.size, barrier: &self.barrier, claims: &self.claims }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn worker(shared: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.number.load(Ordering::Acquire) == seen
            && spins < JOB_SPINS
            && !shared.stopping.load(Ordering::Relaxed)
        {
            spins += 1;
            std::hint::spin_loop();
        }
        let mut state = lock(&shared.state);
        while state.number as usize == seen && !state.stop {
            state = shared.wake.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        if state.stop {
            return;
        }
        seen = state.number as usize;
        let job = state.job;
        drop(state);
        if let Some(job) = job
            && let Err(payload) = catch_unwind(AssertUnwindSafe(|| job(&shared.team(index))))
        {
            shared.barrier.broken.0.store(true, Ordering::Release);
            if !payload.is::<BrokenTeam>() {
                *lock(&shared.panic) = Some(payload);
            }
        }
        shared.finished.fetch_add(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_is_done_once_whatever_the_threads() {
        for threads in [1, 2, 3, 5] {
            let mut pool = Pool::new(threads).unwrap();
            for n in [0, 1, 7, 100] {
                let shared: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                let claimed: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                pool.run(|team| {
                    for i in team.share(n, 4) {
                        shared[i].fetch_add(1, Ordering::Relaxed);
                    }
                    team.wait();
                    team.claim(0, n, |i| {
                        claimed[i].fetch_add(1, Ordering::Relaxed);
                    });
                });
                assert!(shared.iter().chain(&claimed).all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn balanced_work_is_done_once_in_whole_units() {
        for (threads, n, unit) in [(1, 100, 32), (2, 100, 32), (3, 4096, 32), (4, 7, 1), (4, 49_152, 32), (3, 0, 32)] {
            let mut pool = Pool::new(threads).unwrap();
            let done: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
            for round in 0..3 {
                pool.run(|team| {
                    if team.index == 0 {
                        team.reset_claims(round);
                    }
                    team.wait();
                    team.balance(round, n, unit, |part| {
                        assert!(part.start.is_multiple_of(unit) && !part.is_empty(), "{part:?}");
                        done[part].iter().for_each(|d| _ = d.fetch_add(1, Ordering::Relaxed));
                    });
                });
            }
            assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 3), "{threads} threads, {n} in units of {unit}");
        }
    }

    #[test]
    fn what_is_written_before_a_barrier_is_seen_behind_it() {
        let mut pool = Pool::new(3).unwrap();
        let cells: Vec<AtomicUsize> = (0..3).map(|_| AtomicUsize::new(0)).collect();
        pool.run(|team| {
            for round in 1..=2000 {
                cells[team.index].store(round, Ordering::Relaxed);
                team.wait();
                assert!(cells.iter().all(|c| c.load(Ordering::Relaxed) == round));
                team.wait();
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(3).unwrap();
        for victim in 0..3 {
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                pool.run(|team| {
                    if team.index == victim {
                        panic!("planted");
                    }
                    team.wait();
                })
            }));
            assert!(panicked.is_err());
            let sum = AtomicUsize::new(0);
            pool.run(|team| {
                team.wait();
                sum.fetch_add(team.index, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 3);
        }
    }

    #[test]
    fn absurd_thread_counts_are_refused() {
        assert!(Pool::new(0).is_err());
        assert!(Pool::new(100_000).unwrap_err().to_string().contains("threads"));
    }
}
