//! Calls of the C ABI. An input is a program: a byte for the call, then its arguments, over a few places for objects of
//! each kind. Pointers are NULL or point to what the header asks for, since nothing else can be checked; all that they
//! point to, and every number, is the fuzzer's. Files are chosen from a few of ours and never named by the input.

use std::ffi::{CStr, CString, c_char, c_void};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

use kinglet::*;

use crate::input::Input;
use crate::seeds;

/// Calls of one program.
const CALLS: usize = 40;
/// Elements that an array of ours has room for.
const ROOM: usize = 512;
/// What one object may take: hostile numbers are to be refused, not to be paid for.
const BUDGET: u64 = 256 << 20;

/// Everything but `KINGLET_ERR_INTERNAL`, and `KINGLET_ERR_DEVICE_LOST`, which takes a device.
const STATUSES: [i32; 13] = [
    KINGLET_OK,
    KINGLET_DONE,
    KINGLET_ERR_ARG,
    KINGLET_ERR_IO,
    KINGLET_ERR_FORMAT,
    KINGLET_ERR_UNSUPPORTED,
    KINGLET_ERR_MEMORY,
    KINGLET_ERR_CONTEXT_FULL,
    KINGLET_ERR_BUSY,
    KINGLET_ERR_CANCELLED,
    KINGLET_ERR_TOO_SMALL,
    KINGLET_ERR_ABI,
    KINGLET_ERR_NUMERIC,
];

/// Requests, with something of the fuzzer's where `@` stands.
const REQUESTS: [&str; 10] = [
    r#"{"prompt": "@", "max_tokens": 5}"#,
    r#"{"messages": [{"role": "user", "content": "@"}], "max_tokens": 5}"#,
    r#"{"messages": [{"role": "system", "content": "a"}, {"role": "@", "content": null}], "max_tokens": 3}"#,
    r#"{"prompt": "the hat", "max_tokens": 8, "sampling": {"temperature": @, "top_k": 3, "seed": 1}}"#,
    r#"{"prompt": "the hat", "max_tokens": 8, "sampling": {@}}"#,
    r#"{"prompt": "the hat", "max_tokens": 8, "stop": "@"}"#,
    r#"{"prompt": "the hat", "max_tokens": @, "ignore_end": true, "special": true}"#,
    r#"{"messages": [{"role": "user", "content": "a"}], "tools": [{"@": 1}], "template": {"@": 2}, "max_tokens": 2}"#,
    r#"{"messages": [@], "max_tokens": 2}"#,
    "@",
];

/// Those under a grammar: rare, since compiling it takes a hundred times as long as all else, and has a target of its own.
const GRAMMARS: [&str; 3] = [
    r#"{"prompt": "a", "max_tokens": 9, "response_format": {"type": "json_schema", "json_schema": {"schema": {@}}}}"#,
    r#"{"prompt": "a", "max_tokens": 9, "grammar": "@"}"#,
    r#"{"messages": [], "tools": [{"function": {"name": "@"}}], "tool_choice": "required", "max_tokens": 9}"#,
];

/// Keys of a training with values, of which a program takes some.
const TRAINING: [&str; 17] = [
    r#""rank": @"#,
    r#""alpha": @"#,
    r#""dora": true"#,
    r#""rslora": true"#,
    r#""dropout": @"#,
    r#""batch": @"#,
    r#""seq": @"#,
    r#""accumulation": @"#,
    r#""lr": @"#,
    r#""loss": {"dpo": {"beta": @}}"#,
    r#""targets": ["q", "embedding", "head"]"#,
    r#""state_8bit": true"#,
    r#""arithmetic": "wide""#,
    r#""clip": @"#,
    r#""betas": [@, @]"#,
    r#""resume": true"#,
    r#""full": true"#,
];

/// Files of ours, and the bytes of the model.
struct Files {
    folder: PathBuf,
    model: Vec<u8>,
    paths: Vec<CString>,
}

