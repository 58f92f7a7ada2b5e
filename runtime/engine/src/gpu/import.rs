//! Buffers that are pages of the mapped file, so that weights lie in memory once: Vulkan's `VK_EXT_external_memory_host`.
//!
//! A device is opened with the extension where that was asked for and the driver has it; whatever it does not promise or refuses
//! later is told as a reason, and the weights are copied as they are without. wgpu calls back when the last submission that uses
//! such a buffer is done; there its memory is freed, and then the map is let go. Kernels only read what is bound as weights, so
//! a map that is read-only stays as it is. Who may be asked are Linux and Android: the others are untried.

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(super) use absent::Import;
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(super) use vulkan::Import;

/// The smallest page of any system: a map consists of whole ones, whatever part of them is the file.
const PAGE: usize = 4096;

/// Addresses of the whole pages of `alignment` bytes, a power of two, that lie in a map of `file`.
fn pages(file: &[u8], alignment: usize) -> std::ops::Range<usize> {
    let (start, end) = (file.as_ptr() as usize, file.as_ptr() as usize + file.len());
    let (before, behind) = (start / alignment * alignment, end.next_multiple_of(alignment));
    match alignment <= PAGE {
        true => before..behind,
        // Of larger ones the first and the last may be mapped in part.
        false => start.next_multiple_of(alignment)..end / alignment * alignment,
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
mod vulkan {
    use std::ops::Range;
    use std::sync::Arc;

    use ash::{ext, vk};
    use wgpu::hal;

    use super::pages;
    use crate::tape::Weights;

    type Vulkan = hal::api::Vulkan;

    const HOST: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT;
    /// What such a buffer is used for, to Vulkan and to wgpu.
    const USAGE: vk::BufferUsageFlags = vk::BufferUsageFlags::from_raw(
        vk::BufferUsageFlags::STORAGE_BUFFER.as_raw() | vk::BufferUsageFlags::TRANSFER_SRC.as_raw(),
    );

    /// What an open device needs to import pages.
    #[derive(Debug)]
    pub(in crate::gpu) struct Import {
        host_pointer_properties: vk::PFN_vkGetMemoryHostPointerPropertiesEXT,
        alignment: usize,
        /// Types of memory that need no word when the host has written, as bits.
        pub(in crate::gpu) coherent: u32,
    }

    impl Import {
        /// Opens a device that can import pages, as `descriptor` says.
        ///
        /// # Errors
        /// Why it cannot be; without importing it may open.
        pub fn open(
            adapter: &wgpu::Adapter,
            descriptor: &wgpu::DeviceDescriptor<'_>,
        ) -> Result<(wgpu::Device, wgpu::Queue, Import), String> {
            // SAFETY: the adapter is used to ask and to open, and outlives that.
            let Some(hal) = (unsafe { adapter.as_hal::<Vulkan>() }) else {
                return Err("it is not driven by Vulkan".into());
            };
            let (instance, physical) = (hal.shared_instance().raw_instance(), hal.raw_physical_device());
            let capabilities = hal.physical_device_capabilities();
            let version = hal.shared_instance().instance_api_version().min(capabilities.properties().api_version);
            if version < vk::API_VERSION_1_1 || !capabilities.supports_extension(ext::external_memory_host::NAME) {
                return Err("the driver has no VK_EXT_external_memory_host".into());
            }
            let mut host = vk::PhysicalDeviceExternalMemoryHostPropertiesEXT::default();
            let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut host);
            let asked = vk::PhysicalDeviceExternalBufferInfo::default().usage(USAGE).handle_type(HOST);
            let mut told = vk::ExternalBufferProperties::default();
            // SAFETY: instance and device are of Vulkan 1.1, which has both functions, and the extension, which knows the
            // structure and the type of handle; the structures outlive the calls.
            let memory = unsafe {
                instance.get_physical_device_properties2(physical, &mut properties);
                instance.get_physical_device_external_buffer_properties(physical, &asked, &mut told);
                instance.get_physical_device_memory_properties(physical)
            };
            let features = told.external_memory_properties.external_memory_features;
            let dedicated = features.contains(vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY);
            if !features.contains(vk::ExternalMemoryFeatureFlags::IMPORTABLE) || dedicated {
                return Err("the driver does not import memory for such buffers".into());
            }
            let alignment = usize::try_from(host.min_imported_host_pointer_alignment).unwrap_or(0);
            if !alignment.is_power_of_two() {
                return Err(format!("the driver wants pages of {alignment} bytes"));
            }
            let is_coherent = |t: &vk::MemoryType| t.property_flags.contains(vk::MemoryPropertyFlags::HOST_COHERENT);
            let coherent =
                memory.memory_types_as_slice().iter().rev().fold(0, |bits, t| bits << 1 | u32::from(is_coherent(t)));
            let instance = instance.clone();
            // SAFETY: an extension is added that the driver has, nothing is taken away, and wgpu gets the device with the
            // features and limits that it was opened with.
            let (device, queue) = unsafe {
                let open = hal.open_with_callback(
                    descriptor.required_features,
                    &descriptor.required_limits,
                    &descriptor.memory_hints,
                    Some(Box::new(|args| args.extensions.push(ext::external_memory_host::NAME))),
                );
                drop(hal);
                let open = open.map_err(|e| format!("the driver refuses to open it so: {e}"))?;
                adapter.create_device_from_hal::<Vulkan>(open, descriptor).map_err(|e| e.to_string())?
            };
            // SAFETY: the device lives, and so does its instance; the extension is enabled, so its functions are there.
            let host_pointer_properties = unsafe {
                let Some(hal) = device.as_hal::<Vulkan>() else { return Err("it is not driven by Vulkan".into()) };
                let functions = ext::external_memory_host::Device::new(&instance, hal.raw_device());
                functions.fp().get_memory_host_pointer_properties_ext
            };
            Ok((device, queue, Import { host_pointer_properties, alignment, coherent }))
        }

        /// Bytes of what is imported: whole multiples, at multiples of it.
        pub fn alignment(&self) -> usize {
            self.alignment
        }

        /// Addresses of what can be imported of a mapped file, as [`Weights::files`] gives it.
        pub fn pages(&self, file: &[u8]) -> Range<usize> {
            pages(file, self.alignment)
        }

        /// A buffer of these pages, a part of what [`Import::pages`] gives for a file of the weights, which it keeps.
        ///
        /// # Errors
        /// Why it cannot be.
        pub fn buffer(
            &self,
            device: &wgpu::Device,
            weights: &Arc<Weights>,
            range: &Range<usize>,
        ) -> Result<wgpu::Buffer, String> {
            let is_in = |whole: Range<usize>| whole.start <= range.start && range.end <= whole.end;
            let is_whole = range.start.is_multiple_of(self.alignment) && range.end.is_multiple_of(self.alignment);
            if range.is_empty() || !is_whole || !weights.files().any(|file| is_in(self.pages(file))) {
                return Err("they are no pages of the file".into());
            }
            // SAFETY: the device lives, and wgpu's buffer, whose callback uses a copy of its functions, goes before it.
            let Some(hal) = (unsafe { device.as_hal::<Vulkan>() }) else {
                return Err("the device is not driven by Vulkan".into());
            };
            let raw = hal.raw_device().clone();
            drop(hal);
            let size = range.len() as u64;
            // SAFETY: the pages are mapped as long as the weights live, who are kept below; nothing writes to them, for a
            // buffer with this usage is bound where kernels read, and copied from.
            let (buffer, memory) = unsafe { self.bind(&raw, range.start as *mut std::ffi::c_void, size) }?;
            let keep = weights.clone();
            let free = move || {
                // SAFETY: both were made just above, and wgpu calls when nothing uses them any more, or never will.
                unsafe {
                    raw.destroy_buffer(buffer, None);
                    raw.free_memory(memory, None);
                }
                drop(keep);
            };
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
            // SAFETY: the buffer is of this device, has the size and the usages that wgpu is told, and its content is there.
            Ok(unsafe {
                let external = hal::vulkan::Buffer::from_raw_externally_owned(buffer, Box::new(free));
                let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
                device.create_buffer_from_hal::<Vulkan>(external, &descriptor)
            })
        }

        /// A buffer, and the memory at `pointer` that it is bound to.
        ///
        /// # Safety
        /// `size` bytes are mapped there, multiples of the alignment both, for as long as the memory lives.
        unsafe fn bind(
            &self,
            raw: &ash::Device,
            pointer: *mut std::ffi::c_void,
            size: u64,
        ) -> Result<(vk::Buffer, vk::DeviceMemory), String> {
            let refused = |e: vk::Result| format!("the driver refuses: {e}");
            let mut types = vk::MemoryHostPointerPropertiesEXT::default();
            // SAFETY: the pointer is to mapped pages; the structure outlives the call.
            unsafe { (self.host_pointer_properties)(raw.handle(), HOST, pointer, &mut types) }
                .result()
                .map_err(refused)?;
            let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(HOST);
            let wanted = vk::BufferCreateInfo::default().size(size).usage(USAGE).push_next(&mut external);
            // SAFETY: the device imports memory for such buffers, as it was asked.
            let (buffer, needs) = unsafe {
                let buffer = raw.create_buffer(&wanted, None).map_err(refused)?;
                (buffer, raw.get_buffer_memory_requirements(buffer))
            };
            let memory = || {
                let fit = needs.memory_type_bits & types.memory_type_bits & self.coherent;
                if fit == 0 || needs.size > size || !(pointer as u64).is_multiple_of(needs.alignment.max(1)) {
                    return Err("the driver has no memory of the kind for such a buffer".to_string());
                }
                let mut import = vk::ImportMemoryHostPointerInfoEXT::default().handle_type(HOST).host_pointer(pointer);
                let wanted = vk::MemoryAllocateInfo::default()
                    .allocation_size(size)
                    .memory_type_index(fit.trailing_zeros())
                    .push_next(&mut import);
                // SAFETY: pointer, size and type are as the extension wants them; the buffer is new and needs no more. What
                // cannot be bound is freed.
                unsafe {
                    let memory = raw.allocate_memory(&wanted, None).map_err(refused)?;
                    match raw.bind_buffer_memory(buffer, memory, 0) {
                        Ok(()) => Ok(memory),
                        Err(e) => {
                            raw.free_memory(memory, None);
                            Err(refused(e))
                        }
                    }
                }
            };
            // SAFETY: nobody has the buffer that is destroyed.
            memory().map(|memory| (buffer, memory)).inspect_err(|_| unsafe { raw.destroy_buffer(buffer, None) })
        }
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
mod absent {
    use std::ops::Range;
    use std::sync::Arc;

    use crate::tape::Weights;

    /// There is none.
    #[derive(Debug)]
    pub(in crate::gpu) enum Import {}

    impl Import {
        pub fn open(
            _: &wgpu::Adapter,
            _: &wgpu::DeviceDescriptor<'_>,
        ) -> Result<(wgpu::Device, wgpu::Queue, Import), String> {
            Err("that is for Linux and Android".into())
        }

        pub fn alignment(&self) -> usize {
            match *self {}
        }

        pub fn pages(&self, file: &[u8]) -> Range<usize> {
            super::pages(file, self.alignment())
        }

        pub fn buffer(&self, _: &wgpu::Device, _: &Arc<Weights>, _: &Range<usize>) -> Result<wgpu::Buffer, String> {
            match *self {}
        }
    }
}
