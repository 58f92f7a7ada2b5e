//! Text to tokens and back, and conversations to text: both as the model's GGUF says.
//!
//! | file | what |
//! | --- | --- |
//! | `tokenizer` | [`Tokenizer`]: encode, decode, the special tokens |
//! | `vocab` | kinds and roles of tokens |
//! | `special` | cutting special tokens out of text |
//! | `pretokenize`, `unicode` | cutting text into words; classes of characters |
//! | `bpe`, `spm` | the two algorithms |
//! | `words` | byte strings by number and back |
//! | `stream` | [`Utf8Stream`]: whole characters from a stream of tokens |
//! | `message` | [`Message`] and its parts |
//! | `template`, `python` | [`ChatTemplate`]; what templates expect of Python |
//! | `tools` | [`ToolParser`]: calls of tools in what a model says |
//! | `mask` | which parts of a conversation are trained |
//!
//! Tokens equal llama.cpp's for every input. The oracle tests compare them; where llama.cpp deviates from the original
//! tokenizer (it does not normalise, for one), so does this.

mod bpe;
mod mask;
mod message;
mod pretokenize;
mod python;
mod special;
mod spm;
mod stream;
mod template;
#[cfg(test)]
mod tests;
mod tokenizer;
mod tools;
mod unicode;
mod vocab;
mod words;

pub use mask::Segment;
pub use message::{FunctionCall, Message, ToolCall};
pub use stream::Utf8Stream;
pub(crate) use stream::overlap;
pub use template::{ChatTemplate, RenderOptions};
pub use tokenizer::{EncodeOptions, Tokenizer};
pub(crate) use tools::{ARGUMENTS_MARK, CLOSE_TAG, LIST_MARK, OPEN_TAG};
pub use tools::{Said, Tool, ToolFormat, ToolParser};
pub use vocab::FillInMiddle;
