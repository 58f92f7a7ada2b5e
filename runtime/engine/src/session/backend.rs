//! Which device runs a model, and the one place that tells its executors apart.

#[cfg(feature = "gpu")]
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

#[cfg(feature = "gpu")]
use super::divided::Divided;
use crate::cpu::{self, Correction, KvLayout, Patches};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tape::{Batch, KeepsTraining, Purpose, Segments, Spec, Tape, Timing};
use crate::{Error, Result};

/// Where a model runs.
#[derive(Clone, Debug, Default)]
pub enum Device {
    /// On the CPU.
    #[default]
    Cpu,
    /// On the best GPU if there is one that can, else on the CPU.
    Auto,
    /// On a GPU, by its number in the list of devices.
    Gpu(usize),
    /// On a device that is open already.
    #[cfg(feature = "gpu")]
    Open(Arc<gpu::Device>),
    /// On a device whose kernels are timed first, if it is a GPU, and the quickest taken.
    #[cfg(feature = "gpu")]
    Tuned(Box<Device>, gpu::Tuning),
}

impl Device {
    /// Whether the CPU may do what a GPU cannot.
    #[cfg(feature = "gpu")]
    pub(super) fn is_auto(&self) -> bool {
        match self {
            Device::Auto => true,
            #[cfg(feature = "gpu")]
            Device::Tuned(device, _) => device.is_auto(),
            _ => false,
        }
    }
}

impl std::str::FromStr for Device {
    type Err = Error;

    /// `auto`, `cpu`, `gpu` or `gpu:N`.
    fn from_str(name: &str) -> Result<Device> {
        match name {
            "auto" => return Ok(Device::Auto),
            "cpu" => return Ok(Device::Cpu),
            "gpu" => return Ok(Device::Gpu(0)),
            _ => {}
        }
        match name.strip_prefix("gpu:").and_then(|n| n.parse().ok()) {
            Some(index) => Ok(Device::Gpu(index)),
            None => Err(Error::argument(format!("{name:?} is no backend; choose auto, cpu, gpu or gpu:N"))),
        }
    }
}

#[cfg(feature = "gpu")]
impl Device {
    /// The device to try, opened; none for the CPU. With `import` it reads weights from the mapped file if it can; what is open
    /// stays as it is.
    pub(super) fn open(&self, import: bool) -> Result<Option<Arc<gpu::Device>>> {
        let limits = gpu::Limits { import, ..gpu::Limits::default() };
        match self {
            Device::Cpu => Ok(None),
            Device::Auto => gpu::Device::best(limits),
            Device::Gpu(index) => gpu::Device::open(*index, limits).map(Some),
            Device::Open(device) => Ok(Some(device.clone())),
            Device::Tuned(device, tuning) => {
                let device = device.open(import)?;
                if let Some(device) = &device {
                    device.tune(tuning.clone());
                }
                Ok(device)
            }
        }
    }
}

#[cfg(feature = "gpu")]
impl Device {
    /// Whether opening it a second time may give what the first time gave: nothing is to be timed anew, and an open device
    /// is what it is.
    pub(super) fn is_shared(&self) -> bool {
        match self {
            Device::Cpu | Device::Open(_) => false,
            Device::Auto | Device::Gpu(_) => true,
            Device::Tuned(device, tuning) => device.is_shared() && !tuning.again,
        }
    }

    /// Whether both say the same of a device that is not open yet.
    pub(super) fn is(&self, other: &Device) -> bool {
        match (self, other) {
            (Device::Auto, Device::Auto) => true,
            (Device::Gpu(one), Device::Gpu(two)) => one == two,
            (Device::Tuned(one, as_one), Device::Tuned(two, as_two)) => one.is(two) && as_one == as_two,
            _ => false,
        }
    }
}

#[cfg(not(feature = "gpu"))]
impl Device {
    /// Refuses the GPU, which this build does not know.
    pub(super) fn check(&self, gpu_layers: Option<usize>) -> Result<()> {
        match self {
            Device::Cpu | Device::Auto if gpu_layers.unwrap_or(0) == 0 => Ok(()),
            _ => Err(Error::Unsupported("the GPU: this build is without it (feature `gpu`)".into())),
        }
    }
}

/// An executor of some device.
#[derive(Debug)]
pub(super) enum Backend {
    Cpu(Box<cpu::Executor>),
    #[cfg(feature = "gpu")]
    Gpu(Box<gpu::Executor>),
    /// The first layers on the CPU, the others on a GPU.
    #[cfg(feature = "gpu")]
    Divided(Box<Divided>),
}

