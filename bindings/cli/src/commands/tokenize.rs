//! `kinglet tokenize`: how a model sees a text.

use crate::args::{Global, MODEL_HELP};
use crate::models;
use crate::output::{self, Table};
use clap::Args;
use kinglet_engine::text::{EncodeOptions, Tokenizer};
use serde_json::json;

/// Show the tokens of a text
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  kinglet tokenize smollm2 \"Hello, world\"
  kinglet tokenize smollm2 \"Hello, world\" --ids         [19556,28,905]
  kinglet tokenize smollm2 - --count < book.txt")]
pub struct Arguments {
    #[arg(help = MODEL_HELP, value_name = "MODEL")]
    model: String,
    /// The text; - reads standard input
    text: String,
    /// Print only the ids, as one JSON array
    #[arg(long, conflicts_with = "count")]
    ids: bool,
    /// Print only how many there are
    #[arg(long)]
    count: bool,
    /// Put the tokens around the text that the model asks for (BOS, EOS)
    #[arg(long)]
    special: bool,
    /// Take <|names|> of control tokens in the text as plain text
    #[arg(long)]
    plain: bool,
}

pub fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<()> {
    let text = super::text_or_stdin(&arguments.text)?;
    let tokenizer = Tokenizer::from_gguf(&models::gguf_of(&arguments.model)?)?;
    let options = EncodeOptions { add_special: arguments.special, parse_special: !arguments.plain };
    let ids = tokenizer.encode_bytes(&text, options);
    if arguments.ids {
        return Ok(output::text(&format!("{}\n", serde_json::to_string(&ids)?))?);
    }
    if arguments.count {
        return Ok(output::text(&format!("{}\n", ids.len()))?);
    }
    let piece = |id: &u32| String::from_utf8_lossy(tokenizer.token_bytes(*id, true).unwrap_or_default()).into_owned();
    if global.json {
        let tokens: Vec<_> =
            ids.iter().map(|id| json!({ "id": id, "text": piece(id), "control": tokenizer.is_control(*id) })).collect();
        return output::json(&json!({ "count": ids.len(), "tokens": tokens }));
    }
    let mut table = Table::new(&[">id", "text"]);
    ids.iter().for_each(|id| table.row(vec![id.to_string(), format!("{:?}", piece(id))]));
    Ok(output::text(&format!("{}{} tokens\n", table.aligned(), ids.len()))?)
}
