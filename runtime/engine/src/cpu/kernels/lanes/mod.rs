//! Eight f32 lanes, [`F32x8`]: one register of AVX2, two of NEON. The kernels of attention, of its gradient and of small
//! products are written once, over these functions; both instruction sets then do the same operations in the same order.
//!
//! On x86-64 whatever calls them needs `#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]`, and
//! is reached where [`runs`] says so; NEON is part of every AArch64 target. All are safe there but those that take a pointer.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "aarch64")]
mod neon;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::*;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::*;

use super::vector::EXP2;
use crate::cpu::isa::Isa;

/// Whether kernels that are written in lanes may run.
#[inline(always)]
pub(crate) fn runs(isa: Isa) -> bool {
    match isa {
        Isa::Avx2(_) | Isa::Avx512(_) | Isa::Neon(_) => true,
        Isa::Scalar => false,
    }
}

/// 2ˣ for x ≤ 127 to about 1 unit in the last place; x below −126.5, −∞ included, gives 0, and 2⁰ is exactly 1.
///
/// Softmax runs in base 2 (its caller scales by log₂ e beforehand): n = round(x) and r = x − n are then exact.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
#[inline]
pub(crate) fn exp2(x: F32x8) -> F32x8 {
    let (p, r, power) = exp2_parts(x);
    mul(fma(p, r, splat(1.0)), power)
}

/// tanh(x / (2·log₂ e)) = t / (t + 2) with t = 2ˣ − 1, accurate at small x too.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
#[inline]
pub(crate) fn tanh_of_exp2(x: F32x8) -> F32x8 {
    let (p, r, power) = exp2_parts(smaller(splat(64.0), x));
    let t = fma(mul(p, r), power, sub(power, splat(1.0)));
    div(t, add(t, splat(2.0)))
}

/// (P(r), r, 2ⁿ) with x = n + r and the polynomial P of [`EXP2`]. n stops at −127, where 2ⁿ is 0.
#[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
#[inline]
fn exp2_parts(x: F32x8) -> (F32x8, F32x8, F32x8) {
    // 1.5·2²³ rounds to an integer; the 127 leaves it biased as an exponent in the low bits.
    let round = splat(12_582_912.0 + 127.0);
    let x = larger(splat(-127.0), x);
    let shifted = add(x, round);
    let r = sub(x, sub(shifted, round));
    let mut p = splat(EXP2[0]);
    for c in &EXP2[1..] {
        p = fma(p, r, splat(*c));
    }
    (p, r, low_bits_as_exponent(shifted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp2_is_close_to_f64_and_its_edges_hold() {
        if !runs(Isa::detect()) {
            return;
        }
        #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,f16c"))]
        fn one(x: f32) -> f32 {
            let mut y = [0.0; 8];
            // SAFETY: eight values.
            unsafe { store(y.as_mut_ptr(), exp2(splat(x))) };
            y[5]
        }
        #[cfg_attr(target_arch = "aarch64", expect(unused_unsafe, reason = "NEON is everywhere"))]
        // SAFETY: `runs` said so.
        let one = |x: f32| unsafe { one(x) };
        let mut worst = 0.0f64;
        for i in -126_000..=0 {
            let x = i as f32 * 1e-3;
            let want = f64::from(x).exp2();
            worst = worst.max((f64::from(one(x)) - want).abs() / want);
        }
        assert!(worst < 1.2e-7, "relative error {worst:e}");
        assert_eq!((one(0.0), one(-5.0), one(f32::NEG_INFINITY), one(-1e30)), (1.0, 0.03125, 0.0, 0.0));
        assert!(one(f32::NAN).is_nan());
    }
}
