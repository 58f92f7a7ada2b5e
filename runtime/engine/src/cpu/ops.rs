//! Every op of the tape on the CPU: which part each thread of the team computes, with which kernel.
//!
//! Rows of weights are divided statically, so that a thread streams its own contiguous part; rows of activations
//! likewise; attention is claimed in pieces because causal pieces differ in size. A value that a quantized map will read
//! gets its 8-bit form from the op that writes it.

use std::ops::Range;

use super::executor::{Arithmetic, Context, Input, Scratch, SequenceView, VOCAB_CHUNK};
use super::fusion;
use super::isa::Isa;
use super::kernels::{activation, attention, embed, linear, lora, norm, rope, vector};
use super::kv::PAGE;
use super::matrix::Matrix;
use super::ops_head;
use super::patch::{GAIN_COLUMNS, PartPatch, Patch};
use super::pool::Team;
use crate::Result;
use crate::quant::DType;
use crate::tape::{Attention, Epilogue, Gate, HeadLora, KvSource, Linear, Op, Part, Rope, Value, WeightId};

/// Rows of weights that stay with one thread: whole tiles of every kernel, whole groups of 32 for the 8-bit form.
pub(super) const ROW_UNIT: usize = 32;
/// Columns of a gated pair that are computed at a time where there are many rows, and from how many on.
pub(super) const STRIP: usize = 128;
const STRIP_ROWS: usize = 32;
/// Query rows of a piece of attention.
const QUERY_ROWS: usize = 64;

impl<'a> Context<'a> {
    /// Rows of a matrix as kernels read them, and their type: in the mapped file, or among the trained parameters.
    pub(super) fn weight_rows(&self, weight: WeightId, rows: Range<usize>) -> (DType, &'a [u8]) {
        match self.trained(weight) {
            None => (self.weights.get(weight).dtype, self.weights.rows(weight, rows)),
            Some(id) => {
                let width = self.weights.get(weight).width;
                (DType::F32, bytemuck::cast_slice(&self.param(id)[rows.start * width..rows.end * width]))
            }
        }
    }

