//! Files: the header, and what is read of it before any weight.

use std::sync::Arc;

use kinglet_engine::adapter::Adapter;
use kinglet_engine::gguf::{Gguf, OpenOptions};
use kinglet_engine::text::{ChatTemplate, Tokenizer};
use kinglet_models::families;

/// The file in memory that may be of any alignment, with its weights looked through.
pub(crate) fn open(data: &[u8]) -> kinglet_engine::Result<Gguf> {
    let options = OpenOptions { copy: true, validate: true, ..OpenOptions::default() };
    Gguf::from_memory_with(Arc::new(data.to_vec()), &options)
}

/// See the crate's text.
pub fn gguf(data: &[u8]) {
    let Ok(file) = open(data) else { return };
    assert!(file.file_bytes() == data.len() as u64);
    for tensor in file.tensors() {
        let bytes = file.data(tensor);
        assert_eq!(bytes.len(), tensor.len_bytes(), "{}", tensor.name);
        assert_eq!(tensor.width().checked_mul(tensor.rows()), Some(tensor.elements()), "{}", tensor.name);
        assert!(file.tensor(&tensor.name).is_some_and(|found| found.name == tensor.name));
    }
    for (key, value) in file.metadata().iter() {
        assert!(file.metadata().contains(key));
        let _ = value.to_string();
    }
    let _ = families::spec(&file);
    let _ = Adapter::from_gguf(&file);
    if let Ok(tokenizer) = Tokenizer::from_gguf(&file) {
        let _ = ChatTemplate::from_gguf(&file, &tokenizer);
    }
}
