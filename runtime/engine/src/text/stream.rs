//! UTF-8 from tokens: whole characters as soon as they are complete.
//!
//! A character may be spread over several tokens (half of an emoji's bytes in each). [`Utf8Stream`] keeps the bytes of
//! an unfinished character back and gives out the rest; bytes that can no longer become a character turn into U+FFFD
//! at once, one for each maximal invalid part, as in `String::from_utf8_lossy`.

/// Collects bytes and gives out whole UTF-8.
#[derive(Debug, Clone, Default)]
pub struct Utf8Stream {
    /// The beginning of a character, at most 3 bytes.
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// An empty stream.
    pub fn new() -> Utf8Stream {
        Utf8Stream::default()
    }

    /// Adds `bytes`; what is complete now goes to the end of `text`.
    pub fn push(&mut self, bytes: &[u8], text: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut kept = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            let is_last = chunk.invalid().as_ptr_range().end == self.pending.as_ptr_range().end;
            if is_last && could_grow(chunk.invalid()) {
                kept = chunk.invalid().len();
            } else if !chunk.invalid().is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - kept);
    }

    /// Ends the stream: an unfinished character becomes U+FFFD at the end of `text`.
    pub fn finish(&mut self, text: &mut String) {
        text.push_str(&String::from_utf8_lossy(&self.pending));
        self.pending.clear();
    }
}

/// Whether `bytes`, an invalid part that ends the input, is the beginning of a character.
fn could_grow(bytes: &[u8]) -> bool {
    // `error_len` is `None` exactly where more bytes could help.
    std::str::from_utf8(bytes).is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
}

/// Length in bytes of the longest end of `text` that is a proper start of `mark`.
pub(crate) fn overlap(text: &str, mark: &str) -> usize {
    mark.char_indices().map(|(i, _)| i).skip(1).filter(|n| text.ends_with(&mark[..*n])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_finds_the_longest_started_mark() {
        assert_eq!(overlap("abc<|e", "<|end|>"), 3);
        assert_eq!(overlap("abc", "<|end|>"), 0);
        assert_eq!(overlap("答", "答案"), 3);
        assert_eq!(overlap("aab", "abab"), 2);
    }

    #[test]
    fn any_cut_gives_the_same_text() {
        let inputs: [&[u8]; 5] = [
            "a€😀中文é".as_bytes(),
            b"\xF0\x9F\x98\x80\xF0\x9F\x98",
            b"a\xFFb\xE4\xBD\xC3\xA9\x80",
            b"\xED\xA0\x80\xC0\x80\xF5\x80",
            b"\xE4\xBDz\xF0\x9Fz",
        ];
        for input in inputs {
            for size in 1..=input.len() {
                let mut stream = Utf8Stream::new();
                let mut text = String::new();
                input.chunks(size).for_each(|chunk| stream.push(chunk, &mut text));
                stream.finish(&mut text);
                assert_eq!(text, String::from_utf8_lossy(input), "{input:?} by {size}");
            }
        }
    }

    #[test]
    fn waits_only_while_waiting_can_help() {
        let mut stream = Utf8Stream::new();
        let steps: [(&[u8], &str); 6] = [
            (b"x\xF0\x9F", "x"),
            (b"\x98", ""),
            (b"\x80", "😀"),
            (b"\xE4", ""),
            (b"a", "\u{FFFD}a"),
            (b"\x80", "\u{FFFD}"),
        ];
        for (bytes, want) in steps {
            let mut text = String::new();
            stream.push(bytes, &mut text);
            assert_eq!(text, want);
        }
        let mut text = String::new();
        stream.finish(&mut text);
        assert_eq!(text, "");
    }
}
