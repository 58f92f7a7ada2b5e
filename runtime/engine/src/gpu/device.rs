//! Adapters, and an open device: its queue, its buffers, and what becomes of errors.
//!
//! Nothing here panics or aborts: errors of a scope become [`Error::Device`], errors outside any scope are kept and reported
//! by the next call, and a lost device is known by its callback alone, so every wait looks at it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak, mpsc};
use std::time::Duration;

use super::choice::{Choices, Family};
use super::import::Import;
use super::pipelines::Pipelines;
use super::tune::Tuning;
use super::weights::Resident;
use crate::quant::DType;
use crate::{Error, Result};

/// Size of a dispatch's description, and the alignment of its slot.
pub(super) const SLOT: u64 = 256;
/// Bytes that go up or come down at once.
const CHUNK: usize = 8 << 20;
/// Storage buffers every kernel may bind.
const STORAGE_BUFFERS: u32 = 8;

/// How long a wait lasts before somebody looks whether the device is lost.
const LOOK: Duration = Duration::from_millis(200);

/// Bytes that are asked for at once to see whether there is room.
const ROOM_PIECE: u64 = 1 << 30;

/// What sort of device an adapter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// A card with memory of its own.
    Discrete,
    /// Part of the processor, sharing its memory.
    Integrated,
    /// Of a virtual machine.
    Virtual,
    /// Software.
    Software,
    /// Not known.
    Other,
}

/// An adapter of this machine.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Number for `gpu:N`.
    pub index: usize,
    /// Name, such as `NVIDIA H100`.
    pub name: String,
    /// Driver and its version.
    pub driver: String,
    /// `vulkan`, `metal` or `dx12`.
    pub api: String,
    /// What sort of device.
    pub kind: DeviceKind,
    /// Bytes of the largest buffer a kernel can see at once.
    pub binding_bytes: u64,
    /// Smallest and largest subgroup.
    pub subgroups: (u32, u32),
    /// Why it cannot run models, if it cannot.
    pub unfit: Option<String>,
}

/// What is used of an adapter: limits below its own, for tests of what happens on smaller ones, and what is off unless asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Bytes of the largest buffer a kernel can see at once.
    pub binding_bytes: Option<u64>,
    /// Nothing that WebGPU does not promise: no subgroups, no half precision, no cooperative matrices, and kernels that check
    /// every index.
    pub baseline: bool,
    /// Multiply-adds per second that long dispatches are believed to do, whatever was timed; see `division`.
    pub speed: Option<f64>,
    /// Weights are read from the pages of the mapped file, without a copy on the device, as far as the driver allows it. What it
    /// does not is copied, with a warning that says why.
    pub import: bool,
}

/// What a device offers beyond WebGPU's baseline.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Abilities {
    /// Times of dispatches.
    pub timestamps: bool,
    /// All subgroups have 32 invocations.
    pub subgroups_of_32: bool,
    /// Subgroups of 32 multiply 16 × 16 matrices of half precision and add in single.
    pub cooperative: bool,
    /// Of a workgroup.
    pub workgroup_bytes: u32,
    /// Indices are checked and loops counted.
    pub checked: bool,
}

/// The adapters of this machine, the ones most fit first.
pub fn devices() -> Vec<DeviceInfo> {
    adapters().iter().enumerate().map(|(index, adapter)| describe(index, adapter)).collect()
}

fn adapters() -> Vec<wgpu::Adapter> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12,
        flags: wgpu::InstanceFlags::DISCARD_HAL_LABELS,
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let mut all = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    // The order among equals is the system's.
    all.sort_by_key(|adapter| match kind(adapter.get_info().device_type) {
        DeviceKind::Discrete => 0,
        DeviceKind::Integrated => 1,
        DeviceKind::Virtual => 2,
        DeviceKind::Other => 3,
        DeviceKind::Software => 4,
    });
    all
}

/// Whether a look for a GPU is worth its price: loading the drivers takes 30 ms and 50 MB, and some of their layers write to
/// standard error. On Linux a GPU has a node in `/dev`; elsewhere the drivers are part of the system and are asked.
fn may_have_gpu() -> bool {
    if !cfg!(target_os = "linux") {
        return true;
    }
    // Kernel drivers with render nodes, NVIDIA's own, Windows beneath Linux, and those of phones' chips.
    const NODES: [&str; 6] = ["dri", "nvidia", "dxg", "kgsl", "mali", "pvr"];
    let is_node = |name: &str| NODES.iter().any(|node| name.starts_with(node));
    match std::fs::read_dir("/dev") {
        Ok(entries) => entries.flatten().any(|entry| entry.file_name().to_str().is_some_and(is_node)),
        Err(_) => true,
    }
}

