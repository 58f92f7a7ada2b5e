//! Cutting text into the words that BPE works on, by the name in `tokenizer.ggml.pre`.
//!
//! A pre-tokenizer is a list of [`Step`]s; each cuts the pieces of the step before it further, and none joins. The
//! original definitions are regular expressions; here each kind is a small hand-written matcher over [`Glyph`]s, because
//! nearly all are variations on two of them (GPT-2's and Llama 3's) and a matcher is an order of magnitude faster than a
//! backtracking engine. Where a matcher departs from its expression, it does so because llama.cpp does. The expressions
//! stand beside the matchers; `[A]` etc. abbreviate classes.
//!
//! A matcher gets the glyphs of one piece and a position and returns the end of the word that starts there; what lies
//! outside the piece does not exist for it, exactly as in llama.cpp. Nothing here recurses or backtracks further than
//! the word at hand, so time is linear in the text.

use std::cmp::Ordering;

use super::unicode::{Glyph, L, M, N, P, S, W};

/// How a vocabulary cuts text and what else its name implies.
#[derive(Clone, Copy)]
pub(super) struct PreTokenizer {
    steps: &'static [Step],
    /// A word that is a token is taken whole, without looking at the merges.
    pub ignore_merges: bool,
    /// BOS is added unless the file says otherwise.
    pub add_bos: bool,
    /// There is no BOS unless the file names one.
    pub no_bos: bool,
    /// Tokens are spelt in UTF-8 with `▁` for the space, not in GPT-2's byte alphabet.
    pub raw: bool,
    /// A run of line feeds that is a token is taken whole.
    pub whole_newlines: bool,
}

/// One pass over the pieces.
enum Step {
    /// GPT-2: `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.
    Gpt2,
    /// Llama 3 and its many relatives.
    Words(Words),
    /// DeepSeek V3: `[ASCII punctuation][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|`
    /// `\s*[\r\n]+|\s+(?!\S)|\s+`.
    DeepSeek3,
    /// Runs of a class, `lead?[class]{min,max}`; what lies between them stays in one piece.
    Runs { lead: Lead, class: fn(Glyph) -> bool, min: usize, max: usize },
    /// White space at the end of a piece: `\s+$`.
    TrailingSpace,
    /// Groups of three digits counted from the right; what precedes a number stays with its first group.
    DigitGroups,
    /// `[^\n]+|[\n]+`.
    Lines,
}

/// What may stand before a run.
#[derive(Clone, Copy, PartialEq)]
enum Lead {
    Nothing,
    /// ` ?`
    Space,
    /// `\s?`
    White,
}

