//! Measures the backward kernels on one thread against the rate of f32 multiply-adds, on the sizes of real models.
//!
//! ```text
//! cargo run --release -p kinglet-engine --example training_roof
//! ```
//!
//! GFLOP/s count a multiplication and an addition as two; the best of several runs, each beside a run of the roof (a loop
//! of twelve independent multiply-adds in registers), whose share is the figure to trust on a busy machine.

use kinglet_engine::Result;
use kinglet_engine::cpu::isa::Isa;
use kinglet_engine::cpu::kernels::attention::*;
use kinglet_engine::cpu::kernels::gemm::*;
use kinglet_engine::cpu::kernels::linear::*;
use kinglet_engine::quant::DType;
use std::hint::black_box;
use std::time::Instant;

const RUNS: usize = 9;

fn main() -> Result<()> {
    let isa = Isa::detect();
    println!("{:44} {:>9} {:>7}", format!("isa {}", isa.name()), "GFLOP/s", "roof %");
    for (rows, k, dtype) in [
        (1536, 576, DType::Q4_1),
        (576, 1536, DType::Q4_1),
        (576, 1536, DType::Q8_0),
        (4864, 896, DType::Q5_0),
        (896, 4864, DType::Q6_K),
        (896, 4864, DType::Q8_0),
        (896, 4864, DType::Q4_K),
        (896, 4864, DType::F16),
    ] {
        linear_map(isa, dtype, rows, k, 512)?;
    }
    for rank in [8, 16] {
        adapter(isa, rank, 512, 576, 1536)?;
    }
    for exact in [true, false] {
        attention_pass(isa, exact, 9, 3, 64, 256);
        attention_pass(isa, exact, 4, 1, 256, 256);
    }
    Ok(())
}

/// Floating-point operations per second of `work`, which does `flops`, and of the roof, each at its best.
fn report(name: &str, flops: usize, mut work: impl FnMut()) {
    let (mut best, mut roof) = (0f64, 0f64);
    for _ in 0..RUNS {
        let start = Instant::now();
        work();
        best = best.max(flops as f64 / start.elapsed().as_secs_f64());
        roof = roof.max(multiply_adds());
    }
    println!("{name:44} {:9.1} {:7.1}", best / 1e9, 100.0 * best / roof);
}

#[cfg(target_arch = "x86_64")]
fn multiply_adds() -> f64 {
    use std::arch::x86_64::*;
    #[target_feature(enable = "avx2,fma")]
    fn chains(rounds: usize) -> f32 {
        let (x, y) = (black_box(_mm256_set1_ps(0.5)), black_box(_mm256_set1_ps(0.25)));
        let mut sums = [_mm256_setzero_ps(); 12];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(x, *sum, y);
            }
        }
        _mm256_cvtss_f32(sums.into_iter().fold(y, |a, b| _mm256_add_ps(a, b)))
    }
    const ROUNDS: usize = 200_000;
    let start = Instant::now();
    if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
        // SAFETY: the instructions are there.
        black_box(unsafe { chains(ROUNDS) });
    }
    (ROUNDS * 12 * 16) as f64 / start.elapsed().as_secs_f64()
}

#[cfg(not(target_arch = "x86_64"))]
fn multiply_adds() -> f64 {
    f64::NAN
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 7919 % 1009) as f32 / 504.5 - 1.0).collect()
}

fn linear_map(isa: Isa, dtype: DType, rows: usize, k: usize, tokens: usize) -> Result<()> {
    let Some(bytes) = dtype.row_bytes(k) else { return Ok(()) };
    // Small codes and scales: what they say does not matter, only that they are finite and not tiny.
    let weight: Vec<u8> = (0..rows * bytes).map(|i| 0x20 + (i % 11) as u8).collect();
    let (dy, x) = (values(tokens * rows), values(tokens * k));
    let (mut dx, mut y) = (vec![0.0; tokens * k], vec![0.0; tokens * rows]);
    let mut scratch = Scratch::new();
    // SAFETY: both outlive the calls.
    let (dx, y) = unsafe { (OutMut::new(dx.as_mut_ptr(), k, dx.len()), OutMut::new(y.as_mut_ptr(), rows, y.len())) };
    let (accumulate, weight) = (false, &weight[..]);
    let task =
        LinearBackwardTask { dtype, weight, k, rows, dy: &dy, dy_stride: rows, tokens: 0..tokens, dx, accumulate };
    let flops = 2 * rows * k * tokens;
    let mut failed = Ok(());
    report(&format!("backward {dtype} {rows} × {k}, {tokens} tokens"), flops, || {
        failed = linear_backward(isa, &task, &mut scratch);
    });
    failed?;
    let mut buffers =
        [vec![0u64; rounded_bytes::<i16>(tokens, k) / 8], vec![0u64; rounded_bytes::<i16>(tokens, rows) / 8]];
    let mut widen = |i: usize, values: &[f32], k: usize| {
        // SAFETY: as large as it has to be, and used by nobody else.
        let to = unsafe { RoundedMut::new(buffers[i].as_mut_ptr().cast(), tokens, k) };
        round_rows::<i16>(isa, values, k, 0..tokens, &to)
    };
    widen(0, &x, k)?;
    widen(1, &dy, rows)?;
    let dy = Rounded::<i16>::new(bytemuck::cast_slice(&buffers[1]), tokens, rows)?;
    let task = RoundedBackwardTask { dtype, weight, k, columns: 0..k, dy: &dy, dx, accumulate };
    let mut failed = Ok(());
    report(&format!("backward wide {dtype} {rows} × {k}, {tokens} tokens"), flops, || {
        failed = linear_backward_rounded(isa, &task, &mut scratch);
    });
    failed?;
    let mut bytes = vec![0u64; rounded_bytes::<u8>(tokens, rows) / 8];
    // SAFETY: as above.
    round_rows::<u8>(isa, &values(tokens * rows), rows, 0..tokens, &unsafe {
        RoundedMut::new(bytes.as_mut_ptr().cast(), tokens, rows)
    })?;
    let dy = Rounded::<u8>::new(bytemuck::cast_slice(&bytes), tokens, rows)?;
    let task = RoundedBackwardTask { dtype, weight, k, columns: 0..k, dy: &dy, dx, accumulate };
    let mut failed = Ok(());
    report(&format!("backward narrow {dtype} {rows} × {k}, {tokens} tokens"), flops, || {
        failed = linear_backward_rounded(isa, &task, &mut scratch);
    });
    failed?;
    let wide = Some(Rounded::new(bytemuck::cast_slice(&buffers[0]), tokens, k)?);
    let x = Activations { f32s: &x, q8: None, tiled: None, wide, low: None, tokens, k, stride: k };
    let task = LinearTask { dtype, weight, k, rows: 0..rows, x: &x, out: y, accumulate };
    let mut failed = Ok(());
    report(&format!("exact    {dtype} {rows} × {k}, {tokens} tokens"), flops, || {
        failed = linear_exact(isa, &task, &mut scratch);
    });
    failed?;
    let mut failed = Ok(());
    report(&format!("wide     {dtype} {rows} × {k}, {tokens} tokens"), flops, || {
        failed = linear_wide(isa, &task, &mut scratch);
    });
    failed
}

