//! From logits to a token.
//!
//! A [`Sampler`] runs a fixed chain, that of llama.cpp's defaults:
//! logit bias → repetition, frequency, presence → DRY → top-k → typical → top-p → min-p → temperature → draw.
//! Each step is off at its neutral value, and a temperature of 0 takes the largest logit (the first of equals) after the
//! penalties. With [`Mirostat`], temperature comes after the penalties and Mirostat replaces the filters.
//!
//! The same seed and logits give the same tokens, whatever the threads: nothing here is parallel, and ties are broken by
//! id. A logit of −∞ masks a token (grammars do so); NaN and +∞ are errors. After the first call nothing allocates,
//! except that an unlimited look-back grows with the text.

mod filters;
mod logprob;
mod penalties;
mod rng;

pub use logprob::{log_softmax, log_sum_exp, logprob, top_logprobs};

use crate::{Error, Result};
use filters::Candidate;
use penalties::{Dry, History, Penalties};
use rng::Rng;

/// How tokens are chosen. The defaults are llama.cpp's; [`SamplerOptions::greedy`] takes the most probable token.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplerOptions {
    /// Divides the logits: below 1 sharpens, above 1 flattens; 0 is greedy. At least 0.
    pub temperature: f32,
    /// Keep the k most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the most probable tokens that reach this probability together; in (0, 1], 1 keeps all.
    pub top_p: f32,
    /// Keep tokens of at least this fraction of the largest probability; in [0, 1], 0 keeps all.
    pub min_p: f32,
    /// Keep the tokens of most typical surprise that exceed this probability together; in (0, 1], 1 keeps all.
    pub typical_p: f32,
    /// How many tokens back the three penalties look; 0 turns them off, `usize::MAX` is everything.
    pub penalty_last_n: usize,
    /// Divides positive and multiplies negative logits of tokens in the window; above 0, 1 is off.
    pub repeat_penalty: f32,
    /// Taken from a token's logit once per occurrence in the window; 0 is off.
    pub frequency_penalty: f32,
    /// Taken once if the token is in the window; 0 is off.
    pub presence_penalty: f32,
    /// Strength of the DRY penalty; at least 0, 0 is off.
    pub dry_multiplier: f32,
    /// Growth of the DRY penalty per repeated token; at least 1.
    pub dry_base: f32,
    /// Longest repetition that goes unpunished, plus one; at least 1.
    pub dry_allowed_length: usize,
    /// How many tokens back DRY looks; `usize::MAX` is everything.
    pub dry_last_n: usize,
    /// Token sequences across which DRY follows no repetition (line ends, quotes), tokenized by the caller.
    pub dry_sequence_breakers: Vec<Vec<u32>>,
    /// Hold the surprise of the text at a target instead of filtering.
    pub mirostat: Option<Mirostat>,
    /// Added to the logits of these tokens; −∞ bans one.
    pub logit_bias: Vec<(u32, f32)>,
    /// Start of the random sequence; `None` takes a fresh one each time.
    pub seed: Option<u64>,
}

/// Ends of clauses, which callers tokenize for [`SamplerOptions::dry_sequence_breakers`] unless they know better: those of
/// llama.cpp.
pub const DRY_BREAKERS: [&str; 4] = ["\n", ":", "\"", "*"];

/// Mirostat version 2 (Basu et al. 2021, arXiv:2007.14966).
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Mirostat {
    /// Target surprise, bits per token; above 0.
    pub tau: f32,
    /// How fast the threshold follows; in (0, 1].
    pub eta: f32,
}

impl Default for Mirostat {
    fn default() -> Mirostat {
        Mirostat { tau: 5.0, eta: 0.1 }
    }
}

