//! Gradients of tiny random models of every kind against a decoder in double precision.
//!
//! For each trained tensor a random direction is drawn, and the analytic gradient along it compared with the central
//! difference that [`Reference`] gives: a wrong element anywhere in the tensor shows. The batches have sequences of
//! several lengths, longer than the sliding windows and of a single token, and rows without a target. A model of
//! quantized weights must have the gradients of its dequantized twin, type by type, so that one type carries the
//! comparison with the reference for all.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kinglet_engine::gguf::{Gguf, Writer};
use kinglet_engine::quant::{DType, dequantize};
use kinglet_engine::session::{Arithmetic, Device, LearnBatch, Learner, LearnerOptions, Model};
use kinglet_engine::tape::{Gate, LoraSpec, RopeStyle, Spec, Trained, Yarn};
use kinglet_models::families;
use kinglet_models::tiny::{TinyConfig, write_tiny};
use kinglet_tests::data::{Random, Scratch, heavy, maps, tiny};
use kinglet_tests::reference::Reference;

/// Most tensors that get a direction of their own; of deep models every n-th.
const DIRECTIONS: usize = 28;
const SCALE: f32 = 1.5;

fn lora(model: &Model, rank: usize) -> LoraSpec {
    LoraSpec { rank, scale: SCALE, weights: maps(model), ..LoraSpec::default() }
}

fn options(trained: impl Into<Trained>) -> LearnerOptions {
    let arithmetic = Arithmetic::Exact;
    LearnerOptions {
        trained: trained.into(),
        tokens: 64,
        sequence: 0,
        arithmetic,
        threads: 1,
        device: Device::Cpu,
        gpu_import: false,
        memory_budget: None,
    }
}

/// Sequences of several lengths; about two rows of three have a target, with weights of both signs.
fn batch(model: &Model, lengths: &[usize], seed: u64) -> LearnBatch {
    let (mut random, vocab) = (Random::new(seed), model.spec().vocab);
    let rows: usize = lengths.iter().sum();
    let mut token = || random.below(vocab) as u32;
    let tokens: Vec<u32> = (0..rows).map(|_| token()).collect();
    let outputs: Vec<u32> = (0..rows as u32).filter(|row| row % 3 != 1).collect();
    let targets = outputs.iter().map(|_| token()).collect();
    let weights = outputs.iter().map(|_| random.unit() - 0.25).collect();
    let lengths = lengths.to_vec();
    LearnBatch { tokens, lengths, outputs, targets, weights, dropout_seed: seed, ..LearnBatch::default() }
}

/// Parameters at which every gradient counts.
fn start(learner: &Learner, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; learner.param_count()];
    for p in learner.params() {
        let mut random = Random::new(seed ^ p.offset as u64);
        values[p.offset..p.end()].copy_from_slice(&random.normals(p.rows * p.width, 1.0 / (p.width as f32).sqrt()));
    }
    values
}

fn learn(learner: &mut Learner, batch: &LearnBatch, params: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let mut gradients = vec![0.0; params.len()];
    let scores = learner.learn(batch, params, &mut gradients, &AtomicBool::new(false)).expect("a step").to_vec();
    (scores, gradients)
}