/// The alternatives of a Llama-3-like expression, in order:
/// `contraction|[^\r\n\p{L}\p{N}]?letters|\p{N}{1,digits}| ?[^breaks]+tail|\s*[\r\n]+|\s+(?!\S)|\s+`.
struct Words {
    contractions: Contractions,
    letters: Letters,
    digits: usize,
    /// Classes that end a run of other characters.
    breaks: u32,
    /// Characters that such a run takes with it at its end, and how many at most.
    tail: (&'static [u8], usize),
    /// White space is cut into powers of two (`\s{512}(?!\S)|…|\s{1,2}(?!\S)|\s`) instead of `\s+(?!\S)|\s+`.
    cascade: bool,
}

/// Where `'s 't 're 've 'm 'll 'd` (any case) belong.
#[derive(PartialEq)]
enum Contractions {
    None,
    /// A word of their own.
    Alone,
    /// The end of the letters before them.
    Attached,
}

/// What a word of letters is; the classes say which glyphs count as letters.
enum Letters {
    /// `[classes]+`
    Plain(u32),
    /// `[classes, not a-z]*[classes, not A-Z]+`, else `[classes, not a-z]+[classes, not A-Z]*`.
    Cased(u32),
    /// `(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+`: letters joined by single spaces.
    Spaced,
}

const LLAMA3: Words = Words {
    contractions: Contractions::Alone,
    letters: Letters::Plain(L),
    digits: 3,
    breaks: W | L | N,
    tail: (b"\r\n", usize::MAX),
    cascade: false,
};
const QWEN2: Words = Words { digits: 1, ..LLAMA3 };
const GPT4O: Words =
    Words { contractions: Contractions::Attached, letters: Letters::Cased(L), tail: (b"\r\n/", usize::MAX), ..LLAMA3 };

/// `[class]{1,max}` without a lead.
const fn runs(class: fn(Glyph) -> bool, max: usize) -> Step {
    Step::Runs { lead: Lead::Nothing, class, min: 1, max }
}

const DIGIT: Step = runs(|g| g.is(N), 1);
const DIGITS_3: Step = runs(|g| g.is(N), 3);
/// `[0-9][0-9][0-9]`
const TRIPLES: Step = Step::Runs { lead: Lead::Nothing, class: |g| g.ascii_lower().is_ascii_digit(), min: 3, max: 3 };
const NEWLINE: Step = runs(Glyph::is_newline, 1);
/// `[一-龥぀-ゟ゠-ヿ]+`
const CJK_KANA: Step = runs(|g| matches!(g.code(), 0x4E00..=0x9FA5 | 0x3040..=0x30FF), usize::MAX);
/// `[一-龥ࠀ-一가-퟿]+`
const CJK_HANGUL: Step = runs(|g| matches!(g.code(), 0x800..=0x9FA5 | 0xAC00..=0xD7FF), usize::MAX);
/// ` ?[^(\s|.,!?…。，、।۔،)]+`
const BLOOM: Step = Step::Runs {
    lead: Lead::Space,
    class: |g| {
        !g.is(W) && char::from_u32(g.code()).is_none_or(|c| !"(|.,!?)\u{2026}。，、\u{964}\u{6D4}\u{60C})".contains(c))
    },
    min: 1,
    max: usize::MAX,
};

const PLAIN: PreTokenizer =
    PreTokenizer { steps: &[], ignore_merges: false, add_bos: false, no_bos: false, raw: false, whole_newlines: false };

/// Every pre-tokenizer by its names.
static TABLE: &[(&[&str], PreTokenizer)] = &[
    (
        &["default"],
        PreTokenizer {
            steps: &[
                runs(|g| g.is(P) || is_one_of(g, b"$+<=>^~|"), usize::MAX),
                Step::Gpt2,
                runs(|g| g.is(N), usize::MAX),
                TRIPLES,
            ],
            ..PLAIN
        },
    ),
    (
        &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v1-en",
            "jina-v2-code",
            "roberta-bpe",
        ],
        PreTokenizer { steps: &[Step::Gpt2], ..PLAIN },
    ),
    (
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
        PreTokenizer { steps: &[DIGIT, Step::Gpt2], ..PLAIN },
    ),
    (
        &["falcon"],
        PreTokenizer {
            steps: &[runs(|g| g.is(P) || is_one_of(g, b"$+<=>^~|`"), usize::MAX), Step::Gpt2, TRIPLES],
            ..PLAIN
        },
    ),
    (
        &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"],
        PreTokenizer { steps: &[Step::Words(LLAMA3)], ignore_merges: true, add_bos: true, ..PLAIN },
    ),
    (&["dbrx", "smaug-bpe"], PreTokenizer { steps: &[Step::Words(LLAMA3)], ..PLAIN }),
    (&["chatglm-bpe"], PreTokenizer { steps: &[Step::Words(LLAMA3)], no_bos: true, ..PLAIN }),
    (&["glm4", "glm5"], PreTokenizer { steps: &[Step::Words(LLAMA3)], no_bos: true, ignore_merges: true, ..PLAIN }),
    (
        &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"],
        PreTokenizer { steps: &[Step::Words(QWEN2)], ..PLAIN },
    ),
    (
        &["qwen35"],
        PreTokenizer {
            steps: &[Step::Words(Words { letters: Letters::Plain(L | M), breaks: W | L | M | N, ..QWEN2 })],
            ..PLAIN
        },
    ),
    (
        &["ufakzeka"],
        PreTokenizer { steps: &[Step::Words(Words { contractions: Contractions::None, ..QWEN2 })], ..PLAIN },
    ),
    (&["bailingmoe", "bailingmoe2", "llada-moe"], PreTokenizer { steps: &[Step::Words(QWEN2)], ..PLAIN }),
    (&["seed-coder"], PreTokenizer { steps: &[Step::Words(Words { tail: (b"", 0), ..QWEN2 })], ..PLAIN }),
    (&["laguna"], PreTokenizer { steps: &[Step::Lines, Step::Words(QWEN2)], ..PLAIN }),
    (
        &["minicpm5"],
        PreTokenizer {
            steps: &[DIGITS_3, Step::Words(Words { digits: usize::MAX, ..LLAMA3 })],
            ignore_merges: true,
            ..PLAIN
        },
    ),
    (&["jais-2"], PreTokenizer { steps: &[Step::Words(Words { cascade: true, ..LLAMA3 })], ..PLAIN }),
    (
        &["exaone-moe"],
        PreTokenizer {
            steps: &[Step::Words(Words { letters: Letters::Spaced, tail: (b"\r\n/", 1), ..QWEN2 })],
            ..PLAIN
        },
    ),
    (
        &["tekken"],
        PreTokenizer {
            steps: &[Step::Words(Words { contractions: Contractions::None, digits: 1, ..GPT4O })],
            ignore_merges: true,
            add_bos: true,
            ..PLAIN
        },
    ),
    (&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], PreTokenizer { steps: &[Step::Words(GPT4O)], ..PLAIN }),
    (
        &["granite-embed-multi-97m"],
        PreTokenizer {
            steps: &[Step::Words(Words { letters: Letters::Cased(L | M), ..GPT4O })],
            ignore_merges: true,
            ..PLAIN
        },
    ),
    (
        &["tiny_aya", "cohere2moe"],
        PreTokenizer {
            steps: &[Step::DigitGroups, Step::Words(Words { letters: Letters::Plain(L | M), ..GPT4O })],
            ..PLAIN
        },
    ),
    (
        &["youtu"],
        PreTokenizer {
            steps: &[
                runs(|g| matches!(g.code(), 0xAC00..=0xD7A3 | 0x3131..=0x318E), usize::MAX),
                runs(is_cjk_punctuation, usize::MAX),
                runs(|g| matches!(g.code(), 0x3105..=0x312F), usize::MAX),
                CJK_KANA,
                Step::Words(Words { letters: Letters::Plain(L | M), digits: 1, ..GPT4O }),
            ],
            ignore_merges: true,
            ..PLAIN
        },
    ),
    (
        &["deepseek-llm"],
        PreTokenizer {
            steps: &[
                NEWLINE,
                Step::Runs { lead: Lead::White, class: is_deepseek_letter, min: 1, max: usize::MAX },
                Step::Runs { lead: Lead::White, class: is_deepseek_punctuation, min: 1, max: usize::MAX },
                Step::TrailingSpace,
                CJK_HANGUL,
                runs(|g| g.is(N), usize::MAX),
            ],
            ..PLAIN
        },
    ),
    (
        &["deepseek-coder"],
        PreTokenizer {
            steps: &[
                NEWLINE,
                Step::Runs { lead: Lead::White, class: |g| g.is(L), min: 1, max: usize::MAX },
                Step::Runs { lead: Lead::White, class: |g| g.is(P), min: 1, max: usize::MAX },
                CJK_HANGUL,
                DIGIT,
            ],
            ..PLAIN
        },
    ),
    (
        &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        PreTokenizer { steps: &[DIGITS_3, CJK_KANA, Step::DeepSeek3], ..PLAIN },
    ),
    (
        &["afmoe"],
        PreTokenizer { steps: &[Step::DigitGroups, runs(is_unspaced_script, usize::MAX), Step::DeepSeek3], ..PLAIN },
    ),
    (&["poro-chat", "bloom", "gpt3-finnish"], PreTokenizer { steps: &[BLOOM], ..PLAIN }),
    (&["viking"], PreTokenizer { steps: &[BLOOM, DIGIT], ..PLAIN }),
    (
        &["gemma4", "granite-embed-multi-311m"],
        PreTokenizer { steps: &[Step::Lines], raw: true, whole_newlines: true, add_bos: true, ..PLAIN },
    ),
    (&["sarvam-moe"], PreTokenizer { steps: &[Step::Lines], raw: true, ..PLAIN }),
];

