//! The `llama` tokenizer: SentencePiece's BPE by scores, as in Llama 2, Gemma and Mistral.
//!
//! The text (with `▁` for every space) is cut into characters; then, again and again, the two neighbours whose
//! concatenation is the token with the best score are joined, the leftmost pair first among equals, until no two
//! neighbours make a token. Characters that are no token fall back to their bytes, `<0x00>` to `<0xFF>`. A heap holds the
//! candidate pairs; an entry that a later merge made stale is known by its length. Time is n log n in the characters.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::unicode::sequence_length;
use super::words::WordMap;

/// The vocabulary of a score-driven tokenizer.
pub(super) struct Spm {
    /// Token texts as in the file; the number is the token.
    pub words: WordMap,
    /// A score per token, never NaN.
    pub scores: Vec<f32>,
    /// The token for each byte.
    pub bytes: [Option<u32>; 256],
}

/// A stretch of the text in a doubly linked list; of length 0 once it has been joined to its left neighbour.
struct Symbol {
    start: usize,
    length: usize,
    previous: usize,
    next: usize,
}

/// No neighbour.
const NONE: usize = usize::MAX;

/// Two neighbours that make a token.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    length: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}
impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Pair {}

impl Spm {
    /// Appends the tokens of `text`, in which spaces are already `▁`.
    pub fn encode(&self, text: &[u8], out: &mut Vec<u32>) {
        let mut symbols = Vec::with_capacity(text.len());
        let mut start = 0;
        while start < text.len() {
            let length = sequence_length(text[start]).min(text.len() - start);
            let index = symbols.len();
            let next = if start + length < text.len() { index + 1 } else { NONE };
            symbols.push(Symbol { start, length, previous: index.checked_sub(1).unwrap_or(NONE), next });
            start += length;
        }
        let mut pairs = BinaryHeap::with_capacity(symbols.len());
        pairs.extend((1..symbols.len()).filter_map(|right| self.pair(text, &symbols, right - 1, right)));
        while let Some(Pair { left, right, length, .. }) = pairs.pop() {
            let joined = symbols[left].length + symbols[right].length;
            if symbols[left].length == 0 || symbols[right].length == 0 || joined != length {
                continue;
            }
            let next = symbols[right].next;
            symbols[right].length = 0;
            symbols[left].length = joined;
            symbols[left].next = next;
            if let Some(symbol) = symbols.get_mut(next) {
                symbol.previous = left;
            }
            pairs.extend(self.pair(text, &symbols, symbols[left].previous, left));
            pairs.extend(self.pair(text, &symbols, left, next));
        }
        for symbol in symbols.iter().filter(|symbol| symbol.length > 0) {
            let word = &text[symbol.start..symbol.start + symbol.length];
            match self.words.get(word) {
                Some(token) => out.push(token),
                None => out.extend(word.iter().filter_map(|&byte| self.bytes[usize::from(byte)])),
            }
        }
    }

    fn pair(&self, text: &[u8], symbols: &[Symbol], left: usize, right: usize) -> Option<Pair> {
        let (first, second) = (symbols.get(left)?, symbols.get(right)?);
        let length = first.length + second.length;
        let token = self.words.get(&text[first.start..first.start + length])?;
        Some(Pair { score: self.scores.get(token as usize).copied().unwrap_or(0.0), left, right, length })
    }
}
