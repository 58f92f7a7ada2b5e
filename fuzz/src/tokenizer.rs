//! Texts for vocabularies that are sound, and for those that are not.
//!
//! The first byte chooses: a pre-tokenizer over the byte-level vocabulary of tiny models, whose tokens give back the text
//! they were made of; or a vocabulary out of the input.

use std::sync::OnceLock;

use kinglet_engine::gguf::Metadata;
use kinglet_engine::text::{EncodeOptions, Tokenizer, Utf8Stream};

use crate::input::Input;
use crate::seeds;

/// One of each kind that this version knows, but for `gemma4`, which has no byte-level alphabet.
const PRE: [&str; 27] = [
    "default",
    "smollm",
    "falcon",
    "llama-bpe",
    "dbrx",
    "chatglm-bpe",
    "glm4",
    "qwen2",
    "qwen35",
    "ufakzeka",
    "bailingmoe",
    "seed-coder",
    "laguna",
    "jais-2",
    "minicpm5",
    "exaone-moe",
    "tekken",
    "gpt-4o",
    "granite-embed-multi-97m",
    "tiny_aya",
    "youtu",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "afmoe",
    "bloom",
    "viking",
];

/// See the crate's text.
pub fn tokenizer(data: &[u8]) {
    let mut input = Input(data);
    match input.byte() {
        choice @ 0..=127 => sound(&mut input, usize::from(choice)),
        choice => hostile(&mut input, choice),
    }
}

/// The vocabulary of tiny models, with each pre-tokenizer that this version knows.
fn sound(input: &mut Input<'_>, choice: usize) {
    static TOKENIZERS: OnceLock<Vec<Tokenizer>> = OnceLock::new();
    let tokenizers = TOKENIZERS.get_or_init(|| {
        let file = crate::gguf::open(&seeds::chatting()).expect("the seed is sound");
        let with = |pre| {
            let mut metadata = file.metadata().clone();
            metadata.set("tokenizer.ggml.pre", pre);
            Tokenizer::from_metadata(&metadata, None).expect("the pre-tokenizer is known")
        };
        PRE.map(with).into()
    });
    let tokenizer = &tokenizers[choice % tokenizers.len()];
    let text = String::from_utf8_lossy(input.0);
    for options in [EncodeOptions::TEXT, EncodeOptions::PROMPT] {
        let tokens = encode(tokenizer, &text, options);
        assert_eq!(tokenizer.decode(&tokens, true), text.as_bytes(), "{options:?}");
    }
    // Bytes that are no text come back as they are, or as what Rust puts for them.
    let tokens = tokenizer.encode_bytes(input.0, EncodeOptions::TEXT);
    let (mut stream, mut streamed) = (Utf8Stream::new(), String::new());
    for token in &tokens {
        stream.push(tokenizer.token_bytes(*token, true).expect("a token of the vocabulary"), &mut streamed);
    }
    stream.finish(&mut streamed);
    assert_eq!(streamed, String::from_utf8_lossy(&tokenizer.decode(&tokens, true)));
}

/// A vocabulary of the fuzzer's.
fn hostile(input: &mut Input<'_>, choice: u8) {
    let mut metadata = Metadata::new("<fuzz>");
    metadata.set("tokenizer.ggml.model", ["gpt2", "llama", "gemma4", "no_vocab"][usize::from(choice % 4)]);
    metadata.set("tokenizer.ggml.pre", PRE[usize::from(choice / 4) % PRE.len()]);
    let count = usize::from(input.byte());
    let tokens: Vec<String> = (0..count).map(|_| input.text()).collect();
    let kinds: Vec<i32> = tokens.iter().map(|_| input.number() as i32).collect();
    let flags = input.byte();
    if flags & 1 != 0 {
        metadata.set("tokenizer.ggml.token_type", kinds);
    }
    if flags & 2 != 0 {
        metadata.set("tokenizer.ggml.scores", tokens.iter().map(|_| input.number() as f32).collect::<Vec<f32>>());
    }
    let merges = usize::from(input.byte() % 32);
    metadata.set("tokenizer.ggml.merges", (0..merges).map(|_| input.text()).collect::<Vec<String>>());
    metadata.set("tokenizer.ggml.tokens", tokens);
    for (bit, key) in [(4, "bos"), (8, "eos"), (16, "unknown"), (32, "padding")] {
        if flags & bit != 0 {
            metadata.set(&format!("tokenizer.ggml.{key}_token_id"), input.number() as u32);
        }
    }
    metadata.set("tokenizer.ggml.add_bos_token", flags & 64 != 0);
    metadata.set("tokenizer.ggml.add_space_prefix", flags & 128 != 0);
    let Ok(tokenizer) = Tokenizer::from_metadata(&metadata, Some(count)) else { return };
    let text = String::from_utf8_lossy(input.0);
    for options in [EncodeOptions { add_special: true, parse_special: false }, EncodeOptions::PROMPT] {
        let tokens = encode(&tokenizer, &text, options);
        let _ = tokenizer.decode(&tokens, false);
    }
    for id in 0..=tokenizer.vocab_size() as u32 {
        let known = tokenizer.token_bytes(id, true).is_some();
        assert_eq!(known, (id as usize) < tokenizer.vocab_size());
    }
}

/// The tokens, which must be some of the vocabulary's.
fn encode(tokenizer: &Tokenizer, text: &str, options: EncodeOptions) -> Vec<u32> {
    let tokens = tokenizer.encode(text, options);
    assert!(tokens.iter().all(|t| (*t as usize) < tokenizer.vocab_size()), "{tokens:?}");
    tokens
}