fn loss(scores: &[f32], batch: &LearnBatch) -> f64 {
    scores.iter().zip(&batch.weights).map(|(s, w)| f64::from(*s) * f64::from(*w)).sum()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The gradient at `params` along random directions, tensor by tensor and all together, against the reference's. Gives
/// the largest error, relative to the length of the tensor's gradient.
fn worst_slope(learner: &mut Learner, reference: &Reference, batch: &LearnBatch, params: &[f32]) -> f64 {
    let (scores, gradients) = learn(learner, batch, params);
    let (values, gradients) = (wide(params), wide(&gradients));
    let expected = reference.loss(batch, &values);
    let error = (loss(&scores, batch) - expected).abs() / expected.abs().max(1.0);
    assert!(error < 1e-5, "the loss is {}, but should be {expected}", loss(&scores, batch));
    let each = learner.params().len().div_ceil(DIRECTIONS);
    let ranges = learner.params().iter().step_by(each).map(|p| (p.name.as_str(), p.offset..p.end()));
    let mut random = Random::new(99);
    let mut worst = 0.0f64;
    for (name, range) in ranges.chain([("all", 0..params.len())]) {
        let mut direction = vec![0.0; params.len()];
        direction[range.clone()].iter_mut().for_each(|d| *d = f64::from(random.normal()));
        let (ours, theirs) = (dot(&gradients, &direction), reference.slope(batch, &values, &direction));
        let length = dot(&gradients[range.clone()], &gradients[range]).sqrt();
        let error = (ours - theirs).abs() / length.max(1e-12);
        assert!(length > 0.0, "{name} has no gradient");
        assert!(error < 1e-4, "{name}: {ours}, but {theirs} by differences; the gradient's length is {length}");
        worst = worst.max(error);
    }
    worst
}

fn check(name: &str, configs: impl Iterator<Item = TinyConfig>, lengths: &[usize], rank: usize) {
    let scratch = Scratch::new(name);
    for config in configs {
        let worst = check_model(&tiny(&scratch, &config), lengths, rank);
        println!("{} {}: {worst:.1e}", config.arch, config.dtype);
    }
}

fn check_model(model: &Model, lengths: &[usize], rank: usize) -> f64 {
    check_adapters(model, lengths, lora(model, rank))
}

fn check_adapters(model: &Model, lengths: &[usize], lora: LoraSpec) -> f64 {
    let mut learner = Learner::new(model, &options(lora.clone())).expect("a learner");
    let reference = Reference::new(model, learner.params(), &lora);
    let params = start(&learner, 1);
    worst_slope(&mut learner, &reference, &batch(model, lengths, 2), &params)
}

/// A tiny model whose description is changed before it is computed with.
fn check_switches(name: &str, config: &TinyConfig, change: impl Fn(&mut Spec)) {
    check_switches_with(name, config, change, |model| lora(model, 4));
}

fn check_switches_with(name: &str, config: &TinyConfig, change: impl Fn(&mut Spec), lora: impl Fn(&Model) -> LoraSpec) {
    let scratch = Scratch::new(name);
    let model = changed(&scratch, config, change);
    let lora = lora(&model);
    println!("{}: {:.1e}", config.arch, check_adapters(&model, &[12, 1, 6], lora));
}

fn changed(scratch: &Scratch, config: &TinyConfig, change: impl Fn(&mut Spec)) -> Model {
    let path = scratch.path("tiny.gguf");
    write_tiny(&path, config).expect("a tiny model");
    let gguf = Gguf::open(&path).expect("the file opens");
    let mut spec = families::spec(&gguf).expect("a description");
    change(&mut spec);
    Model::new(Arc::new(gguf), spec).expect("the model opens")
}

/// What no family combines in this way, one after the other in every layer and for all heads.
#[test]
fn every_switch_of_the_description() {
    let each = |arch: &str, change: &dyn Fn(&mut Spec)| {
        check_switches("gradient-switches", &TinyConfig { layers: 2, ..TinyConfig::new(arch) }, change);
    };
    let window = |spec: &mut Spec, window| spec.layers.iter_mut().for_each(|l| l.window = window);
    each("llama", &|spec| spec.attention_softcap = Some(2.0));
    each("llama", &|spec| (spec.embed_scale, spec.attention_scale) = (3.0, 0.7));
    each("llama", &|spec| spec.gate = Gate::GeluTanh);
    each("llama", &|spec| window(spec, Some(4)));
    each("gemma3", &|spec| window(spec, Some(2)));
    each("gemma3", &|spec| (spec.attention_softcap, spec.logit_softcap) = (Some(1.5), Some(5.0)));
    each("llama", &|spec| {
        spec.alibi = Some(vec![0.5, 0.25, 0.125, 0.0625]);
        spec.layers.iter_mut().for_each(|l| l.rope = None);
        window(spec, Some(5));
    });
    for style in [RopeStyle::Halves, RopeStyle::Interleaved] {
        each("qwen3", &|spec| {
            spec.ropes.iter_mut().for_each(|r| (r.style, r.dims, r.scale) = (style, 8, 0.5));
        });
        // Turns and lengthens: the gradient is the transpose, which is no inverse then.
        let yarn = Yarn { beta_fast: 32.0, beta_slow: 1.0, attention_factor: 1.3, original_context: 64 };
        each("llama", &|spec| {
            spec.ropes.iter_mut().for_each(|r| (r.style, r.scale, r.yarn) = (style, 0.25, Some(yarn)));
        });
    }
}

/// Architectures that run, without the ones so deep that they only repeat themselves.
fn architectures() -> impl Iterator<Item = &'static str> {
    let known = families::known();
    TinyConfig::architectures().filter(move |arch| known.contains(arch) && (heavy() || *arch != "baichuan"))
}

