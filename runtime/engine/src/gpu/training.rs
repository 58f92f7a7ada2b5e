//! A training's state on a device: parameters, gradients, moments, and AdamW's step as one dispatch over all of them.
//!
//! Runs with parameters of the caller's (a reference's scores, say) have a buffer of their own, which takes the place of the
//! held ones in what is bound.

use bytemuck::{Pod, Zeroable};

use super::device::SLOT;
use super::executor::Executor;
use super::kernel::Kernel;
use super::record::{Depth, Grid};
use crate::tape::{AdamWStep, KeepsTraining, TrainingState};
use crate::{Error, Result};

/// Elements of a workgroup.
const GROUP: u32 = 256;
/// Most workgroups that sum squares.
const PARTIALS: u32 = 1_024;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct UpdateOp {
    count: u32,
    flips: u32,
    factor: f32,
    beta1: f32,
    beta2: f32,
    rate: f32,
    root: f32,
    eps: f32,
    keep: f32,
    unused: [u32; 3],
}

/// What is on the device beside the parameters and the gradients that runs bind.
#[derive(Debug)]
pub(super) struct Held {
    m: wgpu::Buffer,
    v: wgpu::Buffer,
    /// Where decay goes on and off.
    flips: wgpu::Buffer,
    flip_count: u32,
    /// What workgroups have summed.
    partials: wgpu::Buffer,
    /// Descriptions of the two dispatches.
    uniforms: wgpu::Buffer,
    /// Whether the parameters that are bound are the held ones, and those that are not bound.
    bound: bool,
    aside: Option<wgpu::Buffer>,
    /// The state, while its memory is given back.
    parked: Option<TrainingState>,
}

/// Elements at which decay goes on or off, when it is off before the first.
fn flips(lengths: impl Iterator<Item = usize>, decays: &[bool]) -> Vec<u32> {
    let (mut at, mut on, mut flips) = (0, false, Vec::new());
    for (len, decays) in lengths.zip(decays) {
        if on != *decays {
            flips.push(at as u32);
            on = *decays;
        }
        at += len;
    }
    flips
}

impl Executor {
    /// Brings what was given back to the device again, and makes room for parameters.
    pub(super) fn wake_training(&mut self) -> Result<()> {
        let bytes = 4 * self.tape().param_count() as u64;
        if bytes > self.params.size() {
            self.params = self.device.storage(bytes, "trained parameters")?;
            self.generation += 1;
        }
        if bytes * u64::from(self.slices) > self.gradients.size() {
            self.gradients = self.device.storage(bytes * u64::from(self.slices), "gradients")?;
            self.generation += 1;
        }
        let Some(state) = self.held.as_mut().and_then(|held| held.parked.take()) else { return Ok(()) };
        let done = self.bring(&state);
        if let (Err(_), Some(held)) = (&done, &mut self.held) {
            held.parked = Some(state);
        }
        done
    }

    /// Writes a state to the buffers, which have room for parameters and gradients already.
    fn bring(&mut self, state: &TrainingState) -> Result<()> {
        let bytes = 4 * state.params.len() as u64;
        let [m, v] = ["first moments", "second moments"].map(|what| self.device.storage(bytes, what));
        let (m, v) = (m?, v?);
        for (buffer, values) in [(&self.params, &state.params), (&m, &state.m), (&v, &state.v)] {
            self.device.upload(buffer, 0, bytemuck::cast_slice(values))?;
        }
        if let Some(held) = &mut self.held {
            (held.m, held.v, held.bound, held.aside, held.parked) = (m, v, true, None, None);
        }
        Ok(())
    }

    /// Binds the held parameters, or a buffer for others.
    pub(super) fn bind_params(&mut self, wanted: bool) -> Result<()> {
        let Some(held) = self.held.as_mut().filter(|held| held.bound != wanted) else { return Ok(()) };
        let mut other = match held.aside.take() {
            Some(other) => other,
            None => self.device.storage(self.params.size(), "parameters of a reference")?,
        };
        std::mem::swap(&mut other, &mut self.params);
        (held.aside, held.bound) = (Some(other), wanted);
        self.generation += 1;
        Ok(())
    }

    /// Gives back the memory of what is trained, until the next use. Gives its bytes.
    pub(super) fn park_training(&mut self) -> Result<u64> {
        if self.tape().param_count() == 0 {
            return Ok(0);
        }
        let state = match &self.held {
            Some(held) if held.parked.is_none() => Some(self.held()?),
            _ => None,
        };
        let (device, least) = (&self.device, SLOT);
        let mut all = vec![(&mut self.params, "trained parameters"), (&mut self.gradients, "gradients")];
        let mut freed = 0;
        if let Some(held) = &mut self.held {
            if let Some(aside) = held.aside.take() {
                freed += aside.size();
                aside.destroy();
            }
            held.bound = true;
            held.parked = state.or(held.parked.take());
            all.extend([(&mut held.m, "first moments"), (&mut held.v, "second moments")]);
        }
        for (buffer, what) in all {
            if buffer.size() > least {
                let old = std::mem::replace(buffer, device.storage(least, what)?);
                freed += old.size() - least;
                old.destroy();
            }
        }
        self.generation += 1;
        Ok(freed)
    }

    /// Makes sure that a training is held, and on the device.
    fn awake(&mut self) -> Result<()> {
        self.device.check()?;
        self.wake_training()?;
        match self.held {
            Some(_) => Ok(()),
            None => Err(Error::argument("the device holds no training; give it one")),
        }
    }

