//! The page a person looks at: one HTML file with everything in it, no script, nothing fetched.
//!
//! On top what matters (the last loss, the best validation, time and speed), then the loss curves, then learning rate and
//! gradient norm, then the settings. It follows the reader's light or dark mode and prints well. It is written from
//! `metrics.jsonl`'s lines, so it can be made again at any time, and while a run goes on.

mod svg;

use std::fmt::Write as _;
use std::path::Path;

use kinglet_engine::file;
use svg::{Chart, Series, Style, short};

use crate::config::TrainConfig;
use crate::metrics::StepMetrics;
use crate::{Error, Result};

/// What a report shows.
#[derive(Clone, Copy, Debug)]
pub struct Report<'a> {
    /// The heading: model and data.
    pub title: &'a str,
    /// What else is worth a line: pairs of name and value, such as the number of examples or the state of the run.
    pub facts: &'a [(String, String)],
    /// The settings.
    pub config: &'a TrainConfig,
    /// The steps so far, in order.
    pub metrics: &'a [StepMetrics],
    /// What happened on the way: rollbacks, resumptions, why it ended.
    pub notes: &'a [String],
}

const STYLE: &str = "
:root { color-scheme: light dark; --page: #fbfbf9; --card: #ffffff; --ink: #1d2125; --soft: #667079; --line: #e5e6e2;
  --loss: #2a6fdb; --val: #d9622b; --rate: #3c8f63; --norm: #8a5cc2; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e7e9ea; --soft: #98a1a9; --line: #2e343a;
  --loss: #6ea8ff; --val: #ff9a62; --rate: #6cc795; --norm: #bb94ee; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1000px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; line-height: 1.2; letter-spacing: -0.01em; margin: 0 0 24px; overflow-wrap: anywhere; }
h2 { font-size: 14px; font-weight: 600; margin: 0 0 4px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-bottom: 12px; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 22px; font-weight: 600; letter-spacing: -0.01em; }
.tile span, .key, figcaption, .axis, td:first-child { color: var(--soft); }
.tile span { font-size: 13px; }
.card { padding: 16px 18px; margin: 0 0 12px; break-inside: avoid; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 12px; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; margin-bottom: 6px; }
.key i { display: inline-block; width: 18px; height: 0; border-top: 2.5px solid; vertical-align: middle; margin-right: 6px; }
.key i.raw { opacity: 0.4; border-top-width: 1.5px; }
.key i.dot { width: 9px; height: 9px; border: 2px solid; border-radius: 50%; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.axis { font-size: 12px; fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; }
.curve { fill: none; stroke-linejoin: round; stroke-linecap: round; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
td { padding: 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
td:first-child { width: 40%; padding-right: 12px; }
tr:last-child td { border-bottom: 0; }
ul { margin: 0; padding-left: 18px; }
@media print { body { background: none; } main { padding: 0; } }
";

impl Report<'_> {
    /// Writes the page to `path`, replacing it whole.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        file::replace(path, self.html()?.as_bytes())
    }

    /// The page.
    ///
    /// # Errors
    /// None in practice.
    pub fn html(&self) -> Result<String> {
        let mut out = String::with_capacity(1 << 16);
        self.page(&mut out).map_err(|error| Error::argument(format!("the report: {error}")))?;
        Ok(out)
    }

    fn page(&self, out: &mut String) -> std::fmt::Result {
        let title = escape(self.title);
        write!(
            out,
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
             content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n\
             <body>\n<main>\n<h1>{title}</h1>\n"
        )?;
        self.tiles(out)?;
        let column = |value: fn(&StepMetrics) -> f64| -> Vec<(f64, f64)> {
            self.metrics.iter().map(|line| (line.step as f64, value(line))).collect()
        };
        let loss = column(|line| line.loss);
        let validation: Vec<(f64, f64)> =
            self.metrics.iter().filter_map(|line| Some((line.step as f64, line.val_loss?))).collect();
        out.push_str("<section class=\"card\">\n<h2>Loss</h2>\n");
        let mut key = vec![("--loss", "raw", "training, each step"), ("--loss", "", "training, smoothed")];
        if !validation.is_empty() {
            key.push(("--val", "dot", "validation"));
        }
        legend(out, &key)?;
        let series = [
            Series { color: "--loss", style: Style::Faint, points: &loss },
            Series { color: "--loss", style: Style::Line, points: &smooth(&loss) },
            Series { color: "--val", style: Style::Dots, points: &validation },
        ];
        Chart { label: "loss over steps", width: 920.0, height: 340.0, from_zero: false }.draw(out, &series)?;
        out.push_str("</section>\n<div class=\"two\">\n");
        let small = |out: &mut String, name: &str, color: &'static str, faint: bool, points: &[(f64, f64)]| {
            write!(out, "<section class=\"card\">\n<h2>{name}</h2>\n")?;
            let smoothed = smooth(points);
            let style = if faint { Style::Faint } else { Style::Line };
            let mut series = vec![Series { color, style, points }];
            if faint {
                series.push(Series { color, style: Style::Line, points: &smoothed });
            }
            Chart { label: name, width: 440.0, height: 220.0, from_zero: true }.draw(out, &series)?;
            out.push_str("</section>\n");
            Ok::<_, std::fmt::Error>(())
        };
        small(out, "Learning rate", "--rate", false, &column(|line| line.lr))?;
        small(out, "Gradient norm", "--norm", true, &column(|line| line.grad_norm))?;
        let margins: Vec<(f64, f64)> =
            self.metrics.iter().filter_map(|line| Some((line.step as f64, line.reward_margin?))).collect();
        let accuracy: Vec<(f64, f64)> =
            self.metrics.iter().filter_map(|line| Some((line.step as f64, line.reward_accuracy?))).collect();
        if !margins.is_empty() {
            small(out, "Reward margin", "--val", true, &margins)?;
            small(out, "Reward accuracy", "--rate", true, &accuracy)?;
        }
        out.push_str("</div>\n");
        if !self.notes.is_empty() {
            out.push_str("<section class=\"card\">\n<h2>Notes</h2>\n<ul>\n");
            for note in self.notes {
                writeln!(out, "<li>{}</li>", escape(note))?;
            }
            out.push_str("</ul>\n</section>\n");
        }
        out.push_str("<div class=\"two\">\n");
        let facts = self.facts.iter().map(|(name, value)| (name.clone(), value.clone()));
        table(out, "Run", facts)?;
        table(out, "Settings", settings(self.config))?;
        out.push_str("</div>\n</main>\n</body>\n</html>\n");
        Ok(())
    }

    /// The numbers on top.
    fn tiles(&self, out: &mut String) -> std::fmt::Result {
        let loss: Vec<(f64, f64)> = self.metrics.iter().map(|line| (line.step as f64, line.loss)).collect();
        let smoothed = smooth(&loss);
        let best = self.metrics.iter().filter_map(|line| Some((line.val_loss?, line.step)));
        let best = best.filter(|(loss, _)| loss.is_finite()).min_by(|a, b| a.0.total_cmp(&b.0));
        let speeds = self.metrics.iter().map(|line| line.tokens_per_second).filter(|speed| speed.is_finite());
        let mut speeds: Vec<f64> = speeds.collect();
        speeds.sort_by(f64::total_cmp);
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "–".into());
        let tiles = [
            (or_none(self.metrics.last().map(|line| line.step.to_string())), "steps".to_string()),
            (
                or_none(smoothed.last().map(|(_, loss)| format!("{loss:.3}"))),
                smoothed.first().map_or("training loss".into(), |(_, first)| format!("training loss, from {first:.3}")),
            ),
            (
                or_none(best.map(|(loss, _)| format!("{loss:.3}"))),
                best.map_or("validation loss".into(), |(_, step)| format!("best validation, step {step}")),
            ),
            (or_none(speeds.get(speeds.len() / 2).map(|speed| short(*speed))), "tokens per second (median)".into()),
        ];
        out.push_str("<div class=\"tiles\">\n");
        for (value, name) in tiles {
            writeln!(out, "<div class=\"tile\"><b>{value}</b><span>{name}</span></div>")?;
        }
        out.push_str("</div>\n");
        Ok(())
    }
}

