//! `kinglet devices`: what can compute on this machine.

use crate::args::Global;
use crate::output::{self, Table};
use clap::Args;
use serde_json::{Value, json};

/// List the CPU and the GPUs that models can run on
#[derive(Args, Debug)]
#[command(after_help = "`--backend auto` takes the first GPU that is no software, else the CPU.")]
pub struct Arguments {}

/// A line of the table.
struct Line {
    backend: String,
    name: String,
    kind: String,
    api: String,
    driver: String,
    binding_bytes: Option<u64>,
    unfit: Option<String>,
}

pub fn run(_: &Arguments, global: &Global) -> anyhow::Result<()> {
    let mut lines = vec![Line {
        backend: "cpu".into(),
        name: format!("{} threads", std::thread::available_parallelism().map_or(1, |n| n.get())),
        kind: "processor".into(),
        api: kinglet_engine::cpu::isa::Isa::detect().name().into(),
        driver: String::new(),
        binding_bytes: None,
        unfit: None,
    }];
    lines.extend(gpus());
    if global.json {
        let line = |l: &Line| {
            json!({
                "backend": l.backend, "name": l.name, "kind": l.kind, "api": l.api, "driver": l.driver,
                "binding_bytes": l.binding_bytes, "unfit": l.unfit,
            })
        };
        return output::json(&lines.iter().map(line).collect::<Vec<Value>>());
    }
    let mut table = Table::new(&["--backend", "name", "kind", "through", "driver", ">buffer"]);
    for l in &lines {
        let buffer = l.binding_bytes.map_or(String::new(), output::bytes);
        table.row(vec![l.backend.clone(), l.name.clone(), l.kind.clone(), l.api.clone(), l.driver.clone(), buffer]);
    }
    let mut text = table.aligned();
    for l in &lines {
        if let Some(why) = &l.unfit {
            text += &format!("{} cannot run models: {why}\n", l.backend);
        }
    }
    Ok(output::text(&text)?)
}

#[cfg(feature = "gpu")]
fn gpus() -> Vec<Line> {
    use kinglet_engine::gpu::{DeviceKind, devices};
    let kind = |kind| match kind {
        DeviceKind::Discrete => "graphics card",
        DeviceKind::Integrated => "in the processor",
        DeviceKind::Virtual => "virtual",
        DeviceKind::Software => "software",
        DeviceKind::Other => "unknown",
    };
    let line = |d: kinglet_engine::gpu::DeviceInfo| Line {
        backend: format!("gpu:{}", d.index),
        kind: kind(d.kind).into(),
        name: d.name,
        api: d.api,
        driver: d.driver,
        binding_bytes: Some(d.binding_bytes),
        unfit: d.unfit,
    };
    devices().into_iter().map(line).collect()
}

#[cfg(not(feature = "gpu"))]
fn gpus() -> Vec<Line> {
    Vec::new()
}