fn kind(t: wgpu::DeviceType) -> DeviceKind {
    match t {
        wgpu::DeviceType::DiscreteGpu => DeviceKind::Discrete,
        wgpu::DeviceType::IntegratedGpu => DeviceKind::Integrated,
        wgpu::DeviceType::VirtualGpu => DeviceKind::Virtual,
        wgpu::DeviceType::Cpu => DeviceKind::Software,
        wgpu::DeviceType::Other => DeviceKind::Other,
    }
}

fn describe(index: usize, adapter: &wgpu::Adapter) -> DeviceInfo {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    let unfit = (limits.max_storage_buffers_per_shader_stage < STORAGE_BUFFERS).then(|| {
        format!(
            "kernels can bind {} storage buffers, {STORAGE_BUFFERS} are needed",
            limits.max_storage_buffers_per_shader_stage
        )
    });
    DeviceInfo {
        index,
        driver: [info.driver.as_str(), info.driver_info.as_str()].join(" ").trim().to_string(),
        name: info.name,
        api: info.backend.to_string(),
        kind: kind(info.device_type),
        binding_bytes: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size),
        subgroups: (info.subgroup_min_size, info.subgroup_max_size),
        unfit,
    }
}

/// An open device. Cloning the `Arc` shares it, its pipelines too.
#[derive(Debug)]
pub struct Device {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    info: DeviceInfo,
    /// Bytes of the largest buffer a kernel can see.
    pub(super) binding_bytes: u64,
    layout: wgpu::BindGroupLayout,
    pub(super) pipelines: Pipelines,
    /// What trials of products with cooperative matrices gave, by type and direction.
    pub(super) trials: Mutex<HashMap<(DType, bool), bool>>,
    /// Whether and how kernels are timed, once that is said.
    pub(super) tuning: OnceLock<Tuning>,
    /// Held while kernels are timed.
    pub(super) preparing: Mutex<()>,
    /// What was found by it, by family and type; what is here does not change.
    pub(super) choices: Mutex<HashMap<(Family, DType), Arc<Choices>>>,
    /// Matrices that lie here, while anybody uses them.
    pub(super) residents: Mutex<Vec<Weak<Resident>>>,
    /// Imports pages of the mapped file, where that was asked for and can be.
    pub(super) import: Option<Import>,
    trouble: Arc<Mutex<Trouble>>,
    /// As [`Limits::speed`].
    pub(super) speed: Option<f64>,
    pub(super) abilities: Abilities,
}

