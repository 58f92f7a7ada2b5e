//! See `kinglet_fuzz::template`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinglet_fuzz::template(data));
