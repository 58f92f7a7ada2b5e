//! Models: opened by path, by descriptor or from memory, shared by any number of sessions.

use std::ffi::{c_char, c_void};
use std::slice;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use kinglet_engine::gguf::{Gguf, OpenOptions};
use kinglet_engine::session::{Device, Estimate, Model, PrefixCache, Session, SessionOptions};
use serde_json::json;

use crate::args::{self, Versioned};
use crate::fence::{
    Failure, KINGLET_ERR_MEMORY, KINGLET_ERR_UNSUPPORTED, KINGLET_OK, Outcome, fence, fence_void, kinglet_error,
    kinglet_status,
};
use crate::gate::Gate;
use crate::session::{kinglet_session, kinglet_session_options, session_options};
use crate::training::kinglet_trainer;

/// Read all weights on opening and refuse NaN and infinity.
pub const KINGLET_MODEL_VALIDATE: u32 = 1;
/// Read the file into private memory instead of mapping it.
pub const KINGLET_MODEL_COPY: u32 = 2;

/// Time the kernels of software drivers too, which are there for tests.
pub const KINGLET_TUNE_SOFTWARE: u32 = 1;
/// Let products of eight bits compete too.
pub const KINGLET_TUNE_INT8: u32 = 2;

/// How a model is opened; all zeros is a good default.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types)]
pub struct kinglet_model_options {
    /// `sizeof(kinglet_model_options)`.
    pub struct_size: u32,
    /// `KINGLET_MODEL_*`.
    pub flags: u32,
    /// `auto` (also NULL), `cpu`, `gpu` or `gpu:N`.
    pub backend: *const c_char,
    /// Threads of each session; 0 for one per core.
    pub threads: i32,
    /// 0.
    pub reserved: i32,
    /// Most bytes that the model with one session may take, the mapped file included; 0 for no limit.
    pub memory_budget: u64,
    /// Most bytes for beginnings of prompts that were computed, for other sessions that begin alike; 0 for none.
    pub prefix_cache: u64,
    /// Layers of each session that a GPU runs, the last ones; 0 for all, or as many as fit where they may be divided.
    pub gpu_layers: i32,
    /// `KINGLET_TUNE_*`.
    pub tuning: u32,
    /// Most bytes of a GPU's memory that a session takes; 0 for no limit.
    pub gpu_memory: u64,
    /// Where times of a GPU's kernels and what its driver has compiled are kept; NULL for none.
    pub tuning_folder: *const c_char,
    /// 1: a GPU reads the weights from the pages of the mapped file; 0: from a copy.
    pub gpu_import: i32,
    /// 0.
    pub reserved_2: i32,
}

// SAFETY: `repr(C)`, a `u32` first, numbers and pointers.
unsafe impl Versioned for kinglet_model_options {
    const NAME: &'static str = "kinglet_model_options";
}

/// Bytes that a session takes, in main memory or, where it runs on a GPU, there.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types)]
pub struct kinglet_memory {
    /// `sizeof(kinglet_memory)`.
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// The mapped file, which the system gives back under pressure and all processes share; on a GPU what it reads of it,
    /// mapped or a copy, once for all sessions.
    pub weights: u64,
    /// Keys and values.
    pub kv_cache: u64,
    /// Activations, logits and tables.
    pub activations: u64,
    /// Scratch of the threads.
    pub scratch: u64,
    /// Adapters in force.
    pub adapters: u64,
    /// All of these.
    pub total: u64,
    /// Of the weights what is read in place from the mapped file; what is left of the total is allocated.
    pub mapped: u64,
}

// SAFETY: `repr(C)`, a `u32` first, numbers only.
unsafe impl Versioned for kinglet_memory {
    const NAME: &'static str = "kinglet_memory";
}

impl kinglet_memory {
    pub(crate) fn new(estimate: Estimate) -> kinglet_memory {
        kinglet_memory {
            struct_size: 0,
            reserved: 0,
            weights: estimate.weights,
            kv_cache: estimate.kv_cache,
            activations: estimate.arena,
            scratch: estimate.scratch,
            adapters: estimate.adapters,
            total: estimate.resident(),
            mapped: estimate.mapped(),
        }
    }
}

/// Called once, with the pointer that came with it, when the library has no more use for the caller's memory.
#[allow(non_camel_case_types)]
pub type kinglet_release_callback = Option<unsafe extern "C" fn(user: *mut c_void)>;