impl Default for SamplerOptions {
    fn default() -> SamplerOptions {
        SamplerOptions {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            penalty_last_n: 64,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            dry_multiplier: 0.0,
            dry_base: 1.75,
            dry_allowed_length: 2,
            dry_last_n: usize::MAX,
            dry_sequence_breakers: Vec::new(),
            mirostat: None,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

impl SamplerOptions {
    /// Always the most probable token.
    pub fn greedy() -> SamplerOptions {
        SamplerOptions { temperature: 0.0, ..SamplerOptions::default() }
    }

    /// Checks every parameter; the error names the first one out of range, its value and the range.
    pub fn validate(&self, vocab: usize) -> Result<()> {
        let number = |name: &str, x: f32, ok: bool, range: &str| {
            if ok && x.is_finite() {
                return Ok(());
            }
            Err(Error::argument(format!("{name} is {x}; it must be {range}")))
        };
        let o = self;
        number("temperature", o.temperature, o.temperature >= 0.0, "finite and at least 0 (0 is greedy)")?;
        number("top_p", o.top_p, o.top_p > 0.0 && o.top_p <= 1.0, "above 0 and at most 1 (1 is off)")?;
        number("min_p", o.min_p, (0.0..=1.0).contains(&o.min_p), "from 0 to 1 (0 is off)")?;
        number("typical_p", o.typical_p, o.typical_p > 0.0 && o.typical_p <= 1.0, "above 0 and at most 1 (1 is off)")?;
        number("repeat_penalty", o.repeat_penalty, o.repeat_penalty > 0.0, "finite and above 0 (1 is off)")?;
        number("frequency_penalty", o.frequency_penalty, true, "finite (0 is off)")?;
        number("presence_penalty", o.presence_penalty, true, "finite (0 is off)")?;
        number("dry_multiplier", o.dry_multiplier, o.dry_multiplier >= 0.0, "finite and at least 0 (0 is off)")?;
        number("dry_base", o.dry_base, o.dry_base >= 1.0, "finite and at least 1")?;
        if o.dry_allowed_length == 0 {
            return Err(Error::argument("dry_allowed_length is 0; it must be at least 1"));
        }
        if let Some(m) = o.mirostat {
            number("mirostat.tau", m.tau, m.tau > 0.0, "finite and above 0, in bits per token")?;
            number("mirostat.eta", m.eta, m.eta > 0.0 && m.eta <= 1.0, "above 0 and at most 1")?;
        }
        for &(token, bias) in &o.logit_bias {
            if token as usize >= vocab {
                return Err(Error::argument(format!(
                    "logit_bias names token {token}; the vocabulary has the tokens 0 to {}",
                    vocab.saturating_sub(1)
                )));
            }
            if bias.is_nan() || bias == f32::INFINITY {
                return Err(Error::argument(format!(
                    "logit_bias of token {token} is {bias}; it must be finite, or -inf to ban the token"
                )));
            }
        }
        if vocab == 0 || vocab > u32::MAX as usize {
            return Err(Error::argument(format!("a vocabulary of {vocab} tokens cannot be sampled from")));
        }
        Ok(())
    }
}

/// Chooses tokens; holds the random state and what was accepted.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    vocab: usize,
    seed: u64,
    rng: Rng,
    history: History,
    penalties: Option<Penalties>,
    dry: Option<Dry>,
    /// Mirostat's threshold on the surprise, in bits.
    mu: f32,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler for logits of `vocab` tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] names a parameter out of range and the range.
    pub fn new(options: &SamplerOptions, vocab: usize) -> Result<Sampler> {
        options.validate(vocab)?;
        let o = options.clone();
        let active = o.repeat_penalty != 1.0 || o.frequency_penalty != 0.0 || o.presence_penalty != 0.0;
        let penalties = (active && o.penalty_last_n > 0).then(|| {
            Penalties::new(o.penalty_last_n, o.repeat_penalty, o.frequency_penalty, o.presence_penalty, vocab)
        });
        let dry = (o.dry_multiplier > 0.0 && o.dry_last_n > 0).then(|| {
            Dry::new(o.dry_multiplier, o.dry_base, o.dry_allowed_length, o.dry_last_n, &o.dry_sequence_breakers)
        });
        let look_back = penalties.as_ref().map_or(0, |p| p.last_n).max(dry.as_ref().map_or(0, |d| d.last_n));
        // Two k and one stride is what top-k uses at most; without it every token is a candidate.
        let most = if o.top_k == 0 || o.mirostat.is_some() { vocab } else { o.top_k.min(vocab) * 2 + 64 };
        let capacity = if o.temperature == 0.0 && o.mirostat.is_none() { 0 } else { most };
        let seed = o.seed.unwrap_or_else(rng::fresh_seed);
        Ok(Sampler {
            vocab,
            seed,
            rng: Rng::new(seed),
            history: History::new(look_back),
            penalties,
            dry,
            mu: o.mirostat.map_or(0.0, |m| 2.0 * m.tau),
            candidates: Vec::with_capacity(capacity),
            options: o,
        })
    }

    /// The options it was made with.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// The seed in use, for repeating a run that was started without one.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Goes on from where `other` is, which was made with the same options: its random state and accepted tokens.
    pub fn follow(&mut self, other: &Sampler) {
        self.rng = other.rng.clone();
        self.history.follow(&other.history);
        self.mu = other.mu;
    }

    /// Forgets the accepted tokens and starts the random sequence again.
    pub fn reset(&mut self) {
        self.rng = Rng::new(self.seed);
        self.history.clear();
        self.mu = self.options.mirostat.map_or(0.0, |m| 2.0 * m.tau);
    }

    /// Tells the sampler that `token` is now part of the text: the prompt's tokens and every chosen one.
    pub fn accept(&mut self, token: u32) {
        self.history.push(token);
    }

    /// Chooses a token; biases and penalties are left in `logits`. Follow it with [`accept`](Self::accept) if the token
    /// is used.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are not `vocab` logits; [`Error::Numeric`] if one is NaN or +∞, or all are −∞.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<u32> {
        if logits.len() != self.vocab {
            return Err(Error::argument(format!(
                "{} logits were given to a sampler for a vocabulary of {}",
                logits.len(),
                self.vocab
            )));
        }
        for &(token, bias) in &self.options.logit_bias {
            if let Some(x) = logits.get_mut(token as usize) {
                *x += bias;
            }
        }
        if let Some(p) = &mut self.penalties {
            p.apply(&self.history, logits);
        }
        if let Some(d) = &mut self.dry {
            d.apply(&self.history, logits);
        }
        let most = largest(logits)?;
        let greedy = self.options.temperature == 0.0;
        if greedy && self.options.mirostat.is_none() {
            return Ok(position_of(logits, most));
        }
        let chosen = match self.options.mirostat {
            Some(m) => self.mirostat(m, logits),
            None => {
                match self.options.top_k {
                    k if k > 0 && k < logits.len() => filters::top_k(logits, k, &mut self.candidates),
                    _ => filters::all(logits, &mut self.candidates),
                }
                self.draw()
            }
        };
        Ok(chosen.unwrap_or_else(|| position_of(logits, most)))
    }

