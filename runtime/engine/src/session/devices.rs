//! What can compute on this machine, as a list to show.

use serde::Serialize;

use crate::cpu::isa::Isa;

/// A device that models may run on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeviceSummary {
    /// What a user writes to choose it: `cpu`, `gpu:0`.
    pub backend: String,
    /// Its name; for the CPU how many threads it runs at once.
    pub name: String,
    /// `processor`, `graphics card`, `in the processor`, `virtual`, `software` or `unknown`.
    pub kind: &'static str,
    /// What it is reached through: Vulkan, Metal, DX12; for the CPU the instruction set that is used.
    pub api: String,
    /// The driver; empty where there is none.
    pub driver: String,
    /// The longest buffer that a kernel can bind, in bytes.
    pub binding_bytes: Option<u64>,
    /// Why it cannot run models.
    pub unfit: Option<String>,
}

/// The CPU and, in a build with the GPU, every GPU.
pub fn devices() -> Vec<DeviceSummary> {
    let mut all = vec![DeviceSummary {
        backend: "cpu".into(),
        name: format!("{} threads", crate::system::cores()),
        kind: "processor",
        api: Isa::detect().name().into(),
        driver: String::new(),
        binding_bytes: None,
        unfit: None,
    }];
    all.extend(gpus());
    all
}

#[cfg(feature = "gpu")]
fn gpus() -> Vec<DeviceSummary> {
    use crate::gpu::{DeviceInfo, DeviceKind};
    let kind = |kind| match kind {
        DeviceKind::Discrete => "graphics card",
        DeviceKind::Integrated => "in the processor",
        DeviceKind::Virtual => "virtual",
        DeviceKind::Software => "software",
        DeviceKind::Other => "unknown",
    };
    let summary = |d: DeviceInfo| DeviceSummary {
        backend: format!("gpu:{}", d.index),
        kind: kind(d.kind),
        name: d.name,
        api: d.api,
        driver: d.driver,
        binding_bytes: Some(d.binding_bytes),
        unfit: d.unfit,
    };
    crate::gpu::devices().into_iter().map(summary).collect()
}

#[cfg(not(feature = "gpu"))]
fn gpus() -> Vec<DeviceSummary> {
    Vec::new()
}
