//! `kinglet`: pull, look into, chat with, teach and measure models on this machine.
//!
//! `main` parses and turns the outcome into an exit code; every command is one file under `commands/`. What a command
//! produces goes to standard output, all else (bars, notes, errors) to standard error, so that output can be piped.
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C. A closed pipe ends the program quietly.

mod adapters;
mod args;
mod commands;
mod interrupt;
mod logging;
mod models;
mod output;
mod progress;
mod sampling;
mod structure;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    logging::start(cli.global.verbose);
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) if interrupt::is_interruption(&error) => ExitCode::from(130),
        Err(error) => {
            eprintln!("kinglet: {error:#}");
            let usage = error.chain().any(|cause| cause.is::<args::Usage>());
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}
