//! What a model's options say about GPUs: layers that are divided, a bound on their memory, kernels that are timed. On lavapipe
//! where there is no card.

use std::ffi::CString;
use std::ptr::{null, null_mut};

use kinglet::*;

use crate::hard::{cpu, open_with, path, session};
use crate::support::{Scratch, error, message};

/// How a session of the model in `scratch` is refused: the status and what is said.
fn refused(scratch: &Scratch, options: &kinglet_model_options) -> (i32, String) {
    let (mut model, mut out, mut err) = (null_mut(), null_mut(), error());
    let file = path(&scratch.model());
    // SAFETY: all pointers are ours.
    let status = unsafe {
        let opened = kinglet_model_open(file.as_ptr(), options, &mut model, &mut err);
        let status = match opened {
            KINGLET_OK => kinglet_session_create(model, null(), &mut out, &mut err),
            refused => refused,
        };
        kinglet_model_free(model);
        status
    };
    assert!(status < 0 && out.is_null());
    (status, message(&err))
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let scratch = Scratch::new("gpu-options");
    let folder = c"/tmp".as_ptr();
    for (options, wanted, words) in [
        (kinglet_model_options { gpu_layers: -1, ..cpu() }, KINGLET_ERR_ARG, "gpu_layers is -1"),
        (kinglet_model_options { gpu_layers: 1, ..cpu() }, KINGLET_ERR_ARG, "choose auto or gpu"),
        (kinglet_model_options { gpu_import: 2, ..cpu() }, KINGLET_ERR_ARG, "gpu_import is 2; it must be 0 or 1"),
        (kinglet_model_options { reserved_2: 1, ..cpu() }, KINGLET_ERR_UNSUPPORTED, "a reserved field set"),
        (kinglet_model_options { tuning: KINGLET_TUNE_SOFTWARE, ..cpu() }, KINGLET_ERR_ARG, "tuning_folder is NULL"),
        (kinglet_model_options { tuning: 64, tuning_folder: folder, ..cpu() }, KINGLET_ERR_UNSUPPORTED, "0x40"),
        (kinglet_model_options { tuning_folder: c"".as_ptr(), ..cpu() }, KINGLET_ERR_ARG, "tuning_folder is empty"),
        (
            kinglet_model_options { tuning_folder: c"\xff".as_ptr(), ..cpu() },
            KINGLET_ERR_ARG,
            "tuning_folder is not UTF-8",
        ),
    ] {
        let (status, said) = refused(&scratch, &options);
        assert_eq!(status, wanted, "{said}");
        assert!(said.contains(words), "{said:?} lacks {words:?}");
    }
}

/// Where the CPU runs the model, a bound, a folder and how a GPU would read the weights are of no consequence.
#[test]
fn nothing_of_a_gpu_is_of_no_consequence_to_the_cpu() {
    let scratch = Scratch::new("gpu-options-cpu");
    let folder = scratch.path("tuning");
    let name: CString = path(&folder);
    let options = kinglet_model_options { gpu_memory: 1, tuning_folder: name.as_ptr(), gpu_import: 1, ..cpu() };
    let model = open_with(&scratch.model(), &options);
    let s = session(model, None);
    assert!(!folder.exists());
    // SAFETY: they are ours.
    unsafe {
        kinglet_session_free(s);
        kinglet_model_free(model);
    }
}

/// A library without GPUs takes `auto` for the CPU, but not layers for a GPU.
#[test]
#[cfg(not(feature = "gpu"))]
fn layers_need_a_library_with_gpus() {
    let scratch = Scratch::new("gpu-options-without");
    for backend in [c"auto", c"gpu"] {
        let options = kinglet_model_options { backend: backend.as_ptr(), gpu_layers: 1, ..cpu() };
        let (status, said) = refused(&scratch, &options);
        assert_eq!(status, KINGLET_ERR_UNSUPPORTED, "{said}");
        assert!(said.contains("without it"), "{said}");
    }
}

#[cfg(feature = "gpu")]
mod with_gpu {
    use std::path::PathBuf;

    use super::*;
    use crate::hard::{report, trainer};
    use crate::lasting::{feed, free, logits, training};
    use crate::support::file;

    fn on_gpu() -> kinglet_model_options {
        kinglet_model_options { backend: c"gpu".as_ptr(), ..cpu() }
    }