/// The settings as names and values.
fn settings(config: &TrainConfig) -> Vec<(String, String)> {
    let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(config) else { return Vec::new() };
    let text = |value: serde_json::Value| match value {
        serde_json::Value::String(text) => text,
        serde_json::Value::Null => "–".into(),
        serde_json::Value::Array(items) => {
            let items: Vec<String> = items.iter().map(|item| item.to_string().trim_matches('"').to_owned()).collect();
            items.join(", ")
        }
        other => other.to_string(),
    };
    fields.into_iter().map(|(name, value)| (name, text(value))).collect()
}

fn table(out: &mut String, name: &str, rows: impl IntoIterator<Item = (String, String)>) -> std::fmt::Result {
    let mut rows = rows.into_iter().peekable();
    if rows.peek().is_none() {
        return Ok(());
    }
    write!(out, "<section class=\"card\">\n<h2>{name}</h2>\n<table>\n")?;
    for (name, value) in rows {
        writeln!(out, "<tr><td>{}</td><td>{}</td></tr>", escape(&name), escape(&value))?;
    }
    out.push_str("</table>\n</section>\n");
    Ok(())
}

fn legend(out: &mut String, entries: &[(&str, &str, &str)]) -> std::fmt::Result {
    out.push_str("<div class=\"key\">");
    for (color, class, name) in entries {
        write!(out, "<span><i class=\"{class}\" style=\"border-color: var({color})\"></i>{name}</span>")?;
    }
    out.push_str("</div>\n");
    Ok(())
}

