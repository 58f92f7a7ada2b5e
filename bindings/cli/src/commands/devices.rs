//! `kinglet devices`: what can compute on this machine.

use crate::args::Global;
use crate::output::{self, Table};
use clap::Args;
use kinglet_engine::session::devices;

/// List the CPU and the GPUs that models can run on
#[derive(Args, Debug)]
#[command(after_help = "`--backend auto` takes the first GPU that is no software, else the CPU.")]
pub struct Arguments {}

pub fn run(_: &Arguments, global: &Global) -> anyhow::Result<()> {
    let devices = devices();
    if global.json {
        return output::json(&devices);
    }
    let mut table = Table::new(&["--backend", "name", "kind", "through", "driver", ">buffer"]);
    for d in &devices {
        let buffer = d.binding_bytes.map_or(String::new(), output::bytes);
        table.row(vec![d.backend.clone(), d.name.clone(), d.kind.into(), d.api.clone(), d.driver.clone(), buffer]);
    }
    let mut text = table.aligned();
    for d in &devices {
        if let Some(why) = &d.unfit {
            text += &format!("{} cannot run models: {why}\n", d.backend);
        }
    }
    Ok(output::text(&text)?)
}
