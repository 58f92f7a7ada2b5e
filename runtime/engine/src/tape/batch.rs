//! What to run: the rows of one run of a tape, as every backend takes them. `C` is the backend's cache of a sequence.

use super::decoder::Purpose;
use super::op::{Rows, Tape};
use super::plan::PlanLimits;
use super::spec::Spec;
use crate::{Error, Result};

/// How the rows of a run divide into sequences, first to last.
pub trait Segments<C> {
    /// Number of sequences.
    fn count(&self) -> usize;

    /// Rows of sequence `index`.
    fn rows(&self, index: usize) -> usize;

    /// The cache of sequence `index`; its length is the position of the segment's first row. None in learning, where
    /// every segment is a whole sequence.
    fn cache(&mut self, index: usize) -> Option<&mut C>;
}

/// The lengths of whole sequences: what learning takes.
impl<C> Segments<C> for &[usize] {
    fn count(&self) -> usize {
        self.len()
    }

    fn rows(&self, index: usize) -> usize {
        self[index]
    }

    fn cache(&mut self, _: usize) -> Option<&mut C> {
        None
    }
}

/// Most logits of a row that [`Batch::largest`] may ask for.
pub const MOST_LARGEST: usize = 64;

/// What to run.
pub struct Batch<'a, C> {
    /// Token ids, segment after segment.
    pub tokens: &'a [u32],
    /// The residual stream of every token, `[tokens, width]`, for a tape that begins with it ([`Stage::Last`]); else empty.
    ///
    /// [`Stage::Last`]: super::Stage::Last
    pub input: &'a [f32],
    /// How they divide into sequences.
    pub segments: &'a mut dyn Segments<C>,
    /// Rows whose result is wanted, increasing.
    pub outputs: &'a [u32],
    /// How many of each output row's largest logits decide what is done with them, for [`Purpose::Generate`]; 0 where all do.
    /// A GPU may give those alone, at most [`MOST_LARGEST`].
    pub largest: usize,
    /// The token to be predicted at each output row, for [`Purpose::Score`] and [`Purpose::Learn`]; else empty.
    pub targets: &'a [u32],
    /// Compute every row as if it were run by itself, to the last bit, instead of in the fastest way for so many. The
    /// CPU can; the GPU takes no notice.
    pub alone: bool,
    /// What is learned.
    pub learning: Option<Learning<'a>>,
}

/// Where a run stands among those of a batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Within {
    /// Runs of the batch came before.
    pub begun: bool,
    /// Others follow.
    pub goes_on: bool,
}

/// Targets of output rows that are distributions over the vocabulary instead of single tokens, most of whose shares are
/// zero: those of a model that is imitated, say. The cross-entropy is linear in them, `Σ share·(−ln p(token))`.
#[derive(Clone, Copy, Debug, Default)]
pub struct SoftTargets<'a> {
    /// Where each output row's entries begin, and behind the last one the end; empty where no row has a distribution. A row
    /// without entries has its token as target.
    pub starts: &'a [u32],
    /// The tokens, each at most once a row.
    pub tokens: &'a [u32],
    /// Their shares; those of a row add up to 1.
    pub shares: &'a [f32],
}

impl<'a> SoftTargets<'a> {
    /// Most tokens of a row: what a workgroup of a GPU takes at once.
    pub const MOST: usize = 64;

    /// Tokens and shares of an output row; empty where it has a single target.
    pub fn of(&self, row: usize) -> (&'a [u32], &'a [f32]) {
        let range = match self.starts.get(row..row + 2) {
            Some([start, end]) => *start as usize..*end as usize,
            _ => 0..0,
        };
        let part = |range: std::ops::Range<usize>| Some((self.tokens.get(range.clone())?, self.shares.get(range)?));
        part(range).unwrap_or_default()
    }

    /// Whether all rows have single targets.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    fn check(&self, rows: usize, vocab: usize) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let wrong = |what: &str| Err(Error::argument(format!("distributions as targets: {what}")));
        if self.starts.len() != rows + 1 || self.tokens.len() != self.shares.len() {
            return wrong("every output row needs a start, the last one an end, and every token a share");
        }
        if !self.starts.is_sorted() || self.starts.last().is_some_and(|end| *end as usize > self.tokens.len()) {
            return wrong("starts must rise and end within the tokens");
        }
        if let Some(token) = self.tokens.iter().find(|t| **t as usize >= vocab) {
            return wrong(&format!("token {token} is outside the vocabulary of {vocab}"));
        }
        for row in 0..rows {
            let (tokens, shares) = self.of(row);
            if tokens.len() > SoftTargets::MOST {
                return wrong(&format!(
                    "output row {row} has {} tokens, at most {} are allowed",
                    tokens.len(),
                    SoftTargets::MOST
                ));
            }
            if let Some(twice) =
                tokens.iter().enumerate().find_map(|(i, token)| tokens[..i].contains(token).then_some(token))
            {
                return wrong(&format!("output row {row} has token {twice} twice"));
            }
            let sum: f32 = shares.iter().sum();
            if !tokens.is_empty()
                && (shares.iter().any(|share| *share < 0.0) || (sum - 1.0).abs() > 1e-3 || !sum.is_finite())
            {
                return wrong(&format!(
                    "the shares of output row {row} must be at least 0 and add up to 1, not to {sum}"
                ));
            }
        }
        Ok(())
    }
}

