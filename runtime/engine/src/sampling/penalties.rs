//! What earlier tokens do to the logits: repetition, frequency and presence penalties, and DRY.
//!
//! All look back over the accepted tokens ([`History`]). The three penalties are those of llama.cpp: a token in the
//! window has its logit divided by `repeat` if positive and multiplied if not (Keskar et al. 2019, arXiv:1909.05858),
//! then loses count × `frequency` + `presence` (OpenAI's definition). DRY ("don't repeat yourself", by p-e-w) takes from
//! each token that would lengthen a repetition of the last tokens: multiplier × base^(length − allowed length).

/// The tokens accepted so far, as many as the longest look-back asks for.
#[derive(Clone, Debug)]
pub(super) struct History {
    tokens: Vec<u32>,
    keep: usize,
}

impl History {
    pub fn new(keep: usize) -> History {
        History { tokens: Vec::with_capacity(if keep <= 1 << 16 { 2 * keep } else { 0 }), keep }
    }

    pub fn push(&mut self, token: u32) {
        if self.keep == 0 {
            return;
        }
        // Room for twice as many: moving them down costs one move per token.
        if self.tokens.len() >= self.keep.saturating_mul(2) {
            self.tokens.drain(..self.tokens.len() - self.keep + 1);
        }
        self.tokens.push(token);
    }

    pub fn last(&self, n: usize) -> &[u32] {
        &self.tokens[self.tokens.len() - n.min(self.tokens.len())..]
    }

    /// Takes over what `other` holds, without allocating where there is room.
    pub fn follow(&mut self, other: &History) {
        self.tokens.clone_from(&other.tokens);
    }

    pub fn clear(&mut self) {
        self.tokens.clear();
    }
}

/// Repetition, frequency and presence penalties, with the counts they need.
#[derive(Clone, Debug)]
pub(super) struct Penalties {
    pub last_n: usize,
    pub repeat: f32,
    pub frequency: f32,
    pub presence: f32,
    /// How often each token of the vocabulary is in the window; all 0 between calls.
    counts: Vec<u32>,
}

impl Penalties {
    pub fn new(last_n: usize, repeat: f32, frequency: f32, presence: f32, vocab: usize) -> Penalties {
        Penalties { last_n, repeat, frequency, presence, counts: vec![0; vocab] }
    }

    pub fn apply(&mut self, history: &History, logits: &mut [f32]) {
        let window = history.last(self.last_n);
        for &token in window {
            if let Some(n) = self.counts.get_mut(token as usize) {
                *n += 1;
            }
        }
        for &token in window {
            let (Some(n), Some(x)) = (self.counts.get_mut(token as usize), logits.get_mut(token as usize)) else {
                continue;
            };
            // Taking the count leaves 0, so a token is penalized once, and the counts are clean for the next call.
            let n = std::mem::take(n);
            if n > 0 {
                *x = if *x > 0.0 { *x / self.repeat } else { *x * self.repeat };
                *x -= n as f32 * self.frequency + self.presence;
            }
        }
    }
}

/// The DRY penalty and its scratch.
#[derive(Clone, Debug)]
pub(super) struct Dry {
    pub multiplier: f32,
    pub base: f32,
    pub allowed_length: usize,
    pub last_n: usize,
    pub breakers: Vec<Vec<u32>>,
    /// The window, the last token first.
    recent: Vec<u32>,
    /// Z-function of `recent`: how many of the last tokens are repeated at each place.
    repeats: Vec<usize>,
    /// (token, length of the repetition it would continue).
    continues: Vec<(u32, usize)>,
}

impl Dry {
    pub fn new(multiplier: f32, base: f32, allowed_length: usize, last_n: usize, breakers: &[Vec<u32>]) -> Dry {
        let breakers = breakers.iter().filter(|b| !b.is_empty()).cloned().collect();
        let (recent, repeats, continues) = (vec![], vec![], vec![]);
        Dry { multiplier, base, allowed_length, last_n, breakers, recent, repeats, continues }
    }

    pub fn apply(&mut self, history: &History, logits: &mut [f32]) {
        self.recent.clear();
        self.recent.extend(history.last(self.last_n).iter().rev());
        // With the window, not when there is a first repetition to note: that may come at any token.
        let window = self.recent.len();
        self.repeats.reserve(window.saturating_sub(self.repeats.len()));
        self.continues.reserve(window.saturating_sub(self.continues.len()));
        let limit = self.tokens_since_breaker();
        if limit < self.allowed_length {
            return;
        }
        z_function(&self.recent, &mut self.repeats);
        self.continues.clear();
        for (i, &length) in self.repeats.iter().enumerate().skip(1) {
            let length = length.min(limit);
            if length >= self.allowed_length {
                // recent[i] ends an earlier copy of the last tokens; recent[i - 1] came after it.
                self.continues.push((self.recent[i - 1], length));
            }
        }
        // The longest repetition of each token last, so that the next token differs or the list ends.
        self.continues.sort_unstable();
        for (i, &(token, length)) in self.continues.iter().enumerate() {
            if self.continues.get(i + 1).is_some_and(|next| next.0 == token)
                || self.breakers.iter().any(|b| *b == [token])
            {
                continue;
            }
            if let Some(x) = logits.get_mut(token as usize) {
                let exponent = (length - self.allowed_length) as f32;
                // Held below infinity: the token becomes hopeless, not masked.
                *x -= (self.multiplier * self.base.powf(exponent)).min(1e30);
            }
        }
    }

