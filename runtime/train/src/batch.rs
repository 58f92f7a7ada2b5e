//! Examples to batches: packing, order, and the position in the data.
//!
//! A batch is a list of examples. They stand side by side in one run of the tape, each a sequence of its own with positions
//! from 0 and attention within itself, so no document sees another and nothing is padded ([`collate`]). Packing decides how
//! many there are: a batch has `batch` rows of at most `seq` tokens, and short examples share a row.
//!
//! The order of an epoch follows from (seed, epoch) alone, so a [`Cursor`] of two numbers is the whole state of a
//! [`Loader`].

use std::collections::BTreeSet;

use kinglet_engine::session::LearnBatch;
use serde::{Deserialize, Serialize};

use crate::data::Example;
use crate::{Error, Result, random};

/// `examples` side by side, each of their trained tokens with weight 1.
pub fn collate<'e>(examples: impl IntoIterator<Item = &'e Example>) -> LearnBatch {
    let mut batch = LearnBatch::default();
    let examples: Vec<&Example> = examples.into_iter().collect();
    let soft = examples.iter().any(|example| example.prediction.is_some());
    for example in examples {
        match &example.prediction {
            Some(prediction) => batch.soft.append(&prediction.targets),
            None if soft => (0..example.trained_tokens()).for_each(|_| batch.soft.push(&[], &[])),
            None => {}
        }
        let first = batch.tokens.len() as u32;
        batch.lengths.push(example.tokens.len());
        batch.tokens.extend_from_slice(&example.tokens);
        let predicted = std::iter::zip(&example.tokens, &example.trained).zip(0u32..).skip(1);
        for ((token, _), at) in predicted.filter(|((_, trained), _)| **trained) {
            batch.outputs.push(first + at - 1);
            batch.targets.push(*token);
        }
    }
    batch.weights = vec![1.0; batch.outputs.len()];
    batch
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
#[derive(Clone, Copy, Debug, PartialEq)]
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
    /// So many examples, the last, of which an epoch has only some, in turns.
    pub in_turns: usize,
    /// Their tokens in an epoch beside one of the others.
    pub share: f64,
}

/// Endless batches of a set of examples, which it knows by their number and length only.
#[derive(Clone, Debug)]
pub struct Loader {
    lengths: Vec<usize>,
    options: LoaderOptions,
    cursor: Cursor,
    /// The rows of the cursor's epoch.
    rows: Vec<Vec<usize>>,
}

impl Loader {
    /// A loader at the beginning, for examples of these lengths in tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] where there are no examples, or one is empty or longer than a row.
    pub fn new(lengths: Vec<usize>, options: LoaderOptions) -> Result<Loader> {
        if lengths.is_empty() || options.batch == 0 {
            return Err(Error::argument("there are no examples to make batches of, or no rows in a batch"));
        }
        for (index, length) in lengths.iter().enumerate() {
            if !(1..=options.seq).contains(length) {
                return Err(Error::argument(format!(
                    "example {index} has {length} tokens but a row has 1 to {} tokens",
                    options.seq
                )));
            }
        }
        let mut loader = Loader { lengths, options, cursor: Cursor::default(), rows: Vec::new() };
        loader.rows = loader.plan(0);
        Ok(loader)
    }

