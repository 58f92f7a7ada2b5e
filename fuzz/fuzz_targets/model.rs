//! See `kinglet_fuzz::model`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinglet_fuzz::model(data));
