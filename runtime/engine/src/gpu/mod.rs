//! The GPU backend: the same tape as on the CPU, recorded once as a list of dispatches and replayed for every run.
//!
//! | file | what is in it |
//! | --- | --- |
//! | `device` | adapters, an open device with its buffers, errors and loss |
//! | `kernel` | which kernels there are, and their WGSL, put together from `shaders/` |
//! | `pipelines` | kernels as the driver has compiled them, and the file that keeps them |
//! | `weights` | quantized blocks on the device, split at its binding limit |
//! | `import` | pages of the mapped file as buffers, without a copy |
//! | `kv` | pages of keys and values, shared by all sequences |
//! | `shift` | dropping a part of a sequence |
//! | `record` | a dispatch, its description and its bind group |
//! | `forward`, `backward` | from ops to dispatches |
//! | `division` | what would hold the device for too long, in parts |
//! | `learned` | the same for what is learned beside adapters of the layers' maps |
//! | `largest` | the largest logits, so that not all are read back |
//! | `adapters` | low-rank corrections of maps at run time |
//! | `training` | a training's parameters, gradients and moments, and the optimizer's step |
//! | `choice` | ways to multiply rows with a matrix, and which is taken |
//! | `trial` | whether such a way gives right results, and how quickly |
//! | `tune` | the quickest ways, found on the device and kept in a file |
//! | `clock` | times of passes |
//! | `program` | a tape with its plan and scratch |
//! | `executor` | uploads what a run needs, submits, reads back |
//!
//! All values of a run lie in one buffer, the arena, at the places the planner chose; kernels get offsets. A dispatch's
//! description is a slot of one uniform buffer, chosen by a dynamic offset, and every kernel has the same bindings, so a bind
//! group depends on nothing but the buffer its weights lie in and the layer whose cache it touches. The kernels stay within
//! WebGPU's baseline limits: 8 storage buffers, 16 KiB of workgroup memory, 256 invocations, f32 sums; where a device has more
//! (subgroups of 32, cooperative matrices), some have faster forms. There are no atomics:
//! a run gives the same bits every time.

mod adapters;
mod backward;
mod choice;
mod clock;
mod device;
mod division;
mod executor;
mod forward;
mod import;
mod kernel;
mod kv;
mod largest;
mod learned;
mod pipelines;
mod program;
mod record;
mod shift;
mod training;
mod trial;
mod tune;
mod weights;

pub use adapters::Correction;
pub use choice::TunedKernel;
pub use device::{Device, DeviceInfo, DeviceKind, Limits, devices};
pub use executor::{Executor, ExecutorOptions, Footprint, Traffic};
pub use kv::KvCache;
pub use tune::Tuning;
pub use weights::WeightBytes;
