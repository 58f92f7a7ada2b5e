//! Runs a tape on a device: uploads what changes from run to run, replays the recorded dispatches, reads the result back.
//!
//! Generating has a recording for prompts and one for each number of rows that are decoded together; all share the plan and
//! the arena. A decoded token is one submission; longer runs are cut into several of a tenth of a second, so that the device
//! stays responsive and a run can be cancelled.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::adapters::{self, Correction, Placed};
use super::clock::Clock;
use super::device::{Device, SLOT, lock};
use super::division::{Launch, Sizes, launches, submissions};
use super::forward::DECODED;
use super::kv::{KvCache, PAGE, Pool};
use super::largest;
use super::learned::TRAINED;
use super::program::{LONG, Program, Recording, families, packed_bytes, slices, types};
use super::record::{Binds, Decoding, Recorded, Recorder, Scratch};
use super::shift::Dropped;
use super::training::Held;
use super::tune;
use super::weights::{Uploaded, WeightBytes};
use crate::quant::DType;
use crate::tape::{
    Batch, Frequencies, Op, PlanLimits, Purpose, SoftTargets, Spec, Stage, Tape, Timing, Timings, Trained, Weights,
    check_dropped, decoder,
};
use crate::{Error, Result, random};

/// Dispatches per submission of a run that is no decoding, until it is known how long they take.
const FIRST_PART: usize = 32;
/// How long a submission may take: systems give a device up that answers for seconds, and people want to cancel.
const PART_TIME: Duration = Duration::from_millis(100);
/// Words before the records of a run.
pub(super) const HEADER: usize = 8;
/// Words of the record of an output row.
const OUTPUT_WORDS: usize = 5;

/// How an executor is set up.
#[derive(Clone, Debug)]
pub struct ExecutorOptions {
    /// Most rows per run.
    pub limits: PlanLimits,
    /// Positions of a window: pages of the cache are taken for as many, before more are taken for further sequences.
    pub window: usize,
    /// Type of keys and values: F16, F32 or, for heads of a multiple of 32, Q8_0.
    pub kv_type: DType,
    /// Which part of the model it computes, the whole or the last; the spec has that part's layers.
    pub stage: Stage,
    /// What is trained: the tapes are those of learning then, of the whole model.
    pub trained: Option<Trained>,
    /// Whether linear maps are computed in single precision throughout.
    pub exact: bool,
    /// Layers, from the last, whose values are kept for the gradient instead of being computed again.
    pub kept_layers: usize,
}

impl ExecutorOptions {
    pub(super) fn purpose(&self) -> Purpose {
        if self.trained.is_some() { Purpose::Learn } else { Purpose::Generate }
    }
}

/// Memory an executor takes on the device, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExecutorNeeds {
    /// Values, logits and tables.
    pub arena: u64,
    /// Trained parameters, with gradients and moments.
    pub trained: u64,
}

/// Memory an executor for generating comes to take on the device with one sequence that fills a window, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Footprint {
    /// Weights.
    pub weights: WeightBytes,
    /// Pages of keys and values.
    pub kv_cache: u64,
    /// Values, packed rows, tables, descriptions of dispatches, results on their way back.
    pub values: u64,
}

/// What a run moves, counted from its recording.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Dispatches.
    pub dispatches: usize,
    /// Bytes of weights that kernels read, each as often as a kernel is to read it.
    pub weight_bytes: u64,
    /// Bytes of values that kernels read and write, each once per kernel.
    pub value_bytes: u64,
}

/// What is read back: bytes of results from a place in the arena, and of gradients.
#[derive(Clone, Copy, Debug, Default)]
struct Copies {
    result_at: u64,
    bytes: u64,
    gradient_bytes: u64,
}

/// Logits that were left on the device: their place in the arena in bytes, rows, and elements from row to row.
#[derive(Clone, Copy, Debug)]
struct Unread {
    at: u64,
    rows: usize,
    width: usize,
}

/// Commands made ahead, and for what: program, how rows are decoded, sizes, generation of the buffers.
#[derive(Debug)]
struct Ready {
    key: (usize, Option<Decoding>, Sizes, u64),
    commands: wgpu::CommandBuffer,
}

/// What forks of an executor share: the weights, which others may have too, and all pages of keys and values. Whoever runs has it for himself until he
/// is done, so that nobody else replaces a buffer that he has bound.
#[derive(Debug)]
struct Shared {
    uploaded: Uploaded,
    pool: Pool,
}

impl Shared {
    /// Brings what was given back to the device again.
    fn wake(&mut self) -> Result<()> {
        self.uploaded.wake()?;
        self.pool.wake()
    }

    /// Grows whenever a buffer is replaced.
    fn generation(&self) -> u64 {
        self.uploaded.generation + self.pool.generation
    }
}

