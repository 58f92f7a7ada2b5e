//! The tokenizer of a model: text to token numbers and back, as llama.cpp does it, from the GGUF alone.
//!
//! Encoding has three stages. [`Specials`] cuts out special tokens, which no merging may touch. What is left goes, piece
//! by piece, to the model's algorithm: [`Bpe`] behind a [`PreTokenizer`], or [`Spm`]. At the ends, BOS and EOS are added
//! if asked for and if the file wants them. Decoding concatenates each token's bytes; a character may be spread over
//! several tokens, so a stream of tokens goes through [`Utf8Stream`](super::Utf8Stream).

use super::bpe::{Bpe, Scratch, from_alphabet};
use super::pretokenize::PreTokenizer;
use super::special::{Fragment, Special, Specials};
use super::spm::Spm;
use super::unicode::Text;
use super::vocab::{CONTROL, FillInMiddle, LSTRIP, RSTRIP, Spelling, UNKNOWN, USER_DEFINED, Vocab, check_length};
use super::words::{Arena, WordMap};
use crate::gguf::{Gguf, Metadata};
use crate::{Error, Result};

/// What [`Tokenizer::encode`] does besides cutting text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Add BOS and EOS where the file asks for them.
    pub add_special: bool,
    /// Let the text of control tokens (`<|im_end|>`) stand for them. For text from the program, such as a rendered chat
    /// template; off for text from people, who could otherwise end the turn.
    pub parse_special: bool,
}

impl EncodeOptions {
    /// Plain text: nothing added, control tokens not recognised.
    pub const TEXT: EncodeOptions = EncodeOptions { add_special: false, parse_special: false };
    /// A rendered prompt: control tokens recognised, nothing added (templates write BOS themselves).
    pub const PROMPT: EncodeOptions = EncodeOptions { add_special: false, parse_special: true };
}

/// Turns text into a model's tokens and back.
pub struct Tokenizer {
    vocab: Vocab,
    algorithm: Algorithm,
    /// Cut out always: user-defined tokens.
    always: Specials,
    /// Cut out with `parse_special`: those and the control and unknown tokens.
    all: Specials,
    add_bos: bool,
    add_eos: bool,
}

enum Algorithm {
    Bpe {
        pre: PreTokenizer,
        bpe: Box<Bpe>,
    },
    Spm {
        spm: Box<Spm>,
        space_prefix: bool,
    },
    /// `no_vocab`: only the number of tokens is known.
    None {
        size: usize,
    },
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("tokens", &self.vocab_size()).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// The tokenizer that `gguf` describes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a tokenizer model or pre-tokenizer that is not known, [`Error::Format`] where a key is
    /// missing or its value does not fit.
    pub fn from_gguf(gguf: &Gguf) -> Result<Tokenizer> {
        let rows = ["token_embd.weight", "output.weight"].iter().find_map(|name| gguf.tensor(name));
        Tokenizer::from_metadata(gguf.metadata(), rows.map(|tensor| tensor.rows()))
    }

    /// The tokenizer that `metadata` describes. `embedding_rows` is the size of the vocabulary where the file has none
    /// (`tokenizer.ggml.model` = `no_vocab`) and does not give it as `{architecture}.vocab_size`.
    ///
    /// # Errors
    /// As [`Tokenizer::from_gguf`].
    pub fn from_metadata(metadata: &Metadata, embedding_rows: Option<usize>) -> Result<Tokenizer> {
        match metadata.str("tokenizer.ggml.model")? {
            "gpt2" => Tokenizer::bpe(metadata, metadata.opt_str("tokenizer.ggml.pre")?.unwrap_or("default")),
            "gemma4" => Tokenizer::bpe(metadata, "gemma4"),
            "llama" => Tokenizer::spm(metadata),
            "no_vocab" | "none" => {
                let architecture = metadata.opt_str("general.architecture")?.unwrap_or_default();
                let given = metadata.opt_u32(&format!("{architecture}.vocab_size"))?;
                let size = given.map(|size| size as usize).or(embedding_rows).unwrap_or(0);
                Ok(Tokenizer {
                    vocab: Vocab::default(),
                    algorithm: Algorithm::None { size },
                    always: Specials::new(Vec::new()),
                    all: Specials::new(Vec::new()),
                    add_bos: false,
                    add_eos: false,
                })
            }
            other => Err(Error::Unsupported(format!(
                "the tokenizer model {other:?} of {} (WordPiece `bert`, Unigram `t5`, `rwkv` and others are not read); \
                 known are gpt2, gemma4, llama and no_vocab",
                metadata.file()
            ))),
        }
    }

