//! Examples to batches: packing, order, and the position in the data.
//!
//! A batch is `rows × seq` tokens, flat. Several examples share a row, each a [`Segment`] with positions from 0 of its
//! own; attention must stay within a segment, so that no document sees another. Segments cover the batch without gaps:
//! what is left of a row is a segment of padding without targets (or [`Batch::compact`] leaves it out). `targets[i]` is the
//! token that row `i` is to predict, or [`IGNORE`]: at the last token of a segment, before tokens that are not trained,
//! and in padding.
//!
//! The order of an epoch follows from (seed, epoch) alone, so a [`Cursor`] of two numbers is the whole state of a
//! [`Loader`].

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::data::Example;
use crate::{Error, Result, random};

/// The target of a token that predicts nothing.
pub const IGNORE: u32 = u32::MAX;

/// Tokens of one document, consecutive in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Index of its first token in the batch.
    pub start: usize,
    /// Number of its tokens.
    pub len: usize,
    /// Index of its example; `None` for padding.
    pub example: Option<usize>,
}

/// Tokens for one run of the tape, forward and backward.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The tokens, row after row.
    pub tokens: Vec<u32>,
    /// For each token the one it is to predict, or [`IGNORE`].
    pub targets: Vec<u32>,
    /// The documents, in order, without gaps.
    pub segments: Vec<Segment>,
}

impl Batch {
    /// A batch of rows of `seq` tokens, each with the examples of one list of `rows`, filled up with token `padding`.
    /// Examples that are not there or do not fit are left out.
    pub fn assemble(examples: &[Example], rows: &[Vec<usize>], seq: usize, padding: u32) -> Batch {
        let mut batch = Batch::default();
        for (index, row) in rows.iter().enumerate() {
            let end = (index + 1) * seq;
            for &number in row {
                let Some(example) = examples.get(number) else { continue };
                if !example.tokens.is_empty() && batch.tokens.len() + example.tokens.len() <= end {
                    batch.push(example, number);
                }
            }
            let (start, len) = (batch.tokens.len(), end - batch.tokens.len());
            if len > 0 {
                batch.segments.push(Segment { start, len, example: None });
                batch.tokens.resize(end, padding);
                batch.targets.resize(end, IGNORE);
            }
        }
        batch
    }

    fn push(&mut self, example: &Example, number: usize) {
        let (start, len) = (self.tokens.len(), example.tokens.len());
        self.segments.push(Segment { start, len, example: Some(number) });
        self.tokens.extend_from_slice(&example.tokens);
        let next = std::iter::zip(&example.tokens, &example.trained).skip(1);
        self.targets.extend(next.map(|(&token, &trained)| if trained { token } else { IGNORE }));
        self.targets.resize(start + len, IGNORE);
    }

    /// The batch without its padding.
    pub fn compact(&self) -> Batch {
        let mut out = Batch::default();
        for segment in self.segments.iter().filter(|segment| segment.example.is_some()) {
            let range = segment.start..segment.start + segment.len;
            out.segments.push(Segment { start: out.tokens.len(), ..*segment });
            out.tokens.extend_from_slice(&self.tokens[range.clone()]);
            out.targets.extend_from_slice(&self.targets[range]);
        }
        out
    }

    /// For each token its position in its document.
    pub fn positions(&self) -> Vec<u32> {
        self.segments.iter().flat_map(|segment| 0..segment.len as u32).collect()
    }

    /// Tokens that predict one.
    pub fn trained_tokens(&self) -> usize {
        self.targets.iter().filter(|target| **target != IGNORE).count()
    }

    /// Tokens that are not padding.
    pub fn real_tokens(&self) -> usize {
        self.segments.iter().filter(|segment| segment.example.is_some()).map(|segment| segment.len).sum()
    }
}

/// How examples are put into rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// One example a row.
    None,
    /// A row takes examples as they come, until one does not fit.
    InOrder,
    /// The longest first, each into the fullest row that has room for it: nearly no padding.
    #[default]
    BestFit,
}

/// Divides the examples in `order` among rows of `seq` tokens; `lengths` are at most that.
pub fn pack(lengths: &[usize], order: &[usize], seq: usize, packing: Packing) -> Vec<Vec<usize>> {
    let mut rows: Vec<Vec<usize>> = Vec::new();
    match packing {
        Packing::None => rows.extend(order.iter().map(|&example| vec![example])),
        Packing::InOrder => {
            let mut room = 0;
            for &example in order {
                match rows.last_mut().filter(|_| lengths[example] <= room) {
                    Some(row) => row.push(example),
                    None => {
                        rows.push(vec![example]);
                        room = seq;
                    }
                }
                room = room.saturating_sub(lengths[example]);
            }
        }
        Packing::BestFit => {
            let mut order = order.to_vec();
            // Stable: equal lengths keep the epoch's order.
            order.sort_by_key(|&example| std::cmp::Reverse(lengths[example]));
            let mut rooms: BTreeSet<(usize, usize)> = BTreeSet::new();
            for example in order {
                let length = lengths[example];
                let (room, row) = match rooms.range((length, 0)..).next().copied() {
                    Some(found) => {
                        rooms.remove(&found);
                        found
                    }
                    None => {
                        rows.push(Vec::new());
                        (seq, rows.len() - 1)
                    }
                };
                rows[row].push(example);
                rooms.insert((room.saturating_sub(length), row));
            }
        }
    }
    rows
}

