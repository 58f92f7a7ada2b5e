//! Dispatches that would hold the device for too long are divided, and the parts give the bits of the whole.

use kinglet_engine::gpu::Limits;
use kinglet_engine::session::{Arithmetic, Device, SessionOptions};
use kinglet_engine::tape::{LoraSpec, Trained};
use kinglet_models::tiny::TinyConfig;
use kinglet_tests::data::{Scratch, maps, tiny};

use crate::gpu::{device, gradients, learner_of, logits, options, tokens, whole, wide};

/// A device that is believed to be so slow: a multiply-add a second divides all that can be.
fn slow(speed: f64) -> Device {
    Device::Open(device(Limits { speed: Some(speed), ..Limits::default() }))
}

/// Prompts in chunks, in a long window and a sliding one; then tokens, whose heads are computed in parts by several workgroups too.
#[test]
fn gpu_divided_attention_has_the_same_bits() {
    for (arch, arithmetic) in
        [("llama", Arithmetic::Exact), ("gemma3", Arithmetic::Exact), ("qwen2", Arithmetic::Narrow)]
    {
        let scratch = Scratch::new(&format!("gpu-divided-attention-{arch}"));
        let config = TinyConfig { context: 2_048, sliding_window: 700, ..wide(arch) };
        let model = tiny(&scratch, &config);
        let (prompt, more) = (tokens(&model, 1, 1_150), tokens(&model, 2, 3));
        let run = |device| {
            let options = SessionOptions { context: 2_048, chunk: 512, arithmetic, ..options(device) };
            logits(&model, &options, &prompt, &more)
        };
        let wanted = run(Device::Open(whole()));
        // At the second the middle chunk's four heads are three and one.
        for speed in [1.0, 8e9] {
            assert!(run(slow(speed)) == wanted, "{arch} at {speed}");
        }
    }
}

/// Gradients of adapters and of all weights: attention, maps, the cross-entropy's chunks.
#[test]
fn gpu_divided_gradients_have_the_same_bits() {
    for (arch, all) in [("llama", false), ("gemma3", false), ("qwen2", true)] {
        let scratch = Scratch::new(&format!("gpu-divided-gradients-{arch}"));
        let model = tiny(&scratch, &wide(arch));
        let adapters = LoraSpec { rank: 4, scale: 1.5, weights: maps(&model), ..LoraSpec::default() };
        let trained = if all { Trained::All } else { adapters.into() };
        for arithmetic in [Arithmetic::Exact, Arithmetic::Wide] {
            let run = |device| {
                let mut learner = learner_of(&model, device, trained.clone(), arithmetic);
                gradients(&model, &mut learner)
            };
            let wanted = run(Device::Open(whole()));
            // At the second the 1,280 columns of a gradient are 512, 512 and 256.
            for speed in [1.0, 1e9] {
                assert!(run(slow(speed)) == wanted, "{arch} at {speed}");
            }
        }
    }
}
