//! From ops of learning to dispatches. Sums over rows of the run (gradients of adapters) are products of two values, taken
//! tile by tile in a fixed order.

use bytemuck::{Pod, Zeroable};

use super::choice::matmul_work;
use super::division::Heads;
use super::forward::{CHUNK, Input, Made, Turning, row_grid};
use super::kernel::{AttentionRows, Kernel};
use super::record::{Depth, Grid, Kv, MatmulOp, NONE, Recorder, rows_word};
use crate::tape::{
    AttentionBackward, Dropout, Gate, HeadLora, Lora, LoraBackward, Op, ParamId, Rope, Rows, Value, WeightId,
};
use crate::{Error, Result};

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct RopeBackwardOp {
    pub q: u32,
    pub k: u32,
    pub dq: u32,
    pub dk: u32,
    pub q_out: u32,
    pub k_out: u32,
    pub unused: [u32; 2],
    pub kv: Kv,
    pub turn: Turning,
}

/// Rows of a value or of scratch.
#[derive(Clone, Copy)]
pub(super) struct Factor {
    pub at: u32,
    pub stride: u32,
    pub rows: Rows,
    pub width: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AttentionBackwardOp {
    q: u32,
    k: u32,
    v: u32,
    o: u32,
    lse: u32,
    d_o: u32,
    dq: u32,
    dk: u32,
    dv: u32,
    delta: u32,
    scale: f32,
    cap: f32,
    kv: Kv,
    slopes: u32,
    /// Of the dispatch.
    first_head: u32,
    unused: [u32; 2],
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct DropoutOp {
    x: u32,
    width: u32,
    residual: u32,
    out: u32,
    rows: u32,
    stream: [u32; 2],
    threshold: u32,
    factor: f32,
    unused: [u32; 3],
}

/// `out = x·P·scale + residual` with a parameter, turned or not, which is given by its first element and its width.
pub(super) fn parameter_product(
    x: Factor,
    (weight, row_bytes): (u32, u32),
    scale: f32,
    residual: u32,
    out: Factor,
) -> MatmulOp {
    MatmulOp {
        x: x.at,
        x_stride: x.stride,
        rows: rows_word(x.rows),
        k: x.width,
        weight,
        row_bytes,
        columns: out.width,
        out: out.at,
        out_stride: out.stride,
        bias: NONE,
        residual,
        scale,
        ..MatmulOp::zeroed()
    }
}

impl Recorder<'_> {
    /// Records an op of learning.
    pub(super) fn backward(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Lora(l) => self.lora(l),
            Op::LoraBackward(l) => self.lora_backward(l),
            Op::Dropout(d) => self.dropout(d, d.x, None, d.out),
            Op::DropoutBackward { forward, dy, dx, out } => self.dropout(forward, *dy, *dx, *out),
            Op::LinearBackward { parts, dx, out } => {
                let mut so_far = dx.map_or(NONE, |dx| self.at(dx));
                for (dy, weight) in parts {
                    let dy = self.input(*dy, &[*weight], true);
                    self.turned(&dy, *weight, 0..usize::MAX, so_far, *out);
                    so_far = self.at(*out);
                }
            }
            Op::RmsNormBackward { x, weight, dy, dx, out } => {
                let norm = self.vector(*weight);
                let eps = self.spec.norm_eps.to_bits();
                let dx = dx.map_or(NONE, |dx| self.at(dx));
                let width = self.width(*x);
                let op = [self.at(*x), width, norm, eps, self.at(*dy), dx, self.at(*out), 0];
                self.push(Kernel::RmsNormBackward, (0, 0), row_grid(1, self.rows(*x)), &op, (0, 4 * u64::from(width)))
            }
            Op::GatedBackward { kind, gate, up, dy, d_gate, d_up } => {
                self.gated_backward(*kind, [*gate, *up, *dy], [*d_gate, *d_up])
            }
            Op::AttentionBackward(a) => self.attention_backward(a),
            Op::RopeBackward { forward, d, out } => self.rope_backward(forward, *d, *out),
            Op::ScatterOutputs { x, out } => {
                let op = [self.at(*x), self.width(*x), self.at(*out), 0];
                let floats = u64::from(op[1]);
                self.push(Kernel::Scatter { clear: true }, (0, 0), row_grid(1, Rows::Tokens), &op, (0, floats));
                self.push(Kernel::Scatter { clear: false }, (0, 0), row_grid(1, Rows::Outputs), &op, (0, 2 * floats))
            }
            Op::CrossEntropyGrad { x, weight, out, dx, lora } => {
                self.cross_entropy(*x, *weight, *out, lora.as_ref().map(|(lora, _)| lora));
                self.cross_entropy_gradient(*x, *weight, *dx, lora.as_ref())
            }
            Op::RowNorms { weight, a, b, scale, out } => self.row_norms(*weight, (*a, *b), *scale, *out),
            Op::Rescale(r) => self.rescale(r),
            Op::RescaleBackward { forward, dy, out } => self.rescale_backward(forward, *dy, *out),
            Op::EmbedLora(l) => self.embed_lora(l),
            Op::EmbedLoraBackward { forward, dy, e } => self.embed_lora_backward(forward, *dy, *e),
            Op::LoraHidden(l) => self.lora_hidden(l),
            Op::LoraHiddenBackward { forward, e, dx, out } => self.lora_hidden_backward(forward, *e, *dx, *out),
            Op::LinearWeightBackward { x, parts } => self.linear_weights(*x, parts),
            Op::RmsNormWeightBackward { x, weight, dy } => self.norm_weight(*x, *weight, *dy),
            Op::HeadNormWeightBackward { forward, d } => self.head_norm_weights(forward, *d),
            Op::EmbedBackward { table, scale, dy } => self.token_rows(*dy, ParamId(table.0), *scale),
            op => return Err(Error::Unsupported(format!("{} on the GPU; use the CPU", op.name()))),
        }
        Ok(())
    }

