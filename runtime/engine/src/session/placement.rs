//! Where the layers of a model run, and what that takes: all on the CPU, all on a GPU, or the last ones on the GPU and the
//! others on the CPU.
//!
//! How many a GPU gets is the caller's word, or as many as its memory holds with the cache of a full window: what the caller
//! lets it have, and what the driver gives when it is asked for as much.

#[cfg(feature = "gpu")]
use std::sync::Arc;

use super::backend::{Backend, Device};
#[cfg(feature = "gpu")]
use super::divided::{Divided, parts};
use super::estimate::Estimate;
#[cfg(feature = "gpu")]
use super::estimate::Shared;
use super::{Model, SessionOptions};
use crate::cpu::{Executor, ExecutorOptions, KvLayout};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tape::{PlanLimits, Stage};
use crate::{Error, Result};

/// Where a model runs, and what it comes to need there.
#[derive(Debug)]
pub(super) struct Placement {
    place: Place,
    pub estimate: Estimate,
    /// Why it is the CPU if it was to be another.
    pub fallback: Option<String>,
}

#[derive(Debug)]
enum Place {
    Cpu,
    #[cfg(feature = "gpu")]
    Gpu(Arc<gpu::Device>),
    /// With the number of layers of the GPU, some but not all.
    #[cfg(feature = "gpu")]
    Divided(Arc<gpu::Device>, usize),
}

impl Placement {
    /// Chooses. A GPU's memory may be asked for to see whether it can be had, and is given back.
    ///
    /// # Errors
    /// A GPU that was asked for and cannot run the model, or as many layers of it.
    pub fn new(model: &Model, options: &SessionOptions) -> Result<Placement> {
        if matches!(options.device, Device::Cpu) && options.gpu_layers.is_some_and(|n| n > 0) {
            return Err(Error::argument("layers are to run on a GPU, and the backend is the CPU; choose auto or gpu"));
        }
        #[cfg(feature = "gpu")]
        match Placement::on_gpu(model, options) {
            Ok(Some(placement)) => Ok(placement),
            Ok(None) => Placement::on_cpu(model, options, None),
            Err(e) => Placement::instead(model, options, e),
        }
        #[cfg(not(feature = "gpu"))]
        {
            options.device.check(options.gpu_layers)?;
            Placement::on_cpu(model, options, None)
        }
    }

    fn on_cpu(model: &Model, options: &SessionOptions, fallback: Option<String>) -> Result<Placement> {
        Ok(Placement { place: Place::Cpu, estimate: estimate_on_cpu(model, options)?, fallback })
    }

    /// The CPU in place of a GPU, which the error keeps from it, where the choice was ours.
    #[cfg(feature = "gpu")]
    fn instead(model: &Model, options: &SessionOptions, error: Error) -> Result<Placement> {
        if !options.device.is_auto() {
            return Err(error);
        }
        log::warn!("the CPU runs the model: {error}");
        Placement::on_cpu(model, options, Some(error.to_string()))
    }

    #[cfg(feature = "gpu")]
    fn on_gpu(model: &Model, options: &SessionOptions) -> Result<Option<Placement>> {
        if options.gpu_layers == Some(0) {
            return Ok(None);
        }
        let Some(device) = model.gpu(&options.device, options.gpu_import)? else {
            return match options.gpu_layers {
                Some(_) if options.device.is_auto() => Err(Error::argument("there is no GPU for its layers")),
                _ => Ok(None),
            };
        };
        let all = model.spec().layers.len();
        let layers = gpu_layers(model, options, &device)?;
        let estimate = estimate_on_gpu(model, options, &device, layers)?;
        if layers == all {
            return Ok(Some(Placement { place: Place::Gpu(device), estimate, fallback: None }));
        }
        let name = &device.info().name;
        match options.gpu_layers {
            Some(_) => log::info!("the last {layers} of {all} layers run on {name}, the others on the CPU"),
            None => log::warn!(
                "the last {layers} of {all} layers run on {name}, whose memory holds no more; the others run on the CPU"
            ),
        }
        Ok(Some(Placement { place: Place::Divided(device, layers), estimate, fallback: None }))
    }

    /// Checks the budget, and makes what runs there.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`].
    pub fn open(self, model: &Model, options: &SessionOptions) -> Result<(Backend, Placement)> {
        match self.backend(model, options) {
            Ok(backend) => Ok((backend, self)),
            #[cfg(feature = "gpu")]
            Err(e) if !matches!(self.place, Place::Cpu) => {
                let placement = Placement::instead(model, options, e)?;
                Ok((placement.backend(model, options)?, placement))
            }
            Err(e) => Err(e),
        }
    }

    fn backend(&self, model: &Model, options: &SessionOptions) -> Result<Backend> {
        self.estimate.check(options.memory_budget)?;
        let (spec, weights) = (model.spec(), model.weights());
        match &self.place {
            Place::Cpu => {
                let executor = Executor::new(spec, weights.clone(), &cpu_options(options, Stage::Whole))?;
                Ok(Backend::Cpu(Box::new(executor)))
            }
            #[cfg(feature = "gpu")]
            Place::Gpu(device) => {
                let options = gpu_options(options, Stage::Whole);
                let executor = gpu::Executor::new(device, spec, weights.clone(), &options)?;
                Ok(Backend::Gpu(Box::new(executor)))
            }
            #[cfg(feature = "gpu")]
            Place::Divided(device, layers) => {
                let (first, last) = (cpu_options(options, Stage::First), gpu_options(options, Stage::Last));
                Ok(Backend::Divided(Box::new(Divided::new((spec, weights), device, *layers, &first, &last)?)))
            }
        }
    }
}

