//! The ops of learning on the CPU: adapters and gradients of values. The cross-entropy's gradient and the head's adapter
//! are in `ops_head`, gradients of the weights and of the embedding's adapter in `ops_weights`.
//!
//! Rows are divided among the threads; sums over rows (the adapters' gradients) are divided by the rows of the parameter
//! instead, so that nothing is added up across threads and a run gives the same bits for any number of them.

use super::executor::{Arithmetic, Context, Scratch};
use super::kernels::gemm::{self, Gemm};
use super::kernels::linear::RoundedBackwardTask;
use super::kernels::{activation, attention, dropout, linear, norm, rope, vector};
use super::matrix::Matrix;
use super::pool::Team;
use super::{fusion, ops, ops_head, ops_loss, ops_weights};
use crate::tape::{
    AttentionBackward, Dropout, Lora, LoraBackward, Op, ParamId, Rescale, Rope, Rows, Value, WeightId, adapted_norm,
    magnitude_ratio,
};
use crate::{quant, random};

impl<'a> Context<'a> {
    /// The parameter that a weight is, where the weights are trained.
    pub(super) fn trained(&self, weight: WeightId) -> Option<ParamId> {
        self.tape.trains_weights.then_some(ParamId(weight.0))
    }

    /// A trained matrix, `[rows, width]`.
    pub(super) fn param(&self, id: ParamId) -> &'a [f32] {
        let p = &self.tape.params[id.0 as usize];
        // SAFETY: the executor was given a vector of all parameters, which nobody writes during a run.
        unsafe { std::slice::from_raw_parts(self.params.add(p.offset), p.rows * p.width) }
    }

    /// Rows of the gradient of a trained matrix.
    ///
    /// # Safety
    /// Only this thread may use these rows meanwhile.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn gradient(&self, id: ParamId, rows: std::ops::Range<usize>) -> &'a mut [f32] {
        let p = &self.tape.params[id.0 as usize];
        // SAFETY: as large as the parameters; exclusive by the caller's promise.
        unsafe {
            std::slice::from_raw_parts_mut(self.gradients.add(p.offset + rows.start * p.width), rows.len() * p.width)
        }
    }

    /// Some columns of one row of the gradient of a trained matrix.
    ///
    /// # Safety
    /// Only this thread may use these columns meanwhile.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn gradient_columns(
        &self,
        id: ParamId,
        row: usize,
        columns: std::ops::Range<usize>,
    ) -> &'a mut [f32] {
        let p = &self.tape.params[id.0 as usize];
        debug_assert!(row < p.rows && columns.end <= p.width);
        // SAFETY: as in `gradient`.
        unsafe {
            let at = self.gradients.add(p.offset + row * p.width + columns.start);
            std::slice::from_raw_parts_mut(at, columns.len())
        }
    }

    pub(super) fn param_shape(&self, id: ParamId) -> (usize, usize) {
        let p = &self.tape.params[id.0 as usize];
        (p.rows, p.width)
    }
}