/// The cache of one sequence, on the device that fills it.
#[derive(Clone, Debug)]
pub(super) enum Cache {
    Cpu(cpu::KvCache),
    #[cfg(feature = "gpu")]
    Gpu(gpu::KvCache),
    /// Of the layers on the CPU, and of those on the GPU.
    #[cfg(feature = "gpu")]
    Divided(cpu::KvCache, gpu::KvCache),
}

impl Cache {
    pub fn truncate(&mut self, len: usize) {
        match self {
            Cache::Cpu(cache) => cache.truncate(len),
            #[cfg(feature = "gpu")]
            Cache::Gpu(cache) => cache.truncate(len),
            #[cfg(feature = "gpu")]
            Cache::Divided(first, last) => {
                first.truncate(len);
                last.truncate(len);
            }
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            Cache::Cpu(cache) => cache.bytes(),
            #[cfg(feature = "gpu")]
            Cache::Gpu(cache) => cache.bytes(),
            #[cfg(feature = "gpu")]
            Cache::Divided(first, last) => first.bytes() + last.bytes(),
        }
    }

    /// An identity and the bytes of every page, first to last.
    pub fn pages(&self) -> Box<dyn Iterator<Item = (usize, usize)> + '_> {
        match self {
            Cache::Cpu(cache) => Box::new(cache.page_sizes()),
            #[cfg(feature = "gpu")]
            Cache::Gpu(cache) => Box::new(cache.page_sizes()),
            #[cfg(feature = "gpu")]
            Cache::Divided(first, last) => Box::new(first.page_sizes().chain(last.page_sizes())),
        }
    }

    fn cpu(&mut self) -> Option<&mut cpu::KvCache> {
        match self {
            Cache::Cpu(cache) => Some(cache),
            #[cfg(feature = "gpu")]
            Cache::Gpu(_) | Cache::Divided(..) => None,
        }
    }

    #[cfg(feature = "gpu")]
    fn gpu(&mut self) -> Option<&mut gpu::KvCache> {
        match self {
            Cache::Gpu(cache) => Some(cache),
            Cache::Cpu(_) | Cache::Divided(..) => None,
        }
    }

    /// The part of the layers on the CPU, where a model is divided.
    #[cfg(feature = "gpu")]
    pub fn first(&mut self) -> Option<&mut cpu::KvCache> {
        match self {
            Cache::Divided(first, _) => Some(first),
            Cache::Cpu(_) | Cache::Gpu(_) => None,
        }
    }

    /// The part of the layers on the GPU, where a model is divided.
    #[cfg(feature = "gpu")]
    pub fn last(&mut self) -> Option<&mut gpu::KvCache> {
        match self {
            Cache::Divided(_, last) => Some(last),
            Cache::Cpu(_) | Cache::Gpu(_) => None,
        }
    }
}

/// What a sequence of another engine comes to.
pub(super) fn foreign() -> Error {
    Error::argument("the sequence belongs to an engine on another device")
}

/// Sequences with caches of one kind.
pub(super) struct Picked<'a, C> {
    segments: &'a mut dyn Segments<Cache>,
    pick: fn(&mut Cache) -> Option<&mut C>,
}

impl<'a, C> Picked<'a, C> {
    pub fn new(segments: &'a mut dyn Segments<Cache>, pick: fn(&mut Cache) -> Option<&mut C>) -> Result<Picked<'a, C>> {
        match (0..segments.count()).all(|i| segments.cache(i).is_none_or(|cache| pick(cache).is_some())) {
            true => Ok(Picked { segments, pick }),
            false => Err(foreign()),
        }
    }
}

impl<C> Segments<C> for Picked<'_, C> {
    fn count(&self) -> usize {
        self.segments.count()
    }

    fn rows(&self, index: usize) -> usize {
        self.segments.rows(index)
    }

    fn cache(&mut self, index: usize) -> Option<&mut C> {
        self.segments.cache(index).and_then(self.pick)
    }
}

/// Corrections as the CPU takes them; none for none.
pub(super) fn patches(executor: &mut cpu::Executor, corrections: Vec<Correction>) -> Result<Option<Patches>> {
    match corrections.is_empty() {
        true => Ok(None),
        false => executor.patches(corrections).map(Some),
    }
}

/// Corrections as a GPU takes them.
#[cfg(feature = "gpu")]
pub(super) fn gpu_corrections(corrections: &[Correction]) -> Vec<gpu::Correction<'_>> {
    fn one(c: &Correction) -> gpu::Correction<'_> {
        gpu::Correction { weight: c.weight, rank: c.rank, a: &c.a, b: &c.b, gain: c.gain.as_deref() }
    }
    corrections.iter().map(one).collect()
}

