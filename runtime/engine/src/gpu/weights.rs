//! A model's weights on a device: matrices as the quantized blocks of the file, vectors as f32.
//!
//! Matrices are packed one behind the other into buffers no larger than what a kernel can bind; one that does not fit is
//! split by rows. They go up in chunks straight from the map, so that at most a few chunks exist twice.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::device::Device;
use crate::tape::{Spec, WeightId, Weights};
use crate::{Error, Result};

/// Between matrices, and behind the last for reads of whole words.
const ALIGN: u64 = 16;
/// Rows that stay together when a matrix is split: what a kernel writes at once.
const UNIT: usize = 4;

/// Rows of a matrix that lie in one buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub buffer: usize,
    /// Byte address of its first row.
    pub at: u32,
    pub first: usize,
    pub rows: usize,
    pub row_bytes: u32,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Uploaded {
    device: Arc<Device>,
    weights: Arc<Weights>,
    /// None while their memory is given back.
    pub buffers: Vec<wgpu::Buffer>,
    sizes: Vec<u64>,
    pieces: Vec<Vec<Piece>>,
    /// First element of a vector among the constants.
    vectors: Vec<u32>,
    pub constants: wgpu::Buffer,
    /// First slope of ALiBi among the constants.
    pub slopes: Option<u32>,
    /// Grows whenever the buffers are replaced.
    pub generation: u64,
}

impl Uploaded {
    /// Brings all vectors up, and of the matrices those that are `used`.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`], rows that no buffer holds.
    pub fn new(
        device: &Arc<Device>,
        spec: &Spec,
        weights: &Arc<Weights>,
        used: &BTreeSet<WeightId>,
    ) -> Result<Uploaded> {
        let (mut sizes, pieces) = divide(weights, used, device.binding_bytes)?;
        if sizes.is_empty() {
            // Something to bind.
            sizes.push(ALIGN);
        }
        let mut constants = Vec::new();
        let mut vectors = Vec::new();
        for (_, weight) in weights.iter() {
            vectors.push(constants.len() as u32);
            constants.extend_from_slice(weight.vector());
            constants.resize(constants.len().next_multiple_of(ALIGN as usize), 0.0);
        }
        let slopes = spec.alibi.as_ref().map(|slopes| {
            let at = constants.len() as u32;
            constants.extend_from_slice(slopes);
            at
        });
        constants.resize(constants.len().next_multiple_of(ALIGN as usize), 0.0);
        let buffer = device.storage(4 * constants.len() as u64, "norms and biases")?;
        device.upload(&buffer, 0, bytemuck::cast_slice(&constants))?;
        let mut uploaded = Uploaded {
            device: device.clone(),
            weights: weights.clone(),
            buffers: Vec::new(),
            sizes,
            pieces,
            vectors,
            constants: buffer,
            slopes,
            generation: 0,
        };
        uploaded.wake()?;
        Ok(uploaded)
    }

    /// Bytes that the weights come to take.
    ///
    /// # Errors
    /// Rows that no buffer holds.
    pub fn needs(device: &Device, weights: &Weights, used: &BTreeSet<WeightId>) -> Result<u64> {
        let (sizes, _) = divide(weights, used, device.binding_bytes)?;
        let vector = |len: usize| 4 * (len.next_multiple_of(ALIGN as usize)) as u64;
        Ok(sizes.iter().sum::<u64>() + weights.iter().map(|(_, w)| vector(w.vector().len())).sum::<u64>())
    }

    /// Gives the memory of the matrices back until [`Uploaded::wake`]. Gives its bytes.
    pub fn park(&mut self) -> u64 {
        let bytes = self.buffers.iter().map(wgpu::Buffer::size).sum();
        self.buffers.drain(..).for_each(|buffer| buffer.destroy());
        bytes
    }

    /// Brings the matrices up, if they are not there.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`]; they are not there then.
    pub fn wake(&mut self) -> Result<()> {
        if !self.buffers.is_empty() {
            return Ok(());
        }
        let allocate = |bytes: &u64| self.device.storage(*bytes, "the weights");
        let buffers = self.sizes.iter().map(allocate).collect::<Result<Vec<wgpu::Buffer>>>()?;
        for (id, _) in self.weights.iter() {
            for piece in &self.pieces[id.0 as usize] {
                let rows = self.weights.rows(id, piece.first..piece.first + piece.rows);
                self.device.upload(&buffers[piece.buffer], u64::from(piece.at), rows)?;
            }
        }
        self.buffers = buffers;
        self.generation += 1;
        Ok(())
    }

    /// Where a matrix lies.
    pub fn pieces(&self, id: WeightId) -> &[Piece] {
        &self.pieces[id.0 as usize]
    }

    /// First element of a vector among the constants.
    pub fn vector(&self, id: WeightId) -> u32 {
        self.vectors[id.0 as usize]
    }
}

/// Sizes of the buffers, and the pieces of every matrix that is `used`.
fn divide(weights: &Weights, used: &BTreeSet<WeightId>, limit: u64) -> Result<(Vec<u64>, Vec<Vec<Piece>>)> {
    let mut sizes: Vec<u64> = Vec::new();
    let mut pieces = Vec::new();
    for (id, weight) in weights.iter() {
        let mut mine = Vec::new();
        if used.contains(&id) {
            let row_bytes = (weight.len_bytes() / weight.rows.max(1)) as u64;
            let fits = |end: u64| ((limit.saturating_sub(end + ALIGN)) / row_bytes) as usize;
            let mut first = 0;
            while first < weight.rows {
                let left = weight.rows - first;
                let room = sizes.last().map_or(0, |end| fits(*end));
                let rows = match room >= left {
                    true => left,
                    false => {
                        sizes.push(0);
                        left.min(fits(0) / UNIT * UNIT)
                    }
                };
                let (buffer, Some(end)) = (sizes.len() - 1, sizes.last_mut()) else { unreachable!() };
                if rows == 0 {
                    return Err(Error::Unsupported(format!(
                        "{} rows of {row_bytes} bytes of {} do not fit into a buffer of {limit} bytes of the GPU; use the CPU",
                        UNIT, weight.name
                    )));
                }
                mine.push(Piece { buffer, at: *end as u32, first, rows, row_bytes: row_bytes as u32 });
                *end = (*end + rows as u64 * row_bytes).next_multiple_of(ALIGN);
                first += rows;
            }
        }
        pieces.push(mine);
    }
    if sizes.is_empty() {
        sizes.push(ALIGN);
    }
    Ok((sizes.iter().map(|s| s + ALIGN).collect(), pieces))
}
