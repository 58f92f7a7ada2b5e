//! Trials of kernels that are not trusted unseen. Cooperative matrices are young in compilers and drivers; before a device
//! multiplies with them for the first time, small products are compared with those of the plain kernel.

use std::sync::Arc;

use bytemuck::Zeroable;

use super::device::{Device, SLOT, lock};
use super::forward::{PACKED_ROWS, TILE};
use super::kernel::{Kernel, Tile};
use super::record::{MatmulOp, NONE};
use crate::quant::{self, DType};
use crate::{Error, Result, random};

/// Rows of X, and the matrix: no multiples of tiles, and a last step that is not whole.
const ROWS: u32 = 80;
const MATRIX: (u32, u32) = (176, 768);
/// Largest difference from the plain kernel's results, in their root mean square: operands of half precision have eleven
/// bits.
const TOLERANCE: f32 = 1e-2;

/// A kernel on trial, with the results of a workgroup.
struct Candidate {
    kernel: Kernel,
    rows: u32,
    columns: u32,
}

fn plain(dtype: DType, turned: bool) -> Candidate {
    let kernel = if turned { Kernel::MatmulTurned(dtype) } else { Kernel::Matmul(dtype) };
    Candidate { kernel, rows: TILE, columns: TILE }
}

/// Whether the candidates make of matrices of a type what the plain kernel makes of them.
fn agree(device: &Arc<Device>, dtype: DType, turned: bool, candidates: [Candidate; 2]) -> Result<bool> {
    let (n, k) = MATRIX;
    let (inner, columns) = if turned { (n, k) } else { (k, n) };
    let padded = inner.next_multiple_of(32);
    let normal = |seed: u64, i: usize| {
        // Near enough: the sum of a few uniform numbers.
        (0..4).map(|j| random::uniform(seed, (4 * i + j) as u64) - 0.5).sum::<f64>() as f32
    };
    let matrix: Vec<f32> = (0..(n * k) as usize).map(|i| 0.1 * normal(1, i)).collect();
    let mut blocks = quant::quantize(dtype, &matrix)?;
    let row_bytes = (blocks.len() / n as usize) as u32;
    blocks.resize(blocks.len().next_multiple_of(4) + 16, 0);
    // Rows of very different size, as gradients are.
    let x: Vec<f32> =
        (0..(ROWS * inner) as usize).map(|i| normal(2, i) * 10f32.powi((i / inner as usize % 9) as i32 - 6)).collect();

    let scales = ROWS * inner;
    let results = [0, 1, 2].map(|i| (scales + ROWS).next_multiple_of(4) + i * ROWS * columns);
    let end = results[2] + ROWS * columns;
    let arena = device.storage(4 * u64::from(end), "a trial")?;
    let weights = device.storage(blocks.len() as u64, "a trial")?;
    let packed = device.storage(u64::from(2 * padded) * PACKED_ROWS as u64, "a trial")?;
    let run = device.storage(SLOT, "a trial")?;
    // Nothing may be bound twice that kernels could write.
    let (cache, gradients) = (device.storage(SLOT, "a trial")?, device.storage(SLOT, "a trial")?);
    device.queue.write_buffer(&arena, 0, bytemuck::cast_slice(&x));
    device.queue.write_buffer(&weights, 0, &blocks);
    device.queue.write_buffer(&run, 0, bytemuck::cast_slice(&[ROWS, ROWS, 1]));

    let [first, second] = candidates;
    let candidates = [plain(dtype, turned), first, second];
    let is_packed = |c: &Candidate| matches!(c.kernel, Kernel::Cooperative { .. });
    let mut slots = Vec::new();
    let mut dispatches = Vec::new();
    if candidates.iter().any(is_packed) {
        slots.extend_from_slice(bytemuck::bytes_of(&[0, inner, inner, padded, scales, 0, 0, 0]));
        dispatches.push((device.pipeline(&Kernel::Pack)?, [1, 1, ROWS]));
    }
    for (c, out) in candidates.iter().zip(results) {
        let op = MatmulOp {
            x_stride: if is_packed(c) { padded / 4 } else { inner },
            k: inner,
            row_bytes,
            columns,
            out,
            out_stride: columns,
            bias: NONE,
            residual: NONE,
            scale: 1.0,
            scales,
            ..MatmulOp::zeroed()
        };
        slots.resize(slots.len().next_multiple_of(SLOT as usize), 0);
        slots.extend_from_slice(bytemuck::bytes_of(&op));
        let grid = [columns.div_ceil(c.columns), 1, ROWS.div_ceil(c.rows)];
        dispatches.push((device.pipeline(&c.kernel)?, grid));
    }
    slots.resize(slots.len().next_multiple_of(SLOT as usize), 0);
    let uniforms = device.descriptions(&slots)?;
    let group = device.bind(&uniforms, [&run, &run, &weights, &arena, &cache, &run, &gradients, &packed]);

    let bytes = u64::from(4 * 3 * ROWS * columns);
    let staging = device.staging(bytes)?;
    let mut encoder = device.encoder();
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        for (i, (pipeline, [x, y, z])) in dispatches.iter().enumerate() {
            pass.set_pipeline(pipeline);
            pass.set_bind_group(0, &group, &[i as u32 * SLOT as u32]);
            pass.dispatch_workgroups(*x, *y, *z);
        }
    }
    encoder.copy_buffer_to_buffer(&arena, u64::from(4 * results[0]), &staging, 0, bytes);
    device.queue.submit([encoder.finish()]);
    let mut values = vec![0f32; bytes as usize / 4];
    device.read(&staging, bytes, bytemuck::cast_slice_mut(&mut values))?;
    let (wanted, ours) = values.split_at((ROWS * columns) as usize);
    let worst = ours.chunks_exact(wanted.len()).flat_map(|ours| {
        ours.chunks_exact(columns as usize).zip(wanted.chunks_exact(columns as usize)).map(|(ours, wanted)| {
            let size = (wanted.iter().map(|v| v * v).sum::<f32>() / wanted.len() as f32).sqrt();
            let far = ours.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, largest);
            far / size
        })
    });
    Ok(worst.fold(0.0, largest) < TOLERANCE)
}