/// A position in the data: the next row of an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Passes completed.
    pub epoch: u64,
    /// Rows taken of this pass.
    pub row: usize,
}

/// How a [`Loader`] makes batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoaderOptions {
    /// Rows of a batch; the last of an epoch may have fewer.
    pub batch: usize,
    /// Tokens of a row.
    pub seq: usize,
    /// How examples are put into rows.
    pub packing: Packing,
    /// Whether each epoch has an order of its own.
    pub shuffle: bool,
    /// What the orders follow from.
    pub seed: u64,
    /// The token that fills rows up.
    pub padding: u32,
}

/// Endless batches of a set of examples.
#[derive(Clone, Debug)]
pub struct Loader {
    examples: Vec<Example>,
    lengths: Vec<usize>,
    options: LoaderOptions,
    cursor: Cursor,
    /// The rows of the cursor's epoch.
    rows: Vec<Vec<usize>>,
}

impl Loader {
    /// A loader at the beginning.
    ///
    /// # Errors
    /// [`Error::Argument`] where there are no examples, or one is empty, longer than a row or of uneven lengths.
    pub fn new(examples: Vec<Example>, options: LoaderOptions) -> Result<Loader> {
        if examples.is_empty() || options.batch == 0 {
            return Err(Error::argument("there are no examples to make batches of, or no rows in a batch"));
        }
        for (index, example) in examples.iter().enumerate() {
            let length = example.tokens.len();
            if length == 0 || length > options.seq || example.trained.len() != length {
                return Err(Error::argument(format!(
                    "example {index} has {length} tokens and {} marks but a row has 1 to {} tokens",
                    example.trained.len(),
                    options.seq
                )));
            }
        }
        let lengths = examples.iter().map(|example| example.tokens.len()).collect();
        let mut loader = Loader { examples, lengths, options, cursor: Cursor::default(), rows: Vec::new() };
        loader.rows = loader.plan(0);
        Ok(loader)
    }

