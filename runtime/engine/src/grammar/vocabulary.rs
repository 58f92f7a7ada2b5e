//! A model's tokens as a trie of their bytes, which every grammar for the model is matched against.
//!
//! What a token stands for is what the answer's text gets from it, byte for byte. Tokens that add no text (control tokens,
//! those that end an answer, unused ones) match no text; the first two have a name that grammars may refer to.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::api::ParserLimits;
use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

use crate::text::Tokenizer;
use crate::{Error, Result};

/// The longest token in bytes that the trie holds; a longer one is never chosen.
const LONGEST: usize = 1024;

/// Bytes of all tokens together, which bounds the nodes of the trie.
const LARGEST: usize = 1 << 22;

/// A byte that no UTF-8 has, before the names of tokens that are no text.
const MARK: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

/// Tokens within JSON strings, which most masks allow all of or none of; they are matched once, not at every step.
const SLICES: [&str; 1] = [r#"[^"\\\x00-\x1F\x7F]{1,30}"#];

/// What a grammar may cost. A step is bounded to some tens of milliseconds, a grammar to some tens of megabytes.
const LIMITS: ParserLimits = ParserLimits {
    max_items_in_row: 2_000,
    initial_lexer_fuel: 1_000_000,
    step_lexer_fuel: 200_000,
    step_max_items: 50_000,
    max_lexer_states: 50_000,
    max_grammar_size: 500_000,
    precompute_large_lexemes: true,
    verbose_errors: false,
};

/// See the module's text. A model makes it once, when the first grammar is compiled.
pub struct Vocabulary {
    factory: ParserFactory,
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary").finish_non_exhaustive()
    }
}

impl Vocabulary {
    /// The tokens of `tokenizer`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where they have no text, or too much.
    pub fn new(tokenizer: &Tokenizer) -> Result<Vocabulary> {
        let words: Vec<Vec<u8>> = (0..tokenizer.vocab_size() as u32).map(|id| word(tokenizer, id)).collect();
        let bytes: usize = words.iter().map(Vec::len).sum();
        if bytes == 0 || bytes >= LARGEST {
            return Err(Error::Unsupported(format!(
                "grammars for a vocabulary of {} tokens with {bytes} bytes; there must be some, and fewer than {LARGEST}",
                words.len()
            )));
        }
        let ends = tokenizer.ends_of_generation();
        let end = ends.first().copied().unwrap_or(INVALID_TOKEN);
        let mut trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, end), &words);
        if !ends.is_empty() {
            trie = trie.with_eos_tokens(ends);
        }
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &SLICES.map(String::from))
            .map_err(|e| Error::Unsupported(format!("grammars for this vocabulary: {e}")))?;
        *factory.quiet().limits_mut() = LIMITS;
        Ok(Vocabulary { factory })
    }

    /// What compiles grammars.
    pub(super) fn factory(&self) -> &ParserFactory {
        &self.factory
    }
}

/// What the trie holds for token `id`; nothing for one that is never allowed.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let text = tokenizer.token_bytes(id, true).unwrap_or_default();
    let is_text = !tokenizer.is_control(id) && !tokenizer.is_end_of_generation(id);
    match text {
        // Would be taken for the name of a token.
        [MARK, _, ..] if is_text => Vec::new(),
        _ if is_text && text.len() <= LONGEST => text.to_vec(),
        _ if !is_text && text.len() < LONGEST => [&[MARK], text].concat(),
        _ => Vec::new(),
    }
}
