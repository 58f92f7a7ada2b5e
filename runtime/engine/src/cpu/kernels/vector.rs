//! What the other kernels are made of: the exponential, sums by lanes, and the one-pass vector operations.
//!
//! Two ways of writing a kernel meet here. The simple, memory-bound ones are plain Rust, written in lanes, and
//! [`by_isa!`] compiles the same body for the baseline of the target (on ARM that is NEON) and for AVX2, some for AVX-512. Nothing is
//! fused in those bodies (Rust never contracts `a * b + c`), so every instruction set gives the same bits. The hot ones
//! (attention, small products) are written over [`lanes`](super::lanes).
//!
//! Slices that differ in length are a caller's bug: it is caught in debug builds, and in release builds the shorter one
//! decides.

/// Whether AVX2, FMA and F16C kernels may run; AVX-512 implies them.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn has_avx2(isa: crate::cpu::isa::Isa) -> bool {
    use crate::cpu::isa::Isa;
    matches!(isa, Isa::Avx2(_) | Isa::Avx512(_))
}

/// Defines a kernel whose one body is compiled for the baseline and for AVX2; `isa: Isa` becomes its first parameter. Behind `wide;`
/// it is compiled for AVX-512, too, where it computes much for each element and each by itself.
macro_rules! by_isa {
    (wide; $(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::cpu::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            if matches!(isa, $crate::cpu::isa::Isa::Avx512(_)) {
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
                #[allow(clippy::too_many_arguments)]
                fn with_avx512($($arg: $ty),*) $(-> $ret)? $body
                // SAFETY: the token in `isa` proves that the CPU has these instructions.
                return unsafe { with_avx512($($arg),*) };
            }
            $crate::cpu::kernels::vector::by_isa! { fn narrower($($arg: $ty),*) $(-> $ret)? $body }
            narrower(isa, $($arg),*)
        }
    };
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::cpu::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            if $crate::cpu::kernels::vector::has_avx2(isa) {
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn with_avx2($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                // SAFETY: the token in `isa` proves that the CPU has these instructions.
                return unsafe { with_avx2($($arg),*) };
            }
            let _ = isa;
            body($($arg),*)
        }
    };
}
pub(crate) use by_isa;

/// Lanes of the plain-Rust bodies: one AVX2 register, two NEON registers.
pub(crate) const LANES: usize = 8;

/// e^x for x between −86.5 and 89 as ((e^r − 1), 2ⁿ⁻¹) with x = n·ln 2 + r; branch-free, so that loops vectorize.
///
/// x is split with the two-part ln 2 of Cody and Waite; the polynomial is that of Cephes' `expf`. The power is halved
/// because n = 128, which is needed up to the overflow of eˣ, has no exponent of its own.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, f32) {
    const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding it rounds to an integer, which then lies in the low bits
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    (p * r * r + r, f32::from_bits(shifted.to_bits().wrapping_add(126) << 23))
}

/// x held between `low` and `high`; comparisons rather than `clamp`, so that it vectorizes, and NaN stays.
#[inline(always)]
fn bounded(x: f32, low: f32, high: f32) -> f32 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

/// eˣ to about 2 units in the last place.
///
/// Below x = −86.5, where results would be under 3e-38, it is 0, so `exp(-inf) = 0`; above 88.73 it is infinity; NaN
/// stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let (less_one, half) = exp_parts(bounded(x, -86.5, 89.0));
    let y = (less_one + 1.0) * half * 2.0;
    if x < -86.5 { 0.0 } else { y }
}

/// The logistic function 1 / (1 + e⁻ˣ).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// tanh x = t / (t + 2) with t = e²ˣ − 1, which keeps its relative accuracy at small x.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let (less_one, half) = exp_parts(bounded(2.0 * x, -40.0, 40.0));
    let t = less_one * (2.0 * half) + (2.0 * half - 1.0);
    t / (t + 2.0)
}

/// Adds eight lanes as a tree, in the order that the AVX2 horizontal sum uses.
#[inline(always)]
pub(crate) fn sum_lanes(a: [f32; LANES]) -> f32 {
    let [s0, s1, s2, s3] = [a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]];
    (s0 + s2) + (s1 + s3)
}

/// The dot product of two vectors, in eight lanes: what the scalar kernels and the tails are written with.
#[inline(always)]
pub(crate) fn dot_body(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a8, a_tail) = a.as_chunks::<LANES>();
    let (b8, b_tail) = b.as_chunks::<LANES>();
    for (x, y) in a8.iter().zip(b8) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    let tail: f32 = a_tail.iter().zip(b_tail).map(|(x, y)| x * y).sum();
    sum_lanes(lanes) + tail
}

