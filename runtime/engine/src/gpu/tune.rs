//! Tuning: which of the ways to multiply are the quickest on a device is found by timing them there, for the types a model has,
//! before its first run. What is found stands in a file of a folder that the host gives, one file for each device and driver;
//! it holds as long as the text of the kernels is the same. A file that cannot be used is written anew, and one that cannot be
//! written is a warning.
//!
//! Whatever is decided for a type, tuned or not, stays for the life of the open device: results do not change from one run to
//! the next.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::choice::{Choices, Family, Form, Timed, UNTRIED, shapes};
use super::device::{Device, DeviceKind, lock};
use super::kernel::Kernel;
use super::trial::{self, Racer, Stopwatch};
use crate::quant::DType;
use crate::{Error, Result, file};

/// How long the candidates for one family and type may take together, most of it in the driver's compiler; who comes later is
/// not looked at. Where all is timed again on demand there is time.
const BUDGET: Duration = Duration::from_millis(1_500);
const BUDGET_ON_DEMAND: Duration = Duration::from_secs(60);
/// A card that had nothing to do is slow at first.
const WARM_UP: Duration = Duration::from_millis(60);
/// How often every candidate is timed, in turns, and how often at least where there is no time; the least of its times counts.
const ROUNDS: usize = 4;
const FEWEST_ROUNDS: usize = 2;
/// Bytes of a file that are read: more is none of ours.
const LARGEST_FILE: u64 = 4 << 20;
/// Grows when what is written, timed or compared changes beside the kernels' text.
const VERSION: u32 = 2;

/// Whether a device's kernels are timed, and where the times are kept. Without it a device computes with fixed choices: nothing
/// is timed, and nothing is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tuning {
    /// Where files of times are kept; made if it is not there. None: kernels are timed whenever a device is opened, which
    /// takes a few seconds for every type of weights of a model.
    pub folder: Option<PathBuf>,
    /// Let products of eight bits compete too, which the usual choices never are: rows are rounded to eight bits for them, and
    /// results differ a little more from the CPU's.
    pub int8: bool,
    /// Time software drivers too, which are there for tests.
    pub software: bool,
    /// Time again what is known, and replace it.
    pub again: bool,
}

/// A device's file.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Times {
    adapter: String,
    driver: String,
    api: String,
    tuned: Vec<Entry>,
}

/// What was found for a family and a type.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    family: String,
    weights: String,
    /// Whether products of eight bits competed.
    int8: bool,
    /// Of the candidates' kernels.
    kernels: String,
    candidates: Vec<Candidate>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Candidate {
    kernel: String,
    /// Of a product of each shape; empty where the candidate is not used.
    seconds: Vec<f64>,
    /// Null where results are no numbers.
    worst: Option<f32>,
    note: String,
}

impl Device {
    /// Has the kernels of this device timed from now on. Only the first call counts, and nothing that has been decided changes.
    pub fn tune(&self, tuning: Tuning) {
        if self.tuning.set(tuning).is_err() {
            log::debug!("{} has been told how to tune already", self.info().name);
        }
    }

    /// Whether kernels are timed.
    pub(super) fn tunes(&self) -> bool {
        let software = self.info().kind == DeviceKind::Software;
        self.tuning.get().is_some_and(|tuning| tuning.software || !software)
    }

    /// Whether products of eight bits are among what is timed.
    pub(super) fn tunes_int8(&self) -> bool {
        self.tunes() && self.tuning.get().is_some_and(|tuning| tuning.int8)
    }
}

