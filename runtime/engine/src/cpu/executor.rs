//! Runs a tape on the CPU.
//!
//! One job of the pool is one walk over the whole list: every thread executes every op, each its own part, and they meet
//! after each op. The arena, the tables and the scratch of all threads are allocated once; a run allocates nothing but
//! new KV pages.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::buffer::Buffer;
use super::fusion::{self, Fusion};
use super::isa::Isa;
use super::kernels::{attention, linear};
use super::kv::{KvCache, KvLayout};
use super::patch::{Correction, Patches};
use super::pool::{Pool, Team};
use super::{ops, ops_learn};
use crate::quant::DType;
use crate::system::Stopwatch;
use crate::tape::{
    Batch, Frequencies, LayerSpec, Op, Part, Plan, PlanLimits, Purpose, SoftTargets, Spec, Stage, Tape, Timing,
    Timings, Trained, Value, WeightId, Weights, decoder,
};
use crate::{Error, Result};

/// Tokens per group of the vocabulary in which a cross-entropy is summed: 4 KiB of logits per row.
pub(super) const VOCAB_CHUNK: usize = 1_024;

/// How linear maps with quantized weights are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arithmetic {
    /// f32, as the mathematics has it.
    Exact,
    /// 16-bit integers forward and backward: a third faster than f32 on AVX2, with errors of 10⁻⁴.
    Wide,
    /// 8-bit activations, and for the gradient weights of 8 bits, too, with errors of 10⁻²: what inference computes, and half as
    /// fast again. Of gradients the 8 bits are taken where an instruction multiplies four of them (AVX-512 with VNNI), else
    /// 16; maps with dense weights are learned in 16 bits.
    #[default]
    Narrow,
}

/// How an executor is set up.
#[derive(Clone, Debug)]
pub struct ExecutorOptions {
    /// Threads of the team.
    pub threads: usize,
    /// Most rows per run.
    pub limits: PlanLimits,
    /// Which part of the model it computes; the spec has that part's layers.
    pub stage: Stage,
    /// What is trained: the tapes are those of learning then, of the whole model.
    pub trained: Option<Trained>,
    /// Arithmetic of the linear maps; [`Arithmetic::Narrow`] unless something is trained.
    pub arithmetic: Arithmetic,
    /// Layers, from the last, whose values are kept for the gradient instead of being computed again.
    pub kept_layers: usize,
}

impl ExecutorOptions {
    /// What the executor is for in the first place.
    fn purpose(&self) -> Purpose {
        if self.trained.is_some() { Purpose::Learn } else { Purpose::Generate }
    }
}

/// Memory an executor takes, in bytes, and the number of parameters its caller holds beside it.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExecutorNeeds {
    /// Values and tables.
    pub arena: usize,
    /// Scratch of all threads.
    pub scratch: usize,
    /// Matrices that are read where the file is mapped.
    pub weights: usize,
    /// Trained parameters.
    pub param_count: usize,
}

/// A tape with its plan.
#[derive(Debug)]
struct Program {
    purpose: Purpose,
    tape: Tape,
    plan: Plan,
    tables: Tables,
    scratch_floats: usize,
    /// Of each value whether only quantized maps read it.
    quantized_only: Vec<bool>,
    /// Of each matrix what its map reads.
    inputs: Vec<Input>,
    fusion: Fusion,
}