impl PreTokenizer {
    /// The pre-tokenizer called `name`.
    pub fn by_name(name: &str) -> Option<PreTokenizer> {
        TABLE.iter().find(|(names, _)| names.contains(&name)).map(|&(_, pre)| pre)
    }

    /// Every name, for messages.
    pub fn names() -> impl Iterator<Item = &'static str> {
        TABLE.iter().flat_map(|(names, _)| names.iter().copied())
    }

    /// Cuts `glyphs`; `ends` receives the end of each word, in order.
    pub fn split(&self, glyphs: &[Glyph], ends: &mut Vec<usize>) {
        ends.clear();
        if glyphs.is_empty() {
            return;
        }
        ends.push(glyphs.len());
        let mut cut = Vec::new();
        for step in self.steps {
            let mut start = 0;
            for &end in ends.iter() {
                step.split(&glyphs[start..end], start, &mut cut);
                start = end;
            }
            std::mem::swap(ends, &mut cut);
            cut.clear();
        }
    }
}

impl Step {
    /// Cuts one piece; its first glyph is number `base` of the text.
    fn split(&self, piece: &[Glyph], base: usize, ends: &mut Vec<usize>) {
        let mut at = 0;
        match self {
            Step::Gpt2 => {
                while at < piece.len() {
                    at = gpt2_word(piece, at);
                    ends.push(base + at);
                }
            }
            Step::Words(words) => {
                while at < piece.len() {
                    at = words.next(piece, at);
                    ends.push(base + at);
                }
            }
            Step::Lines => {
                while at < piece.len() {
                    let newline = piece[at].matches(b'\n');
                    at = run(piece, at, |g| g.matches(b'\n') == newline);
                    ends.push(base + at);
                }
            }
            Step::DeepSeek3 => isolate(piece, base, ends, deepseek3_word),
            &Step::Runs { lead, class, min, max } => {
                isolate(piece, base, ends, |piece, at| {
                    // Wide white space never counts as a member of a class spelt out in characters.
                    let member = |g: Glyph| class(g) && !(g.is(W) && g.code() > 0x7F);
                    let led = match lead {
                        Lead::Nothing => false,
                        Lead::Space => piece[at].matches(b' '),
                        Lead::White => piece[at].is(W),
                    };
                    let count = |from| piece[from..].iter().take(max).take_while(|&&g| member(g)).count();
                    [at + usize::from(led), at]
                        .into_iter()
                        .map(|from| (from, count(from)))
                        .find_map(|(from, count)| (count >= min).then_some(from + count))
                });
            }
            Step::TrailingSpace => {
                let text = piece.iter().rposition(|g| !g.is(W)).map_or(0, |last| last + 1);
                if text > 0 {
                    ends.push(base + text);
                }
                if text < piece.len() {
                    ends.push(base + piece.len());
                }
            }
            Step::DigitGroups => {
                while at < piece.len() {
                    let end = run(piece, at, |g| g.is(N));
                    if end == at {
                        at += 1;
                        continue;
                    }
                    let first = at + (end - at - 1) % 3 + 1;
                    ends.extend((first..=end).step_by(3).map(|end| base + end));
                    at = end;
                }
                if piece.last().is_some_and(|g| !g.is(N)) {
                    ends.push(base + piece.len());
                }
            }
        }
    }
}

