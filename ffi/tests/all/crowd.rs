//! Sixty-four threads that call at once, each what another kind of caller calls: every call gets a status that the header
//! promises, and whoever has a session of their own gets the answer that they get alone.

use std::ops::Range;
use std::path::PathBuf;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};

use kinglet::*;

use crate::hard::{Answer, GREEDY, Shared, answer, event, generate, open, pull, report, session, tokenize, trainer};
use crate::lasting::{embed, training};
use crate::support::{Scratch, error, message};

/// An answer that many pull or cancel.
const LONG: &str = r#"{"prompt": "the hat", "max_tokens": 200, "ignore_end": true, "sampling": {"temperature": 0}}"#;

const TEXT: &str = "hello you, the other hat is on the table";

/// What all threads share, and what each call gives alone.
struct Crowd {
    file: PathBuf,
    model: Shared<kinglet_model>,
    short: Answer,
    long: Answer,
    tokens: Vec<i32>,
    embedding: Vec<f32>,
    losses: Vec<f64>,
    /// One that eight pull, and how often each of its tokens was told.
    common: Shared<kinglet_generation>,
    told: Vec<AtomicUsize>,
    ends: AtomicUsize,
    /// Each with one who pulls and one who cancels.
    pairs: Vec<Shared<kinglet_generation>>,
    pulled: Vec<AtomicUsize>,
    /// A session that four use for all sorts of things.
    contested: Shared<kinglet_session>,
    /// A training of which two take the steps and one cancels them; the losses by step.
    trainer: Shared<kinglet_trainer>,
    steps: Mutex<Vec<(u64, f64)>>,
    trained: AtomicUsize,
}

/// What a thread calls; the number is its place among those that call the same.
type Role = fn(&Crowd, usize);

/// Who calls what.
const ROLES: [(Range<usize>, Role); 10] = [
    (0..12, Crowd::answers_alone),
    (12..20, Crowd::pulls_with_others),
    (20..28, Crowd::pulls_until_cancelled),
    (28..36, Crowd::cancels),
    (36..44, Crowd::opens_and_closes),
    (44..52, Crowd::tokenizes),
    (52..56, Crowd::embeds),
    (56..60, Crowd::contests),
    (60..62, Crowd::trains),
    (62..64, Crowd::disturbs),
];

/// The status is one of those that this call may give here.
#[track_caller]
fn one_of(status: kinglet_status, wanted: &[kinglet_status], err: &kinglet_error) {
    assert!(wanted.contains(&status), "{status}, not of {wanted:?}: {}", message(err));
    assert_eq!(err.code, status.min(0), "{}", message(err));
}

impl Crowd {
    /// A session of one's own answers as if there were nobody else.
    fn answers_alone(&self, _: usize) {
        let own = session(self.model.0, None);
        for _ in 0..4 {
            assert_eq!(answer(own, GREEDY).tokens, self.short.tokens);
        }
        // SAFETY: it is ours.
        unsafe { kinglet_session_free(own) };
    }

    /// Every token of an answer is told to one thread. What it is nobody may look at: the next call takes it away.
    fn pulls_with_others(&self, _: usize) {
        loop {
            let (mut event, mut err) = (event(), error());
            // SAFETY: the structs are this thread's; the generation may be asked by any.
            let status = unsafe { kinglet_generation_next(self.common.0, &mut event, &mut err) };
            one_of(status, &[KINGLET_OK, KINGLET_DONE, KINGLET_ERR_BUSY], &err);
            match status {
                KINGLET_DONE => return,
                KINGLET_OK if event.kind == KINGLET_EVENT_TEXT => {
                    self.told[event.output_tokens as usize - 1].fetch_add(1, Ordering::Relaxed);
                }
                KINGLET_OK if event.kind == KINGLET_EVENT_END => _ = self.ends.fetch_add(1, Ordering::Relaxed),
                _ => std::thread::yield_now(),
            }
        }
    }

    /// An answer that somebody cancels is the beginning of the whole one.
    fn pulls_until_cancelled(&self, place: usize) {
        let (mut tokens, mut event, mut err) = (Vec::new(), event(), error());
        loop {
            // SAFETY: nobody else pulls this generation, so what the event points to stays until the next call.
            unsafe {
                match kinglet_generation_next(self.pairs[place].0, &mut event, &mut err) {
                    KINGLET_DONE => break,
                    status => one_of(status, &[KINGLET_OK], &err),
                }
                if event.kind == KINGLET_EVENT_TEXT {
                    tokens.extend_from_slice(std::slice::from_raw_parts(event.tokens, event.n_tokens));
                }
            }
            self.pulled[place].store(tokens.len().max(1), Ordering::Relaxed);
        }
        assert!(matches!(event.end_reason, KINGLET_END_CANCELLED | KINGLET_END_LENGTH), "{}", event.end_reason);
        assert!(self.long.tokens.starts_with(&tokens), "{tokens:?} but {:?}", self.long.tokens);
        assert_eq!(event.end_reason == KINGLET_END_LENGTH, tokens.len() == self.long.tokens.len());
    }

