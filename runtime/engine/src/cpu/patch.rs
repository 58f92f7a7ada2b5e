//! Low-rank corrections of linear maps while they run: the weights stay as they are in the file.
//!
//! A map with corrections is done in two steps around its usual kernel: all threads first compute `h = x·Aᵀ`, each some
//! rows of `A`, where the `A` of all corrections of all matrices that share the input lie in one matrix; after a barrier (or
//! without, where each has computed all of a small `h`) each adds `h·Bᵀ` to the columns it has just computed. Any number of corrections of one matrix are one correction whose
//! rank is the sum of theirs, their factors being multiplied into `B`.
//!
//! A *gain* `g` makes `y = g ∘ (x·Wᵀ)` of the base's share first, for corrections that rescale rows of `W`.
//!
//! Copies are as fine as the base: f32, f16, 8-bit integers beside quantized weights, 4 bits beside those of five or fewer. A
//! correction of rank 16 is then one to three per cent of the base's bytes.

use std::ops::Range;

use super::buffer::{ALIGN, Buffer, Shelf, Table};
use super::isa::Isa;
use super::kernels::linear;
use super::kernels::lora::hidden::{self, Rows, hidden};
use super::kernels::lora::{self, Precision, Tiles, fits_f16, nibbles};
use crate::quant::{self, DType};
use crate::tape::{Op, Tape, WeightId, Weights};
use crate::{Error, Result};

/// Bytes of `A` up to which each thread computes all of `h` for itself, if for one token: it takes less time than threads take to
/// meet.
const ALONE: usize = 16 << 10;
/// Columns of a map with a gain and a residual that are computed apart at a time.
pub(super) const GAIN_COLUMNS: usize = 64;

/// Corrections of one matrix, added up.
#[derive(Clone, Debug)]
pub struct Correction {
    /// The matrix, `[out, in]`.
    pub weight: WeightId,
    /// `[r, in]`.
    pub a: Vec<f32>,
    /// `[out, r]`, factors multiplied in.
    pub b: Vec<f32>,
    /// `r`.
    pub rank: usize,
    /// `[out]`.
    pub gain: Option<Vec<f32>>,
}

/// `A`.
#[derive(Debug)]
enum FirstHalf {
    /// As the linear kernels read it.
    Dense(DType, Table<u8>),
    Bytes(Rows),
    Nibbles(nibbles::Rows),
}

/// Corrections of the matrices of one op.
#[derive(Debug)]
pub(super) struct Patch {
    a: FirstHalf,
    inputs: usize,
    /// Rows of `A`: the ranks of all parts.
    pub rank: usize,
    /// By part; `None` for those without a correction.
    pub parts: Vec<Option<PartPatch>>,
    /// The first matrix of the next op that has a patch.
    next: Option<WeightId>,
}

/// What is added to one matrix's results.
#[derive(Debug)]
pub(super) struct PartPatch {
    /// Its share of `h`.
    pub hidden: Range<usize>,
    pub tiles: Tiles,
    pub gain: Option<Vec<f32>>,
}

/// What is added to the embedded tokens: `out[t] = gain[t]·E[t] + B[t]·A`.
#[derive(Debug)]
pub(super) struct EmbeddingPatch {
    pub rank: usize,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub gain: Option<Vec<f32>>,
}

/// All corrections in force, and the memory they are applied in.
#[derive(Debug)]
pub struct Patches {
    /// By the id of an op's first matrix.
    ops: Vec<Option<Patch>>,
    pub(super) embedding: Option<EmbeddingPatch>,
    /// `h` of the op at hand, `[tokens][rank]`, or each thread's own, `[threads][rank]`, with whole lines for each.
    hidden: Buffer,
    /// Most values of a token's `h`, in whole lines.
    stride: usize,
    /// For each thread, `[tokens][GAIN_COLUMNS]`; empty without gains on maps that add to a residual.
    apart: Buffer,
    tokens: usize,
}

