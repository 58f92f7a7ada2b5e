//! One step of AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101): the formula that the optimizer on the CPU computes
//! and a GPU's kernel repeats, and what a device offers that keeps a training's state by itself.

use crate::Result;

/// What a step does to every value, with all worked out that depends on the step alone:
/// m ← m + (1−β₁)(g − m), v ← β₂v + (1−β₂)g², p ← keep·p − rate · m / (√v/root + ε).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// β₁.
    pub beta1: f32,
    /// β₂.
    pub beta2: f32,
    /// η / (1−β₁ᵗ).
    pub rate: f32,
    /// √(1−β₂ᵗ).
    pub root: f32,
    /// ε.
    pub eps: f32,
    /// 1 − ηλ, for parameters that decay.
    pub keep: f32,
}

impl AdamWStep {
    /// The step on some values, with their gradients and moments; all slices are of the same length.
    #[inline]
    pub fn apply(&self, decays: bool, values: &mut [f32], gradients: &[f32], m: &mut [f32], v: &mut [f32]) {
        let keep = if decays { self.keep } else { 1.0 };
        for (((p, &g), m), v) in values.iter_mut().zip(gradients).zip(m).zip(v) {
            *m += (1.0 - self.beta1) * (g - *m);
            *v = self.beta2 * *v + (1.0 - self.beta2) * g * g;
            *p = *p * keep - self.rate * (*m / (v.sqrt() / self.root + self.eps));
        }
    }
}

/// Parameters and both moments, each in the places of the tape's table of parameters.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrainingState {
    /// The parameters.
    pub params: Vec<f32>,
    /// First moments.
    pub m: Vec<f32>,
    /// Second moments.
    pub v: Vec<f32>,
}

/// A device that keeps parameters, gradients and moments of a training by itself, and takes AdamW's steps there. Every sum is
/// in a fixed order: the same steps give the same bits.
pub trait KeepsTraining {
    /// Takes over a state, in place of the one before. `decays` says of each parameter whether weight decay applies to it.
    ///
    /// # Errors
    /// Lengths that are not those of the parameters, [`Error::Memory`](crate::Error::Memory),
    /// [`Error::Device`](crate::Error::Device).
    fn hold(&mut self, state: &TrainingState, decays: &[bool]) -> Result<()>;

    /// Copies the state back, gradients apart.
    ///
    /// # Errors
    /// No state is held; [`Error::Memory`](crate::Error::Memory), [`Error::Device`](crate::Error::Device).
    fn held(&mut self) -> Result<TrainingState>;

    /// Begins a step: runs for learning add to gradients of zero from here on.
    ///
    /// # Errors
    /// As [`KeepsTraining::held`].
    fn clear_gradients(&mut self) -> Result<()>;

    /// Length of all gradients as one vector; no number where one of them is none or infinite.
    ///
    /// # Errors
    /// As [`KeepsTraining::held`].
    fn gradient_norm(&mut self) -> Result<f64>;

    /// Takes a step with the gradients times `factor`. Waits for nothing; what goes wrong is told by the next call.
    ///
    /// # Errors
    /// As [`KeepsTraining::held`].
    fn update(&mut self, step: &AdamWStep, factor: f32) -> Result<()>;
}