/// Bytes of the low-rank matrices and gains on a GPU.
#[cfg(feature = "gpu")]
pub(super) fn low_rank_bytes(corrections: &[Correction]) -> usize {
    corrections.iter().map(|c| (c.a.len() + c.b.len() + c.gain.as_ref().map_or(0, Vec::len)) * 4).sum()
}

impl Backend {
    /// An empty cache; `layout` is that of the model.
    pub fn cache(&self, layout: KvLayout) -> Cache {
        match self {
            Backend::Cpu(_) => Cache::Cpu(cpu::KvCache::new(layout)),
            #[cfg(feature = "gpu")]
            Backend::Gpu(_) => Cache::Gpu(gpu::KvCache::default()),
            #[cfg(feature = "gpu")]
            Backend::Divided(divided) => divided.cache(),
        }
    }

    /// A second backend for the same caches, which on a GPU shares the weights with this one.
    pub fn fork(&self) -> Result<Backend> {
        match self {
            Backend::Cpu(executor) => executor.fork().map(|executor| Backend::Cpu(Box::new(executor))),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.fork().map(|executor| Backend::Gpu(Box::new(executor))),
            #[cfg(feature = "gpu")]
            Backend::Divided(divided) => divided.fork().map(|divided| Backend::Divided(Box::new(divided))),
        }
    }

    /// Runs `batch` and gives the result, `[outputs, width]`, which [`Backend::result`] gives again.
    pub fn run(&mut self, purpose: Purpose, batch: Batch<'_, Cache>, cancel: &AtomicBool) -> Result<&mut [f32]> {
        match self {
            Backend::Cpu(executor) => {
                let Batch { tokens, input, segments, outputs, largest, targets, alone, learning } = batch;
                let segments = &mut Picked::new(segments, Cache::cpu)?;
                executor.run(
                    purpose,
                    Batch { tokens, input, segments, outputs, largest, targets, alone, learning },
                    cancel,
                )
            }
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => {
                let Batch { tokens, input, segments, outputs, largest, targets, alone, learning } = batch;
                let segments = &mut Picked::new(segments, Cache::gpu)?;
                executor.run(
                    purpose,
                    Batch { tokens, input, segments, outputs, largest, targets, alone, learning },
                    cancel,
                )
            }
            #[cfg(feature = "gpu")]
            Backend::Divided(divided) => {
                divided.run(purpose, batch, cancel)?;
                Ok(divided.last.result())
            }
        }
    }

    /// Puts corrections in force from the next run on, in place of those before, if `check` agrees to the bytes that they
    /// take. Gives the bytes.
    ///
    /// # Errors
    /// Corrections that the device does not know, [`Error::Memory`], [`Error::Device`], and what `check` says. Those before
    /// stay in force then.
    pub fn set_corrections(
        &mut self,
        corrections: Vec<Correction>,
        check: impl Fn(usize) -> Result<()>,
    ) -> Result<usize> {
        match self {
            Backend::Cpu(executor) => {
                let patches = patches(executor, corrections)?;
                let bytes = patches.as_ref().map_or(0, |p| p.bytes());
                check(bytes)?;
                executor.set_patches(patches);
                Ok(bytes)
            }
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => {
                let plain = gpu_corrections(&corrections);
                check(low_rank_bytes(&corrections))?;
                executor.set_corrections(&plain)
            }
            #[cfg(feature = "gpu")]
            Backend::Divided(divided) => divided.set_corrections(corrections, check),
        }
    }

    /// The result of the last run; empty after one that failed.
    pub fn result(&mut self) -> &mut [f32] {
        match self {
            Backend::Cpu(executor) => executor.result(),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.result(),
            #[cfg(feature = "gpu")]
            Backend::Divided(divided) => divided.last.result(),
        }
    }

    /// As [`gpu::Executor::largest`]; the CPU gives all logits.
    pub fn largest(&self, row: usize) -> Option<&[(u32, f32)]> {
        match self {
            Backend::Cpu(_) => {
                let _ = row;
                None
            }
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.largest(row),
            #[cfg(feature = "gpu")]
            Backend::Divided(divided) => divided.last.largest(row),
        }
    }

    /// The logits of the last run, brought from a GPU if it gave the largest alone.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`].
    pub fn logits(&mut self) -> Result<&mut [f32]> {
        #[cfg(feature = "gpu")]
        if let Some(executor) = self.gpu() {
            executor.read_logits()?;
        }
        Ok(self.result())
    }

