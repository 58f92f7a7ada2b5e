//! What a GGUF says about its tokens besides how text becomes them: their kinds, the bytes they stand for, and which of
//! them begin a text, end a turn or mark the parts of a file.
//!
//! Files name some special tokens by key and leave others to be known by their text (`<|im_end|>`, `<end_of_turn>`, …);
//! kinds are sometimes wrong. The rules that mend this are llama.cpp's, so that a model ends its turn on the same tokens
//! here. Where llama.cpp takes whichever of several texts its hash table yields first, the first of the list wins here.

use std::collections::HashMap;

use super::bpe::from_alphabet;
use super::words::Arena;
use crate::gguf::Metadata;
use crate::{Error, Result};

/// Kind of token: ordinary text.
pub(super) const NORMAL: u8 = 1;
/// Kind of token: stands for what is not in the vocabulary.
pub(super) const UNKNOWN: u8 = 2;
/// Kind of token: structure, not text.
pub(super) const CONTROL: u8 = 4;
/// Kind of token: text that is always one token.
pub(super) const USER_DEFINED: u8 = 8;
/// Kind of token: never produced.
pub(super) const UNUSED: u8 = 16;
/// Kind of token: one byte.
pub(super) const BYTE: u8 = 32;
/// Takes the white space before it.
pub(super) const LSTRIP: u8 = 64;
/// Takes the white space after it.
pub(super) const RSTRIP: u8 = 128;

/// The tokens for filling in the middle of a text; `None` where the model has no such token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FillInMiddle {
    /// Before the text that precedes the gap.
    pub prefix: Option<u32>,
    /// Before the text that follows the gap.
    pub suffix: Option<u32>,
    /// Before the text that fills the gap.
    pub middle: Option<u32>,
    /// Padding.
    pub pad: Option<u32>,
    /// Before the name of a repository.
    pub repository: Option<u32>,
    /// Between files.
    pub separator: Option<u32>,
}

/// How token texts are spelt in the file.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Spelling {
    /// GPT-2's byte alphabet.
    ByteAlphabet,
    /// UTF-8 with `▁` for the space.
    Escaped,
}

/// The tokens by number and their roles.
#[derive(Default)]
pub(super) struct Vocab {
    /// The bytes each token stands for; the text of those that are not text.
    pub pieces: Arena,
    /// The kinds of each token.
    pub kinds: Vec<u8>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub eot: Option<u32>,
    pub eom: Option<u32>,
    pub unknown: Option<u32>,
    pub pad: Option<u32>,
    pub fim: FillInMiddle,
    /// The tokens that end a generation, ascending.
    pub ends: Vec<u32>,
}

const EOT_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];
const PREFIX_TEXTS: &[&str] = &[
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<｜fim▁begin｜>",
    "<PRE>",
    "▁<PRE>",
    "<|code_prefix|>",
    "<|prefix|>",
];
const SUFFIX_TEXTS: &[&str] = &[
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<｜fim▁hole｜>",
    "<SUF>",
    "▁<SUF>",
    "<|code_suffix|>",
    "<|suffix|>",
];
const MIDDLE_TEXTS: &[&str] = &[
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<｜fim▁end｜>",
    "<MID>",
    "▁<MID>",
    "<|code_middle|>",
    "<|middle|>",
];
const PAD_TEXTS: &[&str] = &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"];
const REPOSITORY_TEXTS: &[&str] = &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"];
/// Texts that end a generation wherever they are tokens.
const END_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];
/// gpt-oss: structure that is to be seen.
const SHOWN_TEXTS: &[&str] = &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

impl Vocab {
    /// Reads the token list with kinds and roles. `bos`, `eos` and `unknown` are the tokenizer model's customs where the
    /// file does not name these tokens.
    ///
    /// # Errors
    /// [`Error::Format`] where the lists are missing, too short or too large.
    pub fn read(metadata: &Metadata, spelling: Spelling, customs: [Option<u32>; 3]) -> Result<Vocab> {
        let texts = metadata.strings("tokenizer.ggml.tokens")?;
        let bytes = texts.iter().map(String::len).sum::<usize>();
        // Numbers and offsets are u32, with room above for merge results.
        if texts.len() >= 1 << 30 || bytes >= 1 << 30 {
            return Err(
                metadata.error("tokenizer.ggml.tokens", "has more than 2^30 tokens or bytes; the file is damaged")
            );
        }
        let mut vocab = Vocab { kinds: read_kinds(metadata, texts.len())?, ..Vocab::default() };
        vocab.read_roles(metadata, texts, customs)?;
        vocab.mark_strips(metadata, texts);
        vocab.pieces = Arena::with_capacity(texts.len(), bytes);
        for (text, &kinds) in texts.iter().zip(&vocab.kinds) {
            vocab.pieces.push_with(|out| write_piece(text, kinds, spelling, out));
        }
        Ok(vocab)
    }

