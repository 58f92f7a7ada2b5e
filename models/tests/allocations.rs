//! Decoding allocates nothing per token. Alone in its binary: its allocator counts what every thread of it asks for.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::Folder;
use kinglet_engine::quant::DType;
use kinglet_engine::sampling::SamplerOptions;
use kinglet_engine::session::{GenerateOptions, Session, SessionOptions, Speculation};
use kinglet_models::tiny::TinyConfig;

struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does all the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(p, layout) }
    }

    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(p, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test, for another beside it would be counted too. All happens within one page of the cache, and where the list of
/// its tokens need not grow: both do once in a while.
#[test]
fn a_token_costs_no_allocation() {
    let folder = Folder::new("allocations");
    let model = folder.named("model.gguf", &TinyConfig::new("qwen3").with_dtype(DType::Q8_0).with_bpe());
    let draft = folder.named("draft.gguf", &TinyConfig { seed: 2, ..TinyConfig::new("llama").with_bpe() });
    let prompt: Vec<u32> = (0..20).map(|i| i * 7 % 50).collect();
    let all = SamplerOptions {
        seed: Some(1),
        repeat_penalty: 1.1,
        dry_multiplier: 0.5,
        dry_last_n: 64,
        typical_p: 0.9,
        ..SamplerOptions::default()
    };
    let samplers = [SamplerOptions::greedy(), all];
    for speculation in [Speculation::Off, Speculation::Lookup, Speculation::Model] {
        for sampler in &samplers {
            let options = SessionOptions { context: 128, threads: 3, logit_rows: 4, ..SessionOptions::default() };
            let mut session = Session::new(&model, &options).unwrap();
            session.set_draft(Some(Session::new(&draft, &options).unwrap())).unwrap();
            let options = GenerateOptions {
                sampler: sampler.clone(),
                ignore_end: true,
                stop: vec!["a stop that does not come".into()],
                speculation,
                ..Default::default()
            };
            let mut generation = session.generate(&prompt, options).unwrap();
            // Up to where the list of tokens, which doubles, has room for 160.
            for _ in 0..65 {
                generation.next().unwrap().expect("a token");
            }
            let before = COUNT.load(Ordering::Relaxed);
            let mut bytes = 0;
            for _ in 0..40 {
                bytes += generation.next().unwrap().expect("a token").text.len();
            }
            let count = COUNT.load(Ordering::Relaxed) - before;
            assert!(bytes > 20, "there was text");
            assert_eq!(count, 0, "allocations for 40 tokens, {speculation:?}, temperature {}", sampler.temperature);
        }
    }
}
