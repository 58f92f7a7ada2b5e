//! What would hold the device for too long is divided: screens are drawn between dispatches. Products are divided by columns when
//! they are recorded; attention and its gradient by heads when they are replayed, for how long they take depends on the
//! positions of the run. Each part computes what the whole would, in the same order, so results have the same bits.
//!
//! How long something takes is told by the times of products in single precision, if there are such (`choice` knows better of
//! products that it has timed), else by a low guess of what such devices do.

use super::choice::{Choices, FEWEST_COLUMNS, Form, LONGEST, matmul_work};
use super::device::{Device, DeviceKind, SLOT, lock};
use super::record::{Dispatch, Grid};
use crate::tape::Rows;

/// Of the speed of products in single precision, what attention and gradients have at least.
const SHARE: f64 = 0.25;

/// Launches of divided dispatches that go to the device in one submission, of a tenth of a second.
const DIVIDED_AT_ONCE: usize = 4;

/// Heads that a dispatch of attention computes side by side. Their descriptions follow each other, and each tells the first head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    pub count: u32,
    /// Workgroups side by side for each.
    pub groups: u32,
    /// Multiply-adds of a head for a row and a position that it sees.
    pub multiply_adds: u32,
    /// Positions that a row sees at most; 0 for all.
    pub window: u32,
}

/// How large a run is.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Sizes {
    pub tokens: usize,
    pub outputs: usize,
    /// For each row, how many positions there are for it to see: no fewer than it sees.
    pub seen: Vec<u32>,
}

impl Sizes {
    pub fn rows(&self, kind: Rows) -> usize {
        match kind {
            Rows::Tokens => self.tokens,
            Rows::Outputs => self.outputs,
            Rows::One => 1,
        }
    }

    /// Multiply-adds of one head.
    fn work(&self, heads: &Heads) -> f64 {
        let window = if heads.window == 0 { u32::MAX } else { heads.window };
        let pairs: u64 = self.seen.iter().map(|seen| u64::from(*seen.min(&window))).sum();
        pairs as f64 * f64::from(heads.multiply_adds)
    }
}

/// A dispatch, or a part of one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Launch<'a> {
    pub dispatch: &'a Dispatch,
    /// Offset of its description.
    pub slot: u32,
    pub grid: Grid,
    pub divided: bool,
}

impl Device {
    /// Multiply-adds that a dispatch may do.
    pub(super) fn at_once(&self) -> f64 {
        LONGEST * self.multiply_adds()
    }

    /// Multiply-adds per second that attention and gradients do at least.
    fn multiply_adds(&self) -> f64 {
        if let Some(speed) = self.speed {
            return speed;
        }
        let kind = self.info().kind;
        let of = |choices: &Choices| {
            let tile = choices.candidates.iter().find(|c| c.form == Form::Tile)?;
            let times = choices.shapes.iter().zip(&tile.seconds);
            let speeds = times.map(|(s, seconds)| matmul_work(s.rows, s.matrix.0, s.matrix.1) / seconds);
            speeds.max_by(f64::total_cmp)
        };
        let timed = lock(&self.choices).values().filter_map(|choices| of(choices)).min_by(f64::total_cmp);
        match (timed, kind) {
            (Some(speed), _) => SHARE * speed,
            // Screens do not wait for it.
            (None, DeviceKind::Software) => f64::INFINITY,
            (None, DeviceKind::Discrete) => 400e9,
            (None, _) => 50e9,
        }
    }

    /// How many of `all` columns of so many multiply-adds each one dispatch is to compute, as [`columns_within`].
    pub(super) fn columns_of(&self, multiply_adds: f64, all: u32) -> u32 {
        columns_within(self.at_once() / multiply_adds.max(1.0), all)
    }
}

/// How many of `all` columns one dispatch is to compute that may compute `most`: all, or a multiple of [`FEWEST_COLUMNS`].
pub(super) fn columns_within(most: f64, all: u32) -> u32 {
    match most as u32 {
        most if most >= all => all,
        most => (most / FEWEST_COLUMNS * FEWEST_COLUMNS).max(FEWEST_COLUMNS),
    }
}

