//! Inputs to begin with, a few kilobytes each, made by code. `cargo run -p kinglet-fuzz --example seeds` writes those that
//! are missing in `corpus/`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use kinglet_engine::adapter::{Adapter, BaseId, LowRank};
use kinglet_engine::gguf::Writer;
use kinglet_engine::quant::DType;
use kinglet_models::peft;
use kinglet_models::tiny::{TinyConfig, write_tiny};

/// A file that is to be read and forgotten.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("kinglet-seed-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary folder");
        Scratch(path)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.0.join(name)).expect("it was just written")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The smallest model of an architecture.
fn small(arch: &str, dtype: DType) -> TinyConfig {
    let width = 8.max(dtype.block_len() as u32);
    let usual = TinyConfig::new(arch);
    let layers = if usual.layers > 6 { usual.layers } else { 1 };
    TinyConfig {
        layers,
        width,
        heads: 2,
        kv_heads: 1,
        head_dim: width / 2,
        ffn: width,
        vocab: 8,
        context: 64,
        dtype,
        embedding: dtype,
        ..usual
    }
}

fn bytes(config: &TinyConfig) -> Vec<u8> {
    let scratch = Scratch::new();
    write_tiny(scratch.0.join("model"), config).expect("a tiny model");
    scratch.read("model")
}

/// The base of the adapters.
pub(crate) fn base() -> Vec<u8> {
    bytes(&small("llama", DType::F32))
}

/// A model that can chat.
pub(crate) fn chatting() -> Vec<u8> {
    bytes(&TinyConfig { tied: true, ..small("llama", DType::Q8_0) }.with_bpe())
}

/// A file of few bytes with all keys that tokenizers and templates read.
fn words() -> Vec<u8> {
    let mut writer = Writer::new();
    let tokens = ["<s>", "</s>", "a", "b", "ab", "Ġ"].map(String::from).to_vec();
    writer
        .set("general.architecture", "llama")
        .set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.pre", "smollm")
        .set("tokenizer.ggml.tokens", tokens)
        .set("tokenizer.ggml.token_type", vec![3, 3, 1, 1, 1, 1])
        .set("tokenizer.ggml.scores", vec![0.0f32; 6])
        .set("tokenizer.ggml.merges", vec!["a b".to_string()])
        .set("tokenizer.ggml.bos_token_id", 0u32)
        .set("tokenizer.ggml.eos_token_id", 1u32)
        .set("tokenizer.ggml.add_bos_token", true)
        .set("tokenizer.chat_template", "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}");
    let scratch = Scratch::new();
    let file = writer.create(scratch.0.join("model")).expect("a header");
    file.finish().expect("a file without tensors");
    scratch.read("model")
}

/// An adapter of three maps of [`base`]: as GGUF, and the two files of PEFT.
pub(crate) fn adapters() -> [Vec<u8>; 3] {
    let scratch = Scratch::new();
    std::fs::write(scratch.0.join("base"), base()).expect("the folder is ours");
    let model = kinglet_models::open(scratch.0.join("base")).expect("the seed is a model");
    let mut entries = BTreeMap::new();
    for name in ["blk.0.attn_q.weight", "blk.0.ffn_down.weight", "token_embd.weight"] {
        let t = model.gguf().tensor(name).expect("a map of the seed");
        let (rank, inputs, outputs) = (2, t.width(), t.rows());
        let (a, b) = (vec![0.25; rank * inputs], vec![-0.5; rank * outputs]);
        entries.insert(name.to_string(), LowRank { rank, inputs, outputs, a, b, magnitude: None });
    }
    let base = Some(BaseId::of(model.gguf()).expect("the seed has an architecture"));
    let adapter = Adapter { name: "seed".into(), rank: 2, alpha: 4.0, rslora: false, entries, base };
    adapter.save(scratch.0.join("gguf"), DType::F16).expect("an adapter");
    peft::write(&scratch.0, &adapter, &model, Some("a/b")).expect("an adapter");
    [scratch.read("gguf"), scratch.read("adapter_config.json"), scratch.read("adapter_model.safetensors")]
}

