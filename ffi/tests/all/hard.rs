//! Calls that go wrong, that race, or that hand over rubbish: each gets the status that the header promises, and leaves
//! everything else whole.

use std::ffi::{CStr, CString, c_char, c_void};
use std::ops::Range;
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kinglet::*;

use crate::support::{Scratch, error, message};

pub fn c(text: &str) -> CString {
    CString::new(text).expect("no NUL")
}

pub fn path(path: &Path) -> CString {
    c(path.to_str().expect("UTF-8"))
}

/// A handle that other threads may use too, as the header allows.
pub struct Shared<T>(pub *mut T);
// SAFETY: the header says which calls may come from any thread.
unsafe impl<T> Sync for Shared<T> {}

pub fn open(file: &Path) -> *mut kinglet_model {
    open_with(file, &cpu())
}

pub fn open_with(file: &Path, options: &kinglet_model_options) -> *mut kinglet_model {
    let (mut model, mut err) = (null_mut(), error());
    // SAFETY: all pointers are ours.
    let status = unsafe { kinglet_model_open(path(file).as_ptr(), options, &mut model, &mut err) };
    assert_eq!(status, KINGLET_OK, "{}", message(&err));
    model
}

pub fn cpu() -> kinglet_model_options {
    kinglet_model_options {
        struct_size: size_of::<kinglet_model_options>() as u32,
        flags: 0,
        backend: c"cpu".as_ptr(),
        threads: 2,
        reserved: 0,
        memory_budget: 0,
        prefix_cache: 0,
        gpu_layers: 0,
        tuning: 0,
        gpu_memory: 0,
        tuning_folder: null(),
        gpu_import: 0,
        reserved_2: 0,
    }
}

pub fn session(model: *mut kinglet_model, options: Option<kinglet_session_options>) -> *mut kinglet_session {
    let (mut session, mut err) = (null_mut(), error());
    let options = options.as_ref().map_or(null(), std::ptr::from_ref);
    // SAFETY: all pointers are ours.
    let status = unsafe { kinglet_session_create(model, options, &mut session, &mut err) };
    assert_eq!(status, KINGLET_OK, "{}", message(&err));
    session
}

pub fn chunks_of(tokens: i32) -> Option<kinglet_session_options> {
    Some(kinglet_session_options {
        struct_size: size_of::<kinglet_session_options>() as u32,
        flags: 0,
        context_tokens: 0,
        kv_type: 0,
        chunk_tokens: tokens,
        reserved: 0,
    })
}

pub fn event() -> kinglet_event {
    // SAFETY: numbers and pointers, for which zero is a value.
    let zero: kinglet_event = unsafe { std::mem::zeroed() };
    kinglet_event { struct_size: size_of::<kinglet_event>() as u32, ..zero }
}

pub fn report() -> kinglet_train_report {
    // SAFETY: numbers and pointers, for which zero is a value.
    let zero: kinglet_train_report = unsafe { std::mem::zeroed() };
    kinglet_train_report { struct_size: size_of::<kinglet_train_report>() as u32, ..zero }
}

pub fn generate(session: *mut kinglet_session, request: &str) -> Result<*mut kinglet_generation, (i32, String)> {
    let (mut generation, mut err) = (null_mut(), error());
    // SAFETY: all pointers are ours.
    let status = unsafe { kinglet_generate(session, c(request).as_ptr(), &mut generation, &mut err) };
    match status {
        KINGLET_OK => Ok(generation),
        status => {
            assert!(generation.is_null(), "an error hands nothing out");
            Err((status, message(&err)))
        }
    }
}

/// What a generation came to.
#[derive(Debug, Default, PartialEq)]
pub struct Answer {
    pub pieces: Vec<String>,
    pub tokens: Vec<i32>,
    pub prefills: Vec<i32>,
    pub end: i32,
}

impl Answer {
    fn text(&self) -> String {
        self.pieces.concat()
    }
}

pub fn pull(generation: *mut kinglet_generation) -> Answer {
    let (mut answer, mut event, mut err) = (Answer::default(), event(), error());
    loop {
        // SAFETY: all pointers are ours; what the event points to is read before the next call.
        unsafe {
            match kinglet_generation_next(generation, &mut event, &mut err) {
                KINGLET_DONE => return answer,
                KINGLET_OK => {}
                status => panic!("{status}: {}", message(&err)),
            }
            match event.kind {
                KINGLET_EVENT_TEXT => {
                    // A model may write U+0000 too, so the length counts.
                    let text = std::slice::from_raw_parts(event.text.cast::<u8>(), event.text_len + 1);
                    let (end, text) = text.split_last().expect("a NUL at the end");
                    answer.pieces.push(str::from_utf8(text).expect("whole UTF-8").to_owned());
                    assert_eq!(*end, 0);
                    answer.tokens.extend_from_slice(std::slice::from_raw_parts(event.tokens, event.n_tokens));
                }
                KINGLET_EVENT_PREFILL => answer.prefills.push(event.prefilled_tokens),
                KINGLET_EVENT_END => answer.end = event.end_reason,
                other => panic!("an event of kind {other}"),
            }
        }
    }
}

pub fn answer(session: *mut kinglet_session, request: &str) -> Answer {
    let generation = generate(session, request).expect("a generation");
    let answer = pull(generation);
    // SAFETY: it is ours.
    unsafe { kinglet_generation_free(generation) };
    answer
}