/// Decides for families and types whatever is not decided yet.
pub(super) fn prepare(device: &Arc<Device>, families: &[Family], types: &[DType]) {
    // Others who want to know wait here.
    let _preparing = lock(&device.preparing);
    let wanted = families.iter().flat_map(|family| types.iter().map(|dtype| (*family, *dtype)));
    let open: Vec<(Family, DType)> = wanted.filter(|key| !lock(&device.choices).contains_key(key)).collect();
    let tuning = device.tuning.get().filter(|_| device.tunes());
    let path = tuning.and_then(|tuning| tuning.folder.as_deref()).map(|folder| path(device, folder));
    let mut times = match (&path, open.is_empty()) {
        (Some(path), false) => stored(device, path),
        _ => Times::default(),
    };
    let mut is_new = false;
    for (family, dtype) in open {
        let Some(tuning) = tuning else {
            lock(&device.choices).insert((family, dtype), Arc::default());
            continue;
        };
        let forms = device.candidates(family, dtype);
        let kernels = fingerprint(device, family, dtype, &forms);
        let is_it = |entry: &Entry| {
            (entry.family.as_str(), entry.weights.as_str(), entry.int8) == (family.name(), dtype.name(), tuning.int8)
        };
        let known = times.tuned.iter().find(|e| is_it(e) && e.kernels == kernels && !tuning.again);
        let choices = known.and_then(|entry| recall(device, family, &forms, entry)).unwrap_or_else(|| {
            let budget = if tuning.again { BUDGET_ON_DEMAND } else { BUDGET };
            let choices = measure(device, family, dtype, &forms, budget);
            times.tuned.retain(|entry| !is_it(entry));
            times.tuned.push(record((family, dtype, tuning.int8), kernels, &choices));
            is_new = true;
            choices
        });
        lock(&device.choices).insert((family, dtype), Arc::new(choices));
    }
    if let (Some(path), true) = (path, is_new)
        && let Err(e) = write(&path, &times)
    {
        log::warn!("the times of {}'s kernels are not kept: {e}", device.info().name);
    }
}

/// Tries all candidates of a family and a type, and times in turns those that are right.
fn measure(device: &Arc<Device>, family: Family, dtype: DType, forms: &[Form], budget: Duration) -> Choices {
    let (begun, kind) = (Instant::now(), device.info().kind);
    let shapes = shapes(family, kind);
    let watch = Stopwatch::new(device, dtype, shapes.clone());
    let try_one = |form: Form| -> Result<(f32, Option<Racer<'_>>, String)> {
        if begun.elapsed() > budget {
            return Ok((0.0, None, UNTRIED.into()));
        }
        let watch = watch.as_ref().map_err(|e| device.error(e.to_string()))?;
        let (worst, may) = trial::distance(device, dtype, form)?;
        match worst < may {
            true => Ok((worst, Some(watch.ready(form)?), String::new())),
            false => Ok((worst, None, format!("results are off by more than {may}"))),
        }
    };
    let refused = |form: Form, e: Error| {
        log::warn!("{} multiplies {dtype} without {form}: {e}", device.info().name);
        // What else the driver has said about it is no concern of the next one.
        let _ = device.check();
        (0.0, None, e.to_string())
    };
    let mut tried: Vec<_> =
        forms.iter().map(|form| (*form, try_one(*form).unwrap_or_else(|e| refused(*form, e)))).collect();
    let (warm_up, rounds) = if kind == DeviceKind::Software { (Duration::ZERO, 1) } else { (WARM_UP, FEWEST_ROUNDS) };
    let warming = Instant::now();
    // Slow times do no harm, and what fails here fails in its turn.
    while let Some(racer) = tried.iter_mut().find_map(|(_, result)| result.1.as_mut())
        && warming.elapsed() < warm_up
        && racer.turn().is_ok()
    {}
    for round in 0..ROUNDS {
        if round >= rounds && begun.elapsed() > budget {
            break;
        }
        for (form, result) in &mut tried {
            if let Some(racer) = &mut result.1
                && let Err(e) = racer.turn()
            {
                *result = refused(*form, e);
            }
        }
    }
    let candidates = tried.into_iter().map(|(form, (worst, racer, note))| {
        let seconds = racer.map_or_else(Vec::new, |racer| racer.seconds);
        Timed { form, seconds, worst, note }
    });
    let choices = Choices { candidates: candidates.collect(), shapes };
    log::info!("timed {} kernels of {} for {dtype} in {:?}", forms.len(), family.name(), begun.elapsed());
    choices
}