    /// Memory of a session and the logits behind a few tokens.
    fn run(scratch: &Scratch, options: &kinglet_model_options) -> (kinglet_memory, Vec<f32>) {
        let model = open_with(&scratch.model(), options);
        let s = session(model, None);
        feed(s, &(1..40).collect::<Vec<i32>>());
        feed(s, &[7]);
        let (mut memory, mut err) = (memory(), error());
        // SAFETY: all pointers are ours.
        let status = unsafe { kinglet_session_memory(s, &mut memory, &mut err) };
        assert_eq!(status, KINGLET_OK, "{}", message(&err));
        let logits = logits(s);
        free(&[s], model);
        (memory, logits)
    }

    fn memory() -> kinglet_memory {
        // SAFETY: numbers, for which zero is a value.
        let zero: kinglet_memory = unsafe { std::mem::zeroed() };
        kinglet_memory { struct_size: size_of::<kinglet_memory>() as u32, ..zero }
    }

    fn estimate(scratch: &Scratch, options: &kinglet_model_options) -> kinglet_memory {
        let (mut memory, mut err) = (memory(), error());
        let file = path(&scratch.model());
        // SAFETY: all pointers are ours.
        let status = unsafe { kinglet_model_estimate(file.as_ptr(), options, null(), &mut memory, &mut err) };
        assert_eq!(status, KINGLET_OK, "{}", message(&err));
        memory
    }

    /// Whether the first GPU is lavapipe, which imports pages; others may refuse.
    fn is_lavapipe() -> bool {
        kinglet_engine::session::devices().iter().any(|d| d.backend == "gpu:0" && d.name.starts_with("llvmpipe"))
    }