pub fn tokenize(model: *const kinglet_model, text: &str) -> Vec<i32> {
    let mut count = 0;
    let (text, length) = (text.as_ptr().cast(), text.len());
    // SAFETY: the arrays are as long as we say.
    unsafe {
        let status = kinglet_tokenize(model, text, length, 0, null_mut(), 0, &mut count, null_mut());
        assert_eq!(status, if count == 0 { KINGLET_OK } else { KINGLET_ERR_TOO_SMALL });
        let mut tokens = vec![0; count];
        assert_eq!(
            kinglet_tokenize(model, text, length, 0, tokens.as_mut_ptr(), count, &mut count, null_mut()),
            KINGLET_OK
        );
        tokens
    }
}

pub const GREEDY: &str = r#"{"prompt": "the hat and the", "max_tokens": 12, "sampling": {"temperature": 0}}"#;

#[test]
fn null_and_rubbish_arguments_are_named() {
    let scratch = Scratch::new("null");
    let model = open(&scratch.model());
    let s = session(model, None);
    let mut err = error();
    // SAFETY: NULL is what is tested; all other pointers are ours.
    unsafe {
        let e = &raw mut err;
        macro_rules! wrong {
            ($call:expr, $wanted:expr, $word:expr) => {{
                let status = $call;
                let text = message(&*e);
                assert_eq!((status, (*e).code), ($wanted, $wanted), "{text}");
                assert!(text.contains($word), "{text:?} lacks {:?}", $word);
            }};
        }
        let mut out = null_mut();
        wrong!(kinglet_model_open(null(), null(), &mut out, e), KINGLET_ERR_ARG, "path is NULL");
        wrong!(kinglet_model_open(c"a".as_ptr(), null(), null_mut(), e), KINGLET_ERR_ARG, "model is NULL");
        wrong!(kinglet_model_open(c"/no/such.gguf".as_ptr(), null(), &mut out, e), KINGLET_ERR_IO, "/no/such.gguf");
        wrong!(kinglet_model_open(c"\xff".as_ptr(), null(), &mut out, e), KINGLET_ERR_ARG, "UTF-8");
        let file = path(&scratch.path("tiny.gguf"));
        let bad = kinglet_model_options { backend: c"tpu".as_ptr(), ..cpu() };
        wrong!(kinglet_model_open(file.as_ptr(), &bad, &mut out, e), KINGLET_ERR_ARG, "tpu");
        let bad = kinglet_model_options { struct_size: 0, ..cpu() };
        wrong!(kinglet_model_open(file.as_ptr(), &bad, &mut out, e), KINGLET_ERR_ABI, "struct_size");
        let bad = kinglet_model_options { memory_budget: 1000, ..cpu() };
        wrong!(kinglet_model_open(file.as_ptr(), &bad, &mut out, e), KINGLET_ERR_MEMORY, "1000");
        let bad = kinglet_model_options { flags: 64, ..cpu() };
        wrong!(kinglet_model_open(file.as_ptr(), &bad, &mut out, e), KINGLET_ERR_UNSUPPORTED, "0x40");
        // Enough for the file, too little for a session.
        let length = std::fs::metadata(scratch.path("tiny.gguf")).expect("the file").len();
        let tight = kinglet_model_options { memory_budget: length + 4096, ..cpu() };
        assert_eq!(kinglet_model_open(file.as_ptr(), &tight, &mut out, e), KINGLET_OK, "{}", message(&*e));
        wrong!(kinglet_session_create(out, null(), &mut null_mut(), e), KINGLET_ERR_MEMORY, "smaller context");
        kinglet_model_free(out);
        wrong!(kinglet_model_open_fd(-1, 0, 0, null(), &mut out, e), KINGLET_ERR_ARG, "-1");
        wrong!(kinglet_model_open_fd(1_000_000, 0, 0, null(), &mut out, e), KINGLET_ERR_IO, "descriptor");

        let mut text = null_mut();
        wrong!(kinglet_model_info_json(null(), &mut text, e), KINGLET_ERR_ARG, "model is NULL");
        wrong!(kinglet_model_info_json(model, null_mut(), e), KINGLET_ERR_ARG, "text is NULL");
        wrong!(kinglet_session_create(null(), null(), &mut null_mut(), e), KINGLET_ERR_ARG, "model is NULL");
        let bad = kinglet_session_options { kv_type: 9, ..chunks_of(0).unwrap() };
        wrong!(kinglet_session_create(model, &bad, &mut null_mut(), e), KINGLET_ERR_ARG, "kv_type is 9");
        let bad = kinglet_session_options { context_tokens: -5, ..chunks_of(0).unwrap() };
        wrong!(kinglet_session_create(model, &bad, &mut null_mut(), e), KINGLET_ERR_ARG, "context_tokens is -5");
        wrong!(kinglet_session_feed(null_mut(), [1].as_ptr(), 1, e), KINGLET_ERR_ARG, "session is NULL");
        wrong!(kinglet_session_feed(s, null(), 3, e), KINGLET_ERR_ARG, "tokens is NULL");
        wrong!(kinglet_session_feed(s, [-1].as_ptr(), 1, e), KINGLET_ERR_ARG, "-1 is no token");
        wrong!(kinglet_session_feed(s, [999_999].as_ptr(), 1, e), KINGLET_ERR_ARG, "999999");
        wrong!(kinglet_session_feed(s, [1; 600].as_ptr(), 600, e), KINGLET_ERR_CONTEXT_FULL, "512");
        wrong!(kinglet_session_rewind(s, 7, e), KINGLET_ERR_ARG, "7");
        wrong!(kinglet_session_logits(s, null_mut(), 0, null_mut(), e), KINGLET_ERR_ARG, "feed");
        wrong!(kinglet_session_score(s, [1].as_ptr(), 1, null_mut(), 0, e), KINGLET_ERR_ARG, "2 tokens");
        wrong!(
            kinglet_session_set_adapters(s, [null::<kinglet_adapter>()].as_ptr(), null(), 1, e),
            KINGLET_ERR_ARG,
            "adapter is NULL"
        );
        wrong!(kinglet_token_bytes(model, -4, 0, null_mut(), 0, null_mut(), e), KINGLET_ERR_ARG, "-4");
        wrong!(kinglet_generation_next(null_mut(), &mut event(), e), KINGLET_ERR_ARG, "generation is NULL");
        wrong!(kinglet_trainer_step(null_mut(), &mut report(), e), KINGLET_ERR_ARG, "trainer is NULL");
        wrong!(kinglet_set_log(Some(ignore), null_mut(), 9, e), KINGLET_ERR_ARG, "level is 9");

        kinglet_string_free(null_mut());
        kinglet_model_free(null_mut());
        kinglet_session_free(null_mut());
        kinglet_generation_free(null_mut());
        kinglet_adapter_free(null_mut());
        kinglet_trainer_free(null_mut());
        kinglet_generation_cancel(null());
        kinglet_trainer_cancel(null());
        kinglet_session_cancel(null());
        kinglet_session_free(s);
        kinglet_model_free(model);
    }
}