/// Runs the tapes of one model. See the module's text.
#[derive(Debug)]
pub struct Executor {
    pub(super) device: Arc<Device>,
    spec: Spec,
    weights: Arc<Weights>,
    shared: Arc<Mutex<Shared>>,
    options: ExecutorOptions,
    programs: Vec<Program>,
    arena: wgpu::Buffer,
    packed: wgpu::Buffer,
    run: wgpu::Buffer,
    pub(super) params: wgpu::Buffer,
    pub(super) gradients: wgpu::Buffer,
    /// In how many slices they are summed.
    pub(super) slices: u32,
    /// What else a training keeps here.
    pub(super) held: Option<Held>,
    staging: wgpu::Buffer,
    /// Grows whenever one of the buffers above is replaced.
    pub(super) generation: u64,
    frequencies: Vec<Frequencies>,
    words: Vec<u32>,
    result: Vec<f32>,
    /// Where the last run gave the largest logits alone: those of every row, how many a row has, and where all are.
    largest: Vec<(u32, f32)>,
    largest_row: usize,
    unread: Option<Unread>,
    ready: Option<Ready>,
    corrections: Vec<Placed>,
    /// Longest row that corrections make.
    hidden: usize,
    /// Dispatches per submission of a run that is no decoding.
    part: usize,
    /// Multiply-adds that a dispatch may do.
    at_once: f64,
    timings: Timings,
}

impl Executor {
    /// Plans the tape, uploads the weights, allocates.
    ///
    /// # Errors
    /// Shapes or ops that the kernels do not know, [`Error::Memory`], [`Error::Device`].
    pub fn new(
        device: &Arc<Device>,
        spec: &Spec,
        weights: Arc<Weights>,
        options: &ExecutorOptions,
    ) -> Result<Executor> {
        let program = Program::checked(spec, &weights, options)?;
        let used = if program.tape.trains_weights { BTreeSet::new() } else { program.tape.matrices() };
        let uploaded = Uploaded::new(device, spec, &weights, &used)?;
        let pool = Pool::new(device.clone(), spec, options.kv_type, options.window)?;
        let shared = Arc::new(Mutex::new(Shared { uploaded, pool }));
        Executor::with(device, spec, weights, options, program, shared)
    }

    /// A second executor for the same model: it has activations of its own, and shares the weights and the pages of keys
    /// and values, so that caches of the one go on in the other. No corrections are in force in it.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`].
    pub fn fork(&self) -> Result<Executor> {
        let program = Program::new(&self.spec, &self.weights, self.options.purpose(), &self.options);
        let (device, weights, shared) = (&self.device, self.weights.clone(), self.shared.clone());
        Executor::with(device, &self.spec, weights, &self.options, program, shared)
    }

    fn with(
        device: &Arc<Device>,
        spec: &Spec,
        weights: Arc<Weights>,
        options: &ExecutorOptions,
        program: Program,
        shared: Arc<Mutex<Shared>>,
    ) -> Result<Executor> {
        tune::prepare(device, families(&program), &types(&program.tape, &weights));
        let params = 4 * program.tape.param_count() as u64;
        let slices = slices(device, &program.tape);
        let arena = device.storage(4 * program.scratch.end, "activations")?;
        let program_packed = packed_bytes(device, &program, options);
        let mut executor = Executor {
            device: device.clone(),
            spec: spec.clone(),
            weights,
            shared: shared.clone(),
            options: options.clone(),
            programs: vec![program],
            arena,
            packed: device.storage(program_packed, "packed rows")?,
            run: device.storage(SLOT, "tables of a run")?,
            params: device.storage(params, "trained parameters")?,
            gradients: device.storage(params * u64::from(slices), "gradients")?,
            slices,
            held: None,
            staging: device.staging(SLOT)?,
            generation: 0,
            frequencies: spec.ropes.iter().map(Frequencies::new).collect(),
            words: Vec::new(),
            result: Vec::new(),
            largest: Vec::new(),
            largest_row: 0,
            unread: None,
            ready: None,
            corrections: Vec::new(),
            hidden: 0,
            part: FIRST_PART,
            at_once: device.at_once(),
            timings: Timings::default(),
        };
        let mut shared = lock(&shared);
        shared.wake()?;
        executor.compile(&shared)?;
        // What cannot be run is refused now and not later.
        executor.recording(&shared, 0, None)?;
        drop(shared);
        Ok(executor)
    }

    /// What [`Executor::new`] comes to need beside the weights.
    pub fn needs(device: &Device, spec: &Spec, weights: &Weights, options: &ExecutorOptions) -> ExecutorNeeds {
        let program = Program::new(spec, weights, options.purpose(), options);
        let params = 4 * program.tape.param_count() as u64;
        let slices = u64::from(slices(device, &program.tape));
        ExecutorNeeds { arena: 4 * program.scratch.end, trained: params * (3 + slices) }
    }

