//! Text as the pre-tokenizers see it: code points with their Unicode class.
//!
//! A [`Glyph`] packs a code point (low 21 bits) and its class flags (above) in 4 bytes, so that a splitter walks a plain
//! slice and tests bits. The classes are those of Unicode 15.1, exactly: the version is part of what a tokenizer *is* (a
//! letter that a later Unicode added would be split differently), hence the pinned `unicode-properties`. Its classes
//! were compared with llama.cpp's table over all 1,114,112 code points: no difference.
//!
//! Invalid UTF-8 is read as llama.cpp reads it: each byte that does not start a well-formed sequence becomes U+FFFD;
//! overlong forms are re-encoded, surrogates kept. [`Text`] holds the bytes after that, which the glyphs' widths fit.

use std::borrow::Cow;

use unicode_properties::{GeneralCategoryGroup, UnicodeGeneralCategory};

/// Class flag: letter, `\p{L}`.
pub(super) const L: u32 = 1 << 21;
/// Class flag: number, `\p{N}`.
pub(super) const N: u32 = 1 << 22;
/// Class flag: punctuation, `\p{P}`.
pub(super) const P: u32 = 1 << 23;
/// Class flag: symbol, `\p{S}`.
pub(super) const S: u32 = 1 << 24;
/// Class flag: combining mark, `\p{M}`.
pub(super) const M: u32 = 1 << 25;
/// Class flag: white space, `\s`.
pub(super) const W: u32 = 1 << 26;

/// A code point and its class.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Glyph(u32);

impl Glyph {
    /// Looks up the class of `code`.
    fn new(code: u32) -> Glyph {
        let flags = match code {
            0..128 => ASCII[code as usize],
            // Most non-ASCII text by far; spares the search in the tables.
            0x4E00..=0x9FFF | 0xAC00..=0xD7A3 | 0x3041..=0x3096 => L,
            _ => char::from_u32(code).map_or(0, class),
        };
        Glyph(code | flags)
    }

    /// The code point.
    pub fn code(self) -> u32 {
        self.0 & 0x1F_FFFF
    }

    /// Whether the glyph is in one of the classes.
    pub fn is(self, classes: u32) -> bool {
        self.0 & classes != 0
    }

    /// Whether the glyph is the ASCII character `byte`.
    pub fn matches(self, byte: u8) -> bool {
        self.code() == u32::from(byte)
    }

    /// The ASCII character in lower case, or 0 if the glyph is not ASCII.
    pub fn ascii_lower(self) -> u8 {
        u8::try_from(self.code()).map_or(0, |byte| if byte < 128 { byte.to_ascii_lowercase() } else { 0 })
    }

    /// Whether this is `\r` or `\n`.
    pub fn is_newline(self) -> bool {
        self.matches(b'\r') || self.matches(b'\n')
    }

    /// How many bytes of UTF-8 the glyph takes.
    pub fn width(self) -> usize {
        match self.code() {
            0..0x80 => 1,
            0x80..0x800 => 2,
            0x800..0x1_0000 => 3,
            _ => 4,
        }
    }
}

/// The class of a character from the Unicode tables.
fn class(c: char) -> u32 {
    let flags = match c.general_category_group() {
        GeneralCategoryGroup::Letter => L,
        GeneralCategoryGroup::Number => N,
        GeneralCategoryGroup::Punctuation => P,
        GeneralCategoryGroup::Symbol => S,
        GeneralCategoryGroup::Mark => M,
        GeneralCategoryGroup::Separator | GeneralCategoryGroup::Other => 0,
    };
    if c.is_whitespace() { flags | W } else { flags }
}

/// The classes of the ASCII characters, spelt out so that they cost one load.
static ASCII: [u32; 128] = {
    let mut table = [0; 128];
    let mut code = 0;
    while code < 128 {
        let byte = code as u8;
        table[code] = match byte {
            b'\t'..=b'\r' | b' ' => W,
            b'$' | b'+' | b'<' | b'=' | b'>' | b'^' | b'`' | b'|' | b'~' => S,
            _ if byte.is_ascii_alphabetic() => L,
            _ if byte.is_ascii_digit() => N,
            _ if byte.is_ascii_punctuation() => P,
            _ => 0,
        };
        code += 1;
    }
    table
};

