//! Records to tokens: what is trained is what will be served.
//!
//! When a conversation is served, the prompt up to an answer is rendered and encoded, and the model goes on from there
//! token by token. So an answer is learned behind exactly those tokens: they must be the beginning of the encoded
//! conversation. They are, for nearly all templates, because a control token or a line feed stands before an answer;
//! where a token spans the border (an answer that begins with a line feed, say), the conversation becomes one example
//! for each answer, with prompt and answer encoded apart. The end of a turn is part of the answer.
//!
//! A model without a chat template sees the contents of the messages, each answer followed by EOS: first BOS if the file
//! asks for it, then a prompt, the record's separator (a line feed; nothing for `prompt` and `completion`), the answer,
//! EOS, the next prompt. Plain text is BOS, text, EOS, in as many rows as it takes. Control tokens written out in the
//! data stand for themselves, as in prompts.

use std::ops::Range;

use kinglet_engine::session::Model;
use kinglet_engine::text::{ChatTemplate, EncodeOptions, Message, Tokenizer};
use serde_json::Value;

use super::{Example, Examples, PairExample, RatedExample, Record, Sample, Summary, Truncation, unsuited};
use crate::Result;
use crate::preference::Loss;

/// Encodes records for one model.
#[derive(Clone, Copy, Debug)]
pub struct Encoder<'m> {
    tokenizer: &'m Tokenizer,
    template: Option<&'m ChatTemplate>,
    seq: usize,
    truncation: Truncation,
}

impl<'m> Encoder<'m> {
    /// For `model`, with at most `seq` tokens an example.
    ///
    /// # Errors
    /// [`Error::Template`](crate::Error::Template) where the model's chat template does not compile.
    pub fn new(model: &'m Model, seq: usize, truncation: Truncation) -> Result<Encoder<'m>> {
        Ok(Encoder::with(model.tokenizer(), model.chat_template()?, seq, truncation))
    }

    /// With a template of one's own, or none.
    pub fn with(
        tokenizer: &'m Tokenizer,
        template: Option<&'m ChatTemplate>,
        seq: usize,
        truncation: Truncation,
    ) -> Encoder<'m> {
        Encoder { tokenizer, template, seq: seq.max(2), truncation }
    }

    /// The examples of `records` for this loss, counted in `summary`.
    ///
    /// # Errors
    /// [`Error::Format`](crate::Error::Format), with file and line, for a record that does not suit the loss or that the
    /// template refuses.
    pub fn examples(&self, records: &[Record], loss: &Loss, summary: &mut Summary) -> Result<Examples> {
        let (mut plain, mut pairs, mut rated) = (Vec::new(), Vec::new(), Vec::new());
        for record in records {
            match (loss, &record.sample) {
                (Loss::CrossEntropy, Sample::Text(text)) => {
                    plain.extend(self.text(text).into_iter().inspect(|example| summary.count(example)));
                }
                (Loss::CrossEntropy, Sample::Chat { messages, tools }) => {
                    for example in self.conversation(messages, tools.as_ref(), record)? {
                        plain.extend(self.fit(example, summary));
                    }
                }
                (Loss::Kto { .. }, Sample::Rated { prompt, completion, good }) => {
                    rated.extend(self.rated(prompt, completion, *good, record, summary)?);
                }
                (Loss::Kto { .. }, Sample::Pair { prompt, chosen, rejected }) => {
                    rated.extend(self.rated(prompt, chosen, true, record, summary)?);
                    rated.extend(self.rated(prompt, rejected, false, record, summary)?);
                }
                (Loss::CrossEntropy | Loss::Kto { .. }, _) => return Err(unsuited(record, loss)),
                (_, Sample::Pair { prompt, chosen, rejected }) => {
                    let chosen = self.answer(prompt, chosen, record)?;
                    let rejected = self.answer(prompt, rejected, record)?;
                    if let (Some(chosen), Some(rejected)) = (self.fit(chosen, summary), self.fit(rejected, summary)) {
                        pairs.push(PairExample { chosen, rejected });
                    }
                }
                _ => return Err(unsuited(record, loss)),
            }
        }
        Ok(match loss {
            Loss::CrossEntropy => Examples::Plain(plain),
            Loss::Kto { .. } => Examples::Rated(rated),
            _ => Examples::Pairs(pairs),
        })
    }

    /// A text in consecutive examples of `seq` tokens.
    pub fn text(&self, text: &str) -> Vec<Example> {
        let mut tokens = self.tokenizer.encode_prompt(text);
        if let Some(eos) = self.tokenizer.eos().filter(|eos| tokens.last() != Some(eos)) {
            tokens.push(eos);
        }
        let rows = tokens.chunks(self.seq).filter(|row| row.len() > 1);
        rows.map(|row| Example::plain(row.to_vec())).collect()
    }