    fn bpe(metadata: &Metadata, name: &str) -> Result<Tokenizer> {
        let Some(pre) = PreTokenizer::by_name(name) else {
            let known: Vec<&str> = PreTokenizer::names().collect();
            return Err(Error::Unsupported(format!(
                "the pre-tokenizer {name:?} (key tokenizer.ggml.pre of {}); known are {}",
                metadata.file(),
                known.join(", ")
            )));
        };
        let texts = metadata.strings("tokenizer.ggml.tokens")?;
        let merges = metadata.strings("tokenizer.ggml.merges")?;
        if merges.len() >= 1 << 30 || merges.iter().map(String::len).sum::<usize>() >= 1 << 30 {
            return Err(
                metadata.error("tokenizer.ggml.merges", "has more than 2^30 merges or bytes; the file is damaged")
            );
        }
        let spelling = if pre.raw { Spelling::Escaped } else { Spelling::ByteAlphabet };
        let custom = if pre.no_bos || pre.raw { None } else { Some(11) };
        let vocab = Vocab::read(metadata, spelling, [custom, custom.or((!pre.raw).then_some(11)), None])?;
        let mut words = Arena::with_capacity(texts.len() + 256, texts.iter().map(String::len).sum());
        for text in texts {
            words.push_with(|out| {
                if pre.raw {
                    out.extend_from_slice(text.as_bytes());
                } else {
                    from_alphabet(text.as_bytes(), out);
                }
            });
        }
        let bpe = Box::new(Bpe::new(WordMap::new(words), merges, pre.raw));
        let forced = pre.whole_newlines;
        let mut tokenizer = Tokenizer::assemble(metadata, vocab, Algorithm::Bpe { pre, bpe }, pre.add_bos)?;
        tokenizer.add_bos |= forced;
        Ok(tokenizer)
    }

    fn spm(metadata: &Metadata) -> Result<Tokenizer> {
        let vocab = Vocab::read(metadata, Spelling::Escaped, [Some(1), Some(2), Some(0)])?;
        let texts = metadata.strings("tokenizer.ggml.tokens")?;
        let mut scores = match metadata.opt_f32s("tokenizer.ggml.scores") {
            Ok(scores) => scores.unwrap_or_default(),
            // Some converters write whole numbers.
            Err(_) => metadata.i32s("tokenizer.ggml.scores")?.into_iter().map(|score| score as f32).collect(),
        };
        if scores.is_empty() {
            scores = vec![0.0; texts.len()];
        }
        check_length(metadata, "tokenizer.ggml.scores", scores.len(), texts.len())?;
        // No NaN, and no negative zero, which compares below zero.
        scores.iter_mut().for_each(|score| *score = if score.is_nan() { f32::NEG_INFINITY } else { *score + 0.0 });
        let mut arena = Arena::with_capacity(texts.len(), texts.iter().map(String::len).sum());
        texts.iter().for_each(|text| arena.push(text.as_bytes()));
        let words = WordMap::new(arena);
        let bytes = std::array::from_fn(|byte| {
            let token = words.get(format!("<0x{byte:02X}>").as_bytes());
            token.or_else(|| words.get(&[byte as u8])).filter(|_| byte > 0 || token.is_some())
        });
        let space_prefix = metadata.opt_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let spm = Box::new(Spm { words, scores, bytes });
        Tokenizer::assemble(metadata, vocab, Algorithm::Spm { spm, space_prefix }, true)
    }

