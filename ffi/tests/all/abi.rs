//! What must never change: the layout of structs, and the symbols of the shared library.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::mem::{offset_of, size_of};
use std::process::Command;

use kinglet::*;

use crate::support::{Link, Scratch, compile, file, shared_library, succeed};

/// Lines of `struct size` and `struct.field offset`, from Rust; and the same as a C program that prints them.
macro_rules! layout {
    ($($name:ident { $($field:ident),* $(,)? })*) => {{
        let (mut table, mut program) = (String::new(), String::new());
        $(
            let _ = writeln!(table, "{} {}", stringify!($name), size_of::<$name>());
            let _ = writeln!(program, "    printf(\"{0} %zu\\n\", sizeof({0}));", stringify!($name));
            $(
                let _ = writeln!(table, "{}.{} {}", stringify!($name), stringify!($field), offset_of!($name, $field));
                let _ = writeln!(
                    program,
                    "    printf(\"{0}.{1} %zu\\n\", offsetof({0}, {1}));",
                    stringify!($name),
                    stringify!($field)
                );
            )*
        )*
        (table, format!("#include <stdio.h>\n#include \"kinglet.h\"\nint main(void) {{\n{program}    return 0;\n}}\n"))
    }};
}

#[test]
fn structs_lie_in_memory_as_c_has_them_and_as_they_always_did() {
    let (table, program) = layout! {
        kinglet_error { code, message }
        kinglet_model_options {
            struct_size, flags, backend, threads, reserved, memory_budget, prefix_cache, gpu_layers, tuning, gpu_memory,
            tuning_folder, gpu_import, reserved_2,
        }
        kinglet_memory { struct_size, reserved, weights, kv_cache, activations, scratch, adapters, total, mapped }
        kinglet_session_options { struct_size, flags, context_tokens, kv_type, chunk_tokens, reserved }
        kinglet_event {
            struct_size, kind, text, text_len, tokens, n_tokens, end_reason, prompt_tokens, reused_tokens,
            prefilled_tokens, output_tokens, reserved, prefill_ms, decode_ms,
        }
        kinglet_train_report {
            struct_size, kind, step, steps, loss, learning_rate, gradient_norm, tokens_per_second, validation_loss,
            reward_accuracy, reward_margin, note,
        }
    };
    let scratch = Scratch::new("layout");
    let source = scratch.path("layout.c");
    std::fs::write(&source, program).expect("a file");
    let printed = succeed(&mut Command::new(compile(&source, &file("include"), Link::Shared, &scratch)));
    assert_eq!(printed, table, "C and Rust disagree");
    // The numbers on record are those of 64-bit machines.
    if cfg!(target_pointer_width = "64") {
        let recorded = std::fs::read_to_string(file("abi/layout.txt")).expect("abi/layout.txt");
        let table: BTreeSet<&str> = table.lines().collect();
        for line in recorded.lines().filter(|line| !line.starts_with('#')) {
            // A struct may grow at its end, nothing else.
            let grown = |line: &str| {
                let (name, size) = line.split_once(' ').expect("two words");
                let now = table.iter().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')).expect(name);
                !name.contains('.') && now.parse::<usize>().expect("a size") > size.parse().expect("a size")
            };
            assert!(table.contains(line) || grown(line), "abi/layout.txt has {line:?}, which is no more so");
        }
        for line in &table {
            assert!(recorded.contains(line), "{line:?} is new: add it to abi/layout.txt");
        }
    }
}

#[test]
fn the_shared_library_exports_what_is_on_record() {
    let symbols = succeed(Command::new("nm").args(["-D", "--defined-only"]).arg(shared_library()));
    let symbols: BTreeSet<&str> = symbols.lines().filter_map(|line| line.split_whitespace().nth(2)).collect();
    let recorded = std::fs::read_to_string(file("abi/symbols.txt")).expect("abi/symbols.txt");
    let recorded: BTreeSet<&str> = recorded.lines().filter(|line| !line.starts_with('#')).collect();
    let gone: Vec<_> = recorded.difference(&symbols).collect();
    let new: Vec<_> = symbols.difference(&recorded).collect();
    assert!(gone.is_empty(), "programs that use {gone:?} do not start any more");
    assert!(new.is_empty(), "{new:?} are exported: add them to abi/symbols.txt, for ever");
}

#[test]
fn the_loader_knows_the_library_by_the_version_of_its_abi() {
    let dynamic = succeed(Command::new("objdump").arg("-p").arg(shared_library()));
    assert!(dynamic.contains("libkinglet.so.1"), "{dynamic}");
    let aligned = dynamic.lines().filter(|l| l.contains(" LOAD ")).all(|l| l.contains("align 2**14"));
    assert!(aligned, "{dynamic}");
}
