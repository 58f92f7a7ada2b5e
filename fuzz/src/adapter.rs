//! Adapters for one tiny model. The first byte chooses the form: a GGUF file; or PEFT's folder, whose configuration ends
//! at the first NUL and whose safetensors follow.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use kinglet_engine::adapter::Adapter;
use kinglet_engine::quant::DType;
use kinglet_engine::session::{Model, Session};
use kinglet_models::peft;

use crate::input::Input;
use crate::model::options;
use crate::seeds;

/// The base, and a folder for the files of PEFT.
fn base() -> &'static (Model, PathBuf) {
    static BASE: OnceLock<(Model, PathBuf)> = OnceLock::new();
    BASE.get_or_init(|| {
        let file = crate::gguf::open(&seeds::base()).expect("the seed is sound");
        let model = kinglet_models::load(file).expect("the seed is a model");
        let folder = std::env::temp_dir().join(format!("kinglet-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        (model, folder)
    })
}

/// See the crate's text.
pub fn adapter(data: &[u8]) {
    let (model, folder) = base();
    let mut input = Input(data);
    let read = if input.byte().is_multiple_of(2) {
        crate::gguf::open(input.0).and_then(|file| Adapter::from_gguf(&file))
    } else {
        let config = input.until(0);
        std::fs::write(folder.join("adapter_config.json"), config).expect("the folder is ours");
        std::fs::write(folder.join("adapter_model.safetensors"), input.0).expect("the folder is ours");
        peft::read(folder, model)
    };
    let Ok(adapter) = read else { return };
    if adapter.matches(model.gguf()).is_err() {
        return;
    }
    let mut session = Session::new(model, &options()).expect("a session of the base");
    let adapter = Arc::new(adapter);
    if session.set_adapters(&[(adapter.clone(), 1.0)]).is_ok() {
        let _ = session.feed(&[1, 2, 3]);
    }
    let path = folder.join("again.gguf");
    if adapter.save(&path, DType::F32).is_ok() {
        let again = Adapter::open(&path).expect("what was written can be read");
        assert_eq!(again.entries.len(), adapter.entries.len());
        assert_eq!(again.parameters(), adapter.parameters());
    }
}