    /// A norm's or a bias's elements.
    pub(super) fn vector(&self, weight: WeightId) -> &'a [f32] {
        match self.trained(weight) {
            None => self.weights.get(weight).vector(),
            Some(id) => self.param(id),
        }
    }

    fn rows(&self, value: Value) -> usize {
        match self.tape.info(value).rows {
            crate::tape::Rows::Tokens => self.tokens.len(),
            crate::tape::Rows::Outputs => self.outputs.len(),
            crate::tape::Rows::One => 1,
        }
    }

    pub(super) fn matrix(&self, value: Value) -> Matrix {
        let offset = self.plan.place(value).offset;
        // SAFETY: the plan reserved `rows · width` floats there, for at least as many rows as this run has.
        unsafe { Matrix::new(self.arena.add(offset).cast(), self.rows(value), self.tape.info(value).width) }
    }

    /// Where a value's quantized forms lie that are read in this run: the one in 8 bits, and behind it the one in tiles. Where there
    /// are tiles, only corrections read 8 bits.
    fn quantized(&self, value: Value) -> (Option<usize>, Option<usize>) {
        let (rows, place) = (self.rows(value), self.plan.place(value).quantized);
        let tiles = !self.alone && linear::needs_tiles(self.isa, rows);
        let behind = |at| at + linear::activation_bytes(rows, self.tape.info(value).width);
        (place.filter(|_| !tiles || self.patches.is_some()), place.filter(|_| tiles).map(behind))
    }

    /// What a linear kernel reads of a value.
    ///
    /// # Safety
    /// No thread may be writing to the value.
    pub(super) unsafe fn activations(&self, value: Value) -> linear::Activations<'_> {
        let matrix = self.matrix(value);
        let (rows, k) = (matrix.rows, matrix.width);
        let (q8, tiled) = self.quantized(value);
        // SAFETY: reserved by the plan, written before the last barrier.
        let reserved = |at: usize, bytes: usize| unsafe { std::slice::from_raw_parts(self.arena.add(at), bytes) };
        let q8 = q8.map(|at| reserved(at, linear::activation_bytes(rows, k)));
        let tiled = tiled.map(|at| reserved(at, linear::tiled_bytes(rows, k)));
        linear::Activations {
            // SAFETY: by the caller's promise.
            f32s: unsafe { matrix.all(0..rows) },
            q8: q8.and_then(|bytes| linear::Q8::new(bytes, rows, k).ok()),
            tiled: tiled.and_then(|bytes| linear::Tiled::new(bytes, rows, k).ok()),
            wide: None,
            low: None,
            tokens: matrix.rows,
            k: matrix.width,
            stride: matrix.width,
        }
    }

    /// Whether nothing reads a value but by its quantized form.
    fn is_read_quantized_only(&self, value: Value) -> bool {
        self.quantized_only[value.0 as usize] && self.patches.is_none()
    }

    /// Quantizes some rows of `value`, or lays them in tiles, if a linear map will want them.
    ///
    /// # Safety
    /// The rows must be complete, and this thread the only one to quantize them.
    unsafe fn quantize(&self, value: Value, rows: Range<usize>) {
        let matrix = self.matrix(value);
        // SAFETY: by the caller's promise.
        unsafe { self.quantize_from(value, matrix.all(0..rows.end), matrix.width, rows, 0..matrix.width) };
    }

    /// The same for the values `columns` of some rows, which `x` has at `stride`.
    ///
    /// # Safety
    /// This thread is the only one to quantize them.
    unsafe fn quantize_from(&self, value: Value, x: &[f32], stride: usize, rows: Range<usize>, columns: Range<usize>) {
        let (q8, tiled) = self.quantized(value);
        let (all, k) = (self.rows(value), self.tape.info(value).width);
        // SAFETY: by the caller's promise; the plan reserved the bytes of both for at least as many rows.
        unsafe {
            if let Some(at) = tiled {
                let to = linear::TiledMut::new(self.arena.add(at), all, k);
                let done = linear::tile_columns(self.isa, x, stride, rows.clone(), columns.clone(), &to);
                debug_assert!(done.is_ok());
            }
            if let Some(at) = q8 {
                let to = linear::Q8Mut::new(self.arena.add(at), all, k);
                let done = linear::quantize_columns(self.isa, x, stride, rows, columns, &to);
                debug_assert!(done.is_ok());
            }
        }
    }

    /// Whether threads may quantize what they have written of `value` by themselves, with [`Context::quantize_own`], where that is
    /// columns `at · unit ..` of a row: whole groups, and no tiles, which take sixteen rows together.
    fn quantizes_own(&self, value: Value, unit: usize) -> bool {
        unit.is_multiple_of(linear::GROUP) && self.quantized(value).1.is_none()
    }

    /// Quantizes columns of a row that this thread has just written, so that threads need not meet for it.
    ///
    /// # Safety
    /// This thread alone uses those columns.
    unsafe fn quantize_own(&self, value: Value, row: usize, columns: Range<usize>) {
        if columns.is_empty() {
            return;
        }
        // SAFETY: by the caller's promise. There is one row, so its distance from the next does not matter.
        unsafe {
            let own = self.matrix(value).columns_mut(row, columns.clone());
            self.quantize_from(value, own, 0, row..row + 1, columns);
        }
    }

    /// Waits for all threads to finish `value`, then quantizes it together.
    ///
    /// # Safety
    /// All threads of the team must come here.
    unsafe fn quantize_together(&self, value: Value, team: &Team<'_>) {
        if self.plan.place(value).quantized.is_some() {
            team.wait();
            // SAFETY: complete behind the barrier; shares are disjoint.
            unsafe { self.quantize(value, team.share(self.rows(value), 1)) };
        }
    }

    /// As [`Context::activations`], for an op whose threads all come here: where one of its matrices reads more of the value than
    /// its own form they round it together first, and meet.
    ///
    /// # Safety
    /// As for [`Context::activations`]; nobody reads what the last op has rounded.
    pub(super) unsafe fn linear_input(
        &self,
        value: Value,
        matrices: impl Iterator<Item = WeightId>,
        team: &Team<'_>,
    ) -> linear::Activations<'_> {
        // SAFETY: by the caller's promise.
        let mut x = unsafe { self.activations(value) };
        let (matrix, place) = (self.matrix(value), self.tables.rounded[0]);
        let (rows, k) = (matrix.rows, matrix.width);
        // There is one place for all of them.
        let input = matrices.map(|id| self.input(id, rows)).max().unwrap_or(Input::Own);
        if input == Input::Own {
            return x;
        }
        // SAFETY: the place was reserved for the value; shares are disjoint, and complete behind the barrier.
        unsafe {
            let mine = team.share(rows, 1);
            if input == Input::Words {
                self.round::<i16>(&matrix, k, mine, place);
                team.wait();
                x.wide = Some(self.rounded(rows, k, place));
            } else {
                let to = linear::TiledMut::new(self.arena.add(place), rows, k);
                let done = linear::tile_rests(self.isa, matrix.all(0..mine.end), k, mine, &to);
                debug_assert!(done.is_ok());
                team.wait();
                let bytes = std::slice::from_raw_parts(self.arena.add(place), linear::tiled_bytes(rows, k));
                x.low = linear::Tiled::new(bytes, rows, k).ok();
            }
        }
        x
    }

    /// What a map reads of an input of `rows` rows.
    fn input(&self, weight: WeightId, rows: usize) -> Input {
        match self.inputs[weight.0 as usize] {
            Input::Rests if self.alone || !linear::needs_tiles(self.isa, rows) => Input::Words,
            input => input,
        }
    }

    /// Rounds the first `k` values of some rows of `x`, into `place` of the arena.
    ///
    /// # Safety
    /// `place` was reserved for all rows of `k`; nobody else writes these rows, or reads them yet.
    pub(super) unsafe fn round<Q: linear::Level>(&self, x: &Matrix, k: usize, rows: Range<usize>, place: usize) {
        // SAFETY: by the caller's promise.
        let done = unsafe {
            let to = linear::RoundedMut::new(self.arena.add(place), x.rows, k);
            linear::round_rows::<Q>(self.isa, x.all(0..rows.end), x.width, rows, &to)
        };
        debug_assert!(done.is_ok());
    }

    /// What [`Context::round`] has written to `place`.
    ///
    /// # Safety
    /// All rows have been, with these sizes.
    pub(super) unsafe fn rounded<Q: linear::Level>(
        &self,
        rows: usize,
        k: usize,
        place: usize,
    ) -> linear::Rounded<'_, Q> {
        // SAFETY: by the caller's promise.
        let bytes = unsafe { std::slice::from_raw_parts(self.arena.add(place), linear::rounded_bytes::<Q>(rows, k)) };
        match linear::Rounded::new(bytes, rows, k) {
            Ok(rounded) => rounded,
            // The arena and its places are aligned to cache lines.
            Err(e) => unreachable!("{e}"),
        }
    }

    /// Rows `rows` of a linear map, counted from row `first` of its matrix, into the same columns of `out`. Calls at the
    /// same time have disjoint rows, or outputs of their own.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn linear_rows(
        &self,
        weight: WeightId,
        first: usize,
        rows: Range<usize>,
        x: &linear::Activations<'_>,
        out: &Matrix,
        accumulate: bool,
        scratch: &mut linear::Scratch,
    ) {
        let info = self.weights.get(weight);
        let (dtype, bytes) = self.weight_rows(weight, first..first + rows.end);
        let task = linear::LinearTask { dtype, weight: bytes, k: info.width, rows, x, out: out.out(), accumulate };
        let kernel = match self.arithmetic {
            Arithmetic::Exact => linear::linear_exact,
            _ if self.input(weight, x.tokens) == Input::Words => linear::linear_wide,
            Arithmetic::Narrow if self.alone => linear_alone,
            Arithmetic::Wide | Arithmetic::Narrow => linear::linear,
        };
        // The sizes were checked when the weights were resolved and the arena planned.
        if let Err(e) = kernel(self.isa, &task, scratch) {
            unreachable!("{}: {e}", info.name);
        }
    }

    /// Keys and values of a sequence in the cache of a layer.
    fn cached(&self, layer: usize, s: &SequenceView) -> attention::KvPages<'a> {
        attention::KvPages {
            pages: &self.pages[s.pages.clone()],
            k_offset: self.kv.k_offset(layer),
            v_offset: self.kv.v_offset(layer),
            head_stride: self.kv.head_stride(),
            pos_stride: self.kv.row_bytes,
            page_len: PAGE,
            dtype: self.kv.dtype,
        }
    }

    /// Keys and values of a sequence in the rows of the run: the arena is the one page, in which a row follows a row.
    fn in_run(&self, k: Value, v: Value, s: &SequenceView) -> attention::KvPages<'_> {
        let place = |value| self.plan.place(value).offset + s.first_row * self.tape.info(value).width * 4;
        attention::KvPages {
            pages: &self.arena_page,
            k_offset: place(k),
            v_offset: place(v),
            head_stride: self.tape.spec.head_dim * 4,
            pos_stride: self.tape.info(k).width * 4,
            page_len: s.rows,
            dtype: DType::F32,
        }
    }

    /// The corrections of the op whose first matrix is `weight`.
    fn patch(&self, weight: WeightId) -> Option<&Patch> {
        self.patches.and_then(|p| p.get(weight))
    }

    /// `h` of a patch, for `rows` rows.
    fn hidden(&self, patch: &Patch, rows: usize, team: &Team<'_>) -> Matrix {
        let own = patch.is_alone(rows).then_some(team.index);
        let base = self.patches.map_or(std::ptr::dangling_mut(), |p| p.hidden(own));
        // SAFETY: the patches reserved the largest rank for as many rows as a run may have.
        unsafe { Matrix::new(base, rows, patch.rank) }
    }

    /// The rows of a patch's `A` that this thread multiplies `tokens` tokens with.
    fn patch_rows(patch: &Patch, tokens: usize, team: &Team<'_>) -> Range<usize> {
        if patch.is_alone(tokens) { 0..patch.rank } else { team.share(patch.rank, patch.row_unit()) }
    }

    /// Computes this thread's share of a patch's `h = x·Aᵀ`, which is returned to be read behind [`Context::patch_wait`].
    fn patch_first_half(
        &self,
        patch: &Patch,
        x: &linear::Activations<'_>,
        team: &Team<'_>,
        scratch: &mut linear::Scratch,
    ) -> Matrix {
        let (h, rows) = (self.hidden(patch, x.tokens, team), Context::patch_rows(patch, x.tokens, team));
        // SAFETY: `h` holds all tokens; shares are disjoint. The sizes were checked when the patch was made.
        if let Err(e) = unsafe { patch.first_half(self.isa, rows, x, h.row_ptr(0), scratch) } {
            unreachable!("{e}");
        }
        h
    }

    /// Waits until `h` of `rows` rows is complete.
    fn patch_wait(&self, patch: &Patch, rows: usize, team: &Team<'_>) {
        if !patch.is_alone(rows) {
            team.wait();
        }
    }

    /// Adds `h·Bᵀ` to columns `columns` of a map's results, which lie from column `at` of `out` on.
    ///
    /// # Safety
    /// `h` is complete; this thread alone uses those columns of `out`.
    unsafe fn patch_second_half(&self, part: &PartPatch, h: &Matrix, columns: Range<usize>, out: &Matrix, at: usize) {
        debug_assert!(at + columns.len() <= out.width);
        // SAFETY: complete by the caller's promise.
        let hidden = unsafe { h.all(0..h.rows) };
        let task = lora::LowRankTask {
            tiles: &part.tiles,
            hidden: &hidden[part.hidden.start..],
            stride: h.width,
            rows: out.rows,
            columns,
            out: out.row_ptr(0).wrapping_add(at),
            out_stride: out.width,
        };
        // SAFETY: by the caller's promise.
        unsafe { lora::add_low_rank(self.isa, &task) };
    }

    /// A map whose results get a gain before they are added to what `out` holds.
    ///
    /// # Safety
    /// This thread alone uses those columns of `out`, and its block of the patches' scratch.
    #[allow(clippy::too_many_arguments)]
    unsafe fn linear_add_with_gain(
        &self,
        weight: WeightId,
        columns: Range<usize>,
        x: &linear::Activations<'_>,
        out: &Matrix,
        gain: &[f32],
        thread: usize,
        scratch: &mut linear::Scratch,
    ) {
        let Some(patches) = self.patches else { return };
        // SAFETY: reserved for every thread when there are gains.
        let apart = unsafe { Matrix::new(patches.apart(thread), out.rows, GAIN_COLUMNS) };
        for first in columns.clone().step_by(GAIN_COLUMNS) {
            let some = first..(first + GAIN_COLUMNS).min(columns.end);
            self.linear_rows(weight, some.start, 0..some.len(), x, &apart, false, scratch);
            for row in 0..out.rows {
                // SAFETY: by the caller's promise.
                let (from, to) = unsafe { (apart.row(row), out.columns_mut(row, some.clone())) };
                to.iter_mut().zip(from).zip(&gain[some.clone()]).for_each(|((to, from), gain)| *to += gain * from);
            }
        }
    }
}

