//! What stands for grammars in a library that was built without the feature `grammar`, to be smaller: no grammar can be made.

use std::sync::Arc;

use super::GrammarSource;
use crate::text::Tokenizer;
use crate::{Error, Result};

/// A model's tokens for grammars: there are none.
#[derive(Clone, Copy, Debug)]
pub enum Vocabulary {}

impl Vocabulary {
    /// Says that there are no grammars.
    ///
    /// # Errors
    /// [`Error::Unsupported`], always.
    pub fn new(_tokenizer: &Tokenizer) -> Result<Vocabulary> {
        Err(Error::Unsupported(
            "JSON schemas, grammars and forced calls of tools: this library was built without the feature `grammar`"
                .into(),
        ))
    }
}

/// A compiled grammar: there are none.
#[derive(Clone, Copy, Debug)]
pub enum Grammar {}

impl Grammar {
    /// Cannot be called: there is no [`Vocabulary`].
    ///
    /// # Errors
    /// None.
    pub fn compile(vocabulary: &Arc<Vocabulary>, _source: GrammarSource) -> Result<Grammar> {
        match **vocabulary {}
    }

    /// Whether it was compiled for these tokens.
    pub fn is_for(&self, _vocabulary: &Arc<Vocabulary>) -> bool {
        match *self {}
    }

    /// The constraint on one answer.
    pub fn start(&self) -> Constraint {
        match *self {}
    }
}

/// How far an answer has come in its grammar: there are none.
#[derive(Clone, Copy, Debug)]
pub enum Constraint {}

impl Constraint {
    /// Masks logits.
    ///
    /// # Errors
    /// None.
    pub fn mask(&mut self, _logits: &mut [f32]) -> Result<()> {
        match *self {}
    }

    /// Takes the next token.
    ///
    /// # Errors
    /// None.
    pub fn accept(&mut self, _token: u32) -> Result<()> {
        match *self {}
    }

    /// Whether nothing but the end may follow.
    pub fn is_complete(&self) -> bool {
        match *self {}
    }
}
