//! One file per command: its arguments, its help and its code.

mod inspect;
mod models;
mod pull;
mod tokenize;

use crate::args::Cli;
use anyhow::Context;
use clap::Subcommand;
use std::io::Read;

#[derive(Debug, Subcommand)]
pub enum Command {
    Pull(pull::Arguments),
    Models(models::Arguments),
    Inspect(inspect::Arguments),
    Tokenize(tokenize::Arguments),
}

/// Runs what the command line asks for.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    let global = &cli.global;
    match &cli.command {
        Command::Pull(arguments) => pull::run(arguments, global),
        Command::Models(arguments) => models::run(arguments, global),
        Command::Inspect(arguments) => inspect::run(arguments, global),
        Command::Tokenize(arguments) => tokenize::run(arguments, global),
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
