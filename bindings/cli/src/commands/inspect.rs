//! `kinglet inspect`: what a GGUF file holds.

use crate::args::{Global, MODEL_HELP};
use crate::models;
use crate::output::{self, Table};
use clap::Args;
use kinglet_engine::gguf::{Array, Gguf, TensorInfo, Value};
use kinglet_engine::quant::DType;
use serde_json::{Map, json};
use std::collections::BTreeMap;

/// Show a model's metadata, tensors and sizes
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kinglet inspect smollm2
  kinglet inspect model.gguf --full --json | jq '.metadata[\"tokenizer.ggml.tokens\"][:10]'
  kinglet inspect model.gguf --validate      read every block and report values that are no numbers")]
pub struct Arguments {
    #[arg(help = MODEL_HELP, value_name = "MODEL")]
    model: String,
    /// Show long arrays and texts in full
    #[arg(long)]
    full: bool,
    /// Read all weights and report NaN and infinity
    #[arg(long)]
    validate: bool,
}

/// Elements of an array that are shown unless `--full` is given.
const SHOWN: usize = 8;

pub fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<()> {
    let gguf = models::gguf_of(&arguments.model)?;
    if arguments.validate {
        gguf.validate()?;
    }
    if global.json { as_json(&gguf, arguments) } else { as_text(&gguf, arguments) }
}

/// What all tensors of one type come to.
#[derive(Default)]
struct Sum {
    tensors: u64,
    elements: u64,
    bytes: u64,
}

impl Sum {
    fn add(&mut self, t: &TensorInfo) {
        self.tensors += 1;
        self.elements += t.elements() as u64;
        self.bytes += t.len_bytes() as u64;
    }

    fn bits(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.elements.max(1) as f64
    }
}

fn sums(gguf: &Gguf) -> (Sum, Vec<(DType, Sum)>) {
    let mut all = Sum::default();
    let mut by_type: BTreeMap<DType, Sum> = BTreeMap::new();
    for t in gguf.tensors() {
        all.add(t);
        by_type.entry(t.dtype).or_default().add(t);
    }
    let mut by_type: Vec<_> = by_type.into_iter().collect();
    by_type.sort_by_key(|(_, sum)| std::cmp::Reverse(sum.bytes));
    (all, by_type)
}

fn as_text(gguf: &Gguf, arguments: &Arguments) -> anyhow::Result<()> {
    let (all, by_type) = sums(gguf);
    let mut text = format!(
        "{}: GGUF version {}, {}, {} file(s), alignment {}\n\n",
        output::printable(gguf.name()),
        gguf.version(),
        output::bytes(gguf.file_bytes()),
        gguf.shards(),
        gguf.alignment()
    );
    let mut table = Table::new(&["key", "type", "value"]);
    for (key, value) in gguf.metadata().iter() {
        table.row(vec![output::printable(key), type_of(value), shown(value, arguments.full)]);
    }
    text.push_str(&table.aligned());
    text.push('\n');
    let mut table = Table::new(&["tensor", "type", ">shape", ">bytes"]);
    for t in gguf.tensors() {
        let shape = t.shape.iter().map(u64::to_string).collect::<Vec<_>>().join(" × ");
        table.row(vec![output::printable(&t.name), t.dtype.to_string(), shape, t.len_bytes().to_string()]);
    }
    text.push_str(&table.aligned());
    text.push('\n');
    let mut table = Table::new(&["type", ">tensors", ">weights", ">bytes", ">bits/weight"]);
    let mut row = |name: &str, sum: &Sum| {
        let bits = format!("{:.2}", sum.bits());
        table.row(vec![
            name.into(),
            sum.tensors.to_string(),
            output::count(sum.elements),
            output::bytes(sum.bytes),
            bits,
        ]);
    };
    by_type.iter().for_each(|(t, sum)| row(t.name(), sum));
    row("all", &all);
    text.push_str(&table.aligned());
    Ok(output::text(&text)?)
}

