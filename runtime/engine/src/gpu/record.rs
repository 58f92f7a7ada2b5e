//! A recorded tape: dispatches in order, each with its pipeline, its description and what it binds.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::adapters::Placed;
use super::device::{Device, SLOT};
use super::division::Heads;
use super::kernel::Kernel;
use super::weights::Uploaded;
use crate::Result;
use crate::quant::DType;
use crate::tape::{Plan, Rows, Spec, Tape, Value, Weights};

/// An absent offset, as the kernels know it.
pub(super) const NONE: u32 = u32::MAX;
/// Workgroups along one dimension; more fold into the next.
const FOLD: u32 = 32_768;

/// Workgroups behind one another.
#[derive(Clone, Copy, Debug)]
pub(super) enum Depth {
    /// As many.
    Fixed(u32),
    /// Those of a run's rows, of which a workgroup does as many.
    Rows(Rows, u32),
}

/// How many workgroups a dispatch has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    /// Side by side, whatever they are to the kernel.
    pub x: u32,
    pub z: Depth,
}

impl Grid {
    /// Workgroups in three dimensions for a run of so many rows of each kind.
    pub fn size(&self, rows: impl Fn(Rows) -> usize) -> [u32; 3] {
        let z = match self.z {
            Depth::Fixed(z) => z,
            Depth::Rows(kind, per) => (rows(kind) as u32).div_ceil(per),
        };
        match self.x {
            x if x <= FOLD => [x, 1, z],
            x => [FOLD, x.div_ceil(FOLD), z],
        }
    }
}

/// One dispatch.
#[derive(Debug)]
pub(super) struct Dispatch {
    /// The op it belongs to, for tables.
    pub op: &'static str,
    /// Index into the recording's pipelines.
    pub pipeline: usize,
    /// Index into its bind groups.
    pub group: usize,
    /// Offset of its description.
    pub slot: u32,
    pub grid: Grid,
    /// Bytes of weights it reads.
    pub weight_bytes: u64,
    /// Floats of the arena it reads and writes per row.
    pub floats: u64,
    /// Of attention, which can be divided by them.
    pub heads: Option<Heads>,
}

/// What a bind group depends on: the buffer of weights, and the layer whose cache is touched.
pub(super) type Binds = (usize, usize);

/// How rows are decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Decoding {
    /// At most this many rows, each of a sequence of its own.
    pub rows: u32,
    /// In how many parts a head's attention is computed.
    pub splits: u32,
    /// How many of the largest logits of each row are found; 0 for none, where all are read.
    pub largest: u32,
}

/// What a recorder has collected: dispatches, their descriptions, the kernels and what is bound that they are indices of.
pub(super) struct Recorded {
    pub dispatches: Vec<Dispatch>,
    pub slots: Vec<u8>,
    pub kernels: Vec<Kernel>,
    pub binds: Vec<Binds>,
}

/// Collects dispatches.
pub(super) struct Recorder<'a> {
    pub device: &'a Arc<Device>,
    pub spec: &'a Spec,
    pub tape: &'a Tape,
    pub plan: &'a Plan,
    pub weights: &'a Weights,
    pub uploaded: &'a Uploaded,
    /// Type of keys and values in the cache.
    pub kv_type: DType,
    /// Whether products are to be those of single precision.
    pub exact: bool,
    /// Kernels for decoding, and how they are to be.
    pub decoding: Option<Decoding>,
    /// Of maps, by adapters at run time.
    pub corrections: &'a [Placed],
    /// Behind the values: a chunk of logits, states of the cross-entropy, gradients by query head.
    pub scratch: Scratch,
    pub dispatches: Vec<Dispatch>,
    pub slots: Vec<u8>,
    pub kernels: Vec<Kernel>,
    pub binds: Vec<Binds>,
    /// The op whose dispatches come, for tables.
    pub op: &'static str,
}

/// Where packed rows lie, in vectors of four, and their scales, in the arena.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PackedRows {
    pub at: u32,
    pub scales: u32,
}

impl PackedRows {
    /// Where quantized rows lie in their place, in vectors of four words.
    pub fn blocks(self) -> u32 {
        self.at / 2
    }
}

/// Places in the arena behind the values, in floats.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Scratch {
    pub logits: u32,
    pub states: u32,
    pub delta: u32,
    /// Parts of heads in decoding.
    pub parts: u32,
    /// The largest logits of decoded rows, and behind them those of chunks.
    pub largest: u32,
    /// Rows packed for cooperative matrices: those of values, and those of chunks of logits.
    pub packed: [PackedRows; 2],
    /// End of the packed rows, in vectors of four.
    pub packed_end: u32,
    /// A chunk of logits before the head's lengths and its soft cap; factors on rows of a norm; gradients of heads, turned
    /// back; rows of the embedding's adapter by token.
    pub raw: u32,
    pub rho: u32,
    pub turned: u32,
    pub gathered: u32,
    /// In how many slices gradients are summed.
    pub slices: u32,
    /// What adapters at run time make of rows, behind all else.
    pub hidden: u32,
    /// End of the arena.
    pub end: u64,
}

