//! Every input of the corpora, and every one that has found a bug, must hold.

use std::path::Path;

#[test]
fn every_known_input_holds() {
    for (target, run) in kinglet_fuzz::TARGETS {
        let mut count = 0;
        for kept in ["corpus", "found"] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(kept).join(target);
            let Ok(files) = std::fs::read_dir(folder) else { continue };
            for file in files {
                let path = file.expect("an entry").path();
                let bytes = std::fs::read(&path).expect("a file");
                let held = std::panic::catch_unwind(|| run(&bytes));
                assert!(held.is_ok(), "{target}: {} does not hold", path.display());
                count += 1;
            }
        }
        assert!(count > 0, "{target} has no corpus");
    }
}

#[test]
fn the_seeds_do_something() {
    for (target, name, bytes) in kinglet_fuzz::seeds::all() {
        let run = kinglet_fuzz::TARGETS.iter().find(|(t, _)| *t == target).expect("a target").1;
        assert!(!bytes.is_empty(), "{target}: {name}");
        run(&bytes);
    }
}