/// The larger of two numbers, infinity if one is no number.
fn largest(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::INFINITY } else { a.max(b) }
}

impl Device {
    /// Whether products with matrices of this type are made with cooperative matrices: the device has them, and a trial went
    /// well. The answer is kept.
    pub(super) fn cooperative(self: &Arc<Self>, dtype: DType, turned: bool) -> bool {
        if !self.abilities.cooperative {
            return false;
        }
        let known = lock(&self.trials).get(&(dtype, turned)).copied();
        known.unwrap_or_else(|| {
            let candidate = |tile: Tile| Candidate {
                kernel: Kernel::Cooperative { dtype, turned, tile },
                rows: tile.rows,
                columns: tile.columns,
            };
            let verdict = agree(self, dtype, turned, [candidate(Tile::SMALL), candidate(Tile::LARGE)]);
            if !matches!(verdict, Ok(true)) {
                let why = verdict.as_ref().err().map_or("results are wrong".into(), Error::to_string);
                log::warn!("{} multiplies {dtype} without cooperative matrices: {why}", self.info().name);
            }
            let good = verdict.unwrap_or(false);
            lock(&self.trials).insert((dtype, turned), good);
            good
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Limits, device::Abilities};

    /// The judge is right: the plain kernel agrees with itself, and not with what makes something else.
    #[test]
    fn trials_tell_right_from_wrong() {
        let device = Device::open(0, Limits::default()).expect("a GPU, or lavapipe in its place");
        for dtype in [DType::F16, DType::Q8_0, DType::Q4_K] {
            for turned in [false, true] {
                let right = agree(&device, dtype, turned, [plain(dtype, turned), plain(dtype, turned)]);
                assert!(right.expect("a trial"), "{dtype} {turned}");
            }
        }
        // As many bytes a row, other numbers.
        let wrong = agree(&device, DType::IQ4_NL, false, [plain(DType::IQ4_NL, false), plain(DType::Q4_0, false)]);
        assert!(!wrong.expect("a trial"), "Q4_0 is no IQ4_NL");
        // A device without cooperative matrices is not asked.
        let Abilities { cooperative, .. } = device.abilities;
        assert!(cooperative || !device.cooperative(DType::Q8_0, false));
    }
}
