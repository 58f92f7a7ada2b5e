//! The chain as a whole: its distribution, its edges, and the errors of its parameters.

use super::*;

fn logits(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..n).map(|_| (rng.uniform() * 8.0) as f32).collect()
}

/// Everything off but the temperature.
fn open(temperature: f32) -> SamplerOptions {
    SamplerOptions { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed: Some(42), ..SamplerOptions::default() }
}

/// χ² of `n` draws against `want`; buckets of few expected draws are put together.
fn chi_square(options: &SamplerOptions, logits: &[f32], want: &[f64], n: usize) -> (f64, usize) {
    let mut sampler = Sampler::new(options, logits.len()).unwrap();
    let mut seen = vec![0usize; logits.len()];
    for _ in 0..n {
        seen[sampler.sample(&mut logits.to_vec()).unwrap() as usize] += 1;
    }
    let (mut chi, mut buckets, mut rest) = (0.0, 0, (0.0, 0.0));
    for (&count, &p) in seen.iter().zip(want) {
        let expected = p * n as f64;
        assert!(p > 0.0 || count == 0, "a token that was filtered out was drawn");
        if expected < 8.0 {
            rest = (rest.0 + expected, rest.1 + count as f64);
            continue;
        }
        chi += (count as f64 - expected).powi(2) / expected;
        buckets += 1;
    }
    if rest.0 > 8.0 {
        chi += (rest.1 - rest.0).powi(2) / rest.0;
        buckets += 1;
    }
    (chi, buckets - 1)
}

/// The chain after the penalties, in f64 with everything sorted: the probability of each token.
fn reference(o: &SamplerOptions, logits: &[f32]) -> Vec<f64> {
    let softmax = |list: &[(usize, f64)]| -> Vec<f64> {
        let most = list.iter().fold(f64::NEG_INFINITY, |m, c| m.max(c.1));
        let sum: f64 = list.iter().map(|c| (c.1 - most).exp()).sum();
        list.iter().map(|c| (c.1 - most).exp() / sum).collect()
    };
    let mut list: Vec<(usize, f64)> = logits.iter().map(|&x| f64::from(x)).enumerate().collect();
    list.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if o.top_k > 0 {
        list.truncate(o.top_k);
    }
    let until = |p: f64, probabilities: &[f64]| {
        let mut sum = 0.0;
        let last = probabilities.iter().position(|q| {
            sum += q;
            sum >= p
        });
        last.map_or(probabilities.len(), |i| i + 1)
    };
    if o.typical_p < 1.0 {
        let p = softmax(&list);
        let entropy: f64 = -p.iter().map(|p| p * p.ln()).sum::<f64>();
        let mut order: Vec<usize> = (0..list.len()).collect();
        order.sort_by(|&a, &b| (-p[a].ln() - entropy).abs().total_cmp(&(-p[b].ln() - entropy).abs()));
        order.truncate(until(f64::from(o.typical_p), &order.iter().map(|&i| p[i]).collect::<Vec<_>>()));
        order.sort();
        list = order.iter().map(|&i| list[i]).collect();
    }
    if o.top_p < 1.0 {
        let n = until(f64::from(o.top_p), &softmax(&list));
        list.truncate(n);
    }
    if o.min_p > 0.0 {
        let p = softmax(&list);
        let n = p.iter().filter(|q| **q >= f64::from(o.min_p) * p[0]).count();
        list.truncate(n);
    }
    list.iter_mut().for_each(|c| c.1 /= f64::from(o.temperature));
    let mut out = vec![0.0; logits.len()];
    for (c, p) in list.iter().zip(softmax(&list)) {
        out[c.0] = p;
    }
    out
}

#[test]
fn draws_follow_the_distribution() {
    let all = [
        open(1.0),
        open(0.5),
        open(2.0),
        SamplerOptions { top_k: 10, ..open(1.0) },
        SamplerOptions { top_p: 0.8, ..open(1.5) },
        SamplerOptions { min_p: 0.2, ..open(1.0) },
        SamplerOptions { typical_p: 0.7, ..open(1.0) },
        SamplerOptions { top_k: 50, typical_p: 0.95, top_p: 0.9, min_p: 0.05, ..open(0.8) },
    ];
    for (i, options) in all.iter().enumerate() {
        let x = logits(120, i as u64);
        let (chi, freedom) = chi_square(options, &x, &reference(options, &x), 40_000);
        // χ² has mean f and variance 2f: four deviations up is one in ten thousand or so, and the seed is fixed.
        let bound = freedom as f64 + 4.0 * (2.0 * freedom as f64).sqrt();
        assert!(chi < bound, "{options:?}: χ² = {chi} with {freedom} degrees of freedom");
    }
    // The test can fail: draws at temperature 1 do not follow the distribution of temperature 0.9.
    let x = logits(120, 0);
    let (chi, freedom) = chi_square(&open(1.0), &x, &reference(&open(0.9), &x), 40_000);
    assert!(chi > 2.0 * freedom as f64);
}