/// [`linear::linear`] with the kernel for one token, whatever their number: a token's result is then what it is by itself.
fn linear_alone(isa: Isa, task: &linear::LinearTask<'_>, scratch: &mut linear::Scratch) -> Result<()> {
    linear::pick(isa, task.dtype, 1).run(isa, task, scratch)
}

/// Executes this thread's part of `op`.
///
/// # Safety
/// Every thread of the team calls it for the same op and context, with a barrier before the next op; `scratch` is this
/// thread's own.
pub(super) unsafe fn run(c: &Context<'_>, op: &Op, team: &Team<'_>, scratch: &mut Scratch, round: usize) {
    // SAFETY: in each arm a thread writes only rows or columns of its own share and reads values that ops before the
    // last barrier have written.
    unsafe {
        match op {
            Op::Input { out } => {
                let y = c.matrix(*out);
                for row in team.share(y.rows, 1) {
                    y.row_mut(row).copy_from_slice(&c.input[row * y.width..][..y.width]);
                }
            }
            Op::Embed { table, scale, out } => embed_rows(c, *table, *scale, *out, team),
            Op::RmsNorm { x, weight, out } => {
                let (x, y) = (c.matrix(*x), c.matrix(*out));
                let weight = c.vector(*weight);
                for row in team.share(y.rows, 1) {
                    norm::rms_norm(c.isa, x.row(row), weight, c.tape.spec.norm_eps, y.row_mut(row));
                    c.quantize(*out, row..row + 1);
                }
            }
            Op::AddRmsNorm { x, y, weight, out } => {
                let (x, y, z) = (c.matrix(*x), c.matrix(*y), c.matrix(*out));
                let weight = c.vector(*weight);
                for row in team.share(z.rows, 1) {
                    z.begin_from(&x, row, 0..z.width);
                    norm::rms_norm_add(c.isa, y.row(row), weight, c.tape.spec.norm_eps, z.row_mut(row));
                    c.quantize(*out, row..row + 1);
                }
            }
            Op::Linear(op) => linear_op(c, op, team, scratch),
            Op::Rope(op) => rope_op(c, op, team),
            Op::Attention(op) => {
                attention_op(c, op, team, scratch, round);
            }
            Op::GatherOutputs { x, out } => {
                let (x, y) = (c.matrix(*x), c.matrix(*out));
                for row in team.share(y.rows, 1) {
                    y.row_mut(row).copy_from_slice(x.row(c.outputs[row] as usize));
                    c.quantize(*out, row..row + 1);
                }
            }
            Op::Head { x, weight, out } => {
                let y = c.matrix(*out);
                if y.rows == 0 {
                    return;
                }
                let x = c.activations(*x);
                let patch = c.patch(*weight);
                let h = patch.map(|patch| {
                    let h = c.patch_first_half(patch, &x, team, &mut scratch.linear);
                    c.patch_wait(patch, y.rows, team);
                    (patch, h)
                });
                team.balance(round, y.width, ROW_UNIT, |columns| {
                    c.linear_rows(*weight, 0, columns.clone(), &x, &y, false, &mut scratch.linear);
                    if let Some((patch, h)) = &h
                        && let Some(part) = &patch.parts[0]
                    {
                        correct(c, part, h, columns.clone(), &y, columns.start, false);
                    }
                    if let Some(cap) = c.tape.spec.logit_softcap {
                        for row in 0..y.rows {
                            activation::softcap(c.isa, y.columns_mut(row, columns.clone()), cap);
                        }
                    }
                });
            }
            Op::CrossEntropy { x, weight, out, lora } => {
                cross_entropy(c, *x, *weight, *out, lora.as_ref(), team, scratch, round)
            }
            Op::Gated { kind, gate, up, out } => {
                let (gate, up, y) = (c.matrix(*gate), c.matrix(*up), c.matrix(*out));
                for row in team.share(y.rows, 1) {
                    // The output may lie where the gate lies.
                    if gate.row_ptr(row) == y.row_ptr(row) {
                        activation::gated_inplace(c.isa, *kind, y.row_mut(row), up.row(row));
                    } else {
                        activation::gated(c.isa, *kind, gate.row(row), up.row(row), y.row_mut(row));
                    }
                    c.quantize(*out, row..row + 1);
                }
            }
            _ => super::ops_learn::run(c, op, team, scratch, round),
        }
    }
}

