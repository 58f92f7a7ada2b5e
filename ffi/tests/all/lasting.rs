//! What outlives a call: windows in files, prompts that sessions share, models that make room or stand still.

use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kinglet::*;

use crate::hard::{
    GREEDY, Shared, answer, c, chunks_of, cpu, event, generate, open, path, report, session, tokenize, trainer,
};
use crate::support::{Scratch, error, message};

pub fn feed(session: *mut kinglet_session, tokens: &[i32]) {
    let mut err = error();
    // SAFETY: all pointers are ours.
    let status = unsafe { kinglet_session_feed(session, tokens.as_ptr(), tokens.len(), &mut err) };
    assert_eq!(status, KINGLET_OK, "{}", message(&err));
}

pub fn logits(session: *mut kinglet_session) -> Vec<f32> {
    let (mut count, mut logits) = (0, vec![0f32; 4096]);
    // SAFETY: the array is as long as we say.
    let status = unsafe { kinglet_session_logits(session, logits.as_mut_ptr(), 4096, &mut count, null_mut()) };
    assert_eq!(status, KINGLET_OK);
    logits.truncate(count);
    logits
}

fn count(session: *mut kinglet_session) -> usize {
    let mut count = 0;
    // SAFETY: all pointers are ours.
    assert_eq!(unsafe { kinglet_session_token_count(session, &mut count, null_mut()) }, KINGLET_OK);
    count
}

pub fn free(sessions: &[*mut kinglet_session], model: *mut kinglet_model) {
    // SAFETY: they are ours.
    unsafe {
        sessions.iter().for_each(|session| kinglet_session_free(*session));
        kinglet_model_free(model);
    }
}

/// The embedding of `text`: a direction, of length 1.
pub fn embed(model: *const kinglet_model, session: *mut kinglet_session, text: &str) -> Vec<f32> {
    let (tokens, mut n) = (tokenize(model, text), 0);
    // SAFETY: the arrays are as long as we say.
    unsafe {
        let status = kinglet_session_embed(session, tokens.as_ptr(), tokens.len(), null_mut(), 0, &mut n, null_mut());
        assert_eq!(status, KINGLET_ERR_TOO_SMALL);
        let (mut out, mut err) = (vec![0f32; n], error());
        let at = out.as_mut_ptr();
        let status = kinglet_session_embed(session, tokens.as_ptr(), tokens.len(), at, n, null_mut(), &mut err);
        assert_eq!(status, KINGLET_OK, "{}", message(&err));
        out
    }
}

/// A training in the folder `name` for [`trainer`], `steps` of 4 windows each.
pub fn training(scratch: &Scratch, name: &str, steps: usize) -> String {
    format!(
        r#"{{"data": {:?}, "output": {:?}, "steps": {steps}, "warmup": 0, "val_fraction": 0, "batch": 4, "seq": 64}}"#,
        scratch.lessons(),
        scratch.path(name)
    )
}

#[test]
fn a_window_goes_on_from_a_file() {
    let scratch = Scratch::new("saved");
    let model = open(&scratch.model());
    let (first, second) = (session(model, None), session(model, None));
    let (tokens, file) = (tokenize(model, "the other hat is on the table"), path(&scratch.path("window.kinglet")));
    feed(first, &tokens);
    let mut err = error();
    // SAFETY: all pointers are ours.
    unsafe {
        assert_eq!(kinglet_session_save(first, file.as_ptr(), &mut err), KINGLET_OK, "{}", message(&err));
        feed(second, &[1, 2, 3]);
        assert_eq!(kinglet_session_load(second, file.as_ptr(), &mut err), KINGLET_OK, "{}", message(&err));
        assert_eq!(count(second), tokens.len());
        assert_eq!(kinglet_session_logits(second, null_mut(), 0, null_mut(), null_mut()), KINGLET_ERR_ARG, "stale");
        feed(first, &[9]);
        feed(second, &[9]);
        assert_eq!(logits(first), logits(second));

        // What is no window of this model leaves the window as it was.
        let refused = |file: &std::path::Path, code: i32| {
            let mut err = error();
            assert_eq!(kinglet_session_load(second, path(file).as_ptr(), &mut err), code, "{}", message(&err));
            assert_eq!(count(second), tokens.len() + 1);
        };
        refused(&scratch.path("missing"), KINGLET_ERR_IO);
        refused(&scratch.path("tiny.gguf"), KINGLET_ERR_FORMAT);
        let whole = std::fs::read(scratch.path("window.kinglet")).expect("the file");
        std::fs::write(scratch.path("short"), &whole[..whole.len() - 1]).expect("a file");
        refused(&scratch.path("short"), KINGLET_ERR_FORMAT);
        let mut damaged = whole.clone();
        let middle = damaged.len() / 2;
        damaged[middle] ^= 1;
        std::fs::write(scratch.path("damaged"), damaged).expect("a file");
        refused(&scratch.path("damaged"), KINGLET_ERR_FORMAT);

        // A session that answers is busy.
        let g = generate(first, GREEDY).expect("a generation");
        assert_eq!(kinglet_session_save(first, file.as_ptr(), null_mut()), KINGLET_ERR_BUSY);
        assert_eq!(kinglet_session_load(first, file.as_ptr(), null_mut()), KINGLET_ERR_BUSY);
        kinglet_generation_free(g);
    }
    free(&[first, second], model);
}