/// Makes words of the matches (first from the left) and of what lies between them.
fn isolate(piece: &[Glyph], base: usize, ends: &mut Vec<usize>, matches: impl Fn(&[Glyph], usize) -> Option<usize>) {
    let (mut at, mut done) = (0, 0);
    while at < piece.len() {
        let Some(end) = matches(piece, at) else {
            at += 1;
            continue;
        };
        if at > done {
            ends.push(base + at);
        }
        ends.push(base + end);
        (at, done) = (end, end);
    }
    if done < piece.len() {
        ends.push(base + piece.len());
    }
}

/// The end of the run from `at` of glyphs for which `member` holds.
fn run(piece: &[Glyph], at: usize, member: impl Fn(Glyph) -> bool) -> usize {
    let rest = piece.get(at..).unwrap_or_default();
    at + rest.iter().position(|&g| !member(g)).unwrap_or(rest.len())
}

fn is_one_of(glyph: Glyph, set: &[u8]) -> bool {
    set.iter().any(|&byte| glyph.matches(byte))
}

/// The length of a contraction at `at`, or 0; `fold` ignores case.
fn contraction(piece: &[Glyph], at: usize, fold: bool) -> usize {
    let letter = |offset: usize| {
        let glyph = *piece.get(at + offset)?;
        Some(if fold { glyph.ascii_lower() } else { u8::try_from(glyph.code()).unwrap_or(0) })
    };
    if !piece.get(at).is_some_and(|g| g.matches(b'\'')) {
        return 0;
    }
    match (letter(1), letter(2)) {
        (Some(b's' | b't' | b'm' | b'd'), _) => 2,
        (Some(b'r' | b'v'), Some(b'e')) | (Some(b'l'), Some(b'l')) => 3,
        _ => 0,
    }
}