/// Executes this thread's part of an op of learning.
///
/// # Safety
/// As for [`ops::run`].
pub(super) unsafe fn run(c: &Context<'_>, op: &Op, team: &Team<'_>, scratch: &mut Scratch, round: usize) {
    // SAFETY: as in `ops::run`: each arm writes rows or columns of this thread's share only.
    unsafe {
        match op {
            Op::Lora(op) => lora(c, op, team),
            Op::LoraBackward(op) => lora_backward(c, op, team),
            Op::Dropout(op) => {
                let (x, y) = (c.matrix(op.x), c.matrix(op.out));
                let mask = mask(c, op);
                for row in team.share(y.rows, 1) {
                    y.begin_from(&x, row, 0..y.width);
                    dropout::dropout_inplace(c.isa, &mask, token_row(c, op.out, row), y.row_mut(row));
                }
            }
            Op::DropoutBackward { forward, dy, dx, out } => {
                let (dy, y) = (c.matrix(*dy), c.matrix(*out));
                let mask = mask(c, forward);
                for row in team.share(y.rows, 1) {
                    begin(c, *dx, *out, row..row + 1);
                    let token = token_row(c, *out, row);
                    dropout::dropout(c.isa, &mask, token, dy.row(row), y.row_mut(row), dx.is_some());
                }
            }
            Op::RowNorms { weight, a, b, scale, out } => row_norms(c, *weight, (*a, *b), *scale, *out, team),
            Op::Rescale(op) => rescale(c, op, team),
            Op::RescaleBackward { forward, dy, out } => rescale_backward(c, forward, *dy, *out, team),
            Op::LinearBackward { parts, dx, out } => {
                let y = c.matrix(*out);
                let rows = team.share(y.rows, 1);
                let dx = c.fusion.before(*dx, *out);
                begin(c, dx, *out, rows.clone());
                if c.arithmetic != Arithmetic::Exact {
                    linear_backward_rounded(c, parts, *out, dx.is_some(), team, scratch);
                    return;
                }
                let begun = fusion::begin_backward(c, *out, rows.clone(), 0..y.width, dx.is_some());
                for (i, (dy, weight)) in parts.iter().enumerate() {
                    let dy = c.matrix(*dy);
                    let all = 0..c.weights.get(*weight).rows;
                    linear_backward(c, *weight, all, &dy, rows.clone(), &y, i > 0 || begun, scratch);
                }
            }
            Op::RmsNormBackward { x, weight, dy, dx, out } => {
                let (x, dy, y) = (c.matrix(*x), c.matrix(*dy), c.matrix(*out));
                let weight = c.vector(*weight);
                for row in team.share(y.rows, 1) {
                    begin(c, *dx, *out, row..row + 1);
                    let (x, dy, y) = (x.row(row), dy.row(row), y.row_mut(row));
                    let inv_rms = norm::inverse_rms(c.isa, x, c.tape.spec.norm_eps);
                    norm::rms_norm_backward(c.isa, x, weight, dy, inv_rms, y, dx.is_some());
                }
            }
            Op::GatedBackward { kind, gate, up, dy, d_gate, d_up } => {
                let [gate, up, dy, d_gate, d_up] = [gate, up, dy, d_gate, d_up].map(|v| c.matrix(*v));
                for row in team.share(dy.rows, 1) {
                    let (d_gate, d_up) = (d_gate.row_mut(row), d_up.row_mut(row));
                    activation::gated_backward(c.isa, *kind, gate.row(row), up.row(row), dy.row(row), d_gate, d_up);
                }
            }
            Op::AttentionBackward(op) => attention_backward(c, op, team, scratch, round),
            Op::RopeBackward { forward, d, out } => rope_backward(c, forward, *d, *out, team),
            Op::ScatterOutputs { x, out } => {
                let (x, y) = (c.matrix(*x), c.matrix(*out));
                for row in team.share(y.rows, 1) {
                    match c.outputs.binary_search(&(row as u32)) {
                        Ok(at) => y.row_mut(row).copy_from_slice(x.row(at)),
                        Err(_) => y.row_mut(row).fill(0.0),
                    }
                }
            }
            Op::CrossEntropyGrad { x, weight, out, dx, lora } => {
                if c.trained(*weight).is_none() && lora.is_none() {
                    return ops_loss::cross_entropy_grad(c, (*x, *weight), (*out, *dx), team, scratch);
                }
                ops::cross_entropy(c, *x, *weight, *out, lora.as_ref().map(|(lora, _)| lora), team, scratch, round);
                ops_head::cross_entropy_gradient(c, *x, *weight, *out, *dx, lora.as_ref(), team, scratch);
            }
            Op::LoraHidden(_) | Op::LoraHiddenBackward { .. } => ops_head::run(c, op, team),
            _ => ops_weights::run(c, op, team),
        }
    }
}

/// Brings the gradient so far to where the op adds to it, unless it is there already.
///
/// # Safety
/// This thread alone uses these rows.
pub(super) unsafe fn begin(c: &Context<'_>, dx: Option<Value>, out: Value, rows: std::ops::Range<usize>) {
    let Some(dx) = dx else { return };
    let (dx, y) = (c.matrix(dx), c.matrix(out));
    for row in rows {
        // SAFETY: by the caller's promise.
        unsafe { y.begin_from(&dx, row, 0..y.width) };
    }
}