#[test]
fn adapters_of_every_architecture() {
    check("gradients", architectures().map(TinyConfig::new), &[11, 1, 9], 4);
}

#[test]
fn grouped_heads_odd_ranks_and_single_sequences() {
    let heads = [(4, 4), (4, 1), (6, 3)];
    let configs = heads.map(|(heads, kv_heads)| TinyConfig { heads, kv_heads, layers: 1, ..TinyConfig::new("llama") });
    check("gradient-heads", configs.into_iter(), &[13], 5);
}

#[test]
fn several_chunks_of_the_vocabulary_with_and_without_softcap() {
    let config = TinyConfig { vocab: 2_080, layers: 1, ..TinyConfig::new("qwen2") };
    for logit_softcap in [None, Some(3.0)] {
        check_switches("gradient-chunks", &config, |spec| spec.logit_softcap = logit_softcap);
    }
}

#[test]
fn rows_wider_than_a_chunk_of_every_kernel() {
    let config = TinyConfig {
        width: 1_088,
        heads: 6,
        head_dim: 72,
        ffn: 1_312,
        layers: 1,
        vocab: 64,
        ..TinyConfig::new("llama")
    };
    check("gradient-width", [config].into_iter(), &[5, 3], 8);
}

#[test]
fn dropout_and_learned_lengths() {
    let scratch = Scratch::new("gradient-dora");
    for arch in ["llama", "qwen2", "gemma3", "chatglm"] {
        let model = tiny(&scratch, &TinyConfig { layers: 3, ..TinyConfig::new(arch) });
        for (dropout, dora) in [(0.3, false), (0.0, true), (0.1, true)] {
            let lora = LoraSpec { dropout, dora, ..lora(&model, 4) };
            println!("{arch} {dropout} {dora}: {:.1e}", check_adapters(&model, &[11, 1, 9], lora));
        }
    }
}

/// The two ends of a model: embedding and head, tied and not, with several chunks of vocabulary.
#[test]
fn adapters_of_embedding_and_head() {
    let scratch = Scratch::new("gradient-ends");
    for (arch, vocab, dora, dropout) in [
        ("llama", 256, false, 0.0),
        ("llama", 1_120, false, 0.2),
        ("qwen2", 1_120, true, 0.0),
        ("qwen3", 256, true, 0.1),
        ("gemma3", 1_120, false, 0.0),
    ] {
        let model = tiny(&scratch, &TinyConfig { layers: 1, vocab, ..TinyConfig::new(arch) });
        let mut lora = LoraSpec { dora, dropout, ..lora(&model, 4) };
        if !dora {
            lora.weights.push("token_embd.weight".into());
        }
        if model.gguf().tensor("output.weight").is_some() {
            lora.weights.push("output.weight".into());
        }
        println!("{arch} ends: {:.1e}", check_adapters(&model, &[11, 1, 9], lora));
    }
    // With the softcap of logits, and nothing adapted but the ends.
    for dora in [false, true] {
        check_switches_with(
            "gradient-ends-cap",
            &TinyConfig::new("llama"),
            |spec| spec.logit_softcap = Some(3.0),
            |_| {
                let ends = ["output.weight", "token_embd.weight"];
                let weights = ends.into_iter().take(if dora { 1 } else { 2 }).map(String::from).collect();
                LoraSpec { rank: 3, scale: SCALE, weights, dora, ..LoraSpec::default() }
            },
        );
    }
}

/// A few adapters only: gradients are computed where they are needed, and are right there.
#[test]
fn adapters_of_some_maps() {
    let scratch = Scratch::new("gradient-some");
    let model = tiny(&scratch, &TinyConfig { layers: 4, ..TinyConfig::new("llama") });
    let sets: [&[&str]; 6] = [
        &["blk.3.ffn_down.weight"],
        &["blk.2.attn_k.weight"],
        &["blk.1.attn_output.weight", "blk.3.attn_v.weight"],
        &["blk.0.ffn_gate.weight", "output.weight"],
        &["output.weight"],
        &["token_embd.weight"],
    ];
    for names in sets {
        let lora = LoraSpec { weights: names.iter().map(|n| n.to_string()).collect(), ..lora(&model, 4) };
        check_adapters(&model, &[11, 1, 9], lora);
    }
    // The lower layers are not computed again when nothing there learns.
    let arena = |names: &[&str]| {
        let lora = LoraSpec { weights: names.iter().map(|n| n.to_string()).collect(), ..lora(&model, 4) };
        Learner::new(&model, &options(lora)).expect("a learner").estimate().arena
    };
    assert!(arena(&["output.weight"]) < arena(&["blk.0.attn_q.weight"]));
}

