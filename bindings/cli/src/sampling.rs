//! The options that choose tokens, and their translation for the library.

use anyhow::Context;
use clap::Args;
use kinglet_engine::sampling::{DRY_BREAKERS, Mirostat, SamplerOptions};
use kinglet_engine::text::{EncodeOptions, Tokenizer};

/// How tokens are chosen; the chain and its defaults are llama.cpp's.
#[derive(Args, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// 0 takes the most probable token; higher is more varied [default: 0.8]
    #[arg(short, long, value_name = "T")]
    temperature: Option<f32>,
    /// Keep the K most probable tokens, 0 for all [default: 40]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Keep the most probable tokens that come to P together, 1 for all [default: 0.95]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Drop tokens under P times the largest probability, 0 for none [default: 0.05]
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Keep tokens of typical surprise that come to P together [default: 1, off]
    #[arg(long, value_name = "P")]
    typical_p: Option<f32>,
    /// Start of the random sequence, for repeatable answers
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Tokens the penalties look back, or all [default: 64]
    #[arg(long, value_name = "N", value_parser = look_back)]
    repeat_last_n: Option<usize>,
    /// Divide the logits of tokens in the look-back [default: 1, off]
    #[arg(long, value_name = "X")]
    repeat_penalty: Option<f32>,
    /// Subtract per occurrence in the look-back [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Subtract once per token in the look-back [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Strength of the DRY penalty on repeated sequences [default: 0, off]
    #[arg(long, value_name = "X")]
    dry_multiplier: Option<f32>,
    /// Growth of the DRY penalty per token [default: 1.75]
    #[arg(long, value_name = "X")]
    dry_base: Option<f32>,
    /// Longest sequence that may repeat freely, plus one [default: 2]
    #[arg(long, value_name = "N")]
    dry_allowed_length: Option<usize>,
    /// Tokens DRY looks back, or all [default: all]
    #[arg(long, value_name = "N", value_parser = look_back)]
    dry_last_n: Option<usize>,
    /// Text across which DRY follows no repetition; may be given again [default: line break : " *]
    #[arg(long, value_name = "TEXT")]
    dry_breaker: Vec<String>,
    /// Hold the surprise of the text at a target (Mirostat 2) instead of filtering
    #[arg(long)]
    mirostat: bool,
    /// Target of Mirostat, in bits per token [default: 5]
    #[arg(long, value_name = "BITS", requires = "mirostat")]
    mirostat_tau: Option<f32>,
    /// How fast Mirostat follows [default: 0.1]
    #[arg(long, value_name = "X", requires = "mirostat")]
    mirostat_eta: Option<f32>,
    /// Add BIAS to the logit of token ID, -inf to ban it; may be given again
    #[arg(long, value_name = "ID=BIAS", value_parser = bias)]
    logit_bias: Vec<(u32, f32)>,
}

impl SamplingArgs {
    /// The library's options, checked.
    pub fn options(&self, tokenizer: &Tokenizer, vocab: usize) -> anyhow::Result<SamplerOptions> {
        let d = SamplerOptions::default();
        let plain = EncodeOptions { add_special: false, parse_special: false };
        let mut breakers: Vec<&str> = self.dry_breaker.iter().map(String::as_str).collect();
        if breakers.is_empty() {
            breakers = DRY_BREAKERS.into();
        }
        let m = Mirostat::default();
        let mirostat = Mirostat { tau: self.mirostat_tau.unwrap_or(m.tau), eta: self.mirostat_eta.unwrap_or(m.eta) };
        let options = SamplerOptions {
            temperature: self.temperature.unwrap_or(d.temperature),
            top_k: self.top_k.unwrap_or(d.top_k),
            top_p: self.top_p.unwrap_or(d.top_p),
            min_p: self.min_p.unwrap_or(d.min_p),
            typical_p: self.typical_p.unwrap_or(d.typical_p),
            penalty_last_n: self.repeat_last_n.unwrap_or(d.penalty_last_n),
            repeat_penalty: self.repeat_penalty.unwrap_or(d.repeat_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(d.frequency_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(d.presence_penalty),
            dry_multiplier: self.dry_multiplier.unwrap_or(d.dry_multiplier),
            dry_base: self.dry_base.unwrap_or(d.dry_base),
            dry_allowed_length: self.dry_allowed_length.unwrap_or(d.dry_allowed_length),
            dry_last_n: self.dry_last_n.unwrap_or(d.dry_last_n),
            dry_sequence_breakers: breakers
                .iter()
                .map(|b| tokenizer.encode(b, plain))
                .filter(|b| !b.is_empty())
                .collect(),
            mirostat: self.mirostat.then_some(mirostat),
            logit_bias: self.logit_bias.clone(),
            seed: self.seed,
        };
        options.validate(vocab).context("sampling")?;
        Ok(options)
    }
}

/// `all` or a number.
fn look_back(text: &str) -> Result<usize, String> {
    match text {
        "all" | "-1" => Ok(usize::MAX),
        _ => text.parse().map_err(|_| "a whole number, or all, is needed".into()),
    }
}

/// `ID=BIAS`.
fn bias(text: &str) -> Result<(u32, f32), String> {
    let wrong = || String::from("a token's id and a number are needed, such as 2=-inf or 28=1.5");
    let (id, bias) = text.split_once('=').ok_or_else(wrong)?;
    Ok((id.trim().parse().map_err(|_| wrong())?, bias.trim().parse().map_err(|_| wrong())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn biases() {
        assert_eq!(bias("2=-inf"), Ok((2, f32::NEG_INFINITY)));
        assert_eq!(bias("28 = 1.5"), Ok((28, 1.5)));
        assert!(bias("28").is_err() && bias("x=1").is_err() && bias("-1=1").is_err());
    }

    #[test]
    fn look_backs() {
        assert_eq!(look_back("all"), Ok(usize::MAX));
        assert_eq!(look_back("64"), Ok(64));
        assert!(look_back("some").is_err());
    }
}
