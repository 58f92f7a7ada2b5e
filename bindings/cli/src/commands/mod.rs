//! One file per command: its arguments, its help and its code.

mod inspect;
mod models;
mod pull;

use crate::args::Cli;
use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub enum Command {
    Pull(pull::Arguments),
    Models(models::Arguments),
    Inspect(inspect::Arguments),
}

/// Runs what the command line asks for.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    let global = &cli.global;
    match &cli.command {
        Command::Pull(arguments) => pull::run(arguments, global),
        Command::Models(arguments) => models::run(arguments, global),
        Command::Inspect(arguments) => inspect::run(arguments, global),
    }
}
