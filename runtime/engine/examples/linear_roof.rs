//! Measures the linear kernels against the machine's roofs, on the matrix sizes of real models.
//!
//! ```text
//! cargo run --release -p kinglet-engine --example linear_roof -- [decode|prefill] [TYPE…] [threads=N] [isa=NAME] [size=RxK] [tokens=N] [kernel=NAME] [runs=N]
//! ```
//!
//! *decode*: one token; GB/s of weights read, beside a plain streaming read of as many bytes, and its share. *prefill*:
//! 512 tokens; multiply-adds per second and, from a timed chain of additions, per clock cycle. Weights are random
//! bytes with sane scales; every figure is the best of several runs.

use kinglet_engine::cpu::isa::Isa;
use kinglet_engine::cpu::kernels::linear::*;
use kinglet_engine::quant::DType;
use std::time::{Duration, Instant};

struct Options {
    mode: String,
    types: Vec<DType>,
    threads: Vec<usize>,
    isa: Isa,
    sizes: Vec<(usize, usize)>,
    tokens: Option<usize>,
    kernel: Option<String>,
    runs: usize,
}

fn main() -> kinglet_engine::Result<()> {
    let mut o = Options {
        mode: "both".into(),
        types: vec![],
        threads: vec![1, 2],
        isa: Isa::detect(),
        sizes: vec![],
        tokens: None,
        kernel: None,
        runs: 30,
    };
    for arg in std::env::args().skip(1) {
        if let Some(n) = arg.strip_prefix("threads=") {
            o.threads = vec![n.parse().unwrap_or(1)];
        } else if let Some(name) = arg.strip_prefix("isa=") {
            o.isa = Isa::available().into_iter().find(|i| i.name() == name).unwrap_or(o.isa);
        } else if let Some(n) = arg.strip_prefix("tokens=") {
            o.tokens = n.parse().ok();
        } else if let Some(n) = arg.strip_prefix("kernel=") {
            o.kernel = Some(n.into());
        } else if let Some(n) = arg.strip_prefix("runs=") {
            o.runs = n.parse().unwrap_or(o.runs);
        } else if let Some((r, k)) = arg.strip_prefix("size=").and_then(|s| s.split_once('x')) {
            o.sizes.push((r.parse().unwrap_or(4096), k.parse().unwrap_or(4096)));
        } else if arg == "decode" || arg == "prefill" {
            o.mode = arg;
        } else {
            o.types.push(arg.parse()?);
        }
    }
    if o.types.is_empty() {
        o.types = vec![DType::Q4_1, DType::Q8_0, DType::Q5_0, DType::Q4_K, DType::Q6_K, DType::F16];
    }
    let ghz = clock();
    println!("isa {}, clock about {ghz:.2} GHz", o.isa.name());
    if o.mode != "prefill" {
        decode(&o, ghz)?;
    }
    if o.mode != "decode" {
        prefill(&o, ghz)?;
    }
    Ok(())
}

/// Cycles per nanosecond, from a chain of dependent additions, the best of many short runs.
fn clock() -> f64 {
    let mut best = Duration::MAX;
    for _ in 0..200 {
        let start = Instant::now();
        let mut x = 1u64;
        for _ in 0..10_000 {
            for _ in 0..20 {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: adds to a register.
                unsafe {
                    std::arch::asm!("add {0}, 1", inout(reg) x, options(nomem, nostack))
                };
                #[cfg(not(target_arch = "x86_64"))]
                {
                    x = std::hint::black_box(x + 1);
                }
            }
        }
        std::hint::black_box(x);
        best = best.min(start.elapsed());
    }
    200_000.0 / best.as_secs_f64() / 1e9
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Random weights whose f16 scales are near 0.01 and never NaN.
fn weights(dtype: DType, bytes: usize) -> Vec<u8> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut data: Vec<u8> = (0..bytes.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).collect();
    data.truncate(bytes);
    let at: &[usize] = match dtype {
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::IQ4_NL | DType::IQ4_XS => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
        DType::F16 => &[0],
        _ => &[],
    };
    for block in data.chunks_exact_mut(dtype.block_bytes()) {
        for at in at {
            block[at + 1] = 0x20 | (block[at + 1] & 0x83);
        }
        match dtype {
            DType::Q8_K | DType::F32 => block[3] = 0x3c,
            DType::BF16 => block[1] = 0x3c,
            DType::MXFP4 => block[0] = 120,
            _ => {}
        }
    }
    data
}