/// `out (+)= dy·W` for some rows, `W` being the rows `part` of a matrix.
///
/// # Safety
/// This thread alone uses these rows of `out`.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn linear_backward(
    c: &Context<'_>,
    weight: WeightId,
    part: std::ops::Range<usize>,
    dy: &Matrix,
    rows: std::ops::Range<usize>,
    out: &Matrix,
    accumulate: bool,
    scratch: &mut Scratch,
) {
    if rows.is_empty() {
        return;
    }
    let info = c.weights.get(weight);
    let (dtype, bytes) = c.weight_rows(weight, part.clone());
    let task = linear::LinearBackwardTask {
        dtype,
        weight: bytes,
        k: info.width,
        rows: part.len(),
        // SAFETY: written before the last barrier.
        dy: unsafe { dy.all(0..dy.rows) },
        dy_stride: dy.width,
        tokens: rows,
        dx: out.out(),
        accumulate,
    };
    // The sizes were checked when the weights were resolved and the arena planned.
    if let Err(e) = linear::linear_backward(c.isa, &task, &mut scratch.linear) {
        unreachable!("{}: {e}", info.name);
    }
}

/// How the gradient of a map's output is rounded for the gradient of its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rounding {
    /// To bfloat16, where there is a matrix unit.
    Tiles,
    /// To 8 bits, where an instruction is made for it.
    Bytes,
    /// To 16 bits.
    Words,
}

impl Rounding {
    /// For the map of `weight`; weights that are not quantized are meant to be more accurate.
    fn of(c: &Context<'_>, weight: WeightId) -> Rounding {
        let quantized = linear::needs_q8(c.weights.get(weight).dtype);
        match c.arithmetic {
            Arithmetic::Narrow if quantized && linear::has_tiles(c.isa) => Rounding::Tiles,
            Arithmetic::Narrow if quantized && linear::has_backward::<u8>(c.isa) => Rounding::Bytes,
            _ => Rounding::Words,
        }
    }
}

/// Bytes that are enough for `rows` rows of `k` values, however they are rounded.
pub(super) fn rounding_bytes(rows: usize, k: usize) -> usize {
    linear::rounded_bytes::<i16>(rows, k).max(linear::tiled_bytes(rows, k))
}

/// Rounds the first `k` values of some rows of a gradient, as the map of `weight` wants it, into `place`.
///
/// # Safety
/// As for [`Context::round`].
pub(super) unsafe fn round(
    c: &Context<'_>,
    weight: WeightId,
    dy: &Matrix,
    k: usize,
    rows: std::ops::Range<usize>,
    place: usize,
) {
    // SAFETY: by the caller's promise.
    unsafe {
        match Rounding::of(c, weight) {
            Rounding::Tiles => {
                let to = linear::TiledMut::new(c.arena.add(place), dy.rows, k);
                let done = linear::tile_rows(c.isa, dy.all(0..rows.end), dy.width, rows, &to);
                debug_assert!(done.is_ok());
            }
            Rounding::Bytes => c.round::<u8>(dy, k, rows, place),
            Rounding::Words => c.round::<i16>(dy, k, rows, place),
        }
    }
}

/// The same with rounded factors for several maps of one input: all threads round the gradients of the outputs together,
/// then divide the columns of `out`, so that each unpacks its own part of the weights.
///
/// # Safety
/// All threads of the team come here; `out` has its first values.
unsafe fn linear_backward_rounded(
    c: &Context<'_>,
    parts: &[(Value, WeightId)],
    to: Value,
    accumulate: bool,
    team: &Team<'_>,
    scratch: &mut Scratch,
) {
    let out = &c.matrix(to);
    if out.rows == 0 {
        return;
    }
    let mut place = c.tables.rounded[1];
    let mut inputs = Vec::with_capacity(parts.len());
    for (dy, weight) in parts {
        let dy = c.matrix(*dy);
        // SAFETY: the place was reserved for all parts together; shares are disjoint.
        unsafe { round(c, *weight, &dy, dy.width, team.share(dy.rows, 1), place) };
        inputs.push((dy, *weight, place));
        place += rounding_bytes(dy.rows, dy.width);
    }
    team.wait();
    let columns = team.share(out.width, ops::ROW_UNIT);
    // SAFETY: this thread's columns.
    let accumulate = unsafe { fusion::begin_backward(c, to, 0..out.rows, columns.clone(), accumulate) };
    for (i, (dy, weight, place)) in inputs.into_iter().enumerate() {
        let rounded = (dy.rows, dy.width, place);
        // SAFETY: complete behind the barrier; this thread's columns.
        unsafe {
            let accumulate = accumulate || i > 0;
            rounded_columns(c, weight, 0..dy.width, rounded, columns.clone(), out, accumulate, scratch);
        }
    }
}

