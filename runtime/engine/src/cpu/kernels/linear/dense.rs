//! Linear maps with dense weights (F32, F16, BF16) and f32 activations.
//!
//! A register tile of `R` rows × `T` tokens of dot products, eight lanes each, read straight from the matrix; tokens are
//! taken in blocks whose f32 rows fit the second cache. Each product is summed alone and in the same order whatever
//! tile it is in, so results depend neither on the split of the rows nor on the number of tokens. The loops are the same
//! for every instruction set; what an eight of lanes is, [`Lanes`] says, and how weights become one, [`Dense`].

use super::LinearTask;
use super::blocks::{le16, le32};
use crate::quant::DType;
use half::{bf16, f16};

/// The value at `b[0..]`.
fn value(dtype: DType, b: &[u8]) -> f32 {
    match dtype {
        DType::F16 => f16::from_bits(le16(b)).to_f32(),
        DType::BF16 => bf16::from_bits(le16(b)).to_f32(),
        _ => f32::from_bits(le32(b)),
    }
}

/// The specification.
pub(super) fn scalar(task: &LinearTask<'_>) {
    let size = task.dtype.block_bytes();
    let row_bytes = task.k * size;
    for row in task.rows.clone() {
        let weights = &task.weight[row * row_bytes..(row + 1) * row_bytes];
        for t in 0..task.x.tokens {
            let x = &task.x.f32s[t * task.x.stride..][..task.k];
            let sum = weights.chunks_exact(size).zip(x).map(|(w, x)| value(task.dtype, w) * x).sum();
            // SAFETY: `linear` checked the output's size.
            unsafe { task.out.write(t, row, sum, task.accumulate) };
        }
    }
}

/// Eight f32 in registers. All functions need the instruction set's instructions.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) trait Lanes: Copy {
    /// # Safety
    /// The caller has the instructions.
    unsafe fn zero() -> Self;
    /// # Safety
    /// Eight values at `p`; the caller has the instructions.
    unsafe fn load(p: *const f32) -> Self;
    /// `self + a·b`, fused.
    ///
    /// # Safety
    /// The caller has the instructions.
    unsafe fn plus(self, a: Self, b: Self) -> Self;
    /// The sum of the eight.
    ///
    /// # Safety
    /// The caller has the instructions.
    unsafe fn total(self) -> f32;
}