    /// What the weights of [`Executor::new`] come to take: none where all are trained, for then they are parameters.
    ///
    /// # Errors
    /// As [`Executor::new`], memory apart.
    pub fn weight_bytes(
        device: &Device,
        spec: &Spec,
        weights: &Arc<Weights>,
        options: &ExecutorOptions,
    ) -> Result<WeightBytes> {
        let tape = Program::checked(spec, weights, options)?.tape;
        match tape.trains_weights {
            true => Ok(WeightBytes::default()),
            false => Uploaded::needs(device, weights, &tape.matrices()),
        }
    }

    /// What [`Executor::new`] comes to take for generating.
    ///
    /// # Errors
    /// As [`Executor::new`], memory apart.
    pub fn footprint(
        device: &Device,
        spec: &Spec,
        weights: &Arc<Weights>,
        options: &ExecutorOptions,
    ) -> Result<Footprint> {
        let program = Program::checked(spec, weights, options)?;
        let PlanLimits { tokens, outputs } = options.limits;
        let rotations: usize = spec.ropes.iter().map(|rope| rope.dims).sum();
        let table = HEADER + tokens * (4 + rotations) + OUTPUT_WORDS * outputs + options.window.div_ceil(PAGE);
        let results = 4 * outputs * program.tape.info(program.tape.result).width;
        // Of prompts, of single tokens, and of those in a long window; an op is a dispatch, more or less, and attention has a
        // description for each head.
        let attentions = program.tape.ops.iter().filter(|op| matches!(op, Op::Attention(_))).count();
        let descriptions = 3 * (program.tape.ops.len() + attentions * spec.heads) as u64 * SLOT;
        let values = 4 * program.scratch.end
            + packed_bytes(device, &program, options)
            + (4 * table as u64).next_power_of_two()
            + results as u64
            + descriptions;
        Ok(Footprint {
            weights: Uploaded::needs(device, weights, &program.tape.matrices())?,
            kv_cache: Pool::needs(spec, options.kv_type, options.window),
            values,
        })
    }

    /// Bytes of the device's memory that have an executor's weights already, for another of the same model; 0 if none has.
    pub fn present(device: &Device, spec: &Spec, weights: &Arc<Weights>, options: &ExecutorOptions) -> u64 {
        let tape = decoder::build(spec, weights, Purpose::Generate, options.stage);
        Uploaded::present(device, weights, &tape.matrices())
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The tape for what the executor was set up for.
    pub fn tape(&self) -> &Tape {
        &self.programs[0].tape
    }

    /// What decoding one token moves.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn decode_traffic(&mut self) -> Result<Traffic> {
        let shared = self.shared.clone();
        let mut shared = lock(&shared);
        shared.wake()?;
        let program = self.program(Purpose::Generate)?;
        let recording = self.recording(&shared, program, Some(Decoding { rows: 1, splits: 1, largest: 0 }))?;
        let dispatches = &self.programs[program].recordings[recording].dispatches;
        Ok(dispatches.iter().fold(Traffic::default(), |t, d| Traffic {
            dispatches: t.dispatches + 1,
            weight_bytes: t.weight_bytes + d.weight_bytes,
            value_bytes: t.value_bytes + 4 * d.floats,
        }))
    }

    /// Index of the program for `purpose`, made at its first use, with room for what it computes in.
    fn program(&mut self, purpose: Purpose) -> Result<usize> {
        let at = match self.programs.iter().position(|p| p.purpose == purpose) {
            Some(at) => at,
            None => {
                self.programs.push(Program::new(&self.spec, &self.weights, purpose, &self.options));
                self.programs.len() - 1
            }
        };
        let program = &self.programs[at];
        let (room, packed) = (self.room(program, self.hidden), packed_bytes(&self.device, program, &self.options));
        self.hold(room)?;
        if packed > self.packed.size() {
            self.packed = self.device.storage(packed, "packed rows")?;
            self.generation += 1;
        }
        Ok(at)
    }

    /// Bytes of the arena that a program takes, with rows of so many elements for corrections.
    fn room(&self, program: &Program, hidden: usize) -> u64 {
        let rows = self.options.limits.tokens.max(self.options.limits.outputs);
        4 * (program.scratch.end + (rows * hidden) as u64)
    }

    /// Makes the arena as large.
    fn hold(&mut self, bytes: u64) -> Result<()> {
        if bytes > self.arena.size() {
            self.arena = self.device.storage(bytes, "activations")?;
            self.generation += 1;
        }
        Ok(())
    }

