//! Training, one optimizer step a call, on the caller's thread.

use std::ffi::{CString, c_char};
use std::path::PathBuf;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kinglet_engine::session::{CancelHandle, Model};
use kinglet_train::config::TrainConfig;
use kinglet_train::metrics::StepMetrics;
use kinglet_train::trainer::{Progress, Trainer, TrainerOptions};
use kinglet_train::{data, keep};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::adapter::kinglet_adapter;
use crate::args::{self, Versioned};
use crate::fence::{
    Failure, KINGLET_DONE, KINGLET_ERR_CANCELLED, KINGLET_OK, Outcome, enter_after, fence, fence_void, kinglet_error,
    kinglet_status,
};
use crate::gate::suspended;
use crate::model::{Settings, Shared, kinglet_model};

/// A step was taken.
pub const KINGLET_TRAIN_STEP: i32 = 1;
/// A step went wrong; the state is an earlier one again, and training goes on from there more slowly.
pub const KINGLET_TRAIN_ROLLED_BACK: i32 = 2;

/// What a call of `kinglet_trainer_step` did. Numbers that were not measured are NaN.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types)]
pub struct kinglet_train_report {
    /// `sizeof(kinglet_train_report)`.
    pub struct_size: u32,
    /// `KINGLET_TRAIN_*`.
    pub kind: i32,
    /// Steps taken, this one included; after a rollback those of the state that was returned to.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Mean loss.
    pub loss: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Length of the gradient before clipping.
    pub gradient_norm: f64,
    /// Speed.
    pub tokens_per_second: f64,
    /// Loss on the validation data, in steps behind which it is measured.
    pub validation_loss: f64,
    /// Of losses on preferences: the share of pairs that are judged right.
    pub reward_accuracy: f64,
    /// Of losses on preferences: the mean margin.
    pub reward_margin: f64,
    /// Why the state was rolled back, or NULL; the library's until the next call on the trainer.
    pub note: *const c_char,
}

// SAFETY: `repr(C)`, a `u32` first, numbers and a pointer.
unsafe impl Versioned for kinglet_train_report {
    const NAME: &'static str = "kinglet_train_report";
}

/// A training run; free in any order.
#[allow(non_camel_case_types)]
pub struct kinglet_trainer {
    state: Mutex<State>,
    /// Held by whoever gives the trainer's memory back, for as long as it is in the state.
    parking: Mutex<()>,
    /// Somebody asked to stop; taken back when a call has said so.
    asked: AtomicBool,
    /// What a step looks at: somebody asked, or the model is being suspended.
    stop: CancelHandle,
    shared: Arc<Shared>,
}

struct State {
    trainer: Trainer,
    /// What the report in the caller's hands points to.
    note: CString,
}

/// The keys of the configuration that are not [`TrainConfig`]'s.
#[derive(Deserialize)]
struct Paths {
    data: Files,
    #[serde(default)]
    validation: Files,
    #[serde(default)]
    keep: Keep,
    output: PathBuf,
    #[serde(default)]
    title: String,
    #[serde(default)]
    resume: bool,
    probe: Option<PathBuf>,
}

const PATHS: [&str; 7] = ["data", "validation", "keep", "output", "title", "resume", "probe"];

/// One file or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum Files {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

/// Texts on which the model is to stay as it is.
#[derive(Deserialize)]
#[serde(untagged)]
enum Keep {
    /// So many that it writes itself.
    Own(usize),
    Files(Files),
}

impl Default for Keep {
    fn default() -> Keep {
        Keep::Files(Files::default())
    }
}

impl Default for Files {
    fn default() -> Files {
        Files::Many(Vec::new())
    }
}

impl Files {
    fn into_paths(self) -> Vec<PathBuf> {
        match self {
            Files::One(path) => vec![path],
            Files::Many(paths) => paths,
        }
    }
}