/// A hash of what times depend on, beside device and driver: the kernels' text, and how it is compiled.
fn fingerprint(device: &Arc<Device>, family: Family, dtype: DType, forms: &[Form]) -> String {
    let mut hash = Sha256::new();
    hash.update(format!("{VERSION} {} {:?}\n", env!("CARGO_PKG_VERSION"), device.abilities));
    for form in forms {
        let kernel = match *form {
            Form::Matvec(lanes) => lanes.kernel(vec![dtype], 8, false, None),
            Form::Tile => Kernel::Matmul(dtype),
            Form::TileInt8 => Kernel::MatmulInt8(dtype),
            Form::Cooperative(tile) => Kernel::Cooperative { dtype, turned: false, tile },
        };
        hash.update(format!("{form}\n{}", kernel.source()));
    }
    let ready = [Kernel::Pack, Kernel::Quantize { normed: false }];
    ready.iter().for_each(|kernel| hash.update(kernel.source()));
    hash.update(format!("{:?}", shapes(family, device.info().kind)));
    hex(&hash.finalize())
}

/// The first half of a hash.
fn hex(hash: &[u8]) -> String {
    hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// A device's file in a folder.
pub(super) fn path(device: &Device, folder: &Path) -> PathBuf {
    let info = device.info();
    let hash = Sha256::digest(format!("{}\n{}\n{}", info.name, info.driver, info.api));
    folder.join(format!("gpu-{}.json", hex(&hash)))
}

/// What is in a device's file; nothing if there is none that can be used.
fn stored(device: &Device, path: &Path) -> Times {
    let info = device.info();
    let (adapter, driver, api) = (info.name.clone(), info.driver.clone(), info.api.clone());
    let nothing = Times { adapter, driver, api, tuned: Vec::new() };
    let mut text = String::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(LARGEST_FILE).read_to_string(&mut text));
    match read {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return nothing,
        Err(e) => {
            log::warn!("{}: {e}; kernels are timed again", path.display());
            return nothing;
        }
        Ok(_) => {}
    }
    match serde_json::from_str::<Times>(&text) {
        Ok(times)
            if (&times.adapter, &times.driver, &times.api) == (&nothing.adapter, &nothing.driver, &nothing.api) =>
        {
            times
        }
        Ok(_) => nothing,
        Err(e) => {
            log::warn!("{} is damaged ({e}); kernels are timed again", path.display());
            nothing
        }
    }
}

/// What an entry says of the candidates; none if it does not say it of all of them, or something odd.
fn recall(device: &Device, family: Family, forms: &[Form], entry: &Entry) -> Option<Choices> {
    let shapes = shapes(family, device.info().kind);
    let count = shapes.len();
    let candidates = forms.iter().map(|form| {
        let name = form.to_string();
        let c = entry.candidates.iter().find(|c| c.kernel == name)?;
        let is_time = |s: &f64| s.is_finite() && *s > 0.0;
        let is_whole = c.seconds.is_empty() || c.seconds.len() == count && c.seconds.iter().all(is_time);
        let worst = c.worst.unwrap_or(f32::INFINITY);
        is_whole.then(|| Timed { form: *form, seconds: c.seconds.clone(), worst, note: c.note.clone() })
    });
    Some(Choices { candidates: candidates.collect::<Option<_>>()?, shapes })
}

fn record((family, dtype, int8): (Family, DType, bool), kernels: String, choices: &Choices) -> Entry {
    let candidate = |c: &Timed| Candidate {
        kernel: c.form.to_string(),
        seconds: c.seconds.clone(),
        worst: c.worst.is_finite().then_some(c.worst),
        note: c.note.clone(),
    };
    Entry {
        family: family.name().into(),
        weights: dtype.name().into(),
        int8,
        kernels,
        candidates: choices.candidates.iter().map(candidate).collect(),
    }
}

