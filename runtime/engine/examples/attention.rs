//! Speed of one thread's attention: prefill in GFLOP/s, decode in GB/s of cache read, for the shapes of real models.
//!
//! `cargo run --release -p kinglet-engine --example attention [prompt tokens]`

use kinglet_engine::cpu::isa::Isa;
use kinglet_engine::cpu::kernels::attention::*;
use kinglet_engine::quant::DType;
use std::time::Instant;

/// Query rows per task, as a thread team would cut them.
const TASK_ROWS: usize = 64;

fn main() {
    let tokens = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(512);
    println!(
        "{:<22} {:<6} {:<5} {:>16} {:>16} {:>16} {:>16} {:>14}",
        "shape", "isa", "type", "prefill GFLOP/s", "in integers", "split", "decode GB/s", "decode µs"
    );
    for (name, heads, kv_heads, dim) in [
        ("smollm2 9/3×64", 9, 3, 64),
        ("qwen2.5 14/2×64", 14, 2, 64),
        ("gemma3 4/1×256", 4, 1, 256),
        ("llama 8/2×128", 8, 2, 128),
    ] {
        for dtype in [DType::F32, DType::F16, DType::Q8_0] {
            for isa in Isa::available() {
                let ([f32s, integers, split], gbs, us) = measure(isa, heads, kv_heads, dim, dtype, tokens);
                println!(
                    "{name:<22} {:<6} {:<5} {f32s:>16.1} {integers:>16.1} {split:>16.1} {gbs:>16.1} {us:>14.1}",
                    isa.name(),
                    dtype.name()
                );
            }
        }
    }
}

fn measure(isa: Isa, heads: usize, kv_heads: usize, dim: usize, dtype: DType, tokens: usize) -> ([f64; 3], f64, f64) {
    let row = kv_row_bytes(dtype, dim).expect("a cache type");
    let page_len = 128;
    let page = 2 * kv_heads * page_len * row;
    let mut bytes = vec![0u8; tokens.div_ceil(page_len) * page];
    let noise = |i: usize| ((i * 7919 % 2003) as f32 - 1001.0) * 1e-3;
    for (i, vector) in bytes.chunks_exact_mut(row).enumerate() {
        let x: Vec<f32> = (0..dim).map(|d| noise(i * dim + d)).collect();
        // SAFETY: the vector is `row` bytes long.
        unsafe { store_kv(isa, dtype, &x, vector.as_mut_ptr()) };
    }
    let pages: Vec<*const u8> = bytes.chunks_exact(page).map(<[u8]>::as_ptr).collect();
    let q: Vec<f32> = (0..tokens * heads * dim).map(noise).collect();
    let mut out = vec![0.0f32; q.len()];
    let mut scratch = vec![0.0; attention_scratch_len(dim)];
    let task = AttentionTask {
        path: Path::Block,
        q: q.as_ptr(),
        q_stride: heads * dim,
        heads: (0, heads),
        group: heads / kv_heads,
        head_dim: dim,
        rows: (0, tokens),
        first_position: 0,
        window: None,
        starts: None,
        scale: 1.0 / (dim as f32).sqrt(),
        softcap: None,
        alibi: None,
        kv: KvPages {
            pages: &pages,
            page_len,
            k_offset: 0,
            v_offset: page / 2,
            head_stride: page_len * row,
            pos_stride: row,
            dtype,
        },
        out: out.as_mut_ptr(),
        out_stride: heads * dim,
        lse: None,
        lse_stride: 0,
    };
    let decode = AttentionTask { path: Path::Stream, rows: (0, 1), first_position: tokens - 1, ..task };
    // Another process can take the core away: the best of several runs of each short piece is what the code can do.
    let mut time = |task: &AttentionTask<'_>, repeats: usize| {
        (0..repeats)
            .map(|_| {
                let start = Instant::now();
                // SAFETY: all positions are stored; one thread.
                unsafe { attention(isa, task, &mut scratch) };
                start.elapsed().as_secs_f64()
            })
            .fold(f64::INFINITY, f64::min)
    };
    let repeats = if isa == Isa::Scalar { 2 } else { 20 };
    let prefill = [Path::Block, Path::Integer, Path::Split].map(|path| -> f64 {
        (0..tokens)
            .step_by(TASK_ROWS)
            .map(|r| time(&AttentionTask { path, rows: (r, tokens.min(r + TASK_ROWS)), ..task }, repeats))
            .sum()
    });
    let step = time(&decode, 200);
    let visible = tokens * (tokens + 1) / 2;
    let flops = 4.0 * (visible * heads * dim) as f64;
    let read = (2 * tokens * kv_heads * row) as f64;
    (prefill.map(|seconds| flops / seconds / 1e9), read / step / 1e9, step * 1e6)
}