/// `out (+)= dy·W` for some columns, `W` being the rows `part` of a matrix, and `dy` what [`round`] has written: rows, their
/// width and the place.
///
/// # Safety
/// `dy` is complete; this thread alone uses these columns of `out`.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn rounded_columns(
    c: &Context<'_>,
    weight: WeightId,
    part: std::ops::Range<usize>,
    dy: (usize, usize, usize),
    columns: std::ops::Range<usize>,
    out: &Matrix,
    accumulate: bool,
    scratch: &mut Scratch,
) {
    let info = c.weights.get(weight);
    let (dtype, weight_rows) = c.weight_rows(weight, part);
    let (tokens, width, place) = dy;
    let (isa, k, dx, scratch) = (c.isa, info.width, out.out(), &mut scratch.linear);
    // SAFETY: by the caller's promise.
    let done = unsafe {
        let rounding = Rounding::of(c, weight);
        let weight = weight_rows;
        match rounding {
            Rounding::Tiles => {
                let tiles = linear::tiled_bytes(tokens, width);
                let tiles = std::slice::from_raw_parts(c.arena.add(place).cast_const(), tiles);
                linear::Tiled::new(tiles, tokens, width).and_then(|dy| {
                    let task = RoundedBackwardTask { dtype, weight, k, columns, dy: &dy, dx, accumulate };
                    linear::linear_backward_tiled(isa, &task, scratch)
                })
            }
            Rounding::Bytes => {
                let dy = &c.rounded::<u8>(tokens, width, place);
                let task = RoundedBackwardTask { dtype, weight, k, columns, dy, dx, accumulate };
                linear::linear_backward_rounded(isa, &task, scratch)
            }
            Rounding::Words => {
                let dy = &c.rounded::<i16>(tokens, width, place);
                let task = RoundedBackwardTask { dtype, weight, k, columns, dy, dx, accumulate };
                linear::linear_backward_rounded(isa, &task, scratch)
            }
        }
    };
    // The sizes were checked when the weights were resolved and the arena planned.
    if let Err(e) = done {
        unreachable!("{}: {e}", info.name);
    }
}

/// `c (+)= α·a·b` in one of the three forms of [`gemm`]; `(m, n, k)` are its sizes, strides go with the slices.
///
/// # Safety
/// `c` holds `m` rows of `n` values and is this thread's alone.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn product(
    c: &Context<'_>,
    form: fn(super::isa::Isa, &Gemm<'_>) -> crate::Result<()>,
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    a: (&[f32], usize),
    b: (&[f32], usize),
    out: &mut [f32],
    accumulate: bool,
) {
    // SAFETY: the slice is as long as it says, and exclusive.
    let out = unsafe { linear::OutMut::new(out.as_mut_ptr(), n, out.len()) };
    product_to(c, form, (m, n, k), alpha, a, b, out, accumulate);
}

