//! The two formulas of weight-decomposed adapters (DoRA, arXiv:2402.09353) that learning, inference and merging share:
//! the length of an adapted row, and the factor that gives the row its learned length.

/// `‖w + scale·b·A‖`, in double precision; `w` is a row of the matrix and `b` the row of `B` that belongs to it, `A` is
/// `[b.len(), w.len()]`. The row is changed to the sum.
pub fn adapted_norm(w: &mut [f32], scale: f32, b: &[f32], a: &[f32]) -> f32 {
    for (b, a) in b.iter().zip(a.chunks_exact(w.len().max(1))) {
        let c = scale * b;
        w.iter_mut().zip(a).for_each(|(w, a)| *w += c * a);
    }
    w.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt() as f32
}

/// The factor on a row of length `norm` that is to have length `magnitude`; a row of zeros has no direction to scale.
pub fn magnitude_ratio(magnitude: f32, norm: f32) -> f32 {
    if norm > 0.0 { magnitude / norm } else { 0.0 }
}