fn as_json(gguf: &Gguf, arguments: &Arguments) -> anyhow::Result<()> {
    let (all, by_type) = sums(gguf);
    let metadata: Map<String, serde_json::Value> =
        gguf.metadata().iter().map(|(k, v)| (k.to_string(), json_of(v, arguments.full))).collect();
    let tensors: Vec<_> = gguf
        .tensors()
        .iter()
        .map(|t| {
            json!({
                "name": t.name, "type": t.dtype.name(), "shape": t.shape, "bytes": t.len_bytes(),
                "file": t.shard(), "offset": t.offset(),
            })
        })
        .collect();
    let types: Map<String, serde_json::Value> = by_type
        .iter()
        .map(|(t, sum)| {
            (t.name().to_string(), json!({ "tensors": sum.tensors, "weights": sum.elements, "bytes": sum.bytes }))
        })
        .collect();
    output::json(&json!({
        "file": gguf.name(),
        "version": gguf.version(),
        "architecture": gguf.metadata().opt_str("general.architecture").ok().flatten(),
        "file_bytes": gguf.file_bytes(),
        "files": gguf.shards(),
        "alignment": gguf.alignment(),
        "weights": all.elements,
        "tensor_bytes": all.bytes,
        "bits_per_weight": all.bits(),
        "types": types,
        "metadata": metadata,
        "tensors": tensors,
    }))
}

fn type_of(value: &Value) -> String {
    match value {
        Value::Array(a) => format!("{}[{}]", a.element_type(), a.len()),
        other => other.value_type().to_string(),
    }
}

/// A value on one line.
fn shown(value: &Value, full: bool) -> String {
    const WIDTH: usize = 100;
    let text = match value {
        Value::Array(a) => {
            let words: Vec<String> =
                elements(a, if full { usize::MAX } else { SHOWN }).iter().map(|e| e.to_string()).collect();
            let more = if a.len() > words.len() { ", …" } else { "" };
            format!("[{}{more}]", words.join(", "))
        }
        other => output::printable(&other.to_string()),
    };
    let long = text.chars().count() > WIDTH && !full;
    if long { text.chars().take(WIDTH).chain(['…']).collect() } else { text }
}

fn json_of(value: &Value, full: bool) -> serde_json::Value {
    match value {
        Value::Array(a) if !full && a.len() > SHOWN => {
            json!({ "array": a.element_type().name(), "length": a.len(), "first": elements(a, SHOWN) })
        }
        Value::Array(a) => elements(a, usize::MAX).into(),
        Value::Bool(v) => json!(v),
        Value::F32(v) => float(f64::from(*v), v.to_string()),
        Value::F64(v) => float(*v, v.to_string()),
        Value::String(v) => json!(v),
        Value::U8(v) => json!(v),
        Value::I8(v) => json!(v),
        Value::U16(v) => json!(v),
        Value::I16(v) => json!(v),
        Value::U32(v) => json!(v),
        Value::I32(v) => json!(v),
        Value::U64(v) => json!(v),
        Value::I64(v) => json!(v),
    }
}

/// The shortest decimal of a float; as text where JSON has no such number.
fn float(wide: f64, short: String) -> serde_json::Value {
    match short.parse::<f64>() {
        Ok(v) if wide.is_finite() => json!(v),
        _ => json!(short),
    }
}

/// The first `limit` elements.
fn elements(array: &Array, limit: usize) -> Vec<serde_json::Value> {
    macro_rules! each {
        ($v:expr, $kind:ident) => {
            $v.iter().take(limit).map(|x| json_of(&Value::$kind(x.clone()), true)).collect()
        };
    }
    match array {
        Array::U8(v) => each!(v, U8),
        Array::I8(v) => each!(v, I8),
        Array::U16(v) => each!(v, U16),
        Array::I16(v) => each!(v, I16),
        Array::U32(v) => each!(v, U32),
        Array::I32(v) => each!(v, I32),
        Array::F32(v) => each!(v, F32),
        Array::Bool(v) => each!(v, Bool),
        Array::String(v) => each!(v, String),
        Array::Array(v) => each!(v, Array),
        Array::U64(v) => each!(v, U64),
        Array::I64(v) => each!(v, I64),
        Array::F64(v) => each!(v, F64),
    }
}