unsafe fn embed_rows(c: &Context<'_>, table: WeightId, scale: f32, out: Value, team: &Team<'_>) {
    let (info, out) = (c.weights.get(table), c.matrix(out));
    let (dtype, data) = c.weight_rows(table, 0..info.rows);
    for row in team.share(out.rows, 1) {
        // SAFETY: this thread's row.
        let y = unsafe { out.row_mut(row) };
        // Types, sizes and token ids were checked before.
        if let Err(e) = embed::embed(c.isa, dtype, data, c.tokens[row], scale, y) {
            unreachable!("{}: {e}", info.name);
        }
        if let Some(patch) = c.patches.and_then(|p| p.embedding.as_ref()) {
            let token = c.tokens[row] as usize;
            if let Some(gain) = &patch.gain {
                y.iter_mut().for_each(|v| *v *= gain[token]);
            }
            let b = &patch.b[token * patch.rank..][..patch.rank];
            for (b, a) in b.iter().zip(patch.a.chunks_exact(y.len())) {
                y.iter_mut().zip(a).for_each(|(y, a)| *y += scale * b * a);
            }
        }
    }
}

/// Applies a patch to what a part's kernel has written: the gain (unless the kernel was told of it), then `h·Bᵀ`.
///
/// # Safety
/// `h` is complete; this thread alone uses those columns of `out`, which begin at its column `at`.
unsafe fn correct(
    c: &Context<'_>,
    part: &PartPatch,
    h: &Matrix,
    columns: Range<usize>,
    out: &Matrix,
    at: usize,
    gain_is_done: bool,
) {
    if let (Some(gain), false) = (&part.gain, gain_is_done) {
        for row in 0..out.rows {
            // SAFETY: by the caller's promise.
            let y = unsafe { out.columns_mut(row, at..at + columns.len()) };
            y.iter_mut().zip(&gain[columns.clone()]).for_each(|(y, gain)| *y *= gain);
        }
    }
    // SAFETY: by the caller's promise.
    unsafe { c.patch_second_half(part, h, columns, out, at) };
}