    /// Cancels what another thread pulls once it has begun, one after more tokens than the other.
    fn cancels(&self, place: usize) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.pulled[place].load(Ordering::Relaxed) <= place {
            assert!(Instant::now() < deadline, "the answer does not begin");
            std::thread::yield_now();
        }
        // SAFETY: any thread may, and all are freed behind the threads.
        unsafe { kinglet_generation_cancel(self.pairs[place].0) };
    }

    /// Objects come and go, in each order of freeing, while others of the same file are in use.
    fn opens_and_closes(&self, place: usize) {
        for round in place..place + 2 {
            let model = open(&self.file);
            let own = session(model, None);
            let generation = generate(own, GREEDY).expect("a generation");
            // SAFETY: each is freed once.
            unsafe {
                if round % 2 == 0 {
                    kinglet_model_free(model);
                    kinglet_session_free(own);
                }
                assert_eq!(pull(generation).tokens, self.short.tokens);
                kinglet_generation_free(generation);
                if round % 2 == 1 {
                    kinglet_session_free(own);
                    kinglet_model_free(model);
                }
            }
        }
    }

    fn tokenizes(&self, _: usize) {
        for _ in 0..100 {
            assert_eq!(tokenize(self.model.0, TEXT), self.tokens);
            let (mut text, mut length, mut err) = ([0u8; 256], 0, error());
            let (ids, n, at) = (self.tokens.as_ptr(), self.tokens.len(), text.as_mut_ptr().cast());
            // SAFETY: the arrays are as long as we say.
            let status = unsafe { kinglet_detokenize(self.model.0, ids, n, 0, at, text.len(), &mut length, &mut err) };
            one_of(status, &[KINGLET_OK], &err);
            assert_eq!(&text[..length], TEXT.as_bytes());
        }
    }

    fn embeds(&self, _: usize) {
        let own = session(self.model.0, None);
        for _ in 0..4 {
            assert_eq!(embed(self.model.0, own, TEXT), self.embedding);
        }
        // SAFETY: it is ours.
        unsafe { kinglet_session_free(own) };
    }

    /// One session, of which each wants something else: it is done, or somebody else is at it.
    fn contests(&self, place: usize) {
        let (own, tokens, mut err) = (self.contested.0, &self.tokens, error());
        let (mut numbers, mut count) = (vec![0f32; 4096], 0);
        for _ in 0..40 {
            // SAFETY: the arrays are as long as we say; the session may be asked by any thread.
            unsafe {
                let status = kinglet_session_feed(own, tokens.as_ptr(), tokens.len(), &mut err);
                // Others fill the window, and cancel.
                let usual = [KINGLET_OK, KINGLET_ERR_BUSY, KINGLET_ERR_CANCELLED, KINGLET_ERR_CONTEXT_FULL];
                one_of(status, &usual, &err);
                let at = numbers.as_mut_ptr();
                match place {
                    0 => {
                        let status = kinglet_session_logits(own, at, numbers.len(), &mut count, &mut err);
                        // Somebody may have emptied the window since.
                        one_of(status, &[KINGLET_OK, KINGLET_ERR_BUSY, KINGLET_ERR_ARG], &err);
                    }
                    1 => {
                        let status = kinglet_session_reset(own, &mut err);
                        one_of(status, &[KINGLET_OK, KINGLET_ERR_BUSY], &err);
                    }
                    2 => {
                        let (n, room) = (tokens.len(), numbers.len());
                        let status = kinglet_session_score(own, tokens.as_ptr(), n, at, room, &mut err);
                        one_of(status, &usual, &err);
                    }
                    _ => kinglet_session_cancel(own),
                }
            }
        }
    }

    /// A step that was cancelled, or that another thread was taking, has not happened.
    fn trains(&self, _: usize) {
        loop {
            let (mut report, mut err) = (report(), error());
            // SAFETY: the structs are this thread's; the trainer may be asked by any.
            let status = unsafe { kinglet_trainer_step(self.trainer.0, &mut report, &mut err) };
            one_of(status, &[KINGLET_OK, KINGLET_DONE, KINGLET_ERR_BUSY, KINGLET_ERR_CANCELLED], &err);
            match status {
                KINGLET_OK => self.steps.lock().expect("nobody panicked").push((report.step, report.loss)),
                KINGLET_DONE => break,
                _ => std::thread::yield_now(),
            }
        }
        self.trained.fetch_add(1, Ordering::Relaxed);
    }

    /// What may be asked of things that others use.
    fn disturbs(&self, place: usize) {
        let mut err = error();
        for round in 0..50 {
            let mut text = null_mut();
            // SAFETY: all pointers are ours, or may be used by any thread.
            unsafe {
                if place == 0 && round % 10 == 0 && self.trained.load(Ordering::Relaxed) == 0 {
                    kinglet_trainer_cancel(self.trainer.0);
                }
                let status = match round % 3 {
                    0 => kinglet_model_info_json(self.model.0, &mut text, &mut err),
                    1 => kinglet_build_json(&mut text, &mut err),
                    _ => kinglet_model_trim(self.model.0, null_mut(), &mut err),
                };
                one_of(status, &[KINGLET_OK], &err);
                kinglet_string_free(text);
                assert_eq!(kinglet_model_retain(self.model.0, &mut err), KINGLET_OK);
                kinglet_model_free(self.model.0);
            }
        }
    }
}

