//! From forward ops to dispatches.
//!
//! Decoding has kernels of its own, which do on the way what would be dispatches: the norm before a linear map, and head
//! norms, rotation and cache write before attention.

use bytemuck::{Pod, Zeroable};

use super::choice::{Demands, Form, usual_cooperative};
use super::division::Heads;
use super::kernel::{AttentionRows, Kernel, Tile};
use super::record::{Depth, Grid, Kv, MatmulOp, NONE, PackedRows, Recorder, rows_word};
use super::weights::Piece;
use crate::Result;
use crate::quant::DType;
use crate::tape::{
    Attention, Epilogue, Gate, HeadLora, KvSource, Linear, Op, Part, Rope, RopeStyle, Rows, Spec, Tape, Value, WeightId,
};

/// Rows of a tile.
pub(super) const TILE: u32 = 64;
/// Most rows that are decoded together by the kernels for it.
pub(super) const DECODED: usize = 8;
/// Packed rows come in multiples of it: the rows of the largest tile.
pub(super) const PACKED_ROWS: usize = 128;
/// Columns of a chunk of logits.
pub(super) const CHUNK: usize = 2_048;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct EmbedOp {
    weight: u32,
    row_bytes: u32,
    k: u32,
    out: u32,
    scale: f32,
    first: u32,
    count: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RmsNormOp {
    y: u32,
    width: u32,
    rows: u32,
    norm: u32,
    eps: f32,
    residual: u32,
    out: u32,
    unused: u32,
}

/// `Part` of `shaders/matvec.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct MatvecPart {
    pub weight: u32,
    pub row_bytes: u32,
    pub rows: u32,
    pub out: u32,
    pub bias: u32,
    pub kind: u32,
    pub stride: u32,
    pub unused: u32,
}

/// `Op` of `shaders/matvec.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct MatvecOp {
    pub x: u32,
    pub k: u32,
    pub rows: u32,
    pub parts: u32,
    pub norm: u32,
    pub eps: f32,
    pub residual: u32,
    pub out: u32,
    pub cap: f32,
    pub unused: [u32; 3],
    pub part: [MatvecPart; 3],
}

/// `Op` of `shaders/quantize.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct QuantizeOp {
    pub x: u32,
    pub stride: u32,
    pub k: u32,
    pub packed: u32,
    pub norm: u32,
    pub eps: f32,
    pub unused: [u32; 2],
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RopeOp {
    q: u32,
    k: u32,
    v: u32,
    q_out: u32,
    k_out: u32,
    cached: u32,
    unused: [u32; 2],
    kv: Kv,
    turn: Turning,
}

/// Norms and rotation of heads.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Turning {
    q_norm: u32,
    k_norm: u32,
    eps: f32,
    dims: u32,
    table: u32,
    halves: u32,
    unused: [u32; 2],
}