/// The mean of the neighbours on both sides, nearer ones counting more, so that a curve that falls is not drawn late.
/// The neighbourhood is a twentieth of the steps, at most 50 to a side.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let points: Vec<(f64, f64)> = points.iter().copied().filter(|(_, value)| value.is_finite()).collect();
    let reach = (points.len() / 20).clamp(1, 50);
    let mean = |(center, &(step, _)): (usize, &(f64, f64))| {
        let from = center.saturating_sub(reach);
        let near = points[from..points.len().min(center + reach + 1)].iter().enumerate();
        let (sum, weight) = near.fold((0.0, 0.0), |(sum, weight), (offset, (_, value))| {
            let share = (reach + 1 - center.abs_diff(from + offset)) as f64;
            (sum + share * value, weight + share)
        });
        (step, sum / weight)
    };
    points.iter().enumerate().map(mean).collect()
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    fn run(steps: u64) -> Vec<StepMetrics> {
        let line = |step: u64| StepMetrics {
            step,
            loss: 1.2 + 2.4 * (-(step as f64) / 80.0).exp() + 0.3 * (uniform(1, step) - 0.5),
            lr: 2e-4 * (step as f64 / 20.0).min(1.0) * (1.0 - step as f64 / 400.0).max(0.0),
            grad_norm: 0.4 + 0.2 * uniform(2, step) + if step == 130 { 3.0 } else { 0.0 },
            tokens_per_second: 1000.0 + 50.0 * uniform(3, step),
            val_loss: step
                .is_multiple_of(25)
                .then_some(1.35 + 2.3 * (-(step as f64) / 80.0).exp() + step as f64 / 3000.0),
            ..StepMetrics::default()
        };
        (1..=steps).map(line).collect()
    }

    fn page(metrics: &[StepMetrics], title: &str) -> String {
        let facts = [("Base model".to_string(), "smollm2 (Q4_1)".to_string()), ("Examples".into(), "453 + 50".into())];
        let notes = ["Step 131: rolled back to step 100, the loss was NaN".to_string()];
        Report { title, facts: &facts, config: &TrainConfig::default(), metrics, notes: &notes }.html().unwrap()
    }

    #[test]
    fn shows_the_run_in_one_file() {
        let html = page(&run(400), "smollm2 on <chats> & more");
        // To look at it: KINGLET_REPORT=page.html cargo test -p kinglet-train report
        if let Some(path) = std::env::var_os("KINGLET_REPORT") {
            std::fs::write(path, &html).unwrap();
        }
        for wanted in
            ["smollm2 on &lt;chats&gt; &amp; more", "best validation, step", "rolled back", "<td>rank</td><td>8</td>"]
        {
            assert!(html.contains(wanted), "{wanted}");
        }
        for forbidden in ["http", "src=", "href=", "url(", "@import", "<script", "NaN", "inf"] {
            let found = html.replace("was NaN", "").replace("http://www.w3.org/2000/svg", "");
            assert!(!found.contains(forbidden), "{forbidden}");
        }
        // A picture and its plot area each.
        assert_eq!(html.matches("<svg").count(), 6);
        for tag in ["section", "div", "svg", "table", "g", "span"] {
            let opened = html.matches(&format!("<{tag} ")).count() + html.matches(&format!("<{tag}>")).count();
            assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
        }
    }

    #[test]
    fn any_number_of_steps_and_any_numbers_will_do() {
        for steps in [0, 1, 2, 20_000] {
            let html = page(&run(steps), "t");
            assert!(html.len() < 300_000 && html.contains("</html>"), "{steps}: {}", html.len());
        }
        let wrong = |value: f64| StepMetrics { loss: value, grad_norm: value, lr: value, ..run(1)[0].clone() };
        for value in [f64::NAN, f64::INFINITY, 0.0, 1e300, -5.0] {
            assert!(!page(&[wrong(value), wrong(value)], "t").replace("was NaN", "").contains("NaN"), "{value}");
        }
    }

    #[test]
    fn smoothing_keeps_a_constant_and_calms_noise() {
        let flat: Vec<(f64, f64)> = (0..50).map(|i| (f64::from(i), 2.0)).collect();
        assert!(smooth(&flat).iter().all(|(_, value)| (value - 2.0).abs() < 1e-12));
        let noisy: Vec<(f64, f64)> = (0..400).map(|i| (i as f64, uniform(1, i))).collect();
        assert!(smooth(&noisy).iter().all(|(_, value)| (value - 0.5).abs() < 0.25));
        // A straight line stays where it is, but for its ends.
        let line: Vec<(f64, f64)> = (0..400).map(|i| (f64::from(i), f64::from(-i))).collect();
        assert!(std::iter::zip(&smooth(&line)[20..380], &line[20..380]).all(|(a, b)| (a.1 - b.1).abs() < 1e-9));
    }
}
