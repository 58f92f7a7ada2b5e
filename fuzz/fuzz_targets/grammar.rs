//! See `kinglet_fuzz::grammar`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kinglet_fuzz::grammar(data));
