//! Weights that a GPU reads from the pages of the mapped file: the same logits as with a copy, bit by bit.

use std::sync::Arc;

use kinglet_engine::gguf::{Gguf, OpenOptions, Writer};
use kinglet_engine::gpu::{self, Limits};
use kinglet_engine::quant::DType;
use kinglet_engine::session::{Arithmetic, Device, Engine, Model, Session, SessionOptions};
use kinglet_engine::tape::LoraSpec;
use kinglet_models::tiny::TinyConfig;
use kinglet_tests::data::{Scratch, maps, tiny};
use kinglet_train::config::TrainConfig;
use kinglet_train::metrics;

use crate::gpu::{device, distance, gradients, learner_of, logits, options, tokens, whole, wide};
use crate::training::{Bench, complete, config, timeless, write_pairs};

fn importing(limits: Limits) -> Arc<gpu::Device> {
    device(Limits { import: true, ..limits })
}

/// Bytes of matrices, all of which are bound.
fn matrices(model: &Model) -> u64 {
    model.weights().iter().filter(|(_, w)| w.rows > 1).map(|(_, w)| w.len_bytes() as u64).sum()
}

/// That a device has a session's weights as pages, or may have refused them, as lavapipe does not.
fn assert_imported(device: &gpu::Device, imported: u64, model: &Model, name: &str) {
    let refused = imported == 0 && !device.info().name.starts_with("llvmpipe");
    assert!(refused || imported >= matrices(model), "{name}: {imported} of {}", matrices(model));
}

/// Runs prompt and tokens with and without a copy.
fn compare(name: &str, model: &Model) {
    let (prompt, more) = (tokens(model, 1, 40), tokens(model, 2, 4));
    let copied = logits(model, &options(Device::Open(whole())), &prompt, &more);
    let device = importing(Limits::default());
    let options = options(Device::Open(device.clone()));
    let mut session = Session::new(model, &options).expect("a session");
    let imported = device.imported_bytes();
    assert_imported(&device, imported, model, name);
    assert_eq!(session.feed(&prompt).expect("the prompt"), copied[0], "{name}");
    for (token, copied) in more.iter().zip(&copied[1..]) {
        assert_eq!(session.feed(&[*token]).expect("a token"), copied, "{name}");
    }
    // Parked, the pages are nobody's; then they are the device's again.
    session.park().expect("memory back");
    assert_eq!(device.imported_bytes(), 0, "{name}");
    session.reset();
    assert_eq!(session.feed(&prompt).expect("the prompt"), copied[0], "{name}, woken");
    assert_eq!(device.imported_bytes(), imported, "{name}");
    // A learner has the same pages, and goes on with them alone.
    let learner = |device| {
        let trained = LoraSpec { rank: 4, scale: 1.5, weights: maps(model), ..LoraSpec::default() };
        learner_of(model, device, trained.into(), Arithmetic::Exact)
    };
    let wanted = gradients(model, &mut learner(Device::Open(whole())));
    let mut learner = learner(Device::Open(device.clone()));
    assert_eq!(device.imported_bytes(), imported, "{name}: the learner's are others");
    assert!(gradients(model, &mut learner) == wanted, "{name}, learned");
    drop(session);
    assert_eq!(device.imported_bytes(), imported, "{name}");
    learner.park().expect("memory back");
    assert_eq!(device.imported_bytes(), 0, "{name}");
    assert!(gradients(model, &mut learner) == wanted, "{name}, learned when woken");
    assert_eq!(device.imported_bytes(), imported, "{name}");
    drop(learner);
    assert_eq!(device.imported_bytes(), 0, "{name}");
}

