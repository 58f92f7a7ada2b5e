//! Which device runs a model, and the one place that tells its executors apart.

#[cfg(feature = "gpu")]
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::cpu;
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
    /// The device to try, opened; none for the CPU.
    pub(super) fn open(&self) -> Result<Option<Arc<gpu::Device>>> {
        match self {
            Device::Cpu => Ok(None),
            Device::Auto => gpu::Device::best(),
            Device::Gpu(index) => gpu::Device::open(*index, gpu::Limits::default()).map(Some),
            Device::Open(device) => Ok(Some(device.clone())),
        }
    }
}

#[cfg(not(feature = "gpu"))]
impl Device {
    /// Refuses the GPU, which this build does not know.
    pub(super) fn check(&self) -> Result<()> {
        match self {
            Device::Cpu | Device::Auto => Ok(()),
            Device::Gpu(_) => Err(Error::Unsupported("the GPU: this build is without it (feature `gpu`)".into())),
        }
    }
}

/// An executor of some device.
#[derive(Debug)]
pub(super) enum Backend {
    Cpu(Box<cpu::Executor>),
    #[cfg(feature = "gpu")]
    Gpu(Box<gpu::Executor>),
}

/// The cache of one sequence, on the device that fills it.
#[derive(Clone, Debug)]
pub(super) enum Cache {
    Cpu(cpu::KvCache),
    #[cfg(feature = "gpu")]
    Gpu(gpu::KvCache),
}

impl Cache {
    pub fn truncate(&mut self, len: usize) {
        match self {
            Cache::Cpu(cache) => cache.truncate(len),
            #[cfg(feature = "gpu")]
            Cache::Gpu(cache) => cache.truncate(len),
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            Cache::Cpu(cache) => cache.bytes(),
            #[cfg(feature = "gpu")]
            Cache::Gpu(cache) => cache.bytes(),
        }
    }

    /// An identity and the bytes of every page, first to last.
    pub fn pages(&self) -> Box<dyn Iterator<Item = (usize, usize)> + '_> {
        match self {
            Cache::Cpu(cache) => Box::new(cache.page_sizes()),
            #[cfg(feature = "gpu")]
            Cache::Gpu(cache) => Box::new(cache.page_sizes()),
        }
    }

    fn cpu(&mut self) -> Option<&mut cpu::KvCache> {
        match self {
            Cache::Cpu(cache) => Some(cache),
            #[cfg(feature = "gpu")]
            Cache::Gpu(_) => None,
        }
    }

    #[cfg(feature = "gpu")]
    fn gpu(&mut self) -> Option<&mut gpu::KvCache> {
        match self {
            Cache::Gpu(cache) => Some(cache),
            Cache::Cpu(_) => None,
        }
    }
}

/// What a sequence of another engine comes to.
fn foreign() -> Error {
    Error::argument("the sequence belongs to an engine on another device")
}

/// Sequences with caches of one kind.
struct Picked<'a, C> {
    segments: &'a mut dyn Segments<Cache>,
    pick: fn(&mut Cache) -> Option<&mut C>,
}

impl<'a, C> Picked<'a, C> {
    fn new(segments: &'a mut dyn Segments<Cache>, pick: fn(&mut Cache) -> Option<&mut C>) -> Result<Picked<'a, C>> {
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

impl Backend {
    /// Runs `batch` and gives the result, `[outputs, width]`, which [`Backend::result`] gives again.
    pub fn run(&mut self, purpose: Purpose, batch: Batch<'_, Cache>, cancel: &AtomicBool) -> Result<&mut [f32]> {
        let Batch { tokens, segments, outputs, targets, alone, learning } = batch;
        match self {
            Backend::Cpu(executor) => {
                let segments = &mut Picked::new(segments, Cache::cpu)?;
                executor.run(purpose, Batch { tokens, segments, outputs, targets, alone, learning }, cancel)
            }
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => {
                let segments = &mut Picked::new(segments, Cache::gpu)?;
                executor.run(purpose, Batch { tokens, segments, outputs, targets, alone, learning }, cancel)
            }
        }
    }

    /// The result of the last run; empty after one that failed.
    pub fn result(&mut self) -> &mut [f32] {
        match self {
            Backend::Cpu(executor) => executor.result(),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.result(),
        }
    }

    /// As [`cpu::KvCache::contents`].
    pub fn contents(&self, cache: &Cache, write: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        match (self, cache) {
            (Backend::Cpu(_), Cache::Cpu(cache)) => cache.contents().try_for_each(write),
            #[cfg(feature = "gpu")]
            (Backend::Gpu(executor), Cache::Gpu(cache)) => executor.contents(cache, write),
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
            _ => Err(foreign()),
        }
    }

    /// As [`cpu::Executor::trim`].
    pub fn trim(&mut self) -> Result<usize> {
        match self {
            Backend::Cpu(executor) => executor.trim(),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.trim().map(|bytes| bytes as usize),
        }
    }

    /// Gives a GPU's memory back, whatever is in it; the next run brings it up again. Gives its bytes: 0 on the CPU.
    pub fn park(&mut self) -> Result<u64> {
        match self {
            Backend::Cpu(_) => Ok(0),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.park(),
        }
    }

    /// What keeps a training's state on the device; none on the CPU.
    pub fn keeper(&mut self) -> Option<&mut dyn KeepsTraining> {
        match self {
            Backend::Cpu(_) => None,
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => Some(executor.as_mut()),
        }
    }

    pub fn tape(&self) -> &Tape {
        match self {
            Backend::Cpu(executor) => executor.tape(),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.tape(),
        }
    }

    /// What runs, for people: `cpu`, or the GPU's name.
    pub fn name(&self) -> String {
        match self {
            Backend::Cpu(_) => "cpu".into(),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.device().info().name.clone(),
        }
    }

    pub fn set_timing(&mut self, on: bool) {
        match self {
            Backend::Cpu(executor) => executor.set_timing(on),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.set_timing(on),
        }
    }

    pub fn take_timings(&mut self) -> Vec<Timing> {
        match self {
            Backend::Cpu(executor) => executor.take_timings(),
            #[cfg(feature = "gpu")]
            Backend::Gpu(executor) => executor.take_timings(),
        }
    }
}
