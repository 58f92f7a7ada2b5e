//! Standard output, which may be closed at any time, and numbers for people.

use kinglet_engine::tape::Timing;
use serde::Serialize;
use std::io::{self, IsTerminal, Write};

/// Writes `value` as indented JSON and a line break.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
    writeln!(out)?;
    out.flush()?;
    Ok(())
}

/// Writes `text` as it is.
pub fn text(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Writes a piece of a model's answer. To a terminal go no control characters but line breaks and tabs: a model may have
/// learnt, or been told, to write the sequences that change titles, clipboards and colours.
pub fn answer(piece: &str) -> io::Result<()> {
    if to_terminal() && piece.chars().any(is_harmful) {
        let clean: String = piece.chars().filter(|c| !is_harmful(*c)).collect();
        return text(&clean);
    }
    text(piece)
}

fn is_harmful(c: char) -> bool {
    c.is_control() && c != '\n' && c != '\t'
}

/// Whether standard output is a terminal.
pub fn to_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Whether `error` comes from a reader that went away, as `head` does.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|e| e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe))
}

/// `98.4 MB`: decimal units, as disks and networks count.
pub fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 999.95 {
            return if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

/// `134.5 M`: a count of weights.
pub fn count(n: u64) -> String {
    match n {
        0..10_000 => n.to_string(),
        10_000..1_000_000 => format!("{:.1} k", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", n as f64 / 1e6),
        _ => format!("{:.2} B", n as f64 / 1e9),
    }
}

/// Text from a file, made safe for a terminal: control characters are written as escapes, line breaks too.
pub fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escaped = c.is_control().then(|| c.escape_default());
            let plain = if c.is_control() { None } else { Some(c) };
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}

/// A table with left-aligned text and right-aligned numbers; `right` says which columns are numbers.
pub struct Table {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column headings; a heading that begins with `>` is of a column of numbers.
    pub fn new(headings: &[&str]) -> Table {
        let right = headings.iter().map(|h| h.starts_with('>')).collect();
        Table { right, rows: vec![headings.iter().map(|h| h.trim_start_matches('>').to_string()).collect()] }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The table in aligned columns.
    pub fn aligned(&self) -> String {
        let widths = self.widths();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, width), right) in row.iter().zip(&widths).zip(&self.right) {
                line.push_str(&pad(cell, *width, *right));
                line.push_str("  ");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    /// The table in Markdown.
    pub fn markdown(&self) -> String {
        let widths = self.widths();
        let mut text = String::new();
        for (i, row) in self.rows.iter().enumerate() {
            for ((cell, width), right) in row.iter().zip(&widths).zip(&self.right) {
                text.push_str("| ");
                text.push_str(&pad(cell, *width, *right));
                text.push(' ');
            }
            text.push_str("|\n");
            if i == 0 {
                for (width, right) in widths.iter().zip(&self.right) {
                    let dashes = "-".repeat(width.saturating_sub(1).max(2));
                    text.push_str(&if *right { format!("| {dashes}: ") } else { format!("| {dashes}- ") });
                }
                text.push_str("|\n");
            }
        }
        text
    }

    fn widths(&self) -> Vec<usize> {
        let width = |i: usize| self.rows.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max().unwrap_or(0);
        (0..self.right.len()).map(width).collect()
    }
}

fn pad(cell: &str, width: usize, right: bool) -> String {
    let fill = " ".repeat(width.saturating_sub(cell.chars().count()));
    if right { fill + cell } else { cell.to_string() + &fill }
}

/// The op timing table, the longest first.
pub fn timings(title: &str, mut timings: Vec<Timing>) -> String {
    timings.sort_by_key(|t| std::cmp::Reverse(t.total));
    let all: f64 = timings.iter().map(|t| t.total.as_secs_f64()).sum();
    let mut table = Table::new(&[title, ">calls", ">ms", ">share"]);
    for t in &timings {
        let seconds = t.total.as_secs_f64();
        let share = format!("{:.1} %", 100.0 * seconds / all.max(f64::MIN_POSITIVE));
        table.row(vec![t.op.into(), t.count.to_string(), format!("{:.2}", seconds * 1e3), share]);
    }
    table.aligned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(98_362_432), "98.4 MB");
        assert_eq!(bytes(999_999), "1.0 MB");
        assert_eq!(bytes(3_000_000_000_000), "3.0 TB");
        assert_eq!(count(134_515_008), "134.5 M");
        assert_eq!(count(9_999), "9999");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("a\x1b[31mé\n"), "a\\u{1b}[31mé\\n");
    }

    #[test]
    fn tables() {
        let mut t = Table::new(&["name", ">size"]);
        t.row(vec!["a".into(), "10".into()]);
        assert_eq!(t.aligned(), "name  size\na       10\n");
        assert_eq!(t.markdown(), "| name | size |\n| ---- | ---: |\n| a    |   10 |\n");
    }
}