fn write(path: &Path, times: &Times) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    let text = serde_json::to_string_pretty(times).map_err(|e| Error::argument(e.to_string()))?;
    file::replace(path, text.as_bytes())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::gpu::Limits;

    /// A folder that goes away.
    pub struct Folder(pub PathBuf);

    impl Folder {
        pub fn new(name: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("kinglet-tune-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            Folder(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    const KEY: (Family, DType) = (Family::Matmul, DType::Q8_0);

    /// A device that was told to tune in `folder`, and what it decided.
    fn decided(folder: &Path, again: bool) -> (Arc<Device>, Arc<Choices>) {
        decided_as(Tuning { folder: Some(folder.into()), int8: true, software: true, again })
    }

    fn decided_as(tuning: Tuning) -> (Arc<Device>, Arc<Choices>) {
        let device = Device::open(0, Limits::default()).expect("a GPU, or lavapipe in its place");
        device.tune(tuning);
        prepare(&device, &[KEY.0], &[KEY.1]);
        let choices = lock(&device.choices)[&KEY].clone();
        (device, choices)
    }

    #[test]
    fn what_was_found_is_kept_and_read_again() {
        let folder = Folder::new("kept");
        let (device, first) = decided(&folder.0, false);
        let timed = first.candidates.iter().filter(|c| c.seconds.len() == 3 && c.note.is_empty());
        assert!(timed.count() >= 2, "{first:?}");
        let path = path(&device, &folder.0);
        let text = std::fs::read_to_string(&path).expect("a file");
        // Nobody measures the same twice to the last bit.
        assert_eq!(decided(&folder.0, false).1, first);
        assert_ne!(decided(&folder.0, true).1, first);
        // What has been decided stays.
        prepare(&device, &[KEY.0], &[KEY.1]);
        assert_eq!(lock(&device.choices)[&KEY], first);

        // Cut off, of another driver, of other kernels, and with an odd number.
        let damages = [
            text[..text.len() / 2].to_string(),
            text.replace("\"driver\": \"", "\"driver\": \"another "),
            text.replace("\"kernels\": \"", "\"kernels\": \"0"),
            text.replacen("\"seconds\": [", "\"seconds\": [ -1.0,", 1),
        ];
        for damaged in damages {
            std::fs::write(&path, &damaged).expect("a file");
            let (_, anew) = decided(&folder.0, false);
            assert_ne!(anew, first, "{damaged}");
            let written: Times = serde_json::from_slice(&std::fs::read(&path).expect("a file")).expect("whole again");
            assert_eq!(written.tuned.len(), 1, "{damaged}");
            assert_eq!(decided(&folder.0, false).1, anew, "{damaged}");
        }
    }

    /// Who wants no products of eight bits has times of his own, beside those with them.
    #[test]
    fn eight_bits_compete_where_that_is_asked_for() {
        let folder = Folder::new("int8");
        let tuning = Tuning { folder: Some(folder.0.clone()), software: true, ..Tuning::default() };
        let (device, without) = decided_as(tuning.clone());
        assert!(without.candidates.iter().all(|c| !c.form.is_int8()), "{without:?}");
        assert!(!device.all_int8(KEY.0, &[KEY.1]));
        let (device, with) = decided(&folder.0, false);
        assert!(device.all_int8(KEY.0, &[KEY.1]), "{with:?}");
        assert_eq!(decided_as(tuning).1, without);
        assert_eq!(decided(&folder.0, false).1, with);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_no_error() {
        let folder = Folder::new("unwritable");
        std::fs::create_dir_all(&folder.0).expect("a folder");
        std::fs::write(folder.0.join("file"), b"").expect("a file");
        let (_, choices) = decided(&folder.0.join("file"), false);
        assert!(!choices.candidates.is_empty());
    }

    /// Without being told, and of software without being asked for it, nothing is timed; and what is fixed then stays so.
    #[test]
    fn nothing_is_timed_unasked() {
        let device = Device::open(0, Limits::default()).expect("a GPU, or lavapipe in its place");
        let software = device.info().kind == DeviceKind::Software;
        prepare(&device, &[KEY.0], &[KEY.1]);
        device.tune(Tuning::default());
        assert_eq!(device.tunes(), !software);
        prepare(&device, &[KEY.0], &[KEY.1]);
        assert_eq!(*lock(&device.choices)[&KEY], Choices::default());
        assert!(device.tuned().is_empty());
    }
}