/// The losses of a training, step by step.
fn losses(trainer: *mut kinglet_trainer) -> Vec<f64> {
    let (mut losses, mut report) = (Vec::new(), report());
    // SAFETY: all pointers are ours.
    while unsafe { kinglet_trainer_step(trainer, &mut report, null_mut()) } == KINGLET_OK {
        losses.push(report.loss);
    }
    losses
}

#[test]
fn sixty_four_threads_call_at_once() {
    let scratch = Scratch::new("crowd");
    let file = scratch.model();
    let model = open(&file);
    let alone = session(model, None);
    let learner = trainer(model, &training(&scratch, "alone", 4)).expect("a trainer");
    let long = answer(alone, LONG);
    let others: Vec<_> = (0..9).map(|_| session(model, None)).collect();
    let mut generations = others.iter().map(|s| Shared(generate(*s, LONG).expect("a generation")));
    let crowd = Crowd {
        file,
        short: answer(alone, GREEDY),
        tokens: tokenize(model, TEXT),
        embedding: embed(model, alone, TEXT),
        losses: losses(learner),
        common: generations.next().expect("nine"),
        told: long.tokens.iter().map(|_| AtomicUsize::new(0)).collect(),
        ends: AtomicUsize::new(0),
        pairs: generations.collect(),
        pulled: (0..8).map(|_| AtomicUsize::new(0)).collect(),
        contested: Shared(session(model, None)),
        trainer: Shared(trainer(model, &training(&scratch, "crowded", 4)).expect("a trainer")),
        steps: Mutex::default(),
        trained: AtomicUsize::new(0),
        model: Shared(model),
        long,
    };
    assert_eq!((crowd.short.tokens.len(), crowd.long.tokens.len(), crowd.losses.len()), (12, 200, 4));

    let start = Barrier::new(ROLES.iter().map(|(threads, _)| threads.len()).sum());
    std::thread::scope(|scope| {
        for (threads, role) in ROLES {
            for (place, _) in threads.enumerate() {
                let (crowd, start) = (&crowd, &start);
                scope.spawn(move || {
                    start.wait();
                    role(crowd, place);
                });
            }
        }
    });

    // Each token of the common answer was told once, and so was its end.
    assert!(crowd.told.iter().all(|times| times.load(Ordering::Relaxed) == 1), "{:?}", crowd.told);
    assert_eq!(crowd.ends.load(Ordering::Relaxed), 1);
    let mut steps = crowd.steps.into_inner().expect("nobody panicked");
    steps.sort_by_key(|(step, _)| *step);
    assert_eq!(steps, (1..).zip(crowd.losses).collect::<Vec<(u64, f64)>>());
    // What was contested, and everything else, is as good as before.
    let mut err = error();
    // SAFETY: all are ours, and nobody else is left.
    unsafe {
        // Somebody's cancelling may have hit nobody.
        one_of(kinglet_session_reset(crowd.contested.0, &mut err), &[KINGLET_OK], &err);
        assert_eq!(answer(crowd.contested.0, GREEDY).tokens, crowd.short.tokens);
        crowd.pairs.iter().for_each(|g| kinglet_generation_free(g.0));
        kinglet_generation_free(crowd.common.0);
        others.iter().chain(&[alone, crowd.contested.0]).for_each(|s| kinglet_session_free(*s));
        kinglet_trainer_free(learner);
        kinglet_trainer_free(crowd.trainer.0);
        kinglet_model_free(model);
    }
}