/// All weights: norms, biases, head norms, embeddings whose tokens repeat, heads tied and not, several chunks of them.
/// The cross-entropy is linear in its targets, so a distribution has the mean of the gradients of its tokens.
#[test]
fn distributions_as_targets() {
    let config = TinyConfig { vocab: 2_300, ..TinyConfig::new("llama") };
    for cap in [None, Some(3.0)] {
        let scratch = Scratch::new("distributions");
        let model = changed(&scratch, &config, |spec| spec.logit_softcap = cap);
        let mut learner = Learner::new(&model, &options(lora(&model, 3))).unwrap();
        let params = start(&learner, 5);
        let hard = batch(&model, &[9, 20], 3);
        let (mut random, vocab) = (Random::new(8), model.spec().vocab);
        const SHARES: [f32; 3] = [0.5, 0.3, 0.2];
        let mut soft = hard.clone();
        let mut singles: Vec<LearnBatch> = SHARES.iter().map(|_| hard.clone()).collect();
        for (i, target) in hard.targets.iter().enumerate() {
            // Every fourth row keeps its single target.
            if i % 4 == 3 {
                soft.soft.push(&[], &[]);
                continue;
            }
            let tokens = [*target, random.below(vocab / 2) as u32, (vocab / 2 + random.below(vocab / 2)) as u32];
            soft.soft.push(&tokens, &SHARES);
            singles.iter_mut().zip(tokens).for_each(|(single, token)| single.targets[i] = token);
        }
        let (scores, gradients) = learn(&mut learner, &soft, &params);
        let (mut wanted_scores, mut wanted) = (vec![0.0; scores.len()], vec![0.0; gradients.len()]);
        for (single, share) in singles.iter().zip(SHARES) {
            let (scores, gradients) = learn(&mut learner, single, &params);
            wanted_scores.iter_mut().zip(scores).for_each(|(sum, s)| *sum += share * s);
            wanted.iter_mut().zip(gradients).for_each(|(sum, g)| *sum += share * g);
        }
        assert!(relative(&scores, &wanted_scores) < 1e-6 && relative(&gradients, &wanted) < 1e-5, "{cap:?}");

        let refused = |change: fn(&mut LearnBatch)| {
            let mut wrong = soft.clone();
            change(&mut wrong);
            let mut gradients = vec![0.0; params.len()];
            let mut learner = Learner::new(&model, &options(lora(&model, 3))).unwrap();
            learner.learn(&wrong, &params, &mut gradients, &AtomicBool::new(false)).unwrap_err().to_string()
        };
        assert!(refused(|b| b.soft.shares[1] = 0.7).contains("add up to 1"));
        assert!(refused(|b| b.soft.tokens[0] = 1 << 20).contains("outside the vocabulary"));
        assert!(refused(|b| b.soft.starts.truncate(4)).contains("needs a start"));
        assert!(refused(|b| b.soft.starts[1] = 99_999).contains("must rise"));
    }
}

#[test]
fn all_weights() {
    let scratch = Scratch::new("gradient-all");
    let configs = [
        TinyConfig::new("llama"),
        TinyConfig { tied: true, vocab: 1_120, ..TinyConfig::new("qwen2") },
        TinyConfig { vocab: 1_120, ..TinyConfig::new("qwen2") },
        TinyConfig::new("qwen3"),
        TinyConfig { layers: 3, ..TinyConfig::new("gemma3") },
        TinyConfig::new("gemma2"),
        TinyConfig::new("chatglm"),
        TinyConfig { layers: 1, ..TinyConfig::new("phi3").with_dtype(DType::Q4_K) },
        TinyConfig { layers: 1, ..TinyConfig::new("llama").with_dtype(DType::Q4_K) },
    ];
    for config in configs {
        let model = tiny(&scratch, &config);
        let mut learner = Learner::new(&model, &options(Trained::All)).expect("a learner");
        let reference = Reference::new(&model, learner.params(), &LoraSpec::default());
        let params = learner.initial().expect("first values");
        let mut batch = batch(&model, &[11, 1, 9], 2);
        (batch.tokens[3], batch.tokens[15]) = (batch.tokens[2], batch.tokens[2]);
        println!("{} all: {:.1e}", config.arch, worst_slope(&mut learner, &reference, &batch, &params));
    }
}