    /// The rows of an epoch.
    fn plan(&self, epoch: u64) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..self.examples.len()).collect();
        let seed = |what: &str| random::splitmix64(random::stream(what, self.options.seed), epoch);
        if self.options.shuffle {
            random::shuffle(&mut order, seed("data.examples"));
        }
        let mut rows = pack(&self.lengths, &order, self.options.seq, self.options.packing);
        if self.options.shuffle {
            // Best fit has sorted by length.
            random::shuffle(&mut rows, seed("data.rows"));
        }
        rows
    }

    /// The next batch; behind the last of an epoch the next begins. Never crosses from one epoch to the next.
    pub fn next_batch(&mut self) -> Batch {
        let end = self.rows.len().min(self.cursor.row + self.options.batch);
        let rows = &self.rows[self.cursor.row..end];
        let batch = Batch::assemble(&self.examples, rows, self.options.seq, self.options.padding);
        self.cursor.row = end;
        if end == self.rows.len() {
            self.cursor = Cursor { epoch: self.cursor.epoch + 1, row: 0 };
            self.rows = self.plan(self.cursor.epoch);
        }
        batch
    }

    /// Batches of the current epoch; of other epochs nearly the same.
    pub fn batches_per_epoch(&self) -> u64 {
        self.rows.len().div_ceil(self.options.batch) as u64
    }

    /// Where the next batch begins.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Goes to a cursor that a loader with the same examples and options gave.
    ///
    /// # Errors
    /// [`Error::Argument`] where it lies outside the data.
    pub fn seek(&mut self, cursor: Cursor) -> Result<()> {
        let rows = self.plan(cursor.epoch);
        if cursor.row >= rows.len() {
            return Err(Error::argument(format!(
                "row {} of epoch {} is outside the data of {} rows; resume with the data of the checkpoint",
                cursor.row,
                cursor.epoch,
                rows.len()
            )));
        }
        (self.cursor, self.rows) = (cursor, rows);
        Ok(())
    }

    /// The examples.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn example(start: u32, len: usize) -> Example {
        let tokens: Vec<u32> = (0..len as u32).map(|i| start + i).collect();
        Example { trained: tokens.iter().map(|token| token % 3 != 0).collect(), tokens }
    }

    fn examples(count: usize) -> Vec<Example> {
        (0..count).map(|i| example(100 * i as u32, 1 + random::splitmix64(4, i as u64) as usize % 20)).collect()
    }

    fn options(packing: Packing) -> LoaderOptions {
        LoaderOptions { batch: 3, seq: 24, packing, shuffle: true, seed: 9, padding: 7 }
    }

    #[test]
    fn targets_stay_within_their_document() {
        let batch = Batch::assemble(&[example(10, 3), example(20, 2)], &[vec![0, 1], vec![1]], 6, 0);
        let x = IGNORE;
        assert_eq!(batch.tokens, [10, 11, 12, 20, 21, 0, 20, 21, 0, 0, 0, 0]);
        assert_eq!(batch.targets, [11, x, x, x, x, x, x, x, x, x, x, x]);
        assert_eq!(batch.positions(), [0, 1, 2, 0, 1, 0, 0, 1, 0, 1, 2, 3]);
        assert_eq!((batch.trained_tokens(), batch.real_tokens()), (1, 7));
        let compact = batch.compact();
        assert_eq!(compact.tokens, [10, 11, 12, 20, 21, 20, 21]);
        assert_eq!(compact.positions(), [0, 1, 2, 0, 1, 0, 1]);
    }

    /// In every batch: segments without gaps, within a row, with the tokens and targets of their example.
    #[test]
    fn every_example_comes_once_an_epoch_and_whole() {
        for packing in [Packing::None, Packing::InOrder, Packing::BestFit] {
            let all = examples(50);
            let mut loader = Loader::new(all.clone(), options(packing)).unwrap();
            for epoch in 0..3 {
                let mut seen = HashMap::new();
                while loader.cursor().epoch == epoch {
                    let batch = loader.next_batch();
                    assert_eq!((batch.tokens.len() % 24, batch.targets.len()), (0, batch.tokens.len()));
                    let mut next = 0;
                    for segment in &batch.segments {
                        assert_eq!(segment.start, next);
                        next += segment.len;
                        assert_eq!(segment.start / 24, (next - 1) / 24, "crosses rows");
                        let range = segment.start..next;
                        let Some(number) = segment.example else {
                            assert!(batch.targets[range].iter().all(|&target| target == IGNORE));
                            continue;
                        };
                        *seen.entry(number).or_insert(0) += 1;
                        assert_eq!(batch.tokens[range.clone()], all[number].tokens);
                        for (offset, &target) in batch.targets[range].iter().enumerate() {
                            let wanted = all[number].tokens.get(offset + 1).filter(|_| all[number].trained[offset + 1]);
                            assert_eq!(target, wanted.copied().unwrap_or(IGNORE));
                        }
                    }
                    assert_eq!(next, batch.tokens.len());
                }
                assert!(seen.len() == 50 && seen.values().all(|count| *count == 1), "{packing:?}");
            }
        }
    }

    #[test]
    fn best_fit_wastes_little() {
        let lengths: Vec<usize> = (0..5000).map(|i| 1 + random::splitmix64(1, i) as usize % 300).collect();
        let order: Vec<usize> = (0..5000).collect();
        let total: usize = lengths.iter().sum();
        let rows = |packing| pack(&lengths, &order, 512, packing).len() * 512;
        assert!(rows(Packing::BestFit) as f64 <= 1.01 * total as f64);
        assert!(rows(Packing::InOrder) > rows(Packing::BestFit));
    }

    #[test]
    fn goes_on_from_any_cursor() {
        for packing in [Packing::None, Packing::InOrder, Packing::BestFit] {
            let mut loader = Loader::new(examples(40), options(packing)).unwrap();
            let run: Vec<(Cursor, Batch)> = (0..60).map(|_| (loader.cursor(), loader.next_batch())).collect();
            assert!(run.last().unwrap().0.epoch > 1);
            for at in [0, 1, 7, 33, 59] {
                let text = serde_json::to_string(&run[at].0).unwrap();
                let mut resumed = Loader::new(examples(40), options(packing)).unwrap();
                resumed.seek(serde_json::from_str(&text).unwrap()).unwrap();
                assert!(
                    run[at..]
                        .iter()
                        .all(|(cursor, batch)| resumed.cursor() == *cursor && resumed.next_batch() == *batch)
                );
            }
            assert!(loader.seek(Cursor { epoch: 0, row: 1000 }).is_err());
        }
    }

    #[test]
    fn epochs_and_seeds_differ_unless_told() {
        let first = |seed, shuffle| {
            let options = LoaderOptions { seed, shuffle, ..options(Packing::InOrder) };
            let mut loader = Loader::new(examples(40), options).unwrap();
            let first = loader.next_batch();
            loader.seek(Cursor { epoch: 1, row: 0 }).unwrap();
            (first, loader.next_batch())
        };
        let (a, b) = first(1, true);
        assert!(a != b && a != first(2, true).0 && a == first(1, true).0);
        let (a, b) = first(1, false);
        assert!(a == b && a == first(2, false).0 && a.segments[0].example == Some(0));
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let new = |all| Loader::new(all, options(Packing::None)).map(|_| ()).unwrap_err().to_string();
        assert!(new(Vec::new()).contains("no examples"));
        assert!(new(vec![example(0, 25)]).contains("example 0 has 25 tokens"));
        assert!(new(vec![Example { tokens: vec![1, 2], trained: vec![true] }]).contains("1 marks"));
    }
}