    /// The number of tokens.
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// Whether token `id` is of one of `kinds`.
    pub fn is(&self, id: u32, kinds: u8) -> bool {
        self.kinds.get(id as usize).is_some_and(|kind| kind & kinds != 0)
    }

    fn read_roles(&mut self, metadata: &Metadata, texts: &[String], customs: [Option<u32>; 3]) -> Result<()> {
        let count = texts.len();
        let [bos, eos, unknown] = customs.map(|id| id.filter(|&id| (id as usize) < count));
        // A number outside the vocabulary is as good as none; several converters write -1.
        let named = |key: &str| {
            let id = metadata.get(&format!("tokenizer.ggml.{key}")).and_then(|value| value.as_int());
            id.and_then(|id| u32::try_from(id).ok()).filter(|&id| (id as usize) < count)
        };
        let known = KnownTexts::collect(texts);
        self.bos = named("bos_token_id").or(bos);
        self.eos = named("eos_token_id").or(eos);
        self.unknown = named("unknown_token_id").or(unknown);
        self.pad = named("padding_token_id");
        let kinds = &mut self.kinds;
        let mut by_text = |given: Option<u32>, texts: &[&str]| {
            given.or_else(|| {
                let id = texts.iter().find_map(|text| known.id(text))?;
                kinds[id as usize] |= CONTROL;
                Some(id)
            })
        };
        self.eot = by_text(named("eot_token_id"), EOT_TEXTS);
        self.eom = by_text(named("eom_token_id"), &["<|eom_id|>"]);
        self.fim = FillInMiddle {
            prefix: by_text(named("prefix_token_id").or(named("fim_pre_token_id")), PREFIX_TEXTS),
            suffix: by_text(named("suffix_token_id").or(named("fim_suf_token_id")), SUFFIX_TEXTS),
            middle: by_text(named("middle_token_id").or(named("fim_mid_token_id")), MIDDLE_TEXTS),
            pad: by_text(named("fim_pad_token_id"), PAD_TEXTS),
            repository: by_text(named("fim_rep_token_id"), REPOSITORY_TEXTS),
            separator: by_text(named("fim_sep_token_id"), &["<|file_sep|>"]),
        };
        let mut ends: Vec<u32> =
            [self.fim.pad, self.fim.repository, self.fim.separator].into_iter().flatten().collect();
        for id in END_TEXTS.iter().filter_map(|text| known.id(text)) {
            kinds[id as usize] |= CONTROL;
            ends.push(id);
        }
        for id in SHOWN_TEXTS.iter().filter_map(|text| known.id(text)) {
            kinds[id as usize] = USER_DEFINED;
        }
        ends.extend([self.eos, self.eot, self.eom].into_iter().flatten());
        let mut not_an_end = |text: &str, kind: u8| {
            if let Some(id) = known.id(text).filter(|id| ends.contains(id)) {
                ends.retain(|&end| end != id);
                kinds[id as usize] = kind;
            }
        };
        let has = |text: &str| known.id(text).is_some();
        // gpt-oss and Solar Open go on after <|end|>; Gemma 4 and PLaMo have </s> as plain text.
        if (has("<|return|>") && (has("<|call|>") || has("<|calls|>")))
            || ((has("<|call|>") || has("<|calls|>")) && has("<|flush|>"))
        {
            not_an_end("<|end|>", USER_DEFINED);
        }
        if has("<|tool_response>") || self.eos.is_some_and(|id| texts[id as usize] == "<|plamo:eos|>") {
            not_an_end("</s>", NORMAL);
        }
        ends.sort_unstable();
        ends.dedup();
        self.ends = ends;
        Ok(())
    }

