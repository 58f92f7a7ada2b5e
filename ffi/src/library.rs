//! The library itself: versions, how it was built, what can compute here, strings it gave away.

use std::ffi::{CString, c_char};

use kinglet_engine::cpu::isa::Isa;
use kinglet_engine::session::devices;
use serde_json::json;

use crate::args;
use crate::fence::{fence, fence_void, kinglet_error, kinglet_status};

/// The version of the ABI that this library speaks, and all before it.
pub const KINGLET_ABI_VERSION: u32 = 1;

const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");

/// `KINGLET_ABI_VERSION` of the library that is loaded.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub extern "C" fn kinglet_abi_version() -> u32 {
    KINGLET_ABI_VERSION
}

/// The version of the library, such as `0.1.0`. Never NULL, never freed.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub extern "C" fn kinglet_version() -> *const c_char {
    VERSION.as_ptr().cast()
}

/// How the library was built, and what of it this processor uses, as a JSON object.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_build_json(out: *mut *mut c_char, err: *mut kinglet_error) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::place(out, "text")?;
            let build = json!({
                "version": env!("CARGO_PKG_VERSION"),
                "abi": KINGLET_ABI_VERSION,
                "target": format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
                "isa": Isa::detect().name(),
                "gpu": cfg!(feature = "gpu"),
                "grammar": cfg!(feature = "grammar"),
                "checked": cfg!(debug_assertions),
                "families": kinglet_models::families::known(),
            });
            args::give_json(out, &build)
        })
    }
}

/// The devices that models can run on, as a JSON array; `backend` of each is what `kinglet_model_options` takes.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_devices_json(out: *mut *mut c_char, err: *mut kinglet_error) -> kinglet_status {
    // SAFETY: the pointers are the caller's.
    unsafe {
        fence(err, || {
            args::place(out, "text")?;
            args::give_json(out, &devices())
        })
    }
}

/// Frees a string that the library gave; NULL is fine.
///
/// # Safety
/// As the header says.
#[unsafe(no_mangle)]
#[cfg_attr(kinglet_prove, no_panic::no_panic)]
pub unsafe extern "C" fn kinglet_string_free(string: *mut c_char) {
    fence_void(|| {
        if !string.is_null() {
            // SAFETY: the caller's promise: it came from `CString::into_raw` and is not used again.
            drop(unsafe { CString::from_raw(string) });
        }
    });
}
