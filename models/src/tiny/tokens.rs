//! The vocabulary of tiny models: byte-level BPE as GPT-2 has it, small but complete.
//!
//! Ids: 0 to 255 the bytes, in GPT-2's order of printable stand-ins; then one token per merge; then the special tokens;
//! the rest up to the size of the vocabulary is marked unused.

use kinglet_engine::gguf::Writer;
use kinglet_engine::{Error, Result};

use super::TinyConfig;

/// Pairs that become one token, in order of rank; `Ġ` stands for a space, `Ċ` for a line feed.
const MERGES: &[&str] = &[
    "h e", "i n", "t he", "Ġ t", "a n", "e r", "o n", "r e", "Ġt he", "Ġ a", "o u", "a t", "n d", "Ġa nd", "an d",
    "e n", "o r", "i s", "Ġ w", "i t", "l l", "Ġ s", "e d", "in g", "Ġ o", "Ġ b", "e s", "Ġ y", "Ġy ou", "Ġo f",
    "Ġ is", "Ġt o", "t o", "Ġ h", "he r", "u s", "s er", "a s", "us er", "a l", "l e", "h i", "hi s", "Ġ in", "m e",
    "l o", "he l", "hel lo", "Ċ Ċ", "Ġ Ġ",
];

/// Special tokens, all of the control type.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// Tokens with a meaning.
pub(super) const COUNT: u32 = 256 + MERGES.len() as u32 + SPECIAL.len() as u32;

/// With tools, and calls between the tags that Hermes 2 and its heirs have; without them ChatML as it is.
const CHATML: &str = "{% if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}\
                      {{ '<|im_end|>' + '\\n' }}{% endif %}\
                      {% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}\
                      {% for call in message['tool_calls'] or [] %}\
                      {{ '<tool_call>\\n' + call['function'] | tojson + '\\n</tool_call>' }}{% endfor %}\
                      {{ '<|im_end|>' + '\\n' }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Token types as GGUF numbers them.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const UNUSED: i32 = 5;

/// Puts the tokenizer's keys and the chat template into the metadata.
pub(super) fn write(writer: &mut Writer, config: &TinyConfig) -> Result<()> {
    if config.vocab < COUNT {
        return Err(Error::argument(format!(
            "tiny {} model: a byte-level vocabulary has at least {COUNT} tokens, not {}",
            config.arch, config.vocab
        )));
    }
    let mut tokens: Vec<String> = stand_ins().map(String::from).collect();
    tokens.extend(MERGES.iter().map(|pair| pair.replace(' ', "")));
    let mut types = vec![NORMAL; tokens.len()];
    let first_special = tokens.len() as u32;
    tokens.extend(SPECIAL.map(String::from));
    types.resize(tokens.len(), CONTROL);
    let unused = config.vocab as usize - tokens.len();
    tokens.extend((0..unused).map(|i| format!("<|unused_{i}|>")));
    types.resize(tokens.len(), UNUSED);

    let pre = if config.arch == "llama" { "smollm" } else { "qwen2" };
    writer
        .set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.pre", pre)
        .set("tokenizer.ggml.tokens", tokens)
        .set("tokenizer.ggml.token_type", types)
        .set("tokenizer.ggml.merges", MERGES.iter().map(|s| s.to_string()).collect::<Vec<_>>())
        .set("tokenizer.ggml.bos_token_id", first_special)
        .set("tokenizer.ggml.eos_token_id", first_special + 2)
        .set("tokenizer.ggml.padding_token_id", first_special)
        .set("tokenizer.ggml.add_bos_token", false)
        .set("tokenizer.chat_template", CHATML);
    Ok(())
}

/// GPT-2's printable stand-ins for the 256 bytes: first the bytes that are printable themselves, in order, then the
/// others as the characters from U+0100 on.
fn stand_ins() -> impl Iterator<Item = char> {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let others = (0..=255u8).filter(move |b| !printable(b)).zip('\u{100}'..).map(|(_, c)| c);
    (0..=255u8).filter(printable).map(char::from).chain(others)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Every merge joins tokens that exist by then and makes a new one, or the vocabulary would have holes.
    #[test]
    fn merges_build_on_each_other() {
        let mut known: HashSet<String> = stand_ins().map(String::from).collect();
        assert_eq!(known.len(), 256);
        assert!(known.contains("Ġ") && known.contains("Ċ"));
        for pair in MERGES {
            let (a, b) = pair.split_once(' ').unwrap();
            assert!(known.contains(a) && known.contains(b), "{pair}");
            assert!(known.insert(format!("{a}{b}")), "{pair} makes no new token");
        }
    }
}