impl Program {
    fn new(spec: &Spec, weights: &Weights, purpose: Purpose, options: &ExecutorOptions) -> Program {
        // Scores and states need a row for every token of a run, logits only for a few.
        let limits = match purpose {
            Purpose::Generate => options.limits,
            Purpose::Embed | Purpose::Score | Purpose::Learn => {
                PlanLimits { outputs: options.limits.tokens, ..options.limits }
            }
        };
        let tape = match &options.trained {
            None => decoder::build(spec, weights, purpose, options.stage),
            Some(trained) => decoder::build_learning(spec, weights, trained, purpose, options.kept_layers),
        };
        let narrow = options.arithmetic == Arithmetic::Narrow;
        let isa = Isa::detect();
        let bytes = |rows, width| {
            let tiles = if linear::needs_tiles(isa, rows) { linear::tiled_bytes(rows, width) } else { 0 };
            linear::activation_bytes(rows, width) + tiles
        };
        let quantized = |rows, width| narrow.then(|| bytes(rows, width));
        let plan = Plan::with_reads(&tape, limits, quantized, |at| fusion::more_reads(&tape, at));
        let fusion = Fusion::new(&tape, &plan);
        let inputs = inputs(spec, weights, options, isa);
        let rounded = rounded_bytes(&tape, &inputs, &limits, options.arithmetic);
        let tables = Tables::new(&tape, plan.arena_bytes, &limits, purpose, rounded, fusion.ranks);
        let logits = match purpose {
            Purpose::Score | Purpose::Learn => limits.outputs * VOCAB_CHUNK,
            Purpose::Generate | Purpose::Embed => 0,
        };
        let backward = match purpose {
            Purpose::Learn => attention::attention_backward_scratch_len(isa, spec.head_dim),
            Purpose::Generate | Purpose::Embed | Purpose::Score => 0,
        };
        let strips = if options.trained.is_none() { 2 * limits.tokens * ops::STRIP } else { 0 };
        let scratch_floats = attention::attention_scratch_len(spec.head_dim).max(backward).max(logits).max(strips);
        let quantized = |id: WeightId| linear::needs_q8(weights.get(id).dtype) && inputs[id.0 as usize] == Input::Own;
        let quantized_only = quantized_only(&tape, &plan, quantized);
        Program { purpose, tape, plan, tables, scratch_floats, quantized_only, inputs, fusion }
    }
}

/// What a map reads of its input; of several maps the last has its way, for the others can do without what they would like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Input {
    /// The form that the value has.
    Own,
    /// Tiles, and tiles of what their rounding has left; 16 bits where a run has too few rows for tiles.
    Rests,
    /// 16 bits.
    Words,
}

/// Of how many layers one is among the first ones whose maps read what rounding their inputs to bfloat16 leaves, too, while something
/// is learned.
///
/// What a token of great influence, such as the first, has in the residual stream is made by the first layers out of little, and an
/// error there reaches every layer behind. Weights in bfloat16 do not matter. Of smollm2, with 30 layers, the norm of such a gradient
/// after three steps is off by 1.5 % with two such layers (root of the mean square of eight runs, from places a thousandth apart),
/// by 1.1 % with six, 0.5 % with ten and 0.2 % with fifteen or all.
const ONE_CAREFUL_OF: usize = 3;

/// Of each matrix what its map reads; a session, which does not learn, leaves dense weights exact.
fn inputs(spec: &Spec, weights: &Weights, options: &ExecutorOptions, isa: Isa) -> Vec<Input> {
    let learns = options.trained.is_some();
    let words = |dtype| match options.arithmetic {
        Arithmetic::Exact => false,
        Arithmetic::Wide => learns,
        Arithmetic::Narrow => learns && !linear::needs_q8(dtype),
    };
    let of = |dtype| if words(dtype) { Input::Words } else { Input::Own };
    let mut inputs: Vec<Input> = weights.iter().map(|(_, weight)| of(weight.dtype)).collect();
    if learns && options.arithmetic == Arithmetic::Narrow && linear::has_tiles(isa) {
        let careful = spec.layers.len().div_ceil(ONE_CAREFUL_OF);
        for map in spec.layers.iter().take(careful).flat_map(LayerSpec::maps) {
            let input = &mut inputs[weights.id(&map.weight).0 as usize];
            *input = (*input).max(Input::Rests);
        }
    }
    inputs
}

/// Of each value with a quantized form whether only maps read it that are `quantized`.
fn quantized_only(tape: &Tape, plan: &Plan, quantized: impl Fn(WeightId) -> bool) -> Vec<bool> {
    let mut only: Vec<bool> = (0..tape.values.len()).map(|i| plan.place(Value(i as u32)).quantized.is_some()).collect();
    only[tape.result.0 as usize] = false;
    for op in &tape.ops {
        let quantized = |parts: &[Part]| parts.iter().all(|p| quantized(p.weight));
        let input = match op {
            Op::Linear(op) if quantized(&op.parts) => Some(op.x),
            _ => None,
        };
        op.reads().into_iter().filter(|v| Some(*v) != input).for_each(|v| only[v.0 as usize] = false);
    }
    only
}

/// Places behind the values: the rotation tables, and partial sums of a cross-entropy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tables {
    pub rope: usize,
    pub rope_row: usize,
    pub partial: usize,
    /// `[outputs][VOCAB_CHUNK]`: gradients of a chunk of logits.
    pub probabilities: usize,
    /// `[2][tokens][heads · head_dim]`: gradients of keys and of values by query head, where several read one.
    pub heads: usize,
    /// The input of a linear map, and the gradients of its outputs, rounded as `linear::Rounded`, where those are read.
    pub rounded: [usize; 2],
    /// `[T, r]` of the adapters that the op of a map computes.
    pub hidden: usize,
    /// Bytes of the arena, values and tables.
    end: usize,
}

