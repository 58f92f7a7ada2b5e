//! Kernels as the driver has compiled them: pipelines. What a recording needs is built at once, by several threads, when an
//! executor is opened, so that no token waits for a compiler.
//!
//! Where the host gives a folder (`tune`), what the driver has compiled is kept in a file of it, one for each device and driver:
//! eight letters, a SHA-256 over the crate's version, the device's and the driver's names and the driver's bytes, and those
//! bytes. Drivers are told to trust them, so a file is used only if the hash is right, which no torn, damaged or foreign file
//! has; who forges one can write into the user's cache, and so is trusted as the program is. A driver finds kernels in it by
//! their text, so that it need not be thrown away when one changes.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

use sha2::{Digest, Sha256};

use super::device::{Device, DeviceInfo, lock};
use super::kernel::Kernel;
use super::tune;
use crate::{Error, Result, file};

/// Begins a file.
const MAGIC: [u8; 8] = *b"KINGLETP";
/// Most bytes of a driver that are kept: what is larger has gathered what nobody asks for any more.
const LARGEST: u64 = 64 << 20;
/// Bytes before them.
const HEADER: usize = MAGIC.len() + 32;
/// Most threads that compile at once: a session has a dozen kernels, and each compiler takes its memory.
const THREADS: usize = 8;

/// What was built for a device. See the module's text.
#[derive(Debug)]
pub(super) struct Pipelines {
    layout: wgpu::PipelineLayout,
    built: Mutex<HashMap<Kernel, wgpu::ComputePipeline>>,
    /// None where nothing is kept; not set before it is known whether.
    kept: OnceLock<Option<Kept>>,
}

/// The driver's cache, and its file.
#[derive(Debug)]
struct Kept {
    cache: wgpu::PipelineCache,
    path: PathBuf,
    stored: Mutex<Stored>,
}

/// What is in the file. Caches only grow, so lengths tell.
#[derive(Debug)]
struct Stored {
    /// The driver's.
    bytes: usize,
    /// How many pipelines were built when they were compared.
    pipelines: usize,
}

impl Pipelines {
    /// Nothing yet, for kernels that bind as `layout` says.
    pub fn new(layout: wgpu::PipelineLayout) -> Pipelines {
        Pipelines { layout, built: Mutex::default(), kept: OnceLock::new() }
    }
}