/// The model in two files.
fn split(scratch: &Scratch, model: &Gguf) -> Model {
    let path = |no: usize| scratch.path(&format!("split-{:05}-of-00002.gguf", no + 1));
    for (no, tensors) in model.tensors().chunks(model.tensors().len().div_ceil(2)).enumerate() {
        let mut writer = Writer::new();
        if no == 0 {
            *writer.metadata_mut() = model.metadata().clone();
        }
        writer.set("split.no", no as u16).set("split.count", 2u16);
        writer.set("split.tensors.count", model.tensors().len() as i32);
        for t in tensors {
            writer.tensor(&t.name, t.dtype, &t.shape).expect("a tensor");
        }
        let mut file = writer.create(path(no)).expect("a file");
        tensors.iter().for_each(|t| file.write(&t.name, model.data(t)).expect("its bytes"));
        file.finish().expect("the file");
    }
    let model = kinglet_models::open(path(0)).expect("the model opens");
    assert_eq!(model.gguf().shards(), 2);
    model
}

/// Blocks of a whole number of words and others, maps that are rows of one tensor, and a model in two files.
#[test]
fn gpu_logits_are_the_same_from_the_files_pages() {
    for (arch, dtype) in [("llama", DType::Q8_0), ("llama", DType::Q4_K), ("phi3", DType::Q6_K), ("gemma3", DType::F16)]
    {
        let scratch = Scratch::new(&format!("gpu-import-{arch}-{dtype}"));
        let model = tiny(&scratch, &TinyConfig { dtype, embedding: dtype, ..wide(arch) });
        compare(&format!("{arch} {dtype}"), &model);
        if dtype == DType::Q8_0 {
            compare("in two files", &split(&scratch, model.gguf()));
        }
    }
}

/// Where bindings are small, there are several buffers of pages, which overlap.
#[test]
fn gpu_pages_are_several_buffers_where_bindings_are_small() {
    let scratch = Scratch::new("gpu-import-small");
    let model = tiny(&scratch, &TinyConfig { dtype: DType::Q8_0, embedding: DType::F32, ..wide("llama") });
    let (prompt, more) = (tokens(&model, 1, 40), tokens(&model, 2, 4));
    let wanted = logits(&model, &options(Device::Cpu), &prompt, &more);
    let small = importing(Limits { binding_bytes: Some(512 << 10), baseline: true, ..Limits::default() });
    let mut session = Session::new(&model, &options(Device::Open(small.clone()))).expect("a session");
    assert_imported(&small, small.imported_bytes(), &model, "small bindings");
    assert!(matrices(&model) > 2 * (512 << 10), "one buffer would do");
    let mut ours = vec![session.feed(&prompt).expect("the prompt").to_vec()];
    ours.extend(more.iter().map(|token| session.feed(&[*token]).expect("a token").to_vec()));
    for (ours, wanted) in ours.iter().zip(&wanted) {
        assert!(distance(ours, wanted) < 1e-3);
    }
}

/// The option opens a device of its own kind; a file that is deleted meanwhile is there as long as a session is.
#[test]
fn gpu_import_is_off_unless_asked_for() {
    let scratch = Scratch::new("gpu-import-option");
    let model = tiny(&scratch, &TinyConfig { dtype: DType::Q8_0, ..wide("llama") });
    let options = |gpu_import| SessionOptions { gpu_import, ..options(Device::Gpu(0)) };
    let open = |import| Session::new(&model, &options(import)).expect("a session");
    let gpu = |import| {
        let mut engine = Engine::new(&model, &options(import)).expect("an engine");
        engine.gpu().cloned().expect("a GPU")
    };
    let (mut copied, mut imported) = (open(false), open(true));
    assert_eq!(gpu(false).imported_bytes(), 0);
    let device = gpu(true);
    let bytes = device.imported_bytes();
    assert_imported(&device, bytes, &model, "by option");
    assert!(Arc::ptr_eq(&device, &gpu(true)), "those who ask alike share it");
    assert_eq!(device.imported_bytes(), bytes, "the session has them");

    let prompt = tokens(&model, 1, 20);
    let wanted = copied.feed(&prompt).expect("the prompt").to_vec();
    drop((copied, model));
    std::fs::remove_file(scratch.path("tiny.gguf")).expect("the file");
    assert_eq!(imported.feed(&prompt).expect("the prompt"), wanted);
    drop(imported);
    assert_eq!(device.imported_bytes(), 0);
}

