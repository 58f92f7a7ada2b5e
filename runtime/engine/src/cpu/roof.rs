//! What this machine can do at best, measured: the roofs that speeds are compared with.
//!
//! Decoding reads every weight once per token, so memory bandwidth bounds it (unless the weights fit the last-level
//! cache, where a share over 100 % is real). Prefill multiplies 8-bit integers, so the rate of the widest such
//! instruction, fed from the first-level cache, bounds it; training multiplies 16-bit integers or f32, so theirs do. All
//! are the best of several short passes. Callers: benchmarks.

use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

use super::buffer::Buffer;
use super::isa::Isa;
use crate::Result;

/// Streaming read speed in bytes per second: `threads` threads sum `bytes` of memory, in large pages where the system gives
/// them, which should be many times the caches; the best of `passes`. 0 where there is not as much memory.
pub fn memory(threads: usize, bytes: usize, passes: usize) -> f64 {
    let threads = threads.max(1);
    let each = bytes / 8 / threads * 8;
    // Written, not only reserved: untouched pages would all be one page of zeros.
    let filled = |t: usize| -> Result<Buffer> {
        let mut buffer = Buffer::new(each, "a measurement of memory")?;
        let words = bytemuck::cast_slice_mut::<u8, u64>(buffer.bytes_mut());
        words.iter_mut().enumerate().for_each(|(i, word)| *word = (i ^ t) as u64);
        Ok(buffer)
    };
    let Ok(buffers) = (0..threads).map(filled).collect::<Result<Vec<_>>>() else { return 0.0 };
    let bytes = (each * threads) as f64;
    let pass = |buffer: &Buffer| black_box(sum(bytemuck::cast_slice(buffer.bytes())));
    (0..passes).map(|_| bytes / together(&buffers, pass).as_secs_f64()).fold(0.0, f64::max)
}

/// Operations per second (a multiplication and an addition are two) of 8-bit integer dot products, with `threads` threads
/// and the best instructions of this CPU, and the name of what was measured.
pub fn int8(threads: usize) -> (f64, &'static str) {
    let (dot, name, ops) = kernel();
    rate(threads, dot, ops, name)
}

/// Operations per second (a multiplication and an addition are two) of f32 arithmetic, likewise.
pub fn f32(threads: usize) -> (f64, &'static str) {
    #[cfg(target_arch = "x86_64")]
    match Isa::detect() {
        Isa::Avx512(_) => return rate(threads, x86::fma512, x86::CHAINS * 16 * 2, "vfmadd, 512 bits"),
        Isa::Avx2(_) => return rate(threads, x86::fma256, x86::CHAINS * 8 * 2, "vfmadd, 256 bits"),
        _ => {}
    }
    rate(threads, plain_f32, 64 * 2, "portable code")
}

/// Operations per second of 16-bit integer dot products, likewise.
pub fn int16(threads: usize) -> (f64, &'static str) {
    #[cfg(target_arch = "x86_64")]
    match Isa::detect() {
        Isa::Avx512(_) => return rate(threads, x86::vnni16, x86::CHAINS * 32 * 2, "vpdpwssd, 512 bits"),
        Isa::Avx2(_) => return rate(threads, x86::maddwd, x86::CHAINS * 16 * 2, "vpmaddwd, 256 bits"),
        _ => {}
    }
    rate(threads, plain, 64 * 2, "portable code")
}

/// Operations per second of bf16 products in a matrix unit, which prompts and training run on where there is one; else none.
pub fn matrix_unit(threads: usize) -> Option<(f64, &'static str)> {
    #[cfg(target_arch = "x86_64")]
    if let Isa::Avx512(token) = Isa::detect()
        && token.amx
    {
        use super::kernels::amx::{SPIN_OPS, spin};
        return Some(rate_of(threads, |rounds| spin(token, rounds), SPIN_OPS, 200_000, "tdpbf16ps, 16 × 16 × 32"));
    }
    let _ = threads;
    None
}

/// Operations per second of bf16 dot products, likewise; none where the CPU has no such instruction. Where there is a matrix unit,
/// that of the unit.
pub fn bf16(threads: usize) -> Option<(f64, &'static str)> {
    if let Some(unit) = matrix_unit(threads) {
        return Some(unit);
    }
    #[cfg(target_arch = "x86_64")]
    if let Isa::Avx512(token) = Isa::detect()
        && token.bf16
    {
        return Some(rate(threads, x86::dpbf16, x86::CHAINS * 32 * 2, "vdpbf16ps, 512 bits"));
    }
    let _ = threads;
    None
}

/// The best rate of a few passes of `kernel`, which does `ops` operations per round.
fn rate<R>(threads: usize, kernel: fn(usize) -> R, ops: usize, name: &'static str) -> (f64, &'static str) {
    rate_of(threads, kernel, ops, 2_000_000, name)
}