by_isa! {
    /// Σ aᵢ·bᵢ in f32, eight lanes.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        debug_assert_eq!(a.len(), b.len());
        dot_body(a, b)
    }
}

by_isa! {
    /// y ← y + x.
    pub fn add(x: &[f32], y: &mut [f32]) {
        debug_assert_eq!(x.len(), y.len());
        for (y, x) in y.iter_mut().zip(x) {
            *y += x;
        }
    }
}

by_isa! {
    /// y ← y + a·x.
    pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
        debug_assert_eq!(x.len(), y.len());
        for (y, x) in y.iter_mut().zip(x) {
            *y += a * x;
        }
    }
}

by_isa! {
    /// x ← a·x.
    pub fn scale(a: f32, x: &mut [f32]) {
        for x in x {
            *x *= a;
        }
    }
}

by_isa! {
    /// The largest element; −∞ for an empty slice. NaN elements are passed over.
    pub fn max(x: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (x8, tail) = x.as_chunks::<LANES>();
        for x in x8 {
            for i in 0..LANES {
                lanes[i] = if x[i] > lanes[i] { x[i] } else { lanes[i] };
            }
        }
        lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
    }
}

by_isa! {
    wide;
    /// xᵢ ← e^(xᵢ − shift); returns their sum (eight f32 lanes, each chunk of 1,024 then added in f64).
    pub fn exp_shifted(shift: f32, x: &mut [f32]) -> f64 {
        let mut sum = 0.0f64;
        for chunk in x.chunks_mut(1024) {
            // By itself this loop takes registers of any length.
            for x in chunk.iter_mut() {
                *x = exp(*x - shift);
            }
            let mut lanes = [0.0f32; LANES];
            let (x8, tail) = chunk.as_chunks::<LANES>();
            for x in x8 {
                for i in 0..LANES {
                    lanes[i] += x[i];
                }
            }
            sum += f64::from(sum_lanes(lanes));
            sum = tail.iter().fold(sum, |sum, x| sum + f64::from(*x));
        }
        sum
    }
}

by_isa! {
    /// The gradient of g·(lse − z\[target\]), the weighted cross-entropy of a row of logits, for a chunk of them in place:
    /// z ← g·(exp(z − lse) − onehot). `target` is the target's place in this chunk, if it lies in it; `lse` is that of the
    /// whole row.
    pub fn cross_entropy_backward(z: &mut [f32], lse: f32, target: Option<usize>, g: f32) {
        for z in z.iter_mut() {
            *z = g * exp(*z - lse);
        }
        if let Some(z) = target.and_then(|t| z.get_mut(t)) {
            *z -= g;
        }
    }
}

/// f16 bits to f32.
#[inline(always)]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    half::f16::from_bits(bits).to_f32()
}

/// Pieces of the NEON kernels.
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon {
    use std::arch::aarch64::*;

    /// Four f16 as f32.
    #[target_feature(enable = "neon")]
    #[inline]
    pub fn widen(bits: uint16x4_t) -> float32x4_t {
        vcvt_f32_f16(vreinterpret_f16_u16(bits))
    }

    /// Eight consecutive f16 as f32.
    ///
    /// # Safety
    /// 16 bytes must be readable at `p`.
    #[target_feature(enable = "neon")]
    #[inline]
    pub unsafe fn load_f16(p: *const u8) -> [float32x4_t; 2] {
        // SAFETY: the caller's promise; the load needs no alignment.
        let bits = unsafe { vld1q_u16(p.cast()) };
        [widen(vget_low_u16(bits)), widen(vget_high_u16(bits))]
    }
}