    fn assert_near(ours: &[f32], wanted: &[f32], what: &str) {
        assert_eq!(ours.len(), wanted.len());
        let far = ours.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-2, "{what}: {far}");
    }

    /// Where the CPU has a part, its threads have scratch.
    #[test]
    fn layers_are_divided_between_gpu_and_cpu() {
        let scratch = Scratch::new("gpu-divided");
        let (_, wanted) = run(&scratch, &cpu());
        for (layers, is_divided) in [(0, false), (1, true), (i32::MAX, false)] {
            let options = kinglet_model_options { gpu_layers: layers, ..on_gpu() };
            let (memory, ours) = run(&scratch, &options);
            assert_eq!(memory.scratch > 0, is_divided, "{layers} layers");
            assert_near(&ours, &wanted, &format!("{layers} layers"));
        }
    }

    #[test]
    fn a_gpus_memory_is_bounded() {
        let scratch = Scratch::new("gpu-bounded");
        let all = estimate(&scratch, &on_gpu());
        assert_eq!(all.scratch, 0);
        let bounded = |most| kinglet_model_options { gpu_memory: most, ..on_gpu() };
        assert_eq!(estimate(&scratch, &bounded(all.total)).scratch, 0);
        let options = bounded(all.total - 1);
        assert!(estimate(&scratch, &options).scratch > 0, "a byte too few, and nothing was divided");
        assert_near(&run(&scratch, &options).1, &run(&scratch, &cpu()).1, "bounded");
        let (status, said) = refused(&scratch, &bounded(1000));
        assert_eq!(status, KINGLET_ERR_MEMORY, "{said}");
        assert!(said.contains("a single layer"), "{said}");
    }

    /// From the mapped file, or from a copy where it cannot be: the same bits.
    #[test]
    fn weights_are_read_from_the_file_where_that_is_asked_for() {
        let scratch = Scratch::new("gpu-import");
        let imported = kinglet_model_options { gpu_import: 1, ..on_gpu() };
        let ((memory, ours), (copied, wanted)) = (run(&scratch, &imported), run(&scratch, &on_gpu()));
        assert_eq!(ours, wanted);
        // What is told of it, before and after.
        assert_eq!(copied.mapped, 0);
        assert_eq!(memory.mapped, estimate(&scratch, &imported).mapped);
        assert!(memory.mapped <= memory.weights && (memory.mapped > 0 || !is_lavapipe()));
        let (on_cpu, _) = run(&scratch, &cpu());
        assert_eq!(on_cpu.mapped, on_cpu.weights);
        // Layers of the CPU's read it as ever.
        let divided = kinglet_model_options { gpu_layers: 1, ..on_gpu() };
        let wanted = run(&scratch, &divided).1;
        assert_eq!(run(&scratch, &kinglet_model_options { gpu_import: 1, ..divided }).1, wanted);
    }

    /// A session and a trainer of one model have a device and the weights there in common. Each goes on as alone, though the
    /// model is suspended between any two steps, when all is given back.
    #[test]
    fn a_session_and_a_trainer_of_a_suspended_model_go_on() {
        let scratch = Scratch::new("gpu-suspended-together");
        for gpu_import in [0, 1] {
            let options = kinglet_model_options { gpu_import, ..on_gpu() };
            let run = |name: &str, together: bool| {
                let model = open_with(&scratch.model(), &options);
                let (mut s, mut err) = (session(model, None), error());
                let t = trainer(model, &training(&scratch, &format!("{name}-{gpu_import}"), 4)).expect("a trainer");
                let mut seen = Vec::new();
                for step in 0..4 {
                    if !together {
                        // Alone: the other one is not there at all.
                        // SAFETY: it is ours.
                        unsafe { kinglet_session_free(s) };
                        s = null_mut();
                    }
                    let mut report = report();
                    // SAFETY: all pointers are ours.
                    unsafe {
                        assert_eq!(kinglet_trainer_step(t, &mut report, &mut err), KINGLET_OK, "{}", message(&err));
                        if together {
                            feed(s, &[3 + step]);
                            seen.push(logits(s));
                            assert_eq!(kinglet_model_suspend(model, &mut err), KINGLET_OK, "{}", message(&err));
                            let status = kinglet_trainer_step(t, &mut report, &mut err);
                            assert_eq!(status, KINGLET_ERR_SUSPENDED);
                            let status = kinglet_session_feed(s, [1].as_ptr(), 1, &mut err);
                            assert_eq!(status, KINGLET_ERR_SUSPENDED);
                            assert_eq!(kinglet_model_resume(model, &mut err), KINGLET_OK);
                        }
                    }
                    seen.push(vec![report.loss as f32, report.gradient_norm as f32]);
                }
                // SAFETY: it is ours.
                unsafe { kinglet_trainer_free(t) };
                free(&[s], model);
                seen
            };
            let (together, alone) = (run("together", true), run("alone", false));
            let losses: Vec<_> = together.iter().skip(1).step_by(2).collect();
            assert_eq!(losses, alone.iter().collect::<Vec<_>>(), "gpu_import {gpu_import}");
            let model = open_with(&scratch.model(), &options);
            let s = session(model, None);
            for (step, wanted) in (0..).zip(together.iter().step_by(2)) {
                feed(s, &[3 + step]);
                assert_eq!(&logits(s), wanted, "gpu_import {gpu_import}, token {step}");
            }
            free(&[s], model);
        }
    }

    #[test]
    fn times_of_kernels_are_kept_in_the_folder() {
        let scratch = Scratch::new("gpu-tuned");
        let folder = scratch.path("tuning");
        let name = path(&folder);
        let options = kinglet_model_options { tuning: KINGLET_TUNE_SOFTWARE, tuning_folder: name.as_ptr(), ..on_gpu() };
        assert_near(&run(&scratch, &options).1, &run(&scratch, &cpu()).1, "timed");
        let files = std::fs::read_dir(&folder).expect("a folder").map(|e| e.expect("a file").path());
        // Beside what the driver has compiled.
        let files: Vec<PathBuf> = files.filter(|file| file.extension().is_some_and(|e| e == "json")).collect();
        let [file] = &files[..] else { panic!("one file is to be there: {files:?}") };
        let text = std::fs::read_to_string(file).expect("the file");
        assert!(text.contains("few rows") && text.contains("many rows"), "{text}");
        // They are read again, and not measured again, which never gives the same numbers.
        run(&scratch, &options);
        assert_eq!(std::fs::read_to_string(file).expect("the file"), text);
        // Products of eight bits compete where that is asked for.
        assert!(!text.contains("\"int8\": true"), "{text}");
        run(&scratch, &kinglet_model_options { tuning: KINGLET_TUNE_SOFTWARE | KINGLET_TUNE_INT8, ..options });
        assert!(std::fs::read_to_string(file).expect("the file").contains("\"int8\": true"));
    }

    /// A folder that cannot be made is no reason not to answer.
    #[test]
    fn a_folder_that_cannot_be_written_is_no_error() {
        let scratch = Scratch::new("gpu-unwritable");
        let name = path(&file("Cargo.toml"));
        let options = kinglet_model_options { tuning: KINGLET_TUNE_SOFTWARE, tuning_folder: name.as_ptr(), ..on_gpu() };
        assert_near(&run(&scratch, &options).1, &run(&scratch, &cpu()).1, "timed");
    }
}