impl Patches {
    /// Prepares corrections for the ops of `tape`, for runs of at most `tokens` rows on `threads` threads; `exact` keeps them
    /// in 32 bits.
    ///
    /// # Errors
    /// A matrix that no op multiplies with, [`Error::Memory`].
    pub(super) fn new(
        mut corrections: Vec<Correction>,
        tape: &Tape,
        weights: &Weights,
        tokens: usize,
        threads: usize,
        exact: bool,
    ) -> Result<Patches> {
        let kept = |weight: WeightId| if exact { Precision::Single } else { precision(weights.get(weight).dtype) };
        let sizes = corrections.iter().map(|c| {
            let (info, precision) = (weights.get(c.weight), kept(c.weight));
            FirstHalf::size(c.rank, info.width, precision) + Tiles::size(info.rows, c.rank, precision) + 2 * ALIGN
        });
        let mut shelf = Shelf::new(sizes.sum(), "the adapters' copies")?;
        let mut ops: Vec<Option<Patch>> = Vec::new();
        ops.resize_with(weights.iter().count(), || None);
        let mut embedding = None;
        let mut last: Option<WeightId> = None;
        let mut take = |weight: WeightId| {
            corrections.iter().position(|c| c.weight == weight).map(|at| corrections.swap_remove(at))
        };
        for op in &tape.ops {
            let parts: Vec<WeightId> = match op {
                Op::Embed { table, .. } => {
                    // Where the head is the same matrix, the correction is the embedding's: the head stays as it is.
                    embedding = take(*table).map(|c| EmbeddingPatch { rank: c.rank, a: c.a, b: c.b, gain: c.gain });
                    continue;
                }
                Op::Linear(linear) => linear.parts.iter().map(|p| p.weight).collect(),
                Op::Head { weight, .. } | Op::CrossEntropy { weight, .. } => vec![*weight],
                _ => continue,
            };
            let found: Vec<Option<Correction>> = parts.iter().map(|w| take(*w)).collect();
            if let (Some(first), true) = (parts.first(), found.iter().any(Option::is_some)) {
                ops[first.0 as usize] = Some(Patch::new(found, weights.get(*first).width, kept(*first), &mut shelf)?);
                if let Some(last) = last.replace(*first).and_then(|last| ops[last.0 as usize].as_mut()) {
                    last.next = Some(*first);
                }
            }
        }
        if let Some(left) = corrections.first() {
            let name = &weights.get(left.weight).name;
            return Err(Error::Unsupported(format!("an adapter corrects {name}, which no linear map of the model is")));
        }
        let rank = ops.iter().flatten().map(|p| p.rank).max().unwrap_or(0);
        let stride = rank.next_multiple_of(ALIGN / 4);
        let gains = ops.iter().flatten().flat_map(|p| p.parts.iter().flatten()).any(|p| p.gain.is_some());
        let apart = if gains { threads * tokens * GAIN_COLUMNS * 4 } else { 0 };
        Ok(Patches {
            ops,
            embedding,
            hidden: Buffer::new(tokens.max(threads) * stride * 4, "the adapters' hidden values")?,
            stride,
            apart: Buffer::new(apart, "the adapters' scratch")?,
            tokens,
        })
    }

    /// Bytes of all copies and of the memory they are applied in.
    pub fn bytes(&self) -> usize {
        let part = |p: &PartPatch| p.tiles.bytes() + p.gain.as_ref().map_or(0, |g| g.len() * 4);
        let op = |p: &Patch| p.a.bytes().len() + p.parts.iter().flatten().map(part).sum::<usize>();
        let embedding = self.embedding.as_ref().map_or(0, |e| (e.a.len() + e.b.len()) * 4);
        self.ops.iter().flatten().map(op).sum::<usize>() + embedding + self.hidden.len() + self.apart.len()
    }

    /// The patch of the op whose first matrix is `weight`.
    pub(super) fn get(&self, weight: WeightId) -> Option<&Patch> {
        self.ops.get(weight.0 as usize).and_then(Option::as_ref)
    }

    /// The patch that is applied after this one.
    pub(super) fn after(&self, patch: &Patch) -> Option<&Patch> {
        patch.next.and_then(|weight| self.get(weight))
    }

    /// Where `h` lies, or a thread's own.
    pub(super) fn hidden(&self, own: Option<usize>) -> *mut f32 {
        // SAFETY: there is a row for each thread.
        unsafe { self.hidden.as_ptr().cast::<f32>().add(own.unwrap_or(0) * self.stride) }
    }

    /// A thread's `[tokens][GAIN_COLUMNS]`.
    pub(super) fn apart(&self, thread: usize) -> *mut f32 {
        // SAFETY: the buffer has one such block for each thread, if any map has a gain.
        unsafe { self.apart.as_ptr().cast::<f32>().add(thread * self.tokens * GAIN_COLUMNS) }
    }
}

