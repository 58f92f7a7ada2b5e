//! `kinglet bench kernels`: every kernel of the linear map that this CPU can run, and its share of what the CPU could do.

use crate::args::{Global, positive};
use crate::output::{self, Table};
use clap::Args;
use kinglet_engine::cpu::kernels::linear::{Form, Shape};
use kinglet_engine::cpu::measure::{self, Case, Weights};
use kinglet_engine::cpu::{isa::Isa, roof};
use kinglet_engine::quant::DType;
use serde::Serialize;
use serde_json::json;

/// Measure the kernels of linear maps one by one
#[derive(Args, Debug)]
#[command(after_help = "\
matvec multiplies one token with a matrix that no cache holds: its roof is the memory. tile multiplies
many tokens with a matrix of a real layer's size: its roof is the arithmetic of the CPU's best
instruction, of 8-bit integers, or of f32 for dense types. * marks what the engine takes here.

Examples:
  kinglet bench kernels
  kinglet bench kernels --types Q4_K,Q8_0 --width 4864 --threads 1")]
pub struct Arguments {
    /// Types of weights [default: all]
    #[arg(long, value_name = "TYPE,…", value_delimiter = ',')]
    types: Vec<DType>,
    /// Values in a row of the matrices, a multiple of 256
    #[arg(long, value_name = "N", default_value_t = 1536, value_parser = positive)]
    width: usize,
    /// Tokens for the kernels of prompts
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = positive)]
    tokens: usize,
    /// Repetitions of each; the fastest counts
    #[arg(short, long, value_name = "N", default_value_t = 12, value_parser = positive)]
    repetitions: usize,
}

/// One kernel's result.
#[derive(Serialize)]
struct Row {
    kernel: &'static str,
    #[serde(rename = "type")]
    dtype: String,
    isa: &'static str,
    picked: bool,
    rows: usize,
    tokens: usize,
    seconds: f64,
    /// Bytes of weights, or operations, per second.
    rate: f64,
    roof: &'static str,
    share: f64,
}

/// Bytes of a matrix that no cache holds.
const LARGE: usize = 96 << 20;
/// Rows of a matrix for many tokens.
const ROWS: usize = 2048;
/// Operations of a task, at most, for kernels of plain Rust.
const SCALAR_OPERATIONS: usize = 1 << 30;

pub fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<()> {
    let threads = global.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let &Arguments { width: k, tokens, repetitions: runs, .. } = arguments;
    eprintln!("measuring the roofs of this machine");
    let memory = roof::memory(threads, 512 << 20, 4);
    let ((int8, int8_name), (f32, f32_name)) = (roof::int8(threads), roof::f32(threads));
    let unit = roof::matrix_unit(threads);
    let all = measure::kernels(tokens);
    let mut types: Vec<DType> = all.iter().map(|(k, _)| k.dtype).collect();
    types.dedup();
    types.retain(|t| arguments.types.is_empty() || arguments.types.contains(t));
    let mut rows = Vec::new();
    for dtype in types {
        eprintln!("{dtype}");
        let row_bytes = dtype.row_bytes(k).ok_or_else(|| {
            crate::args::Usage(format!("{dtype} has no rows of {k} values; choose a multiple of 256"))
        })?;
        let weights = Weights::random(dtype, (LARGE / row_bytes).max(ROWS) * row_bytes);
        for (kernel, picked) in all.iter().filter(|(kernel, _)| kernel.dtype == dtype) {
            let (height, tokens) = match kernel.shape {
                Shape::Matvec => (LARGE / row_bytes, 1),
                Shape::Tile => (ROWS, tokens),
            };
            let most = if kernel.isa == "scalar" { SCALAR_OPERATIONS / (2 * k * tokens) } else { usize::MAX };
            let height = height.min(most).max(threads);
            let case = Case { rows: height, k, tokens, threads, runs };
            let seconds = measure::time(kernel, &weights, &case)?.as_secs_f64();
            let (work, (roof, top)) = match kernel.shape {
                Shape::Matvec => (height * row_bytes, ("memory", memory)),
                Shape::Tile if kernel.reads == Form::Tiled => {
                    (2 * height * k * tokens, ("bf16", unit.map_or(f64::NAN, |(rate, _)| rate)))
                }
                Shape::Tile if dtype.is_quantized() => (2 * height * k * tokens, ("int8", int8)),
                Shape::Tile => (2 * height * k * tokens, ("f32", f32)),
            };
            let rate = work as f64 / seconds;
            rows.push(Row {
                kernel: kernel.name,
                dtype: dtype.to_string(),
                isa: kernel.isa,
                picked: *picked,
                rows: height,
                tokens,
                seconds,
                rate,
                roof,
                share: rate / top,
            });
        }
    }
    if global.json {
        return output::json(&json!({
            "threads": threads,
            "isa": Isa::detect().name(),
            "width": k,
            "roofs": { "memory_bytes_per_second": memory, "int8_operations_per_second": int8, "f32_operations_per_second": f32, "bf16_operations_per_second": unit.map(|u| u.0) },
            "kernels": rows,
        }));
    }
    let mut table = Table::new(&["kernel", "", ">rows", ">tokens", ">rate", "roof", ">share"]);
    for row in &rows {
        table.row(vec![
            row.kernel.into(),
            if row.picked { "*".into() } else { String::new() },
            row.rows.to_string(),
            row.tokens.to_string(),
            format!("{:.1} {}", row.rate / 1e9, if row.roof == "memory" { "GB/s" } else { "Gop/s" }),
            row.roof.into(),
            format!("{:.0} %", 100.0 * row.share),
        ]);
    }
    Ok(output::text(&format!(
        "{}\nRows of {k} values, {threads} threads. Roofs: memory {:.1} GB/s; int8 {:.0} Gop/s ({int8_name}); f32 {:.0} \
         Gop/s ({f32_name}){}.\n",
        table.markdown(),
        memory / 1e9,
        int8 / 1e9,
        f32 / 1e9,
        unit.map_or(String::new(), |(rate, name)| format!("; bf16 {:.0} Gop/s ({name})", rate / 1e9)),
    ))?)
}
