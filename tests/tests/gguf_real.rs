//! The headers of the three real models, as facts: what is in the files everybody uses must be read right.

use kinglet_engine::gguf::{Gguf, OpenOptions};
use kinglet_engine::quant::DType;
use kinglet_tests::data::model;

struct Facts {
    id: &'static str,
    bytes: u64,
    architecture: &'static str,
    layers: u32,
    width: u32,
    heads: u32,
    kv_heads: u32,
    vocabulary: usize,
    tokenizer: &'static str,
    tied: bool,
    types: &'static [DType],
}

/// From the models' own cards and converters.
const FACTS: [Facts; 3] = [
    Facts {
        id: "smollm2",
        bytes: 98_362_432,
        architecture: "llama",
        layers: 30,
        width: 576,
        heads: 9,
        kv_heads: 3,
        vocabulary: 49_152,
        tokenizer: "gpt2",
        tied: true,
        types: &[DType::F32, DType::Q4_1, DType::Q8_0],
    },
    Facts {
        id: "qwen2.5-coder",
        bytes: 491_400_064,
        architecture: "qwen2",
        layers: 24,
        width: 896,
        heads: 14,
        kv_heads: 2,
        vocabulary: 151_936,
        tokenizer: "gpt2",
        tied: false,
        types: &[DType::F32, DType::Q4_K, DType::Q5_0, DType::Q6_K, DType::Q8_0],
    },
    Facts {
        id: "gemma3",
        bytes: 253_113_024,
        architecture: "gemma3",
        layers: 18,
        width: 640,
        heads: 4,
        kv_heads: 1,
        vocabulary: 262_144,
        tokenizer: "llama",
        tied: true,
        types: &[DType::F32, DType::Q4_K, DType::Q5_0, DType::Q6_K, DType::Q8_0],
    },
];

#[test]
fn headers_are_read_right() {
    for facts in FACTS {
        let id = facts.id;
        let gguf = Gguf::open(model(id)).expect("the model opens");
        assert_eq!(gguf.file_bytes(), facts.bytes, "{id}");
        let metadata = gguf.metadata();
        let number = |key: &str| metadata.u32(&format!("{}.{key}", facts.architecture)).expect("the key is there");
        assert_eq!(metadata.str("general.architecture").expect("the key is there"), facts.architecture);
        assert_eq!(number("block_count"), facts.layers, "{id}");
        assert_eq!(number("embedding_length"), facts.width, "{id}");
        assert_eq!(number("attention.head_count"), facts.heads, "{id}");
        assert_eq!(number("attention.head_count_kv"), facts.kv_heads, "{id}");
        assert_eq!(metadata.str("tokenizer.ggml.model").expect("the key is there"), facts.tokenizer);
        assert_eq!(metadata.strings("tokenizer.ggml.tokens").expect("the key is there").len(), facts.vocabulary);
        assert_eq!(gguf.tensor("output.weight").is_none(), facts.tied, "{id}");
        let embedding = gguf.tensor("token_embd.weight").expect("an embedding");
        assert_eq!(embedding.shape, [u64::from(facts.width), facts.vocabulary as u64], "{id}");

        let mut types: Vec<DType> = gguf.tensors().iter().map(|t| t.dtype).collect();
        types.sort();
        types.dedup();
        let mut expected = facts.types.to_vec();
        expected.sort();
        assert_eq!(types, expected, "{id}");
    }
}

#[test]
fn tensors_fill_the_file_and_do_not_overlap() {
    for facts in FACTS {
        let gguf = Gguf::open(model(facts.id)).expect("the model opens");
        let start = gguf.data(&gguf.tensors()[0]).as_ptr() as usize;
        let mut ranges: Vec<(usize, usize)> = gguf
            .tensors()
            .iter()
            .map(|t| (gguf.data(t).as_ptr() as usize - start, gguf.data(t).len()))
            .inspect(|(offset, _)| assert_eq!(offset % 32, 0))
            .collect();
        ranges.sort();
        for pair in ranges.windows(2) {
            assert_eq!((pair[0].0 + pair[0].1).next_multiple_of(32), pair[1].0, "{}", facts.id);
        }
    }
}

#[test]
fn scales_of_real_weights_are_finite() {
    let options = OpenOptions { validate: true, ..OpenOptions::default() };
    Gguf::open_with(model("smollm2"), &options).expect("no NaN and no infinity");
}
