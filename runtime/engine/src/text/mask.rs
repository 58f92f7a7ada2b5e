//! Which parts of a rendered conversation a model is trained on: what the assistant said, up to the end of its turn.
//!
//! A template does not say where a message begins and ends in what it renders; but what it renders for the first k
//! messages is, for nearly all templates, the beginning of what it renders for more. So the conversation is rendered up
//! to each assistant's message, once without it (with the generation prompt: the header of the turn is not trained) and
//! once with it, and the difference is that message. Where the beginning changes as messages are added (a template that
//! drops earlier reasoning, say) no mask is right, and the error says so.

use super::message::Message;
use super::template::ChatTemplate;
use crate::{Error, Result};

/// A stretch of a rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The text; the texts of all segments together are the rendered conversation.
    pub text: String,
    /// Whether the model is to learn to write it.
    pub trained: bool,
}

impl ChatTemplate {
    /// Renders `messages` in full and marks what the assistant said, with the token that ends its turn. Segments
    /// alternate and none is empty; without an assistant's message nothing is trained.
    ///
    /// # Errors
    /// [`Error::Template`] as [`ChatTemplate::render`], and where the template renders the beginning of a conversation
    /// differently once more messages follow, so that the assistant's part cannot be told.
    pub fn render_masked(&self, messages: &[Message], tools: Option<&serde_json::Value>) -> Result<Vec<Segment>> {
        let full = self.render(messages, tools, false)?;
        let mut segments = Vec::new();
        let mut done = 0;
        for (index, message) in messages.iter().enumerate().filter(|(_, message)| message.role == "assistant") {
            let (start, end) = self.trained_range(&full, messages, index, message, tools)?;
            if start < done {
                return Err(unstable(index, "overlaps the one before it"));
            }
            segments.push(Segment { text: full[done..start].to_owned(), trained: false });
            segments.push(Segment { text: full[start..end].to_owned(), trained: true });
            done = end;
        }
        segments.push(Segment { text: full[done..].to_owned(), trained: false });
        segments.retain(|segment| !segment.text.is_empty());
        // Two messages of the assistant in a row may leave two trained segments side by side.
        segments.dedup_by(|next, last| {
            let same = next.trained == last.trained;
            if same {
                last.text.push_str(&next.text);
            }
            same
        });
        Ok(segments)
    }

    /// Where in `full` message `index` begins and ends.
    fn trained_range(
        &self,
        full: &str,
        messages: &[Message],
        index: usize,
        message: &Message,
        tools: Option<&serde_json::Value>,
    ) -> Result<(usize, usize)> {
        let with = self.render(&messages[..=index], tools, false)?;
        if !full.starts_with(&with) {
            return Err(unstable(index, "is rendered differently once more messages follow it"));
        }
        let end = with.len() - self.after_end(&with);
        let before = &messages[..index];
        // The header as the model will see it when it generates.
        if let Ok(prompt) = self.render(before, tools, true)
            && with.starts_with(&prompt)
            && self.render(before, tools, false).is_ok_and(|plain| plain != prompt)
            && prompt.len() < end
        {
            return Ok((prompt.len(), end));
        }
        // No usable generation prompt: the content itself must do.
        let from = self.render(before, tools, false).ok().filter(|plain| with.starts_with(plain.as_str()));
        let from = from.map_or(0, |plain| plain.len());
        let content = message.content.trim();
        // A template that leaves the message out ends before it begins.
        let rendered = with.get(from..end).unwrap_or_default();
        match rendered.rfind(content).filter(|_| !content.is_empty()) {
            Some(at) => Ok((from + at, end)),
            None => Err(unstable(index, "does not follow the generation prompt, and its content is not found either")),
        }
    }

    /// How much follows the token that ends a turn, if that is only white space.
    fn after_end(&self, text: &str) -> usize {
        let trimmed = text.trim_end();
        if self.ends.iter().any(|end| trimmed.ends_with(end.as_str())) { text.len() - trimmed.len() } else { 0 }
    }
}

fn unstable(index: usize, what: &str) -> Error {
    Error::Template(format!(
        "the assistant's message {index} {what}, so the trained part cannot be marked; split the conversation there, \
         or train with a template that renders each message by itself"
    ))
}