impl Tables {
    /// For a tape whose values end at `start`, with so many bytes of rounded inputs and gradients, and columns of `h`.
    fn new(
        tape: &Tape,
        start: usize,
        limits: &PlanLimits,
        purpose: Purpose,
        rounded: [usize; 2],
        ranks: usize,
    ) -> Tables {
        let spec = &tape.spec;
        // Per row and kind of rotation: cosines, then sines.
        let rope_row: usize = spec.ropes.iter().map(|r| r.dims).sum();
        let partial = start + (limits.tokens * rope_row * 4).next_multiple_of(64);
        let chunks = match purpose {
            Purpose::Generate | Purpose::Embed => 0,
            Purpose::Score | Purpose::Learn => spec.vocab.div_ceil(VOCAB_CHUNK),
        };
        // Per chunk and row: maximum and sum; behind them the logit of each row's target.
        let probabilities = partial + ((2 * chunks + 1) * limits.outputs * 4).next_multiple_of(64);
        let learn = purpose == Purpose::Learn;
        let heads = probabilities + if learn { limits.outputs * VOCAB_CHUNK * 4 } else { 0 };
        let by_head = 2 * limits.tokens * spec.heads * spec.head_dim * 4;
        let first = heads + if learn && spec.heads > spec.kv_heads { by_head.next_multiple_of(64) } else { 0 };
        let [inputs, gradients] = rounded;
        let rounded = [first, first + inputs];
        let hidden = first + inputs + gradients;
        let end = hidden + (limits.tokens * ranks * 4).next_multiple_of(64);
        Tables { rope: start, rope_row, partial, probabilities, heads, rounded, hidden, end }
    }
}

/// The most bytes that one op needs for its input, and for the gradients of its outputs, rounded.
fn rounded_bytes(tape: &Tape, inputs: &[Input], limits: &PlanLimits, arithmetic: Arithmetic) -> [usize; 2] {
    if arithmetic == Arithmetic::Exact {
        return [0; 2];
    }
    let bytes = |value: Value| {
        let info = tape.info(value);
        ops_learn::rounding_bytes(limits.rows(info.rows), info.width)
    };
    let read = |id: WeightId| inputs[id.0 as usize] != Input::Own;
    let input = |x: Value, read: bool| if read { bytes(x) } else { 0 };
    let needs = tape.ops.iter().map(|op| match op {
        Op::Linear(op) => [input(op.x, op.parts.iter().any(|part| read(part.weight))), 0],
        Op::CrossEntropy { x, weight, .. } => [input(*x, read(*weight)), 0],
        Op::CrossEntropyGrad { x, weight, .. } => {
            [input(*x, read(*weight)), ops_learn::rounding_bytes(limits.outputs, VOCAB_CHUNK)]
        }
        Op::LinearBackward { parts, .. } => [0, parts.iter().map(|(dy, _)| bytes(*dy)).sum()],
        _ => [0, 0],
    });
    needs.fold([0, 0], |most, need| [most[0].max(need[0]), most[1].max(need[1])])
}

/// Runs the tapes of one model. See the module's text.
#[derive(Debug)]
pub struct Executor {
    spec: Spec,
    weights: Arc<Weights>,
    isa: Isa,
    options: ExecutorOptions,
    pool: Pool,
    /// The first is what the executor was set up for; others are made at their first use.
    programs: Vec<Program>,
    arena: Buffer,
    scratch: Vec<Mutex<Scratch>>,
    /// Angles per position of each kind of rotation.
    frequencies: Vec<Frequencies>,
    timings: Timings,
    patches: Option<Patches>,
    rows: RunRows,
    /// Where the result of the last run lies in the arena, in bytes.
    result: Range<usize>,
}

/// The rows of a run as the ops see them; kept, so that a run need not allocate.
#[derive(Debug, Default)]
struct RunRows {
    positions: Vec<u32>,
    sequences: Vec<SequenceView>,
    pages: Vec<*const u8>,
}

// SAFETY: the pages' addresses are used during the run that they were collected for, which borrows the caches.
unsafe impl Send for RunRows {}
// SAFETY: as above.
unsafe impl Sync for RunRows {}