    /// Files do not say which tokens take the white space beside them; it is known of a few models by name.
    fn mark_strips(&mut self, metadata: &Metadata, texts: &[String]) {
        let text = |key: &str| metadata.get(key).and_then(|value| value.as_str()).unwrap_or_default();
        let pre = text("tokenizer.ggml.pre");
        let name = text("general.name").to_ascii_lowercase();
        let find = |wanted: &str| texts.iter().position(|text| text == wanted);
        if ["jina-v2-de", "jina-v2-es", "jina-v2-code"].iter().any(|known| pre.contains(known)) {
            if let Some(id) = find("<mask>") {
                self.kinds[id] |= LSTRIP;
            }
        } else if name.contains("phi-3") || name.contains("phi3") {
            for (kind, text) in self.kinds.iter_mut().zip(texts) {
                let special = *kind & (CONTROL | USER_DEFINED | UNKNOWN) != 0;
                if (special && !["<unk>", "<s>", "<|endoftext|>"].contains(&text.as_str())) || text == "</s>" {
                    *kind |= RSTRIP;
                }
            }
        } else if name.contains("modern-bert")
            && let Some(id) = find("[MASK]")
        {
            self.kinds[id] |= LSTRIP;
        }
    }
}

/// The kinds from `tokenizer.ggml.token_type`; all normal if there is no such list.
fn read_kinds(metadata: &Metadata, count: usize) -> Result<Vec<u8>> {
    const KEY: &str = "tokenizer.ggml.token_type";
    let Some(types) = metadata.opt_i32s(KEY)? else { return Ok(vec![NORMAL; count]) };
    if types.len() < count {
        return Err(
            metadata.error(KEY, format!("has {} entries for {count} tokens; convert the model again", types.len()))
        );
    }
    let kind = |&number: &i32| match number {
        1 => NORMAL,
        2 => UNKNOWN,
        3 => CONTROL,
        4 => USER_DEFINED,
        5 => UNUSED,
        6 => BYTE,
        _ => 0,
    };
    Ok(types.iter().take(count).map(kind).collect())
}

/// Appends the bytes that a token stands for.
fn write_piece(text: &str, kinds: u8, spelling: Spelling, out: &mut Vec<u8>) {
    if kinds & (CONTROL | USER_DEFINED | UNKNOWN) != 0 {
        out.extend_from_slice(text.as_bytes());
    } else if kinds & NORMAL != 0 {
        match spelling {
            Spelling::ByteAlphabet if from_alphabet(text.as_bytes(), out) => {}
            Spelling::ByteAlphabet => out.extend_from_slice(text.as_bytes()),
            Spelling::Escaped => {
                for (index, part) in text.split('▁').enumerate() {
                    if index > 0 {
                        out.push(b' ');
                    }
                    out.extend_from_slice(part.as_bytes());
                }
            }
        }
    } else if kinds & BYTE != 0 {
        out.extend(text.get(3..5).and_then(|digits| u8::from_str_radix(digits, 16).ok()));
    }
}

/// The tokens with one of the texts in the lists above.
struct KnownTexts<'a>(HashMap<&'a str, u32>);

impl<'a> KnownTexts<'a> {
    fn collect(texts: &'a [String]) -> KnownTexts<'a> {
        let lists =
            [EOT_TEXTS, PREFIX_TEXTS, SUFFIX_TEXTS, MIDDLE_TEXTS, PAD_TEXTS, REPOSITORY_TEXTS, END_TEXTS, SHOWN_TEXTS];
        let mut wanted: HashMap<&str, ()> = lists.concat().into_iter().map(|text| (text, ())).collect();
        wanted.extend([("<|eom_id|>", ()), ("<|file_sep|>", ())]);
        let might_be =
            |text: &str| matches!(text.as_bytes().first(), Some(b'<' | b'[' | b'_' | 0xE2)) && text.len() < 40;
        let numbered =
            texts.iter().enumerate().filter(|(_, text)| might_be(text) && wanted.contains_key(text.as_str()));
        KnownTexts(numbered.map(|(id, text)| (text.as_str(), id as u32)).collect())
    }

    fn id(&self, text: &str) -> Option<u32> {
        self.0.get(text).copied()
    }
}

/// Checks that a list has an entry for each token.
pub(super) fn check_length(metadata: &Metadata, key: &str, length: usize, tokens: usize) -> Result<(), Error> {
    if length < tokens {
        return Err(metadata.error(key, format!("has {length} entries for {tokens} tokens; convert the model again")));
    }
    Ok(())
}
