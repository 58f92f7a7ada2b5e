//! `metrics.jsonl`: one JSON object per step, on disk as soon as the step is done.
//!
//! `{"step":1,"loss":3.2,"lr":0.0001,"grad_norm":0.43,"tokens_per_second":1034.5}`, with `"val_loss"` where a validation
//! followed the step. `step` counts from 1: the steps taken. Each line is one write, so a killed run loses at most the
//! line it was writing. A resumed run cuts off what lies behind its checkpoint, torn line included, and writes those
//! steps again: the file of an interrupted run ends up like that of one that was not.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// One line.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Steps taken, this one included.
    pub step: u64,
    /// Mean loss of the trained tokens.
    #[serde(deserialize_with = "nan_as_null")]
    pub loss: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Length of the gradient before clipping.
    #[serde(deserialize_with = "nan_as_null")]
    pub grad_norm: f64,
    /// Tokens of the step's batches by the time it took.
    pub tokens_per_second: f64,
    /// Loss on the validation data after the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_loss: Option<f64>,
    /// Divergence from the untrained model in the step's texts that are to stay as they were, in nats per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_kl: Option<f64>,
    /// Share of pairs whose chosen answer is preferred, for losses on preferences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward_accuracy: Option<f64>,
    /// Reward of the chosen answers beyond that of the rejected ones, for losses on preferences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward_margin: Option<f64>,
}

/// JSON has no NaN: it is written as `null`.
fn nan_as_null<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// Writes `metrics.jsonl`.
#[derive(Debug)]
pub struct MetricsWriter {
    file: File,
    path: PathBuf,
}

impl MetricsWriter {
    /// A new file; an old one is emptied.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: &Path) -> Result<MetricsWriter> {
        MetricsWriter::resume(path, 0)
    }

    /// Goes on behind step `step`: lines of later steps, and all behind a line that cannot be read, are cut off.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn resume(path: &Path, step: u64) -> Result<MetricsWriter> {
        let io = Error::io(path);
        let open = || -> std::io::Result<File> {
            let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            let kept: usize = lines(&bytes).take_while(|(_, line)| line.step <= step).map(|(length, _)| length).sum();
            file.set_len(kept as u64)?;
            file.seek(SeekFrom::End(0))?;
            Ok(file)
        };
        Ok(MetricsWriter { file: open().map_err(io)?, path: path.into() })
    }

    /// Appends a line.
    ///
    /// # Errors
    /// [`Error::Io`]; nothing is left of the line then, so that another may follow.
    pub fn write(&mut self, metrics: &StepMetrics) -> Result<()> {
        let mut line = serde_json::to_string(metrics).map_err(|error| Error::argument(format!("metrics: {error}")))?;
        line.push('\n');
        let mut append = || -> std::io::Result<()> {
            let before = self.file.stream_position()?;
            self.file.write_all(line.as_bytes()).inspect_err(|_| {
                // On a full disk a part of it was written. That this fails too leaves a part, which readers stop at.
                let _ = self.file.set_len(before).and_then(|()| self.file.seek(SeekFrom::Start(before)));
            })
        };
        append().map_err(Error::io(&self.path))
    }
}

/// The lines of a metrics file, up to the first that cannot be read.
///
/// # Errors
/// [`Error::Io`].
pub fn read(path: &Path) -> Result<Vec<StepMetrics>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    Ok(lines(&bytes).map(|(_, line)| line).collect())
}

/// Whole lines with their length in bytes, the line feed included.
fn lines(bytes: &[u8]) -> impl Iterator<Item = (usize, StepMetrics)> {
    let whole = bytes.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n"));
    whole.map_while(|line| Some((line.len(), serde_json::from_slice(line).ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64) -> StepMetrics {
        let val_loss = step.is_multiple_of(2).then_some(1.5);
        StepMetrics {
            step,
            loss: 1.0 / step as f64,
            lr: 1e-4,
            grad_norm: 0.5,
            tokens_per_second: 9.5,
            val_loss,
            ..Default::default()
        }
    }

    #[test]
    fn a_resumed_file_is_that_of_an_uninterrupted_run() {
        let path = std::env::temp_dir().join(format!("kinglet-metrics-{}.jsonl", std::process::id()));
        let write = |writer: &mut MetricsWriter, steps: std::ops::RangeInclusive<u64>| {
            steps.for_each(|step| writer.write(&line(step)).unwrap());
        };
        let mut writer = MetricsWriter::create(&path).unwrap();
        write(&mut writer, 1..=6);
        let whole = std::fs::read(&path).unwrap();
        let first = whole.split(|&byte| byte == b'\n').next().unwrap();
        assert_eq!(first, br#"{"step":1,"loss":1.0,"lr":0.0001,"grad_norm":0.5,"tokens_per_second":9.5}"#);
        // Killed while writing any byte, resumed from step 4 or from what there is of it.
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let last = read(&path).unwrap().last().map_or(0, |line| line.step).min(4);
            let mut writer = MetricsWriter::resume(&path, 4).unwrap();
            write(&mut writer, last + 1..=6);
            assert_eq!(std::fs::read(&path).unwrap(), whole, "cut at {cut}");
        }
        assert_eq!(read(&path).unwrap(), (1..=6).map(line).collect::<Vec<_>>());
        MetricsWriter::create(&path).unwrap();
        assert!(read(&path).unwrap().is_empty());
        // What is not a number comes back.
        MetricsWriter::create(&path).unwrap().write(&StepMetrics { loss: f64::NAN, ..line(1) }).unwrap();
        assert!(read(&path).unwrap()[0].loss.is_nan());
        std::fs::remove_file(&path).unwrap();
    }
}