    /// Puts corrections of the maps in force from the next run on, in place of those before. Gives the bytes they take.
    ///
    /// # Errors
    /// Corrections of what is no linear map, [`Error::Memory`], [`Error::Device`]. Those before stay in force then.
    pub fn set_corrections(&mut self, corrections: &[Correction<'_>]) -> Result<usize> {
        let (values, placed, hidden) = adapters::place(&self.programs[0].tape, corrections)?;
        let room = self.programs.iter().map(|p| self.room(p, hidden)).max().unwrap_or(0);
        let params = self.device.storage(4 * values.len() as u64, "adapters")?;
        self.hold(room)?;
        self.device.queue.write_buffer(&params, 0, bytemuck::cast_slice(&values));
        (self.params, self.corrections, self.hidden) = (params, placed, hidden);
        self.generation += 1;
        self.ready = None;
        self.forget();
        // They are recorded anew when they are needed.
        self.programs.iter_mut().for_each(|p| p.recordings.clear());
        let shared = self.shared.clone();
        if let Err(e) = self.compile(&lock(&shared)) {
            log::debug!("the next run says: {e}");
        }
        Ok(4 * values.len())
    }

    /// The dispatches of a program for so many decoded rows.
    fn record(&self, shared: &Shared, program: usize, decoding: Option<Decoding>) -> Result<Recorded> {
        let p = &self.programs[program];
        let recorder = Recorder::new(
            &self.device,
            &self.spec,
            (&p.tape, &p.plan),
            (&self.weights, &shared.uploaded),
            (self.options.kv_type, self.options.exact),
            decoding,
            &self.corrections,
            Scratch { slices: self.slices, ..p.scratch },
        );
        recorder.record()
    }

    /// Records how one sequence is generated, or learned, and has the kernels compiled all at once, so that no run waits for that.
    fn compile(&mut self, shared: &Shared) -> Result<()> {
        let mut ways = vec![None];
        if self.options.purpose() == Purpose::Generate {
            let largest = largest::found(self.spec.vocab, 1);
            let splits = [1, LONG.1].into_iter().filter(|splits| *splits == 1 || self.options.window >= LONG.0);
            ways.extend(splits.map(|splits| Some(Decoding { rows: 1, splits, largest })));
        }
        let record = |decoding| Ok((decoding, self.record(shared, 0, decoding)?));
        let recorded = ways.into_iter().map(record).collect::<Result<Vec<_>>>()?;
        let mut seen = HashSet::new();
        let kernels = recorded.iter().flat_map(|(_, recorded)| &recorded.kernels).filter(|kernel| seen.insert(*kernel));
        self.device.pipelines(&kernels.cloned().collect::<Vec<_>>())?;
        recorded.into_iter().try_for_each(|(decoding, recorded)| self.keep(0, decoding, recorded).map(|_| ()))
    }

    /// Adds a recording to a program's, and gives its index.
    fn keep(&mut self, program: usize, decoding: Option<Decoding>, recorded: Recorded) -> Result<usize> {
        let Recorded { dispatches, slots, kernels, binds } = recorded;
        let pipelines = self.device.pipelines(&kernels)?;
        self.device.keep_pipelines();
        let uniforms = self.device.descriptions(&slots)?;
        let (groups, generation) = (Vec::new(), u64::MAX);
        let recordings = &mut self.programs[program].recordings;
        recordings.push(Recording { decoding, dispatches, uniforms, pipelines, binds, groups, generation });
        Ok(recordings.len() - 1)
    }

    /// Index of a program's recording for so many decoded rows, made at its first use, with bind groups that are true.
    fn recording(&mut self, shared: &Shared, program: usize, decoding: Option<Decoding>) -> Result<usize> {
        let at = match self.programs[program].recordings.iter().position(|r| r.decoding == decoding) {
            Some(at) => at,
            None => {
                self.record(shared, program, decoding).and_then(|recorded| self.keep(program, decoding, recorded))?
            }
        };
        let generation = self.generation + shared.generation();
        if self.programs[program].recordings[at].generation != generation {
            let recording = &self.programs[program].recordings[at];
            let groups = recording.binds.iter().map(|b| self.bind(shared, &recording.uniforms, *b)).collect();
            let recording = &mut self.programs[program].recordings[at];
            recording.groups = groups;
            recording.generation = generation;
        }
        Ok(at)
    }

    fn bind(&self, shared: &Shared, uniforms: &wgpu::Buffer, (weights, layer): Binds) -> wgpu::BindGroup {
        let Executor { run, arena, params, gradients, packed, .. } = self;
        let cache = &shared.pool.layers[layer];
        let (constants, weights) = match weights {
            TRAINED => (params, params),
            weights => (&shared.uploaded.constants, &shared.uploaded.buffers()[weights]),
        };
        self.device.bind(uniforms, [run, constants, weights, arena, cache, params, gradients, packed])
    }

    /// Runs `batch` and gives the result, `[outputs, width]`: logits or cross-entropies; nothing where [`Executor::largest`]
    /// has the logits that decide. The caches have advanced then.
    ///
    /// # Errors
    /// A batch over the limits, token ids outside the vocabulary, [`Error::Memory`] for KV pages, [`Error::Cancelled`],
    /// [`Error::Device`]. The caches are as before then.
    pub fn run(&mut self, purpose: Purpose, mut batch: Batch<'_, KvCache>, cancel: &AtomicBool) -> Result<&mut [f32]> {
        self.forget();
        self.device.check()?;
        let shared = self.shared.clone();
        let mut shared = lock(&shared);
        shared.wake()?;
        self.wake_training()?;
        let program = self.program(purpose)?;
        let p = &self.programs[program];
        batch.check(&p.tape, &p.plan.limits, purpose, self.held.is_some())?;
        let held = batch.learning.as_ref().is_some_and(|l| l.held);
        if self.held.is_some() && purpose == Purpose::Learn && !held {
            return Err(Error::argument("the device holds a training; its gradients are not to be mixed with others"));
        }
        self.bind_params(held)?;
        let sequences = batch.segments.count();
        for i in 0..sequences {
            let rows = batch.segments.rows(i);
            if let Some(cache) = batch.segments.cache(i) {
                let len = cache.len() + rows;
                cache.reserve(&mut shared.pool, cache.len(), len)?;
            }
        }
        self.upload(&mut batch, purpose, program)?;
        let singles = sequences <= DECODED && (0..sequences).all(|i| batch.segments.rows(i) == 1);
        let longest = (0..sequences).filter_map(|i| batch.segments.cache(i).map(|c| c.len())).max().unwrap_or(0);
        let decoding = (purpose == Purpose::Generate && singles).then(|| Decoding {
            rows: sequences.next_power_of_two() as u32,
            splits: if longest >= LONG.0 { LONG.1 } else { 1 },
            largest: largest::found(self.spec.vocab, batch.largest),
        });
        let found = decoding.map_or(0, |d| d.largest) as usize;
        let recording = self.recording(&shared, program, decoding)?;
        let sizes = Sizes { tokens: batch.tokens.len(), outputs: batch.outputs.len(), seen: seen(&mut batch, singles) };
        let p = &self.programs[program];
        let width = p.tape.info(p.tape.result).width;
        let all_at = p.plan.place(p.tape.result).offset as u64;
        let (result_at, floats) = match found {
            0 => (all_at, width),
            _ => (4 * u64::from(p.scratch.largest), 2 * found),
        };
        let bytes = (batch.outputs.len() * floats * 4) as u64;
        let within = batch.learning.as_ref().map(|l| l.within).unwrap_or_default();
        let read_gradients = purpose == Purpose::Learn && !within.goes_on && !held;
        let gradient_bytes = if read_gradients { 4 * p.tape.param_count() as u64 } else { 0 };
        if self.staging.size() < bytes + gradient_bytes {
            self.staging = self.device.staging(bytes + gradient_bytes)?;
            self.ready = None;
        }
        let p = &self.programs[program];
        let copies = Copies { result_at, bytes, gradient_bytes };
        let recording = &p.recordings[recording];
        if self.timings.on {
            let launches = launches(self.at_once, &recording.dispatches, &sizes);
            replay_timed(&self.device, recording, (&launches, &sizes), &mut self.timings)?;
            self.device.queue.submit([self.encode(&[], recording, &sizes, copies)]);
        } else if decoding.is_none() {
            let (begun, mut before) = (Instant::now(), None);
            let launches = launches(self.at_once, &recording.dispatches, &sizes);
            let parts = submissions(&launches, self.part);
            let last = parts.len() - 1;
            for (i, part) in parts.into_iter().enumerate() {
                if cancel.load(Ordering::Relaxed) {
                    return Err(Error::Cancelled);
                }
                let copies = if i == last { copies } else { Copies::default() };
                let submission = self.device.queue.submit([self.encode(part, recording, &sizes, copies)]);
                // The device has one part to do while the next is made ready.
                if let Some(before) = before.replace(submission) {
                    self.device.wait_for(Some(before))?;
                }
            }
            self.device.wait()?;
            let each = begun.elapsed() / launches.len().max(1) as u32;
            self.part = (PART_TIME.as_nanos() / each.as_nanos().max(1)).clamp(8, 1 << 20) as usize;
        } else {
            let key = (program, decoding, sizes.clone(), recording.generation);
            let ready = self.ready.take().filter(|ready| ready.key == key).map(|ready| ready.commands);
            let encode =
                || self.encode(&launches(self.at_once, &recording.dispatches, &sizes), recording, &sizes, copies);
            self.device.queue.submit([ready.unwrap_or_else(encode)]);
            // The next token's commands are most likely the same: they are made while the device is busy.
            self.ready = Some(Ready { key, commands: encode() });
        }
        if bytes + gradient_bytes > 0 {
            self.result.resize((bytes + gradient_bytes) as usize / 4, 0.0);
            self.device.read(&self.staging, bytes + gradient_bytes, bytemuck::cast_slice_mut(&mut self.result))?;
        } else {
            // Chunks of a prompt before its last: nothing to read, but trouble to hear of.
            self.device.wait()?;
        }
        if let Some(l) = &mut batch.learning {
            let computed = &self.result[bytes as usize / 4..];
            for (gradient, more) in l.gradients.iter_mut().zip(computed) {
                *gradient += more;
            }
        }
        for i in 0..sequences {
            let rows = batch.segments.rows(i);
            if let Some(cache) = batch.segments.cache(i) {
                cache.advance(rows);
            }
        }
        self.result.truncate(bytes as usize / 4);
        if found > 0 {
            self.largest.extend(largest::pairs(&self.result));
            self.largest_row = found;
            self.unread = Some(Unread { at: all_at, rows: batch.outputs.len(), width });
            self.result.clear();
        } else if purpose == Purpose::Generate {
            self.unpad(batch.outputs.len(), width);
        }
        Ok(&mut self.result)
    }

    /// Rows of logits are padded on the device.
    fn unpad(&mut self, rows: usize, width: usize) {
        let vocab = self.spec.vocab;
        if vocab != width {
            for row in 0..rows {
                self.result.copy_within(row * width..row * width + vocab, row * vocab);
            }
            self.result.truncate(rows * vocab);
        }
    }

    /// The largest logits of an output row of the last run, most first, of equals the lower token first: at least as many as
    /// were asked for, behind a row's end −∞. None where the run gave all logits.
    pub fn largest(&self, row: usize) -> Option<&[(u32, f32)]> {
        (self.largest_row > 0).then(|| self.largest.chunks_exact(self.largest_row).nth(row)).flatten()
    }

    /// Brings all logits of a run that gave the largest ones; the result is as without then.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`].
    pub fn read_logits(&mut self) -> Result<()> {
        let Some(Unread { at, rows, width }) = self.unread.take() else { return Ok(()) };
        let bytes = (rows * width * 4) as u64;
        if self.staging.size() < bytes {
            self.staging = self.device.staging(bytes)?;
            self.ready = None;
        }
        let mut encoder = self.device.encoder();
        encoder.copy_buffer_to_buffer(&self.arena, at, &self.staging, 0, bytes);
        self.device.queue.submit([encoder.finish()]);
        self.result.resize(bytes as usize / 4, 0.0);
        self.device.read(&self.staging, bytes, bytemuck::cast_slice_mut(&mut self.result))?;
        self.unpad(rows, width);
        Ok(())
    }

    /// Forgets what the last run gave.
    fn forget(&mut self) {
        self.result.clear();
        self.largest.clear();
        self.largest_row = 0;
        self.unread = None;
    }

    /// Hands over what a cache holds, as [`cpu::KvCache::contents`](crate::cpu::KvCache::contents) does.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`], and what `write` says.
    pub fn contents(&self, cache: &KvCache, write: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        lock(&self.shared).pool.contents(cache, 0..cache.len().div_ceil(PAGE), write)
    }

    /// Of [`Executor::contents`] what is in one page.
    ///
    /// # Errors
    /// As [`Executor::contents`].
    pub fn page_contents(&self, cache: &KvCache, page: usize, write: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        lock(&self.shared).pool.contents(cache, page..page + 1, write)
    }

    /// Fills a cache, as [`cpu::KvCache::fill`](crate::cpu::KvCache::fill) does.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`], and what `read` says; nothing is held then.
    pub fn fill(&self, cache: &mut KvCache, len: usize, mut read: impl FnMut(&mut [u8]) -> Result<()>) -> Result<()> {
        cache.truncate(0);
        (0..len.div_ceil(PAGE)).try_for_each(|page| self.fill_page(cache, page, len, &mut read))
    }

    /// Of [`Executor::fill`] what is in one page, as [`cpu::KvCache::fill_page`](crate::cpu::KvCache::fill_page) does.
    ///
    /// # Errors
    /// As [`Executor::fill`].
    pub fn fill_page(
        &self,
        cache: &mut KvCache,
        page: usize,
        len: usize,
        read: impl FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        lock(&self.shared).pool.fill_page(cache, page, len, read)
    }

    /// Drops a part of a cache, as [`cpu::KvCache::shift`](crate::cpu::KvCache::shift) does.
    ///
    /// # Errors
    /// Positions that are not held, [`Error::Memory`], [`Error::Device`].
    pub fn shift(&mut self, cache: &mut KvCache, keep: usize, drop: usize) -> Result<()> {
        let len = cache.len();
        check_dropped(len, keep, drop)?;
        if drop == 0 {
            return Ok(());
        }
        let shared = self.shared.clone();
        let mut shared = lock(&shared);
        shared.wake()?;
        cache.reserve(&mut shared.pool, keep, len)?;
        let dropped = Dropped { keep, drop };
        self.words = dropped.table(&self.frequencies, cache);
        self.upload_tables()?;
        let table = self.words.len() - cache.pages().count();
        let bind = |uniforms: &wgpu::Buffer, layer| self.bind(&shared, uniforms, (0, layer));
        dropped.submit(&self.device, &self.spec, self.options.kv_type, (len, table), bind)?;
        cache.truncate(len - drop);
        Ok(())
    }

    /// Gives back the memory that only a run needs, the last result with it; the next run takes it anew. Gives its bytes.
    ///
    /// # Errors
    /// [`Error::Memory`], for a handful of bytes; [`Error::Device`].
    pub fn trim(&mut self) -> Result<u64> {
        self.forget();
        self.result = Vec::new();
        self.ready = None;
        let (device, least) = (&self.device, SLOT);
        let mut freed = 0;
        for (buffer, what) in [
            (&mut self.arena, "activations"),
            (&mut self.packed, "packed rows"),
            (&mut self.run, "tables of a run"),
            (&mut self.staging, "results"),
        ] {
            if buffer.size() > least {
                let usage = buffer.usage();
                let old = std::mem::replace(buffer, device.buffer(least, usage, what)?);
                freed += old.size() - least;
                old.destroy();
            }
        }
        self.generation += 1;
        // What is bound is kept alive by those who bind it.
        self.programs.iter_mut().flat_map(|p| &mut p.recordings).for_each(|r| r.groups.clear());
        self.device.wait()?;
        Ok(freed)
    }

    /// As [`Executor::trim`], and gives back the memory of the KV cache, of a training and, when the last one who uses them
    /// does so, of the weights too: what caches and the training hold waits in main memory, and the next run of any of them
    /// brings all up again. Gives the bytes.
    ///
    /// # Errors
    /// [`Error::Memory`], [`Error::Device`]; the weights and the caches are on the device then.
    pub fn park(&mut self) -> Result<u64> {
        let trimmed = self.trim()? + self.park_training()?;
        let mut shared = lock(&self.shared);
        let pages = shared.pool.park()?;
        let weights = shared.uploaded.park();
        drop(shared);
        self.device.wait()?;
        Ok(trimmed + pages + weights)
    }

    /// Commands for a part of a recording, and for copying what is read back.
    fn encode(&self, part: &[Launch<'_>], recording: &Recording, sizes: &Sizes, copies: Copies) -> wgpu::CommandBuffer {
        let mut encoder = self.device.encoder();
        if !part.is_empty() {
            replay(&mut encoder, recording, part, sizes, None);
        }
        let Copies { result_at, bytes, gradient_bytes } = copies;
        if bytes > 0 {
            encoder.copy_buffer_to_buffer(&self.arena, result_at, &self.staging, 0, bytes);
        }
        if gradient_bytes > 0 {
            encoder.copy_buffer_to_buffer(&self.gradients, 0, &self.staging, bytes, gradient_bytes);
        }
        encoder.finish()
    }

    /// The result of the last run; empty after a run that failed.
    pub fn result(&mut self) -> &mut [f32] {
        &mut self.result
    }

    /// Writes the tables of a run, what its tape begins with, and what is learned.
    fn upload(&mut self, batch: &mut Batch<'_, KvCache>, purpose: Purpose, program: usize) -> Result<()> {
        let (rows, outputs) = (batch.tokens.len(), batch.outputs.len());
        let rope_row: usize = self.frequencies.iter().map(|f| 2 * f.pairs()).sum();
        let outputs_at = HEADER + 4 * rows;
        let rope_at = outputs_at + OUTPUT_WORDS * outputs;
        let pages_at = rope_at + rows * rope_row;
        let words = &mut self.words;
        words.clear();
        // Spread over all bits: the seeds of neighbouring runs would otherwise be neighbouring streams.
        let seed = batch.learning.as_ref().map_or(0, |l| random::splitmix64(l.dropout_seed, 0));
        words.extend([rows as u32, outputs as u32, 1, outputs_at as u32, rope_at as u32, rope_row as u32]);
        words.extend([seed as u32, (seed >> 32) as u32]);
        let (mut row, mut pages) = (0, pages_at);
        let mut positions = Vec::with_capacity(rows);
        for i in 0..batch.segments.count() {
            let (first, end) = (row, row + batch.segments.rows(i));
            let held = batch.segments.cache(i).map(|c| c.len());
            let before = held.unwrap_or(0);
            let start = if held.is_some() { pages } else { first };
            while row < end {
                let position = before + row - first;
                positions.push(position);
                words.extend([batch.tokens[row], position as u32, start as u32, end as u32]);
                row += 1;
            }
            pages += (before + end - first).div_ceil(PAGE);
        }
        let weights = batch.learning.as_ref().map_or([].as_slice(), |l| l.row_weights);
        // Learning has no pages: the entries of soft targets are in their place.
        let mut soft_at = pages_at;
        let soft = batch.learning.as_ref().map_or(SoftTargets::default(), |l| l.soft_targets);
        for (s, output) in batch.outputs.iter().enumerate() {
            let target = batch.targets.get(s).copied().unwrap_or(0);
            let (tokens, _) = soft.of(s);
            words.extend([*output, target, weights.get(s).copied().unwrap_or(0.0).to_bits()]);
            words.extend([soft_at as u32, tokens.len() as u32]);
            soft_at += 2 * tokens.len();
        }
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            for frequencies in &self.frequencies {
                cos.resize(frequencies.pairs(), 0.0f32);
                sin.resize(frequencies.pairs(), 0.0f32);
                frequencies.table(position, &mut cos, &mut sin);
                words.extend(cos.iter().chain(&sin).map(|v| v.to_bits()));
            }
        }
        for i in 0..batch.segments.count() {
            words.extend(batch.segments.cache(i).into_iter().flat_map(|cache| cache.pages()));
        }
        for s in 0..outputs {
            let (tokens, shares) = soft.of(s);
            words.extend(tokens.iter().zip(shares).flat_map(|(token, share)| [*token, share.to_bits()]));
        }
        self.upload_tables()?;
        let program = &self.programs[program];
        if let Some(input) = program.tape.input() {
            let at = program.plan.place(input).offset as u64;
            self.device.queue.write_buffer(&self.arena, at, bytemuck::cast_slice(batch.input));
        }
        if let Some(l) = batch.learning.as_ref().filter(|l| !l.within.begun && !l.held) {
            self.device.queue.write_buffer(&self.params, 0, bytemuck::cast_slice(l.params));
            if purpose == Purpose::Learn {
                let mut encoder = self.device.encoder();
                encoder.clear_buffer(&self.gradients, 0, None);
                self.device.queue.submit([encoder.finish()]);
            }
        }
        Ok(())
    }

    /// Writes the words of a run.
    fn upload_tables(&mut self) -> Result<()> {
        let bytes = 4 * self.words.len() as u64;
        if bytes > self.run.size() {
            self.run = self.device.storage(bytes.next_power_of_two(), "tables of a run")?;
            self.generation += 1;
        }
        self.device.queue.write_buffer(&self.run, 0, bytemuck::cast_slice(&self.words));
        Ok(())
    }

    pub(crate) fn set_timing(&mut self, on: bool) {
        self.timings.on = on;
    }

    pub(crate) fn take_timings(&mut self) -> Vec<Timing> {
        self.timings.take()
    }
}

/// For each row, how many positions there are for it to see; of `singles` rounded up to pages, so that neighbouring runs are alike.
fn seen(batch: &mut Batch<'_, KvCache>, singles: bool) -> Vec<u32> {
    let mut seen = Vec::with_capacity(batch.tokens.len());
    for i in 0..batch.segments.count() {
        let before = batch.segments.cache(i).map_or(0, |cache| cache.len());
        let positions = before + 1..=before + batch.segments.rows(i);
        let rounded = |n: usize| if singles { n.next_multiple_of(PAGE) } else { n };
        seen.extend(positions.map(|n| rounded(n) as u32));
    }
    seen
}

/// Encodes `part` of a recording as one pass.
fn replay(
    encoder: &mut wgpu::CommandEncoder,
    recording: &Recording,
    part: &[Launch<'_>],
    sizes: &Sizes,
    timestamps: Option<wgpu::ComputePassTimestampWrites<'_>>,
) {
    let mut pass =
        encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes: timestamps });
    for Launch { dispatch, slot, grid, .. } in part {
        let [x, y, z] = grid.size(|kind| sizes.rows(kind));
        if z == 0 {
            continue;
        }
        pass.set_pipeline(&recording.pipelines[dispatch.pipeline]);
        pass.set_bind_group(0, &recording.groups[dispatch.group], &[*slot]);
        pass.dispatch_workgroups(x, y, z);
    }
}

/// Most dispatches that are timed at once: two timestamps each.
const TIMED: usize = 2_000;

/// Replays a recording with a pass per dispatch, each between two timestamps of the device.
fn replay_timed(
    device: &Device,
    recording: &Recording,
    (launches, sizes): (&[Launch<'_>], &Sizes),
    timings: &mut Timings,
) -> Result<()> {
    if !device.abilities.timestamps {
        return Err(Error::Unsupported(format!("{} has no timestamps: no table of times", device.info().name)));
    }
    let clock = Clock::new(device, TIMED)?;
    for part in launches.chunks(TIMED) {
        let mut commands = device.encoder();
        for (i, launch) in part.iter().enumerate() {
            replay(&mut commands, recording, std::slice::from_ref(launch), sizes, Some(clock.writes(i)));
        }
        for (launch, time) in part.iter().zip(clock.submit(device, commands, part.len())?) {
            timings.add(launch.dispatch.op, time);
        }
    }
    Ok(())
}