    /// The rows of a value.
    pub(super) fn factor(&self, value: Value) -> Factor {
        let width = self.width(value);
        Factor { at: self.at(value), stride: width, rows: self.rows(value), width }
    }

    /// `out = x·Wᵀ·scale + residual` with a trained matrix `[columns, k]`, or with `turned` `out = x·W·scale + residual`
    /// with `[k, columns]`.
    /// The matrix is given by its first element and its width.
    pub(super) fn trained(
        &mut self,
        x: Factor,
        (weight, row_bytes): (u32, u32),
        turned: bool,
        scale: f32,
        residual: u32,
        out: Factor,
    ) {
        let op = parameter_product(x, (weight, row_bytes), scale, residual, out);
        let fours = op.k.min(op.columns).is_multiple_of(8) && op.k.max(op.columns).is_multiple_of(4);
        let (kernel, across) = match op.columns < op.k {
            true => (Kernel::LoraNarrow { turned, fours }, 8),
            false => (Kernel::LoraWide { turned, fours }, if fours { 256 } else { 64 }),
        };
        let grid = Grid { x: op.columns.div_ceil(across), z: Depth::Rows(x.rows, 8) };
        self.push(kernel, (0, 0), grid, &op, (0, u64::from(op.k + op.columns)));
    }

    /// Adds `wideᵀ·narrow·scale` to the gradient at `out`, of a matrix `[wide, narrow]`, or with `turned` of one `[narrow, wide]`.
    pub(super) fn outer(&mut self, wide: Factor, narrow: Factor, out: u32, turned: bool, scale: f32) {
        let op = MatmulOp {
            x: wide.at,
            x_stride: wide.stride,
            rows: rows_word(wide.rows),
            k: narrow.width,
            weight: narrow.at,
            w_stride: narrow.stride,
            columns: wide.width,
            out,
            scale,
            slice: self.tape.param_count() as u32,
            slices: self.scratch.slices,
            ..MatmulOp::zeroed()
        };
        let fours = op.k.is_multiple_of(8);
        let across = if fours { 32 } else { 8 };
        let x = op.columns.div_ceil(across) * op.k.div_ceil(8);
        let grid = Grid { x, z: Depth::Fixed(op.slices) };
        self.push(Kernel::LoraOuter { turned, fours }, (0, 0), grid, &op, (0, u64::from(op.k + op.columns)))
    }