/// An open model and how its sessions run.
#[allow(non_camel_case_types)]
pub struct kinglet_model {
    pub(crate) model: Model,
    pub(crate) settings: Settings,
    pub(crate) shared: Arc<Shared>,
}

/// What a model and everything that runs it have in common.
#[derive(Default)]
pub(crate) struct Shared {
    pub gate: Gate,
    sessions: Mutex<Vec<Weak<kinglet_session>>>,
    trainers: Mutex<Vec<Weak<kinglet_trainer>>>,
}

impl Shared {
    /// Remembers a session that is handed out.
    pub fn add(&self, session: &Arc<kinglet_session>) {
        remember(&self.sessions, session);
    }

    /// Remembers a trainer that is handed out.
    pub fn add_trainer(&self, trainer: &Arc<kinglet_trainer>) {
        remember(&self.trainers, trainer);
    }

    /// The sessions that are alive.
    fn sessions(&self) -> Vec<Arc<kinglet_session>> {
        alive(&self.sessions)
    }
}

fn remember<T>(all: &Mutex<Vec<Weak<T>>>, one: &Arc<T>) {
    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|one| one.strong_count() > 0);
    all.push(Arc::downgrade(one));
}

fn alive<T>(all: &Mutex<Vec<Weak<T>>>) -> Vec<Arc<T>> {
    all.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect()
}

/// What the options say beside how the file is read.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub device: Device,
    pub gpu_layers: Option<usize>,
    pub gpu_memory: Option<u64>,
    pub gpu_import: bool,
    pub threads: usize,
    pub memory_budget: Option<u64>,
    pub prefix_cache: Option<PrefixCache>,
}

/// The caller's options, checked.
///
/// # Safety
/// As [`args::read`].
unsafe fn settings(options: *const kinglet_model_options) -> Outcome<(OpenOptions, Settings)> {
    // SAFETY: passed on; a backend and a folder that are not NULL are strings.
    let (options, backend, folder) = unsafe {
        let options = args::read(options)?;
        let backend = args::optional_text(options.backend, "kinglet_model_options.backend")?;
        (options, backend, args::optional_text(options.tuning_folder, "kinglet_model_options.tuning_folder")?)
    };
    let known = KINGLET_MODEL_VALIDATE | KINGLET_MODEL_COPY;
    if options.flags & !known != 0 || (options.reserved, options.reserved_2) != (0, 0) {
        return Err(Failure::new(
            KINGLET_ERR_UNSUPPORTED,
            format!("kinglet_model_options has unknown flags ({:#x}) or a reserved field set", options.flags & !known),
        ));
    }
    let open = OpenOptions {
        validate: options.flags & KINGLET_MODEL_VALIDATE != 0,
        copy: options.flags & KINGLET_MODEL_COPY != 0,
        header_only: false,
    };
    let device = tuned(Device::from_str(backend.unwrap_or("auto"))?, folder, options.tuning)?;
    let settings = Settings {
        device,
        gpu_layers: Some(args::count("gpu_layers", options.gpu_layers)?).filter(|layers| *layers > 0),
        gpu_memory: (options.gpu_memory > 0).then_some(options.gpu_memory),
        gpu_import: args::switch("gpu_import", options.gpu_import)?,
        threads: args::count("threads", options.threads)?,
        memory_budget: (options.memory_budget > 0).then_some(options.memory_budget),
        prefix_cache: (options.prefix_cache > 0).then(|| PrefixCache::new(options.prefix_cache)),
    };
    Ok((open, settings))
}

/// The device with its kernels timed, if there is a folder for the times; a build without the GPU has nothing to time.
fn tuned(device: Device, folder: Option<&str>, tuning: u32) -> Outcome<Device> {
    let known = KINGLET_TUNE_SOFTWARE | KINGLET_TUNE_INT8;
    if tuning & !known != 0 {
        let what = format!("kinglet_model_options.tuning has unknown flags ({:#x})", tuning & !known);
        return Err(Failure::new(KINGLET_ERR_UNSUPPORTED, what));
    }
    match folder {
        None if tuning != 0 => Err(Failure::argument(
            "kinglet_model_options.tuning says how kernels are timed, but tuning_folder is NULL; name a folder for the times",
        )),
        None => Ok(device),
        Some("") => Err(Failure::argument(
            "kinglet_model_options.tuning_folder is empty; name a folder for the times, or NULL for kernels that are not timed",
        )),
        #[cfg(feature = "gpu")]
        Some(folder) => {
            let tuning = kinglet_engine::gpu::Tuning {
                folder: Some(folder.into()),
                int8: tuning & KINGLET_TUNE_INT8 != 0,
                software: tuning & KINGLET_TUNE_SOFTWARE != 0,
                again: false,
            };
            Ok(Device::Tuned(Box::new(device), tuning))
        }
        #[cfg(not(feature = "gpu"))]
        Some(_) => Ok(device),
    }
}