impl<'a> Recorder<'a> {
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        device: &'a Arc<Device>,
        spec: &'a Spec,
        (tape, plan): (&'a Tape, &'a Plan),
        (weights, uploaded): (&'a Weights, &'a Uploaded),
        (kv_type, exact): (DType, bool),
        decoding: Option<Decoding>,
        corrections: &'a [Placed],
        scratch: Scratch,
    ) -> Recorder<'a> {
        Recorder {
            device,
            spec,
            tape,
            plan,
            weights,
            uploaded,
            kv_type,
            exact,
            decoding,
            corrections,
            scratch,
            dispatches: Vec::new(),
            slots: Vec::new(),
            kernels: Vec::new(),
            binds: Vec::new(),
            op: "",
        }
    }

    /// Records every op.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) for an op without a kernel.
    pub fn record(mut self) -> Result<Recorded> {
        let mut index = 0;
        while index < self.tape.ops.len() {
            self.op = self.tape.ops[index].name();
            index += self.forward(index)?;
        }
        self.largest();
        self.add_slices();
        let Recorder { dispatches, slots, kernels, binds, .. } = self;
        Ok(Recorded { dispatches, slots, kernels, binds })
    }

    /// Place of a value in the arena, in floats.
    pub fn at(&self, value: Value) -> u32 {
        (self.plan.place(value).offset / 4) as u32
    }

    /// Floats per row of a value.
    pub fn width(&self, value: Value) -> u32 {
        self.tape.info(value).width as u32
    }

    /// What its rows are.
    pub fn rows(&self, value: Value) -> Rows {
        self.tape.info(value).rows
    }

    /// Appends a dispatch. `binds` is the buffer of weights and the layer.
    pub fn push<T: Pod>(
        &mut self,
        kernel: Kernel,
        binds: Binds,
        grid: Grid,
        op: &T,
        (weight_bytes, floats): (u64, u64),
    ) {
        let binds = self.binds(&kernel, binds);
        let slot = self.describe(op);
        let pipeline = index_of(&mut self.kernels, kernel);
        let group = index_of(&mut self.binds, binds);
        self.dispatches.push(Dispatch { op: self.op, pipeline, group, slot, grid, weight_bytes, floats, heads: None });
    }

    /// As [`Recorder::push`], for attention of `heads` over so many rows a workgroup; `op` describes it from a head on.
    pub fn push_heads<T: Pod>(
        &mut self,
        kernel: Kernel,
        binds: Binds,
        (heads, rows): (Heads, u32),
        op: impl Fn(u32) -> T,
        floats: u64,
    ) {
        let grid = Grid { x: heads.count * heads.groups, z: Depth::Rows(Rows::Tokens, rows) };
        self.push(kernel, binds, grid, &op(0), (0, floats));
        for first in 1..heads.count {
            self.describe(&op(first));
        }
        if let Some(dispatch) = self.dispatches.last_mut() {
            dispatch.heads = Some(heads);
        }
    }

    /// Appends a description, and gives its offset.
    fn describe<T: Pod>(&mut self, op: &T) -> u32 {
        let slot = self.slots.len() as u32;
        let bytes = bytemuck::bytes_of(op);
        debug_assert!(bytes.len() as u64 <= SLOT);
        self.slots.extend_from_slice(bytes);
        self.slots.resize(self.slots.len().next_multiple_of(SLOT as usize), 0);
        slot
    }
}

/// Index of a thing among others, of which it is one then.
fn index_of<T: PartialEq>(all: &mut Vec<T>, thing: T) -> usize {
    all.iter().position(|other| *other == thing).unwrap_or_else(|| {
        all.push(thing);
        all.len() - 1
    })
}

/// Number of a kind of rows in word 0, 1 or 2 of a run.
pub(super) fn rows_word(rows: Rows) -> u32 {
    match rows {
        Rows::Tokens => 0,
        Rows::Outputs => 1,
        Rows::One => 2,
    }
}

/// `Kv` of `shaders/kv.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Kv {
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub window: u32,
}

impl Kv {
    pub fn new(spec: &Spec, window: Option<usize>) -> Kv {
        Kv {
            heads: spec.heads as u32,
            kv_heads: spec.kv_heads as u32,
            head_dim: spec.head_dim as u32,
            window: window.unwrap_or(0) as u32,
        }
    }
}

/// `Op` of `shaders/matmul.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct MatmulOp {
    pub x: u32,
    pub x_stride: u32,
    pub rows: u32,
    pub k: u32,
    pub weight: u32,
    pub row_bytes: u32,
    pub columns: u32,
    pub out: u32,
    pub out_stride: u32,
    pub bias: u32,
    pub residual: u32,
    pub scale: f32,
    pub cap: f32,
    pub scales: u32,
    pub w_stride: u32,
    pub first: u32,
    pub slice: u32,
    pub slices: u32,
    pub unused: [u32; 2],
}
