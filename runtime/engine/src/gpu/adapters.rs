//! Adapters at run time: low-rank corrections of linear maps, beside the weights and never in them.
//!
//! Behind a map with corrections come `h = x·Aᵀ`, one product for all parts of the map that share `x`, and `out += h·Bᵀ` for
//! each of them. What decoding does on the way (the norm before, the gate behind) is then a dispatch of its own. Ranks are
//! filled up with zeros to multiples of eight, so that everything is read by four. Where rows of the matrix are rescaled (DoRA),
//! its product waits in scratch for bias and residual. The embedding's `h` are rows of `B` by token.

use bytemuck::Zeroable;

use super::backward::{Factor, parameter_product};
use super::forward::row_grid;
use super::kernel::Kernel;
use super::learned::RescaleOp;
use super::record::{Depth, Grid, MatmulOp, NONE, Recorder, rows_word};
use crate::tape::{Linear, Op, Part, Rows, Tape, Value, WeightId};
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
    /// Factors on the rows of the matrix itself, `[rows]`.
    pub gain: Option<&'a [f32]>,
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
    /// The first factor on rows, or [`NONE`].
    gain: u32,
}

/// The parameters for `corrections`, where each of them lies, and the longest row of `h`.
///
/// # Errors
/// A correction of a matrix that no op of the tape multiplies with, factors on rows of the embedding.
pub(super) fn place(tape: &Tape, corrections: &[Correction<'_>]) -> Result<(Vec<f32>, Vec<Placed>, usize)> {
    let (mut values, mut placed, mut longest) = (Vec::new(), Vec::new(), 0);
    let fill = |values: &mut Vec<f32>| values.resize(values.len().next_multiple_of(8), 0.0);
    for op in &tape.ops {
        let (parts, adds) = match op {
            Op::Embed { table, .. } => (vec![*table], false),
            Op::Linear(l) => (l.parts.iter().map(|p| p.weight).collect(), true),
            // Where the head is the embedding's matrix, the correction is the embedding's.
            Op::Head { weight, .. } if embedding(tape) != Some(*weight) => (vec![*weight], false),
            _ => continue,
        };
        let find = |id: &WeightId| corrections.iter().find(|c| c.weight == *id);
        let mine: Vec<&Correction<'_>> = parts.iter().filter_map(find).collect();
        if matches!(op, Op::Embed { .. }) && mine.iter().any(|c| c.gain.is_some()) {
            return Err(Error::Unsupported(
                "learned lengths (DoRA) of the embedding on the GPU; merge the adapter into the model, or use the CPU"
                    .into(),
            ));
        }
        let (a, first) = (values.len(), placed.len());
        let (mut total, mut widest) = (0, 0);
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
                gain: NONE,
            });
            total += rank;
        }
        for (c, to) in mine.iter().zip(&mut placed[first..]) {
            (to.total, to.b) = (total as u32, values.len() as u32);
            for row in c.b.chunks_exact(c.rank) {
                values.extend_from_slice(row);
                values.resize(values.len() + to.rank as usize - c.rank, 0.0);
            }
            // Columns are written by four.
            let rows = c.b.len() / c.rank;
            values.resize(values.len() + (rows.next_multiple_of(4) - rows) * to.rank as usize, 0.0);
            if let Some(gain) = c.gain {
                to.gain = values.len() as u32;
                values.extend_from_slice(gain);
                fill(&mut values);
                widest = widest.max(if adds { gain.len() } else { 0 });
            }
        }
        longest = longest.max(total + widest);
    }
    match corrections.iter().find(|c| !placed.iter().any(|p| p.weight == c.weight)) {
        Some(_) => Err(Error::Unsupported("an adapter of a matrix that the model does not multiply with".into())),
        None => Ok((values, placed, longest)),
    }
}

