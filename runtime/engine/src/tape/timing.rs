//! Where the time of a run goes, by kind of op.

use std::time::Duration;

/// One line of the op timing table.
#[derive(Clone, Debug, Default)]
pub struct Timing {
    /// Name of the op.
    pub op: &'static str,
    /// Times it ran.
    pub count: u64,
    /// Wall time, the wait for the slowest thread included.
    pub total: Duration,
}

/// Collects a table.
#[derive(Debug, Default)]
pub(crate) struct Timings {
    pub(crate) on: bool,
    rows: Vec<Timing>,
}

impl Timings {
    pub(crate) fn add(&mut self, op: &'static str, time: Duration) {
        let at = self.rows.iter().position(|r| r.op == op).unwrap_or_else(|| {
            self.rows.push(Timing { op, ..Timing::default() });
            self.rows.len() - 1
        });
        self.rows[at].count += 1;
        self.rows[at].total += time;
    }

    pub(crate) fn take(&mut self) -> Vec<Timing> {
        std::mem::take(&mut self.rows)
    }
}