#[test]
fn sessions_share_prompts_until_memory_is_short() {
    let scratch = Scratch::new("prefix");
    let (file, mut model) = (path(&scratch.model()), null_mut());
    let options = kinglet_model_options { prefix_cache: 64 << 20, ..cpu() };
    // SAFETY: all pointers are ours.
    let status = unsafe { kinglet_model_open(file.as_ptr(), &options, &mut model, null_mut()) };
    assert_eq!(status, KINGLET_OK);
    let reused = |session| {
        let (g, mut event) = (generate(session, GREEDY).expect("a generation"), event());
        // SAFETY: all pointers are ours.
        unsafe {
            assert_eq!(kinglet_generation_next(g, &mut event, null_mut()), KINGLET_OK);
            kinglet_generation_free(g);
        }
        (event.reused_tokens, event.prompt_tokens)
    };
    let sessions = [session(model, None), session(model, None), session(model, None)];
    assert_eq!(reused(sessions[0]).0, 0);
    let (kept, prompt) = reused(sessions[1]);
    assert_eq!(kept, prompt - 1, "the second session has read the prompt again");
    let mut freed = 0;
    // SAFETY: all pointers are ours.
    unsafe {
        assert_eq!(kinglet_model_trim(model, &mut freed, null_mut()), KINGLET_OK);
        assert!(freed > 0);
        assert_eq!(kinglet_model_trim(model, null_mut(), null_mut()), KINGLET_OK);
        assert_eq!(kinglet_model_trim(model, &mut freed, null_mut()), KINGLET_OK);
        assert_eq!(freed, 0, "there is nothing left to give");
        assert_eq!(kinglet_model_trim(null_mut(), &mut freed, null_mut()), KINGLET_ERR_ARG);
    }
    assert_eq!(reused(sessions[2]).0, 0, "what was given back is still there");
    // Sessions that gave their memory back answer as before.
    assert_eq!(answer(sessions[0], GREEDY), answer(sessions[1], GREEDY));
    free(&sessions, model);
}

#[test]
fn making_room_disturbs_no_session() {
    let scratch = Scratch::new("room");
    let model = Shared(open(&scratch.model()));
    let own = session(model.0, None);
    let expected = answer(own, GREEDY).tokens;
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let model = &model;
            while done.load(Ordering::Relaxed) == 0 {
                // SAFETY: any thread may.
                assert_eq!(unsafe { kinglet_model_trim(model.0, null_mut(), null_mut()) }, KINGLET_OK);
            }
        });
        // None of these is told that its session is busy. A failure must not leave the other thread behind.
        let calls = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            (0..20_000).for_each(|_| _ = count(own));
            (0..20).for_each(|_| assert_eq!(answer(own, GREEDY).tokens, expected));
        }));
        done.store(1, Ordering::Relaxed);
        assert!(calls.is_ok());
    });
    free(&[own], model.0);
}

#[test]
fn an_embedding_is_a_direction_and_leaves_the_window() {
    let scratch = Scratch::new("embed");
    let model = open(&scratch.model());
    let s = session(model, None);
    feed(s, &[5, 6]);
    let embed = |text: &str| embed(model, s, text);
    let alike = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let (one, other) = (embed("the hat"), embed("you and hello"));
    assert!((alike(&one, &one) - 1.0).abs() < 1e-4 && alike(&one, &other) < 0.99, "{}", alike(&one, &other));
    assert_eq!(one, embed("the hat"));
    assert_eq!(count(s), 2);
    // SAFETY: the array is as long as we say.
    let none =
        unsafe { kinglet_session_embed(s, null(), 0, vec![0f32; 4096].as_mut_ptr(), 4096, null_mut(), null_mut()) };
    assert_eq!(none, KINGLET_ERR_ARG);
    free(&[s], model);
}