/// Trained parameters of a run.
#[derive(Debug)]
pub struct Learning<'a> {
    /// All trained matrices, as the tape's table of parameters places them.
    pub params: &'a [f32],
    /// Where [`Purpose::Learn`] adds their gradients; as long as `params`.
    pub gradients: &'a mut [f32],
    /// The device holds parameters and gradients itself ([`KeepsTraining`](super::KeepsTraining)); those here are empty then.
    pub held: bool,
    /// Whether a run with the same parameters came before, whose gradients may not be there yet, and whether another
    /// follows, until which this run's need not be: a GPU adds those of a batch up by itself.
    pub within: Within,
    /// Factor on the gradient of each output row's cross-entropy, for [`Purpose::Learn`].
    pub row_weights: &'a [f32],
    /// Targets that are distributions, for [`Purpose::Learn`] where the head does not learn.
    pub soft_targets: SoftTargets<'a>,
    /// Decides which of the adapters' inputs fall, for [`Purpose::Learn`]; another for each run of a training.
    pub dropout_seed: u64,
}

impl<C> Batch<'_, C> {
    /// How many rows of a kind the run has.
    pub(crate) fn rows(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.tokens.len(),
            Rows::Outputs => self.outputs.len(),
            Rows::One => 1,
        }
    }

    /// Checks everything about a batch that a tape relies on; `holds` says whether the device holds parameters.
    ///
    /// # Errors
    /// A batch over the limits, token ids outside the vocabulary, caches or parameters that are missing or misplaced.
    pub(crate) fn check(&mut self, tape: &Tape, limits: &PlanLimits, purpose: Purpose, holds: bool) -> Result<()> {
        check_rows(self, &tape.spec, limits, purpose)?;
        let floats = tape.input().map_or(0, |input| self.tokens.len() * tape.info(input).width);
        if self.input.len() != floats {
            return Err(Error::argument(format!(
                "{} floats of input are given, {floats} are needed",
                self.input.len()
            )));
        }
        check_learning(self, tape, purpose, holds)
    }
}

fn check_rows<C>(batch: &Batch<'_, C>, spec: &Spec, limits: &PlanLimits, purpose: Purpose) -> Result<()> {
    let rows = batch.tokens.len();
    if rows == 0
        || rows > limits.tokens
        || (0..batch.segments.count()).map(|i| batch.segments.rows(i)).sum::<usize>() != rows
    {
        return Err(Error::argument(format!("a run takes between 1 and {} tokens, not {rows}", limits.tokens)));
    }
    if batch.outputs.len() > limits.outputs || batch.outputs.iter().any(|o| *o as usize >= rows) {
        return Err(Error::argument(format!(
            "a run gives logits for at most {} of its rows, {} were asked for; open the session with larger logit_rows",
            limits.outputs,
            batch.outputs.len()
        )));
    }
    let wanted = if matches!(purpose, Purpose::Generate | Purpose::Embed) { 0 } else { batch.outputs.len() };
    if batch.targets.len() != wanted {
        return Err(Error::argument(format!("{wanted} targets are needed, not {}", batch.targets.len())));
    }
    if let Some(token) = batch.tokens.iter().chain(batch.targets).find(|t| **t as usize >= spec.vocab) {
        return Err(Error::argument(format!("token {token} is outside the vocabulary of {}", spec.vocab)));
    }
    Ok(())
}

/// Checks that what a tape learns, and what it needs for it, is there: keys and values in the cache or in the run.
fn check_learning<C>(batch: &mut Batch<'_, C>, tape: &Tape, purpose: Purpose, holds: bool) -> Result<()> {
    let held = batch.learning.as_ref().is_some_and(|l| l.held);
    if held && !holds {
        return Err(Error::argument("the device holds no parameters; give them"));
    }
    let params = if held { 0 } else { tape.param_count() };
    let learning = !tape.params.is_empty();
    if (0..batch.segments.count()).any(|i| batch.segments.cache(i).is_some() == learning) {
        return Err(Error::argument("sequences have a cache when generating and none when learning"));
    }
    let rows = if purpose == Purpose::Learn { batch.outputs.len() } else { 0 };
    if let Some(l) = &batch.learning {
        l.soft_targets.check(batch.outputs.len(), tape.spec.vocab)?;
    }
    match &batch.learning {
        None if !learning => Ok(()),
        Some(l) if l.params.len() == params && l.row_weights.len() >= rows => match l.gradients.len() {
            _ if !l.soft_targets.is_empty() && (purpose != Purpose::Learn || tape.learns_head()) => {
                Err(Error::Unsupported(
                    "distributions as targets where the head learns, or nothing does; leave the head out".into(),
                ))
            }
            n if n == params || purpose != Purpose::Learn => Ok(()),
            n => Err(Error::argument(format!("{n} gradients for {params} parameters"))),
        },
        _ => Err(Error::argument(format!("a run needs the {params} trained parameters and a weight per output row"))),
    }
}

/// Whether `drop` positions from `keep` on can be dropped from a cache that holds so many.
///
/// # Errors
/// Positions that are not held.
pub(crate) fn check_dropped(held: usize, keep: usize, drop: usize) -> Result<()> {
    match keep.checked_add(drop) {
        Some(end) if end <= held => Ok(()),
        _ => Err(Error::argument(format!("{drop} positions from {keep} on cannot be dropped: {held} are held"))),
    }
}