    /// A conversation, not cut: one example, or one for each answer where tokens span their borders.
    ///
    /// # Errors
    /// [`Error::Format`](crate::Error::Format), with file and line, where the template refuses it.
    pub fn conversation(&self, messages: &[Message], tools: Option<&Value>, record: &Record) -> Result<Vec<Example>> {
        let Some(template) = self.template else {
            return Ok(vec![self.without_template(messages, record.separator)]);
        };
        let segments = template
            .render_masked(messages, tools)
            .map_err(|error| record.error("conversation", &error.to_string()))?;
        let (mut text, mut answers) = (String::new(), Vec::new());
        for segment in segments {
            let start = text.len();
            text.push_str(&segment.text);
            if segment.trained {
                answers.push(start..text.len());
            }
        }
        Ok(match self.in_one(&text, &answers) {
            Some(example) => vec![example],
            None => answers.into_iter().map(|answer| self.apart(&text[..answer.end], answer.start)).collect(),
        })
    }

    /// `text` with its `answers` trained, if each begins at a border of tokens.
    fn in_one(&self, text: &str, answers: &[Range<usize>]) -> Option<Example> {
        let tokens = self.tokenizer.encode_prompt(text);
        let mut trained = vec![false; tokens.len()];
        for answer in answers {
            let start = self.tokenizer.encode_prompt(&text[..answer.start]);
            if !tokens.starts_with(&start) {
                return None;
            }
            // A token that spans the end of the answer is not part of it.
            let end = common(&self.tokenizer.encode_prompt(&text[..answer.end]), &tokens);
            trained[start.len()..end.max(start.len())].fill(true);
        }
        Some(Example::new(tokens, trained))
    }

    /// `text` with all from byte `start` trained, and what is before it encoded by itself.
    fn apart(&self, text: &str, start: usize) -> Example {
        let (prompt, answer) = text.split_at(start);
        let mut tokens = self.tokenizer.encode_prompt(prompt);
        let behind = self.tokenizer.encode(answer, EncodeOptions::PROMPT);
        let mut from = tokens.len();
        if self.tokenizer.decode(&behind, true) == answer.as_bytes() {
            tokens.extend(behind);
        } else {
            // SentencePiece puts a space before what it takes for a beginning: the whole's tokens then, of which one
            // that spans the border is not trained.
            let whole = self.tokenizer.encode_prompt(text);
            from = common(&tokens, &whole) + 1;
            tokens = whole;
        }
        let trained = (0..tokens.len()).map(|index| index >= from).collect();
        Example::new(tokens, trained)
    }

    fn without_template(&self, messages: &[Message], separator: &str) -> Example {
        let (mut example, mut prompt) = (Example::default(), String::new());
        for message in messages {
            if message.role != "assistant" {
                prompt.push_str(&message.content);
                prompt.push_str(separator);
                continue;
            }
            let first = example.tokens.is_empty();
            let encode = |text: &str| match first {
                true => self.tokenizer.encode_prompt(text),
                false => self.tokenizer.encode(text, EncodeOptions::PROMPT),
            };
            let start = encode(&prompt);
            let mut turn = encode(&format!("{prompt}{}", message.content));
            if !turn.starts_with(&start) {
                turn.clone_from(&start);
                turn.extend(self.tokenizer.encode(&message.content, EncodeOptions::PROMPT));
            }
            turn.extend(self.tokenizer.eos());
            example.trained.extend((0..turn.len()).map(|index| index >= start.len()));
            example.tokens.extend(turn);
            prompt.clear();
        }
        example
    }

    /// `prompt` and an answer to it, of which the last message alone is trained.
    fn answer(&self, prompt: &[Message], answer: &[Message], record: &Record) -> Result<Example> {
        let messages = [prompt, answer].concat();
        let mut example = self.conversation(&messages, None, record)?.pop().unwrap_or_default();
        let end = example.trained.iter().rposition(|trained| *trained).unwrap_or(0);
        let start = example.trained[..end.min(example.trained.len())].iter().rposition(|trained| !trained);
        example.trained[..start.map_or(0, |start| start + 1)].fill(false);
        Ok(example)
    }

    fn rated(
        &self,
        prompt: &[Message],
        answer: &[Message],
        good: bool,
        record: &Record,
        summary: &mut Summary,
    ) -> Result<Option<RatedExample>> {
        let example = self.fit(self.answer(prompt, answer, record)?, summary);
        Ok(example.map(|example| {
            let prompt = example.trained.iter().position(|trained| *trained).unwrap_or(example.tokens.len());
            RatedExample { example, prompt, good }
        }))
    }

    /// The example within `seq` tokens; `None` if nothing of it can be learned.
    fn fit(&self, mut example: Example, summary: &mut Summary) -> Option<Example> {
        let over = example.tokens.len().saturating_sub(self.seq);
        if over > 0 {
            match self.truncation {
                Truncation::End => {
                    example.tokens.truncate(self.seq);
                    example.trained.truncate(self.seq);
                }
                Truncation::Start => {
                    example.tokens.drain(..over);
                    example.trained.drain(..over);
                }
                Truncation::Drop => {
                    summary.dropped += 1;
                    return None;
                }
            }
        }
        if example.trained_tokens() == 0 {
            summary.dropped += 1;
            return None;
        }
        summary.truncated += usize::from(over > 0);
        summary.count(&example);
        Some(example)
    }
}

impl Summary {
    fn count(&mut self, example: &Example) {
        self.examples += 1;
        self.tokens += example.tokens.len();
        self.trained += example.trained_tokens();
    }
}

/// How many tokens two lists begin with in common.
fn common(a: &[u32], b: &[u32]) -> usize {
    std::iter::zip(a, b).take_while(|(a, b)| a == b).count()
}