    fn assemble(metadata: &Metadata, vocab: Vocab, algorithm: Algorithm, add_bos: bool) -> Result<Tokenizer> {
        let texts = metadata.strings("tokenizer.ggml.tokens")?;
        let specials = |kinds: u8, not: u8| {
            let numbered = texts.iter().zip(&vocab.kinds).enumerate();
            let wanted = numbered.filter(|(_, (_, kind))| **kind & kinds != 0 && **kind & not == 0);
            Specials::new(
                wanted
                    .map(|(id, (text, kind))| Special {
                        id: id as u32,
                        text: text.as_bytes().to_vec(),
                        lstrip: kind & LSTRIP != 0,
                        rstrip: kind & RSTRIP != 0,
                    })
                    .collect(),
            )
        };
        Ok(Tokenizer {
            always: specials(USER_DEFINED, CONTROL | UNKNOWN),
            all: specials(CONTROL | USER_DEFINED | UNKNOWN, 0),
            add_bos: metadata.opt_bool("tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos),
            add_eos: metadata.opt_bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
            vocab,
            algorithm,
        })
    }

    /// The tokens of `text`. Empty for a model without a vocabulary.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Vec<u32> {
        self.encode_bytes(text.as_bytes(), options)
    }

    /// The tokens of `text`, which need not be UTF-8: byte-level models read a byte that starts no character as U+FFFD,
    /// SentencePiece models take it as a byte.
    pub fn encode_bytes(&self, text: &[u8], options: EncodeOptions) -> Vec<u32> {
        let mut out = Vec::with_capacity(text.len() / 3 + 2);
        if matches!(self.algorithm, Algorithm::None { .. }) {
            return out;
        }
        if options.add_special && self.add_bos {
            out.extend(self.vocab.bos);
        }
        let specials = if options.parse_special { &self.all } else { &self.always };
        let mut scratch = Scratch::default();
        let mut ends = Vec::new();
        let mut after_special = true;
        for fragment in specials.partition(text) {
            match fragment {
                Fragment::Token(token) => {
                    out.push(token);
                    after_special = true;
                }
                Fragment::Text(range) => {
                    self.encode_fragment(&text[range], after_special, &mut ends, &mut scratch, &mut out);
                    after_special = false;
                }
            }
        }
        if options.add_special && self.add_eos {
            out.extend(self.vocab.eos);
        }
        out
    }

    /// The tokens of a rendered prompt: control tokens recognised, and BOS before it if the file asks for one and the
    /// template did not write it.
    pub fn encode_prompt(&self, prompt: &str) -> Vec<u32> {
        let mut tokens = self.encode(prompt, EncodeOptions::PROMPT);
        if let Some(bos) = self.vocab.bos.filter(|bos| self.add_bos && tokens.first() != Some(bos)) {
            tokens.insert(0, bos);
        }
        tokens
    }

    /// Appends the tokens of text without special tokens.
    fn encode_fragment(
        &self,
        text: &[u8],
        after_special: bool,
        ends: &mut Vec<usize>,
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) {
        match &self.algorithm {
            Algorithm::None { .. } => {}
            Algorithm::Spm { spm, space_prefix } => {
                spm.encode(&escape(text, *space_prefix && after_special), out);
            }
            Algorithm::Bpe { pre, bpe } => {
                let escaped = pre.raw.then(|| escape(text, false));
                let text = Text::new(escaped.as_deref().unwrap_or(text));
                pre.split(&text.glyphs, ends);
                let (mut glyph, mut start) = (0, 0);
                for &end in ends.iter() {
                    let width: usize = text.glyphs[glyph..end].iter().map(|glyph| glyph.width()).sum();
                    let word = &text.bytes[start..start + width];
                    (glyph, start) = (end, start + width);
                    let whole = pre.ignore_merges || (pre.whole_newlines && word.iter().all(|&byte| byte == b'\n'));
                    match bpe.token(word).filter(|_| whole) {
                        Some(token) => out.push(token),
                        None => bpe.encode(word, scratch, out),
                    }
                }
            }
        }
    }

