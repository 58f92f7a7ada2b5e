//! Places every value of a tape in one arena, before anything is allocated.
//!
//! A value lives from the op that writes it to the last op that reads it; values whose lives do not overlap share
//! memory (greedy first fit in order of first use). An op that may work in place gets its output where its input lay.
//! The arena's size is therefore exact: `estimate` can refuse, with figures, what will not fit.

use super::op::{Rows, Tape, Value};

/// The most rows that one run may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanLimits {
    /// Tokens per run.
    pub tokens: usize,
    /// Rows per run whose logits are wanted.
    pub outputs: usize,
}

impl PlanLimits {
    /// Rows a value of this kind may have.
    pub fn rows(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.tokens,
            Rows::Outputs => self.outputs,
            Rows::One => 1,
        }
    }
}

/// Where a value lies, in bytes from the arena's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The f32 form.
    pub offset: usize,
    /// The backend's quantized form, for values marked so.
    pub quantized: Option<usize>,
}

/// The finished placement.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The limits it holds for.
    pub limits: PlanLimits,
    /// By value.
    pub places: Vec<Place>,
    /// Bytes of the arena.
    pub arena_bytes: usize,
}

/// Alignment of every place: a cache line, and a whole vector of any instruction set.
const ALIGN: usize = 64;

struct Slot {
    start: usize,
    end: usize,
    /// Last op (index) that needs it.
    until: usize,
}

impl Plan {
    /// Places the values of `tape`. `quantized_bytes(rows, width)` is what the backend needs for the 8-bit form, if it wants
    /// one.
    pub fn new(tape: &Tape, limits: PlanLimits, quantized_bytes: impl Fn(usize, usize) -> Option<usize>) -> Plan {
        Plan::with_reads(tape, limits, quantized_bytes, |_| Vec::new())
    }

    /// As [`Plan::new`] for a backend whose kernel for op number `i` also reads the values `more(i)`: those of an op that it
    /// does on the way.
    pub fn with_reads(
        tape: &Tape,
        limits: PlanLimits,
        quantized_bytes: impl Fn(usize, usize) -> Option<usize>,
        more: impl Fn(usize) -> Vec<Value>,
    ) -> Plan {
        let last_read = last_reads(tape, more);
        let mut places = vec![Place::default(); tape.values.len()];
        let mut live: Vec<Slot> = Vec::new();
        let mut arena_bytes = 0;
        for (index, op) in tape.ops.iter().enumerate() {
            live.retain(|slot| slot.until >= index);
            let mut taken = Vec::new();
            for out in op.writes() {
                let info = tape.info(out);
                let rows = limits.rows(info.rows);
                let until = last_read[out.0 as usize].max(index);
                let reuse = op.in_place().into_iter().find(|(input, written)| {
                    *written == out
                        && last_read[input.0 as usize] == index
                        && tape.info(*input).rows == info.rows
                        && !taken.contains(input)
                });
                places[out.0 as usize].offset = match reuse {
                    Some((input, _)) => {
                        taken.push(input);
                        let offset = places[input.0 as usize].offset;
                        if let Some(slot) = live.iter_mut().find(|s| s.start == offset) {
                            slot.until = until;
                        }
                        offset
                    }
                    None => place(&mut live, rows * info.width * 4, until, &mut arena_bytes),
                };
                if let Some(bytes) = quantized_bytes(rows, info.width).filter(|_| info.quantized) {
                    places[out.0 as usize].quantized = Some(place(&mut live, bytes, until, &mut arena_bytes));
                }
            }
        }
        Plan { limits, places, arena_bytes }
    }

    /// Where a value lies.
    pub fn place(&self, value: Value) -> Place {
        self.places[value.0 as usize]
    }
}

fn last_reads(tape: &Tape, more: impl Fn(usize) -> Vec<Value>) -> Vec<usize> {
    let mut last = vec![0; tape.values.len()];
    for (index, op) in tape.ops.iter().enumerate() {
        for value in op.reads().into_iter().chain(more(index)) {
            last[value.0 as usize] = index;
        }
    }
    // The result outlives the last op.
    last[tape.result.0 as usize] = tape.ops.len();
    last
}

/// First fit among the gaps between live slots, which are kept sorted by start.
fn place(live: &mut Vec<Slot>, bytes: usize, until: usize, arena_bytes: &mut usize) -> usize {
    let bytes = bytes.next_multiple_of(ALIGN);
    let mut start = 0;
    let mut at = live.len();
    for (i, slot) in live.iter().enumerate() {
        if slot.start >= start + bytes {
            at = i;
            break;
        }
        start = start.max(slot.end);
    }
    live.insert(at, Slot { start, end: start + bytes, until });
    *arena_bytes = (*arena_bytes).max(start + bytes);
    start
}
