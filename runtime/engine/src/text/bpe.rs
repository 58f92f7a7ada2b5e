//! Byte-pair encoding by a list of merges (`tokenizer.ggml.model = gpt2`).
//!
//! GGUF spells tokens in GPT-2's byte alphabet, in which each byte is one printable character (the space is `Ġ`). The
//! spelling is undone once at loading: here words, tokens and merges are plain bytes, a symbol is a number, and a merge
//! is one look-up of a pair of numbers that gives its rank and the number of the result. (With `raw`, for Gemma 4, tokens
//! are UTF-8 already and the first symbols are characters.)
//!
//! A word is merged as in the original: the pair of lowest rank first, the leftmost among equals. Candidates lie in a
//! heap, symbols in a linked list; an entry that a later merge made stale is known by its symbols. Merge results that
//! are no token have numbers above the vocabulary and fall apart into bytes at the end.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasher, Hasher, RandomState};

use super::unicode::sequence_length;
use super::words::{WordMap, mix};

/// A symbol that no merge knows.
const UNKNOWN: u32 = u32::MAX;

/// What two symbols become.
#[derive(Clone, Copy)]
struct Merge {
    rank: u32,
    result: u32,
}

/// The vocabulary of a merge-driven tokenizer.
pub(super) struct Bpe {
    /// Tokens by number, then merge results that are no token.
    words: WordMap,
    /// The number of tokens.
    tokens: u32,
    merges: HashMap<(u32, u32), Merge, PairHasher>,
    /// The symbol of each byte.
    bytes: [u32; 256],
    /// With `raw`: the token `<0xXX>` of each byte.
    byte_tokens: [Option<u32>; 256],
    /// First symbols are characters, not bytes.
    raw: bool,
}

/// Buffers for [`Bpe::encode`], kept between words.
#[derive(Default)]
pub(super) struct Scratch {
    symbols: Vec<Symbol>,
    pairs: BinaryHeap<Reverse<Pair>>,
}

/// A stretch of the word; of length 0 once it has been joined to its left neighbour.
struct Symbol {
    word: u32,
    start: u32,
    length: u32,
    previous: u32,
    next: u32,
}

/// A possible merge. The order of the fields is the order of merging.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    rank: u32,
    left: u32,
    right: u32,
    words: (u32, u32),
    result: u32,
}

impl Bpe {
    /// Builds the table of merges over `words`, whose numbers are the tokens. Each merge is `left right` in the byte
    /// alphabet (or UTF-8, with `raw`), the most important first; one that is malformed can never apply and is skipped.
    pub fn new(mut words: WordMap, merges: &[impl AsRef<[u8]>], raw: bool) -> Bpe {
        let tokens = words.len() as u32;
        let bytes = std::array::from_fn(|byte| words.get_or_add(&[byte as u8]));
        let byte_tokens = std::array::from_fn(|byte| words.get(format!("<0x{byte:02X}>").as_bytes()));
        let seed = RandomState::new().hash_one(0u8);
        let mut table = HashMap::with_capacity_and_hasher(merges.len(), PairHasher(seed));
        let (mut both, mut expected) = (Vec::new(), 0);
        for (rank, merge) in merges.iter().enumerate() {
            let merge = merge.as_ref();
            let Some(space) = merge.iter().skip(1).position(|&byte| byte == b' ') else { continue };
            let (left, right) = (&merge[..space + 1], &merge[space + 2..]);
            both.clear();
            let spelt = |text: &[u8], out: &mut Vec<u8>| {
                if raw {
                    out.extend_from_slice(text);
                    true
                } else {
                    from_alphabet(text, out)
                }
            };
            if !spelt(left, &mut both) {
                continue;
            }
            let middle = both.len();
            if !spelt(right, &mut both) || middle == both.len() {
                continue;
            }
            let pair = (words.get_or_add(&both[..middle]), words.get_or_add(&both[middle..]));
            // Most vocabularies list tokens in the order of the merges that make them: try the next one first.
            let result = if words.word(expected) == both { expected } else { words.get_or_add(&both) };
            expected = result + 1;
            table.entry(pair).or_insert(Merge { rank: rank as u32, result });
        }
        Bpe { words, tokens, merges: table, bytes, byte_tokens, raw }
    }

    /// The token that is exactly `word`.
    pub fn token(&self, word: &[u8]) -> Option<u32> {
        self.words.get(word).filter(|&number| number < self.tokens)
    }

    /// Appends the tokens of one word.
    pub fn encode(&self, word: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        let Scratch { symbols, pairs } = scratch;
        symbols.clear();
        pairs.clear();
        let mut start = 0;
        while start < word.len() {
            let length = if self.raw { sequence_length(word[start]).min(word.len() - start) } else { 1 };
            let text = &word[start..start + length];
            let number =
                if length == 1 { self.bytes[usize::from(text[0])] } else { self.words.get(text).unwrap_or(UNKNOWN) };
            let index = symbols.len() as u32;
            symbols.push(Symbol {
                word: number,
                start: start as u32,
                length: length as u32,
                previous: index.wrapping_sub(1),
                next: index + 1,
            });
            start += length;
        }
        pairs.extend((1..symbols.len() as u32).filter_map(|right| self.pair(symbols, right - 1, right)));
        while let Some(Reverse(pair)) = pairs.pop() {
            let (left, right) = (pair.left as usize, pair.right as usize);
            // A joined symbol keeps its number but has no length.
            if symbols[left].length == 0
                || symbols[right].length == 0
                || (symbols[left].word, symbols[right].word) != pair.words
            {
                continue;
            }
            let next = symbols[right].next;
            symbols[left].length += symbols[right].length;
            symbols[left].word = pair.result;
            symbols[left].next = next;
            symbols[right].length = 0;
            if let Some(symbol) = symbols.get_mut(next as usize) {
                symbol.previous = pair.left;
            }
            pairs.extend(self.pair(symbols, symbols[left].previous, pair.left));
            pairs.extend(self.pair(symbols, pair.left, next));
        }
        for symbol in symbols.iter().filter(|symbol| symbol.length > 0) {
            if symbol.word < self.tokens {
                out.push(symbol.word);
            } else {
                let start = symbol.start as usize;
                self.fall_back(&word[start..start + symbol.length as usize], out);
            }
        }
    }

