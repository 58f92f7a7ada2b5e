//! A model that is divided: its first layers on the CPU, the last ones with the head on a GPU whose memory does not hold all.
//!
//! Each part has the keys and values of its own layers; only the residual stream crosses, one row per token. The last part
//! is the GPU's: it has the head, which is large, and the embedding, of which a token reads one row, stays in the map.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::backend::{Cache, Picked, foreign, gpu_corrections, low_rank_bytes, patches};
use crate::Result;
use crate::cpu::{self, Correction, KvLayout, PAGE};
use crate::gpu;
use crate::tape::{Batch, Purpose, Spec, Timing, Weights};

/// See the module's text.
#[derive(Debug)]
pub(super) struct Divided {
    /// The model with the CPU's layers.
    spec: Spec,
    layout: KvLayout,
    pub first: cpu::Executor,
    pub last: gpu::Executor,
    gpu_layers: usize,
}

impl Divided {
    /// Divides the model so that its last `gpu_layers` layers, some but not all, run on `device`.
    ///
    /// # Errors
    /// As [`cpu::Executor::new`] and [`gpu::Executor::new`].
    pub fn new(
        (spec, weights): (&Spec, &Arc<Weights>),
        device: &Arc<gpu::Device>,
        gpu_layers: usize,
        cpu_options: &cpu::ExecutorOptions,
        gpu_options: &gpu::ExecutorOptions,
    ) -> Result<Divided> {
        let (first, last) = parts(spec, gpu_layers);
        Ok(Divided {
            layout: KvLayout::new(&first, gpu_options.kv_type)?,
            first: cpu::Executor::new(&first, weights.clone(), cpu_options)?,
            last: gpu::Executor::new(device, &last, weights.clone(), gpu_options)?,
            spec: first,
            gpu_layers,
        })
    }

    /// As [`gpu::Executor::fork`].
    pub fn fork(&self) -> Result<Divided> {
        let (first, last) = (self.first.fork()?, self.last.fork()?);
        Ok(Divided { spec: self.spec.clone(), layout: self.layout, first, last, gpu_layers: self.gpu_layers })
    }

    /// An empty cache.
    pub fn cache(&self) -> Cache {
        Cache::Divided(cpu::KvCache::new(self.layout), gpu::KvCache::default())
    }

    /// As [`Backend::run`](super::backend::Backend::run); the caches of both parts advance, or none.
    pub fn run(&mut self, purpose: Purpose, batch: Batch<'_, Cache>, cancel: &AtomicBool) -> Result<()> {
        let Batch { tokens, segments, outputs, largest, targets, alone, .. } = batch;
        let first = Batch {
            tokens,
            input: &[],
            segments: &mut Picked::new(segments, Cache::first)?,
            outputs: &[],
            largest: 0,
            targets: &[],
            alone,
            learning: None,
        };
        let input: &[f32] = self.first.run(Purpose::Generate, first, cancel)?;
        let last = Batch {
            tokens,
            input,
            segments: &mut Picked::new(segments, Cache::last)?,
            outputs,
            largest,
            targets,
            alone,
            learning: None,
        };
        let done = self.last.run(purpose, last, cancel).map(|_| ());
        if done.is_err() {
            for i in 0..segments.count() {
                let rows = segments.rows(i);
                if let Some(cache) = segments.cache(i).and_then(Cache::first) {
                    cache.truncate(cache.len() - rows);
                }
            }
        }
        done
    }

    /// As [`cpu::KvCache::contents`], of the whole model: a file does not tell where layers ran.
    pub fn contents(
        &self,
        (first, last): (&cpu::KvCache, &gpu::KvCache),
        mut write: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        for page in 0..first.len().div_ceil(PAGE) {
            first.page_contents(page).try_for_each(&mut write)?;
            self.last.page_contents(last, page, &mut write)?;
        }
        Ok(())
    }

    /// As [`cpu::KvCache::fill`].
    pub fn fill(
        &self,
        (first, last): (&mut cpu::KvCache, &mut gpu::KvCache),
        len: usize,
        mut read: impl FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        first.truncate(0);
        last.truncate(0);
        for page in 0..len.div_ceil(PAGE) {
            let filled = first.fill_page(page, len, &mut read);
            filled.and_then(|()| self.last.fill_page(last, page, len, &mut read)).inspect_err(|_| first.truncate(0))?;
        }
        Ok(())
    }

    /// As [`cpu::KvCache::shift`]: both parts, or none.
    pub fn shift(
        &mut self,
        (first, last): (&mut cpu::KvCache, &mut gpu::KvCache),
        keep: usize,
        drop: usize,
    ) -> Result<()> {
        let mut shifted = first.clone();
        shifted.shift(&self.spec, keep, drop)?;
        self.last.shift(last, keep, drop)?;
        *first = shifted;
        Ok(())
    }

    /// Each part gets the corrections of its matrices; see
    /// [`Backend::set_corrections`](super::backend::Backend::set_corrections). A matrix that is embedding and head is the
    /// embedding, as on the CPU.
    pub fn set_corrections(
        &mut self,
        corrections: Vec<Correction>,
        check: impl Fn(usize) -> Result<()>,
    ) -> Result<usize> {
        let mine = self.first.tape().matrices();
        let (first, last): (Vec<_>, Vec<_>) = corrections.into_iter().partition(|c| mine.contains(&c.weight));
        let last_corrections = gpu_corrections(&last);
        let patches = patches(&mut self.first, first)?;
        let bytes = patches.as_ref().map_or(0, |p| p.bytes());
        check(bytes + low_rank_bytes(&last))?;
        let bytes = bytes + self.last.set_corrections(&last_corrections)?;
        self.first.set_patches(patches);
        Ok(bytes)
    }

    /// As [`Backend::name`](super::backend::Backend::name).
    pub fn name(&self) -> String {
        let layers = self.spec.layers.len() + self.gpu_layers;
        format!("{} ({} of {layers} layers) and cpu", self.last.device().info().name, self.gpu_layers)
    }

    pub fn take_timings(&mut self) -> Vec<Timing> {
        [self.first.take_timings(), self.last.take_timings()].concat()
    }

    /// Both parts' caches of one, if they fit.
    pub fn caches<'c>(&self, cache: &'c mut Cache) -> Result<(&'c mut cpu::KvCache, &'c mut gpu::KvCache)> {
        match cache {
            Cache::Divided(first, last) if first.layout() == self.layout => Ok((first, last)),
            _ => Err(foreign()),
        }
    }
}

/// The parts of a model that is divided: the CPU's, and the GPU's of so many layers.
pub(super) fn parts(spec: &Spec, gpu_layers: usize) -> (Spec, Spec) {
    let (first, all) = (spec.layers.len() - gpu_layers, spec.layers.len());
    (spec.with_layers(0..first), spec.with_layers(first..all))
}
