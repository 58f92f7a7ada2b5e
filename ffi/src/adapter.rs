//! LoRA adapters: opened, described, merged into a new model file. Sessions put them in force.

use std::ffi::c_char;
use std::sync::Arc;

use kinglet_engine::adapter::{self, Adapter};
use kinglet_engine::quant::DType;
use serde_json::json;

use crate::args;
use crate::fence::{Failure, KINGLET_OK, fence, fence_void, kinglet_error, kinglet_status};
use crate::model::kinglet_model;
use crate::session::scaled;

/// An adapter; free in any order.
#[allow(non_camel_case_types)]
pub struct kinglet_adapter {
    pub(crate) adapter: Arc<Adapter>,
}

/// Opens the adapter at `path`, a GGUF file or a folder as PEFT writes it, and checks that it fits `model`.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_adapter_open(
    model: *const kinglet_model,
    path: *const c_char,
    out: *mut *mut kinglet_adapter,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::place(out, "adapter")?;
            let model = &args::handle(model, "model")?.model;
            let adapter = kinglet_models::open_adapter(args::text(path, "path")?, model)?;
            adapter.matches(model.gguf())?;
            Ok(args::give(out, kinglet_adapter { adapter: Arc::new(adapter) }))
        })
    }
}

/// Gives up the adapter; sessions that apply it go on. NULL is fine.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_adapter_free(adapter: *mut kinglet_adapter) {
    // SAFETY: the caller's promise.
    fence_void(|| unsafe { args::release(adapter) });
}

/// What the adapter is, as a JSON object.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_adapter_info_json(
    adapter: *const kinglet_adapter,
    out: *mut *mut c_char,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::place(out, "text")?;
            let adapter = &args::handle(adapter, "adapter")?.adapter;
            let info = json!({
                "name": adapter.name,
                "rank": adapter.rank,
                "alpha": adapter.alpha,
                "rslora": adapter.rslora,
                "dora": adapter.entries.values().any(|entry| entry.magnitude.is_some()),
                "parameters": adapter.parameters(),
                "matrices": adapter.entries.keys().collect::<Vec<_>>(),
                "architecture": adapter.base.as_ref().map(|base| &base.architecture),
            });
            args::give_json(out, &info)
        })
    }
}

/// Writes a new model file with adapters inside, each times its scale (`scales` may be NULL: all 1). Changed matrices get
/// the type `quant`, such as `Q8_0`, or with NULL keep theirs.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_adapter_merge(
    model: *const kinglet_model,
    adapters: *const *const kinglet_adapter,
    scales: *const f32,
    n_adapters: usize,
    out_path: *const c_char,
    quant: *const c_char,
    err: *mut kinglet_error,
) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            let model = &args::handle(model, "model")?.model;
            let adapters = scaled(adapters, scales, n_adapters)?;
            if adapters.is_empty() {
                return Err(Failure::argument("there are no adapters to merge"));
            }
            let adapters: Vec<(&Adapter, f32)> = adapters.iter().map(|(a, scale)| (a.as_ref(), *scale)).collect();
            let dtype = args::optional_text(quant, "quant")?.map(str::parse::<DType>).transpose()?;
            adapter::merge(model.gguf(), &adapters, dtype, args::text(out_path, "out_path")?)?;
            Ok(KINGLET_OK)
        })
    }
}