    /// The bytes that token `id` stands for; not always UTF-8. Control tokens have none unless `special`, when they have
    /// their text. `None` if there is no such token.
    pub fn token_bytes(&self, id: u32, special: bool) -> Option<&[u8]> {
        match &self.algorithm {
            Algorithm::None { size } => ((id as usize) < *size).then_some(&[]),
            _ if id as usize >= self.vocab.len() => None,
            _ if !special && self.is_control(id) => Some(&[]),
            _ => Some(self.vocab.pieces.get(id)),
        }
    }

    /// The bytes of `ids` together; numbers outside the vocabulary have none.
    pub fn decode(&self, ids: &[u32], special: bool) -> Vec<u8> {
        ids.iter().filter_map(|&id| self.token_bytes(id, special)).flatten().copied().collect()
    }

    /// The number of tokens.
    pub fn vocab_size(&self) -> usize {
        match &self.algorithm {
            Algorithm::None { size } => *size,
            _ => self.vocab.len(),
        }
    }

    /// The token at the beginning of a text.
    pub fn bos(&self) -> Option<u32> {
        self.vocab.bos
    }

    /// The token at the end of a text.
    pub fn eos(&self) -> Option<u32> {
        self.vocab.eos
    }

    /// The token at the end of a turn.
    pub fn eot(&self) -> Option<u32> {
        self.vocab.eot
    }

    /// The token for padding batches.
    pub fn pad(&self) -> Option<u32> {
        self.vocab.pad
    }

    /// The token for what the vocabulary lacks.
    pub fn unknown(&self) -> Option<u32> {
        self.vocab.unknown
    }

    /// The tokens for filling in the middle.
    pub fn fill_in_middle(&self) -> FillInMiddle {
        self.vocab.fim
    }

    /// Whether generation stops at `id`.
    pub fn is_end_of_generation(&self, id: u32) -> bool {
        self.vocab.ends.binary_search(&id).is_ok()
    }

    /// The tokens at which generation stops, ascending.
    pub fn ends_of_generation(&self) -> &[u32] {
        &self.vocab.ends
    }

    /// Whether `id` is structure rather than text: a control token or the unknown token.
    pub fn is_control(&self, id: u32) -> bool {
        self.vocab.is(id, CONTROL | UNKNOWN)
    }

    /// Whether the file asks for BOS before a text.
    pub fn adds_bos(&self) -> bool {
        self.add_bos && self.vocab.bos.is_some()
    }

    /// Whether the file asks for EOS after a text.
    pub fn adds_eos(&self) -> bool {
        self.add_eos && self.vocab.eos.is_some()
    }

    /// The token that `text` is, if it is one: a special token by its text, else one that stands for these bytes.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        let word = text.as_bytes();
        self.all.id(word).or_else(|| match &self.algorithm {
            Algorithm::Bpe { pre, bpe } if pre.raw => bpe.token(&escape(word, false)),
            Algorithm::Bpe { bpe, .. } => bpe.token(word),
            Algorithm::Spm { spm, .. } => spm.words.get(&escape(word, false)),
            Algorithm::None { .. } => None,
        })
    }
}

/// `text` with `▁` for every space, and one more before it if `prefix`.
fn escape(text: &[u8], prefix: bool) -> Vec<u8> {
    const SPACE: &[u8] = "▁".as_bytes();
    let mut out = Vec::with_capacity(text.len() + text.len() / 2 + SPACE.len());
    if prefix {
        out.extend_from_slice(SPACE);
    }
    for (index, part) in text.split(|&byte| byte == b' ').enumerate() {
        if index > 0 {
            out.extend_from_slice(SPACE);
        }
        out.extend_from_slice(part);
    }
    out
}
