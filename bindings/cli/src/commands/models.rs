//! `kinglet models`: the catalogue and the cache.

use crate::args::Global;
use crate::output::{self, Table};
use clap::Args;
use kinglet_models::catalogue::{KNOWN, Source};
use kinglet_models::pull::Cache;
use serde_json::{Value, json};

/// List the known models and those in the cache
#[derive(Args, Debug)]
#[command(after_help = "Any other GGUF model works by its path or its name on the Hugging Face hub.")]
pub struct Arguments {}

pub fn run(_: &Arguments, global: &Global) -> anyhow::Result<()> {
    let cache = Cache::from_env()?;
    let cached = cache.list()?;
    let others: Vec<_> = cached.iter().filter(|c| KNOWN.iter().all(|m| m.id != c.name)).collect();
    if global.json {
        let known: Vec<Value> = KNOWN
            .iter()
            .map(|m| {
                json!({
                    "id": m.id,
                    "description": m.description,
                    "licence": m.licence,
                    "architecture": m.architecture,
                    "bytes": m.bytes,
                    "sha256": m.sha256,
                    "sources": m.sources.iter().map(source).collect::<Vec<_>>(),
                    "path": cache.have(m),
                })
            })
            .collect();
        let others: Vec<Value> =
            others.iter().map(|c| json!({ "id": c.name, "bytes": c.bytes, "path": c.path })).collect();
        return output::json(&json!({ "cache": cache.root(), "known": known, "others": others }));
    }
    let mut table = Table::new(&["name", ">size", "here", "licence", "what"]);
    for m in KNOWN {
        let here = if cache.have(m).is_some() { "yes" } else { "-" };
        let cells = [m.id, &output::bytes(m.bytes), here, m.licence, m.description];
        table.row(cells.map(String::from).into());
    }
    for c in others {
        let cells = [output::printable(&c.name), output::bytes(c.bytes), "yes".into(), String::new(), String::new()];
        table.row(cells.into());
    }
    let total = output::bytes(cached.iter().map(|c| c.bytes).sum());
    let root = cache.root().display();
    Ok(output::text(&format!("{}\n{total} in {root}\n", table.aligned()))?)
}

fn source(source: &Source) -> Value {
    match source {
        Source::Packages(parts) => {
            let packages: Vec<String> = parts.iter().map(|p| format!("{}=={}", p.package, p.version)).collect();
            json!({ "packages": packages })
        }
        Source::Hub { repo, file } => json!({ "hub": format!("{repo}/{file}") }),
    }
}