struct Input {
    f32s: Vec<f32>,
    q8: Vec<u64>,
    tokens: usize,
    k: usize,
}

impl Input {
    fn new(isa: Isa, tokens: usize, k: usize) -> kinglet_engine::Result<Input> {
        let mut random = Random(7);
        let f32s: Vec<f32> = (0..tokens * k).map(|_| (random.next() % 2001) as f32 / 1000.0 - 1.0).collect();
        let mut q8 = vec![0u64; activation_bytes(tokens, k).div_ceil(8)];
        // SAFETY: the buffer is large enough, aligned, and used by this thread only.
        let dst = unsafe { Q8Mut::new(q8.as_mut_ptr().cast(), tokens, k) };
        quantize_rows(isa, &f32s, k, 0..tokens, &dst)?;
        Ok(Input { f32s, q8, tokens, k })
    }

    fn activations(&self) -> kinglet_engine::Result<Activations<'_>> {
        let q8 = Q8::new(bytemuck::cast_slice(&self.q8), self.tokens, self.k)?;
        Ok(Activations { f32s: &self.f32s, q8: Some(q8), wide: None, tokens: self.tokens, k: self.k, stride: self.k })
    }
}

/// Best time of a map with its rows split evenly over the threads.
fn time(
    o: &Options,
    dtype: DType,
    weight: &[u8],
    rows: usize,
    input: &Input,
    threads: usize,
    runs: usize,
) -> kinglet_engine::Result<Duration> {
    let x = input.activations()?;
    let mut y = vec![0f32; input.tokens * rows];
    // SAFETY: `y` outlives the tasks, which have disjoint rows.
    let out = unsafe { OutMut::new(y.as_mut_ptr(), rows, y.len()) };
    let kernel = KERNELS.iter().copied().flatten().find(|k| Some(k.name) == o.kernel.as_deref());
    let kernel = kernel.filter(|k| k.dtype == dtype).unwrap_or_else(|| pick(o.isa, dtype, input.tokens));
    let mut best = Duration::MAX;
    let barrier = std::sync::Barrier::new(threads);
    std::thread::scope(|scope| {
        let work = |i: usize| {
            let (x, barrier) = (&x, &barrier);
            move || {
                let mut scratch = Scratch::new();
                let range = rows * i / threads..rows * (i + 1) / threads;
                let task = LinearTask { dtype, weight, k: input.k, rows: range, x, out, accumulate: false };
                let mut best = Duration::MAX;
                for _ in 0..runs {
                    barrier.wait();
                    let start = Instant::now();
                    if let Err(e) = kernel.run(o.isa, &task, &mut scratch) {
                        eprintln!("{e}");
                    }
                    barrier.wait();
                    best = best.min(start.elapsed());
                }
                best
            }
        };
        let others: Vec<_> = (1..threads).map(|i| scope.spawn(work(i))).collect();
        best = work(0)();
        others.into_iter().for_each(|t| drop(t.join()));
    });
    std::hint::black_box(&y);
    Ok(best)
}

/// Best time to read `data` with the threads, by plain vector loads.
fn read(data: &[u8], threads: usize, runs: usize) -> Duration {
    let mut best = Duration::MAX;
    let barrier = std::sync::Barrier::new(threads);
    std::thread::scope(|scope| {
        let work = |i: usize| {
            let (part, barrier) = (&data[data.len() * i / threads..data.len() * (i + 1) / threads], &barrier);
            move || {
                let mut best = Duration::MAX;
                for _ in 0..runs {
                    barrier.wait();
                    let start = Instant::now();
                    std::hint::black_box(stream(part));
                    barrier.wait();
                    best = best.min(start.elapsed());
                }
                best
            }
        };
        let others: Vec<_> = (1..threads).map(|i| scope.spawn(work(i))).collect();
        best = work(0)();
        others.into_iter().for_each(|t| drop(t.join()));
    });
    best
}