/// The end of the white space word at `at` by `\s+(?!\S)|\s+`: all of a run but its last glyph if a word follows.
fn white_word(piece: &[Glyph], at: usize) -> usize {
    let end = run(piece, at, |g| g.is(W));
    if end - at > 1 && end < piece.len() { end - 1 } else { end }
}

/// The end of `\s*[\r\n]+` at `at`, if it matches.
fn newline_word(piece: &[Glyph], at: usize) -> Option<usize> {
    let end = run(piece, at, |g| g.is(W));
    piece[at..end].iter().rposition(|g| g.is_newline()).map(|last| at + last + 1)
}

fn gpt2_word(piece: &[Glyph], at: usize) -> usize {
    let short = contraction(piece, at, false);
    if short > 0 {
        return at + short;
    }
    let start = at + usize::from(piece[at].matches(b' '));
    match piece.get(start) {
        Some(g) if g.is(L) => run(piece, start, |g| g.is(L)),
        Some(g) if g.is(N) => run(piece, start, |g| g.is(N)),
        Some(g) if !g.is(W) => run(piece, start, |g| !g.is(W | L | N)),
        _ => white_word(piece, at),
    }
}

impl Words {
    /// The end of the word at `at`.
    fn next(&self, piece: &[Glyph], at: usize) -> usize {
        if self.contractions == Contractions::Alone {
            let short = contraction(piece, at, true);
            if short > 0 {
                return at + short;
            }
        }
        let glyph = piece[at];
        if let Some(end) = self.letters(piece, at) {
            let attached = self.contractions == Contractions::Attached;
            return end + if attached { contraction(piece, end, true) } else { 0 };
        }
        if glyph.is(N) {
            return run(piece, at, |g| g.is(N)).min(at.saturating_add(self.digits));
        }
        let start = at + usize::from(glyph.matches(b' '));
        if piece.get(start).is_some_and(|g| !g.is(self.breaks)) {
            let end = run(piece, start, |g| !g.is(self.breaks));
            let (tail, most) = self.tail;
            return run(piece, end, |g| is_one_of(g, tail)).min(end.saturating_add(most));
        }
        if let Some(end) = newline_word(piece, at) {
            return end;
        }
        if glyph.is(W) {
            if !self.cascade {
                return white_word(piece, at);
            }
            let end = run(piece, at, |g| g.is(W));
            let most = if end < piece.len() { end - at - 1 } else { end - at };
            return at + (0..10).rev().map(|bits| 1 << bits).find(|&length| length <= most).unwrap_or(1);
        }
        at + 1
    }