#[test]
fn greedy_is_the_first_of_the_largest() {
    let mut sampler = Sampler::new(&SamplerOptions::greedy(), 151_936).unwrap();
    for seed in 0..5 {
        let mut x = logits(151_936, seed);
        let want = (0..x.len()).fold(0, |best, i| if x[i] > x[best] { i } else { best });
        assert_eq!(sampler.sample(&mut x).unwrap() as usize, want);
        x[want + 3] = x[want];
        assert_eq!(sampler.sample(&mut x).unwrap() as usize, want);
    }
    let mut tiny = Sampler::new(&open(1e-42), 50).unwrap();
    let mut one = Sampler::new(&SamplerOptions { top_k: 1, ..open(1.0) }, 50).unwrap();
    let x = logits(50, 3);
    let want = sampler_greedy(&x);
    assert_eq!(tiny.sample(&mut x.clone()).unwrap(), want);
    assert_eq!(one.sample(&mut x.clone()).unwrap(), want);
}

fn sampler_greedy(x: &[f32]) -> u32 {
    Sampler::new(&SamplerOptions::greedy(), x.len()).unwrap().sample(&mut x.to_vec()).unwrap()
}

#[test]
fn a_seed_repeats_and_a_reset_starts_over() {
    let options = SamplerOptions {
        repeat_penalty: 1.1,
        dry_multiplier: 0.8,
        mirostat: None,
        seed: Some(9),
        ..SamplerOptions::default()
    };
    let run = |s: &mut Sampler| -> Vec<u32> {
        (0..200)
            .map(|i| {
                let token = s.sample(&mut logits(500, i)).unwrap();
                s.accept(token);
                token
            })
            .collect()
    };
    let mut a = Sampler::new(&options, 500).unwrap();
    let first = run(&mut a);
    assert_eq!(run(&mut Sampler::new(&options, 500).unwrap()), first);
    a.reset();
    assert_eq!(run(&mut a), first);
    let other = SamplerOptions { seed: Some(10), ..options.clone() };
    assert_ne!(run(&mut Sampler::new(&other, 500).unwrap()), first);
    let fresh = Sampler::new(&SamplerOptions { seed: None, ..options }, 500).unwrap();
    let mut again = Sampler::new(&SamplerOptions { seed: Some(fresh.seed()), ..fresh.options().clone() }, 500).unwrap();
    assert_eq!(run(&mut fresh.clone()), run(&mut again));
}

#[test]
fn nothing_allocates_after_the_start() {
    let x = logits(30_000, 1);
    for options in [
        SamplerOptions { seed: Some(1), ..SamplerOptions::default() },
        SamplerOptions { top_p: 0.9, typical_p: 0.9, ..open(1.0) },
        SamplerOptions { mirostat: Some(Mirostat::default()), ..open(1.0) },
    ] {
        let mut sampler = Sampler::new(&options, x.len()).unwrap();
        let before = (sampler.candidates.capacity(), sampler.candidates.as_ptr());
        for _ in 0..20 {
            let token = sampler.sample(&mut x.clone()).unwrap();
            sampler.accept(token);
        }
        assert_eq!((sampler.candidates.capacity(), sampler.candidates.as_ptr()), before);
    }
}

#[test]
fn bias_and_masks_decide() {
    let mut x = logits(20, 1);
    let best = sampler_greedy(&x);
    let banned = SamplerOptions { logit_bias: vec![(best, f32::NEG_INFINITY), (7, 100.0)], ..SamplerOptions::greedy() };
    assert_eq!(
        Sampler::new(&banned, 20).unwrap().sample(&mut x).unwrap(),
        if best == 7 { sampler_greedy(&x) } else { 7 }
    );
    // Only token 5 is allowed: every chain must choose it.
    for options in [
        open(1.0),
        SamplerOptions::default(),
        SamplerOptions::greedy(),
        SamplerOptions { typical_p: 0.5, ..open(1.0) },
        SamplerOptions { mirostat: Some(Mirostat::default()), ..open(1.0) },
    ] {
        let mut x = vec![f32::NEG_INFINITY; 20];
        x[5] = -1e30;
        assert_eq!(Sampler::new(&options, 20).unwrap().sample(&mut x).unwrap(), 5);
    }
}