/// A dense type.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) trait Dense {
    /// What its values are unpacked to.
    type Lanes: Lanes;
    const DTYPE: DType;
    const BYTES: usize;
    /// Eight weights as f32.
    ///
    /// # Safety
    /// Eight values at `p`; the caller has the instructions.
    unsafe fn load(p: *const u8) -> Self::Lanes;
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod loops {
    //! The loops around a register tile.
    use super::{Dense, Lanes};
    use crate::cpu::kernels::linear::LinearTask;

    /// Bytes of f32 activations that a block of tokens may take: half of a small second cache.
    const BLOCK_BYTES: usize = 128 << 10;

    /// Runs a task.
    ///
    /// # Safety
    /// The caller is compiled for `D`'s instructions, and `linear` has checked the task.
    #[inline(always)]
    pub(super) unsafe fn run<D: Dense>(task: &LinearTask<'_>) {
        let block = (BLOCK_BYTES / (4 * task.k.max(1))).max(4).next_multiple_of(4);
        for from in (0..task.x.tokens).step_by(block) {
            let to = (from + block).min(task.x.tokens);
            let mut row = task.rows.start;
            // Eight sums, which keep both multipliers busy and fit the registers with their operands.
            let step = if to - from == 1 { 4 } else { 2 };
            while row < task.rows.end {
                let rows = (task.rows.end - row).min(step);
                let mut t = from;
                while t < to {
                    let tokens = (to - t).min(4);
                    // SAFETY: by the contract.
                    unsafe {
                        match rows {
                            4 => product::<D, 4, 1>(task, row, t),
                            3 => product::<D, 3, 1>(task, row, t),
                            2 => some_tokens::<D, 2>(task, row, t, tokens),
                            _ => some_tokens::<D, 1>(task, row, t, tokens),
                        }
                    }
                    t += tokens;
                }
                row += rows;
            }
        }
    }

    /// Rows `row .. row + R` times one to four tokens.
    #[inline(always)]
    unsafe fn some_tokens<D: Dense, const R: usize>(task: &LinearTask<'_>, row: usize, t: usize, tokens: usize) {
        // SAFETY: by the caller's contract.
        unsafe {
            match tokens {
                1 => product::<D, R, 1>(task, row, t),
                2 => product::<D, R, 2>(task, row, t),
                3 => product::<D, R, 3>(task, row, t),
                _ => product::<D, R, 4>(task, row, t),
            }
        }
    }

    /// Rows `row .. row + R` times tokens `t .. t + T`.
    #[inline(always)]
    unsafe fn product<D: Dense, const R: usize, const T: usize>(task: &LinearTask<'_>, row: usize, t: usize) {
        // SAFETY: rows and tokens in range by the caller.
        unsafe {
            let k = task.k;
            let w: [*const u8; R] = std::array::from_fn(|r| task.weight.as_ptr().add((row + r) * k * D::BYTES));
            let x: [*const f32; T] = std::array::from_fn(|i| task.x.f32s.as_ptr().add((t + i) * task.x.stride));
            let mut acc = [[D::Lanes::zero(); T]; R];
            for i in (0..k - k % 8).step_by(8) {
                let mut v = [D::Lanes::zero(); T];
                for (v, x) in v.iter_mut().zip(&x) {
                    *v = D::Lanes::load(x.add(i));
                }
                for (w, acc) in w.iter().zip(&mut acc) {
                    let w = D::load(w.add(i * D::BYTES));
                    for (v, acc) in v.iter().zip(acc) {
                        *acc = acc.plus(w, *v);
                    }
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                for (j, acc) in acc.iter().enumerate() {
                    let mut sum = acc.total();
                    for i in k - k % 8..k {
                        let at = ((row + r) * k + i) * D::BYTES;
                        sum += super::value(D::DTYPE, &task.weight[at..]) * *x[j].add(i);
                    }
                    task.out.write(t + j, row + r, sum, task.accumulate);
                }
            }
        }
    }
}

/// Declares a dense type: its name, type, bytes and load.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! dense {
    ($name:ident, $dtype:ident, $bytes:expr, $lanes:ty, |$p:ident| $load:expr) => {
        #[doc = stringify!($dtype)]
        pub(crate) struct $name;
        impl super::Dense for $name {
            type Lanes = $lanes;
            const DTYPE: crate::quant::DType = crate::quant::DType::$dtype;
            const BYTES: usize = $bytes;
            #[inline(always)]
            unsafe fn load($p: *const u8) -> $lanes {
                // SAFETY: eight values by the contract.
                unsafe { $load }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2 {
    //! AVX2 and FMA.
    use super::{Dense, Lanes, loops};
    use crate::cpu::isa::Avx2;
    use crate::cpu::kernels::linear::LinearTask;
    use std::arch::x86_64::*;

    impl Lanes for __m256 {
        #[inline(always)]
        unsafe fn zero() -> __m256 {
            // SAFETY: register arithmetic.
            unsafe { _mm256_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            // SAFETY: by the contract.
            unsafe { _mm256_loadu_ps(p) }
        }

        #[inline(always)]
        unsafe fn plus(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: register arithmetic.
            unsafe { _mm256_fmadd_ps(a, b, self) }
        }

        #[inline(always)]
        unsafe fn total(self) -> f32 {
            // SAFETY: register arithmetic.
            unsafe { super::super::avx2::horizontal(self) }
        }
    }

    dense!(F32, F32, 4, __m256, |p| _mm256_loadu_ps(p.cast()));
    dense!(F16, F16, 2, __m256, |p| _mm256_cvtph_ps(_mm_loadu_si128(p.cast())));
    dense!(Bf16, BF16, 2, __m256, |p| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(
        _mm_loadu_si128(p.cast())
    ))));

    /// Runs a task.
    pub(crate) fn run<D: Dense>(_proof: Avx2, task: &LinearTask<'_>) {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn inner<D: Dense>(task: &LinearTask<'_>) {
            // SAFETY: the features are enabled here, and `linear` checked the task.
            unsafe { loops::run::<D>(task) }
        }
        // SAFETY: the token proves the features.
        unsafe { inner::<D>(task) }
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) mod neon {
    //! NEON, two registers for eight lanes.
    use super::{Dense, Lanes, loops};
    use crate::cpu::isa::Neon;
    use crate::cpu::kernels::linear::LinearTask;
    use crate::cpu::kernels::vector::neon::load_f16;
    use std::arch::aarch64::*;

    type Pair = [float32x4_t; 2];

    impl Lanes for Pair {
        #[inline(always)]
        unsafe fn zero() -> Pair {
            // SAFETY: register arithmetic.
            unsafe { [vdupq_n_f32(0.0); 2] }
        }

        #[inline(always)]
        unsafe fn load(p: *const f32) -> Pair {
            // SAFETY: by the contract.
            unsafe { [vld1q_f32(p), vld1q_f32(p.add(4))] }
        }

        #[inline(always)]
        unsafe fn plus(self, a: Pair, b: Pair) -> Pair {
            // SAFETY: register arithmetic.
            unsafe { [vfmaq_f32(self[0], a[0], b[0]), vfmaq_f32(self[1], a[1], b[1])] }
        }

        #[inline(always)]
        unsafe fn total(self) -> f32 {
            // SAFETY: register arithmetic.
            unsafe { vaddvq_f32(vaddq_f32(self[0], self[1])) }
        }
    }

    dense!(F32, F32, 4, Pair, |p| <Pair as Lanes>::load(p.cast()));
    dense!(F16, F16, 2, Pair, |p| load_f16(p));
    dense!(Bf16, BF16, 2, Pair, |p| {
        let bits = vld1q_u16(p.cast());
        let halves = [vshll_n_u16::<16>(vget_low_u16(bits)), vshll_n_u16::<16>(vget_high_u16(bits))];
        [vreinterpretq_f32_u32(halves[0]), vreinterpretq_f32_u32(halves[1])]
    });

    /// Runs a task.
    pub(crate) fn run<D: Dense>(_proof: Neon, task: &LinearTask<'_>) {
        // SAFETY: the token proves the feature, and `linear` checked the task.
        unsafe { loops::run::<D>(task) }
    }
}