/// A thread's own memory.
#[derive(Debug)]
pub(super) struct Scratch {
    /// Unpacked tiles of weights.
    pub linear: linear::Scratch,
    /// Blocks of attention, or the logits of a chunk of the vocabulary.
    pub floats: Buffer,
}

impl Scratch {
    /// The floats, for a kernel that wants them as a slice.
    pub fn floats(&mut self) -> &mut [f32] {
        // SAFETY: a zeroed, aligned block that this reference makes exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.floats.as_ptr().cast(), self.floats.len() / 4) }
    }
}

/// What the ops of one run see.
pub(super) struct Context<'a> {
    pub isa: Isa,
    pub tape: &'a Tape,
    pub plan: &'a Plan,
    pub weights: &'a Weights,
    pub tables: Tables,
    pub arena: *mut u8,
    /// The arena as the one page of a cache: how attention reads keys and values of the run itself.
    pub arena_page: [*const u8; 1],
    /// Trained parameters and where their gradients are added up; null when nothing is trained.
    pub params: *const f32,
    pub gradients: *mut f32,
    /// Factor on the gradient of each output row's cross-entropy.
    pub row_weights: &'a [f32],
    pub soft_targets: SoftTargets<'a>,
    pub dropout_seed: u64,
    pub tokens: &'a [u32],
    pub input: &'a [f32],
    pub outputs: &'a [u32],
    pub targets: &'a [u32],
    /// Position of each row in its sequence.
    pub positions: &'a [u32],
    pub sequences: &'a [SequenceView],
    /// Of each value whether only quantized maps read it.
    pub quantized_only: &'a [bool],
    pub fusion: &'a Fusion,
    /// The pages of all sequences' caches, to be read.
    pub pages: &'a [*const u8],
    /// Whether rows are computed as if each were run by itself.
    pub alone: bool,
    pub kv: KvLayout,
    pub arithmetic: Arithmetic,
    /// Of each matrix what its map reads.
    pub inputs: &'a [Input],
    /// Whether something of the model is trained.
    pub learns: bool,
    pub frequencies: &'a [Frequencies],
    /// Corrections of the maps' results.
    pub patches: Option<&'a Patches>,
}

// SAFETY: `arena` points to memory that outlives the run; the ops divide what they write among the threads.
unsafe impl Sync for Context<'_> {}

/// A segment of a run as the ops see it.
#[derive(Debug)]
pub(super) struct SequenceView {
    /// Its first row in the batch.
    pub first_row: usize,
    pub rows: usize,
    /// Position of its first row.
    pub position: usize,
    /// Its cache's pages among those of the run.
    pub pages: Range<usize>,
}

impl Executor {
    /// Plans the tape for generating or, with something to train, for learning, allocates, starts the threads.
    ///
    /// # Errors
    /// [`Error::Memory`], or a thread the system refuses.
    pub fn new(spec: &Spec, weights: Arc<Weights>, options: &ExecutorOptions) -> Result<Executor> {
        let mut executor = Executor {
            spec: spec.clone(),
            weights,
            isa: Isa::detect(),
            options: options.clone(),
            pool: Pool::new(options.threads)?,
            programs: Vec::new(),
            arena: Buffer::new(0, "the arena")?,
            scratch: Vec::new(),
            frequencies: spec.ropes.iter().map(Frequencies::new).collect(),
            timings: Timings::default(),
            patches: None,
            rows: RunRows::default(),
            result: 0..0,
        };
        executor.program(options.purpose())?;
        Ok(executor)
    }

    /// A second executor for the same tapes, with threads and activations of its own. No patches are in force in it.
    ///
    /// # Errors
    /// As [`Executor::new`].
    pub fn fork(&self) -> Result<Executor> {
        Executor::new(&self.spec, self.weights.clone(), &self.options)
    }

    /// What [`Executor::new`] comes to need.
    pub fn needs(spec: &Spec, weights: &Weights, options: &ExecutorOptions) -> ExecutorNeeds {
        let program = Program::new(spec, weights, options.purpose(), options);
        ExecutorNeeds {
            arena: program.tables.end,
            scratch: (program.scratch_floats * 4 + linear::scratch_bytes()) * options.threads,
            weights: program.tape.matrices().into_iter().map(|id| weights.get(id).len_bytes()).sum(),
            // f32 both.
            param_count: program.tape.param_count(),
        }
    }