/// Pulls a generation to its end, and waits while its model is suspended; counts the times.
fn pull_patiently(g: &Shared<kinglet_generation>, events: &AtomicUsize, refused: &AtomicUsize) -> (Vec<i32>, i32) {
    let (mut tokens, mut end, mut event) = (Vec::new(), 0, event());
    loop {
        // SAFETY: all pointers are ours; what the event points to is read before the next call.
        match unsafe { kinglet_generation_next(g.0, &mut event, null_mut()) } {
            KINGLET_OK => {
                events.fetch_add(1, Ordering::SeqCst);
                if event.n_tokens > 0 {
                    // SAFETY: as above.
                    tokens.extend_from_slice(unsafe { std::slice::from_raw_parts(event.tokens, event.n_tokens) });
                }
                end = end.max(event.end_reason);
            }
            KINGLET_DONE => return (tokens, end),
            KINGLET_ERR_SUSPENDED => {
                refused.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(1));
            }
            status => panic!("{status}"),
        }
    }
}

#[test]
fn a_suspended_model_stands_still_and_goes_on_as_if_nothing_had_been() {
    let scratch = Scratch::new("suspend");
    stands_still(open(&scratch.model()));
}

/// There the memory is given back meanwhile, too.
#[test]
#[cfg(feature = "gpu")]
fn a_suspended_model_goes_on_on_a_gpu() {
    let scratch = Scratch::new("suspend-gpu");
    stands_still(crate::hard::open_with(
        &scratch.model(),
        &kinglet_model_options { backend: c"gpu".as_ptr(), ..cpu() },
    ));
}

fn stands_still(model: *mut kinglet_model) {
    let model = Shared(model);
    // A prompt of many chunks and a long answer, so that suspending hits both.
    let request = format!(
        r#"{{"prompt": "{}", "max_tokens": 100, "ignore_end": true, "sampling": {{"temperature": 0}}}}"#,
        "the hat and ".repeat(40)
    );
    let sessions = [session(model.0, chunks_of(4)), session(model.0, chunks_of(4))];
    let expected = answer(sessions[0], &request);
    let g = Shared(generate(sessions[1], &request).expect("a generation"));
    let (events, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let puller = scope.spawn(|| pull_patiently(&g, &events, &refused));
        let (mut suspended, end) = (0, Instant::now() + Duration::from_secs(60));
        while !puller.is_finished() && suspended < 60 && Instant::now() < end {
            // SAFETY: any thread may.
            unsafe { assert_eq!(kinglet_model_suspend(model.0, null_mut()), KINGLET_OK) };
            let (before, asked) = (events.load(Ordering::SeqCst), refused.load(Ordering::SeqCst));
            // One event may have been computed before and counted after.
            while refused.load(Ordering::SeqCst) < asked + 2 && !puller.is_finished() {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(events.load(Ordering::SeqCst) <= before + 1, "a suspended model has computed");
            suspended += 1;
            // SAFETY: any thread may.
            unsafe { assert_eq!(kinglet_model_resume(model.0, null_mut()), KINGLET_OK) };
            std::thread::sleep(Duration::from_micros(300));
        }
        let (tokens, end) = puller.join().expect("the puller ends");
        assert_eq!((tokens, end), (expected.tokens.clone(), expected.end), "suspended {suspended} times");
        assert!(suspended > 2, "suspended {suspended} times");
    });
    // SAFETY: it is ours.
    unsafe { kinglet_generation_free(g.0) };
    free(&sessions, model.0);
}

#[test]
fn what_computes_says_that_the_model_is_suspended() {
    let scratch = Scratch::new("suspended");
    let model = open(&scratch.model());
    let s = session(model, None);
    let config = training(&scratch, "learned", 2);
    let t = trainer(model, &config).expect("a trainer");
    let (mut out, mut err, mut scores) = (null_mut(), error(), [0f32; 8]);
    // SAFETY: all pointers are ours.
    unsafe {
        assert_eq!(kinglet_model_suspend(model, &mut err), KINGLET_OK);
        assert_eq!(kinglet_session_create(model, null(), &mut out, &mut err), KINGLET_ERR_SUSPENDED);
        assert!(message(&err).contains("kinglet_model_resume"), "{}", message(&err));
        assert_eq!(kinglet_session_feed(s, [1, 2].as_ptr(), 2, &mut err), KINGLET_ERR_SUSPENDED);
        let status = kinglet_session_score(s, [1, 2].as_ptr(), 2, scores.as_mut_ptr(), 8, &mut err);
        assert_eq!(status, KINGLET_ERR_SUSPENDED);
        assert_eq!(kinglet_trainer_step(t, &mut report(), &mut err), KINGLET_ERR_SUSPENDED);
        assert_eq!(trainer(model, &config).unwrap_err().0, KINGLET_ERR_SUSPENDED);
        // What does not compute goes on: an application that goes to the background saves.
        assert_eq!(kinglet_trainer_save(t, &mut err), KINGLET_OK, "{}", message(&err));
        let file = c(scratch.path("w.kinglet").to_str().expect("UTF-8"));
        assert_eq!(kinglet_session_save(s, file.as_ptr(), &mut err), KINGLET_OK, "{}", message(&err));
        // Somebody who asked to stop is answered first.
        kinglet_trainer_cancel(t);
        assert_eq!(kinglet_model_resume(model, &mut err), KINGLET_OK);
        assert_eq!(kinglet_trainer_step(t, &mut report(), &mut err), KINGLET_ERR_CANCELLED);
        assert_eq!(kinglet_trainer_step(t, &mut report(), &mut err), KINGLET_OK, "{}", message(&err));
        feed(s, &[1, 2]);
        kinglet_trainer_free(t);
    }
    free(&[s], model);
}

