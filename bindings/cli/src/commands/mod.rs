//! One file per command: its arguments, its help and its code.

mod bench;
mod chat;
mod create;
mod devices;
mod estimate;
mod inspect;
mod merge;
mod models;
mod perplexity;
mod pull;
mod run;
mod tokenize;
mod train;

use crate::args::Cli;
use anyhow::Context;
use clap::Subcommand;
use std::io::Read;
use std::path::Path;

#[derive(Debug, Subcommand)]
pub enum Command {
    Run(Box<run::Arguments>),
    Train(Box<train::Arguments>),
    Merge(merge::Arguments),
    Create(create::Arguments),
    Pull(pull::Arguments),
    Models(models::Arguments),
    Devices(devices::Arguments),
    Inspect(inspect::Arguments),
    Tokenize(tokenize::Arguments),
    Perplexity(perplexity::Arguments),
    Estimate(estimate::Arguments),
    Bench(bench::Arguments),
}

/// Runs what the command line asks for.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    let global = &cli.global;
    match &cli.command {
        Command::Run(arguments) => run::run(arguments, global),
        Command::Train(arguments) => train::run(arguments, global),
        Command::Merge(arguments) => merge::run(arguments, global),
        Command::Create(arguments) => create::run(arguments, global),
        Command::Pull(arguments) => pull::run(arguments, global),
        Command::Models(arguments) => models::run(arguments, global),
        Command::Devices(arguments) => devices::run(arguments, global),
        Command::Inspect(arguments) => inspect::run(arguments, global),
        Command::Tokenize(arguments) => tokenize::run(arguments, global),
        Command::Perplexity(arguments) => perplexity::run(arguments, global),
        Command::Estimate(arguments) => estimate::run(arguments, global),
        Command::Bench(arguments) => bench::run(arguments, global),
    }
}

/// The argument itself, or all of standard input, byte for byte, where it is `-`.
fn text_or_stdin(argument: &str) -> anyhow::Result<Vec<u8>> {
    if argument != "-" {
        return Ok(argument.as_bytes().to_vec());
    }
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes).context("reading standard input")?;
    Ok(bytes)
}

/// The bytes of a file, or all of standard input where it is `-`.
fn file_or_stdin(path: &str) -> anyhow::Result<Vec<u8>> {
    if path == "-" {
        return text_or_stdin(path);
    }
    std::fs::read(path).with_context(|| path.to_string())
}

/// An error where there is a file already: what took hours to make is not overwritten by a slip.
fn refuse_existing(path: &Path) -> anyhow::Result<()> {
    match path.exists() {
        true => anyhow::bail!("{} exists; choose another name, or delete it first", path.display()),
        false => Ok(()),
    }
}
