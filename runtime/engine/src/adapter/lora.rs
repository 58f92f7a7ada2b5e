//! The adapter, what makes it valid, whether it fits a base model, and the rows of `ΔW` it stands for.
//!
//! Matrices are f32 and row-major: `A` is `[rank, inputs]`, `B` is `[outputs, rank]`, so that row `o` of `B·A` belongs to
//! row `o` of the base matrix. Fields are public, since trainers fill and change them; [`Adapter::check`] is called
//! wherever an adapter is used.

use std::collections::BTreeMap;

use super::fingerprint;
use crate::gguf::{Gguf, TensorInfo};
use crate::tape::{adapted_norm, magnitude_ratio};
use crate::{Error, Result};

/// The highest rank that is taken: more is a damaged file.
pub const MAX_RANK: usize = 4096;

/// The base model an adapter belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseId {
    /// `general.architecture` of the base.
    pub architecture: String,
    /// [`fingerprint`] of the base, where the adapter knows it.
    pub fingerprint: Option<String>,
}

impl BaseId {
    /// That of `model`.
    ///
    /// # Errors
    /// A model without `general.architecture`.
    pub fn of(model: &Gguf) -> Result<BaseId> {
        Ok(BaseId {
            architecture: model.metadata().str("general.architecture")?.to_string(),
            fingerprint: Some(fingerprint(model)),
        })
    }
}

/// The correction of one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// Rows of `A`, columns of `B`.
    pub rank: usize,
    /// Columns of the base matrix.
    pub inputs: usize,
    /// Rows of the base matrix.
    pub outputs: usize,
    /// `[rank, inputs]`.
    pub a: Vec<f32>,
    /// `[outputs, rank]`.
    pub b: Vec<f32>,
    /// The norms that the rows of the corrected matrix get, `[outputs]`: DoRA.
    pub magnitude: Option<Vec<f32>>,
}

impl LowRank {
    /// A correction that changes nothing yet: `A` given, `B` zero.
    pub fn starting_from(a: Vec<f32>, rank: usize, outputs: usize) -> LowRank {
        let inputs = a.len().checked_div(rank).unwrap_or(0);
        LowRank { rank, inputs, outputs, a, b: vec![0.0; rank.saturating_mul(outputs)], magnitude: None }
    }

    fn check(&self) -> Result<(), String> {
        if !(1..=MAX_RANK).contains(&self.rank) {
            return Err(format!("has rank {}; 1 to {MAX_RANK} is possible", self.rank));
        }
        let parts = [
            ("A", &self.a, self.rank.checked_mul(self.inputs)),
            ("B", &self.b, self.rank.checked_mul(self.outputs)),
            (
                "the magnitude",
                self.magnitude.as_ref().unwrap_or(&self.b),
                match self.magnitude {
                    Some(_) => Some(self.outputs),
                    None => Some(self.b.len()),
                },
            ),
        ];
        for (name, values, wanted) in parts {
            if values.is_empty() || Some(values.len()) != wanted {
                return Err(format!(
                    "has {} values in {name}, which does not fit rank {}, {} inputs and {} outputs",
                    values.len(),
                    self.rank,
                    self.inputs,
                    self.outputs
                ));
            }
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return Err(format!("has a NaN or an infinity in {name}, at element {at}; its training diverged"));
            }
        }
        Ok(())
    }
}

/// A set of corrections. See the module's text.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// Where it came from: for messages.
    pub name: String,
    /// The usual rank; entries may have others.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f32,
    /// Whether the scale is `alpha/√r` instead of `alpha/r` (<https://arxiv.org/abs/2312.03732>).
    pub rslora: bool,
    /// By the matrix's name in the GGUF file, such as `blk.0.attn_q.weight`.
    pub entries: BTreeMap<String, LowRank>,
    /// The base it was trained on, where it says.
    pub base: Option<BaseId>,
}