/// The matrix that tokens are looked up in.
fn embedding(tape: &Tape) -> Option<WeightId> {
    tape.ops.iter().find_map(|op| match op {
        Op::Embed { table, .. } => Some(*table),
        _ => None,
    })
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

    /// Whether rows of a matrix are rescaled.
    pub(super) fn gained(&self, weight: WeightId) -> bool {
        self.correction(weight).is_some_and(|c| c.gain != NONE)
    }

    /// The correction of the head.
    pub(super) fn head_correction(&self, weight: WeightId) -> Option<Placed> {
        self.correction(weight).filter(|_| embedding(self.tape) != Some(weight))
    }

    /// Where the product of a matrix waits whose rows are rescaled: behind the rows of `h`.
    pub(super) fn apart(&self, weight: WeightId) -> u32 {
        let rows = self.plan.limits.tokens.max(self.plan.limits.outputs) as u32;
        self.scratch.hidden + rows * self.correction(weight).map_or(0, |c| c.total)
    }

    /// `out = gain ∘ product + bias + residual` of a part of a map, whose product lies apart.
    pub(super) fn gain(&mut self, part: &Part, residual: u32) {
        let Some(c) = self.correction(part.weight) else { return };
        let width = self.width(part.out);
        let op = RescaleOp {
            y: self.apart(part.weight),
            width,
            stride: width,
            out: self.at(part.out),
            magnitude: c.gain,
            norms: NONE,
            bias: part.bias.map_or(NONE, |b| self.vector(b)),
            residual,
            cap: 0.0,
            unused: [0; 3],
        };
        self.push_rescale(&op, self.rows(part.out));
    }

    /// Adds the corrections of a map to its results.
    pub(super) fn correct(&mut self, l: &Linear) {
        let Some(first) = l.parts.iter().find_map(|p| self.correction(p.weight)) else { return };
        self.hidden(self.factor(l.x), first);
        for part in &l.parts {
            let Some(c) = self.correction(part.weight) else { continue };
            let out = self.factor(part.out);
            self.add(c, out.rows, (c.hidden, c.total), (c.b, c.rank), false, 1.0, out);
        }
    }

    /// Adds the correction of the embedding to the rows of the run's tokens.
    pub(super) fn correct_embedding(&mut self, table: WeightId, scale: f32, out: Value) {
        let Some(c) = self.correction(table) else { return };
        let out = self.factor(out);
        let gather = [c.b, c.rank, self.scratch.hidden, 0];
        self.push(Kernel::GatherParams, (0, 0), row_grid(1, out.rows), &gather, (0, u64::from(c.rank)));
        self.add(c, out.rows, (0, c.rank), (c.a, out.width), true, scale, out);
    }

    /// Rescales logits that are not capped yet, adds the head's correction to them, and caps them.
    pub(super) fn correct_head(&mut self, x: Value, c: Placed, out: Value, cap: f32) {
        let out = self.factor(out);
        let logits = RescaleOp {
            y: out.at,
            width: self.spec.vocab as u32,
            stride: out.stride,
            out: out.at,
            magnitude: c.gain,
            norms: NONE,
            bias: NONE,
            residual: NONE,
            cap: 0.0,
            unused: [0; 3],
        };
        if c.gain != NONE {
            self.push_rescale(&logits, out.rows);
        }
        self.hidden(self.factor(x), c);
        self.add(c, out.rows, (0, c.total), (c.b, c.rank), false, 1.0, out);
        if cap > 0.0 {
            self.push_rescale(&RescaleOp { magnitude: NONE, cap, ..logits }, out.rows);
        }
    }

    /// `h = x·Aᵀ` of all parts that share `x`, into scratch.
    fn hidden(&mut self, x: Factor, first: Placed) {
        let product = MatmulOp {
            x: x.at,
            x_stride: x.stride,
            rows: rows_word(x.rows),
            k: x.width,
            weight: first.a,
            row_bytes: x.width,
            columns: first.total,
            out: self.scratch.hidden,
            out_stride: first.total,
            bias: NONE,
            residual: NONE,
            scale: 1.0,
            ..MatmulOp::zeroed()
        };
        let grid = Grid { x: first.total / 8, z: Depth::Rows(x.rows, 8) };
        let kernel = Kernel::LoraNarrow { turned: false, fours: true };
        self.push(kernel, (0, 0), grid, &product, (0, u64::from(x.width + first.total)));
    }

    /// `out += scale·h·Pᵀ`, or with `turned` `scale·h·P`, with `h` a part of the rows in scratch, by its first element and how far
    /// rows are apart, and `P` a parameter by its first element and its width.
    #[allow(clippy::too_many_arguments)]
    fn add(
        &mut self,
        c: Placed,
        rows: Rows,
        (hidden, stride): (u32, u32),
        weight: (u32, u32),
        turned: bool,
        scale: f32,
        out: Factor,
    ) {
        let x = Factor { at: self.scratch.hidden + hidden, stride, rows, width: c.rank };
        let op = parameter_product(x, weight, scale, out.at, out);
        let grid = Grid { x: out.width.div_ceil(256), z: Depth::Rows(rows, 8) };
        let kernel = Kernel::LoraWide { turned, fours: true };
        self.push(kernel, (0, 0), grid, &op, (0, u64::from(c.rank + 2 * out.width)));
    }
}