fn stream(data: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn wide(data: &[u8]) -> u64 {
            use std::arch::x86_64::*;
            let mut acc = [_mm256_setzero_si256(); 8];
            for chunk in data.chunks_exact(256) {
                for (i, a) in acc.iter_mut().enumerate() {
                    // SAFETY: within the chunk.
                    *a = _mm256_xor_si256(*a, unsafe { _mm256_loadu_si256(chunk.as_ptr().add(32 * i).cast()) });
                }
            }
            let all = acc.into_iter().fold(_mm256_setzero_si256(), |a, b| _mm256_xor_si256(a, b));
            _mm256_extract_epi64::<0>(all) as u64
        }
        if std::is_x86_feature_detected!("avx2") {
            // SAFETY: just detected.
            return unsafe { wide(data) };
        }
    }
    data.chunks_exact(8).map(|c| u64::from(c[0]) ^ u64::from(c[7])).fold(0, |a, b| a ^ b)
}

fn decode(o: &Options, ghz: f64) -> kinglet_engine::Result<()> {
    println!("\ndecode, {} token(s): GB/s, plain read GB/s, share; bytes per cycle and thread", o.tokens.unwrap_or(1));
    for &dtype in &o.types {
        // Matrices of 64 MB: past the caches of small machines; give `size=` for others.
        let sizes = if o.sizes.is_empty() {
            vec![576, 1536, 4864].into_iter().map(|k| (0, k)).collect()
        } else {
            o.sizes.clone()
        };
        for (rows, k) in sizes {
            let Some(row_bytes) = dtype.row_bytes(k) else { continue };
            let rows = if rows == 0 { (64 << 20) / row_bytes } else { rows };
            let data = weights(dtype, rows * row_bytes);
            let input = Input::new(o.isa, o.tokens.unwrap_or(1), k)?;
            print!("{:8} {rows:7} x {k:5}", dtype.name());
            for &threads in &o.threads {
                let (mut ours, mut plain) = (Duration::MAX, Duration::MAX);
                for _ in 0..4 {
                    plain = plain.min(read(&data, threads, o.runs));
                    ours = ours.min(time(o, dtype, &data, rows, &input, threads, o.runs)?);
                }
                let rate = |t: Duration| data.len() as f64 / t.as_secs_f64() / 1e9;
                print!(
                    "   {threads} thr {:6.1} {:6.1} {:4.0} % {:5.2} B/cycle",
                    rate(ours),
                    rate(plain),
                    100.0 * rate(ours) / rate(plain),
                    rate(ours) / ghz / threads as f64
                );
            }
            println!();
        }
    }
    Ok(())
}

fn prefill(o: &Options, ghz: f64) -> kinglet_engine::Result<()> {
    let tokens = o.tokens.unwrap_or(512);
    println!("\nprefill, {tokens} tokens: GMAC/s, MAC per cycle and thread");
    for &dtype in &o.types {
        let sizes = if o.sizes.is_empty() {
            vec![(1536, 576), (4864, 896), (2048, 1536), (896, 4864)]
        } else {
            o.sizes.clone()
        };
        for (rows, k) in sizes {
            let Some(row_bytes) = dtype.row_bytes(k) else { continue };
            let data = weights(dtype, rows * row_bytes);
            let input = Input::new(o.isa, tokens, k)?;
            print!("{:8} {rows:7} x {k:5}", dtype.name());
            for &threads in &o.threads {
                let t = time(o, dtype, &data, rows, &input, threads, o.runs)?;
                let macs = (rows * k * tokens) as f64 / t.as_secs_f64() / 1e9;
                print!("   {threads} thr {macs:7.1} {:5.1}", macs / ghz / threads as f64);
            }
            println!();
        }
    }
    Ok(())
}