/// As [`product`], to some columns of a matrix.
#[allow(clippy::too_many_arguments)]
pub(super) fn product_to(
    c: &Context<'_>,
    form: fn(super::isa::Isa, &Gemm<'_>) -> crate::Result<()>,
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    (a, a_stride): (&[f32], usize),
    (b, b_stride): (&[f32], usize),
    out: linear::OutMut,
    accumulate: bool,
) {
    let task = Gemm { m, n, k, alpha, a, a_stride, b, b_stride, c: out, accumulate };
    // The sizes come from the tape's own table.
    if let Err(e) = form(c.isa, &task) {
        unreachable!("adapter: {e}");
    }
}

unsafe fn lora(c: &Context<'_>, op: &Lora, team: &Team<'_>) {
    // SAFETY: all threads are in this op.
    if unsafe { fusion::store_hidden(c, op, team) } {
        return;
    }
    let [x, h, out] = [op.x, op.h, op.out].map(|v| c.matrix(v));
    let (rank, width) = c.param_shape(op.a);
    let rows = team.share(out.rows, 1);
    if rows.is_empty() {
        return;
    }
    let (n, wide) = (rows.len(), out.width);
    // SAFETY: this thread's rows.
    unsafe {
        begin(c, Some(op.y), op.out, rows.clone());
        let (h, y) = (rows_mut(&h, rows.clone()), rows_mut(&out, rows.clone()));
        product(c, gemm::gemm_nt, (n, rank, width), 1.0, (x.all(rows), width), (c.param(op.a), width), h, false);
        product(c, gemm::gemm_nt, (n, wide, rank), op.scale, (h, rank), (c.param(op.b), rank), y, true);
    }
}

unsafe fn lora_backward(c: &Context<'_>, op: &LoraBackward, team: &Team<'_>) {
    let f = &op.forward;
    let [x, h, dy, e] = [f.x, f.h, op.dy, op.e].map(|v| c.matrix(v));
    let (rank, width) = c.param_shape(f.a);
    let wide = c.param_shape(f.b).0;
    let rows = team.share(dy.rows, 1);
    // SAFETY: this thread's rows, of values first and of gradients then.
    unsafe {
        if !rows.is_empty() {
            let n = rows.len();
            let e = rows_mut(&e, rows.clone());
            product(
                c,
                gemm::gemm_nn,
                (n, rank, wide),
                f.scale,
                (dy.all(rows.clone()), wide),
                (c.param(f.b), rank),
                e,
                false,
            );
            if let Some(out) = op.out.filter(|_| !c.fusion.is_added_later(op)) {
                begin(c, op.dx, out, rows.clone());
                let y = rows_mut(&c.matrix(out), rows.clone());
                product(c, gemm::gemm_nn, (n, width, rank), 1.0, (e, rank), (c.param(f.a), width), y, op.dx.is_some());
            }
        }
        team.wait();
        let n = dy.rows;
        if n == 0 {
            return;
        }
        let (b_rows, a_columns) = (team.share(wide, 8), team.share(width, ops::ROW_UNIT));
        if !b_rows.is_empty() {
            let dy = (&dy.all(0..n)[b_rows.start..], wide);
            let out = c.gradient(f.b, b_rows.clone());
            product(c, gemm::gemm_tn, (b_rows.len(), rank, n), f.scale, dy, (h.all(0..n), rank), out, true);
        }
        if !a_columns.is_empty() {
            // Columns instead of rows, of which there are few.
            let (m, n, k) = (rank, a_columns.len(), n);
            let gradient = c.gradient_columns(f.a, 0, 0..width).as_mut_ptr().add(a_columns.start);
            let out = linear::OutMut::new(gradient, width, rank * width - a_columns.start);
            let (a, b) = (e.all(0..k), &x.all(0..k)[a_columns.start..]);
            let task = Gemm { m, n, k, alpha: 1.0, a, a_stride: rank, b, b_stride: width, c: out, accumulate: true };
            // The sizes come from the tape's own table.
            if let Err(e) = gemm::gemm_tn(c.isa, &task) {
                unreachable!("adapter: {e}");
            }
        }
    }
}

/// The mask of a map in this run.
fn mask(c: &Context<'_>, op: &Dropout) -> dropout::Mask {
    // The seed is spread over all bits: those of neighbouring runs would otherwise be neighbouring streams.
    dropout::Mask::new(op.stream ^ random::splitmix64(c.dropout_seed, 0), op.rate)
}

/// The run's row that row `row` of a value belongs to.
fn token_row(c: &Context<'_>, value: Value, row: usize) -> usize {
    match c.tape.info(value).rows {
        Rows::Outputs => c.outputs[row] as usize,
        Rows::Tokens | Rows::One => row,
    }
}

unsafe fn row_norms(
    c: &Context<'_>,
    weight: WeightId,
    (a, b): (ParamId, ParamId),
    scale: f32,
    out: Value,
    team: &Team<'_>,
) {
    let (info, out) = (c.weights.get(weight), c.matrix(out));
    let (a, b, rank) = (c.param(a), c.param(b), c.param_shape(b).1);
    let mut row = vec![0.0; info.width];
    let rows = team.share(info.rows, 8);
    // SAFETY: this thread's columns of the one row.
    let norms = unsafe { out.columns_mut(0, rows.clone()) };
    for (norm, o) in norms.iter_mut().zip(rows) {
        // The sizes were checked when the weights were resolved.
        if let Err(e) = quant::dequantize(info.dtype, c.weights.rows(weight, o..o + 1), &mut row) {
            unreachable!("{}: {e}", info.name);
        }
        *norm = adapted_norm(&mut row, scale, &b[o * rank..][..rank], a);
    }
}

/// Factors on some columns of a rescaled map.
///
/// # Safety
/// The norms are complete.
unsafe fn ratios(c: &Context<'_>, op: &Rescale, columns: std::ops::Range<usize>) -> Vec<f32> {
    // SAFETY: by the caller's promise.
    let norms = unsafe { &c.matrix(op.norms).row(0)[columns.clone()] };
    c.param(op.magnitude)[columns].iter().zip(norms).map(|(m, n)| magnitude_ratio(*m, *n)).collect()
}

unsafe fn rescale(c: &Context<'_>, op: &Rescale, team: &Team<'_>) {
    let (y, out) = (c.matrix(op.y), c.matrix(op.out));
    let columns = team.share(out.width, ops::ROW_UNIT);
    // SAFETY: computed by an op before.
    let ratios = unsafe { ratios(c, op, columns.clone()) };
    for row in 0..out.rows {
        // SAFETY: this thread's columns; input and output are the same memory or apart.
        unsafe {
            out.begin_from(&y, row, columns.clone());
            let out = out.columns_mut(row, columns.clone());
            out.iter_mut().zip(&ratios).for_each(|(y, ratio)| *y *= ratio);
            if let Some(bias) = op.bias {
                vector::add(c.isa, &c.vector(bias)[columns.clone()], out);
            }
            if let Some(residual) = op.residual {
                vector::add(c.isa, &c.matrix(residual).row(row)[columns.clone()], out);
            }
        }
    }
}

unsafe fn rescale_backward(c: &Context<'_>, op: &Rescale, dy: Value, out: Value, team: &Team<'_>) {
    let (y, dy, out) = (c.matrix(op.y), c.matrix(dy), c.matrix(out));
    let columns = team.share(out.width, ops::ROW_UNIT);
    let mut sums = vec![0.0f64; columns.len()];
    // SAFETY: this thread's columns, of the values and then of the magnitude's one row.
    unsafe {
        let ratios = ratios(c, op, columns.clone());
        for row in 0..out.rows {
            out.begin_from(&dy, row, columns.clone());
            let out = out.columns_mut(row, columns.clone());
            for (((out, y), ratio), sum) in out.iter_mut().zip(&y.row(row)[columns.clone()]).zip(&ratios).zip(&mut sums)
            {
                *sum += f64::from(*out) * f64::from(*y);
                *out *= ratio;
            }
        }
        let norms = &c.matrix(op.norms).row(0)[columns.clone()];
        let gradient = &mut c.gradient(op.magnitude, 0..1)[columns];
        for ((gradient, norm), sum) in gradient.iter_mut().zip(norms).zip(sums) {
            *gradient += magnitude_ratio(sum as f32, *norm);
        }
    }
}

/// Several rows to be written.
///
/// # Safety
/// This thread alone uses them.
pub(super) unsafe fn rows_mut<'a>(matrix: &Matrix, rows: std::ops::Range<usize>) -> &'a mut [f32] {
    // SAFETY: in bounds, as rows are contiguous; exclusive by the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(matrix.row_ptr(rows.start), rows.len() * matrix.width) }
}

unsafe fn attention_backward(
    c: &Context<'_>,
    op: &AttentionBackward,
    team: &Team<'_>,
    scratch: &mut Scratch,
    round: usize,
) {
    let spec = &c.tape.spec;
    let group = spec.heads / spec.kv_heads;
    let [q, k, v] = op.qkv.map(|value| c.matrix(value));
    let [dq, dk, dv] = op.d_qkv.map(|value| c.matrix(value));
    let [out, lse, d_out] = [op.out, op.lse, op.d_out].map(|value| c.matrix(value));
    // A piece is a query head, so that there are enough of them; what those of one group give is added up afterwards.
    let [dk_parts, dv_parts] = [0, 1].map(|i| {
        let at = c.tables.heads + i * q.rows * q.width * 4;
        // SAFETY: reserved for as many rows of all query heads, twice.
        unsafe { Matrix::new(c.arena.add(at).cast(), q.rows, q.width) }
    });
    let [dk_out, dv_out] = if group == 1 { [dk, dv] } else { [dk_parts, dv_parts] };
    team.claim(round, c.sequences.len() * spec.heads, |piece| {
        let (s, head) = (&c.sequences[piece / spec.heads], piece % spec.heads);
        let at = s.first_row;
        let task = attention::AttentionBackwardTask {
            rows: (0, s.rows),
            q: q.row_ptr(at),
            q_stride: q.width,
            k: k.row_ptr(at),
            k_stride: k.width,
            v: v.row_ptr(at),
            v_stride: v.width,
            out: out.row_ptr(at),
            d_out: d_out.row_ptr(at),
            out_stride: out.width,
            lse: lse.row_ptr(at),
            lse_stride: lse.width,
            dq: dq.row_ptr(at),
            dq_stride: dq.width,
            dk: dk_out.row_ptr(at),
            dk_stride: dk_out.width,
            dv: dv_out.row_ptr(at),
            dv_stride: dv_out.width,
            kv_head: head / group,
            heads: (head, head + 1),
            d_head: head,
            head_dim: spec.head_dim,
            window: op.window,
            starts: None,
            scale: spec.attention_scale,
            softcap: spec.attention_softcap,
            alibi: spec.alibi.as_deref(),
            exact: c.arithmetic == Arithmetic::Exact,
        };
        // SAFETY: all rows of the sequence lie in the arena; each piece writes its own heads.
        unsafe { attention::attention_backward(c.isa, &task, scratch.floats()) };
    });
    if group == 1 {
        return;
    }
    team.wait();
    let dim = spec.head_dim;
    for row in team.share(dk.rows, 1) {
        // SAFETY: the parts are complete behind the barrier; this thread's rows.
        unsafe {
            for (parts, sums) in [(dk_parts.row(row), dk.row_mut(row)), (dv_parts.row(row), dv.row_mut(row))] {
                for (parts, sum) in parts.chunks_exact(group * dim).zip(sums.chunks_exact_mut(dim)) {
                    sum.copy_from_slice(&parts[..dim]);
                    parts[dim..].chunks_exact(dim).for_each(|part| vector::add(c.isa, part, sum));
                }
            }
        }
    }
}

unsafe fn rope_backward(c: &Context<'_>, op: &Rope, [dq, dk]: [Value; 2], [q_out, k_out]: [Value; 2], team: &Team<'_>) {
    let spec = &c.tape.spec;
    let dim = spec.head_dim;
    let parts = [(op.q, dq, q_out, op.q_norm, spec.heads), (op.k, dk, k_out, op.k_norm, spec.kv_heads)];
    for (input, gradient, out, norm_weight, heads) in parts {
        let (x, d, y) = (c.matrix(input), c.matrix(gradient), c.matrix(out));
        let mut turned = vec![0.0; dim];
        for item in team.share(y.rows * heads, 1) {
            let (row, columns) = (item / heads, item % heads * dim..(item % heads + 1) * dim);
            // SAFETY: this thread's head of this row.
            let (from, to) = unsafe { (&d.row(row)[columns.clone()], y.columns_mut(row, columns.clone())) };
            turned.copy_from_slice(from);
            turn_back(c, op, row, &mut turned);
            match norm_weight {
                None => to.copy_from_slice(&turned),
                Some(weight) => {
                    let weight = c.vector(weight);
                    // SAFETY: the forward op's input, which is kept.
                    let x = unsafe { &x.row(row)[columns] };
                    let inv_rms = norm::inverse_rms(c.isa, x, spec.norm_eps);
                    norm::rms_norm_backward(c.isa, x, weight, &turned, inv_rms, to, false);
                }
            }
        }
    }
}

/// The gradient of a head before its rotation, from that behind it.
pub(super) fn turn_back(c: &Context<'_>, op: &Rope, row: usize, head: &mut [f32]) {
    let Some(index) = op.rope else { return };
    let (cos, sin) = ops::rope_row(c, row, index);
    rope::rope_backward(c.isa, head, head.len(), cos, sin, c.tape.spec.ropes[index].style);
}
