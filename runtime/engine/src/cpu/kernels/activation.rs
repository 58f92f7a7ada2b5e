//! The gated activation of the feed-forward block (Shazeer 2020, arXiv:2002.05202), out = act(gate) ⊙ up, and the soft
//! cap of Gemma 2. One body for every instruction set, element by element, so all give the same bits.
//!
//! The exponential is [`exp`](super::vector::exp). GELU is its tanh form written with the logistic function,
//! ½(1 + tanh u) = σ(2u), which does not cancel where u is very negative.

use super::vector::{by_isa, sigmoid, tanh};
use crate::tape::Gate;

/// 2·√(2/π).
const GELU_SLOPE: f32 = std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::SQRT_2;

#[inline(always)]
fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    x * sigmoid(GELU_SLOPE * (x + 0.044_715 * x * x * x))
}

by_isa! {
    wide;
    /// out ← act(gate) ⊙ up.
    pub fn gated(kind: Gate, gate: &[f32], up: &[f32], out: &mut [f32]) {
        debug_assert!(gate.len() == up.len() && gate.len() == out.len());
        let terms = out.iter_mut().zip(gate).zip(up);
        match kind {
            Gate::Silu => terms.for_each(|((o, &g), &u)| *o = silu(g) * u),
            Gate::GeluTanh => terms.for_each(|((o, &g), &u)| *o = gelu_tanh(g) * u),
        }
    }
}

by_isa! {
    wide;
    /// gate ← act(gate) ⊙ up, in place.
    pub fn gated_inplace(kind: Gate, gate: &mut [f32], up: &[f32]) {
        debug_assert_eq!(gate.len(), up.len());
        let terms = gate.iter_mut().zip(up);
        match kind {
            Gate::Silu => terms.for_each(|(g, &u)| *g = silu(*g) * u),
            Gate::GeluTanh => terms.for_each(|(g, &u)| *g = gelu_tanh(*g) * u),
        }
    }
}

by_isa! {
    wide;
    /// The gradients of `out = act(gate) ⊙ up` for the incoming gradient `d_out`:
    /// d_gate ← d_out ⊙ up ⊙ act′(gate), d_up ← d_out ⊙ act(gate).
    pub fn gated_backward(
        kind: Gate,
        gate: &[f32],
        up: &[f32],
        d_out: &[f32],
        d_gate: &mut [f32],
        d_up: &mut [f32],
    ) {
        debug_assert!(gate.len() == up.len() && gate.len() == d_out.len());
        debug_assert!(gate.len() == d_gate.len() && gate.len() == d_up.len());
        let terms = d_gate.iter_mut().zip(d_up).zip(gate).zip(up).zip(d_out);
        match kind {
            Gate::Silu => terms.for_each(|((((dg, du), &g), &u), &d)| {
                let s = sigmoid(g);
                *dg = d * u * (s + g * s * (1.0 - s));
                *du = d * g * s;
            }),
            Gate::GeluTanh => terms.for_each(|((((dg, du), &g), &u), &d)| {
                let s = sigmoid(GELU_SLOPE * (g + 0.044_715 * g * g * g));
                // The slope of the argument vanishes against σ(1 − σ) long before x² could overflow.
                let slope = GELU_SLOPE * (1.0 + 3.0 * 0.044_715 * g * g);
                *dg = d * u * (s + g * s * (1.0 - s) * slope);
                *du = d * g * s;
            }),
        }
    }
}

by_isa! {
    wide;
    /// x ← c · tanh(x / c), which keeps x within ±c.
    pub fn softcap(x: &mut [f32], c: f32) {
        let inverse = 1.0 / c;
        for x in x {
            *x = c * tanh(*x * inverse);
        }
    }
}

