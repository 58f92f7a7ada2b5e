//! What a training leaves: an adapter in both forms that other programs read, or a model.
//!
//! | file | what |
//! | --- | --- |
//! | `adapter.gguf` | the adapter as llama.cpp reads it |
//! | `adapter_config.json`, `adapter_model.safetensors` | the adapter as PEFT reads it, where the family has names there |
//! | `model.gguf` | after full training: the model, dense |

use std::path::{Path, PathBuf};

use kinglet_engine::adapter::Adapter;
use kinglet_engine::quant::DType;
use kinglet_engine::session::{Learner, Model};
use kinglet_engine::tape::{LayerSpec, LinearSpec, LoraSpec, Trained, WeightRef};
use kinglet_models::peft;

use crate::config::{Target, TrainConfig};
use crate::{Error, Result};

/// What `config` asks of the tape, for `model`.
///
/// # Errors
/// [`Error::Unsupported`] for a head that is the embedding.
pub fn trained(config: &TrainConfig, model: &Model) -> Result<Trained> {
    if config.full {
        return Ok(Trained::All);
    }
    let spec = model.spec();
    let mut weights = Vec::new();
    for target in &config.targets {
        let layers = |map: fn(&LayerSpec) -> &LinearSpec| spec.layers.iter().map(|l| &map(l).weight).collect();
        let matrices: Vec<&WeightRef> = match target {
            Target::Q => layers(|l| &l.q),
            Target::K => layers(|l| &l.k),
            Target::V => layers(|l| &l.v),
            Target::O => layers(|l| &l.o),
            Target::Gate => layers(|l| &l.gate),
            Target::Up => layers(|l| &l.up),
            Target::Down => layers(|l| &l.down),
            Target::Embedding => vec![&spec.embedding],
            Target::Head if spec.head == spec.embedding => {
                return Err(Error::Unsupported(format!(
                    "an adapter of the head: in {} it is the embedding; name that instead, or leave it out",
                    model.gguf().name()
                )));
            }
            Target::Head => vec![&spec.head],
        };
        weights.extend(matrices.into_iter().map(WeightRef::name));
    }
    Ok(Trained::Adapters(LoraSpec {
        rank: config.rank,
        scale: config.scale() as f32,
        weights,
        // Scores of answers and their gradients must be of one and the same model: TRL has no dropout there either.
        dropout: if config.loss == crate::preference::Loss::CrossEntropy { config.dropout as f32 } else { 0.0 },
        dora: config.dora,
    }))
}

/// The adapter that `params` of `learner` are.
///
/// # Errors
/// A training of all weights, numbers that are not finite.
pub fn adapter(learner: &Learner, params: &[f32], config: &TrainConfig) -> Result<Adapter> {
    let mut adapter = learner.adapter(params, "the trained adapter")?;
    // Stacked matrices come with the sum of their parts' ranks, of which `alpha/√r` would make something else.
    if !config.rslora || adapter.entries.values().all(|e| e.rank == config.rank) {
        (adapter.alpha, adapter.rslora) = (config.alpha as f32, config.rslora);
    }
    Ok(adapter)
}

/// Writes what `params` of `learner` have become into `folder`; gives the paths, and a note where a form had to be left out.
///
/// # Errors
/// Numbers that are not finite, [`Error::Io`].
pub fn write(
    folder: &Path,
    learner: &Learner,
    params: &[f32],
    config: &TrainConfig,
) -> Result<(Vec<PathBuf>, Option<String>)> {
    if config.full {
        let path = folder.join("model.gguf");
        learner.write_model(params, None, &path)?;
        return Ok((vec![path], None));
    }
    let adapter = adapter(learner, params, config)?;
    let gguf = folder.join("adapter.gguf");
    adapter.save(&gguf, DType::F32)?;
    match peft::write(folder, &adapter, learner.model(), None) {
        Ok(()) => Ok((vec![gguf, folder.join("adapter_config.json"), folder.join("adapter_model.safetensors")], None)),
        Err(Error::Unsupported(what)) => Ok((vec![gguf], Some(format!("no PEFT files: {what}")))),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kinglet_models::tiny::{TinyConfig, write_tiny};

    #[test]
    fn targets_become_matrices_and_a_shared_head_is_refused() {
        let path = std::env::temp_dir().join(format!("kinglet-targets-{}.gguf", std::process::id()));
        let targets = vec![Target::Q, Target::Embedding, Target::Head];
        let config = TrainConfig { targets, ..TrainConfig::default() };
        let of = |tied: bool| {
            write_tiny(&path, &TinyConfig { tied, layers: 2, ..TinyConfig::new("llama") }).unwrap();
            trained(&config, &kinglet_models::open(&path).unwrap())
        };
        let Ok(Trained::Adapters(lora)) = of(false) else { panic!("adapters") };
        let names = ["blk.0.attn_q.weight", "blk.1.attn_q.weight", "token_embd.weight", "output.weight"];
        assert_eq!(lora.weights, names);
        assert!(of(true).unwrap_err().to_string().contains("embedding"));
        std::fs::remove_file(&path).unwrap();
    }
}