fn files() -> &'static Files {
    static FILES: OnceLock<Files> = OnceLock::new();
    FILES.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("kinglet-fuzz-ffi-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("peft")).expect("a temporary folder");
        let model = seeds::chatting();
        let [gguf, config, tensors] = seeds::adapters();
        let lesson = "{\"prompt\": \"what is on the table\", \"completion\": \"the other hat\"}\n".repeat(3);
        let contents: [(&str, &[u8]); 7] = [
            ("model.gguf", &model),
            ("base.gguf", &seeds::base()),
            ("adapter.gguf", &gguf),
            ("peft/adapter_config.json", &config),
            ("peft/adapter_model.safetensors", &tensors),
            ("cut.gguf", &model[..model.len() / 2]),
            ("lessons.jsonl", lesson.as_bytes()),
        ];
        for (name, bytes) in contents {
            std::fs::write(folder.join(name), bytes).expect("the folder is ours");
        }
        let names = ["model.gguf", "base.gguf", "adapter.gguf", "peft", "cut.gguf", "lessons.jsonl", "none.gguf", ""];
        let path = |name| CString::new(folder.join(name).to_str().expect("UTF-8")).expect("no NUL");
        let paths = names.map(path).into();
        Files { folder, model, paths }
    })
}

/// A struct of the ABI with as much behind it as `struct_size` may claim.
#[repr(C)]
struct Padded<T> {
    value: T,
    tail: [u8; 4096],
}

/// Objects in their places; `NULL` where there is none.
struct Objects {
    models: [*mut kinglet_model; 3],
    sessions: [*mut kinglet_session; 3],
    generations: [*mut kinglet_generation; 3],
    adapters: [*mut kinglet_adapter; 2],
    trainers: [*mut kinglet_trainer; 1],
    err: kinglet_error,
}

/// The place that the next byte names.
fn place<'a, T>(places: &'a mut [*mut T], input: &mut Input<'_>) -> &'a mut *mut T {
    let at = usize::from(input.byte()) % places.len();
    &mut places[at]
}

/// A string for C, without the NULs in it.
fn c(text: impl Into<Vec<u8>>) -> CString {
    let mut text = text.into();
    text.retain(|b| *b != 0);
    CString::new(text).expect("no NUL is left")
}