/// The launches of some dispatches for a run, of at most so many multiply-adds each.
pub(super) fn launches<'a>(at_once: f64, dispatches: &'a [Dispatch], sizes: &Sizes) -> Vec<Launch<'a>> {
    let mut launches = Vec::with_capacity(dispatches.len());
    for dispatch in dispatches {
        let whole = Launch { dispatch, slot: dispatch.slot, grid: dispatch.grid, divided: false };
        let Some(heads) = &dispatch.heads else {
            launches.push(whole);
            continue;
        };
        let most = ((at_once / sizes.work(heads).max(1.0)) as u32).clamp(1, heads.count);
        for first in (0..heads.count).step_by(most as usize) {
            let grid = Grid { x: most.min(heads.count - first) * heads.groups, ..dispatch.grid };
            let slot = dispatch.slot + first * SLOT as u32;
            launches.push(Launch { slot, grid, divided: most < heads.count, ..whole });
        }
    }
    launches
}

/// Cuts launches into submissions of at most `most`, few of which were divided.
pub(super) fn submissions<'a, 'b>(launches: &'b [Launch<'a>], most: usize) -> Vec<&'b [Launch<'a>]> {
    let (mut parts, mut rest) = (Vec::new(), launches);
    while !rest.is_empty() {
        let mut divided = (0..rest.len()).filter(|i| rest[*i].divided);
        let end = divided.nth(DIVIDED_AT_ONCE).unwrap_or(rest.len());
        let (part, behind) = rest.split_at(end.min(most.max(1)));
        parts.push(part);
        rest = behind;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::record::Depth;

    /// A dispatch of nine heads with three workgroups each, between two others.
    fn dispatches(window: u32) -> [Dispatch; 3] {
        let plain = |slot, heads| Dispatch {
            op: "",
            pipeline: 0,
            group: 0,
            slot,
            grid: Grid { x: 27, z: Depth::Rows(Rows::Tokens, 1) },
            weight_bytes: 0,
            floats: 0,
            heads,
        };
        let heads = Heads { count: 9, groups: 3, multiply_adds: 100, window };
        [plain(0, None), plain(SLOT as u32, Some(heads)), plain(10 * SLOT as u32, None)]
    }

    /// First description and workgroups of the parts where so many multiply-adds may be done at once.
    fn parts(at_once: f64, window: u32) -> Vec<(u32, u32)> {
        let sizes = Sizes { tokens: 2, outputs: 1, seen: vec![1_000, 2_000] };
        let dispatches = dispatches(window);
        let launches = launches(at_once, &dispatches, &sizes);
        let inner = &launches[1..launches.len() - 1];
        assert_eq!(inner.iter().all(|launch| launch.divided), inner.len() > 1);
        inner.iter().map(|launch| (launch.slot / SLOT as u32, launch.grid.x)).collect()
    }

    #[test]
    fn heads_are_divided_by_what_their_rows_see() {
        // A head does 100 · 3,000.
        assert_eq!(parts(9.0 * 300_000.5, 0), [(1, 27)]);
        assert_eq!(parts(8.9 * 300_000.0, 0), [(1, 24), (9, 3)]);
        assert_eq!(parts(4.0 * 300_001.0, 0), [(1, 12), (5, 12), (9, 3)]);
        assert_eq!(parts(1.0, 0), (1..10).map(|first| (first, 3)).collect::<Vec<_>>());
        // In a window of 500 it does 100 · 1,000.
        assert_eq!(parts(8.9 * 100_000.0, 500), [(1, 24), (9, 3)]);
        assert_eq!(parts(8.9 * 300_000.0, 500), [(1, 27)]);
    }

    #[test]
    fn few_parts_are_submitted_together() {
        let dispatches = dispatches(0);
        let launch = |divided| Launch { dispatch: &dispatches[0], slot: 0, grid: dispatches[0].grid, divided };
        let lengths = |pattern: &str, most| -> Vec<usize> {
            let launches: Vec<_> = pattern.chars().map(|c| launch(c == 'd')).collect();
            submissions(&launches, most).into_iter().map(<[_]>::len).collect()
        };
        assert_eq!(lengths("..........", 4), [4, 4, 2]);
        assert_eq!(lengths(".d.dddddddddd.", 100), [6, 4, 4]);
        assert_eq!(lengths("dddddd", 3), [3, 3]);
        assert!(lengths("", 3).is_empty());
    }
}