    /// Tokens after the last sequence breaker in the window: no repetition is followed across it.
    fn tokens_since_breaker(&self) -> usize {
        let recent = &self.recent;
        // i counts tokens behind the breaker's first; the nearest breaker wins, of those that start there the longest.
        (0..recent.len())
            .find_map(|i| {
                let matches =
                    |b: &&Vec<u32>| b.len() <= i + 1 && b.iter().enumerate().all(|(j, t)| recent[i - j] == *t);
                self.breakers.iter().filter(matches).map(Vec::len).max().map(|longest| i + 1 - longest)
            })
            .unwrap_or(recent.len())
    }
}

/// z[i] ← the length of the longest common prefix of `s` and `s[i..]`, in linear time (Gusfield 1997); z[0] is 0.
fn z_function(s: &[u32], z: &mut Vec<usize>) {
    z.clear();
    z.resize(s.len(), 0);
    // s[left..right] is the rightmost stretch known to equal a prefix.
    let (mut left, mut right) = (0, 0);
    for i in 1..s.len() {
        if i < right {
            z[i] = z[i - left].min(right - i);
        }
        while i + z[i] < s.len() && s[z[i]] == s[i + z[i]] {
            z[i] += 1;
        }
        if i + z[i] > right {
            (left, right) = (i, i + z[i]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::rng::Rng;

    fn history(tokens: &[u32]) -> History {
        let mut h = History::new(100);
        tokens.iter().for_each(|&t| h.push(t));
        h
    }

    #[test]
    fn history_keeps_the_last_tokens() {
        let mut h = History::new(5);
        let capacity = h.tokens.capacity();
        for t in 0..1000 {
            h.push(t);
            let want: Vec<u32> = (0..=t).rev().take(5).collect::<Vec<_>>().into_iter().rev().collect();
            assert_eq!(h.last(5), want);
        }
        assert_eq!(h.tokens.capacity(), capacity);
        assert_eq!(h.last(2), [998, 999]);
    }

    #[test]
    fn penalties_agree_with_their_definition() {
        let mut p = Penalties::new(4, 2.0, 0.5, 0.25, 6);
        // 1 is out of the window of four, and 9 out of the vocabulary.
        let h = history(&[1, 3, 3, 9, 4]);
        for _ in 0..2 {
            let mut logits = [1.0, 1.0, 1.0, 1.0, -1.0, f32::NEG_INFINITY];
            p.apply(&h, &mut logits);
            assert_eq!(logits, [1.0, 1.0, 1.0, 0.5 - 1.25, -2.0 - 0.75, f32::NEG_INFINITY]);
        }
    }

    #[test]
    fn dry_takes_from_the_token_that_would_repeat() {
        let mut dry = Dry::new(0.8, 1.75, 2, 100, &[]);
        let mut logits = [0.0; 8];
        // "1 2 3" was followed by 4; now "1 2 3" again: 4 would continue a repetition of three.
        dry.apply(&history(&[1, 2, 3, 4, 5, 1, 2, 3]), &mut logits);
        let mut want = [0.0; 8];
        want[4] = -0.8 * 1.75;
        assert_eq!(logits, want);
        // With 2 as a breaker only "3" is left, which is shorter than allowed.
        let mut logits = [0.0; 8];
        Dry::new(0.8, 1.75, 2, 100, &[vec![2]]).apply(&history(&[1, 2, 3, 4, 5, 1, 2, 3]), &mut logits);
        assert_eq!(logits, [0.0; 8]);
        // A breaker of two tokens; what follows it is "3 6".
        let mut logits = [0.0; 8];
        Dry::new(0.8, 1.75, 1, 100, &[vec![1, 2]]).apply(&history(&[1, 2, 3, 6, 4, 1, 2, 3, 6]), &mut logits);
        assert_eq!(logits[4], -0.8 * 1.75);
        // A token that is a breaker itself is left alone.
        let mut logits = [0.0; 8];
        Dry::new(0.8, 1.75, 2, 100, &[vec![4]]).apply(&history(&[1, 2, 3, 4, 5, 1, 2, 3]), &mut logits);
        assert_eq!(logits, [0.0; 8]);
    }

    /// Every earlier place where the last tokens occur, found by comparing, on random tokens of a small alphabet.
    #[test]
    fn dry_agrees_with_the_naive_search() {
        let mut rng = Rng::new(7);
        for round in 0..300 {
            let n = 1 + (rng.uniform() * 60.0) as usize;
            let tokens: Vec<u32> = (0..n).map(|_| (rng.uniform() * 3.0) as u32).collect();
            let allowed = 1 + round % 4;
            let breaker: Vec<u32> = (0..1 + round % 3).map(|_| (rng.uniform() * 3.0) as u32).collect();
            let breakers = if round % 2 == 0 { vec![] } else { vec![breaker.clone()] };
            let mut logits = [0.0f32; 3];
            Dry::new(1.0, 2.0, allowed, 40, &breakers).apply(&history(&tokens), &mut logits);
            let window = &tokens[n - n.min(40)..];
            let w = window.len();
            let since = if breakers.is_empty() {
                w
            } else {
                (0..w).rev().find(|&i| window[i..].starts_with(&breaker)).map_or(w, |i| w - i - breaker.len())
            };
            let mut longest = [0usize; 3];
            for next in 1..w {
                let length = (0..next).take_while(|&j| window[next - 1 - j] == window[w - 1 - j]).count().min(since);
                let t = window[next] as usize;
                longest[t] = longest[t].max(length);
            }
            for t in 0..3 {
                let spared = longest[t] < allowed || breakers.iter().any(|b| *b == [t as u32]);
                let want = if spared { 0.0 } else { -2f32.powi((longest[t] - allowed) as i32) };
                assert_eq!(logits[t], want, "{window:?} allowed {allowed} {breakers:?} token {t}");
            }
        }
    }
}