/// A whole training from the file's pages is the one from a copy, and shares them with a session.
#[test]
fn gpu_trains_from_the_files_pages() {
    let mut bench = Bench { device: Device::Gpu(0), ..Bench::new("gpu-import-trains") };
    let config = TrainConfig { state_8bit: false, ..config() };
    let data = write_pairs(&bench.scratch);
    let (copied, finished) = bench.train(&config, &data, "copied");
    bench.gpu_import = true;
    let options = SessionOptions { gpu_import: true, ..options(Device::Gpu(0)) };
    let mut session = Session::new(&bench.model, &options).expect("a session");
    let mut trainer = bench.trainer(&config, &data, "imported", false).expect("a trainer");
    let device = trainer.learner_mut().gpu().expect("a GPU").clone();
    let imported = device.imported_bytes();
    assert_imported(&device, imported, &bench.model, "training");
    assert_eq!(trainer.preflight().mapped, imported, "what is told before the first step");
    assert!(imported < 2 * matrices(&bench.model), "{imported} bytes: not the session's pages");
    session.feed(&[1, 2, 3]).expect("a run");
    drop(session);
    assert_eq!(device.imported_bytes(), imported, "the trainer has them");
    let again = complete(&mut trainer).expect("a finished training");
    let lines = metrics::read(&bench.scratch.path("imported/metrics.jsonl")).expect("metrics");
    assert_eq!(timeless(lines), timeless(copied));
    assert_eq!((again.loss, again.validation), (finished.loss, finished.validation));
}

/// What is imported is no memory of the device's: neither is it told, nor does a bound count it.
#[test]
fn gpu_estimates_count_no_copy_of_what_is_imported() {
    let scratch = Scratch::new("gpu-import-estimate");
    let config = TinyConfig { layers: 6, vocab: 2_000, context: 1_024, ..wide("llama") };
    let model = tiny(&scratch, &TinyConfig { dtype: DType::F16, embedding: DType::F16, ..config });
    let (copying, device) = (whole(), importing(Limits::default()));
    let on = |device: &Arc<gpu::Device>| SessionOptions {
        context: 1_024,
        chunk: 64,
        ..options(Device::Open(device.clone()))
    };
    let estimate = |options: &SessionOptions| Session::estimate(&model, options).expect("an estimate");
    let copied = estimate(&on(&copying));
    assert!(copied.mapped() == 0 && copied.on_gpu_bytes() == copied.resident());
    if estimate(&on(&device)).imported == 0 {
        // Refused, as may be elsewhere: a copy is told then.
        assert_imported(&device, 0, &model, "an estimate");
        assert_eq!(estimate(&on(&device)).allocated(), copied.allocated());
        return;
    }
    let held = || device.allocated_bytes().expect("an allocator that counts");
    // The whole model there, or its last layers.
    for gpu_layers in [None, Some(3)] {
        let options = SessionOptions { gpu_layers, ..on(&device) };
        let (before, told) = (held(), estimate(&options));
        assert_eq!(held(), before, "an estimate leaves nothing behind");
        assert!(told.imported > 0 && told.allocated() + told.mapped() == told.resident(), "{told:?}");
        let mut session = Session::new(&model, &options).expect("a session");
        assert_eq!(session.needs(), told);
        session.feed(&tokens(&model, 1, 1_023)).expect("a prompt");
        session.feed(&[3]).expect("the last token");
        let taken = held() - before;
        assert!(taken.abs_diff(told.on_gpu_bytes()) * 10 < taken, "{taken} bytes are taken: {told:?}");
        let imported = device.imported_bytes();
        match told.shared {
            None => assert!(told.on_gpu && told.imported == imported && imported >= matrices(&model), "{imported}"),
            // What the CPU reads, too, is told once.
            Some(shared) => assert!(told.imported <= imported && shared.mapped < told.mapped(), "{imported}: {told:?}"),
        }
        assert!(told.mapped() <= model.gguf().file_bytes().next_multiple_of(4096), "{told:?}");
    }

    // A bound that holds no copy of all layers, and a budget that counts the map as it does on the CPU.
    let all = estimate(&on(&device));
    let bound = |device| estimate(&SessionOptions { gpu_memory: Some(all.allocated()), ..on(device) });
    assert!(bound(&device) == all && bound(&copying).shared.is_some());
    let options = SessionOptions { memory_budget: Some(all.resident() - 1), ..on(&device) };
    let refused = Session::new(&model, &options).expect_err("too much").to_string();
    assert!(refused.contains("mapped weights"), "{refused}");

    let learner = |device: &Arc<gpu::Device>| {
        let trained = LoraSpec { rank: 4, scale: 1.5, weights: maps(&model), ..LoraSpec::default() };
        learner_of(&model, Device::Open(device.clone()), trained.into(), Arithmetic::Exact)
    };
    let (copied, before) = (learner(&copying).estimate(), held());
    let learner = learner(&device);
    let (told, taken) = (learner.estimate(), held() - before);
    assert_eq!((copied.mapped(), told.mapped()), (0, device.imported_bytes()));
    assert!(told.allocated() + matrices(&model) <= copied.allocated(), "{told:?}, {copied:?} with a copy");
    assert!(taken < copied.allocated(), "{taken} bytes are taken: {told:?}, {copied:?} with a copy");
}

