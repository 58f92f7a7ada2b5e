//! Finding special tokens in text before the rest is tokenized.
//!
//! The rule is llama.cpp's: the special tokens are taken by length, longest first, and each is cut out wherever it
//! occurs in text that no longer one has taken. Done literally that is one search through the text per special token,
//! and Gemma has 6,400. Here one pass collects the places where the first bytes of some special token stand, and a heap
//! hands out the candidates in the same order: rank of the token, then position. A candidate that overlaps a taken
//! stretch makes way for the next shorter token at its place.
//!
//! Some tokens also take the ASCII white space before (`lstrip`) or after (`rstrip`) them.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::ops::Range;

/// A stretch of the input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fragment {
    /// Bytes that are still to be tokenized.
    Text(Range<usize>),
    /// A special token.
    Token(u32),
}

/// One special token.
#[derive(Debug, Clone)]
pub(super) struct Special {
    pub id: u32,
    pub text: Vec<u8>,
    /// Takes white space before it.
    pub lstrip: bool,
    /// Takes white space after it.
    pub rstrip: bool,
}

/// A set of special tokens to look for.
pub(super) struct Specials {
    /// By falling length; the index is the rank.
    tokens: Vec<Special>,
    rank: HashMap<Vec<u8>, u32>,
    /// For each first byte, the lengths of the tokens that start with it, falling.
    lengths: Vec<Vec<usize>>,
}

impl Specials {
    /// The set of `tokens`; empty texts are left out.
    pub fn new(mut tokens: Vec<Special>) -> Specials {
        tokens.retain(|token| !token.text.is_empty());
        tokens.sort_by_key(|token| Reverse(token.text.len()));
        let mut lengths = vec![Vec::new(); 256];
        let mut rank = HashMap::with_capacity(tokens.len());
        for (index, token) in tokens.iter().enumerate() {
            let of_byte = &mut lengths[usize::from(token.text[0])];
            if of_byte.last() != Some(&token.text.len()) {
                of_byte.push(token.text.len());
            }
            rank.entry(token.text.clone()).or_insert(index as u32);
        }
        Specials { tokens, rank, lengths }
    }

    /// The token with this text.
    pub fn id(&self, text: &[u8]) -> Option<u32> {
        self.rank.get(text).and_then(|&rank| self.tokens.get(rank as usize)).map(|token| token.id)
    }

    /// Cuts `text` into special tokens and what lies between them.
    pub fn partition(&self, text: &[u8]) -> Vec<Fragment> {
        let mut heap: BinaryHeap<Reverse<(u32, usize)>> =
            (0..text.len()).filter_map(|at| self.longest(text, at, usize::MAX)).map(Reverse).collect();
        if heap.is_empty() {
            return if text.is_empty() { Vec::new() } else { vec![Fragment::Text(0..text.len())] };
        }
        let mut taken = vec![false; text.len()];
        let mut found = Vec::new();
        while let Some(Reverse((rank, start))) = heap.pop() {
            let token = &self.tokens[rank as usize];
            let end = start + token.text.len();
            if taken[start] {
                continue;
            }
            if taken[start..end].contains(&true) {
                heap.extend(self.longest(text, start, token.text.len()).map(Reverse));
                continue;
            }
            let (mut left, mut right) = (start, end);
            while token.lstrip && left > 0 && !taken[left - 1] && is_c_space(text[left - 1]) {
                left -= 1;
            }
            while token.rstrip && right < text.len() && !taken[right] && is_c_space(text[right]) {
                right += 1;
            }
            taken[left..right].fill(true);
            found.push((left..right, token.id));
        }
        found.sort_by_key(|(range, _)| range.start);
        let mut fragments = Vec::with_capacity(2 * found.len() + 1);
        let mut done = 0;
        for (range, id) in found {
            if range.start > done {
                fragments.push(Fragment::Text(done..range.start));
            }
            fragments.push(Fragment::Token(id));
            done = range.end;
        }
        if done < text.len() {
            fragments.push(Fragment::Text(done..text.len()));
        }
        fragments
    }

    /// The rank of the longest token at `at` that is shorter than `limit`, with `at`.
    fn longest(&self, text: &[u8], at: usize, limit: usize) -> Option<(u32, usize)> {
        let rest = &text[at..];
        let lengths = &self.lengths[usize::from(rest[0])];
        lengths.iter().filter(|&&length| length < limit).find_map(|&length| {
            let rank = self.rank.get(rest.get(..length)?)?;
            Some((*rank, at))
        })
    }
}

/// What C's `isspace` says in the C locale.
fn is_c_space(byte: u8) -> bool {
    matches!(byte, b'\t'..=b'\r' | b' ')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specials(texts: &[&str]) -> Specials {
        let special = |(id, text): (usize, &&str)| Special {
            id: id as u32,
            text: text.as_bytes().to_vec(),
            lstrip: text.contains("mask"),
            rstrip: text.contains("end"),
        };
        Specials::new(texts.iter().enumerate().map(special).collect())
    }

    /// llama.cpp's procedure, word for word: one search per token through what is left.
    fn literal(set: &Specials, text: &[u8]) -> Vec<Fragment> {
        let mut fragments = vec![Fragment::Text(0..text.len())];
        for token in &set.tokens {
            let mut next = Vec::new();
            for fragment in fragments {
                let Fragment::Text(mut range) = fragment else {
                    next.push(fragment);
                    continue;
                };
                let find = |range: &Range<usize>| {
                    text[range.clone()].windows(token.text.len()).position(|w| w == token.text).map(|p| range.start + p)
                };
                while let Some(at) = find(&range) {
                    let mut left = range.start..at;
                    while token.lstrip && !left.is_empty() && is_c_space(text[left.end - 1]) {
                        left.end -= 1;
                    }
                    next.extend((!left.is_empty()).then_some(Fragment::Text(left)));
                    next.push(Fragment::Token(token.id));
                    range.start = at + token.text.len();
                    while token.rstrip && !range.is_empty() && is_c_space(text[range.start]) {
                        range.start += 1;
                    }
                }
                next.extend((!range.is_empty()).then_some(Fragment::Text(range)));
            }
            fragments = next;
        }
        fragments
    }

    #[test]
    fn equals_one_search_per_token() {
        let set = specials(&["<s>", "\n\n", "\n", "\n\n\n", "<mask>", "<end>", "s><", "ab", "abc", "bcde", "cd", "e"]);
        let alphabet =
            ["<s>", "\n", " ", "<mask>", "<end>", "s", ">", "<", "a", "b", "c", "d", "e", "x", "abc", "\n\n"];
        let mut state = 7u64;
        for _ in 0..4000 {
            let mut text = String::new();
            for _ in 0..state % 23 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                text.push_str(alphabet[(state >> 33) as usize % alphabet.len()]);
            }
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407) >> 1;
            let expected = if text.is_empty() { Vec::new() } else { literal(&set, text.as_bytes()) };
            assert_eq!(set.partition(text.as_bytes()), expected, "{text:?}");
        }
    }

    #[test]
    fn a_long_run_of_one_character_is_quick() {
        let runs: Vec<String> = (1..=31).map(|n| "\n".repeat(n)).collect();
        let set = specials(&runs.iter().map(String::as_str).collect::<Vec<_>>());
        let fragments = set.partition(&vec![b'\n'; 1_000_003]);
        assert_eq!(fragments.len(), 1_000_003 / 31 + 1);
    }
}
