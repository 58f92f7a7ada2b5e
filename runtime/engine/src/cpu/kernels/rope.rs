//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864): pairs of a head's dimensions turn by an angle that is
//! the position times the pair's frequency.
//!
//! The angles of a position are the same in every head and, for one kind of rope, in every layer, so they are computed
//! once per token ([`Frequencies`](crate::tape::Frequencies), in f64 and rounded once) and applied everywhere ([`rope`]).

use super::vector::by_isa;
use crate::tape::RopeStyle;

by_isa! {
    /// Turns every head of one row in place: `heads` is n_heads × `head_dim`, of which the first `2 · cos.len()`
    /// dimensions turn by the angles whose cosines and sines are given. All instruction sets give the same bits.
    pub fn rope(heads: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], style: RopeStyle) {
        rotate(heads, head_dim, cos, sin, 1.0, style);
    }
}

by_isa! {
    /// Turns back: the gradient of [`rope`] (its transpose; the inverse where the table's magnitude is 1).
    pub fn rope_backward(heads: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], style: RopeStyle) {
        rotate(heads, head_dim, cos, sin, -1.0, style);
    }
}

#[inline(always)]
fn rotate(heads: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], sign: f32, style: RopeStyle) {
    let pairs = cos.len();
    debug_assert!(head_dim > 0 && 2 * pairs <= head_dim && sin.len() == pairs && heads.len().is_multiple_of(head_dim));
    for head in heads.chunks_exact_mut(head_dim.max(1)) {
        let Some(turning) = head.get_mut(..2 * pairs) else { return };
        match style {
            RopeStyle::Halves => {
                let (first, second) = turning.split_at_mut(pairs);
                for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    let s = sign * s;
                    (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
                }
            }
            RopeStyle::Interleaved => {
                for ((pair, c), s) in turning.chunks_exact_mut(2).zip(cos).zip(sin) {
                    let (a, b, s) = (pair[0], pair[1], sign * s);
                    pair[0] = a * c - b * s;
                    pair[1] = a * s + b * c;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;
    use crate::tape::{Frequencies, RopeSpec};

    fn table(f: &Frequencies, position: usize) -> (Vec<f32>, Vec<f32>) {
        let (mut c, mut s) = (vec![0.0; f.pairs()], vec![0.0; f.pairs()]);
        f.table(position, &mut c, &mut s);
        (c, s)
    }

    #[test]
    fn turns_as_complex_numbers_do_and_back_again() {
        for (head_dim, rot_dims) in [(64, 64), (80, 80), (128, 64), (20, 14)] {
            let f = Frequencies::new(&RopeSpec::plain(RopeStyle::Halves, 10_000.0, rot_dims));
            let (c, s) = table(&f, 1234);
            let x: Vec<f32> = (0..3 * head_dim).map(|i| (i as f32 * 0.37).sin()).collect();
            for style in [RopeStyle::Halves, RopeStyle::Interleaved] {
                let mut first = None;
                for isa in Isa::available() {
                    let mut y = x.clone();
                    rope(isa, &mut y, head_dim, &c, &s, style);
                    for h in 0..3 {
                        for i in 0..rot_dims / 2 {
                            let (p, q) = match style {
                                RopeStyle::Halves => (i, i + rot_dims / 2),
                                RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                            };
                            let (p, q) = (h * head_dim + p, h * head_dim + q);
                            let angle = 1234.0 * 10_000f64.powf(-((2 * i) as f64) / rot_dims as f64);
                            let (a, b) = (f64::from(x[p]), f64::from(x[q]));
                            assert!((f64::from(y[p]) - (a * angle.cos() - b * angle.sin())).abs() < 3e-7);
                            assert!((f64::from(y[q]) - (a * angle.sin() + b * angle.cos())).abs() < 3e-7);
                        }
                        for i in rot_dims..head_dim {
                            assert_eq!(y[h * head_dim + i], x[h * head_dim + i]);
                        }
                    }
                    assert_eq!(first.get_or_insert(y.clone()), &y);
                    rope_backward(isa, &mut y, head_dim, &c, &s, style);
                    assert!(y.iter().zip(&x).all(|(y, x)| (y - x).abs() < 5e-7));
                }
            }
        }
    }
}
