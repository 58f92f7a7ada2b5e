//! The numbers that are trained, with their gradients and the optimizer's moments: in main memory, or on the learner's
//! device, if that can keep them.
//!
//! Either way a step is the same: [`Parameters::begin`], runs that add gradients, their [`Parameters::norm`], by which the
//! trainer judges them, and [`Parameters::step`]. On a device nothing but losses and the norm is read back on the way; the
//! numbers come down when somebody asks for them ([`Parameters::values`], a checkpoint). Moments of 8 bits are kept in
//! main memory.

use std::sync::atomic::AtomicBool;

use kinglet_engine::session::{LearnBatch, Learner};
use kinglet_engine::tape::TrainingState;

use crate::Result;
use crate::checkpoint::Tensor;
use crate::optimizer::{AdamW, clip_factor, global_norm};

/// Where the newest numbers are, if not in both places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Newest {
    Here,
    OnDevice,
    Both,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Parameters {
    learner: Learner,
    optimizer: AdamW,
    values: Vec<f32>,
    /// Empty where the device keeps them.
    gradients: Vec<f32>,
    newest: Newest,
    on_device: bool,
}

impl Parameters {
    pub fn new(mut learner: Learner, optimizer: AdamW, values: Vec<f32>) -> Parameters {
        let on_device = !optimizer.in_eight_bits() && learner.keeper().is_some();
        let gradients = if on_device { Vec::new() } else { vec![0.0; values.len()] };
        Parameters { learner, optimizer, values, gradients, newest: Newest::Here, on_device }
    }

    pub fn learner_mut(&mut self) -> &mut Learner {
        &mut self.learner
    }

    /// The parameters, in the places that the learner gives them.
    pub fn values(&mut self) -> Result<&[f32]> {
        self.fetch()?;
        Ok(&self.values)
    }

    /// The learner with the parameters.
    pub fn learned(&mut self) -> Result<(&Learner, &[f32])> {
        self.fetch()?;
        Ok((&self.learner, &self.values))
    }

    /// Parameters and optimizer, to be changed.
    pub fn change(&mut self) -> Result<(&Learner, &mut [f32], &mut AdamW)> {
        self.fetch()?;
        self.newest = Newest::Here;
        Ok((&self.learner, &mut self.values, &mut self.optimizer))
    }

    /// The moments, for a checkpoint.
    pub fn export_moments(&mut self) -> Result<Vec<Tensor>> {
        self.fetch()?;
        Ok(self.optimizer.export())
    }

    /// Begins a step: gradients of zero.
    pub fn begin(&mut self) -> Result<()> {
        self.gradients.fill(0.0);
        self.bring()?;
        match self.learner.keeper().filter(|_| self.on_device) {
            Some(device) => Ok(device.clear_gradients()?),
            None => Ok(()),
        }
    }

    /// Scores of a batch's targets, as [`Learner::score`].
    pub fn score(&mut self, batch: &LearnBatch, cancel: &AtomicBool) -> Result<&[f32]> {
        self.bring()?;
        match self.on_device {
            true => Ok(self.learner.score_held(batch, cancel)?),
            false => Ok(self.learner.score(batch, &self.values, cancel)?),
        }
    }

    /// As [`Parameters::score`], and adds the batch's gradients to those of the step.
    pub fn learn(&mut self, batch: &LearnBatch, cancel: &AtomicBool) -> Result<&[f32]> {
        match self.on_device {
            true => Ok(self.learner.learn_held(batch, cancel)?),
            false => Ok(self.learner.learn(batch, &self.values, &mut self.gradients, cancel)?),
        }
    }

    /// Length of the step's gradients as one vector.
    pub fn norm(&mut self) -> Result<f64> {
        match self.learner.keeper().filter(|_| self.on_device) {
            Some(device) => Ok(device.gradient_norm()?),
            None => Ok(global_norm(&[&self.gradients])),
        }
    }

    /// The optimizer's step at learning rate `rate`, with gradients shortened to length `limit` if `norm`, their length, is
    /// more.
    pub fn step(&mut self, rate: f64, norm: f64, limit: f64) -> Result<()> {
        let factor = clip_factor(norm, limit);
        if let Some(device) = self.learner.keeper().filter(|_| self.on_device) {
            device.update(&self.optimizer.next(rate), factor)?;
            self.optimizer.count();
            self.newest = Newest::OnDevice;
            return Ok(());
        }
        if factor < 1.0 {
            self.gradients.iter_mut().for_each(|g| *g *= factor);
        }
        let (mut params, mut gradients) = (Vec::new(), Vec::new());
        let (mut rest, mut rest_gradients) = (self.values.as_mut_slice(), self.gradients.as_slice());
        for p in self.learner.params() {
            let (part, behind) = rest.split_at_mut(p.rows * p.width);
            let (gradient, gradients_behind) = rest_gradients.split_at(p.rows * p.width);
            params.push(part);
            gradients.push(gradient);
            (rest, rest_gradients) = (behind, gradients_behind);
        }
        self.optimizer.step(rate, &mut params, &gradients)
    }

    /// Brings what was changed here to the device, if it keeps it.
    fn bring(&mut self) -> Result<()> {
        if self.newest != Newest::Here {
            return Ok(());
        }
        if let (Some(device), Some([m, v])) =
            (self.learner.keeper().filter(|_| self.on_device), self.optimizer.moments())
        {
            device.hold(&TrainingState { params: self.values.clone(), m, v }, &self.optimizer.decays())?;
            self.newest = Newest::Both;
        }
        Ok(())
    }

    /// Fetches what the device has changed.
    fn fetch(&mut self) -> Result<()> {
        if self.newest != Newest::OnDevice {
            return Ok(());
        }
        if let Some(device) = self.learner.keeper() {
            let TrainingState { params, m, v } = device.held()?;
            self.values = params;
            self.optimizer.set_moments([&m, &v]);
        }
        self.newest = Newest::Both;
        Ok(())
    }
}