#[test]
fn repetition_is_penalized_in_the_chain() {
    let x = [5.0f32, 4.5, 0.0, -1.0];
    let options = SamplerOptions { repeat_penalty: 1.5, ..SamplerOptions::greedy() };
    let mut sampler = Sampler::new(&options, 4).unwrap();
    assert_eq!(sampler.sample(&mut x.clone()).unwrap(), 0);
    sampler.accept(0);
    assert_eq!(sampler.sample(&mut x.clone()).unwrap(), 1);
    sampler.accept(9); // not in the vocabulary: no harm
    assert_eq!(sampler.sample(&mut x.clone()).unwrap(), 1);
}

/// The mean surprise of the draws, measured in the truncated distribution as the algorithm does, comes to the target.
#[test]
fn mirostat_holds_its_target() {
    let x: Vec<f32> = (0..2000).map(|i| -((i + 1) as f32).ln() * 1.1).collect();
    for tau in [2.0, 4.0] {
        let options = SamplerOptions { mirostat: Some(Mirostat { tau, eta: 0.1 }), ..open(1.0) };
        let mut sampler = Sampler::new(&options, x.len()).unwrap();
        let mut moved = 0.0f64;
        for i in 0..5000 {
            let before = sampler.mu;
            sampler.sample(&mut x.clone()).unwrap();
            if i >= 1000 {
                // µ moves by η·(τ − surprise).
                moved += f64::from(tau) - f64::from(sampler.mu - before) / 0.1;
            }
        }
        assert!((moved / 4000.0 - f64::from(tau)).abs() < 0.1, "mean surprise {} for {tau}", moved / 4000.0);
    }
}

#[test]
fn damaged_logits_are_errors() {
    for options in [open(1.0), SamplerOptions::default(), SamplerOptions::greedy()] {
        let mut sampler = Sampler::new(&options, 100).unwrap();
        for (bad, at) in [(f32::NAN, 17), (f32::INFINITY, 98), (f32::NAN, 99)] {
            let mut x = logits(100, 1);
            x[at] = bad;
            let error = sampler.sample(&mut x).unwrap_err();
            assert!(matches!(&error, Error::Numeric(s) if s.contains(&format!("token {at}"))), "{error}");
        }
        let error = sampler.sample(&mut [f32::NEG_INFINITY; 100]).unwrap_err();
        assert!(matches!(&error, Error::Numeric(s) if s.contains("masked")), "{error}");
        assert!(matches!(sampler.sample(&mut [0.0; 99]), Err(Error::Argument(_))));
        // And it goes on working.
        assert!(sampler.sample(&mut logits(100, 2)).is_ok());
    }
}

#[test]
fn parameters_out_of_range_are_named() {
    let d = SamplerOptions::default;
    let bad = [
        ("temperature", SamplerOptions { temperature: -0.1, ..d() }),
        ("temperature", SamplerOptions { temperature: f32::NAN, ..d() }),
        ("top_p", SamplerOptions { top_p: 0.0, ..d() }),
        ("top_p", SamplerOptions { top_p: 1.01, ..d() }),
        ("min_p", SamplerOptions { min_p: -0.5, ..d() }),
        ("typical_p", SamplerOptions { typical_p: 0.0, ..d() }),
        ("repeat_penalty", SamplerOptions { repeat_penalty: 0.0, ..d() }),
        ("frequency_penalty", SamplerOptions { frequency_penalty: f32::INFINITY, ..d() }),
        ("presence_penalty", SamplerOptions { presence_penalty: f32::NAN, ..d() }),
        ("dry_multiplier", SamplerOptions { dry_multiplier: -1.0, ..d() }),
        ("dry_base", SamplerOptions { dry_base: 0.5, ..d() }),
        ("dry_allowed_length", SamplerOptions { dry_allowed_length: 0, ..d() }),
        ("mirostat.tau", SamplerOptions { mirostat: Some(Mirostat { tau: 0.0, eta: 0.1 }), ..d() }),
        ("mirostat.eta", SamplerOptions { mirostat: Some(Mirostat { tau: 5.0, eta: 1.5 }), ..d() }),
        ("logit_bias", SamplerOptions { logit_bias: vec![(100, 1.0)], ..d() }),
        ("logit_bias", SamplerOptions { logit_bias: vec![(1, f32::NAN)], ..d() }),
    ];
    for (name, options) in bad {
        let error = Sampler::new(&options, 100).unwrap_err();
        assert!(matches!(&error, Error::Argument(s) if s.starts_with(name)), "{name}: {error}");
    }
    assert!(matches!(Sampler::new(&d(), 0), Err(Error::Argument(_))));
    assert!(Sampler::new(&d(), 1).unwrap().sample(&mut [-3.0]).is_ok_and(|t| t == 0));
}