/// Over many seeds the gradient with dropout is close to that without, for a loss that is nearly linear in the adapters.
#[test]
fn the_mean_over_dropouts_is_the_gradient() {
    let scratch = Scratch::new("dropout-mean");
    let model = tiny(&scratch, &TinyConfig { layers: 1, ..TinyConfig::new("llama") });
    let [mut dropping, mut whole] = [0.25, 0.0]
        .map(|dropout| Learner::new(&model, &options(LoraSpec { dropout, ..lora(&model, 4) })).expect("a learner"));
    let params: Vec<f32> = start(&whole, 1).iter().map(|v| 0.05 * v).collect();
    let mut batch = batch(&model, &[16, 7], 3);
    let (scores, expected) = learn(&mut whole, &batch, &params);
    let none = AtomicBool::new(false);
    assert_eq!(dropping.score(&batch, &params, &none).expect("scores"), scores, "scoring leaves nothing out");
    let mut mean = vec![0.0; params.len()];
    let (mut before, mut far) = (Vec::new(), 0.0f64);
    const SEEDS: usize = 400;
    for seed in 0..SEEDS as u64 {
        batch.dropout_seed = seed;
        let (_, gradients) = learn(&mut dropping, &batch, &params);
        far = far.max(relative(&gradients, &expected));
        mean.iter_mut().zip(&gradients).for_each(|(m, g)| *m += g / SEEDS as f32);
        assert_ne!(gradients, before, "seed {seed} gives what the one before gave");
        before = gradients;
    }
    let error = relative(&mean, &expected);
    println!("{error:.3} of the mean, {far:.3} of the farthest");
    assert!(error < 0.06 && far > 0.3, "{error} of the mean, {far} of the farthest");
}

/// The model with all matrices as F32.
fn dense_twin(scratch: &Scratch, model: &Model) -> Model {
    let gguf = model.gguf();
    let mut writer = Writer::new();
    gguf.metadata().iter().for_each(|(key, value)| {
        writer.set(key, value.clone());
    });
    for t in gguf.tensors() {
        writer.tensor(&t.name, DType::F32, &t.shape).expect("a tensor");
    }
    let path = scratch.path("dense.gguf");
    let mut file = writer.create(&path).expect("a file");
    for t in gguf.tensors() {
        let mut values = vec![0.0f32; t.width() * t.rows()];
        dequantize(t.dtype, gguf.data(t), &mut values).expect("values");
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        file.write(&t.name, &bytes).expect("written");
    }
    file.finish().expect("a finished file");
    kinglet_models::open(&path).expect("the twin opens")
}

fn relative(a: &[f32], b: &[f32]) -> f64 {
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    (difference / b.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>()).sqrt()
}