    /// The end of `[^\r\n\p{L}\p{N}]?letters` at `at`, if it matches.
    fn letters(&self, piece: &[Glyph], at: usize) -> Option<usize> {
        let leads = !piece[at].is(L | N) && !piece[at].is_newline();
        let starts = [leads.then_some(at + 1), Some(at)];
        let mut starts = starts.into_iter().flatten();
        let beyond = |start: usize, end: usize| (end > start).then_some(end);
        match self.letters {
            Letters::Plain(classes) => starts.find_map(|start| beyond(start, run(piece, start, |g| g.is(classes)))),
            Letters::Spaced => starts.find_map(|start| {
                let mut end = start;
                loop {
                    let next = end + usize::from(end > start && piece.get(end).is_some_and(|g| g.matches(b' ')));
                    if !piece.get(next).is_some_and(|g| g.is(L)) {
                        return beyond(start, end);
                    }
                    end = run(piece, next + 1, |g| g.is(M));
                }
            }),
            Letters::Cased(classes) => {
                let upper = |g: Glyph| g.is(classes) && !matches!(g.code(), 0x61..=0x7A);
                let lower = |g: Glyph| g.is(classes) && !matches!(g.code(), 0x41..=0x5A);
                starts
                    .clone()
                    .find_map(|start| {
                        let capitals = run(piece, start, upper);
                        let end = run(piece, capitals, lower);
                        if end > capitals {
                            return Some(end);
                        }
                        // No small letter follows: give capitals back until one can count as small.
                        piece.get(start..capitals)?.iter().rposition(|&g| lower(g)).map(|last| start + last + 1)
                    })
                    .or_else(|| starts.find_map(|start| beyond(start, run(piece, start, upper))))
            }
        }
    }
}

fn deepseek3_word(piece: &[Glyph], at: usize) -> Option<usize> {
    let glyph = piece[at];
    let is_ascii_letter = |g: Glyph| g.ascii_lower().is_ascii_lowercase();
    if glyph.code() < 0x80 && glyph.is(P | S) {
        let end = run(piece, at + 1, is_ascii_letter);
        if end > at + 1 {
            return Some(end);
        }
    }
    let leads = !glyph.is(L | P | S) && !glyph.is_newline();
    for start in [at + usize::from(leads), at] {
        let end = run(piece, start, |g| g.is(L | M));
        if end > start {
            return Some(end);
        }
    }
    for start in [at + usize::from(glyph.matches(b' ')), at] {
        let end = run(piece, start, |g| g.is(P | S));
        if end > start {
            return Some(run(piece, end, Glyph::is_newline));
        }
    }
    newline_word(piece, at).or_else(|| glyph.is(W).then(|| white_word(piece, at)))
}

/// `[！…“”‘’—：；，、-〿︰-﹏]`
fn is_cjk_punctuation(g: Glyph) -> bool {
    matches!(
        g.code(),
        0xFF01 | 0x2026 | 0x201C | 0x201D | 0x2018 | 0x2019 | 0x2014 | 0xFF1A | 0xFF1B | 0xFF0C | 0x3001..=0x303F
            | 0xFE30..=0xFE4F
    )
}

/// Scripts written without spaces: Han, kana, Thai, Lao, Khmer, Burmese, Hangul. (llama.cpp's range for the compatibility
/// ideographs starts at U+8C48, which 豈 is normalised to; that takes in all up to U+FAFF.)
fn is_unspaced_script(g: Glyph) -> bool {
    matches!(
        g.code(),
        0x3400..=0x4DBF | 0x4E00..=0xFAFF | 0x3040..=0x30FF | 0xFF65..=0xFF9F | 0x2F00..=0x2FDF
            | 0xE40..=0xE7F | 0xE80..=0xEFF | 0x1780..=0x17FF | 0x1000..=0x109F
            | 0x1100..=0x11FF
    )
}

