//! AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) over flat `f32` parameters, and what is done to gradients first.
//!
//! Parameters are slices in a fixed order, described once when the optimizer is made. Per value there are two moments,
//! in 32 bits or in 8 ([`blockwise`]): 8 or 2 bytes. Small tensors keep 32 bits, as their moments cost nothing and are the
//! most sensitive. A step is elementwise, so threads may share out the parameters as they like: the result is the same.
//!
//! With gradient g, moments m and v, rate η, decay λ and step t from 1:
//! m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², p ← p − ηλp − η · (m / (1−β₁ᵗ)) / (√(v / (1−β₂ᵗ)) + ε).
//! The formula itself is the engine's ([`AdamWStep`]), because devices that keep a training's state compute it too.

pub mod blockwise;

use blockwise::{BLOCK, Code, Quantized};
use kinglet_engine::tape::AdamWStep;

use crate::checkpoint::{Tensor, Values};
use crate::{Error, Result};

/// Tensors with fewer values keep their moments in 32 bits.
const SMALLEST_QUANTIZED: usize = 4096;

/// The settings of [`AdamW`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// β₁ and β₂.
    pub betas: [f64; 2],
    /// ε.
    pub eps: f64,
    /// λ, decoupled from the gradient.
    pub weight_decay: f64,
    /// Keep the moments of tensors of 4,096 values and more in 8 bits.
    pub state_8bit: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.0, state_8bit: false }
    }
}

/// A parameter that is trained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Its name in checkpoints.
    pub name: String,
    /// Its number of values.
    pub len: usize,
    /// Whether weight decay applies: not to norms, biases and magnitudes.
    pub decay: bool,
}

/// The optimizer's state.
#[derive(Clone, Debug)]
pub struct AdamW {
    options: Options,
    step: u64,
    states: Vec<State>,
}

#[derive(Clone, Debug)]
struct State {
    parameter: Parameter,
    moments: Moments,
}

#[derive(Clone, Debug)]
enum Moments {
    Full { m: Vec<f32>, v: Vec<f32> },
    Quantized { m: Quantized, v: Quantized },
}

impl AdamW {
    /// An optimizer at step 0 for parameters in this order.
    pub fn new(options: Options, parameters: &[Parameter]) -> AdamW {
        let state = |parameter: &Parameter| State {
            parameter: parameter.clone(),
            moments: if options.state_8bit && parameter.len >= SMALLEST_QUANTIZED {
                Moments::Quantized {
                    m: Quantized::zeros(Code::Signed, parameter.len),
                    v: Quantized::zeros(Code::Unsigned, parameter.len),
                }
            } else {
                Moments::Full { m: vec![0.0; parameter.len], v: vec![0.0; parameter.len] }
            },
        };
        AdamW { options, step: 0, states: parameters.iter().map(state).collect() }
    }

