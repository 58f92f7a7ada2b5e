//! From adapters to corrections of the model's maps: what [`Engine::set_adapters`](super::Engine::set_adapters) does.
//!
//! The entries of all adapters for one matrix become one correction, `A` below `A` and `B` beside `B`, with scales,
//! factors and (for DoRA) norms multiplied into `B`. A matrix that the model uses in parts (stacked queries, keys and
//! values) gives each part its rows.

use std::sync::Arc;

use crate::adapter::{Adapter, LowRank, RowDelta};
use crate::cpu::Correction;
use crate::quant;
use crate::tape::{WeightId, Weights};
use crate::{Error, Result};

use super::Model;

/// An adapter and the factor on it; 1 is what it was trained for.
pub type ScaledAdapter = (Arc<Adapter>, f32);

/// What [`Engine::set_adapters`](super::Engine::set_adapters) did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterReport {
    /// For each adapter, the number of matrices it corrects.
    pub tensors: Vec<usize>,
    /// Memory that all of them together take, in bytes.
    pub bytes: usize,
}

/// Whether two sets are the same adapters with the same factors, in the same order.
pub(super) fn same(a: &[ScaledAdapter], b: &[ScaledAdapter]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(&a.0, &b.0) && a.1.to_bits() == b.1.to_bits())
}

/// Checks `adapters` against `model` and gives the corrections they come to; with the number of matrices of each.
pub(super) fn corrections(model: &Model, adapters: &[ScaledAdapter]) -> Result<(Vec<usize>, Vec<Correction>)> {
    let mut counts = Vec::with_capacity(adapters.len());
    for (adapter, factor) in adapters {
        if !factor.is_finite() {
            return Err(Error::argument(format!("{}: its factor is {factor}, but a number is needed", adapter.name)));
        }
        counts.push(adapter.matches(model.gguf())?);
    }
    let weights = model.weights();
    for (adapter, _) in adapters {
        if let Some(name) =
            adapter.entries.keys().find(|name| !weights.iter().any(|(id, _)| weights.source(id).0 == *name))
        {
            return Err(Error::Unsupported(format!(
                "{}: {name} is no matrix that the model computes with",
                adapter.name
            )));
        }
    }
    let mut all = Vec::new();
    for (id, _) in weights.iter() {
        let name = weights.source(id).0;
        let entries: Vec<(&LowRank, f32, f32)> = adapters
            .iter()
            .filter(|(_, factor)| *factor != 0.0)
            .filter_map(|(adapter, factor)| adapter.entries.get(name).map(|e| (e, adapter.scale(e), *factor)))
            .collect();
        if !entries.is_empty() {
            all.push(correction(weights, id, &entries)?);
        }
    }
    Ok((counts, all))
}

/// The sum of entries (with scale and factor) for one weight.
fn correction(weights: &Weights, id: WeightId, entries: &[(&LowRank, f32, f32)]) -> Result<Correction> {
    let info = weights.get(id);
    let (_, rows) = weights.source(id);
    let rank = entries.iter().map(|(e, ..)| e.rank).sum();
    let rescaled = entries.iter().any(|(e, ..)| e.magnitude.is_some());
    let mut b = Vec::with_capacity(rank * rows.len());
    let mut gain = Vec::with_capacity(if rescaled { rows.len() } else { 0 });
    let mut row = vec![0.0; if rescaled { info.width } else { 0 }];
    let row_bytes = info.len_bytes() / info.rows.max(1);
    for (i, source_row) in rows.enumerate() {
        if rescaled {
            quant::dequantize(info.dtype, &weights.data(id)[i * row_bytes..(i + 1) * row_bytes], &mut row)?;
        }
        let mut sum = 1.0;
        for (entry, scale, factor) in entries {
            let RowDelta { gain, factor } = entry.row_delta(source_row, &row, *scale, *factor);
            sum += gain;
            b.extend(entry.b[source_row * entry.rank..][..entry.rank].iter().map(|v| factor * v));
        }
        if rescaled {
            gain.push(sum);
        }
    }
    let a: Vec<f32> = entries.iter().flat_map(|(e, ..)| e.a.iter().copied()).collect();
    // Rows of `A` that serve other parts of the matrix have nothing in the columns of this one's `B`.
    let mut used: Vec<usize> = (0..rank).filter(|r| b.iter().skip(*r).step_by(rank).any(|v| *v != 0.0)).collect();
    if used.is_empty() {
        used.push(0);
    }
    let a = used.iter().flat_map(|r| &a[r * info.width..][..info.width]).copied().collect();
    let b = b.chunks_exact(rank).flat_map(|row| used.iter().map(|r| row[*r])).collect();
    Ok(Correction { weight: id, a, b, rank: used.len(), gain: rescaled.then_some(gain) })
}