impl Device {
    /// The pipeline of a kernel, built at its first use.
    pub(super) fn pipeline(&self, kernel: &Kernel) -> Result<wgpu::ComputePipeline> {
        if let Some(pipeline) = lock(&self.pipelines.built).get(kernel) {
            return Ok(pipeline.clone());
        }
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let module = module(&self.device, &kernel.source(), self.abilities.checked);
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: Some(&self.pipelines.layout),
            module: &module,
            entry_point: Some("main"),
            // Every kernel writes its workgroup memory before it reads it.
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: self.kept().map(|kept| &kept.cache),
        });
        if let Some(e) = pollster::block_on(scope.pop()) {
            return Err(self.error(format!("the kernel {kernel:?} is refused: {e}; use the CPU")));
        }
        lock(&self.pipelines.built).insert(kernel.clone(), pipeline.clone());
        Ok(pipeline)
    }

    /// The pipelines of some kernels, in order. Those that were not built are built by as many threads as there are cores, all
    /// of which have ended then.
    ///
    /// # Errors
    /// [`Error::Device`] for a kernel that the driver refuses.
    pub(super) fn pipelines(&self, kernels: &[Kernel]) -> Result<Vec<wgpu::ComputePipeline>> {
        let missing: Vec<&Kernel> = {
            let built = lock(&self.pipelines.built);
            kernels.iter().filter(|kernel| !built.contains_key(kernel)).collect()
        };
        if !missing.is_empty() {
            let begun = Instant::now();
            let next = AtomicUsize::new(0);
            // What goes wrong is told by the loop below, which tries again.
            let build =
                || while missing.get(next.fetch_add(1, Ordering::Relaxed)).is_some_and(|k| self.pipeline(k).is_ok()) {};
            let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
            let threads = missing.len().min(cores).min(THREADS);
            std::thread::scope(|scope| {
                for _ in 1..threads {
                    // A thread that cannot be had leaves its work to the others.
                    if let Err(e) = std::thread::Builder::new().spawn_scoped(scope, build) {
                        log::debug!("kernels are compiled by fewer threads: {e}");
                        break;
                    }
                }
                build();
            });
            log::debug!("built {} kernels by {threads} threads in {:?}", missing.len(), begun.elapsed());
        }
        kernels.iter().map(|kernel| self.pipeline(kernel)).collect()
    }

    /// Writes what the driver has compiled to the device's file, if something is new and it is to be kept. What cannot be written
    /// is a warning.
    pub(super) fn keep_pipelines(&self) {
        let Some(kept) = self.kept() else { return };
        let mut stored = lock(&kept.stored);
        let built = lock(&self.pipelines.built).len();
        if stored.pipelines == built {
            return;
        }
        stored.pipelines = built;
        let is_new = |data: &Vec<u8>| data.len() != stored.bytes && data.len() as u64 <= LARGEST;
        let Some(data) = kept.cache.get_data().filter(is_new) else { return };
        match write(&kept.path, self.info(), &data) {
            Ok(()) => stored.bytes = data.len(),
            Err(e) => log::warn!("{}'s compiled kernels are not kept: {e}", self.info().name),
        }
    }

    /// The driver's cache; none where nothing is kept.
    fn kept(&self) -> Option<&Kept> {
        let folder = self.tuning.get().filter(|_| self.tunes())?.folder.as_deref()?;
        self.pipelines.kept.get_or_init(|| self.open_cache(folder)).as_ref()
    }

    fn open_cache(&self, folder: &Path) -> Option<Kept> {
        if !self.device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return None;
        }
        let path = tune::path(self, folder).with_extension("pipelines");
        let data = read(&path, self.info()).unwrap_or_else(|e| {
            log::warn!("{e}; kernels are compiled again");
            None
        });
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        // SAFETY: the bytes are what `PipelineCache::get_data` gave for this device and driver: `read` gives nothing whose hash
        // is not that of what `write` wrote. wgpu compares its own header besides.
        let cache = unsafe {
            self.device.create_pipeline_cache(&wgpu::PipelineCacheDescriptor {
                label: None,
                data: data.as_deref(),
                fallback: true,
            })
        };
        if let Some(e) = pollster::block_on(scope.pop()) {
            log::warn!("{} takes no compiled kernels: {e}", self.info().name);
            return None;
        }
        let stored = Stored { bytes: data.map_or(0, |data| data.len()), pipelines: 0 };
        Some(Kept { cache, path, stored: Mutex::new(stored) })
    }
}

/// What stands before a driver's bytes.
fn header(info: &DeviceInfo, data: &[u8]) -> [u8; HEADER] {
    let mut hash = Sha256::new();
    hash.update(format!("{}\n{}\n{}\n{}\n", env!("CARGO_PKG_VERSION"), info.name, info.driver, info.api));
    hash.update(data);
    let mut header = [0; HEADER];
    let (magic, rest) = header.split_at_mut(MAGIC.len());
    magic.copy_from_slice(&MAGIC);
    rest.copy_from_slice(&hash.finalize());
    header
}

/// A driver's bytes from a file; none if there is no file, or it is another version's, device's or driver's, or damaged.
fn read(path: &Path, info: &DeviceInfo) -> Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    match std::fs::File::open(path).and_then(|file| file.take(HEADER as u64 + LARGEST).read_to_end(&mut bytes)) {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path)(e)),
    }
    Ok(bytes.split_first_chunk().and_then(|(first, data)| (*first == header(info, data)).then(|| data.to_vec())))
}

fn write(path: &Path, info: &DeviceInfo, data: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    let mut file = file::NewFile::create(path)?;
    file.write(&header(info, data))?;
    file.write(data)?;
    file.finish()
}