    fn pair(&self, symbols: &[Symbol], left: u32, right: u32) -> Option<Reverse<Pair>> {
        let words = (symbols.get(left as usize)?.word, symbols.get(right as usize)?.word);
        let &Merge { rank, result } = self.merges.get(&words)?;
        Some(Reverse(Pair { rank, left, right, words, result }))
    }

    /// The tokens of a symbol that is none. As in llama.cpp, a byte without a token is dropped, and in the byte alphabet
    /// only bytes that stand for themselves can have one.
    fn fall_back(&self, text: &[u8], out: &mut Vec<u32>) {
        for &byte in text {
            let token = if self.raw {
                self.byte_tokens[usize::from(byte)]
            } else {
                Some(self.bytes[usize::from(byte)]).filter(|&token| token < self.tokens && byte.is_ascii_graphic())
            };
            out.extend(token);
        }
    }
}

/// Undoes GPT-2's spelling of bytes as characters. False, with `out` as it was, if `text` is not in that alphabet.
pub(super) fn from_alphabet(text: &[u8], out: &mut Vec<u8>) -> bool {
    let before = out.len();
    let Ok(text) = std::str::from_utf8(text) else { return false };
    for c in text.chars() {
        let byte = match c as u32 {
            code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => code,
            // The other 68 bytes, in order: controls and the space; DEL to the no-break space; the soft hyphen.
            code @ 0x100..=0x120 => code - 0x100,
            code @ 0x121..=0x142 => code - 0x121 + 0x7F,
            0x143 => 0xAD,
            _ => {
                out.truncate(before);
                return false;
            }
        };
        out.push(byte as u8);
    }
    true
}

/// Hashes pairs of symbol numbers; seeded, so that a file cannot be made to collide.
#[derive(Clone, Copy)]
struct PairHasher(u64);

impl BuildHasher for PairHasher {
    type Hasher = PairHash;
    fn build_hasher(&self) -> PairHash {
        PairHash { seed: self.0, pair: 0 }
    }
}

/// The state of hashing one pair: both numbers in one word.
struct PairHash {
    seed: u64,
    pair: u64,
}

impl Hasher for PairHash {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.pair = self.pair.rotate_left(8) ^ u64::from(byte);
        }
    }
    fn write_u32(&mut self, number: u32) {
        self.pair = self.pair.rotate_left(32) ^ u64::from(number);
    }
    fn finish(&self) -> u64 {
        mix(self.seed ^ self.pair)
    }
}

#[cfg(test)]
mod tests {
    use super::super::words::Arena;
    use super::*;

    fn bpe(tokens: &[&str], merges: &[&str]) -> Bpe {
        let mut arena = Arena::default();
        for token in tokens {
            arena.push_with(|out| {
                from_alphabet(token.as_bytes(), out);
            });
        }
        Bpe::new(WordMap::new(arena), merges, false)
    }

    fn encode(bpe: &Bpe, word: &str) -> Vec<u32> {
        let mut out = Vec::new();
        bpe.encode(word.as_bytes(), &mut Scratch::default(), &mut out);
        out
    }

    #[test]
    fn the_alphabet_covers_every_byte_once() {
        let mut seen = [false; 256];
        for code in 0x21..=0x143 {
            let mut out = Vec::new();
            let c = char::from_u32(code).unwrap();
            if from_alphabet(c.encode_utf8(&mut [0; 4]).as_bytes(), &mut out) {
                assert!(!std::mem::replace(&mut seen[usize::from(out[0])], true));
            }
        }
        assert_eq!(seen, [true; 256]);
        let mut out = vec![1];
        assert!(!from_alphabet("ab▁".as_bytes(), &mut out));
        assert_eq!(out, [1]);
    }

    #[test]
    fn merges_by_rank_then_from_the_left() {
        let bpe = bpe(&["a", "b", "c", "ab", "bc", "aa", "Ġa", "Ġ"], &["b c", "a b", "a a", "Ġ a"]);
        assert_eq!(encode(&bpe, "abc"), [0, 4]);
        assert_eq!(encode(&bpe, "ab"), [3]);
        assert_eq!(encode(&bpe, "aaa"), [5, 0]);
        assert_eq!(encode(&bpe, " a a"), [6, 6]);
        assert_eq!(encode(&bpe, " b"), [7, 1]);
    }

    #[test]
    fn results_that_are_no_token_fall_apart() {
        let bpe = bpe(&["a", "b", "abab"], &["a b", "ab ab"]);
        assert_eq!(encode(&bpe, "abab"), [2]);
        assert_eq!(encode(&bpe, "ab"), [0, 1]);
        assert_eq!(encode(&bpe, "aéb"), [0, 1], "bytes without a token are dropped");
    }

    #[test]
    fn malformed_merges_are_skipped() {
        let bpe = bpe(&["a", "b", "ab"], &["", " ", "a", "a ", " b", "▁ a", "a b"]);
        assert_eq!(encode(&bpe, "ab"), [2]);
    }
}
