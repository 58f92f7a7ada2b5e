//! Log-probabilities of raw logits: what scoring, evaluation and the `logprobs` of an answer are computed with.
//! Sums are in f64; −∞ logits (masked tokens) have the log-probability −∞.

/// log Σ exp(logits), in f64; −∞ if every logit is −∞ or there is none.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = logits.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
    if most == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let most = f64::from(most);
    most + logits.iter().map(|&x| (f64::from(x) - most).exp()).sum::<f64>().ln()
}

/// out ← log softmax(logits); the shorter slice decides.
pub fn log_softmax(logits: &[f32], out: &mut [f32]) {
    let total = log_sum_exp(logits);
    for (o, &x) in out.iter_mut().zip(logits) {
        *o = if x == f32::NEG_INFINITY { x } else { (f64::from(x) - total) as f32 };
    }
}

/// The log-probability of one token, or `None` for a token outside the vocabulary.
pub fn logprob(logits: &[f32], token: u32) -> Option<f32> {
    let x = *logits.get(token as usize)?;
    Some(if x == f32::NEG_INFINITY { x } else { (f64::from(x) - log_sum_exp(logits)) as f32 })
}

/// The `n` most probable tokens with their log-probabilities, the most probable first, ties by lower id; fewer if the
/// vocabulary is smaller or masked.
pub fn top_logprobs(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let total = log_sum_exp(logits);
    let mut best = Vec::new();
    super::filters::top_k(logits, n.min(logits.len()), &mut best);
    best.iter().map(|c| (c.id, (f64::from(c.logit) - total) as f32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_definition() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 7919 % 1009) as f32) * 0.02 - 3.0).collect();
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let mut out = vec![0.0; logits.len()];
        log_softmax(&logits, &mut out);
        assert!((out.iter().map(|&x| f64::from(x).exp()).sum::<f64>() - 1.0).abs() < 1e-6);
        for (i, (&x, &got)) in logits.iter().zip(&out).enumerate() {
            assert!((f64::from(got) - (f64::from(x) - sum.ln())).abs() < 1e-6);
            assert_eq!(logprob(&logits, i as u32), Some(got));
        }
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let top = top_logprobs(&logits, 20);
        let want: Vec<(u32, f32)> = order[..20].iter().map(|&i| (i as u32, out[i])).collect();
        assert_eq!(top, want);
    }

    #[test]
    fn masks_and_edges() {
        let logits = [f32::NEG_INFINITY, 2.0, 2.0, 1.0];
        assert_eq!(logprob(&logits, 0), Some(f32::NEG_INFINITY));
        assert_eq!(logprob(&logits, 4), None);
        assert_eq!(top_logprobs(&logits, 10).iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(log_sum_exp(&[]), f64::NEG_INFINITY);
        assert!((log_sum_exp(&[1e30, 1e30]) - (1e30f32 as f64)).abs() <= 1e15);
        assert!(top_logprobs(&[], 3).is_empty());
    }
}