/// Reads the configuration and the data, and makes everything ready for the first step.
fn create(model: &Model, settings: &Settings, json: &str) -> Outcome<Trainer> {
    let wrong = |e: serde_json::Error| Failure::argument(format!("the training's JSON: {e}"));
    let mut fields: Map<String, Value> = serde_json::from_str(json).map_err(wrong)?;
    let paths: Map<String, Value> =
        PATHS.iter().filter_map(|key| Some(((*key).into(), fields.shift_remove(*key)?))).collect();
    let paths: Paths = serde_json::from_value(Value::Object(paths)).map_err(wrong)?;
    let config: TrainConfig = serde_json::from_value(Value::Object(fields)).map_err(wrong)?;
    config.validate()?;
    let probe = paths.probe.map(|path| std::fs::read_to_string(&path).map_err(kinglet_engine::Error::io(&path)));
    let (threads, device, gpu_import) = (settings.threads, settings.device.clone(), settings.gpu_import);
    let (cancel, where_) = (AtomicBool::new(false), keep::Options { threads, device, gpu_import });
    let kept = match paths.keep {
        Keep::Own(0) => Vec::new(),
        Keep::Own(count) => {
            vec![keep::own_texts(model, &paths.output, count, config.seed, &where_, &cancel, |_| {})?]
        }
        Keep::Files(files) => files.into_paths(),
    };
    let files = data::Files { data: &paths.data.into_paths(), validation: &paths.validation.into_paths(), keep: &kept };
    let mut data = data::load(files, model, &config)?;
    data.predict(model, &where_, &cancel, |_, _| {})?;
    let options = TrainerOptions {
        output: paths.output,
        title: paths.title,
        resume: paths.resume,
        threads: settings.threads,
        device: settings.device.clone(),
        gpu_import: settings.gpu_import,
        memory_budget: settings.memory_budget,
        probe: probe.transpose()?,
    };
    Ok(Trainer::new(model, &config, data, options)?)
}

impl kinglet_trainer {
    /// Runs `body` on the trainer, which nobody else uses.
    fn with<T>(&self, body: impl FnOnce(&mut State) -> Outcome<T>) -> Outcome<T> {
        body(&mut *enter_after(&self.parking, &self.state, "trainer")?)
    }

    /// As [`kinglet_trainer::with`], with a body that computes and may be stopped. A wish that was obeyed is taken back.
    fn compute<T>(&self, body: impl FnOnce(&mut State, &AtomicBool) -> Outcome<T>) -> Outcome<T> {
        self.with(|state| {
            if self.asked.load(Ordering::Acquire) {
                self.stop.cancel();
            }
            let pass = self.shared.gate.enter(Some(&self.stop))?;
            let result = body(state, self.stop.flag());
            let obeyed = matches!(&result, Err(failure) if failure.code == KINGLET_ERR_CANCELLED);
            self.stop.reset();
            let asked = obeyed && self.asked.swap(false, Ordering::AcqRel);
            if obeyed && !asked && pass.stopped() { Err(suspended()) } else { result }
        })
    }
}

impl kinglet_trainer {
    /// Gives back what it holds of a GPU; for a model that is suspended.
    pub(crate) fn park(&self) -> Outcome<()> {
        let _parking = self.parking.lock().unwrap_or_else(PoisonError::into_inner);
        // Nothing computes: whoever has the lock is soon done. One that has panicked is left as it is.
        let Ok(mut state) = self.state.lock() else { return Ok(()) };
        state.trainer.park()?;
        Ok(())
    }
}

impl State {
    fn report(&mut self, progress: Progress) -> Option<kinglet_train_report> {
        let steps = self.trainer.preflight().steps;
        let measured = |value: Option<f64>| value.unwrap_or(f64::NAN);
        let report = |kind: i32, m: StepMetrics, note: *const c_char| kinglet_train_report {
            struct_size: size_of::<kinglet_train_report>() as u32,
            kind,
            step: m.step,
            steps,
            loss: m.loss,
            learning_rate: m.lr,
            gradient_norm: m.grad_norm,
            tokens_per_second: m.tokens_per_second,
            validation_loss: measured(m.val_loss),
            reward_accuracy: measured(m.reward_accuracy),
            reward_margin: measured(m.reward_margin),
            note,
        };
        match progress {
            Progress::Stepped(line) => Some(report(KINGLET_TRAIN_STEP, line, ptr::null())),
            Progress::RolledBack { step, why } => {
                self.note = CString::new(why.replace('\0', " ")).unwrap_or_default();
                let nothing = StepMetrics {
                    step,
                    loss: f64::NAN,
                    lr: f64::NAN,
                    grad_norm: f64::NAN,
                    tokens_per_second: f64::NAN,
                    ..StepMetrics::default()
                };
                Some(report(KINGLET_TRAIN_ROLLED_BACK, nothing, self.note.as_ptr()))
            }
            Progress::Done(_) => None,
        }
    }
}