/// The model in `gguf`, if the budget holds its file.
fn load(gguf: Gguf, settings: Settings) -> Outcome<kinglet_model> {
    match settings.memory_budget {
        Some(budget) if gguf.file_bytes() > budget => Err(Failure::new(
            KINGLET_ERR_MEMORY,
            format!("{} has {} bytes, more than the budget of {budget}", gguf.name(), gguf.file_bytes()),
        )),
        _ => Ok(kinglet_model { model: kinglet_models::load(gguf)?, settings, shared: Arc::default() }),
    }
}

/// Opens the model file at `path`; of a model in several files, any one of them.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_model_open(
    path: *const c_char,
    options: *const kinglet_model_options,
    out: *mut *mut kinglet_model,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::place(out, "model")?;
            let path = args::text(path, "path")?;
            let (open, settings) = settings(options)?;
            Ok(args::give(out, load(Gguf::open_with(path, &open)?, settings)?))
        })
    }
}

/// Opens the model that takes `length` bytes from `offset` of an open file; the descriptor stays the caller's.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_model_open_fd(
    fd: i32,
    offset: u64,
    length: u64,
    options: *const kinglet_model_options,
    out: *mut *mut kinglet_model,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::place(out, "model")?;
            let (open, settings) = settings(options)?;
            let file = duplicate(fd)?;
            let length = match length {
                0 => file.metadata().map_err(kinglet_engine::Error::io("<descriptor>"))?.len().saturating_sub(offset),
                length => length,
            };
            Ok(args::give(out, load(Gguf::from_file_with(file, offset, length, &open)?, settings)?))
        })
    }
}

/// A descriptor of our own for the caller's file.
#[cfg(unix)]
fn duplicate(fd: i32) -> Outcome<std::fs::File> {
    use std::os::fd::BorrowedFd;
    if fd < 0 {
        return Err(Failure::argument(format!("fd is {fd}, which is no descriptor")));
    }
    // SAFETY: not −1; the caller keeps the descriptor open during the call, and one that is not open is an error of `dup`.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let owned = borrowed.try_clone_to_owned().map_err(kinglet_engine::Error::io("<descriptor>"))?;
    Ok(owned.into())
}

#[cfg(not(unix))]
fn duplicate(_: i32) -> Outcome<std::fs::File> {
    Err(Failure::new(KINGLET_ERR_UNSUPPORTED, "descriptors on this system; open the model by its path"))
}

/// Memory of the caller's that holds a model.
struct Foreign {
    bytes: *const u8,
    length: usize,
    release: kinglet_release_callback,
    user: *mut c_void,
    /// Whether the memory is ours to give back: not before the model is open.
    taken: AtomicBool,
}

// SAFETY: the caller promises that the bytes do not change and that `release` may be called from any thread.
unsafe impl Send for Foreign {}
// SAFETY: as above.
unsafe impl Sync for Foreign {}

impl AsRef<[u8]> for Foreign {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: checked by `args::array` when it came in, and the caller's promise until it is released.
        unsafe { slice::from_raw_parts(self.bytes, self.length) }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if let (true, Some(release)) = (self.taken.load(Ordering::Relaxed), self.release) {
            // SAFETY: the caller's promise.
            unsafe { release(self.user) };
        }
    }
}

/// Opens the model in the caller's memory, which is used in place. On success `release` is called once with `user` when
/// the memory is not needed any more; on failure it is not called.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_model_open_memory(
    bytes: *const c_void,
    length: usize,
    release: kinglet_release_callback,
    user: *mut c_void,
    options: *const kinglet_model_options,
    out: *mut *mut kinglet_model,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::place(out, "model")?;
            let checked = args::array(bytes.cast::<u8>(), length, "bytes")?;
            let (open, settings) = settings(options)?;
            let taken = AtomicBool::new(false);
            let memory = Arc::new(Foreign { bytes: checked.as_ptr(), length, release, user, taken });
            let model = load(Gguf::from_memory_with(memory.clone(), &open)?, settings)?;
            memory.taken.store(true, Ordering::Relaxed);
            Ok(args::give(out, model))
        })
    }
}

