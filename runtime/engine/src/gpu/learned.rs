//! From ops of learning to dispatches, for what is learned beside low-rank adapters of the layers' maps: lengths of rows
//! (DoRA), adapters of the embedding and the head, and all weights of a model.
//!
//! Weights that are trained are f32 among the parameters, and bound in place of the model's ([`TRAINED`]): kernels do not
//! know the difference.

use bytemuck::{Pod, Zeroable};

use super::backward::{Factor, RopeBackwardOp};
use super::choice::matmul_work;
use super::forward::{CHUNK, Input, Turning, row_grid};
use super::kernel::Kernel;
use super::record::{Binds, Depth, Grid, MatmulOp, NONE, Recorder, rows_word};
use super::weights::Piece;
use crate::quant::DType;
use crate::tape::{EmbedLora, HeadLora, LoraHidden, ParamId, Rescale, Rope, Rows, Value, WeightId};

/// In place of a buffer of weights: the parameters, for matrices and for norms and biases.
pub(super) const TRAINED: usize = usize::MAX;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RowNormsOp {
    weight: u32,
    row_bytes: u32,
    width: u32,
    first: u32,
    rows: u32,
    a: u32,
    b: u32,
    rank: u32,
    scale: f32,
    out: u32,
    unused: [u32; 2],
}

/// `Op` of `shaders/rescale.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct RescaleOp {
    pub y: u32,
    pub width: u32,
    pub stride: u32,
    pub out: u32,
    pub magnitude: u32,
    pub norms: u32,
    pub bias: u32,
    pub residual: u32,
    pub cap: f32,
    pub unused: [u32; 3],
}

/// `Op` of `shaders/column_sums.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ColumnSumsOp {
    a: u32,
    a_stride: u32,
    b: u32,
    b_stride: u32,
    rows: u32,
    per_row: u32,
    columns: u32,
    out: u32,
    rho: u32,
    norms: u32,
    unused: [u32; 2],
}

impl ColumnSumsOp {
    /// Sums of the columns of rows that lie at `a`, side by side, as many as a run has of these.
    fn new(a: u32, columns: u32, rows: Rows, out: u32) -> ColumnSumsOp {
        ColumnSumsOp {
            a,
            a_stride: columns,
            b: NONE,
            b_stride: columns,
            rows: rows_word(rows),
            per_row: 1,
            columns,
            out,
            rho: NONE,
            norms: NONE,
            unused: [0; 2],
        }
    }
}

