//! Adapters at run time: low-rank corrections of linear maps, beside the weights and never in them.
//!
//! Behind a map with corrections come `h = x·Aᵀ`, one product for all parts of the map that share `x`, and `out += h·Bᵀ` for
//! each of them. What decoding does on the way (the norm before, the gate behind) is then a dispatch of its own. Ranks are
//! filled up with zeros to multiples of eight, so that everything is read by four.

use bytemuck::Zeroable;

use super::kernel::Kernel;
use super::record::{Depth, Grid, MatmulOp, NONE, Recorder, rows_word};
use crate::tape::{Linear, Op, Tape, WeightId};
use crate::{Error, Result};

/// A correction of one matrix of the model.
#[derive(Clone, Copy, Debug)]
pub struct Correction<'a> {
    /// The matrix, `[rows, width]`.
    pub weight: WeightId,
    /// Rows of `a`.
    pub rank: usize,
    /// `[rank, width]`.
    pub a: &'a [f32],
    /// `[rows, rank]`, all scales in it.
    pub b: &'a [f32],
}

/// Where a correction lies: elements of the parameters, and of a row of `h`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    weight: WeightId,
    /// The `A`s of all parts of the map, one below the other, and their rows.
    a: u32,
    total: u32,
    /// This part's first element of `h`, its elements, and its `B`.
    hidden: u32,
    rank: u32,
    b: u32,
}

/// The parameters for `corrections`, where each of them lies, and the longest row of `h`.
///
/// # Errors
/// A correction of a matrix that is no part of a linear map of the tape.
pub(super) fn place(tape: &Tape, corrections: &[Correction<'_>]) -> Result<(Vec<f32>, Vec<Placed>, usize)> {
    let (mut values, mut placed, mut longest) = (Vec::new(), Vec::new(), 0);
    for op in &tape.ops {
        let Op::Linear(l) = op else { continue };
        let find = |id: WeightId| corrections.iter().find(|c| c.weight == id);
        let mine: Vec<&Correction<'_>> = l.parts.iter().filter_map(|p| find(p.weight)).collect();
        let (a, first) = (values.len(), placed.len());
        let mut total = 0;
        for c in &mine {
            let rank = c.rank.next_multiple_of(8);
            values.extend_from_slice(c.a);
            values.resize(values.len() + (rank - c.rank) * (c.a.len() / c.rank), 0.0);
            placed.push(Placed {
                weight: c.weight,
                a: a as u32,
                total: 0,
                hidden: total as u32,
                rank: rank as u32,
                b: 0,
            });
            total += rank;
        }
        for (c, to) in mine.iter().zip(&mut placed[first..]) {
            (to.total, to.b) = (total as u32, values.len() as u32);
            for row in c.b.chunks_exact(c.rank) {
                values.extend_from_slice(row);
                values.resize(values.len() + to.rank as usize - c.rank, 0.0);
            }
        }
        longest = longest.max(total);
    }
    match corrections.iter().find(|c| !placed.iter().any(|p| p.weight == c.weight)) {
        Some(_) => Err(Error::Unsupported(
            "adapters of the embedding or the head at run time on the GPU; merge the adapter into the model, or use the CPU"
                .into(),
        )),
        None => Ok((values, placed, longest)),
    }
}

impl Recorder<'_> {
    /// The correction of a matrix.
    fn correction(&self, weight: WeightId) -> Option<Placed> {
        self.corrections.iter().find(|p| p.weight == weight).copied()
    }

    /// Whether a part of a map has a correction.
    pub(super) fn corrected(&self, l: &Linear) -> bool {
        l.parts.iter().any(|p| self.correction(p.weight).is_some())
    }

    /// Adds the corrections of a map to its results.
    pub(super) fn correct(&mut self, l: &Linear) -> Result<()> {
        let Some(first) = l.parts.iter().find_map(|p| self.correction(p.weight)) else { return Ok(()) };
        let (rows, width) = (self.rows(l.x), self.width(l.x));
        let hidden = self.scratch.hidden;
        let product = MatmulOp {
            x: self.at(l.x),
            x_stride: width,
            rows: rows_word(rows),
            k: width,
            weight: first.a,
            row_bytes: width,
            columns: first.total,
            out: hidden,
            out_stride: first.total,
            bias: NONE,
            residual: NONE,
            scale: 1.0,
            ..MatmulOp::zeroed()
        };
        let grid = Grid { x: first.total / 8, z: Depth::Rows(rows, 8) };
        let kernel = Kernel::LoraNarrow { turned: false, fours: true };
        self.push(kernel, (0, 0), grid, &product, (0, u64::from(width + first.total)))?;
        for part in &l.parts {
            let Some(c) = self.correction(part.weight) else { continue };
            let columns = self.width(part.out);
            let out = self.at(part.out);
            let op = MatmulOp {
                x: hidden + c.hidden,
                x_stride: c.total,
                k: c.rank,
                weight: c.b,
                row_bytes: c.rank,
                columns,
                out,
                out_stride: columns,
                residual: out,
                ..product
            };
            let grid = Grid { x: columns.div_ceil(256), z: Depth::Rows(rows, 8) };
            let kernel = Kernel::LoraWide { turned: false, fours: true };
            self.push(kernel, (0, 0), grid, &op, (0, u64::from(c.rank + 2 * columns)))?;
        }
        Ok(())
    }
}