    /// How many of the largest logits decide what [`Sampler::sample`] chooses: whoever has found so many may call
    /// [`Sampler::sample_among`]. 0 where all may.
    pub fn largest(&self) -> usize {
        let o = &self.options;
        if !o.logit_bias.is_empty() || self.penalties.is_some() || self.dry.is_some() || o.mirostat.is_some() {
            return 0;
        }
        match o.top_k {
            _ if o.temperature == 0.0 => 1,
            k if k < self.vocab => k,
            _ => 0,
        }
    }

    /// As [`Sampler::sample`], by the [`Sampler::largest`] logits or more of them, with their tokens: most first, of equals the
    /// lower token first.
    ///
    /// # Errors
    /// [`Error::Numeric`] if there is none above −∞, or the first is no finite number.
    pub fn sample_among(&mut self, largest: &[(u32, f32)]) -> Result<u32> {
        let first = match largest.first() {
            Some((token, logit)) if logit.is_finite() => *token,
            Some((token, logit)) => {
                return Err(Error::Numeric(format!("the largest logit, of token {token}, is {logit}")));
            }
            None => return Err(Error::Numeric("there are no logits to choose among".into())),
        };
        if self.options.temperature == 0.0 {
            return Ok(first);
        }
        self.candidates.clear();
        let open = largest.iter().take(self.options.top_k).filter(|(_, logit)| *logit > f32::NEG_INFINITY);
        self.candidates.extend(open.map(|(id, logit)| Candidate { id: *id, logit: *logit, weight: 0.0 }));
        Ok(self.draw().unwrap_or(first))
    }

