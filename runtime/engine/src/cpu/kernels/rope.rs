//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864): pairs of a head's dimensions turn by an angle that is
//! the position times the pair's frequency.
//!
//! The angles of a position are the same in every head and, for one kind of rope, in every layer, so they are computed
//! once per token ([`Frequencies::table`], in f64 and rounded once) and applied everywhere ([`rope`]). Frequency scaling
//! follows llama.cpp's `rope_yarn`, with which GGUF's `rope.scaling.*` keys are defined: linear interpolation, YaRN
//! (Peng et al. 2023, arXiv:2309.00071) and per-pair divisors (`rope_freqs.weight`: Llama 3).

use super::vector::by_isa;

/// Which dimensions of a head form pair i of `rot_dims / 2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// (i, i + rot_dims / 2): GPT-NeoX, Qwen, Gemma.
    Halves,
    /// (2i, 2i + 1): the LLaMA files' permuted weights, ChatGLM.
    Interleaved,
}

/// What the frequencies are computed from. [`RopeParams::plain`] is the unscaled form.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeParams {
    /// θ: 10,000 in the paper (`rope.freq_base`).
    pub base: f64,
    /// Dimensions that turn, even, at most the head's (`rope.dimension_count`).
    pub rot_dims: usize,
    /// 1 / (scaling factor): positions are multiplied by it.
    pub freq_scale: f64,
    /// 0 without YaRN, 1 with: how much of the extrapolated angle is mixed in for the fast pairs.
    pub ext_factor: f64,
    /// Factor on cosine and sine besides YaRN's own 1 + 0.1·ln(1 / freq_scale).
    pub attn_factor: f64,
    /// YaRN: turns over the original context above which a pair extrapolates.
    pub beta_fast: f64,
    /// YaRN: turns over the original context below which a pair interpolates.
    pub beta_slow: f64,
    /// The context length the model was trained with.
    pub original_context: usize,
}

impl RopeParams {
    /// No scaling.
    pub fn plain(base: f64, rot_dims: usize) -> RopeParams {
        RopeParams {
            base,
            rot_dims,
            freq_scale: 1.0,
            ext_factor: 0.0,
            attn_factor: 1.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_context: 0,
        }
    }
}

/// The angle per position of every pair, in f64, and the factor on cosine and sine.
#[derive(Clone, Debug)]
pub struct Frequencies {
    per_position: Vec<f64>,
    magnitude: f64,
}

impl Frequencies {
    /// Frequencies of `params`; `factors`, if given, are divisors, one per pair (missing ones count as 1).
    pub fn new(params: &RopeParams, factors: Option<&[f32]>) -> Frequencies {
        let p = params;
        let pairs = p.rot_dims / 2;
        let (low, high) = correction_range(p);
        let per_position = (0..pairs)
            .map(|i| {
                let factor = factors.and_then(|f| f.get(i)).map_or(1.0, |&f| f64::from(f));
                let extrapolated = p.base.powf(-2.0 * i as f64 / p.rot_dims as f64) / factor;
                let interpolated = p.freq_scale * extrapolated;
                if p.ext_factor == 0.0 {
                    return interpolated;
                }
                let ramp = 1.0 - ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                let mix = ramp * p.ext_factor;
                interpolated * (1.0 - mix) + extrapolated * mix
            })
            .collect();
        let yarn = if p.ext_factor == 0.0 { 1.0 } else { 1.0 + 0.1 * (1.0 / p.freq_scale).ln() };
        Frequencies { per_position, magnitude: p.attn_factor * yarn }
    }

    /// Pairs, half the rotated dimensions: the length of one position's cosines.
    pub fn pairs(&self) -> usize {
        self.per_position.len()
    }

    /// Cosines and sines of `position`, [`pairs`](Self::pairs) of each.
    pub fn table(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        debug_assert!(cos.len() == self.pairs() && sin.len() == self.pairs());
        for ((c, s), f) in cos.iter_mut().zip(sin).zip(&self.per_position) {
            let (sine, cosine) = (position as f64 * f).sin_cos();
            *c = (cosine * self.magnitude) as f32;
            *s = (sine * self.magnitude) as f32;
        }
    }
}

/// The pairs between which YaRN goes from extrapolating to interpolating.
fn correction_range(p: &RopeParams) -> (f64, f64) {
    let dims = p.rot_dims as f64;
    let pair_of = |turns: f64| {
        let context = p.original_context as f64;
        dims * (context / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * p.base.ln())
    };
    (pair_of(p.beta_fast).floor().max(0.0), pair_of(p.beta_slow).ceil().min(dims - 1.0))
}

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
    debug_assert!(head_dim > 0 && 2 * pairs <= head_dim && sin.len() == pairs && heads.len() % head_dim == 0);
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

    fn table(f: &Frequencies, position: usize) -> (Vec<f32>, Vec<f32>) {
        let (mut c, mut s) = (vec![0.0; f.pairs()], vec![0.0; f.pairs()]);
        f.table(position, &mut c, &mut s);
        (c, s)
    }

    #[test]
    fn turns_as_complex_numbers_do_and_back_again() {
        for (head_dim, rot_dims) in [(64, 64), (80, 80), (128, 64), (20, 14)] {
            let f = Frequencies::new(&RopeParams::plain(10_000.0, rot_dims), None);
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

    /// Ratios of the scaled to the plain frequencies: linear is the factor itself; YaRN keeps the fastest pairs,
    /// interpolates the slowest and lies between on its ramp.
    #[test]
    fn scaling_changes_the_frequencies_as_defined() {
        let plain = RopeParams::plain(10_000.0, 64);
        let base = Frequencies::new(&plain, None);
        let linear = Frequencies::new(&RopeParams { freq_scale: 0.25, ..plain }, None);
        let yarn_params = RopeParams { freq_scale: 0.25, ext_factor: 1.0, original_context: 4096, ..plain };
        let yarn = Frequencies::new(&yarn_params, None);
        let ratio = |f: &Frequencies| -> Vec<f64> {
            f.per_position.iter().zip(&base.per_position).map(|(a, b)| a / b).collect()
        };
        assert!(ratio(&linear).iter().all(|r| (r - 0.25).abs() < 1e-12));
        assert_eq!(correction_range(&yarn_params), (10.0, 23.0));
        let r = ratio(&yarn);
        assert!(r[..=10].iter().all(|r| (r - 1.0).abs() < 1e-12) && r[23..].iter().all(|r| (r - 0.25).abs() < 1e-12));
        assert!(r.windows(2).all(|w| w[0] >= w[1] - 1e-12) && (r[16] - (1.0 - 0.75 * 6.0 / 13.0)).abs() < 1e-12);
        assert!((yarn.magnitude - (1.0 + 0.1 * 4f64.ln())).abs() < 1e-12);
        let factors: Vec<f32> = (0..32).map(|i| 1.0 + i as f32).collect();
        let divided = Frequencies::new(&plain, Some(&factors));
        assert!(ratio(&divided).iter().enumerate().all(|(i, r)| (r * (1 + i) as f64 - 1.0).abs() < 1e-12));
    }
}
