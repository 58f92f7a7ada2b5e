//! Byte strings by number, and numbers by byte string.
//!
//! A vocabulary is up to a quarter of a million short byte strings. They lie end to end in one [`Arena`] (one buffer,
//! one table of ends), so that loading a vocabulary allocates twice, not once per token. [`WordMap`] is the way back: an
//! open-addressing table of arena numbers that compares with the bytes in the arena and so stores no key of its own.
//!
//! Layout of a slot: the upper 32 bits are a part of the hash, the lower 32 the entry's number plus one; 0 is free. Half
//! of the slots stay free, so a probe ends quickly. The hash is seeded per map: a file cannot be made to collide.
//! Used by the tokenizer only.

use std::hash::{BuildHasher, RandomState};

/// Byte strings stored end to end, addressed by number in order of insertion.
#[derive(Default)]
pub(super) struct Arena {
    bytes: Vec<u8>,
    /// Where each string ends in `bytes`; it starts where the one before it ends.
    ends: Vec<u32>,
}

impl Arena {
    /// An arena with room for `count` strings of `bytes` bytes together.
    pub fn with_capacity(count: usize, bytes: usize) -> Arena {
        Arena { bytes: Vec::with_capacity(bytes), ends: Vec::with_capacity(count) }
    }

    /// The number of strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// String `index`, or an empty one if there is none.
    pub fn get(&self, index: u32) -> &[u8] {
        let index = index as usize;
        let Some(&end) = self.ends.get(index) else { return &[] };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// Appends a string that `write` produces at the end of the buffer it is given.
    pub fn push_with(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        write(&mut self.bytes);
        self.ends.push(self.bytes.len() as u32);
    }

    /// Appends `string`.
    pub fn push(&mut self, string: &[u8]) {
        self.push_with(|bytes| bytes.extend_from_slice(string));
    }
}

/// An [`Arena`] whose strings can be looked up.
pub(super) struct WordMap {
    arena: Arena,
    slots: Vec<u64>,
    seed: u64,
    longest: usize,
}

impl WordMap {
    /// The strings of `arena`, indexed. Of equal strings the last wins; empty ones cannot be found.
    pub fn new(arena: Arena) -> WordMap {
        let slots = vec![0; (arena.len() * 2).next_power_of_two().max(16)];
        let mut map = WordMap { arena, slots, seed: RandomState::new().hash_one(0u8), longest: 0 };
        for index in 0..map.arena.len() as u32 {
            map.insert(index);
        }
        map
    }

    /// The number of strings, those that cannot be found included.
    pub fn len(&self) -> usize {
        self.arena.len()
    }

    /// String `index`.
    pub fn word(&self, index: u32) -> &[u8] {
        self.arena.get(index)
    }

    /// The number of `word`.
    pub fn get(&self, word: &[u8]) -> Option<u32> {
        if word.is_empty() || word.len() > self.longest {
            return None;
        }
        let hash = hash(self.seed, word);
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let slot = self.slots[at];
            if slot == 0 {
                return None;
            }
            let index = slot as u32 - 1;
            if slot >> 32 == hash >> 32 && self.arena.get(index) == word {
                return Some(index);
            }
            at = (at + 1) & mask;
        }
    }

    /// The number of `word`, which is added if it is new.
    pub fn get_or_add(&mut self, word: &[u8]) -> u32 {
        if let Some(index) = self.get(word) {
            return index;
        }
        let index = self.arena.len() as u32;
        self.arena.push(word);
        if self.arena.len() * 2 > self.slots.len() {
            self.slots = vec![0; self.slots.len() * 2];
            for index in 0..self.arena.len() as u32 {
                self.insert(index);
            }
        } else {
            self.insert(index);
        }
        index
    }

    fn insert(&mut self, index: u32) {
        let word = self.arena.get(index);
        if word.is_empty() {
            return;
        }
        self.longest = self.longest.max(word.len());
        let hash = hash(self.seed, word);
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        while self.slots[at] != 0 {
            let slot = self.slots[at];
            if slot >> 32 == hash >> 32 && self.arena.get(slot as u32 - 1) == word {
                break;
            }
            at = (at + 1) & mask;
        }
        self.slots[at] = (hash >> 32 << 32) | u64::from(index + 1);
    }
}

/// Multiplies and folds 8 bytes at a time; every bit of the words and the length reaches every bit of the result.
fn hash(seed: u64, word: &[u8]) -> u64 {
    let mut state = seed ^ (word.len() as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut chunks = word.chunks_exact(8);
    for chunk in &mut chunks {
        state = mix(state ^ u64::from_le_bytes(chunk.try_into().unwrap_or_default()));
    }
    let mut last = 0u64;
    for &byte in chunks.remainder() {
        last = last << 8 | u64::from(byte);
    }
    mix(state ^ last)
}

/// Folds the 128-bit product with an odd constant to 64 bits.
pub(super) fn mix(x: u64) -> u64 {
    let product = u128::from(x ^ 0xA076_1D64_78BD_642F) * 0xE703_7ED1_A0B4_28DB_u128;
    (product >> 64) as u64 ^ product as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_put_in() {
        let mut arena = Arena::default();
        for i in 0..5000u32 {
            arena.push(format!("word {i}").as_bytes());
        }
        arena.push(b"");
        arena.push(b"word 7");
        let mut map = WordMap::new(arena);
        for i in (0..5000u32).filter(|&i| i != 7) {
            assert_eq!(map.get(format!("word {i}").as_bytes()), Some(i));
        }
        assert_eq!(map.get(b"word 7"), Some(5001), "the last of equal strings wins");
        assert_eq!((map.get(b""), map.get(b"word"), map.get(b"a word longer than any")), (None, None, None));
        for i in 0..20_000u32 {
            let index = map.get_or_add(&i.to_le_bytes());
            assert_eq!(map.word(index), i.to_le_bytes());
            assert_eq!(map.get(&i.to_le_bytes()), Some(index));
        }
        assert_eq!(map.len(), 25_002);
    }
}