/// How many layers a GPU gets: what was asked for, or as many as its memory holds where it may be divided.
#[cfg(feature = "gpu")]
fn gpu_layers(model: &Model, options: &SessionOptions, device: &gpu::Device) -> Result<usize> {
    let all = model.spec().layers.len();
    if let Some(layers) = options.gpu_layers {
        return Ok(layers.min(all));
    }
    if options.gpu_memory.is_none() && !options.device.is_auto() {
        return Ok(all);
    }
    let needs = |layers| Ok::<u64, Error>(estimate_on_gpu(model, options, device, layers)?.on_gpu_bytes());
    let fits = |layers| {
        let needed = needs(layers)?;
        // What another session has there needs no room any more.
        let present = || {
            let (_, last) = parts(model.spec(), layers);
            let stage = if layers < all { Stage::Last } else { Stage::Whole };
            gpu::Executor::present(device, &last, model.weights(), &gpu_options(options, stage))
        };
        let has_room = || device.has_room(needed.saturating_sub(present()));
        Ok::<bool, Error>(options.gpu_memory.is_none_or(|most| needed <= most) && has_room())
    };
    if fits(all)? {
        return Ok(all);
    }
    let (mut low, mut high) = (0, all.saturating_sub(1));
    while low < high {
        let middle = (low + high).div_ceil(2);
        match fits(middle)? {
            true => low = middle,
            false => high = middle - 1,
        }
    }
    if low > 0 {
        return Ok(low);
    }
    Err(Error::Memory {
        needed: needs(1)?,
        available: options.gpu_memory.unwrap_or(0),
        what: format!(
            "a single layer, the head, and what they compute in, on {}; use a smaller context, smaller chunks or the CPU",
            device.info().name
        ),
    })
}

fn cpu_options(options: &SessionOptions, stage: Stage) -> ExecutorOptions {
    ExecutorOptions {
        threads: options.threads,
        limits: PlanLimits { tokens: options.chunk, outputs: options.logit_rows },
        stage,
        trained: None,
        kept_layers: 0,
        arithmetic: options.arithmetic,
    }
}

#[cfg(feature = "gpu")]
fn gpu_options(options: &SessionOptions, stage: Stage) -> gpu::ExecutorOptions {
    gpu::ExecutorOptions {
        limits: PlanLimits { tokens: options.chunk, outputs: options.logit_rows },
        window: options.context,
        kv_type: options.kv_type,
        stage,
        trained: None,
        exact: options.arithmetic == crate::cpu::Arithmetic::Exact,
        kept_layers: 0,
    }
}

fn estimate_on_cpu(model: &Model, options: &SessionOptions) -> Result<Estimate> {
    let layout = KvLayout::new(model.spec(), options.kv_type)?;
    let needs = Executor::needs(model.spec(), model.weights(), &cpu_options(options, Stage::Whole));
    Ok(Estimate {
        weights: model.gguf().file_bytes(),
        kv_cache: layout.bytes(options.context) as u64,
        arena: needs.arena as u64,
        scratch: needs.scratch as u64,
        adapters: 0,
        imported: 0,
        on_gpu: false,
        shared: None,
    })
}

/// With so many layers on the GPU, at least one.
#[cfg(feature = "gpu")]
fn estimate_on_gpu(
    model: &Model,
    options: &SessionOptions,
    device: &gpu::Device,
    gpu_layers: usize,
) -> Result<Estimate> {
    let (spec, weights) = (model.spec(), model.weights());
    let divided = gpu_layers < spec.layers.len();
    let (first, last) = parts(spec, gpu_layers);
    let stage = if divided { Stage::Last } else { Stage::Whole };
    let needs = gpu::Executor::footprint(device, &last, weights, &gpu_options(options, stage))?;
    let on_gpu = Estimate {
        weights: needs.weights.all,
        kv_cache: needs.kv_cache,
        arena: needs.values,
        scratch: 0,
        adapters: 0,
        imported: needs.weights.imported,
        on_gpu: true,
        shared: None,
    };
    if !divided {
        return Ok(on_gpu);
    }
    let layout = KvLayout::new(&first, options.kv_type)?;
    let needs = Executor::needs(&first, weights, &cpu_options(options, Stage::First));
    let mapped = needs.weights as u64;
    // What both read, such as a table that is the head too, is mapped once.
    let imported = on_gpu.imported.min(model.gguf().file_bytes().saturating_sub(mapped));
    Ok(Estimate {
        weights: on_gpu.weights - on_gpu.imported + imported + mapped,
        imported,
        on_gpu: false,
        kv_cache: on_gpu.kv_cache + layout.bytes(options.context) as u64,
        arena: on_gpu.arena + needs.arena as u64,
        scratch: needs.scratch as u64,
        shared: Some(Shared { gpu_layers, gpu_bytes: on_gpu.allocated(), mapped }),
        ..on_gpu
    })
}
