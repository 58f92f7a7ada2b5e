//! What a training leaves: an adapter in both forms that other programs read, or a model.
//!
//! | file | what |
//! | --- | --- |
//! | `adapter.gguf` | the adapter as llama.cpp reads it |
//! | `adapter_config.json`, `adapter_model.safetensors` | the adapter as PEFT reads it, where the family has names there |
//! | `model.gguf` | after full training: the model, dense |

use std::path::{Path, PathBuf};

use kinglet_engine::quant::DType;
use kinglet_engine::session::{Learner, Model};
use kinglet_engine::tape::{LinearSpec, LoraSpec, Trained};
use kinglet_models::peft;

use crate::config::{Target, TrainConfig};
use crate::{Error, Result};

/// What `config` asks of the tape, for `model`.
///
/// # Errors
/// [`Error::Unsupported`] for targets that are not trained here.
pub fn trained(config: &TrainConfig, model: &Model) -> Result<Trained> {
    if config.full {
        return Ok(Trained::All);
    }
    let mut weights = Vec::new();
    for layer in &model.spec().layers {
        for target in &config.targets {
            let linear: &LinearSpec = match target {
                Target::Q => &layer.q,
                Target::K => &layer.k,
                Target::V => &layer.v,
                Target::O => &layer.o,
                Target::Gate => &layer.gate,
                Target::Up => &layer.up,
                Target::Down => &layer.down,
                Target::Embedding | Target::Head => {
                    return Err(Error::Unsupported(
                        "adapters on the embedding and the head cannot be trained yet; leave these targets out".into(),
                    ));
                }
            };
            if let (tensor, Some(rows)) = (&linear.weight.tensor, &linear.weight.rows) {
                return Err(Error::Unsupported(format!(
                    "an adapter of rows {rows:?} of {tensor}: adapter files know whole tensors only; leave {target:?} out"
                )));
            }
            weights.push(linear.weight.tensor.clone());
        }
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
    let mut adapter = learner.adapter(params, "the trained adapter")?;
    (adapter.alpha, adapter.rslora) = (config.alpha as f32, config.rslora);
    let gguf = folder.join("adapter.gguf");
    adapter.save(&gguf, DType::F32)?;
    match peft::write(folder, &adapter, learner.model(), None) {
        Ok(()) => Ok((vec![gguf, folder.join("adapter_config.json"), folder.join("adapter_model.safetensors")], None)),
        Err(Error::Unsupported(what)) => Ok((vec![gguf], Some(format!("no PEFT files: {what}")))),
        Err(error) => Err(error),
    }
}