/// A module of one of our kernels. Checks of indices and counters of loops keep compilers from unrolling: without them an
/// H100 reads prompts five times as fast.
fn module(device: &wgpu::Device, source: &str, checked: bool) -> wgpu::ShaderModule {
    let descriptor = wgpu::ShaderModuleDescriptor { label: None, source: wgpu::ShaderSource::Wgsl(source.into()) };
    if checked {
        return device.create_shader_module(descriptor);
    }
    // SAFETY: the kernels are ours. Their loops end, they divide by sizes that are not zero, and they stay within the buffers:
    // the shapes they are given are those of tensors that were checked, tokens and positions are checked before each run,
    // and tests run the same kernels with all checks on.
    unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::tune::tests::Folder;
    use crate::gpu::{Limits, Tuning};
    use crate::quant::DType;

    const KERNELS: [Kernel; 4] =
        [Kernel::RmsNorm, Kernel::Gather, Kernel::Embed(DType::Q8_0), Kernel::Matmul(DType::Q4_K)];

    /// A device that keeps its kernels in `folder`, with some of them; and how many bytes it found there.
    fn opened(folder: &Path) -> (std::sync::Arc<Device>, usize) {
        let device = Device::open(0, Limits::default()).expect("a GPU, or lavapipe in its place");
        device.tune(Tuning { folder: Some(folder.into()), software: true, again: false, int8: true });
        let found = device.kept().map_or(0, |kept| lock(&kept.stored).bytes);
        let built = device.pipelines(&KERNELS).expect("pipelines");
        assert!(built.iter().eq(device.pipelines(&KERNELS).expect("the same").iter()));
        device.keep_pipelines();
        (device, found)
    }

    #[test]
    fn what_was_compiled_is_kept_and_read_again() {
        let folder = Folder::new("pipelines");
        let (device, found) = opened(&folder.0);
        assert_eq!(found, 0);
        let path = tune::path(&device, &folder.0).with_extension("pipelines");
        let whole = std::fs::read(&path).expect("a file");
        let data = &whole[HEADER..];
        assert_eq!(opened(&folder.0).1, data.len());
        assert!(std::fs::read(&path).expect("the file").len() >= whole.len());

        // Damaged, cut off, too long, another driver's, empty.
        let mut flipped = whole.clone();
        flipped[HEADER + data.len() / 2] ^= 1;
        let longer = [whole.as_slice(), &[0]].concat();
        let other = DeviceInfo { driver: "another".into(), ..device.info().clone() };
        let foreign = [&header(&other, data)[..], data].concat();
        for damaged in [&flipped, &whole[..whole.len() - 1], &longer, &foreign, &whole[..HEADER / 2], &[][..]] {
            std::fs::write(&path, damaged).expect("a file");
            assert_eq!(opened(&folder.0).1, 0);
            assert!(opened(&folder.0).1 > 0, "whole again");
        }
        // What is no driver's, though the hash is right: wgpu and the driver look too.
        for forged in [&data[..data.len() / 2], &[0xff; 200], &[]] {
            write(&path, device.info(), forged).expect("a file");
            assert_eq!(opened(&folder.0).1, forged.len());
        }
    }

    /// Without a folder, of software that nobody asked for, and where nothing can be written, kernels are compiled all the same.
    #[test]
    fn nothing_is_kept_unasked() {
        let folder = Folder::new("no-pipelines");
        std::fs::create_dir_all(&folder.0).expect("a folder");
        let file = folder.0.join("file");
        std::fs::write(&file, b"").expect("a file");
        opened(&file);
        let device = Device::open(0, Limits::default()).expect("a GPU, or lavapipe in its place");
        device.tune(Tuning::default());
        device.pipelines(&KERNELS).expect("pipelines");
        assert!(device.kept().is_none());
        assert_eq!(std::fs::read_dir(&folder.0).expect("the folder").count(), 1);
    }
}
