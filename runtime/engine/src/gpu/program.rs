//! A tape with its plan and the places behind its values, what that takes, and what an executor asks of it.

use super::choice::Family;
use super::device::{Device, DeviceKind};
use super::executor::ExecutorOptions;
use super::forward::{self, CHUNK, DECODED};
use super::largest;
use super::record::{Binds, Decoding, Dispatch, PackedRows, Scratch};
use crate::quant::DType;
use crate::tape::{Op, Plan, PlanLimits, Purpose, Spec, Stage, Tape, Weights, decoder};
use crate::{Error, Result};

/// From this position on a head's attention is computed in parts, and in how many.
pub(super) const LONG: (usize, u32) = (1_024, 8);

/// A tape with its plan.
#[derive(Debug)]
pub(super) struct Program {
    pub purpose: Purpose,
    pub tape: Tape,
    pub plan: Plan,
    pub scratch: Scratch,
    pub recordings: Vec<Recording>,
}

/// A list of dispatches with what they bind.
#[derive(Debug)]
pub(super) struct Recording {
    /// How rows are decoded; none for prompts and all else.
    pub decoding: Option<Decoding>,
    pub dispatches: Vec<Dispatch>,
    pub uniforms: wgpu::Buffer,
    pub pipelines: Vec<wgpu::ComputePipeline>,
    pub binds: Vec<Binds>,
    pub groups: Vec<wgpu::BindGroup>,
    /// Of the buffers the groups were made for.
    pub generation: u64,
}

impl Program {
    /// The program that an executor begins with.
    ///
    /// # Errors
    /// Shapes or ops that the kernels do not know.
    pub fn checked(spec: &Spec, weights: &Weights, options: &ExecutorOptions) -> Result<Program> {
        check(spec, options)?;
        let program = Program::new(spec, weights, options.purpose(), options);
        match forward::unfit(&program.tape, weights) {
            Some(why) => Err(Error::Unsupported(format!("on the GPU: {why}; use the CPU"))),
            None => Ok(program),
        }
    }

    pub fn new(spec: &Spec, weights: &Weights, purpose: Purpose, options: &ExecutorOptions) -> Program {
        let limits = match purpose {
            Purpose::Generate => options.limits,
            Purpose::Embed | Purpose::Score | Purpose::Learn => {
                PlanLimits { outputs: options.limits.tokens, ..options.limits }
            }
        };
        let mut tape = match &options.trained {
            None => decoder::build(spec, weights, purpose, options.stage),
            Some(trained) => decoder::build_learning(spec, weights, trained, purpose, options.kept_layers),
        };
        if purpose == Purpose::Generate {
            // Rows begin at multiples of four elements.
            let logits = &mut tape.values[tape.result.0 as usize];
            logits.width = logits.width.next_multiple_of(4);
        }
        let plan = Plan::with_reads(
            &tape,
            limits,
            |_, _| None,
            |index| match purpose {
                Purpose::Generate => forward::reads_on_the_way(&tape, index),
                // Nothing is decoded, so every op is a dispatch of its own.
                Purpose::Embed | Purpose::Score | Purpose::Learn => Vec::new(),
            },
        );
        let mut end = (plan.arena_bytes as u64 / 4).next_multiple_of(64);
        let mut place = |floats: usize| {
            let at = end as u32;
            end += (floats as u64).next_multiple_of(64);
            at
        };
        let mut scratch = Scratch::default();
        if matches!(purpose, Purpose::Score | Purpose::Learn) {
            scratch.logits = place(limits.outputs * CHUNK);
            scratch.states = place(limits.outputs * 4);
        }
        if purpose == Purpose::Generate {
            scratch.parts = place(DECODED * spec.heads * LONG.1 as usize * (spec.head_dim + 4));
            scratch.largest = place(largest::floats(spec.vocab, limits.outputs.min(DECODED)));
        }
        if purpose == Purpose::Learn {
            scratch.delta = place(limits.tokens * spec.heads);
        }
        for op in &tape.ops {
            match op {
                Op::LoraHidden(_) if scratch.raw == 0 => scratch.raw = place(limits.outputs * CHUNK),
                Op::EmbedLora(l) if scratch.gathered == 0 => {
                    scratch.gathered = place(limits.tokens * tape.params[l.b.0 as usize].width);
                }
                Op::RmsNormWeightBackward { .. } if scratch.rho == 0 => {
                    scratch.rho = place(limits.tokens * spec.heads.max(1));
                }
                Op::HeadNormWeightBackward { .. } if scratch.turned == 0 => {
                    scratch.turned = place(limits.tokens * (spec.heads + spec.kv_heads) * spec.head_dim);
                }
                _ => {}
            }
        }
        // Rows of whole tiles.
        let rows = limits.tokens.next_multiple_of(forward::PACKED_ROWS);
        let widths = [forward::widest(&tape, weights).next_multiple_of(32), CHUNK];
        let kinds = if purpose == Purpose::Generate { 1 } else { 2 };
        for (packed, width) in scratch.packed.iter_mut().zip(widths).take(kinds) {
            *packed = PackedRows { at: scratch.packed_end, scales: place(limits.tokens) };
            scratch.packed_end += (rows * width / 4) as u32;
        }
        (scratch.hidden, scratch.end) = (end as u32, end);
        Program { purpose, tape, plan, scratch, recordings: Vec::new() }
    }
}

pub(super) fn check(spec: &Spec, options: &ExecutorOptions) -> Result<()> {
    if !matches!(options.kv_type, DType::F16 | DType::F32 | DType::Q8_0)
        || options.kv_type.row_bytes(spec.head_dim).is_none()
    {
        return Err(Error::Unsupported(format!(
            "a KV cache of type {} for heads of {} elements on the GPU; choose F16 or F32",
            options.kv_type, spec.head_dim
        )));
    }
    if options.stage == Stage::First {
        return Err(Error::Unsupported("the first part of a divided model on the GPU, which takes the last".into()));
    }
    if !spec.heads.is_multiple_of(spec.kv_heads.max(1)) {
        return Err(Error::argument("heads must be a multiple of kv_heads"));
    }
    Ok(())
}

/// Bytes of the rows that cooperative matrices or products of eight bits multiply.
pub(super) fn packed_bytes(device: &Device, program: &Program, options: &ExecutorOptions) -> u64 {
    let int8 = device.tunes_int8() && options.trained.is_none();
    let wanted = !options.exact && (device.abilities.cooperative || int8);
    if wanted { 8 * u64::from(program.scratch.packed_end) } else { 0 }
}

/// What kernels a program has to choose.
pub(super) fn families(program: &Program) -> &'static [Family] {
    match program.purpose {
        Purpose::Generate => &[Family::Matvec, Family::Matmul],
        Purpose::Embed | Purpose::Score | Purpose::Learn => &[Family::Matmul],
    }
}

/// Types of the matrices that rows are multiplied with.
pub(super) fn types(tape: &Tape, weights: &Weights) -> Vec<DType> {
    let mut types: Vec<DType> = tape.ops.iter().flat_map(forward::matrices).map(|id| weights.get(id).dtype).collect();
    types.sort();
    types.dedup();
    types
}

/// In how many slices gradients are summed: a few rows of adapters keep no card busy, parts of the rows do. Whole weights are
/// enough by themselves.
pub(super) fn slices(device: &Device, tape: &Tape) -> u32 {
    match device.info().kind {
        _ if tape.trains_weights => 1,
        DeviceKind::Software => 2,
        _ => (device.binding_bytes / (4 * tape.param_count() as u64).max(1)).clamp(1, 8) as u32,
    }
}