/// Pieces of the AVX-512 kernels.
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512 {
    use std::arch::x86_64::*;

    /// [`exp2`](crate::cpu::kernels::lanes::exp2) of sixteen.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub fn exp2(x: __m512) -> __m512 {
        let (p, r, power) = exp2_parts(x);
        _mm512_mul_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0)), power)
    }

    /// [`tanh_of_exp2`](crate::cpu::kernels::lanes::tanh_of_exp2) of sixteen.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub fn tanh_of_exp2(x: __m512) -> __m512 {
        let (p, r, power) = exp2_parts(_mm512_min_ps(_mm512_set1_ps(64.0), x));
        let t = _mm512_fmadd_ps(_mm512_mul_ps(p, r), power, _mm512_sub_ps(power, _mm512_set1_ps(1.0)));
        _mm512_div_ps(t, _mm512_add_ps(t, _mm512_set1_ps(2.0)))
    }

    /// (P(r), r, 2ⁿ) with x = n + r and the polynomial P of [`EXP2`](super::EXP2).
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn exp2_parts(x: __m512) -> (__m512, __m512, __m512) {
        let round = _mm512_set1_ps(12_582_912.0 + 127.0);
        let x = _mm512_max_ps(_mm512_set1_ps(-127.0), x);
        let shifted = _mm512_add_ps(x, round);
        let r = _mm512_sub_ps(x, _mm512_sub_ps(shifted, round));
        let mut p = _mm512_set1_ps(super::EXP2[0]);
        for c in &super::EXP2[1..] {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
        }
        (p, r, _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(shifted))))
    }
}

/// P(r) of 2ʳ = 1 + r·P(r), the highest power first: the minimax polynomial on [−½, ½], relative error 1.9e-9 before rounding.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) const EXP2: [f32; 6] =
    [1.534_581_2e-4, 1.339_993_1e-3, 9.618_489e-3, 5.550_328_8e-2, 2.402_264_7e-1, 6.931_472e-1];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;

    #[test]
    fn exp_is_close_to_f64_and_its_edges_hold() {
        let mut worst = 0.0f64;
        for i in -86_000..88_700 {
            let x = i as f32 * 1e-3;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - want).abs() / want);
        }
        assert!(worst < 2.5e-7, "relative error {worst:e}");
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!((sigmoid(f32::INFINITY), sigmoid(f32::NEG_INFINITY)), (1.0, 0.0));
        assert_eq!((tanh(100.0), tanh(-100.0), tanh(0.0)), (1.0, -1.0, 0.0));
        for i in -20_000..20_000 {
            let x = i as f32 * 5e-4;
            let want = f64::from(x).tanh();
            assert!((f64::from(tanh(x)) - want).abs() <= 5e-7 * want.abs(), "tanh {x}");
        }
    }

    #[test]
    fn cross_entropy_backward_agrees_with_central_differences() {
        for n in [1usize, 8, 37, 1030] {
            let z: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1009) as f32 - 504.0) * 0.02).collect();
            let lse = |z: &[f64]| z.iter().map(|z| z.exp()).sum::<f64>().ln();
            let exact: Vec<f64> = z.iter().map(|&z| f64::from(z)).collect();
            let (target, g) = (n / 3, 0.4);
            let loss = |i: usize, by: f64| {
                let mut z = exact.clone();
                z[i] += by;
                g * (lse(&z) - z[target])
            };
            for isa in Isa::available() {
                // Two chunks, the target in one of them.
                let (mut p, cut) = (z.clone(), n / 2);
                let (low, high) = p.split_at_mut(cut);
                let total = lse(&exact) as f32;
                cross_entropy_backward(isa, low, total, (target < cut).then_some(target), g as f32);
                cross_entropy_backward(isa, high, total, target.checked_sub(cut), g as f32);
                for i in (0..n).step_by(1 + n / 40).chain([target]) {
                    let slope = (loss(i, 1e-5) - loss(i, -1e-5)) / 2e-5;
                    assert!((f64::from(p[i]) - slope).abs() < 1e-6, "n = {n} [{i}]: {} {slope}", p[i]);
                }
            }
        }
    }

    #[test]
    fn every_isa_gives_the_same_bits_over_tails() {
        for n in [0, 1, 7, 8, 9, 31, 64, 1023, 1024, 1025, 2500] {
            let a: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.03).collect();
            let b: Vec<f32> = (0..n).map(|i| ((i * 53 % 97) as f32 - 48.0) * 0.07).collect();
            let naive: f64 = a.iter().zip(&b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            let run = |isa| {
                let (mut y, mut z, mut e) = (a.clone(), b.clone(), a.clone());
                axpy(isa, 0.3, &b, &mut y);
                add(isa, &a, &mut z);
                scale(isa, -1.5, &mut z);
                let sum = exp_shifted(isa, max(isa, &a), &mut e);
                (dot(isa, &a, &b), max(isa, &b), sum, y, z, e)
            };
            let want = run(Isa::Scalar);
            assert!((f64::from(want.0) - naive).abs() < 1e-4 * (1.0 + n as f64), "n = {n}");
            for isa in Isa::available() {
                assert_eq!(run(isa), want, "{} n = {n}", isa.name());
            }
        }
    }
}
