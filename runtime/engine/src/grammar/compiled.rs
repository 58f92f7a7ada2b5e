//! Grammars compiled by `llguidance`, and how far an answer has come in one.

use std::fmt::{self, Display};
use std::sync::Arc;

use llguidance::Matcher;
use llguidance::api::TopLevelGrammar;

use super::{GrammarSource, Vocabulary, WHITESPACE, with_whitespace};
use crate::deep::on_deep_stack;
use crate::{Error, Result};

/// The longest source in bytes.
const LONGEST_SOURCE: usize = 1 << 20;

/// The longest message about one, in characters.
const LONGEST_MESSAGE: usize = 400;

impl GrammarSource {
    /// What messages call it.
    fn name(&self) -> &'static str {
        match self {
            GrammarSource::JsonSchema(_) => "JSON schema",
            GrammarSource::Lark(_) => "grammar",
            GrammarSource::Regex(_) => "regular expression",
        }
    }

    pub(super) fn text(&self) -> &str {
        match self {
            GrammarSource::JsonSchema(text) | GrammarSource::Lark(text) | GrammarSource::Regex(text) => text,
        }
    }

    fn error(&self, what: impl Display) -> Error {
        let what = what.to_string();
        // What panicked there says so, with a backtrace; other messages may show the line they are about.
        let what = what.split("\n<backtrace>").next().unwrap_or_default();
        let what = what.replace("NoExtensionBias", "no token of the model goes on from here");
        let mut what: String = what.replacen("panic: ", "cannot be held: ", 1).replace("<non-verbose/>", "");
        if let Some((end, _)) = what.char_indices().nth(LONGEST_MESSAGE) {
            what.replace_range(end.., " …");
        }
        Error::Grammar(format!("the {}: {}", self.name(), what.trim_end()))
    }

    fn parse(&self) -> Result<TopLevelGrammar> {
        let text = self.text();
        if text.len() > LONGEST_SOURCE {
            return Err(self.error(format!("its {} bytes exceed {LONGEST_SOURCE}", text.len())));
        }
        Ok(match self {
            GrammarSource::JsonSchema(text) => {
                let schema = serde_json::from_str(text).map_err(|e| self.error(format!("is no JSON: {e}")))?;
                TopLevelGrammar::from_json_schema(with_whitespace(schema, WHITESPACE))
            }
            GrammarSource::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
            GrammarSource::Regex(text) => TopLevelGrammar::from_regex(text),
        })
    }
}

/// A compiled grammar for the tokens of one model. Cloning shares.
#[derive(Clone)]
pub struct Grammar {
    inner: Arc<Inner>,
}

struct Inner {
    vocabulary: Arc<Vocabulary>,
    source: GrammarSource,
    /// At the beginning of an answer.
    start: Matcher,
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Grammar").field(&self.inner.source).finish()
    }
}

impl Grammar {
    /// Compiles `source` for the tokens of `vocabulary`. [`Model::grammar`](crate::session::Model::grammar) does it for
    /// those of a model.
    ///
    /// # Errors
    /// [`Error::Grammar`] for a source that is wrong, not supported or too large.
    pub fn compile(vocabulary: &Arc<Vocabulary>, source: GrammarSource) -> Result<Grammar> {
        let mut start = on_deep_stack("grammar", Error::Grammar, || {
            let parsed = source.parse()?;
            // With the reasons behind the reason.
            let parser = vocabulary.factory().create_parser(parsed).map_err(|e| source.error(format!("{e:#}")))?;
            Ok(Matcher::new(Ok(parser)))
        })?;
        for warning in start.grammar_warnings() {
            log::warn!("the {}: {warning}", source.name());
        }
        Ok(Grammar { inner: Arc::new(Inner { vocabulary: vocabulary.clone(), source, start }) })
    }

    /// Whether it was compiled for these tokens.
    pub fn is_for(&self, vocabulary: &Arc<Vocabulary>) -> bool {
        Arc::ptr_eq(&self.inner.vocabulary, vocabulary)
    }

    /// The constraint on one answer, at its beginning.
    pub fn start(&self) -> Constraint {
        Constraint { grammar: self.clone(), matcher: self.inner.start.deep_clone() }
    }
}

/// How far an answer has come in its grammar.
pub struct Constraint {
    grammar: Grammar,
    matcher: Matcher,
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint").field("grammar", &self.grammar).finish_non_exhaustive()
    }
}

impl Constraint {
    /// Sets the logits of all tokens that may not come next to −∞: `[vocab]`. Tokens that end an answer may come where the
    /// grammar is at its end.
    ///
    /// # Errors
    /// [`Error::Grammar`] where the step exceeds its budget, or no token of the vocabulary goes on.
    pub fn mask(&mut self, logits: &mut [f32]) -> Result<()> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|e| self.grammar.inner.source.error(e))?;
        let (words, rest) = logits.split_at_mut(logits.len().min(allowed.len()));
        for (logits, bits) in words.chunks_mut(32).zip(allowed.as_slice()) {
            match *bits {
                0 => logits.fill(f32::NEG_INFINITY),
                u32::MAX => {}
                bits => {
                    let masked = logits.iter_mut().enumerate().filter(|(i, _)| bits >> i & 1 == 0);
                    masked.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
                }
            }
        }
        rest.fill(f32::NEG_INFINITY);
        Ok(())
    }

    /// Takes the token that comes next.
    ///
    /// # Errors
    /// [`Error::Grammar`] where the grammar does not allow it.
    pub fn accept(&mut self, token: u32) -> Result<()> {
        self.matcher.consume_token(token).map_err(|e| self.grammar.inner.source.error(e))
    }

    /// Whether nothing but the end may follow.
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }
}