    /// Index of the program for `purpose`, made at its first use, with memory for its run.
    fn program(&mut self, purpose: Purpose) -> Result<usize> {
        let at = match self.programs.iter().position(|p| p.purpose == purpose) {
            Some(at) => at,
            None => {
                self.programs.push(Program::new(&self.spec, &self.weights, purpose, &self.options));
                self.programs.len() - 1
            }
        };
        let program = &self.programs[at];
        if program.tables.end > self.arena.len() {
            // Nothing in the arena outlives a run: the old one can go first.
            self.arena = Buffer::new(0, "the arena")?;
            self.arena = Buffer::new(program.tables.end, "activations")?;
        }
        for scratch in &mut self.scratch {
            let scratch = scratch.get_mut().unwrap_or_else(PoisonError::into_inner);
            if scratch.floats.len() < program.scratch_floats * 4 {
                scratch.floats = Buffer::new(program.scratch_floats * 4, "thread scratch")?;
            }
        }
        while self.scratch.len() < self.pool.threads() {
            let floats = Buffer::new(program.scratch_floats * 4, "thread scratch")?;
            self.scratch.push(Mutex::new(Scratch { linear: linear::Scratch::new(), floats }));
        }
        Ok(at)
    }

    /// Gives back the memory that only a run needs, the last result with it; the next run takes it anew. Gives its bytes.
    ///
    /// # Errors
    /// None but [`Error::Memory`], for a handful of bytes.
    pub fn trim(&mut self) -> Result<usize> {
        let floats = |s: &mut Mutex<Scratch>| s.get_mut().unwrap_or_else(PoisonError::into_inner).floats.len();
        let bytes = self.arena.len() + self.scratch.iter_mut().map(floats).sum::<usize>();
        self.result = 0..0;
        self.arena = Buffer::new(0, "the arena")?;
        self.scratch.clear();
        Ok(bytes)
    }

    /// Runs `batch` and gives the result, `[outputs, width]`: logits or cross-entropies; of a first stage, the residual stream
    /// of all tokens. The caches have advanced then.
    ///
    /// # Errors
    /// A batch over the limits, token ids outside the vocabulary, [`Error::Memory`] for KV pages, [`Error::Cancelled`].
    /// The caches are as before then.
    pub fn run(&mut self, purpose: Purpose, mut batch: Batch<'_, KvCache>, cancel: &AtomicBool) -> Result<&mut [f32]> {
        self.result = 0..0;
        let index = self.program(purpose)?;
        let program = &self.programs[index];
        batch.check(&program.tape, &program.plan.limits, purpose, false)?;
        let RunRows { positions, sequences, pages } = &mut self.rows;
        positions.clear();
        sequences.clear();
        pages.clear();
        let mut kv = None;
        for i in 0..batch.segments.count() {
            let rows = batch.segments.rows(i);
            let (mut position, first_page) = (0, pages.len());
            if let Some(cache) = batch.segments.cache(i) {
                let layout = cache.layout();
                // Pages of others would be read beyond their end.
                if kv.is_some_and(|kv| kv != layout) || layout != KvLayout::new(&self.spec, layout.dtype)? {
                    return Err(Error::argument("the sequence belongs to another model, or to another part of it"));
                }
                position = cache.len();
                cache.reserve(position + rows)?;
                pages.extend(cache.page_pointers());
                kv = Some(cache.layout());
            }
            let pages = first_page..pages.len();
            sequences.push(SequenceView { first_row: positions.len(), rows, position, pages });
            positions.extend((position..position + rows).map(|p| p as u32));
        }
        let kv = match kv {
            Some(kv) => kv,
            None => KvLayout::new(&self.spec, DType::F32)?,
        };
        let (params, gradients, row_weights, soft_targets, dropout_seed) = match &mut batch.learning {
            None => (std::ptr::null(), std::ptr::null_mut(), [].as_slice(), SoftTargets::default(), 0),
            Some(l) => (l.params.as_ptr(), l.gradients.as_mut_ptr(), l.row_weights, l.soft_targets, l.dropout_seed),
        };
        let context = Context {
            isa: self.isa,
            tape: &program.tape,
            plan: &program.plan,
            weights: &self.weights,
            tables: program.tables,
            arena: self.arena.as_ptr(),
            arena_page: [self.arena.as_ptr().cast_const()],
            params,
            gradients,
            row_weights,
            soft_targets,
            dropout_seed,
            tokens: batch.tokens,
            input: batch.input,
            outputs: batch.outputs,
            targets: batch.targets,
            positions,
            sequences,
            quantized_only: &program.quantized_only,
            fusion: &program.fusion,
            pages,
            alone: batch.alone,
            kv,
            arithmetic: self.options.arithmetic,
            inputs: &program.inputs,
            learns: self.options.trained.is_some(),
            frequencies: &self.frequencies,
            patches: self.patches.as_ref(),
        };
        let done = walk(&context, &mut self.pool, &self.scratch, &mut self.timings, cancel);
        if !done {
            return Err(Error::Cancelled);
        }
        for i in 0..batch.segments.count() {
            let rows = batch.segments.rows(i);
            if let Some(cache) = batch.segments.cache(i) {
                cache.advance(rows);
            }
        }
        let info = program.tape.info(program.tape.result);
        let start = program.plan.place(program.tape.result).offset;
        self.result = start..start + batch.rows(info.rows) * info.width * 4;
        Ok(self.result())
    }

