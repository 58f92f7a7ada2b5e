//! Bytes of the fuzzer, read as numbers, texts and choices. Where they run out there are zeros: every input is valid.

/// What is left of an input.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `n` bytes, or as many as are left.
    pub fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }

    pub fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// A number of which a mutation of one byte makes 0, ±1, the largest or a small one as well as any.
    pub fn number(&mut self) -> i64 {
        match self.byte() {
            small @ 0..=199 => i64::from(small),
            200 => -1,
            201 => i64::from(i32::MIN),
            202 => i64::from(i32::MAX),
            203 => i64::from(u32::MAX),
            204 => i64::MAX,
            205 => i64::MIN,
            _ => {
                let bytes = self.take(4);
                bytes.iter().rev().fold(0, |n, b| n << 8 | i64::from(*b))
            }
        }
    }

    /// Bytes whose number comes first, in one byte.
    pub fn bytes(&mut self) -> &'a [u8] {
        let n = self.byte();
        self.take(usize::from(n))
    }

    /// As [`Input::bytes`], as text.
    pub fn text(&mut self) -> String {
        String::from_utf8_lossy(self.bytes()).into_owned()
    }

    /// All up to the next `end`, which is dropped, or to the end.
    pub fn until(&mut self, end: u8) -> &'a [u8] {
        let at = self.0.iter().position(|b| *b == end).unwrap_or(self.0.len());
        let taken = self.take(at);
        self.take(1);
        taken
    }
}