    /// The rows of an epoch.
    fn plan(&self, epoch: u64) -> Vec<Vec<usize>> {
        let always = self.lengths.len().saturating_sub(self.options.in_turns);
        let mut order: Vec<usize> = (0..always).collect();
        let (lengths, in_turns) = self.lengths.split_at(always);
        if !in_turns.is_empty() {
            let sum = |lengths: &[usize]| lengths.iter().sum::<usize>() as f64;
            // As many in every epoch, so that each comes as often as any other.
            let count = (self.options.share * sum(lengths) * in_turns.len() as f64 / sum(in_turns)).ceil() as usize;
            let count = if self.options.share > 0.0 { count.clamp(1, in_turns.len()) } else { 0 };
            let first = (epoch as u128 * count as u128 % in_turns.len() as u128) as usize;
            order.extend((first..first + count).map(|i| always + i % in_turns.len()));
        }
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

    /// The numbers of the next batch's examples, row by row; behind the last batch of an epoch the next epoch begins. Never
    /// crosses from one epoch to the next.
    pub fn next_batch(&mut self) -> Vec<usize> {
        let end = self.rows.len().min(self.cursor.row + self.options.batch);
        let batch = self.rows[self.cursor.row..end].concat();
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(count: usize) -> Vec<usize> {
        (0..count).map(|i| 1 + random::splitmix64(4, i as u64) as usize % 20).collect()
    }

    fn options(packing: Packing) -> LoaderOptions {
        LoaderOptions { batch: 3, seq: 24, packing, shuffle: true, seed: 9, in_turns: 0, share: 0.0 }
    }

    #[test]
    fn targets_stay_within_their_document() {
        let some = Example::new(vec![20, 21, 22], vec![true, false, true]);
        let batch = collate([&Example::plain(vec![10, 11]), &some, &Example::plain(vec![30])]);
        assert_eq!(batch.tokens, [10, 11, 20, 21, 22, 30]);
        assert_eq!(batch.lengths, [2, 3, 1]);
        assert_eq!((batch.outputs, batch.targets), (vec![0, 3], vec![11, 22]));
        assert_eq!(batch.weights, [1.0, 1.0]);
    }

    #[test]
    fn every_example_comes_once_an_epoch_and_no_row_is_too_long() {
        for packing in [Packing::None, Packing::InOrder, Packing::BestFit] {
            let all = lengths(50);
            let mut loader = Loader::new(all.clone(), options(packing)).unwrap();
            for epoch in 0..3 {
                let mut seen = Vec::new();
                assert!(loader.rows.iter().all(|row| row.iter().map(|i| all[*i]).sum::<usize>() <= 24));
                while loader.cursor().epoch == epoch {
                    let batch = loader.next_batch();
                    assert!(batch.iter().map(|i| all[*i]).sum::<usize>() <= 3 * 24);
                    seen.extend(batch);
                }
                seen.sort_unstable();
                assert!(seen.into_iter().eq(0..50), "{packing:?}");
            }
        }
    }

    #[test]
    fn some_examples_come_in_turns() {
        let options = LoaderOptions { in_turns: 20, share: 0.25, ..options(Packing::BestFit) };
        let mut loader = Loader::new(vec![10; 60], options).unwrap();
        let mut seen = vec![0; 60];
        for epoch in 0..6 {
            let mut turns = 0;
            while loader.cursor().epoch == epoch {
                for example in loader.next_batch() {
                    seen[example] += 1;
                    turns += usize::from(example >= 40);
                }
            }
            assert_eq!(turns, 10);
        }
        assert!(seen[..40].iter().all(|n| *n == 6) && seen[40..].iter().all(|n| *n == 3), "{seen:?}");
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
            let mut loader = Loader::new(lengths(40), options(packing)).unwrap();
            let run: Vec<(Cursor, Vec<usize>)> = (0..60).map(|_| (loader.cursor(), loader.next_batch())).collect();
            assert!(run.last().unwrap().0.epoch > 1);
            for at in [0, 1, 7, 33, 59] {
                let text = serde_json::to_string(&run[at].0).unwrap();
                let mut resumed = Loader::new(lengths(40), options(packing)).unwrap();
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
            let mut loader = Loader::new(lengths(40), options).unwrap();
            let first = loader.next_batch();
            loader.seek(Cursor { epoch: 1, row: 0 }).unwrap();
            (first, loader.next_batch())
        };
        let (a, b) = first(1, true);
        assert!(a != b && a != first(2, true).0 && a == first(1, true).0);
        let (a, b) = first(1, false);
        assert!(a == b && a == first(2, false).0 && a[0] == 0);
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let new = |all| Loader::new(all, options(Packing::None)).map(|_| ()).unwrap_err().to_string();
        assert!(new(Vec::new()).contains("no examples"));
        assert!(new(vec![3, 25]).contains("example 1 has 25 tokens"));
        assert!(new(vec![0]).contains("example 0 has 0 tokens"));
    }
}
