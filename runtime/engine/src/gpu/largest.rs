//! The largest logits of decoded rows, found on the device: what decides the next token is a pair or a few of them, and not a
//! row as long as the vocabulary, which would have to be read back.
//!
//! `shaders/largest.wgsl` takes a chunk of a row a workgroup, and then the chunks of a row together. The lists of pairs (logit,
//! token) lie behind the values of the run.

use bytemuck::{Pod, Zeroable};

use super::forward::{DECODED, row_grid};
use super::kernel::Kernel;
use super::record::{Decoding, Recorder};
use crate::tape::{MOST_LARGEST, Rows};

/// Logits of a workgroup.
const CHUNK: usize = 2_048;
/// Most chunks that one workgroup merges.
const MERGED: usize = 256;

/// `Op` of `shaders/largest.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LargestOp {
    logits: u32,
    stride: u32,
    count: u32,
    k: u32,
    lists: u32,
    chunks: u32,
    out: u32,
    unused: u32,
}

/// How many of a row's largest logits are found where so many decide: a power of two, so that there are few recordings; none
/// where they are too many, or the row is too long.
pub(super) fn found(vocab: usize, wanted: usize) -> u32 {
    match (1..=MOST_LARGEST).contains(&wanted) && vocab.div_ceil(CHUNK) <= MERGED {
        true => wanted.next_power_of_two() as u32,
        false => 0,
    }
}

/// Floats for the largest logits of decoded rows, and of the chunks of so many rows.
pub(super) fn floats(vocab: usize, rows: usize) -> usize {
    2 * MOST_LARGEST * (DECODED + rows * vocab.div_ceil(CHUNK).min(MERGED))
}

/// A row of what was read back: tokens with their logits, −∞ behind the row's end.
pub(super) fn pairs(floats: &[f32]) -> impl Iterator<Item = (u32, f32)> + '_ {
    floats.as_chunks::<2>().0.iter().map(|[logit, token]| match *token >= 0.0 {
        true => (*token as u32, *logit),
        false => (u32::MAX, f32::NEG_INFINITY),
    })
}

impl Recorder<'_> {
    /// Finds the largest logits of each row, where they are wanted: of chunks, then of all.
    pub(super) fn largest(&mut self) {
        let Some(Decoding { largest, .. }) = self.decoding.filter(|d| d.largest > 0) else { return };
        self.op = "largest";
        let op = LargestOp {
            logits: self.at(self.tape.result),
            stride: self.width(self.tape.result),
            count: self.spec.vocab as u32,
            k: largest,
            lists: self.scratch.largest + (2 * MOST_LARGEST * DECODED) as u32,
            chunks: self.spec.vocab.div_ceil(CHUNK) as u32,
            out: self.scratch.largest,
            unused: 0,
        };
        let lists = u64::from(2 * largest * op.chunks);
        let moved = [u64::from(op.count) + lists, lists + u64::from(2 * largest)];
        for (merge, chunks, floats) in [(false, op.chunks, moved[0]), (true, 1, moved[1])] {
            self.push(Kernel::Largest { merge }, (0, 0), row_grid(chunks, Rows::Outputs), &op, (0, floats));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Ordering;

    use super::*;
    use crate::gpu::device::SLOT;
    use crate::gpu::{Device, Limits};
    use crate::random;

    /// What the device makes of rows of logits, by both kernels.
    fn on_device(device: &Device, rows: &[Vec<f32>], stride: usize, k: usize) -> Vec<Vec<(u32, f32)>> {
        let count = rows[0].len();
        let logits: Vec<f32> = rows
            .iter()
            .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(f32::INFINITY, stride - count)))
            .collect();
        let out = logits.len() as u32;
        let op = LargestOp {
            logits: 0,
            stride: stride as u32,
            count: count as u32,
            k: k as u32,
            lists: out + (2 * MOST_LARGEST * DECODED) as u32,
            chunks: count.div_ceil(CHUNK) as u32,
            out,
            unused: 0,
        };
        let arena = device.storage(4 * (logits.len() + floats(count, rows.len())) as u64, "a test").unwrap();
        device.queue.write_buffer(&arena, 0, bytemuck::cast_slice(&logits));
        let other = [0; 6].map(|_| device.storage(SLOT, "a test").unwrap());
        let mut slot = bytemuck::bytes_of(&op).to_vec();
        slot.resize(SLOT as usize, 0);
        let uniforms = device.descriptions(&slot).unwrap();
        let [a, b, c, d, e, f] = &other;
        let group = device.bind(&uniforms, [a, a, b, &arena, c, d, e, f]);
        let staging = device.staging((8 * k * rows.len()) as u64).unwrap();
        let mut encoder = device.encoder();
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            for (merge, chunks) in [(false, op.chunks), (true, 1)] {
                pass.set_pipeline(&device.pipeline(&Kernel::Largest { merge }).unwrap());
                pass.set_bind_group(0, &group, &[0]);
                pass.dispatch_workgroups(chunks, 1, rows.len() as u32);
            }
        }
        encoder.copy_buffer_to_buffer(&arena, 4 * u64::from(out), &staging, 0, (8 * k * rows.len()) as u64);
        device.queue.submit([encoder.finish()]);
        let mut found = vec![0f32; 2 * k * rows.len()];
        device.read(&staging, 4 * found.len() as u64, bytemuck::cast_slice_mut(&mut found)).unwrap();
        found.chunks_exact(2 * k).map(|row| pairs(row).collect()).collect()
    }

    /// Rows that end within a chunk, or at its end, or have fewer logits than are asked for; many of them equal, some −∞.
    #[test]
    fn the_largest_are_found_in_order() {
        for limits in [Limits::default(), Limits { baseline: true, ..Limits::default() }] {
            let device = Device::open(0, limits).expect("a GPU, or lavapipe in its place");
            for (count, k) in [(5, 8), (2_048, 1), (2_049, 64), (10_000, 4), (49_152, 64), (262_144, 32), (300_001, 1)]
            {
                let row = |seed: u64| -> Vec<f32> {
                    let logit = |i: usize| match i % 7 {
                        3 => f32::NEG_INFINITY,
                        // A grid of 200, with its zeros of either sign.
                        _ => (random::uniform(seed, i as u64) * 200.0).round() as f32 / 8.0 - 12.5,
                    };
                    (0..count).map(|i| logit(i) * if i % 2 == 0 { 1.0 } else { 0.5 }).collect()
                };
                let rows: Vec<_> = (0..3).map(row).collect();
                for (row, found) in rows.iter().zip(on_device(&device, &rows, count.next_multiple_of(4), k)) {
                    let mut wanted: Vec<_> = row.iter().enumerate().map(|(i, x)| (i as u32, *x)).collect();
                    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal);
                    wanted.sort_by(|a, b| order(a, b).then(a.0.cmp(&b.0)));
                    wanted.resize(k.max(count), (u32::MAX, f32::NEG_INFINITY));
                    assert_eq!(found, wanted[..k], "{k} of {count}");
                }
            }
        }
    }

    /// What no logit may be comes first, wherever it is.
    #[test]
    fn what_is_no_number_comes_first() {
        let device = Device::open(0, Limits::default()).expect("a GPU, or lavapipe in its place");
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
            for at in [0, 4_000, 6_999] {
                let mut row = vec![1e30; 7_000];
                row[at] = bad;
                let found = on_device(&device, &[row], 7_000, 2);
                assert!(found[0][0].0 == at as u32 && !found[0][0].1.is_finite(), "{bad} at {at}: {found:?}");
            }
        }
    }
}