const TEMPLATES: [&str; 6] = [
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
     {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] %}\
     {% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}\
     {%- for m in rest -%}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}\
     {{ '<start_of_turn>' + m['role'] + '\n' }}{{ m['content'] | trim }}{{ '<end_of_turn>\n' }}{%- endfor -%}",
    "{% macro turn(role, text) %}[{{ role|upper }}] {{ text|replace('a', 'b') }}{{ eos_token }}{% endmacro %}\
     {% for m in messages %}{{ turn(m.role, m.content) }}{% if m.tool_calls %}{{ m.tool_calls|tojson }}{% endif %}\
     {% endfor %}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}",
    "{%- set ns = namespace(n=0) -%}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}: {{ m.content.split('.')[0]\
     .strip() }}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}\
     {{ strftime_now('%d %B %Y') }}",
    "{% for i in range(10) %}{% if i is divisibleby 3 %}{% continue %}{% endif %}{{ '%02d' % i if false else i }}\
     {% if i > 7 %}{% break %}{% endif %}{% endfor %}{{ messages|map(attribute='role')|join(', ') }}{{ {'a': [1, none]} }}",
    "{{ messages[-1].content.startswith('<think>') }}{{ messages|length }}{{ (1, 2.5, -3 // 2, 7 % 4, 2 ** 8)|list }}\
     {{ messages|selectattr('role', 'equalto', 'user')|list|last }}{{ '\\u00e9' ~ 'x' * 3 }}{{ undefined is defined }}",
];