impl Recorder<'_> {
    /// Type of a matrix' elements.
    pub(super) fn dtype(&self, id: WeightId) -> DType {
        if self.tape.trains_weights { DType::F32 } else { self.weights.get(id).dtype }
    }

    /// Where a matrix lies.
    pub(super) fn pieces(&self, id: WeightId) -> Vec<Piece> {
        if !self.tape.trains_weights {
            return self.uploaded.pieces(id).to_vec();
        }
        let (at, w) = (4 * self.param_at(ParamId(id.0)), self.weights.get(id));
        vec![Piece { buffer: TRAINED, at, first: 0, rows: w.rows, row_bytes: 4 * w.width as u32 }]
    }

    /// First element of a norm or bias.
    pub(super) fn vector(&self, id: WeightId) -> u32 {
        if self.tape.trains_weights { self.param_at(ParamId(id.0)) } else { self.uploaded.vector(id) }
    }

    /// First element of a parameter.
    pub(super) fn param_at(&self, id: ParamId) -> u32 {
        self.tape.params[id.0 as usize].offset as u32
    }

    /// What a dispatch binds: trained weights in place of the model's. Attention reads no weights but the slopes of ALiBi, which
    /// are not trained.
    pub(super) fn binds(&self, kernel: &Kernel, binds: Binds) -> Binds {
        let attention = matches!(kernel, Kernel::AttentionTile { .. } | Kernel::AttentionBackward { .. });
        if self.tape.trains_weights && !attention { (TRAINED, binds.1) } else { binds }
    }

    /// `norms[o] = ‖W[o] + scale·B[o]·A‖`.
    pub(super) fn row_norms(&mut self, weight: WeightId, (a, b): (ParamId, ParamId), scale: f32, out: Value) {
        let (a, rank) = (self.param_at(a), self.tape.params[a.0 as usize].rows as u32);
        for p in self.pieces(weight) {
            let op = RowNormsOp {
                weight: p.at,
                row_bytes: p.row_bytes,
                width: self.weights.get(weight).width as u32,
                first: p.first as u32,
                rows: p.rows as u32,
                a,
                b: self.param_at(b),
                rank,
                scale,
                out: self.at(out),
                unused: [0; 2],
            };
            let grid = Grid { x: op.rows, z: Depth::Fixed(1) };
            let bytes = u64::from(op.rows) * u64::from(op.row_bytes);
            self.push(Kernel::RowNorms(self.dtype(weight)), (p.buffer, 0), grid, &op, (bytes, 1));
        }
    }

    pub(super) fn push_rescale(&mut self, op: &RescaleOp, rows: Rows) {
        self.push(Kernel::Rescale, (0, 0), row_grid(1, rows), op, (0, 3 * u64::from(op.width)));
    }

    pub(super) fn rescale(&mut self, r: &Rescale) {
        let op = RescaleOp {
            y: self.at(r.y),
            width: self.width(r.out),
            stride: self.width(r.out),
            out: self.at(r.out),
            magnitude: self.param_at(r.magnitude),
            norms: self.at(r.norms),
            bias: r.bias.map_or(NONE, |bias| self.vector(bias)),
            residual: r.residual.map_or(NONE, |r| self.at(r)),
            cap: 0.0,
            unused: [0; 3],
        };
        self.push_rescale(&op, self.rows(r.out));
    }

    pub(super) fn rescale_backward(&mut self, r: &Rescale, dy: Value, out: Value) {
        let (width, rows) = (self.width(dy), self.rows(dy));
        let magnitude = self.param_at(r.magnitude);
        let sums = ColumnSumsOp {
            b: self.at(r.y),
            norms: self.at(r.norms),
            ..ColumnSumsOp::new(self.at(dy), width, rows, magnitude)
        };
        self.column_sums(&sums);
        let op = RescaleOp {
            y: self.at(dy),
            width,
            stride: width,
            out: self.at(out),
            magnitude,
            norms: self.at(r.norms),
            bias: NONE,
            residual: NONE,
            cap: 0.0,
            unused: [0; 3],
        };
        self.push_rescale(&op, rows);
    }

    fn column_sums(&mut self, op: &ColumnSumsOp) {
        let grid = Grid { x: op.columns.div_ceil(32), z: Depth::Fixed(1) };
        self.push(Kernel::ColumnSums, (0, 0), grid, op, (0, 2 * u64::from(op.columns)));
    }

    /// `1/√(mean x² + ε)` of rows of `width` elements, `per_row` of them to a row of the run, into scratch.
    fn inverse_rms(&mut self, x: Value, width: u32, per_row: u32) {
        let op = [self.at(x), width, self.scratch.rho, self.spec.norm_eps.to_bits()];
        self.push(Kernel::InverseRms, (0, 0), row_grid(per_row, self.rows(x)), &op, (0, u64::from(width * per_row)));
    }

    /// The gradient of a norm's weight.
    pub(super) fn norm_weight(&mut self, x: Value, weight: WeightId, dy: Value) {
        let width = self.width(x);
        self.inverse_rms(x, width, 1);
        let out = self.param_at(ParamId(weight.0));
        let (b, rho) = (self.at(x), self.scratch.rho);
        self.column_sums(&ColumnSumsOp { b, rho, ..ColumnSumsOp::new(self.at(dy), width, self.rows(x), out) })
    }

    /// The gradients of the norms of query and key heads.
    pub(super) fn head_norm_weights(&mut self, r: &Rope, d: [Value; 2]) {
        let kv = self.kv(None);
        // The gradients are turned back first, as if there were no norms.
        let turned = [self.scratch.turned, self.scratch.turned + (self.plan.limits.tokens as u32) * self.width(r.q)];
        let op = RopeBackwardOp {
            q: self.at(r.q),
            k: self.at(r.k),
            dq: self.at(d[0]),
            dk: self.at(d[1]),
            q_out: turned[0],
            k_out: turned[1],
            unused: [0; 2],
            kv,
            turn: Turning::of(self.spec, r.rope),
        };
        let heads = kv.heads + kv.kv_heads;
        let grid = row_grid(heads, Rows::Tokens);
        self.push(Kernel::RopeBackward, (0, 0), grid, &op, (0, u64::from(2 * heads * kv.head_dim)));
        for (norm, x, heads, turned) in [(r.q_norm, r.q, kv.heads, turned[0]), (r.k_norm, r.k, kv.kv_heads, turned[1])]
        {
            let Some(norm) = norm else { continue };
            self.inverse_rms(x, kv.head_dim, heads);
            let (b, rho, out) = (self.at(x), self.scratch.rho, self.param_at(ParamId(norm.0)));
            let sums = ColumnSumsOp::new(turned, kv.head_dim, Rows::Tokens, out);
            self.column_sums(&ColumnSumsOp { b, rho, per_row: heads, ..sums });
        }
    }

    /// Gradients of linear maps' matrices and biases: `dW += dyᵀ·x`, `db += Σ dy`.
    pub(super) fn linear_weights(&mut self, x: Value, parts: &[(Value, WeightId, Option<WeightId>)]) {
        let x = self.factor(x);
        for (dy, weight, bias) in parts {
            let dy = self.factor(*dy);
            self.matrix_gradient(dy, x, self.param_at(ParamId(weight.0)));
            if let Some(bias) = bias {
                let out = self.param_at(ParamId(bias.0));
                self.column_sums(&ColumnSumsOp::new(dy.at, dy.width, dy.rows, out));
            }
        }
    }

    /// Adds `dyᵀ·x` to the gradient at `out`.
    fn matrix_gradient(&mut self, dy: Factor, x: Factor, out: u32) {
        let column = matmul_work(self.row_limit(dy.rows) as u32, 1, x.width);
        let step = self.device.columns_of(column, dy.width);
        for first in (0..dy.width).step_by(step as usize) {
            let op = MatmulOp {
                x: dy.at + first,
                x_stride: dy.stride,
                rows: rows_word(dy.rows),
                k: x.width,
                weight: x.at,
                w_stride: x.stride,
                columns: step.min(dy.width - first),
                out: out + first * x.width,
                scale: 1.0,
                ..MatmulOp::zeroed()
            };
            let grid = Grid { x: op.columns.div_ceil(64) * op.k.div_ceil(64), z: Depth::Fixed(1) };
            self.push(Kernel::Outer, (0, 0), grid, &op, (0, u64::from(op.k + op.columns)));
        }
    }

    /// Adds `scale·dy` to the rows of a table's gradient that are the run's tokens.
    pub(super) fn token_rows(&mut self, dy: Value, table: ParamId, scale: f32) {
        let width = self.width(dy);
        let op = [self.at(dy), width, self.param_at(table), scale.to_bits()];
        self.push(
            Kernel::EmbedBackward,
            (0, 0),
            row_grid(width.div_ceil(64), Rows::Tokens),
            &op,
            (0, u64::from(width)),
        );
    }

    /// Rows of a trained table by token, into scratch.
    fn gathered(&mut self, table: ParamId) -> Factor {
        let (at, width) = (self.scratch.gathered, self.tape.params[table.0 as usize].width as u32);
        let op = [self.param_at(table), width, at, 0];
        self.push(Kernel::GatherParams, (0, 0), row_grid(1, Rows::Tokens), &op, (0, u64::from(width)));
        Factor { at, stride: width, rows: Rows::Tokens, width }
    }

    pub(super) fn embed_lora(&mut self, l: &EmbedLora) {
        let b = self.gathered(l.b);
        let (a, out) = (self.whole(l.a), self.factor(l.out));
        self.trained(b, a, true, l.scale, self.at(l.x), out);
    }

    pub(super) fn embed_lora_backward(&mut self, l: &EmbedLora, dy: Value, e: Value) {
        let (a, to) = (self.whole(l.a), self.factor(e));
        self.trained(self.factor(dy), a, false, l.scale, NONE, to);
        self.token_rows(e, l.b, 1.0);
        let b = self.gathered(l.b);
        self.outer(self.factor(dy), b, self.param_at(l.a), true, l.scale);
    }

    pub(super) fn lora_hidden(&mut self, l: &LoraHidden) {
        let (a, h) = (self.whole(l.a), self.factor(l.h));
        self.trained(self.factor(l.x), a, false, 1.0, NONE, h);
    }

    pub(super) fn lora_hidden_backward(&mut self, l: &LoraHidden, e: Value, dx: Option<Value>, out: Value) {
        let (a, e) = (self.whole(l.a), self.factor(e));
        self.outer(self.factor(l.x), e, self.param_at(l.a), true, 1.0);
        self.trained(e, a, true, 1.0, dx.map_or(NONE, |dx| self.at(dx)), self.factor(out));
    }

    /// A chunk of logits, with the head's adapter if it has one.
    pub(super) fn adapted_chunk(
        &mut self,
        x: &Input,
        weight: WeightId,
        chunk: std::ops::Range<usize>,
        lora: Option<&HeadLora>,
    ) {
        let cap = self.spec.logit_softcap.unwrap_or(0.0);
        let Some(lora) = lora else { return self.logits_chunk(x, weight, chunk, self.scratch.logits, cap) };
        self.logits_chunk(x, weight, chunk.clone(), self.scratch.raw, 0.0);
        let raw = chunk_of(self.scratch.raw, &chunk);
        let b = self.rows_of_param(lora.b, &chunk);
        self.trained(self.factor(lora.h), b, false, lora.scale, raw.at, raw);
        let (magnitude, norms) = self.lengths(lora, &chunk);
        self.push_rescale(&chunk_rescale(raw.at, self.scratch.logits, &chunk, magnitude, norms, cap), Rows::Outputs);
    }

    /// What a chunk of the logits' gradients gives to what the head learns; behind it they are those of the matrix' own products.
    pub(super) fn head_gradients(
        &mut self,
        x: Value,
        weight: WeightId,
        chunk: &std::ops::Range<usize>,
        lora: Option<&(HeadLora, Value)>,
    ) {
        let dz = chunk_of(self.scratch.logits, chunk);
        if self.tape.trains_weights {
            let width = self.width(x);
            let out = self.param_at(ParamId(weight.0)) + chunk.start as u32 * width;
            return self.matrix_gradient(dz, self.factor(x), out);
        }
        let Some((lora, e)) = lora else { return };
        if lora.rescale.is_some() {
            let (magnitude, norms) = self.lengths(lora, chunk);
            let (b, stride) = (self.scratch.raw, CHUNK as u32);
            let sums = ColumnSumsOp::new(dz.at, dz.width, Rows::Outputs, magnitude);
            self.column_sums(&ColumnSumsOp { a_stride: stride, b, b_stride: stride, norms, ..sums });
            self.push_rescale(&chunk_rescale(dz.at, dz.at, chunk, magnitude, norms, 0.0), Rows::Outputs);
        }
        let (b, e) = (self.rows_of_param(lora.b, chunk), self.factor(*e));
        let so_far = if chunk.start == 0 { NONE } else { e.at };
        self.trained(dz, b, true, lora.scale, so_far, e);
        self.outer(dz, self.factor(lora.h), b.0, false, lora.scale);
    }

    /// Places of the magnitudes and the norms of some rows of the head.
    fn lengths(&self, lora: &HeadLora, chunk: &std::ops::Range<usize>) -> (u32, u32) {
        let first = chunk.start as u32;
        match lora.rescale {
            Some((magnitude, norms)) => (self.param_at(magnitude) + first, self.at(norms) + first),
            None => (NONE, NONE),
        }
    }

    /// First element and width of a parameter.
    pub(super) fn whole(&self, id: ParamId) -> (u32, u32) {
        (self.param_at(id), self.tape.params[id.0 as usize].width as u32)
    }

    /// The same of some of its rows.
    fn rows_of_param(&self, id: ParamId, rows: &std::ops::Range<usize>) -> (u32, u32) {
        let (at, width) = self.whole(id);
        (at + rows.start as u32 * width, width)
    }
}

/// A chunk of logits in scratch.
fn chunk_of(at: u32, chunk: &std::ops::Range<usize>) -> Factor {
    Factor { at, stride: CHUNK as u32, rows: Rows::Outputs, width: chunk.len() as u32 }
}

fn chunk_rescale(y: u32, out: u32, chunk: &std::ops::Range<usize>, magnitude: u32, norms: u32, cap: f32) -> RescaleOp {
    RescaleOp {
        y,
        width: chunk.len() as u32,
        stride: CHUNK as u32,
        out,
        magnitude,
        norms,
        bias: NONE,
        residual: NONE,
        cap,
        unused: [0; 3],
    }
}