unsafe fn linear_op(c: &Context<'_>, op: &Linear, team: &Team<'_>, scratch: &mut Scratch) {
    let rows = c.rows(op.x);
    if rows == 0 {
        return;
    }
    // SAFETY: the input was finished before the last barrier.
    let x = unsafe { c.linear_input(op.x, op.parts.iter().map(|part| part.weight), team) };
    let share = |index: usize| match op.epilogue {
        // Both halves of a gated pair in the same thread, which then joins them.
        Epilogue::Gated(..) => team.share(c.tape.info(op.parts[index].out).width, ROW_UNIT),
        _ => share_by_bytes(c, &op.parts, index, team),
    };
    let patch = op.parts.first().and_then(|p| c.patch(p.weight));
    let h = patch.map(|patch| {
        let h = c.patch_first_half(patch, &x, team, &mut scratch.linear);
        // Short streams, which would each wait for memory: they come while the weights do, and so does what the next op begins with.
        for (index, part) in patch.parts.iter().enumerate() {
            part.iter().for_each(|part| part.tiles.prefetch(share(index)));
        }
        if let Some(next) = c.patches.and_then(|patches| patches.after(patch)) {
            next.prefetch(Context::patch_rows(next, rows, team));
        }
        h
    });
    if let Epilogue::Gated(kind, out) = op.epilogue
        && !c.learns
        && rows >= STRIP_ROWS
    {
        if let Some(patch) = patch {
            c.patch_wait(patch, rows, team);
        }
        // SAFETY: the input and `h` are complete; this thread's columns.
        unsafe { gated_by_strips(c, op, (kind, out), &x, patch.zip(h.as_ref()), share(0), scratch) };
        return;
    }
    // SAFETY: all threads are in this op.
    let adapted = unsafe { fusion::hidden_of(c, op, team) };
    for (index, part) in op.parts.iter().enumerate() {
        let (y, columns) = (c.matrix(part.out), share(index));
        let mut accumulate = false;
        if let Epilogue::Add(residual) = op.epilogue {
            accumulate = true;
            let residual = c.matrix(residual);
            for row in 0..rows {
                // SAFETY: this thread's columns; the residual is not written in this op but in place.
                unsafe { y.begin_from(&residual, row, columns.clone()) };
            }
        }
        let gain = patch.and_then(|p| p.parts[index].as_ref()).and_then(|p| p.gain.as_deref()).filter(|_| accumulate);
        match gain {
            // SAFETY: this thread's columns and its scratch.
            Some(gain) => unsafe {
                let scratch = &mut scratch.linear;
                c.linear_add_with_gain(part.weight, columns.clone(), &x, &y, gain, team.index, scratch);
            },
            None if adapted => {
                for first in columns.clone().step_by(STRIP) {
                    let some = first..(first + STRIP).min(columns.end);
                    c.linear_rows(part.weight, 0, some.clone(), &x, &y, accumulate, &mut scratch.linear);
                    // SAFETY: this thread's columns.
                    unsafe {
                        add_bias(c, part, some.clone(), &y, some.start);
                        fusion::add(c, part.out, some);
                    }
                }
            }
            None => c.linear_rows(part.weight, 0, columns.clone(), &x, &y, accumulate, &mut scratch.linear),
        }
    }
    if let Some(patch) = patch {
        // Here and not sooner: threads have different shares of a part, but equal ones of all parts together.
        c.patch_wait(patch, rows, team);
    }
    for (index, part) in op.parts.iter().enumerate() {
        let (y, columns) = (c.matrix(part.out), share(index));
        if let (Some(part), Some(h)) = (patch.and_then(|patch| patch.parts[index].as_ref()), &h) {
            let gained = matches!(op.epilogue, Epilogue::Add(_));
            // SAFETY: `h` is complete behind the barrier; this thread's columns.
            unsafe { correct(c, part, h, columns.clone(), &y, columns.start, gained) };
        }
        if !adapted {
            // SAFETY: this thread's columns.
            unsafe { add_bias(c, part, columns.clone(), &y, columns.start) };
        }
    }
    match op.epilogue {
        Epilogue::Gated(kind, out) => {
            let (gate, up, y) = (c.matrix(op.parts[0].out), c.matrix(op.parts[1].out), c.matrix(out));
            let columns = share(0);
            let own = c.quantizes_own(out, ROW_UNIT);
            for row in 0..rows {
                // SAFETY: columns this thread has just written, and the same of the output.
                unsafe {
                    let (gate, up) = (gate.columns_mut(row, columns.clone()), up.columns_mut(row, columns.clone()));
                    activation::gated(c.isa, kind, gate, up, y.columns_mut(row, columns.clone()));
                    if own {
                        c.quantize_own(out, row, columns.clone());
                    }
                }
            }
            if !own {
                // SAFETY: all threads are in this op.
                unsafe { c.quantize_together(out, team) };
            }
        }
        Epilogue::Add(_) | Epilogue::None => {
            for part in &op.parts {
                // SAFETY: as above.
                unsafe { c.quantize_together(part.out, team) };
            }
        }
    }
}