/// Kind, source: see [`crate::grammar()`].
const GRAMMARS: [(u8, &str, &str); 14] = [
    (0, "any", "{}"),
    (
        0,
        "object",
        r#"{"type": "object", "properties": {"name": {"type": "string", "minLength": 2, "maxLength": 9}, "age": {"type": "integer", "minimum": -3, "exclusiveMaximum": 120}, "tag": {"enum": ["é", null, 7.5]}}, "required": ["name"], "additionalProperties": {"type": "boolean"}}"#,
    ),
    (
        0,
        "refs",
        r##"{"$defs": {"tree": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/tree"}, "minItems": 1, "maxItems": 3}]}}, "allOf": [{"$ref": "#/$defs/tree"}, {"not": {"const": null}}]}"##,
    ),
    (
        0,
        "strings",
        r#"{"type": "array", "prefixItems": [{"type": "string", "format": "date-time"}, {"type": "string", "pattern": "^[a-f]{2,5}(-\\d+)?$"}, {"type": "number", "multipleOf": 0.25, "maximum": 10}], "items": false, "x-guidance": {"whitespace_flexible": false}}"#,
    ),
    (
        0,
        "choice",
        r#"{"oneOf": [{"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "minProperties": 1}, {"type": "string", "const": "no"}]}"#,
    ),
    (1, "list", "start: item (\",\" item)*\nitem: WORD | \"(\" start \")\"\nWORD: /[a-z]+/ & ~/the/\n%ignore /[ ]/\n"),
    (
        1,
        "json",
        "start: \"<call>\" args \"</call>\"\nargs: %json {\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"number\"}}}\n",
    ),
    (1, "tokens", "start: <|im_start|> a[max_tokens=3] <[^256]> b{2,4}\na: /(?s:.*)/\nb[stop=\"x\"]: /[x-z]*/\n"),
    (1, "sums", "start: sum\nsum: sum \"+\" term | term\nterm: term \"*\" n | n\nn: /[0-9]+/ | \"(\" sum \")\"\n"),
    (2, "date", r"\d{4}-(0[1-9]|1[0-2])-[0-3]\d"),
    (2, "words", r"(?i:yes|no)( [\p{L}&&[^x]]{1,12}){0,5}[.!?]"),
    (
        3,
        "tagged",
        "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": [\"}\"]}}\n</tool_call>\n<tool_call>{}",
    ),
    (7, "listed", "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {}}, {\"name\": \"g\"}]f[ARGS]{\"x\": 1}"),
    (15, "bare", "{\"name\": \"f\", \"parameters\": {\"a\": null}}; <|python_tag|>{\"name\": \"g\"} and more"),
];

const SAID: &str = "Be brief.\0Why is the sky blue?\0Rayleigh. <think>\n\n\0And the sea?\0It mirrors.<|im_end|>";

const TEXTS: [&str; 4] = [
    "Hello, hello the world!  It's 12345 o'clock; don't\t\n\n  they'LL come?\r\n",
    "中文字符 テスト 한국어 עברית العربية ไทย é e\u{301} ǅ ſ K İ ß ﬁ",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|>\u{2581}\u{FEFF}\u{0}\u{7F}\u{85}\u{A0}\u{2028}",
    "fn main() { let x = [0u8; 16]; } // 😀👨‍👩‍👧 🇩🇪 ½ ² Ⅷ １２３ _a__b 3.14e-10 https://a.b/c?d=e&f",
];

/// A vocabulary that is spelled out: see [`crate::tokenizer()`].
fn vocabulary(choice: u8, tokens: &[&str], merges: &[&str], text: &str) -> Vec<u8> {
    let mut out = vec![choice, tokens.len() as u8];
    let put = |out: &mut Vec<u8>, s: &str| {
        out.push(s.len() as u8);
        out.extend_from_slice(s.as_bytes());
    };
    tokens.iter().for_each(|t| put(&mut out, t));
    out.extend(tokens.iter().map(|t| if t.starts_with('<') { 3 } else { 1 }));
    out.push(0b1100_1111);
    out.extend((0..tokens.len()).map(|i| i as u8));
    out.push(merges.len() as u8);
    merges.iter().for_each(|m| put(&mut out, m));
    out.extend([1, 2]);
    out.extend_from_slice(text.as_bytes());
    out
}

/// All seeds: target, name, bytes.
pub fn all() -> Vec<(&'static str, String, Vec<u8>)> {
    let mut seeds = Vec::new();
    for arch in TinyConfig::architectures() {
        // An architecture that has to have as many layers as the real models is too large to be changed byte by byte.
        let model = bytes(&small(arch, DType::F32));
        if model.len() < 16 << 10 {
            seeds.push(("model", arch.to_string(), model));
        }
    }
    for dtype in [DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0, DType::MXFP4, DType::BF16] {
        seeds.push(("model", dtype.to_string().to_lowercase(), bytes(&small("llama", dtype))));
    }
    seeds.push(("gguf", "base".into(), base()));
    seeds.push(("gguf", "words".into(), words()));
    let [gguf, config, tensors] = adapters();
    seeds.push(("gguf", "adapter".into(), gguf.clone()));
    seeds.push(("adapter", "gguf".into(), [&[0][..], &gguf].concat()));
    seeds.push(("adapter", "peft".into(), [&[1][..], &config, &[0], &tensors].concat()));
    for (i, text) in TEXTS.iter().enumerate() {
        for choice in [1, 3, 7, 16, 24] {
            seeds.push(("tokenizer", format!("text-{i}-{choice}"), [&[choice][..], text.as_bytes()].concat()));
        }
    }
    let byte_level = ["<s>", "</s>", "<unk>", "a", "b", "ab", "Ġ", "Ġa", "Ċ", "ÃĤ"];
    seeds.push(("tokenizer", "bpe".into(), vocabulary(128, &byte_level, &["a b", "Ġ a"], "ab a\n ba<s>é")));
    let pieces = ["<s>", "</s>", "<unk>", "▁", "▁a", "a", "ab", "▁ab", "<0x0A>", "<0xC3>", "é"];
    seeds.push(("tokenizer", "spm".into(), vocabulary(129, &pieces, &[], " ab a\n ba<s>é")));
    seeds.push(("tokenizer", "raw".into(), vocabulary(130, &pieces, &["a b", "▁ a"], " ab a\n ba<s>é")));
    for (i, template) in TEMPLATES.iter().enumerate() {
        seeds.push(("template", format!("template-{i}"), [template, SAID].join("\0").into_bytes()));
    }
    let walk: Vec<u8> = (0..200u32).map(|i| (i * i * 37 % 250) as u8).collect();
    for (kind, name, source) in GRAMMARS {
        seeds.push(("grammar", name.into(), [&[kind], source.as_bytes(), &[0], &walk].concat()));
    }
    seeds.extend(crate::ffi::seeds().into_iter().map(|(name, bytes)| ("ffi", name.to_string(), bytes)));
    seeds
}