    /// As [`cpu::KvCache::contents`].
    pub fn contents(&self, cache: &Cache, write: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        match (self, cache) {
            (Backend::Cpu(_), Cache::Cpu(cache)) => cache.contents().try_for_each(write),
            #[cfg(feature = "gpu")]
            (Backend::Gpu(executor), Cache::Gpu(cache)) => executor.contents(cache, write),
            #[cfg(feature = "gpu")]
            (Backend::Divided(divided), Cache::Divided(first, last)) => divided.contents((first, last), write),
            #[cfg(feature = "gpu")]
            _ => Err(foreign()),
        }
    }

    /// As [`cpu::KvCache::fill`].
    pub fn fill(&mut self, cache: &mut Cache, len: usize, read: impl FnMut(&mut [u8]) -> Result<()>) -> Result<()> {
        match (self, cache) {
            (Backend::Cpu(_), Cache::Cpu(cache)) => cache.fill(len, read),
            #[cfg(feature = "gpu")]
            (Backend::Gpu(executor), Cache::Gpu(cache)) => executor.fill(cache, len, read),
            #[cfg(feature = "gpu")]
            (Backend::Divided(divided), cache) => divided.fill(divided.caches(cache)?, len, read),
            #[cfg(feature = "gpu")]
            _ => Err(foreign()),
        }
    }

    /// As [`cpu::KvCache::shift`].
    pub fn shift(&mut self, cache: &mut Cache, spec: &Spec, keep: usize, drop: usize) -> Result<()> {
        match (self, cache) {
            (Backend::Cpu(_), Cache::Cpu(cache)) => cache.shift(spec, keep, drop),
            #[cfg(feature = "gpu")]
            (Backend::Gpu(executor), Cache::Gpu(cache)) => executor.shift(cache, keep, drop),
            #[cfg(feature = "gpu")]
            (Backend::Divided(divided), cache) => {
                let caches = divided.caches(cache)?;
                divided.shift(caches, keep, drop)
            }
            #[cfg(feature = "gpu")]
            _ => Err(foreign()),
        }
    }

    /// As [`cpu::Executor::trim`].
    pub fn trim(&mut self) -> Result<usize> {
        match self {
            Backend::Cpu(executor) => executor.trim(),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.trim().map(|bytes| bytes as usize),
            #[cfg(feature = "gpu")]
            Backend::Divided(divided) => Ok(divided.first.trim()? + divided.last.trim()? as usize),
        }
    }

    /// Gives a GPU's memory back, whatever is in it; the next run brings it up again. Gives its bytes: 0 on the CPU.
    pub fn park(&mut self) -> Result<u64> {
        match self {
            Backend::Cpu(_) => Ok(0),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.park(),
            #[cfg(feature = "gpu")]
            Backend::Divided(divided) => divided.last.park(),
        }
    }

    /// What keeps a training's state on the device; none on the CPU.
    pub fn keeper(&mut self) -> Option<&mut dyn KeepsTraining> {
        match self {
            Backend::Cpu(_) => None,
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => Some(executor.as_mut()),
            // Learning is not divided.
            #[cfg(feature = "gpu")]
            Backend::Divided(_) => None,
        }
    }

    pub fn tape(&self) -> &Tape {
        match self {
            Backend::Cpu(executor) => executor.tape(),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.tape(),
            #[cfg(feature = "gpu")]
            Backend::Divided(divided) => divided.last.tape(),
        }
    }

    /// The executor on a GPU, of the whole model or of its last part; none on the CPU.
    #[cfg(feature = "gpu")]
    pub fn gpu(&mut self) -> Option<&mut gpu::Executor> {
        match self {
            Backend::Cpu(_) => None,
            Backend::Gpu(executor) => Some(executor),
            Backend::Divided(divided) => Some(&mut divided.last),
        }
    }

    /// Whether caches are of use to this backend and its forks only: on a GPU.
    pub fn owns_caches(&self) -> bool {
        !matches!(self, Backend::Cpu(_))
    }

    /// What runs, for people: `cpu`, the GPU's name, or both.
    pub fn name(&self) -> String {
        match self {
            Backend::Cpu(_) => "cpu".into(),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.device().info().name.clone(),
            #[cfg(feature = "gpu")]
            Backend::Divided(divided) => divided.name(),
        }
    }

    pub fn set_timing(&mut self, on: bool) {
        match self {
            Backend::Cpu(executor) => executor.set_timing(on),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.set_timing(on),
            #[cfg(feature = "gpu")]
            Backend::Divided(divided) => {
                divided.first.set_timing(on);
                divided.last.set_timing(on);
            }
        }
    }

    pub fn take_timings(&mut self) -> Vec<Timing> {
        match self {
            Backend::Cpu(executor) => executor.take_timings(),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.take_timings(),
            #[cfg(feature = "gpu")]
            Backend::Divided(divided) => divided.take_timings(),
        }
    }
}