/// The six products of an adapter of rank `r` on a map from `k` to `n`.
fn adapter(isa: Isa, r: usize, tokens: usize, k: usize, n: usize) -> Result<()> {
    type Form = fn(Isa, &Gemm<'_>) -> Result<()>;
    let products: [(&str, Form, [usize; 3]); 6] = [
        ("x·Aᵀ", gemm_nt, [tokens, r, k]),
        ("h·Bᵀ", gemm_nt, [tokens, n, r]),
        ("dy·B", gemm_nn, [tokens, r, n]),
        ("e·A", gemm_nn, [tokens, k, r]),
        ("dyᵀ·h", gemm_tn, [n, r, tokens]),
        ("eᵀ·x", gemm_tn, [r, k, tokens]),
    ];
    for (i, (name, run, [m, n, k])) in products.into_iter().enumerate() {
        let (a, b) = (values(m * k), values(n * k));
        let mut c = vec![0.0; m * n];
        let (a_stride, b_stride) = (if i > 3 { m } else { k }, if i < 2 { k } else { n });
        // SAFETY: `c` outlives the calls.
        let out = unsafe { OutMut::new(c.as_mut_ptr(), n, c.len()) };
        let g = Gemm { m, n, k, alpha: 0.5, a: &a, a_stride, b: &b, b_stride, c: out, accumulate: true };
        let mut failed = Ok(());
        report(&format!("gemm {name}  {m} × {n} × {k}"), 2 * m * n * k, || failed = run(isa, &g));
        failed?;
    }
    Ok(())
}

/// One head of keys and values of one sequence; operations that the causal mask saves are not counted.
fn attention_pass(isa: Isa, exact: bool, heads: usize, kv_heads: usize, dim: usize, rows: usize) {
    let (group, width) = (heads / kv_heads, heads * dim);
    let (q, k, v, d_out) =
        (values(rows * width), values(rows * dim * kv_heads), values(rows * dim * kv_heads), values(rows * width));
    let (mut dq, mut dk, mut dv) = (q.clone(), k.clone(), v.clone());
    let lse = vec![5.0; rows * heads];
    let mut scratch = vec![0.0; attention_backward_scratch_len(isa, dim)];
    let task = AttentionBackwardTask {
        rows: (0, rows),
        kv_head: 0,
        heads: (0, group),
        d_head: 0,
        head_dim: dim,
        q: q.as_ptr(),
        q_stride: width,
        k: k.as_ptr(),
        k_stride: kv_heads * dim,
        v: v.as_ptr(),
        v_stride: kv_heads * dim,
        out: d_out.as_ptr(),
        d_out: d_out.as_ptr(),
        out_stride: width,
        lse: lse.as_ptr(),
        lse_stride: heads,
        window: None,
        starts: None,
        scale: 1.0 / (dim as f32).sqrt(),
        softcap: None,
        alibi: None,
        exact,
        dq: dq.as_mut_ptr(),
        dq_stride: width,
        dk: dk.as_mut_ptr(),
        dk_stride: kv_heads * dim,
        dv: dv.as_mut_ptr(),
        dv_stride: kv_heads * dim,
    };
    let flops = 10 * group * dim * rows * (rows + 1) / 2;
    let kind = if exact { "exact" } else { "near" };
    report(&format!("attention backward, {kind}, group {group} × {dim}, {rows} rows"), flops, || {
        // SAFETY: all buffers outlive the call and hold the rows and heads named.
        unsafe { attention_backward(isa, &task, &mut scratch) }
    });
}