/// A file that is truncated while it is mapped: whoever reads what was cut off is ended by the system, whichever processor reads,
/// and never computes with something else. A copy, on the GPU or in memory, is none of the file's business.
#[cfg(unix)]
#[test]
fn gpu_truncated_files_end_those_who_read_them_and_no_others() {
    use std::os::unix::process::ExitStatusExt;
    let program = std::env::current_exe().expect("a test program has a path");
    for (case, survives) in [("mapped", false), ("imported", false), ("copied", true), ("private", true)] {
        let output = std::process::Command::new(&program)
            .args(["gpu_import::a_file_is_truncated", "--exact", "--ignored", "--nocapture"])
            .env("KINGLET_TRUNCATED", case)
            .output()
            .expect("the test program runs");
        let (told, why) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(told.contains("truncated"), "{case}: {told}{why}");
        if case == "imported" && told.contains("refused") {
            continue;
        }
        assert_eq!(output.status.success(), survives, "{case}: {} {told}{why}", output.status);
        assert_eq!(output.status.signal().is_some(), !survives, "{case}: {} {told}{why}", output.status);
    }
}

#[test]
#[ignore = "run by `gpu_truncated_files_end_those_who_read_them_and_no_others`"]
fn a_file_is_truncated() {
    let case = std::env::var("KINGLET_TRUNCATED").expect("a case");
    let scratch = Scratch::new(&format!("gpu-import-truncated-{case}"));
    tiny(&scratch, &TinyConfig { dtype: DType::Q8_0, ..wide("llama") });
    let path = scratch.path("tiny.gguf");
    let open = OpenOptions { copy: case == "private", ..OpenOptions::default() };
    let model = kinglet_models::load(Gguf::open_with(&path, &open).expect("the file")).expect("the model");
    let device = match case.as_str() {
        "mapped" => Device::Cpu,
        "copied" => Device::Open(whole()),
        _ => Device::Open(importing(Limits::default())),
    };
    let mut session = Session::new(&model, &options(device.clone())).expect("a session");
    let wanted = session.feed(&[1, 2, 3]).expect("a prompt").to_vec();
    if matches!(&device, Device::Open(device) if device.imported_bytes() == 0) && case != "copied" {
        println!("refused");
    }
    let file = std::fs::File::options().write(true).open(&path).expect("the file");
    file.set_len(4096).expect("a shorter file");
    println!("truncated");
    session.reset();
    assert_eq!(session.feed(&[1, 2, 3]).expect("a prompt"), wanted);
}
