//! What an answer may be: a JSON schema, a grammar or a regular expression, held token by token.
//!
//! A [`Grammar`] is compiled for the tokens of one model. An answer under it carries a [`Constraint`]: before each choice
//! it masks the logits of all tokens that would leave the grammar, behind each it takes the token that was chosen. Sampling
//! sees a smaller vocabulary and is otherwise as ever, so the model keeps its own ways of saying what is allowed, and every
//! sampler works. Where only the end is left, the answer ends.
//!
//! The work is done by `llguidance`: a lexer of lazily derived automata below an Earley parser, run over a trie of the
//! vocabulary. Grammars come from callers: their length, the fuel of compiling and of each step, and the states kept are
//! bounded, what panics in there is an error, and compiling has a deep stack of its own. It takes the feature `grammar`;
//! without it there is all of this, and compiling is an error that says so.

#[cfg(not(feature = "grammar"))]
#[path = "absent.rs"]
mod compiled;
#[cfg(feature = "grammar")]
mod compiled;
mod tools;
#[cfg(feature = "grammar")]
mod vocabulary;

#[cfg(all(test, feature = "grammar"))]
mod tests;

use serde_json::{Map, Value, json};

#[cfg(not(feature = "grammar"))]
pub use compiled::Vocabulary;
pub use compiled::{Constraint, Grammar};
#[cfg(feature = "grammar")]
pub use vocabulary::Vocabulary;

/// White space between the parts of JSON, unless a schema says otherwise: none, a space, or a line break with its
/// indentation. Models that may write more of it sometimes write nothing else.
#[cfg(feature = "grammar")]
const WHITESPACE: &str = r" |\r?\n[ \t]{0,20}";
/// The same in the calls of tools, which nobody reads.
const NARROW: &str = " ";

/// What an answer is to match from its first token to its last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GrammarSource {
    /// The text of a JSON schema. What cannot be held is an error that names it; `{}` is any JSON. A key `x-guidance` at
    /// the top may have options of `llguidance`: `{"whitespace_flexible": false}`, `{"coerce_one_of": true}`.
    JsonSchema(String),
    /// A context-free grammar in the dialect of Lark that `llguidance` reads: rules in lower case, tokens in upper case,
    /// `start` first; `%json {…}` is a schema, `<|name|>` a control token.
    Lark(String),
    /// A regular expression for all of the answer.
    Regex(String),
}

/// The schema with a pattern of white space among its options, unless they are about white space already.
fn with_whitespace(schema: Value, pattern: &str) -> Value {
    let mut schema = match schema {
        Value::Object(schema) => schema,
        Value::Bool(true) => Map::new(),
        other => return other,
    };
    let options = schema.entry("x-guidance").or_insert_with(|| json!({}));
    if let Some(options) = options.as_object_mut()
        && !options.keys().any(|key| key.starts_with("whitespace"))
    {
        options.insert("whitespace_pattern".into(), pattern.into());
    }
    Value::Object(schema)
}