impl Turning {
    /// A rotation without norms; none turns nothing.
    pub fn of(spec: &Spec, rope: Option<usize>) -> Turning {
        let rotation = rope.and_then(|i| spec.ropes.get(i));
        Turning {
            q_norm: NONE,
            k_norm: NONE,
            eps: spec.norm_eps,
            dims: rotation.map_or(0, |s| s.dims as u32),
            table: spec.ropes.iter().take(rope.unwrap_or(0)).map(|s| s.dims as u32).sum(),
            halves: u32::from(rotation.is_some_and(|s| s.style == RopeStyle::Halves)),
            unused: [0; 2],
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AttentionOp {
    q: u32,
    k: u32,
    v: u32,
    out: u32,
    lse: u32,
    scale: f32,
    cap: f32,
    slopes: u32,
    kv: Kv,
    /// Of the dispatch.
    first_head: u32,
    unused: [u32; 3],
    turn: Turning,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SoftmaxOp {
    logits: u32,
    stride: u32,
    state: u32,
    out: u32,
    first: u32,
    count: u32,
    last: u32,
    cap: f32,
}

/// What an op's kernel reads besides the op's own values, when it does an op before it on the way.
pub(super) fn reads_on_the_way(tape: &Tape, index: usize) -> Vec<Value> {
    let Some(before) = index.checked_sub(1).and_then(|i| tape.ops.get(i)) else { return Vec::new() };
    match (before, &tape.ops[index]) {
        (Op::RmsNorm { x, .. }, Op::Linear(_) | Op::Head { .. }) => vec![*x],
        (Op::Rope(r), Op::Attention(_)) => vec![r.q, r.k, r.v],
        _ => Vec::new(),
    }
}

/// Why a tape's shapes do not suit the kernels, if they do not.
pub(super) fn unfit(tape: &Tape, weights: &crate::tape::Weights) -> Option<String> {
    let odd = |id: WeightId, vocab: bool| {
        let w = weights.get(id);
        (!w.width.is_multiple_of(16) || (!w.rows.is_multiple_of(4) && !vocab))
            .then(|| format!("{} is {} × {}, kernels need multiples of 4 × 16", w.name, w.rows, w.width))
    };
    if tape.spec.head_dim > 256 || !tape.spec.head_dim.is_multiple_of(4) {
        return Some(format!("heads of {} elements; kernels need a multiple of 4 up to 256", tape.spec.head_dim));
    }
    tape.ops.iter().find_map(|op| match op {
        Op::Embed { table, .. } => odd(*table, true),
        Op::Linear(l) => l.parts.iter().find_map(|p| odd(p.weight, false)),
        Op::Head { weight, .. } | Op::CrossEntropy { weight, .. } | Op::CrossEntropyGrad { weight, .. } => {
            odd(*weight, true)
        }
        _ => None,
    })
}

/// Matrices of the model that an op multiplies rows with.
pub(super) fn matrices(op: &Op) -> Vec<WeightId> {
    match op {
        Op::Linear(l) => l.parts.iter().map(|p| p.weight).collect(),
        Op::Head { weight, .. } | Op::CrossEntropy { weight, .. } | Op::CrossEntropyGrad { weight, .. } => {
            vec![*weight]
        }
        _ => Vec::new(),
    }
}

/// Most elements of a row that a matrix of the tape is multiplied with, forwards or backwards; chunks of logits apart.
pub(super) fn widest(tape: &Tape, weights: &crate::tape::Weights) -> usize {
    let sides = |id: &WeightId| weights.get(*id).width.max(weights.get(*id).rows);
    let of = |op: &Op| match op {
        Op::Linear(l) => l.parts.iter().map(|p| sides(&p.weight)).max().unwrap_or(0),
        Op::LinearBackward { parts, .. } => parts.iter().map(|(_, weight)| sides(weight)).max().unwrap_or(0),
        Op::Head { weight, .. } | Op::CrossEntropy { weight, .. } | Op::CrossEntropyGrad { weight, .. } => {
            weights.get(*weight).width
        }
        _ => 0,
    };
    tape.ops.iter().map(of).max().unwrap_or(0)
}

/// Rows that matrices are multiplied with.
#[derive(Clone, Copy)]
pub(super) struct Input {
    /// Place in the arena, and how far rows are apart.
    pub at: u32,
    pub stride: u32,
    pub rows: Rows,
    pub made: Made,
}

/// What rows were made, in a place of their own.
#[derive(Clone, Copy)]
pub(super) enum Made {
    /// Nothing.
    Plain,
    /// Packed for cooperative matrices, so many vectors apart.
    Packed(PackedRows, u32),
    /// Quantized to eight bits, so many vectors apart.
    Quantized(PackedRows, u32),
}

impl Input {
    /// `x`, `x_stride` and `scales` of a product of elements `from` on of the rows.
    pub fn place(&self, from: u32) -> (u32, u32, u32) {
        match self.made {
            Made::Packed(packed, stride) => (packed.at + from / 4, stride, packed.scales),
            Made::Quantized(packed, stride) => (packed.blocks() + from / 32 * 3, stride, 0),
            Made::Plain => (self.at + from, self.stride, 0),
        }
    }
}

/// Vectors of four words of a quantized row of `k` elements.
pub(super) fn quantized_stride(k: u32) -> u32 {
    k.div_ceil(32) * 3
}

/// A linear map's matrix with what is done to its results.
struct Map {
    weight: WeightId,
    bias: u32,
    out: u32,
    out_stride: u32,
    residual: u32,
    cap: f32,
}

impl Recorder<'_> {
    /// Records op number `index`, and gives the number of ops that were done with it.
    pub(super) fn forward(&mut self, index: usize) -> Result<usize> {
        let tape = self.tape;
        let op = &tape.ops[index];
        match op {
            // Written before the run.
            Op::Input { .. } => {}
            Op::Embed { table, scale, out } => self.embed(*table, *scale, *out),
            Op::RmsNorm { x, weight, out } => {
                // The next op may do it on the way; nobody else reads its result then.
                if self.decoding.is_some() && self.only_reader(*out, index + 1) {
                    let next = self.tape.ops.get(index + 1);
                    let norm = Some((*x, *weight));
                    match next {
                        Some(Op::Linear(l)) if self.linear_in_one(l) && !self.corrected(l) => {
                            self.linear(l, norm);
                            return Ok(2);
                        }
                        Some(Op::Head { weight, out, .. }) if self.head_correction(*weight).is_none() => {
                            self.head(*x, *weight, *out, norm);
                            return Ok(2);
                        }
                        _ => {}
                    }
                }
                self.rms_norm(*x, None, *weight, *out);
            }
            Op::AddRmsNorm { x, y, weight, out } => self.rms_norm(*y, Some(*x), *weight, *out),
            Op::Linear(l) => self.linear(l, None),
            Op::Rope(r) => {
                if let (Some(_), Some(Op::Attention(a))) = (self.decoding, self.tape.ops.get(index + 1))
                    && r.cache.is_some()
                {
                    self.attention(a, Some(r));
                    return Ok(2);
                }
                self.rope(r);
            }
            Op::Attention(a) => self.attention(a, None),
            Op::GatherOutputs { x, out } => {
                let op = [self.at(*x), self.width(*x), self.at(*out), 0];
                let floats = 2 * u64::from(op[1]);
                self.push(Kernel::Gather, (0, 0), row_grid(1, Rows::Outputs), &op, (0, floats));
            }
            Op::Head { x, weight, out } => self.head(*x, *weight, *out, None),
            Op::Gated { kind, gate, up, out } => self.gated(*kind, *gate, *up, *out),
            Op::CrossEntropy { x, weight, out, lora } => self.cross_entropy(*x, *weight, *out, lora.as_ref()),
            op => self.backward(op)?,
        }
        Ok(1)
    }

    fn only_reader(&self, value: Value, index: usize) -> bool {
        self.tape.ops.iter().enumerate().all(|(i, op)| i == index || !op.reads().contains(&value))
    }

    fn embed(&mut self, table: WeightId, scale: f32, value: Value) {
        let (k, out) = (self.width(value), self.at(value));
        let dtype = self.dtype(table);
        for p in self.pieces(table) {
            let op = EmbedOp {
                weight: p.at,
                row_bytes: p.row_bytes,
                k,
                out,
                scale,
                first: p.first as u32,
                count: p.rows as u32,
                unused: 0,
            };
            self.push(Kernel::Embed(dtype), (p.buffer, 0), row_grid(1, Rows::Tokens), &op, (0, u64::from(k)));
        }
        self.correct_embedding(table, scale, value);
    }

    fn rms_norm(&mut self, y: Value, residual: Option<Value>, weight: WeightId, out: Value) {
        let op = RmsNormOp {
            y: self.at(y),
            width: self.width(y),
            rows: rows_word(self.rows(y)),
            norm: self.vector(weight),
            eps: self.spec.norm_eps,
            residual: residual.map_or(NONE, |r| self.at(r)),
            out: self.at(out),
            unused: 0,
        };
        let floats = u64::from(op.width) * if residual.is_some() { 3 } else { 2 };
        self.push(Kernel::RmsNorm, (0, 0), row_grid(1, self.rows(y)), &op, (0, floats));
    }

    fn gated(&mut self, kind: Gate, gate: Value, up: Value, out: Value) {
        let op = [self.at(gate), self.at(up), self.at(out), self.width(out)];
        self.push(Kernel::Gated(kind), (0, 0), row_grid(1, self.rows(out)), &op, (0, 3 * u64::from(op[3])));
    }

    /// Whether one dispatch can do the op: every matrix whole, and all in one buffer.
    fn linear_in_one(&self, l: &Linear) -> bool {
        let pieces: Vec<Vec<Piece>> = l.parts.iter().map(|p| self.pieces(p.weight)).collect();
        pieces.iter().all(|p| p.len() == 1 && p[0].buffer == pieces[0][0].buffer)
    }

    fn linear(&mut self, l: &Linear, norm: Option<(Value, WeightId)>) {
        let residual = match l.epilogue {
            Epilogue::Add(r) => self.at(r),
            _ => NONE,
        };
        let gained = l.parts.iter().any(|p| self.gained(p.weight));
        if self.decoding.is_some() && self.linear_in_one(l) && !gained {
            let gated = match l.epilogue {
                Epilogue::Gated(kind, out) if !self.corrected(l) => Some((kind, out)),
                _ => None,
            };
            let parts: Vec<(Part, Piece)> = l.parts.iter().map(|p| (p.clone(), self.pieces(p.weight)[0])).collect();
            self.matvec(l.x, norm, &parts, gated, residual, 0.0);
            if gated.is_none() {
                self.behind(l);
            }
            return;
        }
        let matrices: Vec<WeightId> = l.parts.iter().map(|p| p.weight).collect();
        let input = self.input(l.x, &matrices, false);
        for part in &l.parts {
            let (out, out_stride) = (self.at(part.out), self.width(part.out));
            let bias = part.bias.map_or(NONE, |b| self.vector(b));
            let map = Map { weight: part.weight, bias, out, out_stride, residual, cap: 0.0 };
            if self.gained(part.weight) {
                let out = self.apart(part.weight);
                self.matmul(&input, &Map { bias: NONE, out, residual: NONE, ..map }, None);
                self.gain(part, residual);
            } else {
                self.matmul(&input, &map, None);
            }
        }
        self.behind(l);
    }

    /// What follows the products of a map: corrections, the gate.
    fn behind(&mut self, l: &Linear) {
        self.correct(l);
        if let Epilogue::Gated(kind, out) = l.epilogue {
            self.gated(kind, l.parts[0].out, l.parts[1].out, out);
        }
    }

    /// Logits; those of a piece of the head are columns of them.
    fn head(&mut self, x: Value, weight: WeightId, out: Value, norm: Option<(Value, WeightId)>) {
        let last = self.spec.logit_softcap.unwrap_or(0.0);
        let correction = self.head_correction(weight);
        let cap = if correction.is_some() { 0.0 } else { last };
        if self.decoding.is_some() || self.row_limit(Rows::Outputs) <= DECODED {
            // Every piece norms for itself.
            for piece in self.pieces(weight) {
                self.matvec(x, norm, &[(Part { weight, bias: None, out }, piece)], None, NONE, cap);
            }
        } else {
            let map = Map { weight, bias: NONE, out: self.at(out), out_stride: self.width(out), residual: NONE, cap };
            let input = self.input(x, &[weight], false);
            self.matmul(&input, &map, None);
        }
        if let Some(correction) = correction {
            self.correct_head(x, correction, out, last);
        }
    }

    /// Most rows of a kind.
    pub(super) fn row_limit(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.plan.limits.tokens,
            Rows::Outputs => self.plan.limits.outputs,
            Rows::One => 1,
        }
    }

    /// Makes rows of a value ready to be multiplied with some matrices.
    pub(super) fn input(&mut self, x: Value, weights: &[WeightId], turned: bool) -> Input {
        let width = self.width(x);
        self.rows_of(
            Input { at: self.at(x), stride: width, rows: self.rows(x), made: Made::Plain },
            width,
            weights,
            turned,
            0,
        )
    }

    /// As [`Recorder::input`], for rows of `k` elements anywhere; packed ones go to this part of the packed rows.
    pub(super) fn rows_of(&mut self, plain: Input, k: u32, weights: &[WeightId], turned: bool, part: usize) -> Input {
        let to = self.scratch.packed[part];
        let made = match self.form(plain.rows, weights, turned) {
            Form::Cooperative(_) => {
                let padded = k.next_multiple_of(32);
                let op = [plain.at, plain.stride, k, padded, to.scales, to.at, 0, 0];
                self.push(Kernel::Pack, (0, 0), row_grid(1, plain.rows), &op, (0, u64::from(k + padded / 2)));
                Made::Packed(to, padded / 4)
            }
            Form::TileInt8 => {
                self.quantize((plain.at, plain.stride, k), plain.rows, NONE, to);
                Made::Quantized(to, quantized_stride(k))
            }
            _ => Made::Plain,
        };
        Input { made, ..plain }
    }

    /// How rows are multiplied with some matrices: in the way that suits the largest, if it suits all.
    fn form(&self, rows: Rows, weights: &[WeightId], turned: bool) -> Form {
        // A tile of few rows is mostly wasted.
        let limit = self.row_limit(rows) as u32;
        if self.exact || limit <= 16 {
            return Form::Tile;
        }
        let types: Vec<DType> = weights.iter().map(|id| self.dtype(*id)).collect();
        if turned {
            let good = types.iter().all(|dtype| self.device.cooperative(*dtype, true));
            return if good { Form::Cooperative(Tile::SMALL) } else { Form::Tile };
        }
        let Some(largest) = weights.iter().max_by_key(|id| self.weights.get(**id).rows) else {
            return Form::Tile;
        };
        let (dtype, columns) = (self.dtype(*largest), self.weights.get(*largest).rows as u32);
        self.device.tile(self.demands(), dtype, (limit, columns), |form| self.device.suits(form, &types))
    }

    fn demands(&self) -> Demands {
        // Gradients are taken of what was computed: learning rounds to half precision at most.
        Demands { exact: self.exact, int8: self.tape.params.is_empty() }
    }

    /// Quantizes rows of `k` elements, normed by the vector at `norm` if there is one.
    fn quantize(&mut self, (x, stride, k): (u32, u32, u32), rows: Rows, norm: u32, to: PackedRows) {
        let eps = self.spec.norm_eps;
        let op = QuantizeOp { x, stride, k, packed: to.blocks(), norm, eps, unused: [0; 2] };
        let kernel = Kernel::Quantize { normed: norm != NONE };
        self.push(kernel, (0, 0), row_grid(1, rows), &op, (0, u64::from(k + 4 * quantized_stride(k))));
    }

    /// Kernel and grid of a product with a matrix of the model, of so many columns of all: parts take the kernel of the whole.
    pub(super) fn product(
        &self,
        dtype: DType,
        turned: bool,
        input: &Input,
        (columns, all): (u32, u32),
    ) -> (Kernel, Grid) {
        let (kernel, rows, across) = match input.made {
            Made::Plain if turned => (Kernel::MatmulTurned(dtype), TILE, TILE),
            Made::Plain => (Kernel::Matmul(dtype), TILE, TILE),
            Made::Quantized(..) => (Kernel::MatmulInt8(dtype), TILE, TILE),
            Made::Packed(..) => {
                let tile = self.cooperative_tile(dtype, turned, input.rows, all);
                (Kernel::Cooperative { dtype, turned, tile }, tile.rows, tile.columns)
            }
        };
        (kernel, Grid { x: columns.div_ceil(across), z: Depth::Rows(input.rows, rows) })
    }

    /// The tile of a product with cooperative matrices.
    fn cooperative_tile(&self, dtype: DType, turned: bool, rows: Rows, columns: u32) -> Tile {
        let limit = self.row_limit(rows) as u32;
        let is_cooperative = |form| matches!(form, Form::Cooperative(_));
        match self.device.tile(self.demands(), dtype, (limit, columns), is_cooperative) {
            Form::Cooperative(tile) if !turned => tile,
            _ => usual_cooperative(limit, columns),
        }
    }

    fn matvec(
        &mut self,
        x: Value,
        norm: Option<(Value, WeightId)>,
        parts: &[(Part, Piece)],
        gated: Option<(Gate, Value)>,
        residual: u32,
        cap: f32,
    ) {
        let mut types: Vec<DType> = parts.iter().map(|(p, _)| self.dtype(p.weight)).collect();
        types.sort();
        types.dedup();
        let mut op = MatvecOp::zeroed();
        let input = norm.map_or(x, |(x, _)| x);
        op.x = self.at(input);
        op.k = self.width(input);
        op.rows = rows_word(self.rows(input));
        op.parts = parts.len() as u32;
        op.norm = norm.map_or(NONE, |(_, w)| self.vector(w));
        op.eps = self.spec.norm_eps;
        op.residual = residual;
        op.out = gated.map_or(NONE, |(_, out)| self.at(out));
        op.cap = cap;
        let (mut buffer, mut rows, mut bytes, mut floats) = (0, 0, 0, u64::from(op.k));
        for (to, (part, piece)) in op.part.iter_mut().zip(parts) {
            buffer = piece.buffer;
            *to = MatvecPart {
                weight: piece.at,
                row_bytes: piece.row_bytes,
                rows: piece.rows as u32,
                out: self.at(part.out) + piece.first as u32,
                bias: part.bias.map_or(NONE, |b| self.vector(b)),
                kind: types.iter().position(|t| *t == self.dtype(part.weight)).unwrap_or(0) as u32,
                stride: self.width(part.out),
                unused: 0,
            };
            rows += to.rows;
            bytes += u64::from(to.row_bytes) * u64::from(to.rows);
            floats += u64::from(to.rows) * if residual == NONE { 1 } else { 2 };
        }
        if gated.is_some() {
            rows = op.part[0].rows;
            floats = u64::from(op.k) + u64::from(rows);
        }
        let most = parts.iter().max_by_key(|(_, piece)| piece.rows);
        let most = most.map_or(DType::F32, |(p, _)| self.weights.get(p.weight).dtype);
        let limit = match self.decoding {
            Some(d) => d.rows,
            None => (self.row_limit(Rows::Outputs) as u32).next_power_of_two(),
        };
        let sums = if gated.is_some() { 2 } else { 1 } + u32::from(norm.is_some());
        let all = u64::from(op.k) * parts.iter().map(|(_, piece)| piece.rows as u64).sum::<u64>();
        let lanes = self.device.lanes(self.demands(), (&types, most), limit, all, sums);
        if lanes.int8 {
            let to = self.scratch.packed[0];
            self.quantize((op.x, op.k, op.k), self.rows(input), op.norm, to);
            op.x = to.blocks();
        }
        let kernel = lanes.kernel(types, limit, norm.is_some(), gated.map(|(kind, _)| kind));
        // Of a prompt's chunks before the last no row goes on.
        let z = if self.decoding.is_some() { Depth::Fixed(1) } else { Depth::Rows(Rows::Outputs, u32::MAX) };
        let grid = Grid { x: rows.div_ceil(lanes.threads / lanes.lanes), z };
        self.push(kernel, (buffer, 0), grid, &op, (bytes, floats));
    }

    /// `out = cap(x·Wᵀ + bias + residual)`, of the rows `only` of the matrix alone, which are the columns of `out` then.
    fn matmul(&mut self, input: &Input, map: &Map, only: Option<std::ops::Range<usize>>) {
        let dtype = self.dtype(map.weight);
        let (first, last) = only.as_ref().map_or((0, usize::MAX), |r| (r.start, r.end));
        for p in self.pieces(map.weight) {
            let (from, to) = (p.first.max(first), (p.first + p.rows).min(last));
            if from >= to {
                continue;
            }
            let k = self.weights.get(map.weight).width as u32;
            let all = (to - from) as u32;
            let step = self.columns_at_once(dtype, input, all, k) as usize;
            for from in (from..to).step_by(step) {
                let shift = (from - first) as u32;
                let behind = |at: u32| if at == NONE { NONE } else { at + shift };
                let (x, x_stride, scales) = input.place(0);
                let op = MatmulOp {
                    x,
                    x_stride,
                    rows: rows_word(input.rows),
                    k,
                    weight: p.at + (from - p.first) as u32 * p.row_bytes,
                    row_bytes: p.row_bytes,
                    columns: step.min(to - from) as u32,
                    out: map.out + shift,
                    out_stride: map.out_stride,
                    bias: behind(map.bias),
                    residual: behind(map.residual),
                    scale: 1.0,
                    cap: map.cap,
                    scales,
                    ..MatmulOp::zeroed()
                };
                let (kernel, grid) = self.product(dtype, false, input, (op.columns, all));
                let bytes = u64::from(op.columns) * u64::from(p.row_bytes);
                self.push(kernel, (p.buffer, 0), grid, &op, (bytes, u64::from(op.k + op.columns)));
            }
        }
    }

    /// Columns of a product that one dispatch may compute without holding the device for too long.
    fn columns_at_once(&self, dtype: DType, input: &Input, columns: u32, k: u32) -> u32 {
        let form = match input.made {
            Made::Plain => Form::Tile,
            Made::Quantized(..) => Form::TileInt8,
            Made::Packed(..) => Form::Cooperative(self.cooperative_tile(dtype, false, input.rows, columns)),
        };
        self.device.columns_at_once(dtype, form, (self.row_limit(input.rows) as u32, columns, k))
    }

    pub(super) fn kv(&self, window: Option<usize>) -> Kv {
        Kv::new(self.spec, window)
    }

    pub(super) fn turning(&self, r: &Rope) -> Turning {
        Turning {
            q_norm: r.q_norm.map_or(NONE, |w| self.vector(w)),
            k_norm: r.k_norm.map_or(NONE, |w| self.vector(w)),
            ..Turning::of(self.spec, r.rope)
        }
    }

    fn rope(&mut self, r: &Rope) {
        let kv = self.kv(None);
        let op = RopeOp {
            q: self.at(r.q),
            k: self.at(r.k),
            v: self.at(r.v),
            q_out: self.at(r.q_out),
            k_out: self.at(r.k_out),
            cached: u32::from(r.cache.is_some()),
            unused: [0; 2],
            kv,
            turn: self.turning(r),
        };
        let grid = row_grid(kv.heads + kv.kv_heads, Rows::Tokens);
        let floats = u64::from((2 * kv.heads + 3 * kv.kv_heads) * kv.head_dim);
        self.push(Kernel::Rope { kv_type: self.kv_type }, (0, r.cache.unwrap_or(0)), grid, &op, (0, floats))
    }

    /// Attention, with head norms, rotation and cache write where `rope` is given.
    fn attention(&mut self, a: &Attention, rope: Option<&Rope>) {
        let kv = self.kv(a.window);
        let (layer, k, v) = match (rope, a.kv) {
            (Some(r), KvSource::Cache(layer)) => (layer, self.at(r.k), self.at(r.v)),
            (_, KvSource::Cache(layer)) => (layer, NONE, NONE),
            (_, KvSource::Rows(k, v)) => (0, self.at(k), self.at(v)),
        };
        let mut turn = Turning::zeroed();
        if let Some(rope) = rope {
            turn = self.turning(rope);
        }
        let op = AttentionOp {
            q: self.at(rope.map_or(a.q, |r| r.q)),
            k,
            v,
            out: self.at(a.out),
            lse: a.lse.map_or(NONE, |lse| self.at(lse)),
            scale: self.spec.attention_scale,
            cap: self.spec.attention_softcap.unwrap_or(0.0),
            slopes: self.uploaded.slopes.unwrap_or(NONE),
            kv,
            first_head: 0,
            unused: [0; 3],
            turn,
        };
        // Scores, and sums of values.
        let heads = Heads { count: kv.heads, groups: 1, multiply_adds: 2 * kv.head_dim, window: kv.window };
        let floats = u64::from(2 * (kv.heads + kv.kv_heads) * kv.head_dim);
        if rope.is_some() {
            let (head_dim, splits) = (kv.head_dim, self.decoding.map_or(1, |d| d.splits));
            let op = AttentionOp { lse: self.scratch.parts, ..op };
            let kernel = Kernel::Attention { head_dim, kv_type: self.kv_type, splits };
            let heads = Heads { groups: splits, ..heads };
            self.push_heads(kernel, (0, layer), (heads, 1), |first_head| AttentionOp { first_head, ..op }, floats);
            if splits > 1 {
                let merge = [self.scratch.parts, op.out, kv.heads, 0];
                let kernel = Kernel::AttentionMerge { head_dim, splits };
                let floats = u64::from(kv.heads * (splits + 1) * head_dim);
                self.push(kernel, (0, 0), row_grid(kv.heads, Rows::Tokens), &merge, (0, floats));
            }
            return;
        }
        let rows = AttentionRows::new(kv.head_dim, self.device.abilities.workgroup_bytes, 2, (2, 4));
        let cached = matches!(a.kv, KvSource::Cache(_)).then_some(self.kv_type);
        let kernel = Kernel::AttentionTile { rows, cached };
        self.push_heads(kernel, (0, layer), (heads, rows.own), |first_head| AttentionOp { first_head, ..op }, floats)
    }

    /// Cross-entropy, a chunk of the vocabulary at a time.
    pub(super) fn cross_entropy(&mut self, x: Value, weight: WeightId, out: Value, lora: Option<&HeadLora>) {
        let vocab = self.weights.get(weight).rows;
        let input = self.input(x, &[weight], false);
        for first in (0..vocab).step_by(CHUNK) {
            let chunk = first..(first + CHUNK).min(vocab);
            self.adapted_chunk(&input, weight, chunk.clone(), lora);
            self.softmax(chunk.clone(), self.at(out), chunk.end == vocab, false);
        }
    }

    /// Logits of a chunk of the vocabulary, into scratch.
    pub(super) fn logits_chunk(
        &mut self,
        x: &Input,
        weight: WeightId,
        chunk: std::ops::Range<usize>,
        out: u32,
        cap: f32,
    ) {
        let map = Map { weight, bias: NONE, out, out_stride: CHUNK as u32, residual: NONE, cap };
        self.matmul(x, &map, Some(chunk));
    }

    /// What becomes of a chunk of logits: the rows' states, or gradients.
    pub(super) fn softmax(&mut self, chunk: std::ops::Range<usize>, out: u32, last: bool, gradient: bool) {
        let op = SoftmaxOp {
            logits: self.scratch.logits,
            stride: CHUNK as u32,
            state: self.scratch.states,
            out,
            first: chunk.start as u32,
            count: chunk.len() as u32,
            last: u32::from(last),
            cap: self.spec.logit_softcap.unwrap_or(0.0),
        };
        self.push(Kernel::Softmax { gradient }, (0, 0), row_grid(1, Rows::Outputs), &op, (0, 2 * u64::from(op.count)))
    }
}

/// `x` workgroups for each row.
pub(super) fn row_grid(x: u32, rows: Rows) -> Grid {
    Grid { x, z: Depth::Rows(rows, 1) }
}