/// The same of so many rounds: milliseconds, beside which the start of the threads is nothing.
fn rate_of<R>(
    threads: usize,
    kernel: impl Fn(usize) -> R + Sync,
    ops: usize,
    rounds: usize,
    name: &'static str,
) -> (f64, &'static str) {
    const PASSES: usize = 5;
    let jobs = vec![(); threads.max(1)];
    let ops = (jobs.len() * rounds * ops) as f64;
    let best = (0..PASSES).map(|_| ops / together(&jobs, |()| black_box(kernel(rounds))).as_secs_f64());
    (best.fold(0.0, f64::max), name)
}

/// Wall time of `work` over all `items`, one thread each.
fn together<T: Sync, R>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Duration {
    let start = Instant::now();
    let work = &work;
    thread::scope(|scope| {
        for item in items {
            scope.spawn(move || {
                work(item);
            });
        }
    });
    start.elapsed()
}

/// Sums in 32 independent lanes, so that the additions never wait for each other and the loads are the bound; asks ahead where
/// kernels do.
fn sum(values: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    #[cfg(target_arch = "x86_64")]
    let asks = super::kernels::asks_ahead();
    for chunk in values.chunks_exact(32) {
        #[cfg(target_arch = "x86_64")]
        if asks {
            super::kernels::ask_ahead(chunk.as_ptr().cast(), size_of_val(chunk));
        }
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*value);
        }
    }
    lanes.iter().fold(0, |a, b| a.wrapping_add(*b))
}

/// The dot product of this CPU, its name, and its operations per round.
fn kernel() -> (fn(usize) -> i32, &'static str, usize) {
    #[cfg(target_arch = "x86_64")]
    match Isa::detect() {
        Isa::Avx512(_) => return (x86::vnni, "vpdpbusd, 512 bits", x86::CHAINS * 64 * 2),
        Isa::Avx2(_) => return (x86::maddubs, "vpmaddubsw + vpmaddwd, 256 bits", x86::CHAINS * 32 * 2),
        _ => {}
    }
    let _ = Isa::detect;
    (plain, "portable code", 64 * 2)
}

fn plain(rounds: usize) -> i32 {
    let (mut a, b) = (black_box([1i8; 64]), black_box([3i8; 64]));
    let mut lanes = [0i32; 64];
    for _ in 0..rounds {
        for ((lane, a), b) in lanes.iter_mut().zip(&mut a).zip(&b) {
            *lane = lane.wrapping_add(i32::from(*a) * i32::from(*b));
            *a = a.wrapping_add(1);
        }
    }
    lanes.iter().fold(0, |x, y| x.wrapping_add(*y))
}

