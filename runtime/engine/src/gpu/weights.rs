//! A model's weights on a device: matrices as the quantized blocks of the file, vectors as f32.
//!
//! Matrices are packed one behind the other into buffers no larger than what a kernel can bind; one that does not fit is
//! split by rows. They go up in chunks straight from the map, so that at most a few chunks exist twice. Executors on one
//! device that use the same matrices of the same model share them: the device knows who has them, and the last one frees them.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};

use super::device::{Device, lock};
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

/// Matrices on a device, for all who use them.
#[derive(Debug)]
pub(super) struct Resident {
    /// Of which model, and which of its matrices.
    weights: Arc<Weights>,
    used: BTreeSet<WeightId>,
    buffers: Vec<wgpu::Buffer>,
}

impl Resident {
    /// What a device has of these matrices, if anybody uses them.
    fn find(all: &[Weak<Resident>], weights: &Arc<Weights>, used: &BTreeSet<WeightId>) -> Option<Arc<Resident>> {
        let is_it = |one: &Arc<Resident>| Arc::ptr_eq(&one.weights, weights) && one.used == *used;
        all.iter().filter_map(Weak::upgrade).find(is_it)
    }

    fn bytes(&self) -> u64 {
        self.buffers.iter().map(wgpu::Buffer::size).sum()
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        // Groups that bind them would keep them alive.
        self.buffers.iter().for_each(wgpu::Buffer::destroy);
    }
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Uploaded {
    device: Arc<Device>,
    weights: Arc<Weights>,
    used: BTreeSet<WeightId>,
    /// None while they are not needed here.
    resident: Option<Arc<Resident>>,
    sizes: Vec<u64>,
    pieces: Vec<Vec<Piece>>,
    /// First element of a vector among the constants.
    vectors: Vec<u32>,
    pub constants: wgpu::Buffer,
    /// First slope of ALiBi among the constants.
    pub slopes: Option<u32>,
    /// Grows whenever the buffers may be others.
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
            used: used.clone(),
            resident: None,
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

    /// Bytes of the matrices that are `used` where a device has them already for others; 0 where it has not.
    pub fn present(device: &Device, weights: &Arc<Weights>, used: &BTreeSet<WeightId>) -> u64 {
        Resident::find(&lock(&device.residents), weights, used).map_or(0, |resident| resident.bytes())
    }

    /// Does without the matrices until [`Uploaded::wake`]. Gives the bytes of their memory if that is free now, 0 if others
    /// use them.
    pub fn park(&mut self) -> u64 {
        // Nobody else takes or lets go of them meanwhile.
        let _all = lock(&self.device.residents);
        self.resident.take().and_then(Arc::into_inner).map_or(0, |resident| resident.bytes())
    }

    /// Brings the matrices up, if they are not there.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`]; they are not there then.
    pub fn wake(&mut self) -> Result<()> {
        if self.resident.is_some() {
            return Ok(());
        }
        self.device.check()?;
        // Who wants the same meanwhile waits for it.
        let mut all = lock(&self.device.residents);
        all.retain(|one| one.strong_count() > 0);
        let resident = match Resident::find(&all, &self.weights, &self.used) {
            Some(resident) => resident,
            None => {
                let resident = Arc::new(self.upload()?);
                all.push(Arc::downgrade(&resident));
                resident
            }
        };
        drop(all);
        self.resident = Some(resident);
        self.generation += 1;
        Ok(())
    }

    fn upload(&self) -> Result<Resident> {
        let (weights, used) = (self.weights.clone(), self.used.clone());
        let mut resident = Resident { weights, used, buffers: Vec::with_capacity(self.sizes.len()) };
        for bytes in &self.sizes {
            resident.buffers.push(self.device.storage(*bytes, "the weights")?);
        }
        for (id, _) in self.weights.iter() {
            for piece in &self.pieces[id.0 as usize] {
                let rows = self.weights.rows(id, piece.first..piece.first + piece.rows);
                self.device.upload(&resident.buffers[piece.buffer], u64::from(piece.at), rows)?;
            }
        }
        Ok(resident)
    }

    /// The matrices; none while they are not needed here.
    pub fn buffers(&self) -> &[wgpu::Buffer] {
        self.resident.as_ref().map_or(&[], |resident| &resident.buffers)
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