fn path(input: &mut Input<'_>) -> &'static CStr {
    let paths = &files().paths;
    &paths[usize::from(input.byte()) % paths.len()]
}

fn zeroed<T>(struct_size: impl FnOnce(&mut T) -> &mut u32, input: &mut Input<'_>) -> Padded<T> {
    // SAFETY: structs of the ABI are numbers and pointers, for which zero is a value.
    let mut out: Padded<T> = unsafe { std::mem::zeroed() };
    *struct_size(&mut out.value) = match input.byte() {
        0..=239 => size_of::<T>() as u32,
        _ => input.number() as u32,
    };
    if input.byte() == 255 {
        out.tail[usize::from(input.byte())] = input.byte();
    }
    out
}

fn model_options(input: &mut Input<'_>) -> Padded<kinglet_model_options> {
    let mut out = zeroed(|o: &mut kinglet_model_options| &mut o.struct_size, input);
    // A GPU is another matter: its driver is not ours.
    let backends: [*const c_char; 4] = [c"cpu".as_ptr(), c"cpu".as_ptr(), c"tpu".as_ptr(), c"gpu:\xff".as_ptr()];
    out.value.backend = backends[usize::from(input.byte()) % backends.len()];
    // (In what the flags leave of their byte, so that inputs of before this stay what they are.)
    let byte = input.byte();
    out.value.flags = u32::from(byte % 8);
    out.value.tuning = u32::from(byte >> 3 & 3);
    out.value.gpu_layers = [0, 1, -1, i32::MIN][usize::from(byte >> 5 & 3)];
    out.value.gpu_memory = u64::from(byte >> 7);
    out.value.gpu_import = i32::from(byte >> 7);
    out.value.tuning_folder = if byte >> 3 == 31 { c"/nowhere".as_ptr() } else { std::ptr::null() };
    out.value.threads = match input.byte() {
        0..=239 => 1,
        _ => input.number() as i32,
    };
    out.value.memory_budget = match input.byte() {
        0..=239 => BUDGET,
        _ => (input.number() as u64).clamp(1, BUDGET),
    };
    out
}

fn session_options(input: &mut Input<'_>) -> Padded<kinglet_session_options> {
    let mut out = zeroed(|o: &mut kinglet_session_options| &mut o.struct_size, input);
    out.value.context_tokens = input.number() as i32;
    out.value.kv_type = input.number() as i32;
    out.value.chunk_tokens = input.number() as i32;
    out
}

/// Small numbers, most of them tokens.
fn tokens(input: &mut Input<'_>) -> Vec<i32> {
    let count = usize::from(input.byte() % 40);
    (0..count).map(|_| input.number() as i32).collect()
}

fn request(input: &mut Input<'_>) -> CString {
    let shape = match input.byte() {
        choice @ 250.. => GRAMMARS[usize::from(choice) % GRAMMARS.len()],
        choice => REQUESTS[usize::from(choice) % REQUESTS.len()],
    };
    c(shape.replace('@', &input.text()))
}

fn training(input: &mut Input<'_>) -> CString {
    let files = files();
    let folder = files.folder.join("trained");
    let _ = std::fs::remove_dir_all(&folder);
    let mut config = format!(
        r#"{{"data": {:?}, "output": {folder:?}, "steps": 2, "warmup": 0, "val_fraction": 0"#,
        files.folder.join("lessons.jsonl"),
    );
    for _ in 0..input.byte() % 4 {
        let pair = TRAINING[usize::from(input.byte()) % TRAINING.len()];
        let number = match input.byte() {
            0..=127 => (f64::from(input.byte()) / 64.0).to_string(),
            _ => input.number().to_string(),
        };
        config = format!("{config}, {}", pair.replace('@', &number));
    }
    c(config + "}")
}

unsafe extern "C" fn log(_: *mut c_void, level: i32, message: *const c_char) {
    // SAFETY: the library's string, valid during the call.
    let length = unsafe { CStr::from_ptr(message) }.to_bytes().len();
    assert!((1..=5).contains(&level) && length < 1 << 20);
}

unsafe extern "C" fn event(user: *mut c_void, _: *const kinglet_event) -> i32 {
    // SAFETY: a number of ours.
    unsafe {
        *user.cast::<i32>() -= 1;
        i32::from(*user.cast::<i32>() < 0)
    }
}

/// See the crate's text.
pub fn ffi(data: &[u8]) {
    let mut input = Input(data);
    let mut objects = Objects {
        models: [null_mut(); 3],
        sessions: [null_mut(); 3],
        generations: [null_mut(); 3],
        adapters: [null_mut(); 2],
        trainers: [null_mut(); 1],
        err: kinglet_error { code: 0, message: [1; 508] },
    };
    for _ in 0..CALLS {
        if input.is_empty() {
            break;
        }
        // SAFETY: see the file's text.
        let status = unsafe { objects.call(&mut input) };
        objects.check(status);
    }
    // SAFETY: each is freed once; the order is the reverse of what one would do.
    unsafe {
        objects.models.iter().for_each(|m| kinglet_model_free(*m));
        objects.adapters.iter().for_each(|a| kinglet_adapter_free(*a));
        objects.sessions.iter().for_each(|s| kinglet_session_free(*s));
        objects.generations.iter().for_each(|g| kinglet_generation_free(*g));
        objects.trainers.iter().for_each(|t| kinglet_trainer_free(*t));
        kinglet_set_log(None, null_mut(), 0, null_mut());
    }
}

impl Objects {
    fn check(&self, status: Option<kinglet_status>) {
        let Some(status) = status else { return };
        // SAFETY: the library terminates every message, and `ffi` has made one that is none.
        let message = unsafe { CStr::from_ptr(self.err.message.as_ptr()) }.to_str().expect("UTF-8");
        assert!(STATUSES.contains(&status), "{status}: {message}");
        assert_eq!(self.err.code, status.min(0), "{message}");
        assert_eq!(message.is_empty(), status >= 0, "{status}: {message}");
    }

    /// Frees what a call has handed out.
    unsafe fn text(&mut self, status: kinglet_status, text: *mut c_char) -> Option<kinglet_status> {
        assert!(status == KINGLET_OK || text.is_null(), "an error hands nothing out");
        // SAFETY: the library's string, or NULL.
        unsafe { kinglet_string_free(text) };
        Some(status)
    }

    /// One call. `None` for those that return nothing.
    ///
    /// # Safety
    /// Sound by itself: all pointers are ours.
    unsafe fn call(&mut self, input: &mut Input<'_>) -> Option<kinglet_status> {
        let call = input.byte();
        let err = &raw mut self.err;
        let mut text = null_mut();
        let mut count = 0;
        // SAFETY: as above.
        unsafe {
            Some(match call % 40 {
                0 | 1 => {
                    let (path, options) = (path(input), model_options(input));
                    let out = place(&mut self.models, input);
                    kinglet_model_free(*out);
                    *out = null_mut();
                    kinglet_model_open(path.as_ptr(), &options.value, out, err)
                }
                2 => {
                    // Released where opening fails by us, else by the model: always once.
                    let mut words = vec![0u64; files().model.len().div_ceil(8) + 1];
                    let bytes = words.as_mut_ptr().cast::<u8>();
                    let memory = std::slice::from_raw_parts_mut(bytes, words.len() * 8);
                    let model = &files().model;
                    memory[..model.len()].copy_from_slice(model);
                    let length = match input.byte() {
                        0..=127 => model.len(),
                        _ => (input.number() as usize).min(model.len()),
                    };
                    for _ in 0..input.byte() % 8 {
                        let at = input.number() as usize % memory.len();
                        memory[at] = input.byte();
                    }
                    let mut options = model_options(input);
                    // The memory is gone when this call has returned.
                    options.value.flags |= KINGLET_MODEL_COPY;
                    let out = place(&mut self.models, input);
                    kinglet_model_free(*out);
                    *out = null_mut();
                    kinglet_model_open_memory(bytes.cast(), length, None, null_mut(), &options.value, out, err)
                }
                3 => {
                    let file = std::fs::File::open(files().folder.join("model.gguf")).expect("the file is ours");
                    let fd = if input.byte() == 255 { -1 } else { file.as_raw_fd() };
                    let (offset, length) = (input.number() as u64, input.number() as u64);
                    let options = model_options(input);
                    let out = place(&mut self.models, input);
                    kinglet_model_free(*out);
                    *out = null_mut();
                    kinglet_model_open_fd(fd, offset, length, &options.value, out, err)
                }
                4 => {
                    let status = kinglet_model_info_json(*place(&mut self.models, input), &mut text, err);
                    return self.text(status, text);
                }
                5 => {
                    let status = kinglet_model_chat_template(*place(&mut self.models, input), &mut text, err);
                    return self.text(status, text);
                }
                6 => {
                    let (path, options, session) = (path(input), model_options(input), session_options(input));
                    let mut out = zeroed(|m: &mut kinglet_memory| &mut m.struct_size, input);
                    kinglet_model_estimate(path.as_ptr(), &options.value, &session.value, &mut out.value, err)
                }
                7 => {
                    let model = *place(&mut self.models, input);
                    let (bytes, flags, mut out) = (input.bytes(), u32::from(input.byte()), [0; ROOM]);
                    let capacity = (input.number() as usize).min(ROOM);
                    kinglet_tokenize(
                        model,
                        bytes.as_ptr().cast(),
                        bytes.len(),
                        flags,
                        out.as_mut_ptr(),
                        capacity,
                        &mut count,
                        err,
                    )
                }
                8 => {
                    let model = *place(&mut self.models, input);
                    let (ids, flags, mut out) = (tokens(input), u32::from(input.byte()), [0; ROOM]);
                    let capacity = (input.number() as usize).min(ROOM);
                    kinglet_detokenize(
                        model,
                        ids.as_ptr(),
                        ids.len(),
                        flags,
                        out.as_mut_ptr(),
                        capacity,
                        &mut count,
                        err,
                    )
                }
                9 => {
                    let model = *place(&mut self.models, input);
                    let (id, flags, mut out) = (input.number() as i32, u32::from(input.byte()), [0u8; ROOM]);
                    let capacity = (input.number() as usize).min(ROOM);
                    kinglet_token_bytes(model, id, flags, out.as_mut_ptr().cast(), capacity, &mut count, err)
                }
                10 | 11 => {
                    let (model, options) = (*place(&mut self.models, input), session_options(input));
                    let out = place(&mut self.sessions, input);
                    kinglet_session_free(*out);
                    *out = null_mut();
                    kinglet_session_create(model, &options.value, out, err)
                }
                12 => {
                    let from = *place(&mut self.sessions, input);
                    let out = place(&mut self.sessions, input);
                    let mut fork = null_mut();
                    let status = kinglet_session_fork(from, &mut fork, err);
                    assert_eq!(status == KINGLET_OK, !fork.is_null());
                    kinglet_session_free(*out);
                    *out = fork;
                    status
                }
                13 => kinglet_session_reset(*place(&mut self.sessions, input), err),
                14 => kinglet_session_rewind(*place(&mut self.sessions, input), input.number() as usize, err),
                15 => kinglet_session_token_count(*place(&mut self.sessions, input), &mut count, err),
                16 => {
                    let session = *place(&mut self.sessions, input);
                    let mut out = zeroed(|m: &mut kinglet_memory| &mut m.struct_size, input);
                    kinglet_session_memory(session, &mut out.value, err)
                }
                17 => {
                    let session = *place(&mut self.sessions, input);
                    let (n, nan) = (usize::from(input.byte() % 4), input.byte() == 255);
                    let adapters: Vec<_> = (0..n).map(|_| place(&mut self.adapters, input).cast_const()).collect();
                    let scale = if nan { f32::NAN } else { input.number() as f32 / 16.0 };
                    kinglet_session_set_adapters(session, adapters.as_ptr(), vec![scale; n].as_ptr(), n, err)
                }
                18 | 19 => {
                    let (session, ids) = (*place(&mut self.sessions, input), tokens(input));
                    kinglet_session_feed(session, ids.as_ptr(), ids.len(), err)
                }
                20 => {
                    let (session, mut out) = (*place(&mut self.sessions, input), [0.0; ROOM]);
                    let capacity = (input.number() as usize).min(ROOM);
                    kinglet_session_logits(session, out.as_mut_ptr(), capacity, &mut count, err)
                }
                21 => {
                    let (session, ids, mut out) = (*place(&mut self.sessions, input), tokens(input), [0.0; ROOM]);
                    let capacity = (input.number() as usize).min(ROOM);
                    kinglet_session_score(session, ids.as_ptr(), ids.len(), out.as_mut_ptr(), capacity, err)
                }
                22 => {
                    kinglet_session_cancel(*place(&mut self.sessions, input));
                    return None;
                }
                23 | 24 => {
                    let (session, request) = (*place(&mut self.sessions, input), request(input));
                    let out = place(&mut self.generations, input);
                    kinglet_generation_free(*out);
                    *out = null_mut();
                    kinglet_generate(session, request.as_ptr(), out, err)
                }
                25 | 26 => {
                    let generation = *place(&mut self.generations, input);
                    let mut out = zeroed(|e: &mut kinglet_event| &mut e.struct_size, input);
                    let mut status = KINGLET_OK;
                    for _ in 0..=input.byte() % 8 {
                        status = kinglet_generation_next(generation, &mut out.value, err);
                        let e = &out.value;
                        // A short struct has no text.
                        if status == KINGLET_OK
                            && e.struct_size as usize >= size_of::<kinglet_event>()
                            && !e.text.is_null()
                        {
                            let text = std::slice::from_raw_parts(e.text.cast::<u8>(), e.text_len + 1);
                            assert!(std::str::from_utf8(text).is_ok() && text.ends_with(&[0]), "whole characters, NUL");
                        }
                    }
                    status
                }
                27 => {
                    let generation = *place(&mut self.generations, input);
                    let status = kinglet_generation_message_json(generation, &mut text, err);
                    return self.text(status, text);
                }
                28 => {
                    kinglet_generation_cancel(*place(&mut self.generations, input));
                    return None;
                }
                29 => {
                    let (session, request) = (*place(&mut self.sessions, input), request(input));
                    let mut events = i32::from(input.byte());
                    kinglet_generate_with(session, request.as_ptr(), Some(event), (&raw mut events).cast(), err)
                }
                30 => {
                    let (model, path) = (*place(&mut self.models, input), path(input));
                    let out = place(&mut self.adapters, input);
                    kinglet_adapter_free(*out);
                    *out = null_mut();
                    kinglet_adapter_open(model, path.as_ptr(), out, err)
                }
                31 => {
                    let status = kinglet_adapter_info_json(*place(&mut self.adapters, input), &mut text, err);
                    return self.text(status, text);
                }
                32 => {
                    let (model, adapter) =
                        (*place(&mut self.models, input), place(&mut self.adapters, input).cast_const());
                    let (scale, quant) = (input.number() as f32, c(input.text()));
                    let quant = if quant.is_empty() { null() } else { quant.as_ptr() };
                    let merged = c(files().folder.join("merged.gguf").to_str().expect("UTF-8"));
                    kinglet_adapter_merge(model, &adapter, &scale, 1, merged.as_ptr(), quant, err)
                }
                33 => {
                    let (model, config) = (*place(&mut self.models, input), training(input));
                    let out = place(&mut self.trainers, input);
                    kinglet_trainer_free(*out);
                    *out = null_mut();
                    kinglet_trainer_create(model, config.as_ptr(), out, err)
                }
                34 => {
                    let trainer = *place(&mut self.trainers, input);
                    let mut out = zeroed(|r: &mut kinglet_train_report| &mut r.struct_size, input);
                    kinglet_trainer_step(trainer, &mut out.value, err)
                }
                35 => return self.trainer(input),
                36 => {
                    let callback: kinglet_log_callback = if input.byte().is_multiple_of(2) { Some(log) } else { None };
                    kinglet_set_log(callback, null_mut(), input.number() as i32, err)
                }
                37 => {
                    let status = match input.byte() % 2 {
                        0 => kinglet_build_json(&mut text, err),
                        _ => kinglet_devices_json(&mut text, err),
                    };
                    return self.text(status, text);
                }
                38 => {
                    let model = *place(&mut self.models, input);
                    let status = kinglet_model_retain(model, err);
                    if status == KINGLET_OK {
                        kinglet_model_free(model);
                    }
                    status
                }
                _ => {
                    self.free(input);
                    return None;
                }
            })
        }
    }

    /// What a trainer does besides stepping.
    unsafe fn trainer(&mut self, input: &mut Input<'_>) -> Option<kinglet_status> {
        let trainer = *place(&mut self.trainers, input);
        let err = &raw mut self.err;
        let mut text = null_mut();
        // SAFETY: all pointers are ours.
        unsafe {
            match input.byte() % 5 {
                0 => {
                    let status = kinglet_trainer_info_json(trainer, &mut text, err);
                    self.text(status, text)
                }
                1 => Some(kinglet_trainer_save(trainer, err)),
                2 => {
                    let out = place(&mut self.adapters, input);
                    kinglet_adapter_free(*out);
                    *out = null_mut();
                    Some(kinglet_trainer_adapter(trainer, out, err))
                }
                3 => {
                    let status = kinglet_trainer_finish(trainer, &mut text, err);
                    self.text(status, text)
                }
                _ => {
                    kinglet_trainer_cancel(trainer);
                    None
                }
            }
        }
    }

    /// Frees one object, in whatever order the fuzzer likes.
    unsafe fn free(&mut self, input: &mut Input<'_>) {
        // SAFETY: the place is NULL afterwards, so nothing is freed twice.
        unsafe {
            match input.byte() % 5 {
                0 => kinglet_model_free(std::mem::replace(place(&mut self.models, input), null_mut())),
                1 => kinglet_session_free(std::mem::replace(place(&mut self.sessions, input), null_mut())),
                2 => kinglet_generation_free(std::mem::replace(place(&mut self.generations, input), null_mut())),
                3 => kinglet_adapter_free(std::mem::replace(place(&mut self.adapters, input), null_mut())),
                _ => kinglet_trainer_free(std::mem::replace(place(&mut self.trainers, input), null_mut())),
            }
        }
    }
}

/// Programs that do what programs do.
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    // Options that are all right: two bytes of `zeroed`, then backend, flags, threads, budget.
    const MODEL: [u8; 6] = [0; 6];
    const OPEN: [u8; 9] = [0, 0, 0, 0, 0, 0, 0, 0, 0];
    const SESSION: [u8; 8] = [10, 0, 0, 0, 0, 0, 0, 0];
    let request = |shape: u8, text: &str| [&[23, 0, shape, text.len() as u8][..], text.as_bytes(), &[0]].concat();
    let next = [25u8, 0, 0, 0, 7];
    vec![
        ("chat", [&OPEN[..], &SESSION, &request(1, "the hat"), &next, &next, &[39, 0, 0, 39, 1, 0], &next].concat()),
        ("prompt", [&OPEN[..], &SESSION, &request(0, "a"), &next, &[28, 0], &next, &[39, 2, 0]].concat()),
        (
            "sampling",
            [&OPEN[..], &SESSION, &request(4, r#""top_p": 0.5, "mirostat": {"tau": 5, "eta": 0.1}"#), &next].concat(),
        ),
        (
            "tokens",
            [&OPEN[..], &[7, 0, 3, b'a', b'b', b'c', 0, 199], &[8, 0, 2, 70, 71, 0, 100], &[9, 0, 70, 0, 9]].concat(),
        ),
        (
            "feed",
            [&OPEN[..], &SESSION, &[18, 0, 3, 1, 2, 3, 20, 0, 206, 0, 2, 0, 0, 12, 0, 1, 14, 1, 2, 21, 1, 2, 7, 8, 9]]
                .concat(),
        ),
        (
            "adapter",
            [&[0, 1][..], &MODEL, &[0], &SESSION, &[30, 0, 2, 0, 17, 0, 1, 0, 0, 16, 18, 0, 2, 1, 2, 31, 0]].concat(),
        ),
        ("peft", [&[0, 1][..], &MODEL, &[0], &[30, 0, 3, 1, 32, 0, 1, 1, 4, b'Q', b'8', b'_', b'0']].concat()),
        (
            "train",
            [
                &OPEN[..],
                &[33, 0, 2, 0, 0, 255, 2, 5, 200, 2, 0, 34, 0, 0, 0, 35, 0, 1, 34, 0, 0, 0, 35, 0, 2, 0, 35, 0, 3],
            ]
            .concat(),
        ),
        ("memory", [&[2, 0, 1, 9, 7][..], &MODEL, &[1, 4, 1, 5, 1, 38, 1]].concat()),
        ("descriptor", [&[3, 0, 0, 0][..], &MODEL, &[2, 6, 0], &MODEL, &[0; 5], &[0, 0]].concat()),
        ("schema", [&OPEN[..], &SESSION, &request(252, r#""enum": ["a", 1]"#), &next, &[27, 0], &next].concat()),
        ("calls", [&OPEN[..], &SESSION, &request(251, "f"), &next, &next, &[27, 0]].concat()),
        ("library", vec![36, 0, 5, 37, 0, 37, 1, 36, 1, 0]),
    ]
}