/// Adds a part's bias, if it has one, to columns `columns` of its result, which begin at column `at` of `out`.
///
/// # Safety
/// This thread alone uses those columns of `out`.
unsafe fn add_bias(c: &Context<'_>, part: &Part, columns: Range<usize>, out: &Matrix, at: usize) {
    let Some(bias) = part.bias else { return };
    let bias = &c.vector(bias)[columns];
    for row in 0..out.rows {
        // SAFETY: by the caller's promise.
        vector::add(c.isa, bias, unsafe { out.columns_mut(row, at..at + bias.len()) });
    }
}

/// A gated pair for many rows, some columns of both at a time, which stay in the second cache until they are joined and
/// quantized: whole they would go to memory and come back.
///
/// # Safety
/// The input is complete, and so is `h` of the corrections; this thread alone uses those columns of the output.
unsafe fn gated_by_strips(
    c: &Context<'_>,
    op: &Linear,
    (kind, out): (Gate, Value),
    x: &linear::Activations<'_>,
    corrections: Option<(&Patch, &Matrix)>,
    columns: Range<usize>,
    scratch: &mut Scratch,
) {
    let Scratch { linear, floats } = scratch;
    let (rows, y) = (x.tokens, c.matrix(out));
    // SAFETY: this thread's scratch was reserved for two strips of all rows.
    let strip = |i: usize| unsafe { Matrix::new(floats.as_ptr().cast::<f32>().add(i * rows * STRIP), rows, STRIP) };
    let strips = [strip(0), strip(1)];
    let [gate, up] = &strips;
    for first in columns.clone().step_by(STRIP) {
        let some = first..(first + STRIP).min(columns.end);
        let n = some.len();
        for (index, (part, to)) in op.parts.iter().zip(&strips).enumerate() {
            c.linear_rows(part.weight, first, 0..n, x, to, false, linear);
            if let Some((patch, h)) = corrections
                && let Some(part) = &patch.parts[index]
            {
                // SAFETY: by the caller's promise; this thread's scratch.
                unsafe { correct(c, part, h, some.clone(), to, 0, false) };
            }
            // SAFETY: this thread's scratch.
            unsafe { add_bias(c, part, some.clone(), to, 0) };
        }
        // SAFETY: this thread's scratch, and its columns of the output.
        unsafe {
            for row in 0..rows {
                let joined = gate.columns_mut(row, 0..n);
                activation::gated_inplace(c.isa, kind, joined, up.columns_mut(row, 0..n));
                if !c.is_read_quantized_only(out) {
                    y.columns_mut(row, some.clone()).copy_from_slice(joined);
                }
            }
            c.quantize_from(out, gate.all(0..rows), STRIP, 0..rows, some);
        }
    }
}

/// This thread's rows of part `index`, when all parts together are divided by the bytes they stream.
fn share_by_bytes(c: &Context<'_>, parts: &[Part], index: usize, team: &Team<'_>) -> Range<usize> {
    let bytes = |p: &Part| c.weights.get(p.weight).len_bytes();
    let total: usize = parts.iter().map(bytes).sum();
    let before: usize = parts[..index].iter().map(bytes).sum();
    let (own, rows) = (bytes(&parts[index]).max(1), c.weights.get(parts[index].weight).rows);
    let cut = |thread: usize| {
        let at = (total as u128 * thread as u128 / team.size as u128) as usize;
        let row = (at.saturating_sub(before) as u128 * rows as u128 / own as u128) as usize;
        if row >= rows { rows } else { row / ROW_UNIT * ROW_UNIT }
    };
    cut(team.index)..cut(team.index + 1)
}