    /// Forgets everything: the state before the first step.
    pub fn reset(&mut self) {
        let parameters: Vec<Parameter> = self.states.iter().map(|state| state.parameter.clone()).collect();
        *self = AdamW::new(self.options, &parameters);
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Bytes of the moments.
    pub fn state_bytes(&self) -> usize {
        let bytes = |state: &State| match &state.moments {
            Moments::Full { m, v } => 4 * (m.len() + v.len()),
            Moments::Quantized { m, v } => m.bytes() + v.bytes(),
        };
        self.states.iter().map(bytes).sum()
    }

    /// One step at learning rate `rate`: `values` and `gradients` in the order of the parameters.
    ///
    /// # Errors
    /// [`Error::Argument`] where their number or a length is not that of the parameters; nothing has changed then.
    pub fn step(&mut self, rate: f64, values: &mut [&mut [f32]], gradients: &[&[f32]]) -> Result<()> {
        if values.len() != self.states.len() || gradients.len() != self.states.len() {
            return Err(Error::argument(format!(
                "the optimizer has {} parameters but was given {} values and {} gradients",
                self.states.len(),
                values.len(),
                gradients.len()
            )));
        }
        for ((state, values), gradients) in self.states.iter().zip(values.iter()).zip(gradients) {
            let Parameter { name, len, .. } = &state.parameter;
            if values.len() != *len || gradients.len() != *len {
                return Err(Error::argument(format!(
                    "parameter {name} has {len} values but was given {} and {} gradients",
                    values.len(),
                    gradients.len()
                )));
            }
        }
        let rule = self.next(rate);
        self.count();
        for ((state, values), gradients) in self.states.iter_mut().zip(values).zip(gradients) {
            let decays = state.parameter.decay;
            match &mut state.moments {
                Moments::Full { m, v } => rule.apply(decays, values, gradients, m, v),
                Moments::Quantized { m, v } => {
                    let (mut m_block, mut v_block) = ([0.0; BLOCK], [0.0; BLOCK]);
                    let blocks = values.chunks_mut(BLOCK).zip(gradients.chunks(BLOCK));
                    for (block, (values, gradients)) in blocks.enumerate() {
                        let (m_block, v_block) = (&mut m_block[..values.len()], &mut v_block[..values.len()]);
                        m.read(block, m_block);
                        v.read(block, v_block);
                        rule.apply(decays, values, gradients, m_block, v_block);
                        m.write(block, m_block);
                        v.write(block, v_block);
                    }
                }
            }
        }
        Ok(())
    }

    /// What the next step at learning rate `rate` does to every value, for whoever takes it elsewhere; [`AdamW::count`] says
    /// that it was taken.
    pub fn next(&self, rate: f64) -> AdamWStep {
        let [beta1, beta2] = self.options.betas;
        let step = (self.step + 1).min(i32::MAX as u64) as i32;
        let correction = |beta: f64| 1.0 - beta.powi(step);
        AdamWStep {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            rate: (rate / correction(beta1)) as f32,
            root: correction(beta2).sqrt() as f32,
            eps: self.options.eps as f32,
            keep: (1.0 - rate * self.options.weight_decay) as f32,
        }
    }

    /// Counts a step that was taken elsewhere.
    pub fn count(&mut self) {
        self.step += 1;
    }

    /// Of each parameter, whether weight decay applies to it.
    pub fn decays(&self) -> Vec<bool> {
        self.states.iter().map(|state| state.parameter.decay).collect()
    }

    /// Whether moments are kept in 8 bits.
    pub fn in_eight_bits(&self) -> bool {
        self.options.state_8bit
    }

    /// First and second moments, one parameter's behind the other's; none where some have 8 bits.
    pub fn moments(&self) -> Option<[Vec<f32>; 2]> {
        if self.in_eight_bits() {
            return None;
        }
        let mut all = [Vec::new(), Vec::new()];
        for state in &self.states {
            let Moments::Full { m, v } = &state.moments else { return None };
            all[0].extend_from_slice(m);
            all[1].extend_from_slice(v);
        }
        Some(all)
    }

    /// Takes over moments as [`AdamW::moments`] gives them.
    pub fn set_moments(&mut self, [mut all_m, mut all_v]: [&[f32]; 2]) {
        for state in &mut self.states {
            let Moments::Full { m, v } = &mut state.moments else { return };
            let len = m.len().min(all_m.len()).min(all_v.len());
            let (mine_m, rest_m) = all_m.split_at(len);
            let (mine_v, rest_v) = all_v.split_at(len);
            m[..len].copy_from_slice(mine_m);
            v[..len].copy_from_slice(mine_v);
            (all_m, all_v) = (rest_m, rest_v);
        }
    }

    /// The state as tensors for a checkpoint; the number of steps goes beside them.
    pub fn export(&self) -> Vec<Tensor> {
        let mut out = Vec::new();
        for State { parameter: Parameter { name, .. }, moments } in &self.states {
            match moments {
                Moments::Full { m, v } => {
                    out.push(Tensor::f32(format!("{name}.m"), m.clone()));
                    out.push(Tensor::f32(format!("{name}.v"), v.clone()));
                }
                Moments::Quantized { m, v } => {
                    for (moment, quantized) in [("m", m), ("v", v)] {
                        let (codes, scales) = quantized.parts();
                        out.push(Tensor::u8(format!("{name}.{moment}.codes"), codes.to_vec()));
                        out.push(Tensor::f32(format!("{name}.{moment}.scales"), scales.to_vec()));
                    }
                }
            }
        }
        out
    }

    /// Takes over a state that [`AdamW::export`] gave, after `steps` steps.
    ///
    /// # Errors
    /// [`Error::Argument`] where a tensor is missing or of another length or type; the state is unchanged then.
    pub fn import(&mut self, steps: u64, tensors: &[Tensor]) -> Result<()> {
        let by_name: std::collections::HashMap<&str, &Tensor> = tensors.iter().map(|t| (t.name.as_str(), t)).collect();
        let find = |name: String| by_name.get(name.as_str()).map(|t| &t.values).ok_or(name);
        let full = |name: String, len: usize| match find(name.clone()) {
            Ok(Values::F32(values)) if values.len() == len => Ok(values.clone()),
            _ => Err(name),
        };
        let codes = |name: String, len: usize| match find(name.clone()) {
            Ok(Values::U8(values)) if values.len() == len => Ok(values.clone()),
            _ => Err(name),
        };
        let read = |state: &State| -> Result<Moments, String> {
            let Parameter { name, len, .. } = &state.parameter;
            let quantized = |moment: &str, code: Code| {
                let codes = codes(format!("{name}.{moment}.codes"), *len)?;
                let scales = full(format!("{name}.{moment}.scales"), len.div_ceil(BLOCK))?;
                Ok::<_, String>(Quantized::from_parts(code, codes, scales))
            };
            Ok(match &state.moments {
                Moments::Full { .. } => {
                    Moments::Full { m: full(format!("{name}.m"), *len)?, v: full(format!("{name}.v"), *len)? }
                }
                Moments::Quantized { .. } => {
                    Moments::Quantized { m: quantized("m", Code::Signed)?, v: quantized("v", Code::Unsigned)? }
                }
            })
        };
        let moments = self.states.iter().map(read).collect::<Result<Vec<_>, String>>().map_err(|name| {
            Error::argument(format!(
                "the optimizer's state lacks {name} in the wanted size and type; resume with the rank, the targets and \
                 the optimizer that the checkpoint was written with"
            ))
        })?;
        self.states.iter_mut().zip(moments).for_each(|(state, moments)| state.moments = moments);
        self.step = steps;
        Ok(())
    }
}

/// The length of all gradients as one vector. Sums are in `f64` in a fixed order, so the value is the same everywhere.
pub fn global_norm(gradients: &[&[f32]]) -> f64 {
    let squares = |part: &[f32]| part.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
    gradients.iter().map(|part| squares(part)).sum::<f64>().sqrt()
}

/// The factor that shortens gradients of length `norm` to `limit`, if they are longer. A `limit` of 0 is none; a length that
/// is not finite changes nothing.
pub fn clip_factor(norm: f64, limit: f64) -> f32 {
    if limit > 0.0 && norm > limit && norm.is_finite() { (limit / norm) as f32 } else { 1.0 }
}

/// Shortens the gradients to length `limit` if they are longer (Pascanu and others 2012, arXiv:1211.5063) and returns the
/// length they had. A `limit` of 0 is none; a length that is not finite changes nothing.
pub fn clip_by_global_norm(gradients: &mut [&mut [f32]], limit: f64) -> f64 {
    let parts: Vec<&[f32]> = gradients.iter().map(|part| &**part).collect();
    let norm = global_norm(&parts);
    let factor = clip_factor(norm, limit);
    if factor < 1.0 {
        gradients.iter_mut().for_each(|part| part.iter_mut().for_each(|g| *g *= factor));
    }
    norm
}

/// Adds `factor` times the gradients of one batch to those of the step. With sums over tokens as losses, batches of
/// different length count by their tokens when the step's gradients are divided by all of them at the end.
pub fn accumulate(step: &mut [&mut [f32]], batch: &[&[f32]], factor: f32) {
    for (step, batch) in step.iter_mut().zip(batch) {
        step.iter_mut().zip(*batch).for_each(|(sum, g)| *sum += factor * g);
    }
}

#[cfg(test)]
mod tests;