/// A fragment of text with its glyphs.
pub(super) struct Text<'a> {
    /// The text; not always UTF-8, as surrogates pass through.
    pub bytes: Cow<'a, [u8]>,
    /// Its code points; their [`Glyph::width`]s add up to `bytes.len()`.
    pub glyphs: Vec<Glyph>,
}

impl<'a> Text<'a> {
    /// Decodes `bytes`.
    pub fn new(bytes: &'a [u8]) -> Text<'a> {
        let mut glyphs = Vec::with_capacity(bytes.len());
        if let Ok(text) = std::str::from_utf8(bytes) {
            glyphs.extend(text.chars().map(|c| Glyph::new(c.into())));
            return Text { bytes: Cow::Borrowed(bytes), glyphs };
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let (code, taken) = decode_lossy(rest);
            glyphs.push(Glyph::new(code));
            rest = &rest[taken..];
        }
        let mut bytes = Vec::with_capacity(bytes.len());
        for glyph in &glyphs {
            encode(*glyph, &mut bytes);
        }
        Text { bytes: Cow::Owned(bytes), glyphs }
    }
}

/// The first code point of `bytes` (not empty) and how many bytes it takes.
fn decode_lossy(bytes: &[u8]) -> (u32, usize) {
    let lead = bytes[0];
    let (count, bits) = match lead {
        0..=0x7F => return (lead.into(), 1),
        0xC0..=0xDF => (2, lead & 0x1F),
        0xE0..=0xEF => (3, lead & 0x0F),
        0xF0..=0xF7 => (4, lead & 0x07),
        _ => return (0xFFFD, 1),
    };
    let mut code = u32::from(bits);
    for at in 1..count {
        match bytes.get(at) {
            Some(&byte) if byte & 0xC0 == 0x80 => code = code << 6 | u32::from(byte & 0x3F),
            _ => return (0xFFFD, 1),
        }
    }
    // llama.cpp cannot encode what lies beyond Unicode and gives up; here it is one unknown character.
    (if code > 0x10_FFFF { 0xFFFD } else { code }, count)
}

/// Appends the UTF-8 form (a surrogate's three bytes too).
fn encode(glyph: Glyph, out: &mut Vec<u8>) {
    let code = glyph.code();
    let tail = |shift: u32| 0x80 | (code >> shift & 0x3F) as u8;
    match glyph.width() {
        1 => out.push(code as u8),
        2 => out.extend([0xC0 | (code >> 6) as u8, tail(0)]),
        3 => out.extend([0xE0 | (code >> 12) as u8, tail(6), tail(0)]),
        _ => out.extend([0xF0 | (code >> 18) as u8, tail(12), tail(6), tail(0)]),
    }
}

/// How many bytes a character that starts with `lead` should have; 1 for a byte that starts none.
pub(super) fn sequence_length(lead: u8) -> usize {
    match lead {
        0xC0..=0xDF => 2,
        0xE0..=0xEF => 3,
        0xF0..=0xFF => 4,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_cuts_agree_with_the_tables() {
        assert_eq!(unicode_properties::UNICODE_VERSION, (15, 1, 0));
        for code in 0..=0x10_FFFF {
            if let Some(c) = char::from_u32(code) {
                assert_eq!(Glyph::new(code).0, code | class(c), "U+{code:04X}");
                assert_eq!(Glyph::new(code).width(), c.len_utf8());
            }
        }
    }

    #[test]
    fn invalid_utf8_becomes_replacement_characters() {
        let bytes = |input: &[u8]| Text::new(input).bytes.into_owned();
        assert_eq!(bytes(b"a\xFFb"), "a\u{FFFD}b".as_bytes());
        assert_eq!(bytes(b"\xE4\xBD"), "\u{FFFD}\u{FFFD}".as_bytes());
        assert_eq!(bytes(b"\xC0\x80\xFF"), "\0\u{FFFD}".as_bytes(), "overlong");
        assert_eq!(bytes(b"\xED\xA0\x80"), b"\xED\xA0\x80", "surrogate");
        assert_eq!(bytes(b"\xF7\xBF\xBF\xBF"), "\u{FFFD}".as_bytes(), "beyond Unicode");
        let text = Text::new(b"\xF0\x9F\x98\x80\xFF\xC3\xA9z");
        assert_eq!(text.glyphs.iter().map(|g| g.width()).sum::<usize>(), text.bytes.len());
    }
}