#[test]
fn a_step_that_suspending_stops_is_taken_again() {
    let scratch = Scratch::new("suspend-step");
    taken_again(&scratch, open(&scratch.model()));
}

/// There the training's state leaves the device meanwhile.
#[test]
#[cfg(feature = "gpu")]
fn a_step_that_suspending_stops_is_taken_again_on_a_gpu() {
    let scratch = Scratch::new("suspend-step-gpu");
    let options = kinglet_model_options { backend: c"gpu".as_ptr(), ..cpu() };
    taken_again(&scratch, crate::hard::open_with(&scratch.model(), &options));
}

fn taken_again(scratch: &Scratch, model: *mut kinglet_model) {
    let model = Shared(model);
    let losses = |name: &str, disturbed: bool| {
        let t = Shared(trainer(model.0, &training(scratch, name, 6)).expect("a trainer"));
        let (mut losses, refused) = (Vec::new(), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            let stepper = scope.spawn(|| {
                let t = &t;
                let mut report = report();
                loop {
                    // SAFETY: all pointers are ours.
                    match unsafe { kinglet_trainer_step(t.0, &mut report, null_mut()) } {
                        KINGLET_OK => losses.push(report.loss),
                        KINGLET_DONE => return,
                        KINGLET_ERR_SUSPENDED => {
                            refused.fetch_add(1, Ordering::SeqCst);
                            std::thread::sleep(Duration::from_millis(1));
                        }
                        status => panic!("{status}"),
                    }
                }
            });
            // Often, but not for ever: a step that is stopped has to begin anew.
            for _ in 0..if disturbed { 10 } else { 0 } {
                let asked = refused.load(Ordering::SeqCst);
                // SAFETY: any thread may.
                unsafe { assert_eq!(kinglet_model_suspend(model.0, null_mut()), KINGLET_OK) };
                while refused.load(Ordering::SeqCst) == asked && !stepper.is_finished() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                // SAFETY: any thread may.
                unsafe { assert_eq!(kinglet_model_resume(model.0, null_mut()), KINGLET_OK) };
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        // SAFETY: it is ours.
        unsafe { kinglet_trainer_free(t.0) };
        (losses, refused.into_inner())
    };
    let (expected, none) = losses("calm", false);
    assert_eq!((expected.len(), none), (6, 0));
    let (found, refused) = losses("disturbed", true);
    assert_eq!(found, expected);
    assert!(refused > 0, "no step was stopped");
    free(&[], model.0);
}

#[test]
fn null_arguments_are_named() {
    let mut err = error();
    // SAFETY: NULL is what is tested.
    unsafe {
        let e = &raw mut err;
        let (model, session) = (null_mut(), null_mut());
        let at = null_mut::<f32>();
        let wrong = |status: i32, word: &str| {
            assert_eq!(status, KINGLET_ERR_ARG);
            assert!(message(&*e).contains(word), "{}", message(&*e));
        };
        wrong(kinglet_session_embed(session, null(), 0, at, 0, null_mut(), e), "session is NULL");
        wrong(kinglet_session_save(session, c"a".as_ptr(), e), "session is NULL");
        wrong(kinglet_session_load(session, c"a".as_ptr(), e), "session is NULL");
        wrong(kinglet_model_trim(model, null_mut(), e), "model is NULL");
        wrong(kinglet_model_suspend(model, e), "model is NULL");
        wrong(kinglet_model_resume(model, e), "model is NULL");
    }
    let scratch = Scratch::new("lasting-null");
    let model = open(&scratch.model());
    let s = session(model, None);
    // SAFETY: NULL is what is tested; the session is ours.
    unsafe {
        assert_eq!(kinglet_session_save(s, null(), &mut err), KINGLET_ERR_ARG);
        assert!(message(&err).contains("path is NULL"), "{}", message(&err));
        assert_eq!(kinglet_session_load(s, c"\xff".as_ptr(), &mut err), KINGLET_ERR_ARG);
        let missing = scratch.path("no/such/folder/window");
        assert_eq!(kinglet_session_save(s, path(&missing).as_ptr(), &mut err), KINGLET_ERR_IO);
        assert!(message(&err).contains("no/such/folder"), "{}", message(&err));
    }
    free(&[s], model);
}