#[test]
fn quantized_weights_have_the_gradients_of_their_dense_twin() {
    let scratch = Scratch::new("twins");
    let types = || DType::WEIGHTS.into_iter().filter(|t| *t != DType::F32);
    let archs = if heavy() { vec!["llama", "qwen2", "qwen3", "gemma3", "phi3"] } else { vec!["llama", "gemma3"] };
    for (arch, dtype) in archs.iter().flat_map(|arch| types().map(move |dtype| (*arch, dtype))) {
        let config = TinyConfig { layers: 2, ..TinyConfig::new(arch).with_dtype(dtype) };
        let model = tiny(&scratch, &config);
        let twin = dense_twin(&scratch, &model);
        let [mut ours, mut theirs] = [&model, &twin].map(|m| Learner::new(m, &options(lora(m, 4))).expect("a learner"));
        let (params, batch) = (start(&ours, 3), batch(&model, &[12, 1, 6], 4));
        let ((_, a), (_, b)) = (learn(&mut ours, &batch, &params), learn(&mut theirs, &batch, &params));
        for p in ours.params() {
            let error = relative(&a[p.offset..p.end()], &b[p.offset..p.end()]);
            assert!(error < 1e-4, "{arch} {dtype} {}: {error:.1e} from the dense twin", p.name);
        }
        // Rounding to 16 bits hardly moves the gradient; 8 bits, which is how training runs, do not turn it.
        let rounded = |arithmetic| {
            let options = LearnerOptions { arithmetic, ..options(lora(&model, 4)) };
            learn(&mut Learner::new(&model, &options).expect("a learner"), &batch, &params).1
        };
        let (wide_error, narrow_error) =
            (relative(&rounded(Arithmetic::Wide), &a), relative(&rounded(Arithmetic::Narrow), &a));
        assert!(wide_error < 8e-3 && narrow_error < 0.2, "{arch} {dtype}: {wide_error:.1e} and {narrow_error:.1e}");
        // The loss that runs forward is the loss that was differentiated.
        let step = 2e-4f32;
        let direction = Random::new(5).normals(params.len(), 1.0);
        let mut at = |by: f32| {
            let moved: Vec<f32> = params.iter().zip(&direction).map(|(p, d)| p + by * d).collect();
            loss(ours.score(&batch, &moved, &AtomicBool::new(false)).expect("scores"), &batch)
        };
        let slope = (at(step) - at(-step)) / f64::from(2.0 * step);
        let (gradients, direction) = (wide(&a), wide(&direction));
        let (along, length) = (dot(&gradients, &direction), dot(&gradients, &gradients).sqrt());
        assert!((along - slope).abs() < 1e-2 * length, "{arch} {dtype}: {along}, but {slope} by differences");
    }
}

/// The smallest budget, to a hundredth, with which there is a learner: it keeps as few layers as can be.
fn least_budget(model: &Model, options: &LearnerOptions) -> u64 {
    let fits = |budget: u64| Learner::new(model, &LearnerOptions { memory_budget: Some(budget), ..options.clone() });
    let all = fits(u64::MAX).expect("a learner").estimate();
    let budget = |hundredths: u64| all.resident() * hundredths / 100;
    let least = (1..100).map(budget).find(|b| fits(*b).is_ok()).expect("a budget below that for all layers");
    assert!(fits(least).expect("a learner").estimate().arena < all.arena);
    least
}

/// Threads share rows, never sums; a layer that is computed again gives what it gave.
#[test]
fn threads_and_kept_layers_do_not_show() {
    let scratch = Scratch::new("bits");
    for (arch, dtype, arithmetic) in [
        ("llama", DType::Q4_K, Arithmetic::Exact),
        ("llama", DType::Q4_K, Arithmetic::Wide),
        ("llama", DType::Q4_K, Arithmetic::Narrow),
        ("gemma3", DType::Q8_0, Arithmetic::Wide),
        ("qwen2", DType::F16, Arithmetic::Exact),
        ("qwen3", DType::F16, Arithmetic::Wide),
    ] {
        let model = tiny(&scratch, &TinyConfig { vocab: 1_120, ..TinyConfig::new(arch).with_dtype(dtype) });
        let batch = batch(&model, &[17, 1, 9, 2], 6);
        let mut first: Option<(Vec<f32>, Vec<f32>)> = None;
        let mut lora = LoraSpec { dropout: 0.2, dora: arch == "qwen2", ..lora(&model, 4) };
        match arch {
            "llama" => lora.weights.extend(["token_embd.weight", "output.weight"].map(String::from)),
            "qwen2" => lora.weights.push("output.weight".into()),
            _ => {}
        }
        let trained = if arch == "qwen3" { Trained::All } else { lora.into() };
        // For three threads, whose scratch is the largest.
        let options = LearnerOptions { threads: 3, arithmetic, ..options(trained) };
        let least = least_budget(&model, &options);
        for (threads, memory_budget) in [(1, Some(least)), (1, None), (2, Some(least)), (3, Some(least)), (3, None)] {
            let options = LearnerOptions { threads, memory_budget, ..options.clone() };
            let mut learner = Learner::new(&model, &options).expect("a learner");
            let params = match arch {
                "qwen3" => learner.initial().expect("first values"),
                _ => start(&learner, 7),
            };
            let found = learn(&mut learner, &batch, &params);
            let first = first.get_or_insert(found.clone());
            assert!(found == *first, "{arch} {dtype}: {threads} threads, budget {memory_budget:?}: other bits");
        }
    }
}