unsafe fn rope_op(c: &Context<'_>, op: &Rope, team: &Team<'_>) {
    let spec = &c.tape.spec;
    let (q, k, v) = (c.matrix(op.q), c.matrix(op.k), c.matrix(op.v));
    let (q_out, k_out) = (c.matrix(op.q_out), c.matrix(op.k_out));
    let dim = spec.head_dim;
    let heads = spec.heads + spec.kv_heads;
    let vector_of = |w: Option<WeightId>| w.map(|w| c.vector(w));
    let (q_norm, k_norm) = (vector_of(op.q_norm), vector_of(op.k_norm));
    for item in team.share(q.rows * heads, 1) {
        let (row, head) = (item / heads, item % heads);
        let kv_head = head.checked_sub(spec.heads);
        let (from, to, norm, head) = match kv_head {
            None => (&q, &q_out, q_norm, head),
            Some(head) => (&k, &k_out, k_norm, head),
        };
        let columns = head * dim..(head + 1) * dim;
        // SAFETY: this thread's head of this row; input and output are the same memory or apart.
        let vector = unsafe {
            to.begin_from(from, row, columns.clone());
            to.columns_mut(row, columns.clone())
        };
        if let Some(weight) = norm {
            norm::rms_norm_inplace(c.isa, vector, weight, spec.norm_eps);
        }
        if let Some(index) = op.rope {
            let (cos, sin) = rope_row(c, row, index);
            rope::rope(c.isa, vector, dim, cos, sin, spec.ropes[index].style);
        }
        if let (Some(head), Some(layer)) = (kv_head, op.cache) {
            // SAFETY: this thread alone writes this position of this head.
            unsafe {
                let (keys, values) = cache_row(c, layer, head, row);
                attention::store_kv(c.isa, c.kv.dtype, vector, keys);
                attention::store_kv(c.isa, c.kv.dtype, &v.row(row)[columns], values);
            }
        }
    }
}

/// Cosines and sines of a row's position for one kind of rotation.
pub(super) fn rope_row<'a>(c: &Context<'a>, row: usize, index: usize) -> (&'a [f32], &'a [f32]) {
    let before: usize = c.tape.spec.ropes[..index].iter().map(|r| r.dims).sum();
    let half = c.tape.spec.ropes[index].dims / 2;
    let at = c.tables.rope + (row * c.tables.rope_row + before) * 4;
    // SAFETY: filled before the first op; nobody writes it since.
    unsafe {
        let base = c.arena.add(at).cast::<f32>();
        (std::slice::from_raw_parts(base, half), std::slice::from_raw_parts(base.add(half), half))
    }
}

/// Where keys and values of `row` go.
///
/// # Safety
/// As for pointer arithmetic within a page of the cache: `layer` and `head` must exist.
unsafe fn cache_row(c: &Context<'_>, layer: usize, head: usize, row: usize) -> (*mut u8, *mut u8) {
    let sequence = sequence_of(c, row);
    let position = sequence.position + row - sequence.first_row;
    let page = c.pages[sequence.pages.start + position / PAGE].cast_mut();
    let at = head * c.kv.head_stride() + position % PAGE * c.kv.row_bytes;
    // SAFETY: inside the page by the layout.
    unsafe { (page.add(c.kv.k_offset(layer) + at), page.add(c.kv.v_offset(layer) + at)) }
}

fn sequence_of<'a>(c: &Context<'a>, row: usize) -> &'a SequenceView {
    let at = c.sequences.partition_point(|s| s.first_row <= row);
    &c.sequences[at - 1]
}

