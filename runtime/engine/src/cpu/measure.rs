//! Times the kernels of linear maps one by one: what `kinglet bench kernels` shows.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use super::isa::Isa;
use super::kernels::linear::{
    Activations, KERNELS, KernelInfo, LinearTask, OutMut, Q8, Q8Mut, Scratch, Tiled, TiledMut, activation_bytes, pick,
    quantize_rows, tile_rows, tiled_bytes,
};
use crate::quant::DType;
use crate::random::{splitmix64, uniform};
use crate::{Error, Result};

/// What to time a kernel on: a matrix of `rows` × `k` weights, and tokens.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Rows of the matrix, which the threads divide evenly.
    pub rows: usize,
    /// Values in a row.
    pub k: usize,
    /// Tokens.
    pub tokens: usize,
    /// Threads.
    pub threads: usize,
    /// How often; the best time counts.
    pub runs: usize,
}

/// Random weights of one type, with scales near 0.01: what kernels are timed on.
#[derive(Debug)]
pub struct Weights {
    dtype: DType,
    bytes: Vec<u8>,
}

impl Weights {
    /// Whole blocks, `bytes` of them or a little less.
    pub fn random(dtype: DType, bytes: usize) -> Weights {
        let mut data: Vec<u8> = (0..bytes.div_ceil(8) as u64).flat_map(|i| splitmix64(1, i).to_le_bytes()).collect();
        data.truncate(bytes / dtype.block_bytes() * dtype.block_bytes());
        sane_scales(dtype, &mut data);
        Weights { dtype, bytes: data }
    }
}

/// Makes whole blocks of random bytes weights that can be computed with: scales of either sign and a size of 2⁻⁷ to 2⁻⁶,
/// none a NaN, none huge.
pub(in crate::cpu) fn sane_scales(dtype: DType, data: &mut [u8]) {
    use DType::*;
    let halves: &[usize] = match dtype {
        F16 | Q4_0 | Q5_0 | Q8_0 | IQ4_NL | IQ4_XS => &[0],
        Q4_1 | Q5_1 | Q4_K | Q5_K => &[0, 2],
        Q2_K => &[80, 82],
        Q3_K => &[108],
        Q6_K => &[208],
        _ => &[],
    };
    for block in data.chunks_exact_mut(dtype.block_bytes()) {
        for at in halves {
            block[at + 1] = 0x20 | (block[at + 1] & 0x83);
        }
        match dtype {
            F32 | Q8_K => (block[2], block[3]) = (block[2] & 0x7f, 0x3c | (block[3] & 0x80)),
            BF16 => (block[0], block[1]) = (block[0] & 0x7f, 0x3c | (block[1] & 0x80)),
            MXFP4 => block[0] = 118 + block[0] % 4,
            _ => {}
        }
    }
}

/// All kernels that this CPU can run, by type, each with whether [`pick`] takes it for what it is for.
pub fn kernels(tokens: usize) -> Vec<(&'static KernelInfo, bool)> {
    let isa = Isa::detect();
    let names: Vec<&str> = Isa::available().into_iter().map(Isa::name).collect();
    let mut all: Vec<&KernelInfo> = KERNELS.iter().copied().flatten().filter(|k| names.contains(&k.isa)).collect();
    all.sort_by_key(|k| (k.dtype.ggml(), k.name));
    let picked = |k: &KernelInfo| [1, tokens].into_iter().any(|n| pick(isa, k.dtype, n).name == k.name);
    all.into_iter().map(|k| (k, picked(k))).collect()
}

/// The best time of `kernel` on a case.
///
/// # Errors
/// [`Error::Argument`] for a matrix larger than the weights or of another type.
pub fn time(kernel: &KernelInfo, weights: &Weights, case: &Case) -> Result<Duration> {
    let &Case { rows, k, tokens, threads, runs } = case;
    let (isa, dtype) = (Isa::detect(), weights.dtype);
    let f32s: Vec<f32> = (0..(tokens * k) as u64).map(|i| uniform(7, i) as f32 * 2.0 - 1.0).collect();
    let mut q8 = vec![0u64; activation_bytes(tokens, k).div_ceil(8)];
    // SAFETY: the buffer is large enough, aligned, and used by this thread only.
    let dst = unsafe { Q8Mut::new(q8.as_mut_ptr().cast(), tokens, k) };
    quantize_rows(isa, &f32s, k, 0..tokens, &dst)?;
    let q8 = Q8::new(bytemuck::cast_slice(&q8), tokens, k)?;
    let mut tiles = vec![0u64; tiled_bytes(tokens, k).div_ceil(8)];
    // SAFETY: the buffer is large enough, and used by this thread only.
    let dst = unsafe { TiledMut::new(tiles.as_mut_ptr().cast(), tokens, k) };
    tile_rows(isa, &f32s, k, 0..tokens, &dst)?;
    let tiled = Some(Tiled::new(bytemuck::cast_slice(&tiles), tokens, k)?);
    let x = Activations { f32s: &f32s, q8: Some(q8), tiled, wide: None, low: None, tokens, k, stride: k };
    let mut y = vec![0f32; tokens * rows];
    // SAFETY: `y` outlives the tasks, which have disjoint rows.
    let out = unsafe { OutMut::new(y.as_mut_ptr(), rows, y.len()) };
    let barrier = Barrier::new(threads);
    let work = |i: usize| -> Result<Duration> {
        let mut scratch = Scratch::new();
        let range = rows * i / threads..rows * (i + 1) / threads;
        let task = LinearTask { dtype, weight: &weights.bytes, k, rows: range, x: &x, out, accumulate: false };
        let mut best = Ok(Duration::MAX);
        for _ in 0..runs {
            // Whatever happens, all threads come to the barriers.
            barrier.wait();
            let start = Instant::now();
            let ran = kernel.run(isa, &task, &mut scratch);
            barrier.wait();
            best = best.and_then(|best| ran.map(|()| start.elapsed().min(best)));
        }
        best
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|i| scope.spawn(move || work(i))).collect();
        let own = work(0);
        let died = || Err(Error::argument("a thread of the measurement ended early"));
        others.into_iter().try_fold((), |(), t| t.join().unwrap_or_else(|_| died()).map(drop)).and(own)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_listed_runs_and_one_per_use_is_picked() {
        let all = kernels(512);
        for dtype in DType::WEIGHTS {
            let weights = Weights::random(dtype, 16 * dtype.row_bytes(256).unwrap());
            let of: Vec<_> = all.iter().filter(|(k, _)| k.dtype == dtype).collect();
            let picked = of.iter().filter(|(_, picked)| *picked).count();
            assert!((1..=2).contains(&picked), "{dtype}: {picked}");
            for (kernel, _) in of {
                let case = Case { rows: 16, k: 256, tokens: 5, threads: 2, runs: 2 };
                assert!(time(kernel, &weights, &case).unwrap() < Duration::MAX, "{}", kernel.name);
                assert!(time(kernel, &weights, &Case { rows: 17, ..case }).is_err(), "{}", kernel.name);
            }
        }
    }
}