    /// Filters the candidates, and draws from those that are left.
    fn draw(&mut self) -> Option<u32> {
        self.filter();
        // A subnormal temperature has no finite inverse; the smallest normal one is as good as greedy.
        filters::softmax(&mut self.candidates, 1.0 / self.options.temperature.max(f32::MIN_POSITIVE));
        filters::race(&self.candidates, self.rng.next()).map(|c| c.id)
    }

    /// Leaves in `candidates` what the filters behind top-k let through: never nothing, for each keeps the most probable token.
    fn filter(&mut self) {
        let o = &self.options;
        let list = &mut self.candidates;
        if o.typical_p < 1.0 {
            filters::typical(list, o.typical_p);
        }
        if o.top_p < 1.0 {
            filters::top_p(list, o.top_p);
        }
        if o.min_p > 0.0 {
            filters::min_p(list, o.min_p);
        }
    }

    /// Drops tokens of more than µ bits of surprise, draws, and moves µ by how far the draw was off the target.
    fn mirostat(&mut self, m: Mirostat, logits: &[f32]) -> Option<u32> {
        let list = &mut self.candidates;
        filters::all(logits, list);
        let inverse = 1.0 / self.options.temperature.max(f32::MIN_POSITIVE);
        let most = filters::softmax(list, inverse);
        let mu = self.mu;
        // The most probable token stays, whatever its surprise.
        list.retain(|c| -c.weight.log2() <= mu || c.logit == most);
        let total: f64 = list.iter().map(|c| f64::from(c.weight)).sum();
        let chosen = filters::race(list, self.rng.next())?;
        let surprise = -(f64::from(chosen.weight) / total).log2();
        self.mu -= m.eta * (surprise as f32 - m.tau);
        Some(chosen.id)
    }
}

/// The largest logit, after a check of all: the error names the first token whose logit is NaN or +∞.
fn largest(logits: &[f32]) -> Result<f32> {
    let mut most = [f32::NEG_INFINITY; 8];
    let mut valid = [true; 8];
    let (x8, tail) = logits.as_chunks::<8>();
    for x in x8 {
        for i in 0..8 {
            most[i] = if x[i] > most[i] { x[i] } else { most[i] };
            valid[i] &= x[i] <= f32::MAX;
        }
    }
    let most = most.iter().chain(tail).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m });
    if valid.contains(&false) || tail.iter().any(|x| x.is_nan() || *x == f32::INFINITY) {
        let token = logits.iter().position(|x| x.is_nan() || *x == f32::INFINITY).unwrap_or(0);
        return Err(Error::Numeric(format!(
            "the logit of token {token} is {}; the model's weights or its input are damaged",
            logits.get(token).copied().unwrap_or(f32::NAN)
        )));
    }
    if most == f32::NEG_INFINITY {
        return Err(Error::Numeric("every token is masked (all logits are -inf), so none can be chosen".into()));
    }
    Ok(most)
}

/// The first token that has the logit `most`.
fn position_of(logits: &[f32], most: f32) -> u32 {
    logits.iter().position(|&x| x == most).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests;