impl Adapter {
    /// `s` of an entry.
    pub fn scale(&self, entry: &LowRank) -> f32 {
        let rank = entry.rank.max(1) as f32;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// Numbers it consists of.
    pub fn parameters(&self) -> usize {
        let of = |e: &LowRank| e.a.len() + e.b.len() + e.magnitude.as_ref().map_or(0, Vec::len);
        self.entries.values().map(of).sum()
    }

    /// An error about this adapter.
    pub(super) fn error(&self, at: &str, what: impl Into<String>) -> Error {
        Error::Format { file: self.name.clone(), at: at.into(), what: what.into() }
    }

    /// Whether it is sound in itself: sizes agree, all numbers are finite.
    ///
    /// # Errors
    /// [`Error::Format`] naming the first matrix that is not.
    pub fn check(&self) -> Result<()> {
        if self.entries.is_empty() {
            return Err(self.error("adapter", "has no matrices; it is empty or of an unknown kind"));
        }
        if !self.alpha.is_finite() || self.alpha <= 0.0 {
            return Err(self.error("alpha", format!("is {}, but a positive number is needed", self.alpha)));
        }
        self.entries
            .iter()
            .try_for_each(|(name, e)| e.check().map_err(|what| self.error(&format!("tensor {name}"), what)))
    }

    /// Whether it belongs to `model`: architecture, fingerprint (where it has one) and every shape. Gives the number of
    /// matrices it corrects.
    ///
    /// # Errors
    /// [`Error::Format`] naming the first thing that differs.
    pub fn matches(&self, model: &Gguf) -> Result<usize> {
        self.check()?;
        if let Some(base) = &self.base {
            let architecture = model.metadata().str("general.architecture")?;
            if base.architecture != architecture {
                return Err(self.error(
                    "general.architecture",
                    format!(
                        "the adapter is for the architecture {:?}, {} has {architecture:?}; open it with its own base",
                        base.architecture,
                        model.name()
                    ),
                ));
            }
        }
        for (name, entry) in &self.entries {
            self.tensor(model, name, entry)?;
        }
        if let Some(wanted) = self.base.as_ref().and_then(|b| b.fingerprint.as_ref()) {
            let found = fingerprint(model);
            if *wanted != found {
                return Err(self.error(
                    "base fingerprint",
                    format!(
                        "the adapter was trained on a file with fingerprint {}…, {} has {}…; use the very file it was \
                         trained on (another quantization is another file)",
                        wanted.get(..12).unwrap_or(wanted),
                        model.name(),
                        found.get(..12).unwrap_or(&found)
                    ),
                ));
            }
        }
        Ok(self.entries.len())
    }

    /// The base matrix of an entry.
    pub(crate) fn tensor<'m>(&self, model: &'m Gguf, name: &str, entry: &LowRank) -> Result<&'m TensorInfo> {
        let Some(tensor) = model.tensor(name) else {
            return Err(self.error(
                &format!("tensor {name}"),
                format!("{} has no such matrix; the adapter is for another model", model.name()),
            ));
        };
        if tensor.width() != entry.inputs || tensor.rows() != entry.outputs {
            return Err(self.error(
                &format!("tensor {name}"),
                format!(
                    "corrects a matrix of {} inputs and {} outputs, {} has {} and {}; the adapter is for another model",
                    entry.inputs,
                    entry.outputs,
                    model.name(),
                    tensor.width(),
                    tensor.rows()
                ),
            ));
        }
        Ok(tensor)
    }
}

/// What an entry does to one row of its base matrix: `ΔW[o] = gain·W[o] + factor·(B[o]·A)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct RowDelta {
    /// 0 without a magnitude.
    pub gain: f32,
    /// The scale, times magnitude over norm.
    pub factor: f32,
}

impl LowRank {
    /// `out += factor · B[row]·A`.
    pub(super) fn add_row(&self, row: usize, factor: f32, out: &mut [f32]) {
        let b = self.b.chunks_exact(self.rank).nth(row).unwrap_or_default();
        for (b, a) in b.iter().zip(self.a.chunks_exact(self.inputs)) {
            let c = factor * b;
            out.iter_mut().zip(a).for_each(|(o, a)| *o += c * a);
        }
    }

    /// Row `row` of `ΔW` at `scale`, times `strength`; `w` is that row of the base matrix.
    pub(crate) fn row_delta(&self, row: usize, w: &[f32], scale: f32, strength: f32) -> RowDelta {
        let Some(magnitude) = self.magnitude.as_ref().and_then(|m| m.get(row)) else {
            return RowDelta { gain: 0.0, factor: strength * scale };
        };
        let b = self.b.chunks_exact(self.rank).nth(row).unwrap_or_default();
        let norm = adapted_norm(&mut w.to_vec(), scale, b, &self.a);
        let ratio = magnitude_ratio(*magnitude, norm);
        let gain = if norm > 0.0 { ratio - 1.0 } else { 0.0 };
        RowDelta { gain: strength * gain, factor: strength * ratio * scale }
    }
}