/// What went wrong outside any call.
#[derive(Debug, Default)]
struct Trouble {
    lost: Option<String>,
    error: Option<String>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device {
    /// Opens adapter `index` of [`devices`].
    ///
    /// # Errors
    /// No such adapter, one that is not fit, a driver that refuses.
    pub fn open(index: usize, limits: Limits) -> Result<Arc<Device>> {
        let all = adapters();
        let Some(adapter) = all.get(index) else {
            let known = match all.len() {
                0 => "this machine has no Vulkan, Metal or DX12 device (a driver may be missing)".to_string(),
                n => format!("there are {n}, counted from 0; `kinglet devices` lists them"),
            };
            return Err(Error::Argument(format!("there is no GPU {index}: {known}")));
        };
        Device::of(describe(index, adapter), adapter, limits)
    }

    /// Opens the first adapter that is a GPU, on a card or in the processor, and fit; none if there is no such.
    ///
    /// # Errors
    /// A driver that refuses.
    pub fn best(limits: Limits) -> Result<Option<Arc<Device>>> {
        if !may_have_gpu() {
            return Ok(None);
        }
        let all = adapters();
        let infos = all.iter().enumerate().map(|(index, adapter)| (describe(index, adapter), adapter));
        let real = |info: &DeviceInfo| matches!(info.kind, DeviceKind::Discrete | DeviceKind::Integrated);
        match infos.into_iter().find(|(info, _)| info.unfit.is_none() && real(info)) {
            Some((info, adapter)) => Device::of(info, adapter, limits).map(Some),
            None => Ok(None),
        }
    }

    fn of(mut info: DeviceInfo, adapter: &wgpu::Adapter, limits: Limits) -> Result<Arc<Device>> {
        if let Some(why) = &info.unfit {
            return Err(Error::Unsupported(format!("{}: {why}; use the CPU", info.name)));
        }
        let mut wanted = adapter.limits();
        if let Some(bytes) = limits.binding_bytes {
            wanted.max_storage_buffer_binding_size = wanted.max_storage_buffer_binding_size.min(bytes);
        }
        let (abilities, features) = abilities(adapter, &limits);
        let descriptor = wgpu::DeviceDescriptor {
            label: None,
            required_features: features,
            required_limits: wanted.clone(),
            experimental_features: experiments(abilities.cooperative),
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            trace: wgpu::Trace::Off,
        };
        let importing = limits.import.then(|| Import::open(adapter, &descriptor)).and_then(|opened| {
            let warn = |why: &String| log::warn!("{} gets a copy of the weights: {why}", info.name);
            opened.inspect_err(warn).ok()
        });
        let (device, queue, import) = match importing {
            Some((device, queue, import)) => (device, queue, Some(import)),
            None => {
                let opened = pollster::block_on(adapter.request_device(&descriptor));
                let (device, queue) = opened.map_err(|e| Error::Device {
                    device: info.name.clone(),
                    what: format!("the driver refuses to open it: {e}; use the CPU, or update the driver"),
                })?;
                (device, queue, None)
            }
        };
        let trouble = Arc::new(Mutex::new(Trouble::default()));
        let heard = trouble.clone();
        device.set_device_lost_callback(move |reason, message| {
            lock(&heard).lost.get_or_insert_with(|| format!("{reason:?} {message}"));
        });
        let heard = trouble.clone();
        device.on_uncaptured_error(Arc::new(move |e: wgpu::Error| {
            lock(&heard).error.get_or_insert_with(|| e.to_string());
        }));
        // A whole number of slots; offsets into a binding are 32-bit words or bytes.
        let binding_bytes =
            wanted.max_storage_buffer_binding_size.min(wanted.max_buffer_size).min(u64::from(u32::MAX)) / SLOT * SLOT;
        info.binding_bytes = binding_bytes;
        let layout = bindings(&device);
        let pipelines = Pipelines::new(device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: None,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        }));
        Ok(Arc::new(Device {
            device,
            queue,
            info,
            binding_bytes,
            layout,
            pipelines,
            trials: Mutex::default(),
            tuning: OnceLock::new(),
            preparing: Mutex::default(),
            choices: Mutex::default(),
            residents: Mutex::default(),
            import,
            trouble,
            speed: limits.speed,
            abilities,
        }))
    }

    /// What it is.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Gives the device up, as when it is lost: whatever uses it ends with [`Error::Device`].
    pub fn destroy(&self) {
        self.device.destroy();
        lock(&self.trouble).lost.get_or_insert_with(|| "given up".into());
    }

    /// Whether it is of no use any more.
    pub(crate) fn is_lost(&self) -> bool {
        // A loss is told when the device is looked at.
        let _ = self.device.poll(wgpu::PollType::Poll);
        lock(&self.trouble).lost.is_some()
    }

    /// Bytes that buffers take on the device, as the driver's allocator counts; none where it does not count.
    pub fn allocated_bytes(&self) -> Option<u64> {
        self.device.generate_allocator_report().map(|report| report.total_allocated_bytes)
    }

    /// Bytes of weights that it reads from the pages of mapped files at this moment, without a copy.
    pub fn imported_bytes(&self) -> u64 {
        lock(&self.residents).iter().filter_map(Weak::upgrade).map(|resident| resident.imported_bytes()).sum()
    }

    /// Whether so many bytes can be had at this moment: they are asked for, and given back.
    pub(crate) fn has_room(&self, bytes: u64) -> bool {
        let piece = self.binding_bytes.clamp(1, ROOM_PIECE);
        let sizes = (0..bytes.div_ceil(piece)).map(|i| piece.min(bytes - i * piece));
        // Nothing touches them, so that nothing but their places is taken.
        let taken: Vec<_> = sizes.map_while(|size| self.storage(size, "a trial").ok()).collect();
        let all = taken.len() as u64 == bytes.div_ceil(piece);
        taken.into_iter().for_each(|buffer| buffer.destroy());
        let _ = self.device.poll(wgpu::PollType::Poll);
        all
    }

    pub(super) fn error(&self, what: impl Into<String>) -> Error {
        Error::Device { device: self.info.name.clone(), what: what.into() }
    }

    /// What has gone wrong since the last look.
    pub(super) fn check(&self) -> Result<()> {
        let error = lock(&self.trouble).error.take();
        if error.is_some() {
            // A loss is told when the device is looked at, and then it is the reason.
            let _ = self.device.poll(wgpu::PollType::Poll);
        }
        if let Some(why) = &lock(&self.trouble).lost {
            return Err(self.error(format!(
                "the device is lost ({}); open the session again, or resume the training, on this device or on the CPU",
                why.trim()
            )));
        }
        match error {
            Some(error) => Err(self.error(error)),
            None => Ok(()),
        }
    }

    /// A buffer of `bytes`, zeroed.
    pub(super) fn buffer(&self, bytes: u64, usage: wgpu::BufferUsages, what: &str) -> Result<wgpu::Buffer> {
        self.check()?;
        let size = bytes.max(SLOT).next_multiple_of(16);
        let memory = |available: u64| Error::Memory {
            needed: size,
            available,
            what: format!("{what} on {}; use a smaller context, smaller chunks or the CPU", self.info.name),
        };
        if usage.contains(wgpu::BufferUsages::STORAGE) && size > self.binding_bytes {
            return Err(memory(self.binding_bytes));
        }
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let buffer =
            self.device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
        match pollster::block_on(scope.pop()) {
            None => Ok(buffer),
            Some(_) => Err(memory(0)),
        }
    }

    /// A storage buffer that can be written and read back.
    pub(super) fn storage(&self, bytes: u64, what: &str) -> Result<wgpu::Buffer> {
        use wgpu::BufferUsages as U;
        self.buffer(bytes, U::STORAGE | U::COPY_DST | U::COPY_SRC, what)
    }

    /// A buffer that results are read back through.
    pub(super) fn staging(&self, bytes: u64) -> Result<wgpu::Buffer> {
        self.buffer(bytes, wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST, "results")
    }

    /// The buffer of dispatches' descriptions, whole slots.
    pub(super) fn descriptions(&self, slots: &[u8]) -> Result<wgpu::Buffer> {
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let uniforms = self.buffer(slots.len() as u64, usage, "descriptions of dispatches")?;
        self.queue.write_buffer(&uniforms, 0, slots);
        Ok(uniforms)
    }

    pub(super) fn encoder(&self) -> wgpu::CommandEncoder {
        self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
    }

    /// A bind group: descriptions of dispatches, and the storage buffers of `shaders/bindings.wgsl` in order.
    pub(super) fn bind(&self, uniforms: &wgpu::Buffer, buffers: [&wgpu::Buffer; 8]) -> wgpu::BindGroup {
        let uniform = wgpu::BufferBinding { buffer: uniforms, offset: 0, size: wgpu::BufferSize::new(SLOT) };
        let entry = |binding, resource| wgpu::BindGroupEntry { binding, resource };
        let storage = buffers.iter().zip(1..).map(|(buffer, binding)| entry(binding, buffer.as_entire_binding()));
        let entries: Vec<_> = [entry(0, wgpu::BindingResource::Buffer(uniform))].into_iter().chain(storage).collect();
        self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &self.layout,
            entries: &entries,
        })
    }

    /// Waits until everything submitted is done.
    pub(super) fn wait(&self) -> Result<()> {
        self.wait_for(None)
    }

    /// Waits until a submission is done, or everything.
    pub(super) fn wait_for(&self, submission: Option<wgpu::SubmissionIndex>) -> Result<()> {
        loop {
            self.check()?;
            let timeout = Some(LOOK);
            match self.device.poll(wgpu::PollType::Wait { submission_index: submission.clone(), timeout }) {
                Ok(_) => return self.check(),
                Err(wgpu::PollError::Timeout) => {}
                Err(e) => return Err(self.error(e.to_string())),
            }
        }
    }

    /// Writes `bytes` at `at`, a multiple of 4, chunk by chunk, so that no more than a few chunks wait at once.
    pub(super) fn upload(&self, buffer: &wgpu::Buffer, at: u64, bytes: &[u8]) -> Result<()> {
        for (i, chunk) in bytes.chunks(CHUNK).enumerate() {
            let offset = at + (i * CHUNK) as u64;
            let whole = chunk.len() / 4 * 4;
            if whole > 0 {
                self.queue.write_buffer(buffer, offset, &chunk[..whole]);
            }
            if whole < chunk.len() {
                let mut last = [0; 4];
                last[..chunk.len() - whole].copy_from_slice(&chunk[whole..]);
                self.queue.write_buffer(buffer, offset + whole as u64, &last);
            }
            if bytes.len() > CHUNK {
                self.queue.submit([]);
                self.wait()?;
            }
        }
        self.check()
    }

    /// Reads the beginning of a buffer, a multiple of 4 bytes, once everything submitted is done.
    pub(super) fn download(&self, buffer: &wgpu::Buffer, out: &mut [u8]) -> Result<()> {
        let staging = self.staging(out.len().min(CHUNK) as u64)?;
        for (i, chunk) in out.chunks_mut(CHUNK).enumerate() {
            let mut encoder = self.encoder();
            encoder.copy_buffer_to_buffer(buffer, (i * CHUNK) as u64, &staging, 0, chunk.len() as u64);
            self.queue.submit([encoder.finish()]);
            self.read(&staging, chunk.len() as u64, chunk)?;
        }
        Ok(())
    }

    /// The first `bytes` of a buffer that can be mapped, once everything submitted is done.
    pub(super) fn read(&self, staging: &wgpu::Buffer, bytes: u64, out: &mut [u8]) -> Result<()> {
        let (tell, told) = mpsc::channel();
        staging.map_async(wgpu::MapMode::Read, 0..bytes, move |result| {
            // Nobody listens any more where the device was lost meanwhile.
            let _ = tell.send(result.is_ok());
        });
        self.wait()?;
        // It may be another thread's wait that heard of it, and that has yet to tell.
        let is_mapped = loop {
            match told.recv_timeout(LOOK) {
                Ok(is_mapped) => break is_mapped,
                Err(mpsc::RecvTimeoutError::Timeout) => self.wait()?,
                Err(mpsc::RecvTimeoutError::Disconnected) => break false,
            }
        };
        if !is_mapped {
            return Err(self.error("results cannot be read back; open the session again"));
        }
        let view = staging.get_mapped_range(0..bytes).map_err(|e| self.error(format!("{e:?}")))?;
        out.copy_from_slice(&view);
        drop(view);
        staging.unmap();
        Ok(())
    }
}