    /// Submits one of the two dispatches.
    fn submit(&self, held: &Held, kernel: &Kernel, slot: u32, grid: Grid) -> Result<()> {
        let norm = matches!(kernel, Kernel::GradientNorm);
        let values = if norm { &held.partials } else { &self.params };
        let (table, pipeline) = (&held.flips, self.device.pipeline(kernel)?);
        let buffers = [table, table, table, values, &held.m, table, &self.gradients, &held.v];
        let group = self.device.bind(&held.uniforms, buffers);
        let mut encoder = self.device.encoder();
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[slot]);
        let [x, y, z] = grid.size(|_| 1);
        pass.dispatch_workgroups(x, y, z);
        drop(pass);
        self.device.queue.submit([encoder.finish()]);
        Ok(())
    }
}

impl KeepsTraining for Executor {
    fn hold(&mut self, state: &TrainingState, decays: &[bool]) -> Result<()> {
        let tape = self.tape();
        let (count, lengths) = (tape.param_count(), tape.params.iter().map(|p| p.rows * p.width));
        if [&state.params, &state.m, &state.v].iter().any(|values| values.len() != count)
            || decays.len() != tape.params.len()
        {
            return Err(Error::argument(format!(
                "a state of {}, {} and {} values for {count} parameters in {} matrices, {} of which are spoken of",
                state.params.len(),
                state.m.len(),
                state.v.len(),
                tape.params.len(),
                decays.len()
            )));
        }
        let table = flips(lengths, decays);
        let device = self.device.clone();
        device.check()?;
        let descriptions = vec![0; 2 * SLOT as usize];
        let uniforms = device.descriptions(&descriptions)?;
        device.queue.write_buffer(&uniforms, 0, bytemuck::bytes_of(&[count as u32, 0, 0, 0]));
        let flips = device.storage(4 * table.len() as u64, "table of parameters")?;
        device.queue.write_buffer(&flips, 0, bytemuck::cast_slice(&table));
        let small = |what: &str| device.storage(SLOT, what);
        // What was held before is replaced when all is there.
        let held = Held {
            m: small("first moments")?,
            v: small("second moments")?,
            flips,
            flip_count: table.len() as u32,
            partials: device.storage(8 * u64::from(PARTIALS), "sums of squares")?,
            uniforms,
            bound: true,
            aside: None,
            parked: Some(state.clone()),
        };
        if let Some(Held { bound: false, aside: Some(aside), .. }) = self.held.replace(held) {
            self.params = aside;
            self.generation += 1;
        }
        self.wake_training()
    }

    fn held(&mut self) -> Result<TrainingState> {
        let count = self.tape().param_count();
        if let Some(state) = self.held.as_ref().and_then(|held| held.parked.as_ref()) {
            return Ok(state.clone());
        }
        self.awake()?;
        self.bind_params(true)?;
        let mut state = TrainingState { params: vec![0.0; count], m: vec![0.0; count], v: vec![0.0; count] };
        let Some(held) = &self.held else { return Ok(state) };
        for (buffer, values) in [(&self.params, &mut state.params), (&held.m, &mut state.m), (&held.v, &mut state.v)] {
            self.device.download(buffer, bytemuck::cast_slice_mut(values))?;
        }
        Ok(state)
    }

    fn clear_gradients(&mut self) -> Result<()> {
        self.awake()?;
        let mut encoder = self.device.encoder();
        encoder.clear_buffer(&self.gradients, 0, None);
        self.device.queue.submit([encoder.finish()]);
        Ok(())
    }

    fn gradient_norm(&mut self) -> Result<f64> {
        self.awake()?;
        let count = self.tape().param_count() as u32;
        let groups = count.div_ceil(GROUP).min(PARTIALS);
        let Some(held) = &self.held else { return Ok(0.0) };
        self.submit(held, &Kernel::GradientNorm, 0, Grid { x: groups, z: Depth::Fixed(1) })?;
        let mut partials = vec![[0.0f32; 2]; groups as usize];
        self.device.download(&held.partials, bytemuck::cast_slice_mut(&mut partials))?;
        if partials.iter().any(|[_, odd]| *odd > 0.0) {
            return Ok(f64::NAN);
        }
        Ok(partials.iter().map(|[squares, _]| f64::from(*squares)).sum::<f64>().sqrt())
    }

    fn update(&mut self, step: &AdamWStep, factor: f32) -> Result<()> {
        self.awake()?;
        self.bind_params(true)?;
        let count = self.tape().param_count() as u32;
        let Some(held) = &self.held else { return Ok(()) };
        let AdamWStep { beta1, beta2, rate, root, eps, keep } = *step;
        let flips = held.flip_count;
        let op = UpdateOp { count, flips, factor, beta1, beta2, rate, root, eps, keep, unused: [0; 3] };
        self.device.queue.write_buffer(&held.uniforms, SLOT, bytemuck::bytes_of(&op));
        let grid = Grid { x: count.div_ceil(GROUP), z: Depth::Fixed(1) };
        self.submit(held, &Kernel::AdamW, SLOT as u32, grid)
    }
}

#[cfg(test)]
mod tests {
    use super::flips;

    #[test]
    fn decay_goes_on_and_off_where_parameters_begin() {
        assert_eq!(flips([3, 4, 5, 6].into_iter(), &[true, true, false, true]), [0, 7, 12]);
        assert_eq!(flips([3, 4].into_iter(), &[false, true]), [3]);
        assert_eq!(flips([3].into_iter(), &[false]), [0; 0]);
    }
}
