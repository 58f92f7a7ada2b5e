//! Drops positions of a sequence's cache and moves those behind them down; see [`cpu::KvCache::shift`].
//!
//! [`cpu::KvCache::shift`]: crate::cpu::KvCache::shift

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::device::{Device, SLOT};
use super::executor::HEADER;
use super::forward::Turning;
use super::kernel::Kernel;
use super::kv::KvCache;
use super::record::Kv;
use crate::Result;
use crate::quant::DType;
use crate::tape::{Frequencies, Spec};

/// Most positions a dispatch moves.
const MOST: usize = 32_768;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ShiftOp {
    pages: u32,
    first: u32,
    drop: u32,
    unused: u32,
    kv: Kv,
    turn: Turning,
}

/// What is to go: `drop` positions from `keep` on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dropped {
    pub keep: usize,
    pub drop: usize,
}

impl Dropped {
    /// The table of the run that [`Dropped::submit`] is: angles of `drop` positions, and the pages of the cache.
    pub fn table(self, frequencies: &[Frequencies], cache: &KvCache) -> Vec<u32> {
        let mut words = vec![0; HEADER];
        words[4] = HEADER as u32;
        for frequencies in frequencies {
            words.extend(frequencies.turn(self.drop).iter().flatten().map(|v| v.to_bits()));
        }
        words.extend(cache.pages());
        words
    }

    /// Moves what lies behind in a cache of `len` positions whose pages are its own. `table` words come before its pages in
    /// [`Dropped::table`]; `bind` makes the bind group of a layer with the descriptions of dispatches.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::Error::Memory), [`Error::Device`](crate::Error::Device).
    pub fn submit(
        self,
        device: &Arc<Device>,
        spec: &Spec,
        kv_type: DType,
        (len, table): (usize, usize),
        bind: impl Fn(&wgpu::Buffer, usize) -> wgpu::BindGroup,
    ) -> Result<()> {
        let Dropped { keep, drop } = self;
        let pipeline = device.pipeline(&Kernel::Shift { kv_type })?;
        let mut slots = Vec::new();
        let mut grids = Vec::new();
        for (layer, first) in (0..spec.layers.len())
            .flat_map(|layer| (keep..len - drop).step_by(drop.min(MOST)).map(move |first| (layer, first)))
        {
            let op = ShiftOp {
                pages: table as u32,
                first: first as u32,
                drop: drop as u32,
                unused: 0,
                kv: Kv::new(spec, None),
                turn: Turning::of(spec, spec.layers[layer].rope),
            };
            slots.extend_from_slice(bytemuck::bytes_of(&op));
            slots.resize(slots.len().next_multiple_of(SLOT as usize), 0);
            grids.push((layer, drop.min(MOST).min(len - drop - first) as u32));
        }
        if grids.is_empty() {
            return Ok(());
        }
        let uniforms = device.descriptions(&slots)?;
        let groups: Vec<_> = (0..spec.layers.len()).map(|layer| bind(&uniforms, layer)).collect();
        let mut encoder = device.encoder();
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&pipeline);
        for ((layer, rows), slot) in grids.into_iter().zip((0u32..).step_by(SLOT as usize)) {
            pass.set_bind_group(0, &groups[layer], &[slot]);
            pass.dispatch_workgroups(2 * spec.kv_heads as u32, 1, rows);
        }
        std::mem::drop(pass);
        device.queue.submit([encoder.finish()]);
        device.wait()
    }
}