/// What an adapter offers, and the features to ask it for.
fn abilities(adapter: &wgpu::Adapter, limits: &Limits) -> (Abilities, wgpu::Features) {
    use wgpu::Features as F;
    let (has, info) = (adapter.features(), adapter.get_info());
    let workgroup_bytes = adapter.limits().max_compute_workgroup_storage_size;
    let timestamps = has.contains(F::TIMESTAMP_QUERY);
    let mut features = has & F::TIMESTAMP_QUERY;
    if limits.baseline {
        let baseline = Abilities { timestamps, checked: true, workgroup_bytes: 16 << 10, ..Abilities::default() };
        return (baseline, features);
    }
    features |= has & F::PIPELINE_CACHE;
    let subgroups_of_32 = has.contains(F::SUBGROUP) && (info.subgroup_min_size, info.subgroup_max_size) == (32, 32);
    let wanted = |p: &wgpu::CooperativeMatrixProperties| {
        (p.m_size, p.n_size, p.k_size) == (16, 16, 16)
            && p.ab_type == wgpu::CooperativeScalarType::F16
            && p.cr_type == wgpu::CooperativeScalarType::F32
    };
    let matrices = F::SHADER_F16 | F::EXPERIMENTAL_COOPERATIVE_MATRIX;
    let cooperative = subgroups_of_32
        && has.contains(matrices)
        && workgroup_bytes >= 32 << 10
        && adapter.cooperative_matrix_properties().iter().any(wanted);
    if subgroups_of_32 {
        features |= F::SUBGROUP;
    }
    if cooperative {
        features |= matrices;
    }
    (Abilities { timestamps, subgroups_of_32, cooperative, workgroup_bytes, checked: false }, features)
}

fn experiments(wanted: bool) -> wgpu::ExperimentalFeatures {
    match wanted {
        // SAFETY: what wgpu calls an experiment is its own code, which may have mistakes; we use cooperative matrices alone, in
        // kernels of our own.
        true => unsafe { wgpu::ExperimentalFeatures::enabled() },
        false => wgpu::ExperimentalFeatures::disabled(),
    }
}

/// The bindings of `shaders/bindings.wgsl`.
fn bindings(device: &wgpu::Device) -> wgpu::BindGroupLayout {
    let entry = |binding, ty, dynamic| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: dynamic, min_binding_size: None },
        count: None,
    };
    let storage = |binding, read_only| entry(binding, wgpu::BufferBindingType::Storage { read_only }, false);
    device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: None,
        entries: &[
            entry(0, wgpu::BufferBindingType::Uniform, true),
            storage(1, true),
            storage(2, true),
            storage(3, true),
            storage(4, false),
            storage(5, false),
            storage(6, true),
            storage(7, false),
            storage(8, false),
        ],
    })
}