fn plain_f32(rounds: usize) -> f32 {
    let (mut a, b) = (black_box([1.0f32; 64]), black_box([0.5f32; 64]));
    let mut lanes = [0.0f32; 64];
    for _ in 0..rounds {
        for ((lane, a), b) in lanes.iter_mut().zip(&mut a).zip(&b) {
            *lane += *a * *b;
            *a = -*a;
        }
    }
    lanes.iter().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::black_box;
    use std::arch::x86_64::*;

    /// Independent chains of additions: more than latency times throughput, fewer than the registers.
    pub(super) const CHAINS: usize = 10;

    pub(super) fn maddubs(rounds: usize) -> i32 {
        // SAFETY: `kernel` picks this function only where `Isa::detect` found AVX2.
        unsafe { maddubs_avx2(rounds) }
    }

    pub(super) fn vnni(rounds: usize) -> i32 {
        // SAFETY: `kernel` picks this function only where `Isa::detect` found AVX-512 with VNNI.
        unsafe { vnni_avx512(rounds) }
    }

    pub(super) fn maddwd(rounds: usize) -> i32 {
        // SAFETY: as above.
        unsafe { maddwd_avx2(rounds) }
    }

    pub(super) fn vnni16(rounds: usize) -> i32 {
        // SAFETY: as above.
        unsafe { vnni16_avx512(rounds) }
    }

    pub(super) fn fma256(rounds: usize) -> f32 {
        // SAFETY: as above.
        unsafe { fma_avx2(rounds) }
    }

    pub(super) fn fma512(rounds: usize) -> f32 {
        // SAFETY: as above.
        unsafe { fma_avx512(rounds) }
    }

    pub(super) fn dpbf16(rounds: usize) -> f32 {
        // SAFETY: `bf16` picks this function only where the token says that the CPU has the instruction.
        unsafe { dpbf16_avx512(rounds) }
    }

    #[target_feature(enable = "avx2")]
    fn maddwd_avx2(rounds: usize) -> i32 {
        let one = _mm256_set1_epi16(1);
        let weights: [__m256i; CHAINS] = black_box(std::array::from_fn(|i| _mm256_set1_epi16(i as i16)));
        let mut activations = one;
        let mut sums = [_mm256_setzero_si256(); CHAINS];
        for _ in 0..rounds {
            for (sum, weight) in sums.iter_mut().zip(&weights) {
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(activations, *weight));
            }
            activations = _mm256_add_epi16(activations, one);
        }
        let sum = sums.into_iter().fold(_mm256_setzero_si256(), |a, b| _mm256_add_epi32(a, b));
        _mm256_extract_epi32::<0>(sum)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn vnni16_avx512(rounds: usize) -> i32 {
        let one = _mm512_set1_epi16(1);
        let weights: [__m512i; CHAINS] = black_box(std::array::from_fn(|i| _mm512_set1_epi16(i as i16)));
        let mut activations = one;
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..rounds {
            for (sum, weight) in sums.iter_mut().zip(&weights) {
                *sum = _mm512_dpwssd_epi32(*sum, activations, *weight);
            }
            activations = _mm512_add_epi16(activations, one);
        }
        let sum = sums.into_iter().fold(_mm512_setzero_si512(), |a, b| _mm512_add_epi32(a, b));
        _mm_cvtsi128_si32(_mm512_castsi512_si128(sum))
    }

    #[target_feature(enable = "avx2,fma")]
    fn fma_avx2(rounds: usize) -> f32 {
        let (x, y) = (black_box(_mm256_set1_ps(0.5)), black_box(_mm256_set1_ps(0.25)));
        let mut sums = [_mm256_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(x, *sum, y);
            }
        }
        _mm256_cvtss_f32(sums.into_iter().fold(y, |a, b| _mm256_add_ps(a, b)))
    }

    #[target_feature(enable = "avx512f")]
    fn fma_avx512(rounds: usize) -> f32 {
        let (x, y) = (black_box(_mm512_set1_ps(0.5)), black_box(_mm512_set1_ps(0.25)));
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(x, *sum, y);
            }
        }
        _mm512_reduce_add_ps(sums.into_iter().fold(y, |a, b| _mm512_add_ps(a, b)))
    }

    #[target_feature(enable = "avx512f,avx512bf16,avx512bw")]
    fn dpbf16_avx512(rounds: usize) -> f32 {
        // SAFETY: both types are 64 bytes of any bits.
        let bits = |v: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(v) };
        let weights: [__m512i; CHAINS] = black_box(std::array::from_fn(|i| _mm512_set1_epi16(0x3f80 + i as i16)));
        let mut activations = _mm512_set1_epi16(0x3f80);
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            for (sum, weight) in sums.iter_mut().zip(&weights) {
                *sum = _mm512_dpbf16_ps(*sum, bits(activations), bits(*weight));
            }
            activations = _mm512_xor_si512(activations, _mm512_set1_epi16(i16::MIN));
        }
        _mm512_reduce_add_ps(sums.into_iter().fold(_mm512_setzero_ps(), |a, b| _mm512_add_ps(a, b)))
    }

    #[target_feature(enable = "avx2")]
    fn maddubs_avx2(rounds: usize) -> i32 {
        let (one8, one16) = (_mm256_set1_epi8(1), _mm256_set1_epi16(1));
        // In memory, as weights are: the second operand of every multiplication is a load.
        let weights: [__m256i; CHAINS] = black_box(std::array::from_fn(|i| _mm256_set1_epi8(i as i8)));
        let mut activations = one8;
        let mut sums = [_mm256_setzero_si256(); CHAINS];
        for _ in 0..rounds {
            for (sum, weight) in sums.iter_mut().zip(&weights) {
                let pairs = _mm256_maddubs_epi16(activations, *weight);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, one16));
            }
            // A change per round keeps the products from being computed once.
            activations = _mm256_add_epi8(activations, one8);
        }
        let sum = sums.into_iter().fold(_mm256_setzero_si256(), |a, b| _mm256_add_epi32(a, b));
        _mm256_extract_epi32::<0>(sum)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn vnni_avx512(rounds: usize) -> i32 {
        let one = _mm512_set1_epi8(1);
        let weights: [__m512i; CHAINS] = black_box(std::array::from_fn(|i| _mm512_set1_epi8(i as i8)));
        let mut activations = one;
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..rounds {
            for (sum, weight) in sums.iter_mut().zip(&weights) {
                *sum = _mm512_dpbusd_epi32(*sum, activations, *weight);
            }
            activations = _mm512_add_epi8(activations, one);
        }
        let sum = sums.into_iter().fold(_mm512_setzero_si512(), |a, b| _mm512_add_epi32(a, b));
        _mm_cvtsi128_si32(_mm512_castsi512_si128(sum))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roofs_are_plausible() {
        let memory = memory(1, 16 << 20, 2);
        assert!((1e8..1e13).contains(&memory), "{memory:e} bytes/s");
        let (ops, name) = int8(1);
        assert!((1e8..1e14).contains(&ops), "{ops:e} op/s with {name}");
        for (ops, name) in [f32(1), int16(1)].into_iter().chain(bf16(1)) {
            assert!((1e8..1e14).contains(&ops), "{ops:e} op/s with {name}");
        }
    }
}
