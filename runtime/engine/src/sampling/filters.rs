//! The filters that cut a distribution down: top-k, locally typical, top-p, min-p, and the draw from what is left.
//!
//! They work on a list of candidates. None sorts the vocabulary: top-k keeps a buffer of at most 2k and a rising
//! threshold; the cumulative filters look for the place of their cut by halving, in pieces that quadruple
//! ([`keep_until`]). Order is by logit, ties by lower id, so the result is unique. Tokens with a logit of −∞
//! are masked and never become candidates. Nothing allocates once the list has its capacity.

use std::cmp::Ordering;

use crate::random::splitmix64;

/// A token that may still be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub id: u32,
    pub logit: f32,
    /// Scratch of the filter at work: a probability or a distance.
    pub weight: f32,
}

impl Candidate {
    fn new((id, &logit): (usize, &f32)) -> Candidate {
        Candidate { id: id as u32, logit, weight: 0.0 }
    }
}

/// The most probable first, ties by lower id.
pub(super) fn by_logit(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// All tokens but the masked ones, in the order of ids.
pub(super) fn all(logits: &[f32], out: &mut Vec<Candidate>) {
    out.clear();
    out.extend(logits.iter().enumerate().filter(|(_, x)| **x > f32::NEG_INFINITY).map(Candidate::new));
}

/// The `k` most probable tokens, in order; needs capacity for 2k + 64 to stay free of allocation.
pub(super) fn top_k(logits: &[f32], k: usize, out: &mut Vec<Candidate>) {
    /// Logits that are passed over by one vectorized comparison.
    const STRIDE: usize = 32;
    out.clear();
    if k == 0 {
        return;
    }
    let room = k.saturating_add(k.max(STRIDE));
    let mut threshold = f32::NEG_INFINITY;
    for (c, chunk) in logits.chunks(STRIDE).enumerate() {
        if !chunk.iter().fold(false, |any, &x| any | (x > threshold)) {
            continue;
        }
        for (i, x) in chunk.iter().enumerate() {
            // Equal to the threshold is not enough: an earlier id holds that place.
            if *x > threshold {
                out.push(Candidate::new((c * STRIDE + i, x)));
            }
        }
        if out.len() > room {
            out.select_nth_unstable_by(k - 1, by_logit);
            out.truncate(k);
            threshold = out[k - 1].logit;
        }
    }
    if out.len() > k {
        out.select_nth_unstable_by(k - 1, by_logit);
        out.truncate(k);
    }
    out.sort_unstable_by(by_logit);
}

/// Sets the weights to softmax(logit · `inverse_temperature`); returns the largest logit.
pub(super) fn softmax(candidates: &mut [Candidate], inverse_temperature: f32) -> f32 {
    let most = candidates.iter().fold(f32::NEG_INFINITY, |m, c| m.max(c.logit));
    let mut sum = 0.0f64;
    for c in candidates.iter_mut() {
        c.weight = ((c.logit - most) * inverse_temperature).exp();
        sum += f64::from(c.weight);
    }
    let inverse = (1.0 / sum) as f32;
    candidates.iter_mut().for_each(|c| c.weight *= inverse);
    most
}

/// Keeps the first candidates in `order` up to the one with which the sum of `share` is `reached`, or all of them.
///
/// As in a quickselect, a piece is split off the front, summed, and halved only if the cut lies in it; what is kept is
/// left in no order, but in the same one for the same list.
fn keep_until(
    candidates: &mut Vec<Candidate>,
    order: impl Fn(&Candidate, &Candidate) -> Ordering,
    share: impl Fn(&Candidate) -> f64,
    reached: impl Fn(f64) -> bool,
) {
    /// Pieces up to this are sorted.
    const SMALL: usize = 64;
    let (mut start, mut end) = (0, candidates.len());
    let (mut sum, mut piece) = (0.0, 4 * SMALL);
    while end - start > SMALL {
        let middle = start + piece.min((end - start) / 2);
        candidates[start..end].select_nth_unstable_by(middle - start, &order);
        let added: f64 = candidates[start..middle].iter().map(&share).sum();
        if reached(sum + added) {
            end = middle;
        } else {
            (start, sum, piece) = (middle, sum + added, 4 * piece);
        }
    }
    candidates[start..end].sort_unstable_by(&order);
    let last = candidates[start..end].iter().position(|c| {
        sum += share(c);
        reached(sum)
    });
    // Without a place inside, the cut is at the end: there `reached` was found true, or there is nothing beyond.
    candidates.truncate(last.map_or(end, |i| start + i + 1));
}

/// The most probable tokens whose probabilities reach `p` together (Holtzman et al. 2020, arXiv:1904.09751).
pub(super) fn top_p(candidates: &mut Vec<Candidate>, p: f32) {
    softmax(candidates, 1.0);
    keep_until(candidates, by_logit, |c| f64::from(c.weight), |sum| sum >= f64::from(p));
}

/// Tokens of at least `p` times the probability of the most probable (Nguyen et al. 2024, arXiv:2407.01082).
pub(super) fn min_p(candidates: &mut Vec<Candidate>, p: f32) {
    let most = candidates.iter().fold(f32::NEG_INFINITY, |m, c| m.max(c.logit));
    let least = most + p.ln();
    candidates.retain(|c| c.logit >= least);
}

/// Locally typical sampling (Meister et al. 2023, arXiv:2202.00666): the tokens whose surprise is nearest to the
/// entropy, until their probabilities exceed `p` together.
pub(super) fn typical(candidates: &mut Vec<Candidate>, p: f32) {
    let most = f64::from(softmax(candidates, 1.0));
    // ln p(c) = logit − most − ln Σ: through the logits, for a probability may round to 0.
    let log_sum = candidates.iter().map(|c| (f64::from(c.logit) - most).exp()).sum::<f64>().ln();
    let surprise = |c: &Candidate| most + log_sum - f64::from(c.logit);
    let entropy: f64 = candidates.iter().map(|c| f64::from(c.weight) * surprise(c)).sum();
    for c in candidates.iter_mut() {
        c.weight = (surprise(c) - entropy).abs() as f32;
    }
    let nearest = |a: &Candidate, b: &Candidate| a.weight.total_cmp(&b.weight).then(by_logit(a, b));
    keep_until(candidates, nearest, |c| (-surprise(c)).exp(), |sum| sum > f64::from(p));
}

/// One candidate, with a probability in proportion to its weight: each runs a race whose time is exponential with its
/// weight for rate, by a number of its own that follows from `key` and its id (the Gumbel trick in another form).
///
/// So the order of the list is of no account, and lists that are nearly alike give the same token for the same key with a
/// probability of at least (1 − d)/(1 + d), d being the distance of their distributions in total variation (Daliri et al.
/// 2024, arXiv:2408.07978): a draft model's guess is likely to be the token that is drawn.
pub(super) fn race(candidates: &[Candidate], key: u64) -> Option<Candidate> {
    let mut best: Option<(f64, Candidate)> = None;
    for c in candidates.iter().filter(|c| c.weight > 0.0) {
        let rate = f64::from(c.weight);
        let u = ((splitmix64(key, u64::from(c.id)) >> 11) as f64 + 0.5) * (0.5f64).powi(53);
        // −ln u is at least 1 − u: most have lost without a logarithm.
        if best.is_some_and(|(time, _)| 1.0 - u > time * rate) {
            continue;
        }
        let time = -u.ln() / rate;
        if best.is_none_or(|(least, _)| time < least) {
            best = Some((time, *c));
        }
    }
    best.map(|(_, c)| c).or(candidates.first().copied())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::rng::Rng;

    fn random_logits(n: usize, seed: u64, spread: f32) -> Vec<f32> {
        let mut rng = Rng::new(seed);
        // Rounded to a grid, so that there are ties.
        (0..n)
            .map(|i| match i % 17 {
                3 => f32::NEG_INFINITY,
                _ => (((rng.uniform() + rng.uniform() - 1.0) as f32 * spread) * 64.0).round() / 64.0,
            })
            .collect()
    }

    /// (id, probability), most probable first, ties by id: everything sorted, everything in f64.
    fn sorted(logits: &[f32]) -> Vec<(u32, f64)> {
        let most = logits.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
        let exp = |x: f32| (f64::from(x) - f64::from(most)).exp();
        let sum: f64 = logits.iter().map(|&x| exp(x)).sum();
        let mut all: Vec<_> = logits.iter().enumerate().map(|(i, &x)| (i as u32, exp(x) / sum)).collect();
        all.retain(|c| logits[c.0 as usize] > f32::NEG_INFINITY);
        all.sort_by(|a, b| logits[b.0 as usize].total_cmp(&logits[a.0 as usize]).then(a.0.cmp(&b.0)));
        all
    }

    fn ids(mut ids: Vec<u32>) -> Vec<u32> {
        ids.sort();
        ids
    }

    fn cases() -> impl Iterator<Item = Vec<f32>> {
        [(1, 1.0), (2, 5.0), (50, 3.0), (1000, 1.0), (1000, 20.0), (5000, 8.0), (20000, 0.5)]
            .into_iter()
            .flat_map(|(n, spread)| (0..4).map(move |seed| random_logits(n, seed + 10, spread)))
    }

    #[test]
    fn top_k_agrees_with_sorting() {
        for logits in cases() {
            for k in [1, 2, 7, 40, 300, 5000, 100_000] {
                let mut got = Vec::with_capacity(2 * k + 64);
                let capacity = got.capacity();
                top_k(&logits, k, &mut got);
                let got_ids: Vec<u32> = got.iter().map(|c| c.id).collect();
                let want: Vec<u32> = sorted(&logits).iter().take(k).map(|c| c.0).collect();
                assert_eq!(got_ids, want, "k = {k}");
                assert_eq!(got.capacity(), capacity, "no allocation");
            }
        }
    }

    #[test]
    fn top_p_agrees_with_sorting() {
        for logits in cases() {
            for p in [1e-6, 0.1, 0.5, 0.9, 0.999] {
                let mut got = vec![];
                all(&logits, &mut got);
                top_p(&mut got, p);
                let mut sum = 0.0;
                let mut want = vec![];
                for (id, q) in sorted(&logits) {
                    want.push(id);
                    sum += q;
                    if sum >= f64::from(p) {
                        break;
                    }
                }
                // The weights are f32: where the sum comes within 1e-6 of p, either cut is right.
                let difference = got.len().abs_diff(want.len());
                let slack = sorted(&logits).iter().filter(|c| c.1 < 1e-6).count().min(3);
                assert!(difference <= slack, "p = {p}: {} for {}", got.len(), want.len());
                got.sort_by(by_logit);
                let n = got.len().min(want.len());
                assert_eq!(got[..n].iter().map(|c| c.id).collect::<Vec<_>>(), want[..n]);
            }
        }
    }

    #[test]
    fn min_p_agrees_with_its_definition() {
        for logits in cases() {
            for p in [0.01, 0.05, 0.5, 1.0] {
                let mut got = vec![];
                all(&logits, &mut got);
                min_p(&mut got, p);
                let reference = sorted(&logits);
                let most = reference.first().map_or(0.0, |c| c.1);
                let want = reference.iter().filter(|c| c.1 >= f64::from(p) * most * (1.0 - 1e-6)).map(|c| c.0);
                assert_eq!(ids(got.iter().map(|c| c.id).collect()), ids(want.collect()));
            }
        }
    }

    #[test]
    fn typical_agrees_with_sorting() {
        for logits in cases() {
            for p in [0.1, 0.5, 0.9] {
                let mut got = vec![];
                all(&logits, &mut got);
                typical(&mut got, p);
                let mut reference = sorted(&logits);
                let entropy: f64 = -reference.iter().map(|c| c.1 * c.1.ln()).sum::<f64>();
                let distance = |q: f64| (-q.ln() - entropy).abs();
                reference.sort_by(|a, b| distance(a.1).total_cmp(&distance(b.1)));
                let (mut sum, mut n) = (0.0, 0usize);
                for (_, q) in &reference {
                    n += 1;
                    sum += q;
                    if sum > f64::from(p) {
                        break;
                    }
                }
                // Ties in distance may be cut in either order: compare the furthest distance that is kept.
                let furthest = distance(reference.get(n.wrapping_sub(1)).map_or(1.0, |c| c.1));
                reference.sort_by_key(|c| c.0);
                let of = |c: &Candidate| {
                    reference.binary_search_by_key(&c.id, |r| r.0).map_or(0.0, |i| distance(reference[i].1))
                };
                assert!(got.len().abs_diff(n) <= 1, "p = {p}: {} for {n}", got.len());
                assert!(got.iter().all(|c| of(c) <= furthest + 1e-5));
            }
        }
    }

    #[test]
    fn races_are_won_in_proportion_to_the_weights() {
        let c = |id, weight| Candidate { id, logit: 0.0, weight };
        let list = [c(0, 0.0), c(1, 2.0), c(2, 1e-3), c(3, 6.0), c(4, 0.0), c(9, 4.0)];
        let reversed: Vec<Candidate> = list.iter().rev().copied().collect();
        let mut counts = [0.0; 10];
        const RACES: u64 = 60_000;
        for key in 0..RACES {
            let winner = race(&list, splitmix64(7, key)).unwrap();
            assert_eq!(race(&reversed, splitmix64(7, key)), Some(winner), "the order is of no account");
            counts[winner.id as usize] += 1.0;
        }
        for c in list {
            let p = f64::from(c.weight) / 12.001;
            let (mean, deviation) = (p * RACES as f64, (p * (1.0 - p) * RACES as f64).sqrt());
            assert!((counts[c.id as usize] - mean).abs() <= 4.0 * deviation + 1.0, "{c:?}: {counts:?}");
        }
        assert_eq!(race(&[], 1), None);
        assert_eq!(race(&[c(5, 0.0)], 1).map(|c| c.id), Some(5));
    }

    #[test]
    fn lists_that_are_nearly_alike_give_the_same_token() {
        let mut rng = Rng::new(3);
        let one: Vec<Candidate> =
            (0..40).map(|id| Candidate { id, logit: 0.0, weight: 0.9f32.powi(id as i32) }).collect();
        let mut other = one.clone();
        other.iter_mut().for_each(|c| c.weight *= 1.0 + 0.1 * (rng.uniform() as f32 - 0.5));
        let sum = |list: &[Candidate]| list.iter().map(|c| f64::from(c.weight)).sum::<f64>();
        let (a, b) = (sum(&one), sum(&other));
        let apart = |(x, y): (&Candidate, &Candidate)| (f64::from(x.weight) / a - f64::from(y.weight) / b).abs();
        let distance = 0.5 * one.iter().zip(&other).map(apart).sum::<f64>();
        let same = (0..20_000).filter(|key| {
            race(&one, splitmix64(1, *key)).map(|c| c.id) == race(&other, splitmix64(1, *key)).map(|c| c.id)
        });
        let share = same.count() as f64 / 20_000.0;
        let least = (1.0 - distance) / (1.0 + distance);
        assert!(share > least - 0.01 && distance > 0.01, "{share} for {least}");
    }
}
