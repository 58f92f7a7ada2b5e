// What every kernel sees. `Op` is the kernel's own description of one dispatch; see `program.rs`.
//
// `run` holds what changes from run to run:
//   0 rows of the run (T)   1 rows whose result is wanted (S)   2 the number 1
//   3 first output record   4 first word of the rotation table  5 its words per row   6, 7 seed of the dropout
// from word 8 on a record per row: token, position, first page of its sequence (a word of `run`) or its sequence's first
// row in learning, the row behind its sequence's last. A record per output: row, target, weight, and first word and number of
// the pairs (token, share) where the target is a distribution. Then the rotation table (cosines, sines), and the lists of
// pages or those pairs.
@group(0) @binding(0) var<uniform> op: Op;
@group(0) @binding(1) var<storage, read> run: array<u32>;
@group(0) @binding(2) var<storage, read> constants: array<ELEMENT>;
@group(0) @binding(3) var<storage, read> weights: array<u32>;
@group(0) @binding(4) var<storage, read_write> arena: array<ELEMENT>;
@group(0) @binding(5) var<storage, read_write> cache: array<WORDS>;
@group(0) @binding(6) var<storage, read> params: array<PARAM>;
@group(0) @binding(7) var<storage, read_write> gradients: array<f32>;


// An absent offset.
const NONE = 0xffffffffu;
const LOWEST = -1e30;

struct Row { token: u32, position: u32, start: u32, end: u32 }

fn row_record(row: u32) -> Row {
    let at = 8u + row * 4u;
    return Row(run[at], run[at + 1u], run[at + 2u], run[at + 3u]);
}

struct Output { row: u32, target_token: u32, weight: f32, soft: u32, soft_count: u32 }

fn output_record(s: u32) -> Output {
    let at = run[3] + s * 5u;
    return Output(run[at], run[at + 1u], bitcast<f32>(run[at + 2u]), run[at + 3u], run[at + 4u]);
}