    /// Adds the slices of all gradients up.
    pub(super) fn add_slices(&mut self) {
        let count = self.tape.param_count() as u32;
        if self.scratch.slices < 2 || count == 0 {
            return;
        }
        let op = [count, self.scratch.slices, 0, 0];
        self.push(Kernel::AddSlices, (0, 0), Grid { x: count.div_ceil(64), z: Depth::Fixed(1) }, &op, (0, 0))
    }

    fn lora(&mut self, l: &Lora) {
        let (x, h, out) = (self.factor(l.x), self.factor(l.h), self.factor(l.out));
        self.trained(x, self.whole(l.a), false, 1.0, NONE, h);
        self.trained(h, self.whole(l.b), false, l.scale, self.at(l.y), out);
    }

    fn lora_backward(&mut self, l: &LoraBackward) {
        let f = &l.forward;
        let (dy, e) = (self.factor(l.dy), self.factor(l.e));
        self.trained(dy, self.whole(f.b), true, f.scale, NONE, e);
        self.outer(dy, self.factor(f.h), self.param_at(f.b), false, f.scale);
        self.outer(self.factor(f.x), e, self.param_at(f.a), true, 1.0);
        let Some(out) = l.out else { return };
        self.trained(e, self.whole(f.a), true, 1.0, l.dx.map_or(NONE, |dx| self.at(dx)), self.factor(out));
    }

    fn dropout(&mut self, d: &Dropout, x: Value, residual: Option<Value>, out: Value) {
        let threshold = ((f64::from(d.rate) * 65_536.0).round() as u32).min(65_535);
        let op = DropoutOp {
            x: self.at(x),
            width: self.width(x),
            residual: residual.map_or(NONE, |r| self.at(r)),
            out: self.at(out),
            rows: rows_word(self.rows(out)),
            stream: [d.stream as u32, (d.stream >> 32) as u32],
            threshold,
            factor: (65_536.0 / f64::from(65_536 - threshold)) as f32,
            unused: [0; 3],
        };
        self.push(Kernel::Dropout, (0, 0), row_grid(1, self.rows(out)), &op, (0, 2 * u64::from(op.width)));
    }

    /// `out = residual + dy·W`, `W` being some rows of a matrix of the model, which are the columns of `dy`.
    fn turned(&mut self, dy: &Input, weight: WeightId, only: std::ops::Range<usize>, mut residual: u32, out: Value) {
        let dtype = self.dtype(weight);
        for p in self.pieces(weight) {
            let (from, to) = (p.first.max(only.start), (p.first + p.rows).min(only.end));
            if from >= to {
                continue;
            }
            let (x, x_stride, scales) = dy.place((from - only.start) as u32);
            let (k, columns) = ((to - from) as u32, self.width(out));
            let column = matmul_work(self.row_limit(dy.rows) as u32, 1, k);
            let step = self.device.columns_of(column, columns);
            for first in (0..columns).step_by(step as usize) {
                let op = MatmulOp {
                    x,
                    x_stride,
                    rows: rows_word(dy.rows),
                    k,
                    weight: p.at + (from - p.first) as u32 * p.row_bytes,
                    row_bytes: p.row_bytes,
                    columns: step.min(columns - first),
                    out: self.at(out) + first,
                    out_stride: columns,
                    bias: NONE,
                    residual: if residual == NONE { NONE } else { residual + first },
                    scale: 1.0,
                    scales,
                    first,
                    ..MatmulOp::zeroed()
                };
                let (kernel, grid) = self.product(dtype, true, dy, (op.columns, columns));
                let bytes = u64::from(k) * u64::from(p.row_bytes) * u64::from(op.columns) / u64::from(columns);
                self.push(kernel, (p.buffer, 0), grid, &op, (bytes, u64::from(k + op.columns)));
            }
            residual = self.at(out);
        }
    }