/// `[!-/:-~！-／：-～‘-‟　-。]`
fn is_deepseek_punctuation(g: Glyph) -> bool {
    matches!(
        g.code(),
        0x21..=0x2F | 0x3A..=0x7E | 0xFF01..=0xFF0F | 0xFF1A..=0xFF5E | 0x2018..=0x201F | 0x3000..=0x3002
    )
}

/// The letters of the scripts with case, as DeepSeek's first tokenizer lists them.
fn is_deepseek_letter(g: Glyph) -> bool {
    DEEPSEEK_LETTERS
        .binary_search_by(|&(first, last)| {
            if last < g.code() {
                Ordering::Less
            } else if first > g.code() {
                Ordering::Greater
            } else {
                Ordering::Equal
            }
        })
        .is_ok()
}

#[rustfmt::skip]
static DEEPSEEK_LETTERS: &[(u32, u32)] = &[
    (0x41, 0x5A), (0x61, 0x7A), (0xB5, 0xB5), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x1BA), (0x1BC, 0x1BF),
    (0x1C4, 0x293), (0x295, 0x2AF), (0x370, 0x373), (0x376, 0x376), (0x377, 0x377), (0x37B, 0x37D), (0x37F, 0x37F),
    (0x386, 0x386), (0x388, 0x38A), (0x38C, 0x38C), (0x38E, 0x3A1), (0x3A3, 0x3F5), (0x3F7, 0x481), (0x48A, 0x52F),
    (0x531, 0x556), (0x10A0, 0x10C5), (0x13A0, 0x13F5), (0x13F8, 0x13FD), (0x1C90, 0x1CBA), (0x1CBD, 0x1CBF),
    (0x1D00, 0x1D2B), (0x1D6B, 0x1D77), (0x1D79, 0x1D9A), (0x1E00, 0x1F15), (0x1F18, 0x1F1D), (0x1F20, 0x1F45),
    (0x1F48, 0x1F4D), (0x1F50, 0x1F57), (0x1F59, 0x1F59), (0x1F5B, 0x1F5B), (0x1F5D, 0x1F5D), (0x1F5F, 0x1F7D),
    (0x1F80, 0x1FB4), (0x1FB6, 0x1FBC), (0x1FBE, 0x1FBE), (0x1FC2, 0x1FC4), (0x1FC6, 0x1FCC), (0x1FD0, 0x1FD3),
    (0x1FD6, 0x1FDB), (0x1FE0, 0x1FEC), (0x1FF2, 0x1FF4), (0x1FF6, 0x1FFC), (0x2102, 0x2102), (0x2107, 0x2107),
    (0x210A, 0x2113), (0x2115, 0x2115), (0x2119, 0x211D), (0x2124, 0x2124), (0x2126, 0x2126), (0x2128, 0x2128),
    (0x212A, 0x212D), (0x212F, 0x2134), (0x2139, 0x2139), (0x213C, 0x213F), (0x2145, 0x2149), (0x214E, 0x214E),
    (0x2183, 0x2183), (0x2184, 0x2184), (0x2C00, 0x2C7B), (0x2C7E, 0x2CE4), (0x2CEB, 0x2CEE), (0x2CF2, 0x2CF2),
    (0x2CF3, 0x2CF3), (0xA640, 0xA66D), (0xA680, 0xA69B), (0xA722, 0xA76F), (0xA771, 0xA787), (0xA78B, 0xA78E),
    (0xAB70, 0xABBF), (0xFB00, 0xFB06), (0xFB13, 0xFB17), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A), (0x10400, 0x1044F),
    (0x104B0, 0x104D3), (0x104D8, 0x104FB), (0x10C80, 0x10CB2), (0x10CC0, 0x10CF2), (0x118A0, 0x118DF),
    (0x1E900, 0x1E943),
];