impl Patch {
    /// Copies lie on the shelf in the order in which they are read.
    fn new(parts: Vec<Option<Correction>>, inputs: usize, precision: Precision, shelf: &mut Shelf) -> Result<Patch> {
        let rank = parts.iter().flatten().map(|c| c.rank).sum();
        let all_a: Vec<f32> = parts.iter().flatten().flat_map(|c| c.a.iter().copied()).collect();
        let a = FirstHalf::new(&all_a, inputs, precision, shelf)?;
        let mut start = 0;
        let mut part = |c: Correction| {
            let hidden = start..start + c.rank;
            start = hidden.end;
            Ok(PartPatch { hidden, tiles: Tiles::new(&c.b, c.rank, precision, shelf)?, gain: c.gain })
        };
        let parts = parts.into_iter().map(|c| c.map(&mut part).transpose()).collect::<Result<_>>()?;
        Ok(Patch { a, inputs, rank, parts, next: None })
    }

    /// Whether each thread computes `h` for itself when there are `tokens` of them; else they divide its rows and meet.
    pub fn is_alone(&self, tokens: usize) -> bool {
        tokens == 1 && self.a.bytes().len() <= ALONE
    }

    /// Rows of `A` that lie together, which threads do not divide.
    pub fn row_unit(&self) -> usize {
        match &self.a {
            FirstHalf::Nibbles(_) => nibbles::ROWS,
            FirstHalf::Bytes(_) | FirstHalf::Dense(..) => hidden::ROWS,
        }
    }

    /// Asks for some rows of `A`, as for [`Patch::first_half`].
    pub fn prefetch(&self, rows: Range<usize>) {
        let (bytes, unit) = (self.a.bytes(), self.row_unit());
        let tile = bytes.len() / self.rank.div_ceil(unit).max(1);
        lora::prefetch(bytes.get(rows.start / unit * tile..rows.end.div_ceil(unit) * tile).unwrap_or_default());
    }

    /// `h = x·Aᵀ` for some of its rows, which begin at a multiple of [`Patch::row_unit`], into `[tokens][rank]` at `out`.
    ///
    /// # Safety
    /// `out` is valid for all tokens; this thread alone uses those rows.
    ///
    /// # Errors
    /// None for activations of the map's input.
    pub unsafe fn first_half(
        &self,
        isa: Isa,
        rows: Range<usize>,
        x: &linear::Activations<'_>,
        out: *mut f32,
        scratch: &mut linear::Scratch,
    ) -> Result<()> {
        let q8 = || {
            let missing = || Error::argument("the input of an adapter in few bits is not there in 8 bits");
            x.q8.as_ref().ok_or_else(missing)
        };
        // SAFETY: by the caller's promise.
        unsafe {
            match &self.a {
                FirstHalf::Dense(dtype, bytes) => {
                    let out = linear::OutMut::new(out, self.rank, x.tokens * self.rank);
                    let (dtype, k) = (*dtype, self.inputs);
                    let task = linear::LinearTask { dtype, weight: bytes, k, rows, x, out, accumulate: false };
                    linear::linear(isa, &task, scratch)?;
                }
                FirstHalf::Bytes(a) => hidden(isa, a, q8()?, rows, out, self.rank),
                FirstHalf::Nibbles(a) => nibbles::hidden(isa, a, q8()?, rows, out, self.rank),
            }
        }
        Ok(())
    }
}

impl FirstHalf {
    /// Rows of `width` values, put on a shelf; as f32 where they are out of f16's range.
    fn new(values: &[f32], width: usize, precision: Precision, shelf: &mut Shelf) -> Result<FirstHalf> {
        let dtype = match precision {
            _ if !fits_f16(values) => DType::F32,
            Precision::Single => DType::F32,
            // Quantized weights have whole groups.
            Precision::Byte => return Ok(FirstHalf::Bytes(Rows::new(values, width, shelf)?)),
            Precision::Nibble => return Ok(FirstHalf::Nibbles(nibbles::Rows::new(values, width, shelf)?)),
            Precision::Half => DType::F16,
        };
        Ok(FirstHalf::Dense(dtype, shelf.put(&quant::quantize(dtype, values)?)?))
    }

    /// Bytes that `rank` rows of `width` values take.
    fn size(rank: usize, width: usize, precision: Precision) -> usize {
        match precision {
            Precision::Single => 4 * rank * width,
            Precision::Half => 2 * rank * width,
            Precision::Byte => Rows::size(rank, width),
            Precision::Nibble => nibbles::Rows::size(rank, width),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            FirstHalf::Dense(_, bytes) => bytes,
            FirstHalf::Bytes(rows) => rows.bytes(),
            FirstHalf::Nibbles(rows) => rows.bytes(),
        }
    }
}

/// How the copies of a correction of weights of type `dtype` are kept.
fn precision(dtype: DType) -> Precision {
    match dtype {
        DType::F32 => Precision::Single,
        DType::F16 | DType::BF16 => Precision::Half,
        _ if dtype.bits_per_weight() <= 5.0 => Precision::Nibble,
        _ => Precision::Byte,
    }
}
