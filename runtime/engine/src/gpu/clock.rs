//! Times of passes, by the device's own clock.

use std::time::Duration;

use super::device::Device;
use crate::Result;

/// Two timestamps for each of some passes.
pub(super) struct Clock {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    mapped: wgpu::Buffer,
    /// Nanoseconds of a tick.
    period: f64,
}

impl Clock {
    /// For so many passes; the device has [`timestamps`](super::device::Abilities::timestamps).
    pub fn new(device: &Device, passes: usize) -> Result<Clock> {
        let bytes = 16 * passes as u64;
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        Ok(Clock {
            queries: device.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: None,
                ty: wgpu::QueryType::Timestamp,
                count: 2 * passes as u32,
            }),
            resolved: device.buffer(bytes, usage, "timestamps")?,
            mapped: device.staging(bytes)?,
            period: f64::from(device.queue.get_timestamp_period()),
        })
    }

    /// What pass number `pass` is to write.
    pub fn writes(&self, pass: usize) -> wgpu::ComputePassTimestampWrites<'_> {
        wgpu::ComputePassTimestampWrites {
            query_set: &self.queries,
            beginning_of_pass_write_index: Some(2 * pass as u32),
            end_of_pass_write_index: Some(2 * pass as u32 + 1),
        }
    }

    /// Submits commands of some passes, and gives the time of each.
    pub fn submit(
        &self,
        device: &Device,
        mut commands: wgpu::CommandEncoder,
        passes: usize,
    ) -> Result<impl Iterator<Item = Duration>> {
        let bytes = 16 * passes as u64;
        commands.resolve_query_set(&self.queries, 0..2 * passes as u32, &self.resolved, 0);
        commands.copy_buffer_to_buffer(&self.resolved, 0, &self.mapped, 0, bytes);
        device.queue.submit([commands.finish()]);
        let mut stamps = vec![[0u64; 2]; passes];
        device.read(&self.mapped, bytes, bytemuck::cast_slice_mut(&mut stamps))?;
        let period = self.period;
        Ok(stamps
            .into_iter()
            .map(move |[begin, end]| Duration::from_nanos((end.saturating_sub(begin) as f64 * period) as u64)))
    }
}