    fn gated_backward(&mut self, kind: Gate, [gate, up, dy]: [Value; 3], [d_gate, d_up]: [Value; 2]) {
        let width = self.width(dy);
        let op = [self.at(gate), self.at(up), self.at(dy), self.at(d_gate), self.at(d_up), width, 0, 0];
        self.push(Kernel::GatedBackward(kind), (0, 0), row_grid(1, self.rows(dy)), &op, (0, 5 * u64::from(width)));
    }

    fn rope_backward(&mut self, r: &Rope, d: [Value; 2], out: [Value; 2]) {
        let kv = self.kv(None);
        let op = RopeBackwardOp {
            q: self.at(r.q),
            k: self.at(r.k),
            dq: self.at(d[0]),
            dk: self.at(d[1]),
            q_out: self.at(out[0]),
            k_out: self.at(out[1]),
            unused: [0; 2],
            kv,
            turn: self.turning(r),
        };
        let heads = kv.heads + kv.kv_heads;
        let floats = u64::from(2 * heads * kv.head_dim);
        self.push(Kernel::RopeBackward, (0, 0), row_grid(heads, Rows::Tokens), &op, (0, floats));
    }

    fn attention_backward(&mut self, a: &AttentionBackward) {
        let kv = self.kv(a.window);
        let op = AttentionBackwardOp {
            q: self.at(a.qkv[0]),
            k: self.at(a.qkv[1]),
            v: self.at(a.qkv[2]),
            o: self.at(a.out),
            lse: self.at(a.lse),
            d_o: self.at(a.d_out),
            dq: self.at(a.d_qkv[0]),
            dk: self.at(a.d_qkv[1]),
            dv: self.at(a.d_qkv[2]),
            delta: self.scratch.delta,
            scale: self.spec.attention_scale,
            cap: self.spec.attention_softcap.unwrap_or(0.0),
            kv,
            slopes: self.uploaded.slopes.unwrap_or(NONE),
            first_head: 0,
            unused: [0; 2],
        };
        let floats = u64::from((kv.heads + kv.kv_heads) * kv.head_dim);
        let rows = AttentionRows::new(kv.head_dim, self.device.abilities.workgroup_bytes, 4, (4, 2));
        // Scores, gradients of chances and of queries; of a group's queries those of keys and values.
        let group = kv.heads / kv.kv_heads.max(1);
        for (queries, count, products) in [(true, kv.heads, 3), (false, kv.kv_heads, 4 * group)] {
            let kernel = Kernel::AttentionBackward { rows, queries };
            let heads = Heads { count, groups: 1, multiply_adds: products * kv.head_dim, window: kv.window };
            let op = |first_head| AttentionBackwardOp { first_head, ..op };
            self.push_heads(kernel, (0, 0), (heads, rows.own), op, 3 * floats);
        }
    }

    /// `dx = g·(softmax − onehot)·W`, a chunk of the vocabulary at a time, and what the head learns; the rows' states are known.
    fn cross_entropy_gradient(&mut self, x: Value, weight: WeightId, dx: Value, lora: Option<&(HeadLora, Value)>) {
        let vocab = self.weights.get(weight).rows;
        let input = self.input(x, &[weight], false);
        let mut so_far = NONE;
        for first in (0..vocab).step_by(CHUNK) {
            let chunk = first..(first + CHUNK).min(vocab);
            self.adapted_chunk(&input, weight, chunk.clone(), lora.map(|(lora, _)| lora));
            self.softmax(chunk.clone(), NONE, false, true);
            self.head_gradients(x, weight, &chunk, lora);
            let (logits, count) = (self.scratch.logits, chunk.len() as u32);
            let plain = Input { at: logits, stride: CHUNK as u32, rows: Rows::Outputs, made: Made::Plain };
            let dy = self.rows_of(plain, count, &[weight], true, 1);
            self.turned(&dy, weight, chunk, so_far, dx);
            so_far = self.at(dx);
        }
    }
}