    /// The result of the last run, which is the caller's to change; empty after a run that failed.
    pub fn result(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.arena.bytes_mut()[self.result.clone()])
    }

    /// Prepares corrections of the maps, for this executor's limits; nothing changes yet.
    ///
    /// # Errors
    /// A matrix that no op multiplies with, [`Error::Memory`].
    pub fn patches(&mut self, corrections: Vec<Correction>) -> Result<Patches> {
        let program = self.program(Purpose::Generate)?;
        let tape = &self.programs[program].tape;
        let exact = self.options.arithmetic == Arithmetic::Exact;
        Patches::new(corrections, tape, &self.weights, self.options.limits.tokens, self.pool.threads(), exact)
    }

    /// Puts corrections in force from the next run on, in place of those before; `None` for the base alone.
    pub fn set_patches(&mut self, patches: Option<Patches>) {
        self.patches = patches;
    }

    /// The tape for what the executor was set up for.
    pub fn tape(&self) -> &Tape {
        &self.programs[0].tape
    }

    pub(crate) fn set_timing(&mut self, on: bool) {
        self.timings.on = on;
    }

    pub(crate) fn take_timings(&mut self) -> Vec<Timing> {
        self.timings.take()
    }
}

/// Walks the tape; false when it was cancelled.
fn walk(
    context: &Context<'_>,
    pool: &mut Pool,
    scratch: &[Mutex<Scratch>],
    timings: &mut Timings,
    cancel: &AtomicBool,
) -> bool {
    // The op behind which to stop: decided by thread 0, read by all after the barrier that follows its store.
    let stop_at = AtomicUsize::new(usize::MAX);
    let timed = timings.on;
    let table = Mutex::new(timings);
    pool.run(|team: &Team<'_>| {
        let mut scratch = scratch[team.index].lock().unwrap_or_else(PoisonError::into_inner);
        // Counters of claimed work alternate: see `Team::claim`.
        let mut round = 0;
        rope_tables(context, team);
        team.wait();
        for (index, op) in context.tape.ops.iter().enumerate() {
            let started = (timed && team.index == 0).then(Stopwatch::start);
            if op.is_claimed() {
                round += 1;
                if team.index == 0 {
                    team.reset_claims(round + 1);
                }
            }
            // SAFETY: all threads execute the same op with the same context between two barriers, with their own
            // scratch; the plan keeps values that live at once apart.
            unsafe { ops::run(context, op, team, &mut scratch, round) };
            if team.index == 0 && cancel.load(Ordering::Relaxed) {
                stop_at.store(index, Ordering::Relaxed);
            }
            team.wait();
            if let Some(started) = started
                && let Ok(mut table) = table.lock()
            {
                table.add(op.name(), started.elapsed());
            }
            if stop_at.load(Ordering::Relaxed) == index {
                return;
            }
        }
    });
    stop_at.into_inner() == usize::MAX
}

/// Fills cosines and sines of every row's position, for each kind of rotation.
fn rope_tables(context: &Context<'_>, team: &Team<'_>) {
    for row in team.share(context.positions.len(), 1) {
        let mut at = context.tables.rope + row * context.tables.rope_row * 4;
        for frequencies in context.frequencies {
            let half = frequencies.pairs();
            // SAFETY: the tables' place in the arena; this thread alone writes the rows of its share.
            let (cos, sin) = unsafe {
                let base = context.arena.add(at).cast::<f32>();
                (std::slice::from_raw_parts_mut(base, half), std::slice::from_raw_parts_mut(base.add(half), half))
            };
            frequencies.table(context.positions[row] as usize, cos, sin);
            at += 2 * half * 4;
        }
    }
}
