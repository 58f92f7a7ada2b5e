//! Families: keys and tensors that decide what is computed, and what is refused. That it is computed right, the parity tests
//! hold against llama.cpp.

mod common;

use common::{Temporary, Tensor};
use kinglet_engine::gguf::Value;
use kinglet_engine::quant::DType;
use kinglet_engine::tape::Spec;
use kinglet_models::families;
use kinglet_models::tiny::TinyConfig;

fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn window(arch: &str, tokens: u32) -> (String, Option<Value>) {
    (format!("{arch}.attention.sliding_window"), Some(tokens.into()))
}

/// Through a cache token by token, in chunks or at once, over the end of the window: the same logits.
#[test]
fn steps_are_a_batch() {
    for arch in families::known() {
        let file = Temporary::tiny(&TinyConfig::new(arch));
        let (key, value) = window(arch, 5);
        let windowed = ["phi3", "gemma2", "gemma3"].contains(&arch).then(|| file.changed(&[(&key, value)], |_| {}));
        for file in [Some(&file), windowed.as_ref()].into_iter().flatten() {
            let at_once = file.logits(&[24]);
            for chunks in [&[1; 24][..], &[3, 7, 1, 1, 11, 1], &[20, 1, 1, 1, 1]] {
                let apart = distance(file.logits(chunks).last().unwrap(), &at_once[0]);
                assert!(apart < 2e-5, "{arch}, {chunks:?}: {apart}");
            }
        }
        if let Some(windowed) = windowed {
            // Within the window nothing is left out, beyond it something is.
            let [a, b] = [&file, &windowed].map(|file| file.logits(&[5, 1]));
            assert!(distance(&a[0], &b[0]) == 0.0 && distance(&a[1], &b[1]) > 1e-3, "{arch}");
        }
    }
}

/// A converter may stack matrices that share an input: in every family the rows mean the same.
#[test]
fn stacked_matrices_are_their_parts() {
    for (arch, stacks) in [
        ("llama", &[("attn_qkv", &["attn_q", "attn_k", "attn_v"][..]), ("ffn_up", &["ffn_gate", "ffn_up"])][..]),
        ("qwen2", &[("attn_qkv", &["attn_q", "attn_k", "attn_v"])]),
    ] {
        for dtype in [DType::F32, DType::Q4_K] {
            let file = Temporary::tiny(&TinyConfig::new(arch).with_dtype(dtype));
            let stacked = file.changed(&[], |tensors| {
                for (layer, (stack, parts)) in (0..2).flat_map(|l| stacks.iter().map(move |s| (l, s))) {
                    for kind in ["weight", "bias"] {
                        let name = |part: &str| format!("blk.{layer}.{part}.{kind}");
                        let names: Vec<String> = parts.iter().map(|part| name(part)).collect();
                        let take = |n: &String| tensors.iter().position(|t| t.0 == *n).map(|at| tensors.remove(at));
                        let taken: Vec<Tensor> = names.iter().filter_map(take).collect();
                        let Some(mut whole) = taken.first().cloned() else { continue };
                        whole.0 = name(stack);
                        whole.3 = taken.iter().flat_map(|t| t.3.clone()).collect();
                        *whole.2.last_mut().unwrap() = taken.iter().map(|t| t.2.last().unwrap()).sum();
                        tensors.push(whole);
                    }
                }
            });
            let spec = stacked.spec().unwrap();
            assert_eq!(spec.layers[1].k.weight.tensor, "blk.1.attn_qkv.weight");
            assert_eq!(spec.layers[1].k.bias.is_some(), arch == "qwen2");
            assert_eq!(file.logits(&[9, 1]), stacked.logits(&[9, 1]), "{arch} {dtype}");
        }
    }
}

#[test]
fn what_gemma_2_leaves_out_is_known() {
    let file = Temporary::tiny(&TinyConfig { layers: 4, ..TinyConfig::new("gemma2") });
    let said = file.spec().unwrap();
    let keys = ["attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window"];
    let keys = keys.map(|key| format!("gemma2.{key}"));
    let removed: Vec<(&str, Option<Value>)> = keys.iter().map(|key| (key.as_str(), None)).collect();
    let silent = file.changed(&removed, |_| {}).spec().unwrap();
    assert_eq!((silent.attention_softcap, silent.logit_softcap), (said.attention_softcap, said.logit_softcap));
    let windows = |spec: &Spec| spec.layers.iter().map(|l| l.window).collect::<Vec<_>>();
    assert_eq!(windows(&said), [Some(8), None, Some(8), None]);
    assert_eq!(windows(&silent), [Some(4096), None, Some(4096), None]);
}

#[test]
fn what_cannot_run_is_refused() {
    let baichuan = Temporary::tiny(&TinyConfig { layers: 3, ..TinyConfig::new("baichuan") });
    let phi = Temporary::tiny(&TinyConfig::new("phi3"));
    let glm = Temporary::tiny(&TinyConfig::new("glm4"));
    let chatglm = Temporary::tiny(&TinyConfig::new("chatglm"));
    let factors = |tensors: &mut Vec<Tensor>| {
        tensors.push(("rope_factors_long.weight".into(), DType::F32, vec![8], vec![0; 32]));
    };
    let shorter = |tensors: &mut Vec<Tensor>| {
        for t in tensors.iter_mut().filter(|t| t.0 == "blk.1.attn_qkv.weight") {
            t.2[1] -= 1;
            t.3.truncate(t.3.len() - 256);
        }
    };
    for (file, fragment) in [
        (baichuan, "a Baichuan of 3 layers"),
        (phi.changed(&[], factors), "LongRoPE"),
        (phi.changed(&[("phi3.rope.scaling.type", Some("yarn".into()))], |_| {}), "yarn"),
        (glm.changed(&[("glm4.nextn_predict_layers", Some(1u32.into()))], |_| {}), "predict further tokens"),
        (glm.changed(&[("glm4.rope.dimension_sections", Some(1u32.into()))], |_| {}), "several positions"),
        (chatglm.changed(&[("chatglm.feed_forward_length", Some(100u32.into()))], |_| {}), "need 200 together"),
        (chatglm.changed(&[], shorter), "blk.1.attn_qkv.weight"),
    ] {
        let message = file.spec().expect_err(fragment).to_string();
        assert!(message.contains(fragment), "no {fragment:?} in: {message}");
    }
}