#[test]
fn requests_that_say_something_unknown_or_absurd_are_refused_by_name() {
    let scratch = Scratch::new("request");
    let model = open(&scratch.model());
    let s = session(model, None);
    for (request, code, word) in [
        ("", KINGLET_ERR_ARG, "JSON"),
        ("{", KINGLET_ERR_ARG, "JSON"),
        ("[]", KINGLET_ERR_ARG, "JSON"),
        ("{}", KINGLET_ERR_ARG, "either messages or prompt"),
        (r#"{"prompt": "a", "messages": []}"#, KINGLET_ERR_ARG, "either"),
        (r#"{"prompt": "a", "maxtokens": 3}"#, KINGLET_ERR_ARG, "maxtokens"),
        (r#"{"prompt": "a", "max_tokens": -3}"#, KINGLET_ERR_ARG, "-3"),
        (r#"{"prompt": "a", "tools": []}"#, KINGLET_ERR_ARG, "tools"),
        (r#"{"prompt": "a", "sampling": {"heat": 1}}"#, KINGLET_ERR_ARG, "heat"),
        (r#"{"prompt": "a", "sampling": {"temperature": -1}}"#, KINGLET_ERR_ARG, "temperature is -1"),
        (r#"{"prompt": "a", "sampling": {"logit_bias": [[99999, 1]]}}"#, KINGLET_ERR_ARG, "99999"),
        (r#"{"prompt": ""}"#, KINGLET_ERR_ARG, "no tokens"),
        (r#"{"messages": [3]}"#, KINGLET_ERR_ARG, "messages[0]"),
        (r#"{"messages": [{"content": "a"}]}"#, KINGLET_ERR_ARG, "role"),
        (r#"{"messages": [{"role": "user", "content": "a", "mood": 1}]}"#, KINGLET_ERR_ARG, "mood"),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#,
            KINGLET_ERR_UNSUPPORTED,
            "image_url",
        ),
    ] {
        let (status, text) = generate(s, request).expect_err(request);
        assert_eq!(status, code, "{request}: {text}");
        assert!(text.contains(word), "{request}: {text:?} lacks {word:?}");
    }
    let long = format!(r#"{{"prompt": "{}"}}"#, "x".repeat(2000));
    assert_eq!(generate(s, &long).unwrap_err().0, KINGLET_ERR_CONTEXT_FULL);
    // After all of these the session answers.
    assert_eq!(answer(s, GREEDY).tokens.len(), 12);
    // SAFETY: they are ours.
    unsafe {
        kinglet_session_free(s);
        kinglet_model_free(model);
    }
}

#[test]
fn any_order_of_freeing_is_right() {
    let scratch = Scratch::new("order");
    let file = scratch.model();
    let expected = {
        let model = open(&file);
        let s = session(model, None);
        let expected = answer(s, GREEDY);
        // SAFETY: they are ours.
        unsafe {
            kinglet_session_free(s);
            kinglet_model_free(model);
        }
        expected
    };
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let model = open(&file);
        let s = session(model, None);
        let g = generate(s, GREEDY).expect("a generation");
        let mut pulled = None;
        for (place, which) in order.into_iter().enumerate() {
            // The generation answers in whole, whatever was freed before.
            if which == 2 {
                pulled = Some(pull(g));
            }
            // SAFETY: each is freed once.
            unsafe {
                match which {
                    0 => kinglet_model_free(model),
                    1 => kinglet_session_free(s),
                    _ => kinglet_generation_free(g),
                }
            }
            assert!(place < 3);
        }
        assert_eq!(pulled.as_ref(), Some(&expected), "{order:?}");
    }
    // An owner more: the model goes with the last.
    let model = open(&file);
    // SAFETY: two owners, two frees; the session is ours.
    unsafe {
        assert_eq!(kinglet_model_retain(model, null_mut()), KINGLET_OK);
        kinglet_model_free(model);
        let s = session(model, None);
        kinglet_model_free(model);
        assert_eq!(answer(s, GREEDY), expected);
        kinglet_session_free(s);
    }
}

#[test]
fn a_generation_holds_its_session_until_it_has_ended() {
    let scratch = Scratch::new("hold");
    let model = open(&scratch.model());
    let s = session(model, None);
    let g = generate(s, GREEDY).expect("a generation");
    let mut err = error();
    // SAFETY: all pointers are ours.
    unsafe {
        assert_eq!(kinglet_session_reset(s, &mut err), KINGLET_ERR_BUSY);
        assert!(message(&err).contains("generation"), "{}", message(&err));
        assert_eq!(generate(s, GREEDY).unwrap_err().0, KINGLET_ERR_BUSY);
        pull(g);
        // Told its end, it has let go, though it is not freed.
        assert_eq!(kinglet_session_reset(s, &mut err), KINGLET_OK);
        assert_eq!(kinglet_generation_next(g, &mut event(), &mut err), KINGLET_DONE);
        // Cancelling it now hits nobody.
        let other = generate(s, GREEDY).expect("a generation");
        kinglet_generation_cancel(g);
        assert_eq!(pull(other).tokens.len(), 12);
        // Freed in the middle, it lets go too.
        let third = generate(s, GREEDY).expect("a generation");
        assert_eq!(kinglet_generation_next(third, &mut event(), &mut err), KINGLET_OK);
        kinglet_generation_free(third);
        assert_eq!(kinglet_session_reset(s, &mut err), KINGLET_OK);
        kinglet_generation_free(other);
        kinglet_generation_free(g);
        kinglet_session_free(s);
        kinglet_model_free(model);
    }
}

#[test]
fn eight_threads_at_once_get_busy_or_a_token_and_nothing_is_lost() {
    let scratch = Scratch::new("busy");
    let model = open(&scratch.model());
    let s = session(model, None);
    let request = r#"{"prompt": "the hat", "max_tokens": 100, "ignore_end": true, "sampling": {"temperature": 0}}"#;
    let alone = answer(s, request);
    assert_eq!(alone.tokens.len(), 100);
    let whole = Shared(s);
    let (busy, turned_away) = (AtomicUsize::new(0), AtomicUsize::new(0));
    // Until threads have met at the generation and at the session, which may take some rounds.
    let deadline = Instant::now() + Duration::from_secs(30);
    while busy.load(Ordering::Relaxed) == 0 || turned_away.load(Ordering::Relaxed) == 0 {
        assert!(Instant::now() < deadline, "the threads never met");
        let g = Shared(generate(s, request).expect("a generation"));
        let (tokens, ends) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (g, whole, tokens, busy, ends, turned_away) = (&g, &whole, &tokens, &busy, &ends, &turned_away);
                scope.spawn(move || {
                    loop {
                        let (mut event, mut err) = (event(), error());
                        // SAFETY: the struct is this thread's; the generation may be asked by any.
                        match unsafe { kinglet_generation_next(g.0, &mut event, &mut err) } {
                            KINGLET_OK if event.kind == KINGLET_EVENT_TEXT => {
                                tokens.fetch_add(event.n_tokens, Ordering::Relaxed)
                            }
                            KINGLET_OK => ends.fetch_add(1, Ordering::Relaxed),
                            KINGLET_ERR_BUSY => busy.fetch_add(1, Ordering::Relaxed),
                            KINGLET_DONE => return,
                            status => panic!("{status}: {}", message(&err)),
                        };
                        if thread % 2 == 0 {
                            // SAFETY: the session may be asked by any thread.
                            let status = unsafe { kinglet_session_token_count(whole.0, &mut 0, null_mut()) };
                            assert!(matches!(status, KINGLET_OK | KINGLET_ERR_BUSY), "{status}");
                            turned_away.fetch_add(usize::from(status == KINGLET_ERR_BUSY), Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!((tokens.into_inner(), ends.into_inner()), (100, 1));
        // SAFETY: it is ours.
        unsafe { kinglet_generation_free(g.0) };
    }
    assert_eq!(answer(s, request).tokens, alone.tokens);
    // SAFETY: they are ours.
    unsafe {
        kinglet_session_free(s);
        kinglet_model_free(model);
    }
}

#[test]
fn cancelling_ends_an_answer_and_the_reading_of_a_prompt() {
    let scratch = Scratch::new("cancel");
    let model = open(&scratch.model());
    let s = session(model, chunks_of(32));
    let endless = r#"{"prompt": "a", "ignore_end": true}"#;
    // Before the first call: no token is computed.
    let g = generate(s, endless).expect("a generation");
    // SAFETY: it is ours.
    unsafe { kinglet_generation_cancel(g) };
    let nothing = pull(g);
    assert_eq!((nothing.end, nothing.tokens.len()), (KINGLET_END_CANCELLED, 0));
    // SAFETY: it is ours.
    unsafe { kinglet_generation_free(g) };

    // While another thread pulls.
    let g = Shared(generate(s, endless).expect("a generation"));
    let started = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let puller = scope.spawn(|| {
            let (g, mut event) = (&g, event());
            loop {
                // SAFETY: all pointers are ours.
                let status = unsafe { kinglet_generation_next(g.0, &mut event, null_mut()) };
                started.fetch_add(1, Ordering::Relaxed);
                if status != KINGLET_OK || event.kind == KINGLET_EVENT_END {
                    return event.end_reason;
                }
            }
        });
        while started.load(Ordering::Relaxed) < 5 {
            std::thread::sleep(Duration::from_millis(1));
        }
        // SAFETY: any thread may.
        unsafe { kinglet_generation_cancel(g.0) };
        let end = puller.join().expect("the puller ends");
        // A tiny model may have filled its window meanwhile.
        assert!(matches!(end, KINGLET_END_CANCELLED | KINGLET_END_CONTEXT_FULL), "{end}");
    });
    // SAFETY: it is ours.
    unsafe { kinglet_generation_free(g.0) };

    // In the middle of a long prompt, which is read chunk by chunk.
    let long = format!(r#"{{"prompt": "{}", "max_tokens": 1}}"#, "x".repeat(200));
    let g = generate(s, &long).expect("a generation");
    let mut event = event();
    // SAFETY: all pointers are ours.
    unsafe {
        assert_eq!(kinglet_generation_next(g, &mut event, null_mut()), KINGLET_OK);
        assert_eq!((event.kind, event.prefilled_tokens, event.prompt_tokens), (KINGLET_EVENT_PREFILL, 32, 200));
        kinglet_generation_cancel(g);
        assert_eq!(kinglet_generation_next(g, &mut event, null_mut()), KINGLET_OK);
        assert_eq!((event.kind, event.end_reason), (KINGLET_EVENT_END, KINGLET_END_CANCELLED));
        assert_eq!(kinglet_generation_next(g, &mut event, null_mut()), KINGLET_DONE);
        kinglet_generation_free(g);
    }
    // What was read is kept: the same request goes on behind it, and then all of it is there.
    let whole = answer(s, &long);
    assert_eq!((whole.prefills.first(), whole.tokens.len()), (Some(&64), 1));

    // A session's own call.
    let s = Shared(s);
    let text = vec![5; 400];
    std::thread::scope(|scope| {
        let feeder = scope.spawn(|| {
            let s = &s;
            let end = Instant::now() + Duration::from_secs(20);
            while Instant::now() < end {
                // SAFETY: all pointers are ours.
                unsafe {
                    kinglet_session_reset(s.0, null_mut());
                    match kinglet_session_feed(s.0, text.as_ptr(), text.len(), null_mut()) {
                        KINGLET_OK => {}
                        status => return status,
                    }
                }
            }
            KINGLET_OK
        });
        while !feeder.is_finished() {
            // SAFETY: any thread may.
            unsafe { kinglet_session_cancel(s.0) };
            std::thread::sleep(Duration::from_micros(300));
        }
        assert_eq!(feeder.join().expect("the feeder ends"), KINGLET_ERR_CANCELLED);
    });
    // SAFETY: they are ours.
    unsafe {
        kinglet_session_free(s.0);
        kinglet_model_free(model);
    }
}

#[test]
fn pieces_are_whole_characters() {
    let scratch = Scratch::new("utf8");
    let model = open(&scratch.model());
    let s = session(model, None);
    // Biases that make the model write the four bytes of an emoji, each a token of its own, and then the beginning of
    // another: a token that was written is pushed down so that the next comes up.
    let tokens = tokenize(model, "😀");
    assert_eq!(tokens.len(), 4);
    let biases: Vec<String> =
        tokens.iter().zip([4000, 3000, 2000, 1000]).map(|(token, bias)| format!("[{token}, {bias}]")).collect();
    let request = |n: usize| {
        format!(
            r#"{{"prompt": "a", "max_tokens": {n}, "sampling":
              {{"temperature": 0, "presence_penalty": 1e5, "logit_bias": [{}]}}}}"#,
            biases.join(", ")
        )
    };
    let whole = answer(s, &request(4));
    assert_eq!((whole.tokens, whole.pieces), (tokens.clone(), vec!["".into(), "".into(), "".into(), "😀".into()]));
    // Cut off within a character: what is left of it is U+FFFD, and comes at the end.
    let cut = answer(s, &request(3));
    assert_eq!((cut.end, cut.text().as_str()), (KINGLET_END_LENGTH, "\u{FFFD}"));
    // The bytes are there for those who want them.
    let (mut bytes, mut length) = ([0u8; 8], 0);
    // SAFETY: the array is as long as we say.
    let status =
        unsafe { kinglet_token_bytes(model, tokens[0], 0, bytes.as_mut_ptr().cast(), 8, &mut length, null_mut()) };
    assert_eq!((status, &bytes[..length]), (KINGLET_OK, &[0xF0][..]));
    let mut text = [0 as c_char; 16];
    // SAFETY: the arrays are as long as we say.
    let status =
        unsafe { kinglet_detokenize(model, tokens.as_ptr(), 4, 0, text.as_mut_ptr(), 16, &mut length, null_mut()) };
    assert_eq!((status, length), (KINGLET_OK, 4));
    // SAFETY: they are ours.
    unsafe {
        kinglet_session_free(s);
        kinglet_model_free(model);
    }
}

static RELEASED: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" fn ignore(_: *mut c_void, _: i32, _: *const c_char) {}

unsafe extern "C" fn released(user: *mut c_void) {
    assert_eq!(user as usize, 77);
    RELEASED.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn models_open_from_memory_and_from_the_middle_of_a_file() {
    let scratch = Scratch::new("memory");
    let file = scratch.model();
    let model = open(&file);
    let s = session(model, None);
    let expected = answer(s, GREEDY);
    // SAFETY: they are ours.
    unsafe {
        kinglet_session_free(s);
        kinglet_model_free(model);
    }
    let bytes = std::fs::read(&file).expect("the file");
    let mut aligned = vec![0u64; bytes.len().div_ceil(8) + 1];
    let memory: &mut [u8] = bytes_of(&mut aligned);
    memory[..bytes.len()].copy_from_slice(&bytes);
    // Truncated anywhere: refused, and the memory stays ours.
    for length in (0..bytes.len()).step_by(bytes.len() / 60) {
        let (status, model, text) = from_memory(memory, 0..length, 0);
        assert_eq!(status, KINGLET_ERR_FORMAT, "{length} bytes: {text}");
        assert!(model.is_null() && text.contains("<memory>"), "{text}");
    }
    assert_eq!(RELEASED.load(Ordering::Relaxed), 0);
    // In place: released with the last object that uses it.
    let (status, model, text) = from_memory(memory, 0..bytes.len(), 0);
    assert_eq!(status, KINGLET_OK, "{text}");
    let s = session(model, None);
    // SAFETY: it is ours.
    unsafe { kinglet_model_free(model) };
    assert_eq!(RELEASED.load(Ordering::Relaxed), 0);
    assert_eq!(answer(s, GREEDY), expected);
    // SAFETY: it is ours.
    unsafe { kinglet_session_free(s) };
    assert_eq!(RELEASED.load(Ordering::Relaxed), 1);
    // Copied: released at once, and any address will do.
    memory.copy_within(..bytes.len(), 3);
    let (status, model, text) = from_memory(memory, 3..3 + bytes.len(), KINGLET_MODEL_COPY);
    assert_eq!(status, KINGLET_OK, "{text}");
    assert_eq!(RELEASED.load(Ordering::Relaxed), 2);
    memory.fill(0);
    let s = session(model, None);
    assert_eq!(answer(s, GREEDY), expected);
    // SAFETY: they are ours.
    unsafe {
        kinglet_session_free(s);
        kinglet_model_free(model);
    }

    // In a package, at a page.
    use std::os::fd::AsRawFd;
    let package = scratch.path("package");
    let mut content = vec![1u8; 4096];
    content.extend_from_slice(&bytes);
    content.extend_from_slice(&[2; 100]);
    std::fs::write(&package, content).expect("a file");
    let opened = std::fs::File::open(&package).expect("the package");
    let (mut model, mut err) = (null_mut(), error());
    // SAFETY: all pointers are ours.
    unsafe {
        let status = kinglet_model_open_fd(opened.as_raw_fd(), 4096, bytes.len() as u64, &cpu(), &mut model, &mut err);
        assert_eq!(status, KINGLET_OK, "{}", message(&err));
        // The descriptor is ours, and closed.
        drop(opened);
        let s = session(model, None);
        assert_eq!(answer(s, GREEDY), expected);
        kinglet_session_free(s);
        kinglet_model_free(model);
    }
}

/// The bytes of memory that is aligned as models must be.
fn bytes_of(words: &mut [u64]) -> &mut [u8] {
    // SAFETY: numbers are bytes.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len() * 8) }
}

/// Opens the model in a part of `memory`, which must outlive it unless it is copied; the status and the message too.
fn from_memory(memory: &[u8], part: Range<usize>, flags: u32) -> (i32, *mut kinglet_model, String) {
    let (mut model, mut err) = (null_mut(), error());
    let (options, bytes) = (kinglet_model_options { flags, ..cpu() }, &memory[part]);
    let (at, length, user) = (bytes.as_ptr().cast(), bytes.len(), 77 as *mut c_void);
    // SAFETY: the caller keeps the memory; all other pointers are ours.
    let status = unsafe { kinglet_model_open_memory(at, length, Some(released), user, &options, &mut model, &mut err) };
    (status, model, message(&err))
}

#[test]
fn forks_share_a_beginning_and_go_their_own_ways() {
    let scratch = Scratch::new("fork");
    let model = open(&scratch.model());
    let s = session(model, None);
    let tokens = tokenize(model, "hello you, the hat is in the house");
    let logits = |s: *mut kinglet_session| {
        let mut out = vec![0f32; 512];
        let mut count = 0;
        // SAFETY: the array is as long as we say.
        let status = unsafe { kinglet_session_logits(s, out.as_mut_ptr(), out.len(), &mut count, null_mut()) };
        assert_eq!(status, KINGLET_OK);
        out.truncate(count);
        out
    };
    let (mut fork, mut err) = (null_mut(), error());
    // SAFETY: all pointers are ours.
    unsafe {
        assert_eq!(kinglet_session_feed(s, tokens.as_ptr(), tokens.len() - 1, null_mut()), KINGLET_OK);
        assert_eq!(kinglet_session_fork(s, &mut fork, &mut err), KINGLET_OK, "{}", message(&err));
        let mut count = 0;
        assert_eq!(kinglet_session_token_count(fork, &mut count, null_mut()), KINGLET_OK);
        assert_eq!(count, tokens.len() - 1);
        assert_eq!(kinglet_session_feed(fork, &tokens[0], 1, null_mut()), KINGLET_OK);
        assert_eq!(kinglet_session_feed(s, &tokens[tokens.len() - 1], 1, null_mut()), KINGLET_OK);
        assert_ne!(logits(fork), logits(s));
        // A call that fails leaves everything as it was.
        let before = logits(s);
        assert_eq!(kinglet_session_feed(s, [1, -1].as_ptr(), 2, null_mut()), KINGLET_ERR_ARG);
        assert_eq!(kinglet_session_feed(s, [1, 99_999].as_ptr(), 2, null_mut()), KINGLET_ERR_ARG);
        assert_eq!(generate(s, r#"{"prompt": ""}"#).unwrap_err().0, KINGLET_ERR_ARG);
        assert_eq!(logits(s), before);
        assert_eq!(kinglet_session_rewind(fork, tokens.len() - 1, null_mut()), KINGLET_OK);
        assert_eq!(kinglet_session_feed(fork, &tokens[tokens.len() - 1], 1, null_mut()), KINGLET_OK);
        assert_eq!(logits(fork), logits(s));

        // Scores are log-probabilities of what was fed.
        let mut scores = vec![0f32; tokens.len() - 1];
        assert_eq!(kinglet_session_reset(s, null_mut()), KINGLET_OK);
        let status =
            kinglet_session_score(s, tokens.as_ptr(), tokens.len(), scores.as_mut_ptr(), scores.len(), null_mut());
        assert_eq!(status, KINGLET_OK);
        assert!(scores.iter().all(|p| p.is_finite() && *p < 0.0), "{scores:?}");
        assert_eq!(kinglet_session_reset(s, null_mut()), KINGLET_OK);
        assert_eq!(kinglet_session_feed(s, &tokens[0], 1, null_mut()), KINGLET_OK);
        let first = logits(s);
        let sum: f64 = first.iter().map(|x| f64::from(*x).exp()).sum();
        let wanted = f64::from(first[tokens[1] as usize]) - sum.ln();
        assert!((f64::from(scores[0]) - wanted).abs() < 1e-3, "{} but {wanted}", scores[0]);

        // Memory in use is no more than was estimated.
        let zero: kinglet_memory = std::mem::zeroed();
        let mut estimate = kinglet_memory { struct_size: size_of::<kinglet_memory>() as u32, ..zero };
        let mut used = estimate;
        let file = path(&scratch.path("tiny.gguf"));
        let status = kinglet_model_estimate(file.as_ptr(), &cpu(), null(), &mut estimate, &mut err);
        assert_eq!(status, KINGLET_OK, "{}", message(&err));
        assert_eq!(kinglet_session_memory(s, &mut used, &mut err), KINGLET_OK);
        assert!(used.kv_cache > 0 && used.total <= estimate.total && used.weights == estimate.weights);
        kinglet_session_free(s);
        kinglet_session_free(fork);
        kinglet_model_free(model);
    }
}

/// Trains until `stop_after` steps or the end; gives the losses.
fn train(trainer: *mut kinglet_trainer, stop_after: u64) -> Vec<f64> {
    let (mut report, mut err, mut losses) = (report(), error(), Vec::new());
    loop {
        // SAFETY: all pointers are ours.
        match unsafe { kinglet_trainer_step(trainer, &mut report, &mut err) } {
            KINGLET_OK => losses.push(report.loss),
            KINGLET_DONE => return losses,
            status => panic!("{status}: {}", message(&err)),
        }
        if report.step == stop_after {
            return losses;
        }
    }
}

pub fn trainer(model: *mut kinglet_model, config: &str) -> Result<*mut kinglet_trainer, (i32, String)> {
    let (mut trainer, mut err) = (null_mut(), error());
    // SAFETY: all pointers are ours.
    match unsafe { kinglet_trainer_create(model, c(config).as_ptr(), &mut trainer, &mut err) } {
        KINGLET_OK => Ok(trainer),
        status => Err((status, message(&err))),
    }
}

#[test]
fn a_training_that_was_cancelled_is_resumed_as_if_nothing_had_happened() {
    let scratch = Scratch::new("training");
    let model = open(&scratch.model());
    let data = scratch.lessons();
    let config = |folder: &str, resume: bool| {
        format!(
            r#"{{"data": {:?}, "output": {:?}, "resume": {resume}, "steps": 6, "warmup": 0, "lr": 0.01, "batch": 2,
               "seq": 64, "val_fraction": 0, "rank": 4}}"#,
            data,
            scratch.path(folder)
        )
    };
    for (json, code, word) in [
        ("{}".to_owned(), KINGLET_ERR_ARG, "data"),
        (config("x", false).replace("\"rank\": 4", "\"ranks\": 4"), KINGLET_ERR_ARG, "ranks"),
        (config("x", false).replace("\"rank\": 4", "\"rank\": 0"), KINGLET_ERR_ARG, "rank is 0"),
        (config("x", false).replace("lessons", "nothing"), KINGLET_ERR_IO, "nothing.jsonl"),
    ] {
        let (status, text) = trainer(model, &json).expect_err(&json);
        assert_eq!(status, code, "{text}");
        assert!(text.contains(word), "{text:?} lacks {word:?}");
    }
    let through = trainer(model, &config("through", false)).expect("a trainer");
    let losses = train(through, u64::MAX);
    assert_eq!(losses.len(), 6);

    let stopped = trainer(model, &config("stopped", false)).expect("a trainer");
    let mut all = train(stopped, 3);
    let (mut report, mut err) = (report(), error());
    // SAFETY: all pointers are ours.
    unsafe {
        kinglet_trainer_cancel(stopped);
        assert_eq!(kinglet_trainer_step(stopped, &mut report, &mut err), KINGLET_ERR_CANCELLED);
        assert_eq!(kinglet_trainer_save(stopped, &mut err), KINGLET_OK, "{}", message(&err));
        kinglet_trainer_free(stopped);
    }
    assert!(trainer(model, &config("stopped", false)).unwrap_err().1.contains("resume"));
    let resumed = trainer(model, &config("stopped", true)).expect("a trainer");
    all.extend(train(resumed, u64::MAX));
    assert_eq!(all, losses, "a resumed run is the run");

    // The adapter, from the trainer and from its file, changes answers alike; without it the model is as it was.
    let s = session(model, None);
    let request = r#"{"messages": [{"role": "user", "content": "what is on the table"}], "max_tokens": 8,
                      "sampling": {"temperature": 0}}"#;
    let base = answer(s, request);
    let (mut json, mut adapter, mut from_file) = (null_mut(), null_mut(), null_mut());
    // SAFETY: all pointers are ours.
    unsafe {
        assert_eq!(kinglet_trainer_finish(resumed, &mut json, &mut err), KINGLET_OK, "{}", message(&err));
        let finished = CStr::from_ptr(json).to_str().expect("UTF-8").to_owned();
        assert!(finished.contains("\"steps\":6") && finished.contains("adapter.gguf"), "{finished}");
        kinglet_string_free(json);
        assert_eq!(kinglet_trainer_adapter(resumed, &mut adapter, &mut err), KINGLET_OK, "{}", message(&err));
        let file = path(&scratch.path("stopped/adapter.gguf"));
        let status = kinglet_adapter_open(model, file.as_ptr(), &mut from_file, &mut err);
        assert_eq!(status, KINGLET_OK, "{}", message(&err));
        kinglet_trainer_free(resumed);
        kinglet_trainer_free(through);

        let set = |adapters: &[*const kinglet_adapter], scales: *const f32, err: &mut kinglet_error| {
            let status = kinglet_session_set_adapters(s, adapters.as_ptr(), scales, adapters.len(), err);
            assert_eq!(status, KINGLET_OK, "{}", message(err));
        };
        set(&[adapter], null(), &mut err);
        let adapted = answer(s, request);
        assert_ne!(adapted.tokens, base.tokens, "six steps at this rate change the answer");
        set(&[from_file], null(), &mut err);
        assert_eq!(answer(s, request).tokens, adapted.tokens);
        set(&[from_file], &0.0, &mut err);
        assert_eq!(answer(s, request).tokens, base.tokens);
        set(&[from_file], null(), &mut err);
        let zero: kinglet_memory = std::mem::zeroed();
        let mut memory = kinglet_memory { struct_size: size_of::<kinglet_memory>() as u32, ..zero };
        assert_eq!(kinglet_session_memory(s, &mut memory, &mut err), KINGLET_OK);
        assert!(memory.adapters > 0 && memory.total >= memory.adapters + memory.weights);
        // Freed while it is in force.
        kinglet_adapter_free(from_file);
        kinglet_adapter_free(adapter);
        assert_eq!(answer(s, request).tokens, adapted.tokens);
        set(&[], null(), &mut err);
        assert_eq!(answer(s, request).tokens, base.tokens);
        kinglet_session_free(s);
        kinglet_model_free(model);
    }
}

#[test]
fn whoever_asks_for_a_session_does_not_disturb_the_generation_that_holds_it() {
    let scratch = Scratch::new("disturb");
    let model = open(&scratch.model());
    let s = Shared(session(model, None));
    let request = r#"{"prompt": "the hat", "max_tokens": 300, "ignore_end": true}"#;
    let g = Shared(generate(s.0, request).expect("a generation"));
    std::thread::scope(|scope| {
        // `pull` takes no status but success.
        let puller = scope.spawn(|| {
            let g = &g;
            pull(g.0).tokens.len()
        });
        while !puller.is_finished() {
            // SAFETY: any thread may.
            let status = unsafe { kinglet_session_reset(s.0, null_mut()) };
            assert!(matches!(status, KINGLET_OK | KINGLET_ERR_BUSY), "{status}");
        }
        assert_eq!(puller.join().expect("the puller ends"), 300);
    });
    // SAFETY: they are ours.
    unsafe {
        kinglet_generation_free(g.0);
        kinglet_session_free(s.0);
        kinglet_model_free(model);
    }
}
