//! The messages of a conversation, in the shape that chat templates and the OpenAI API share.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};

/// One message of a conversation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool` or what else the template knows.
    pub role: String,
    /// What is said. Reads a string, `null` (as empty) or a list of parts (their `text`s together).
    #[serde(default, deserialize_with = "content")]
    pub content: String,
    /// The calls that an assistant's message makes.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// The name of the speaker, or of the tool that answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The call that a tool's message answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// What an assistant thought before it answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
}

/// A call of a tool.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ToolCall {
    /// What the answer refers to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Always `function`, so far.
    #[serde(rename = "type", default = "function")]
    pub kind: String,
    /// What is called.
    pub function: FunctionCall,
}

/// The name and the arguments of a call.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FunctionCall {
    /// The tool's name.
    pub name: String,
    /// The arguments: an object, or a string that holds one in JSON (as OpenAI sends them).
    #[serde(default)]
    pub arguments: Value,
}

impl Message {
    /// A message of nothing but text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into(), ..Message::default() }
    }

    /// The message as templates expect it: absent fields absent, arguments as objects, the reasoning under both of its
    /// customary names.
    pub(super) fn to_template(&self) -> Value {
        let mut fields = Map::new();
        fields.insert("role".into(), json!(self.role));
        fields.insert("content".into(), json!(self.content));
        if !self.tool_calls.is_empty() {
            fields.insert("tool_calls".into(), self.tool_calls.iter().map(ToolCall::to_template).collect());
        }
        let optional = [
            ("name", &self.name),
            ("tool_call_id", &self.tool_call_id),
            ("reasoning_content", &self.reasoning_content),
            ("thinking", &self.reasoning_content),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                fields.insert(key.into(), json!(value));
            }
        }
        Value::Object(fields)
    }
}

impl ToolCall {
    fn to_template(&self) -> Value {
        let mut fields = Map::new();
        if let Some(id) = &self.id {
            fields.insert("id".into(), json!(id));
        }
        fields.insert("type".into(), json!(if self.kind.is_empty() { "function" } else { &self.kind }));
        let arguments = match &self.function.arguments {
            Value::String(text) => match serde_json::from_str(text) {
                Ok(parsed @ Value::Object(_)) => parsed,
                _ => json!(text),
            },
            other => other.clone(),
        };
        fields.insert("function".into(), json!({ "name": self.function.name, "arguments": arguments }));
        Value::Object(fields)
    }
}

fn function() -> String {
    "function".into()
}

/// One part of a content given as a list.
#[derive(Deserialize)]
struct Part {
    #[serde(default)]
    text: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

fn content<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(match Option::<Content>::deserialize(deserializer)? {
        None => String::new(),
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => parts.into_iter().map(|part| part.text).collect(),
    })
}

fn null_as_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_api_sends() {
        let message: Message = serde_json::from_value(json!({
            "role": "assistant", "content": null,
            "tool_calls": [{ "id": "1", "type": "function", "function": { "name": "f", "arguments": "{\"b\": 1, \"a\": 2}" } }],
        }))
        .unwrap();
        assert_eq!(message.content, "");
        let value = message.to_template();
        assert_eq!(value["tool_calls"][0]["function"]["arguments"], json!({ "b": 1, "a": 2 }));
        assert!(value.get("name").is_none());
        let message: Message = serde_json::from_value(json!({
            "role": "user", "tool_calls": null,
            "content": [{ "type": "text", "text": "a" }, { "type": "image" }, { "type": "text", "text": "b" }],
        }))
        .unwrap();
        assert_eq!(message, Message::new("user", "ab"));
    }
}