by_isa! {
    /// The gradient of [`softcap`] in place: d ← d ⊙ (1 − (y / c)²), where `y` is what the forward pass gave.
    pub fn softcap_backward(y: &[f32], c: f32, d: &mut [f32]) {
        debug_assert_eq!(y.len(), d.len());
        let inverse = 1.0 / c;
        for (d, y) in d.iter_mut().zip(y) {
            let t = y * inverse;
            *d *= (1.0 - t) * (1.0 + t);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;

    fn act(kind: Gate, x: f64) -> f64 {
        match kind {
            Gate::Silu => x / (1.0 + (-x).exp()),
            Gate::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
            }
        }
    }

    fn inputs() -> (Vec<f32>, Vec<f32>) {
        let gate: Vec<f32> = (0..1539).map(|i| (i as f32 - 770.0) * 0.021).collect();
        let up = gate.iter().map(|g| 1.3 - g * 0.4).collect();
        (gate, up)
    }

    #[test]
    fn forward_agrees_with_f64() {
        let (gate, up) = inputs();
        for kind in [Gate::Silu, Gate::GeluTanh] {
            let mut first = None;
            for isa in Isa::available() {
                let mut out = vec![0.0; gate.len()];
                gated(isa, kind, &gate, &up, &mut out);
                for ((o, &g), &u) in out.iter().zip(&gate).zip(&up) {
                    let want = act(kind, f64::from(g)) * f64::from(u);
                    assert!((f64::from(*o) - want).abs() <= 2e-6 * want.abs() + 1e-6, "{kind:?} {g}: {o} {want}");
                }
                let mut inplace = gate.clone();
                gated_inplace(isa, kind, &mut inplace, &up);
                assert_eq!(inplace, out);
                assert_eq!(first.get_or_insert(out.clone()), &out);
            }
        }
        let mut out = [0.0; 2];
        gated(Isa::detect(), Gate::Silu, &[-1e30, 1e30], &[1.0, 1.0], &mut out);
        assert_eq!(out, [0.0, 1e30]);
    }

    #[test]
    fn backward_agrees_with_finite_differences() {
        let (gate, up) = inputs();
        let d_out: Vec<f32> = (0..gate.len()).map(|i| 0.3 + (i % 5) as f32).collect();
        for kind in [Gate::Silu, Gate::GeluTanh] {
            for isa in Isa::available() {
                let (mut dg, mut du) = (vec![0.0; gate.len()], vec![0.0; gate.len()]);
                gated_backward(isa, kind, &gate, &up, &d_out, &mut dg, &mut du);
                for i in 0..gate.len() {
                    let (g, u, d) = (f64::from(gate[i]), f64::from(up[i]), f64::from(d_out[i]));
                    let slope = (act(kind, g + 1e-5) - act(kind, g - 1e-5)) / 2e-5;
                    assert!((f64::from(dg[i]) - d * u * slope).abs() < 1e-5 * (1.0 + (d * u).abs()), "{kind:?} {g}");
                    assert!((f64::from(du[i]) - d * act(kind, g)).abs() < 1e-5 * (1.0 + (d * g).abs()));
                }
            }
        }
    }

    #[test]
    fn softcap_agrees_with_f64() {
        for isa in Isa::available() {
            let mut x: Vec<f32> = (0..101).map(|i| (i as f32 - 50.0) * 4.0).collect();
            let want: Vec<f64> = x.iter().map(|&x| 30.0 * (f64::from(x) / 30.0).tanh()).collect();
            softcap(isa, &mut x, 30.0);
            assert!(x.iter().zip(&want).all(|(x, w)| (f64::from(*x) - w).abs() < 1e-5));
        }
    }

    #[test]
    fn softcap_backward_agrees_with_central_differences() {
        for isa in Isa::available() {
            let x: Vec<f32> = (0..101).map(|i| (i as f32 - 50.0) * 2.0).collect();
            let mut y = x.clone();
            softcap(isa, &mut y, 30.0);
            let mut d: Vec<f32> = (0..101).map(|i| 0.5 + (i % 7) as f32).collect();
            let before = d.clone();
            softcap_backward(isa, &y, 30.0, &mut d);
            let cap = |x: f64| 30.0 * (x / 30.0).tanh();
            for ((d, b), &x) in d.iter().zip(before).zip(&x) {
                let slope = (cap(f64::from(x) + 1e-4) - cap(f64::from(x) - 1e-4)) / 2e-4 * f64::from(b);
                assert!((f64::from(*d) - slope).abs() < 3e-6 * (1.0 + slope.abs()), "{x}: {d} {slope}");
            }
        }
    }
}