/// Makes the caller an owner once more: one more `kinglet_model_free` is due.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_model_retain(model: *mut kinglet_model, err: *mut kinglet_error) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            std::mem::forget(args::share(model.cast_const(), "model")?);
            Ok(KINGLET_OK)
        })
    }
}

/// Gives up one ownership; sessions, adapters and trainers live on. NULL is fine.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_model_free(model: *mut kinglet_model) {
    // SAFETY: the caller's promise.
    fence_void(|| unsafe { args::release(model) });
}

/// What the model is, as a JSON object.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_model_info_json(
    model: *const kinglet_model,
    out: *mut *mut c_char,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::place(out, "text")?;
            let model = &args::handle(model, "model")?.model;
            let (gguf, spec, tokenizer) = (model.gguf(), model.spec(), model.tokenizer());
            let name = |key: &str| gguf.metadata().opt_str(key).ok().flatten();
            let info = json!({
                "file": gguf.name(),
                "name": name("general.name"),
                "family": spec.family,
                "licence": name("general.license"),
                "file_bytes": gguf.file_bytes(),
                "parameters": gguf.tensors().iter().map(|t| t.elements() as u64).sum::<u64>(),
                "context": spec.context,
                "vocabulary": spec.vocab,
                "layers": spec.layers.len(),
                "width": spec.width,
                "chat_template": matches!(model.chat_template(), Ok(Some(_))),
                "bos": tokenizer.bos(),
                "eos": tokenizer.eos(),
                "ends": tokenizer.ends_of_generation(),
            });
            args::give_json(out, &info)
        })
    }
}

/// The model's chat template, a Jinja program; NULL is written for a base model, which has none.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_model_chat_template(
    model: *const kinglet_model,
    out: *mut *mut c_char,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::place(out, "text")?;
            let model = &args::handle(model, "model")?.model;
            match model.gguf().metadata().opt_str("tokenizer.chat_template")? {
                Some(source) => args::give_text(out, source),
                None => Ok(KINGLET_OK),
            }
        })
    }
}

/// The memory that the model at `path` with one session would come to take; nothing but the file's header is read.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_model_estimate(
    path: *const c_char,
    model_options: *const kinglet_model_options,
    session: *const kinglet_session_options,
    out: *mut kinglet_memory,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::check_out(out)?;
            let path = args::text(path, "path")?;
            let (_, settings) = settings(model_options)?;
            let options = SessionOptions { memory_budget: None, ..session_options(session, &settings)? };
            let header = OpenOptions { header_only: true, ..OpenOptions::default() };
            let model = kinglet_models::load(Gguf::open_with(path, &header)?)?;
            args::write(out, &kinglet_memory::new(Session::estimate(&model, &options)?))?;
            Ok(KINGLET_OK)
        })
    }
}

/// Gives back memory that can be had again: the prefix cache, and what sessions without a running call compute in. `freed`,
/// which may be NULL, gets the bytes.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_model_trim(
    model: *mut kinglet_model,
    freed: *mut u64,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            let model = args::handle(model.cast_const(), "model")?;
            let mut bytes = 0;
            if let Some(cache) = &model.settings.prefix_cache {
                bytes += cache.bytes();
                cache.clear();
            }
            for session in model.shared.sessions() {
                bytes += session.trim()?;
            }
            if !freed.is_null() {
                freed.write(bytes);
            }
            Ok(KINGLET_OK)
        })
    }
}

/// Lets nothing compute with the model until `kinglet_model_resume`, and returns when nothing does any more and sessions
/// and trainers have given back what they held of a GPU.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_model_suspend(model: *mut kinglet_model, err: *mut kinglet_error) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            let shared = &args::handle(model.cast_const(), "model")?.shared;
            shared.gate.suspend();
            shared.sessions().iter().try_for_each(|session| session.park())?;
            alive(&shared.trainers).iter().try_for_each(|trainer| trainer.park())?;
            Ok(KINGLET_OK)
        })
    }
}

/// Takes `kinglet_model_suspend` back.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_model_resume(model: *mut kinglet_model, err: *mut kinglet_error) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::handle(model.cast_const(), "model")?.shared.gate.resume();
            Ok(KINGLET_OK)
        })
    }
}