unsafe fn attention_op(c: &Context<'_>, op: &Attention, team: &Team<'_>, scratch: &mut Scratch, round: usize) {
    let spec = &c.tape.spec;
    let group = spec.heads / spec.kv_heads;
    let (q, out) = (c.matrix(op.q), c.matrix(op.out));
    let lse = op.lse.map(|lse| c.matrix(lse));
    // A single query row is divided by heads; when they do not come out even, by query heads.
    let single = if (c.sequences.len() * spec.kv_heads).is_multiple_of(team.size) { group } else { 1 };
    let heads_of = |s: &SequenceView| if s.rows == 1 { single } else { group };
    let pieces_of = |s: &SequenceView| (spec.heads / heads_of(s)) * s.rows.div_ceil(QUERY_ROWS);
    let total: usize = c.sequences.iter().map(pieces_of).sum();
    let own = c.quantizes_own(op.out, spec.head_dim);
    team.claim(round, total, |piece| {
        let mut piece = piece;
        let mut at = 0;
        while piece >= pieces_of(&c.sequences[at]) {
            piece -= pieces_of(&c.sequences[at]);
            at += 1;
        }
        let s = &c.sequences[at];
        let heads = heads_of(s);
        let blocks = s.rows.div_ceil(QUERY_ROWS);
        // The last rows see the most positions: they come first, so that the small pieces fill the end.
        let (head, block) = (piece % (spec.heads / heads) * heads, blocks - 1 - piece / (spec.heads / heads));
        let kv = match op.kv {
            KvSource::Cache(layer) => c.cached(layer, s),
            KvSource::Rows(k, v) => c.in_run(k, v, s),
        };
        // Rounded where more is rounded than that: keys and values when they were stored, the result for a quantized map.
        let accuracy = match c.arithmetic {
            Arithmetic::Exact => attention::Accuracy::Exact,
            _ if c.learns => attention::Accuracy::Near,
            _ if kv.dtype == DType::F32 || c.plan.place(op.out).quantized.is_none() => attention::Accuracy::Exact,
            _ => attention::Accuracy::Rounded,
        };
        let task = attention::AttentionTask {
            path: attention::Path::for_rows(c.isa, if c.alone { 1 } else { s.rows }, accuracy),
            q: q.row_ptr(s.first_row).cast_const(),
            q_stride: q.width,
            heads: (head, head + heads),
            group,
            head_dim: spec.head_dim,
            rows: (block * QUERY_ROWS, ((block + 1) * QUERY_ROWS).min(s.rows)),
            first_position: s.position,
            window: op.window,
            starts: None,
            scale: spec.attention_scale,
            softcap: spec.attention_softcap,
            alibi: spec.alibi.as_deref(),
            kv,
            out: out.row_ptr(s.first_row),
            out_stride: out.width,
            lse: lse.map(|lse| lse.row_ptr(s.first_row)),
            lse_stride: spec.heads,
        };
        // SAFETY: the pages hold every position up to the last row's; each piece writes its own rows and heads.
        unsafe {
            attention::attention(c.isa, &task, scratch.floats());
            if own {
                for row in task.rows.0..task.rows.1 {
                    c.quantize_own(op.out, s.first_row + row, head * spec.head_dim..(head + heads) * spec.head_dim);
                }
            }
        };
    });
    if !own {
        // SAFETY: all threads are in this op.
        unsafe { c.quantize_together(op.out, team) };
    }
}

/// Sums `exp(z − max)` chunk by chunk of the vocabulary: chunks are fixed, so the result does not depend on who
/// computes them.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn cross_entropy(
    c: &Context<'_>,
    x: Value,
    weight: WeightId,
    out: Value,
    adapter: Option<&HeadLora>,
    team: &Team<'_>,
    scratch: &mut Scratch,
    round: usize,
) {
    let rows = c.outputs.len();
    if rows == 0 {
        return;
    }
    let vocab = c.weights.get(weight).rows;
    let chunks = vocab.div_ceil(VOCAB_CHUNK);
    // SAFETY: the input was finished before the last barrier.
    let x = unsafe { c.linear_input(x, std::iter::once(weight), team) };
    // SAFETY: the partial sums' place in the arena, `[chunk][row]` of maximum and sum, then `[row]` of target logits.
    let (partial, target_logits) = unsafe {
        let base = c.arena.add(c.tables.partial).cast::<f32>();
        (base, base.add(2 * chunks * rows))
    };
    let Scratch { linear, floats } = scratch;
    let patch = c.patch(weight);
    let correction = patch.and_then(|patch| {
        let h = c.patch_first_half(patch, &x, team, linear);
        c.patch_wait(patch, rows, team);
        Some((patch.parts[0].as_ref()?, h))
    });
    // SAFETY: this thread's scratch was reserved for a chunk of logits of every row.
    let logits = unsafe { Matrix::new(floats.as_ptr().cast(), rows, VOCAB_CHUNK) };
    team.claim(round, chunks, |chunk| {
        let columns = chunk * VOCAB_CHUNK..((chunk + 1) * VOCAB_CHUNK).min(vocab);
        c.linear_rows(weight, columns.start, 0..columns.len(), &x, &logits, false, linear);
        if let Some((part, h)) = &correction {
            // SAFETY: `h` is complete behind the barrier; this thread's scratch.
            unsafe { correct(c, part, h, columns.clone(), &logits, 0, false) };
        }
        if let Some(adapter) = adapter {
            // SAFETY: this thread's scratch; the adapter's hidden values and norms were computed before.
            unsafe {
                ops_head::add(c, adapter, columns.clone(), &logits, 0);
                ops_head::rescale(c, adapter, columns.clone(), &logits, 0);
            }
        }
        for row in 0..rows {
            // SAFETY: this thread's scratch; `[chunk][row]` is written by whoever claimed the chunk.
            unsafe {
                let z = logits.columns_mut(row, 0..columns.len());
                if let Some(cap) = c.tape.spec.logit_softcap {
                    activation::softcap(c.isa, z, cap);
                }
                let target = c.targets[row] as usize;
                if columns.contains(&target) {
                    *target_logits.add(row) = z[target - columns.start];
                }
                let max = vector::max(c.isa, z);
                *partial.add(2 * (chunk * rows + row)) = max;
                *partial.add(2 * (chunk * rows + row) + 1) = vector::exp_shifted(c.isa, max, z) as f32;
            }
        }
    });
    team.wait();
    let y = c.matrix(out);
    for row in team.share(rows, 1) {
        // SAFETY: complete behind the barrier; this thread's rows of the output.
        unsafe {
            let part = |chunk: usize| {
                let at = partial.add(2 * (chunk * rows + row));
                (*at, f64::from(*at.add(1)))
            };
            let max = (0..chunks).map(|i| part(i).0).fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = (0..chunks).map(|i| part(i).1 * f64::from(part(i).0 - max).exp()).sum();
            y.row_mut(row)[0] = (f64::from(max) + sum.ln() - f64::from(*target_logits.add(row))) as f32;
        }
    }
}