/// Prepares a training of `model` on the device, threads and memory budget that it was opened with.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_trainer_create(
    model: *const kinglet_model,
    config_json: *const c_char,
    out: *mut *mut kinglet_trainer,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::place(out, "trainer")?;
            let model = args::handle(model, "model")?;
            let _pass = model.shared.gate.enter(None)?;
            let trainer = create(&model.model, &model.settings, args::text(config_json, "config_json")?)?;
            let state = Mutex::new(State { trainer, note: CString::default() });
            let (asked, stop, shared) = (AtomicBool::new(false), CancelHandle::default(), model.shared.clone());
            let trainer = Arc::new(kinglet_trainer { state, parking: Mutex::default(), asked, stop, shared });
            trainer.shared.add_trainer(&trainer);
            Ok(args::give_shared(out, trainer))
        })
    }
}

/// Gives up the trainer; what was not saved is lost. NULL is fine.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_trainer_free(trainer: *mut kinglet_trainer) {
    // SAFETY: the caller's promise.
    fence_void(|| unsafe { args::release(trainer) });
}

/// What is ahead, as a JSON object: steps, parameters, examples, memory.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_trainer_info_json(
    trainer: *mut kinglet_trainer,
    out: *mut *mut c_char,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::place(out, "text")?;
            args::handle(trainer.cast_const(), "trainer")?.with(|state| {
                let trainer = &state.trainer;
                let mut info = serde_json::to_value(trainer.preflight())?;
                if let Value::Object(info) = &mut info {
                    info.insert("step".into(), json!(trainer.step()));
                    info.insert("config".into(), serde_json::to_value(trainer.config())?);
                    info.insert("notes".into(), json!(trainer.notes()));
                }
                args::give_json(out, &info)
            })
        })
    }
}

/// Takes one optimizer step on this thread: `KINGLET_OK` with a report, `KINGLET_DONE` when only
/// `kinglet_trainer_finish` is left. A step that fails or is cancelled has not happened.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_trainer_step(
    trainer: *mut kinglet_trainer,
    report: *mut kinglet_train_report,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::check_out(report)?;
            args::handle(trainer.cast_const(), "trainer")?.compute(|state, cancel| {
                let progress = state.trainer.advance(cancel)?;
                match state.report(progress) {
                    None => Ok(KINGLET_DONE),
                    Some(done) => {
                        args::write(report, &done)?;
                        Ok(KINGLET_OK)
                    }
                }
            })
        })
    }
}

/// Writes a checkpoint into the output folder, which a trainer with `resume` goes on from.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_trainer_save(
    trainer: *mut kinglet_trainer,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::handle(trainer.cast_const(), "trainer")?.with(|state| {
                state.trainer.save()?;
                Ok(KINGLET_OK)
            })
        })
    }
}

/// The adapter as it is after the steps so far, to be put in force in a session.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_trainer_adapter(
    trainer: *mut kinglet_trainer,
    out: *mut *mut kinglet_adapter,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::place(out, "adapter")?;
            args::handle(trainer.cast_const(), "trainer")?.with(|state| {
                let adapter = Arc::new(state.trainer.adapter()?);
                Ok(args::give(out, kinglet_adapter { adapter }))
            })
        })
    }
}

/// Writes what was trained and a report into the output folder; `out`, which may be NULL, gets the results as JSON.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_trainer_finish(
    trainer: *mut kinglet_trainer,
    out: *mut *mut c_char,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            if !out.is_null() {
                args::place(out, "text")?;
            }
            args::handle(trainer.cast_const(), "trainer")?.compute(|state, cancel| {
                let finished = state.trainer.finish(cancel)?;
                if out.is_null() { Ok(KINGLET_OK) } else { args::give_json(out, &finished) }
            })
        })
    }
}

/// Stops the step that is running, or else the next one, from any thread and from a signal handler: it returns
/// `KINGLET_ERR_CANCELLED` and has not happened. Atomic stores only.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_trainer_cancel(trainer: *const kinglet_trainer) {
    // SAFETY: the caller's promise.
    if let Some(trainer) = unsafe { trainer.as_ref() } {
        trainer.asked.store(true, Ordering::Release);
        trainer.stop.cancel();
    }
}
