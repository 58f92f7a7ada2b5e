//! A small writer of line charts in SVG: axes with round numbers, curves, points. Colours are CSS variables of the page.

use std::fmt::{Result, Write};

/// Points of a curve that are drawn; more would not be seen.
const MOST_POINTS: usize = 1200;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 26.0;

/// How a series is drawn.
#[derive(Clone, Copy, PartialEq)]
pub enum Style {
    /// A thin, pale line: the values as they are. May leave the picture.
    Faint,
    /// A strong line.
    Line,
    /// A thin line with a point at each value, which names it when pointed at.
    Dots,
}

/// Values over steps.
#[derive(Clone, Copy)]
pub struct Series<'a> {
    /// The name of a CSS variable.
    pub color: &'static str,
    /// How it is drawn.
    pub style: Style,
    /// Steps and values, by step; values that are not finite are left out.
    pub points: &'a [(f64, f64)],
}

/// A chart.
#[derive(Clone, Copy)]
pub struct Chart<'a> {
    /// What it shows, for those who cannot see it.
    pub label: &'a str,
    /// Size in units of the page at full width.
    pub width: f64,
    /// See `width`.
    pub height: f64,
    /// Whether the vertical axis begins at 0.
    pub from_zero: bool,
}

impl Chart<'_> {
    /// Draws the series, the last on top.
    pub fn draw(&self, out: &mut String, series: &[Series<'_>]) -> Result {
        let Chart { label, width, height, .. } = *self;
        writeln!(
            out,
            "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{label}\" xmlns=\"http://www.w3.org/2000/svg\">"
        )?;
        let (low, high) = self.range(series);
        let steps = series.iter().flat_map(|series| finite(series.points)).map(|(step, _)| step);
        let (first, last) = steps.fold((f64::MAX, f64::MIN), |(a, b), step| (a.min(step), b.max(step)));
        if first > last {
            writeln!(
                out,
                "<text class=\"axis\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">no steps yet</text>\n</svg>",
                width / 2.0,
                height / 2.0
            )?;
            return Ok(());
        }
        let right = if last > first { last } else { first + 1.0 };
        let (plot_width, plot_height) = (width - LEFT - RIGHT, height - TOP - BOTTOM);
        let x = |step: f64| LEFT + (step - first) / (right - first) * plot_width;
        let y = |value: f64| TOP + (high - value) / (high - low) * plot_height;
        for tick in ticks(low, high, (plot_height / 55.0) as usize) {
            let at = y(tick);
            writeln!(
                out,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/><text class=\"axis\" \
                 x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                width - RIGHT,
                LEFT - 8.0,
                at + 4.0,
                short(tick)
            )?;
        }
        for tick in ticks(first, right, (plot_width / 110.0) as usize).into_iter().filter(|tick| tick.fract() == 0.0) {
            writeln!(
                out,
                "<text class=\"axis\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{tick}</text>",
                x(tick),
                height - 6.0
            )?;
        }
        // Nested, so that what leaves the plot is cut off without names for clip paths.
        writeln!(
            out,
            "<svg x=\"0\" y=\"{TOP}\" width=\"{width}\" height=\"{plot_height}\" style=\"overflow: hidden\">"
        )?;
        for series in series.iter().filter(|series| series.style == Style::Faint) {
            curve(out, series, x, |value| y(value) - TOP)?;
        }
        out.push_str("</svg>\n");
        for series in series.iter().filter(|series| series.style != Style::Faint) {
            curve(out, series, x, |value| y(value).clamp(TOP, TOP + plot_height))?;
            if series.style == Style::Dots {
                for (step, value) in thin(series.points) {
                    writeln!(
                        out,
                        "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"var(--card)\" stroke=\"var({})\" \
                         stroke-width=\"2\"><title>step {step}: {value:.4}</title></circle>",
                        x(step),
                        y(value).clamp(TOP, TOP + plot_height),
                        series.color
                    )?;
                }
            }
        }
        out.push_str("</svg>\n");
        Ok(())
    }

    /// The values shown: all of the strong series, and of the pale ones all but the outermost hundredths.
    fn range(&self, series: &[Series<'_>]) -> (f64, f64) {
        let (mut low, mut high) = (f64::MAX, f64::MIN);
        for series in series {
            let mut values: Vec<f64> = finite(series.points).map(|(_, value)| value).collect();
            if values.is_empty() {
                continue;
            }
            values.sort_by(f64::total_cmp);
            let out = if series.style == Style::Faint { values.len() / 100 } else { 0 };
            (low, high) = (low.min(values[out]), high.max(values[values.len() - 1 - out]));
        }
        if low > high {
            return (0.0, 1.0);
        }
        if self.from_zero {
            low = low.min(0.0);
        }
        let margin = if high > low { 0.06 * (high - low) } else { 0.1 * high.abs().max(1e-9) };
        if self.from_zero && low == 0.0 { (0.0, high + margin) } else { (low - margin, high + margin) }
    }
}

fn curve(out: &mut String, series: &Series<'_>, x: impl Fn(f64) -> f64, y: impl Fn(f64) -> f64) -> Result {
    let points = thin(series.points);
    if points.is_empty() {
        return Ok(());
    }
    let (thickness, opacity) = match series.style {
        Style::Faint => (1.2, 0.38),
        Style::Line => (2.4, 1.0),
        Style::Dots => (1.6, 1.0),
    };
    write!(
        out,
        "<polyline class=\"curve\" stroke=\"var({})\" stroke-width=\"{thickness}\" opacity=\"{opacity}\" points=\"",
        series.color
    )?;
    for (step, value) in points {
        write!(out, "{:.1},{:.1} ", x(step), y(value))?;
    }
    out.push_str("\"/>\n");
    Ok(())
}

fn finite(points: &[(f64, f64)]) -> impl Iterator<Item = (f64, f64)> {
    // Beyond this a difference of two could overflow.
    points.iter().copied().filter(|(_, value)| value.abs() < 1e150)
}

/// The points, or of each stretch of many its smallest and its largest, so that spikes stay.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let points: Vec<(f64, f64)> = finite(points).collect();
    if points.len() <= MOST_POINTS {
        return points;
    }
    let mut out = Vec::with_capacity(MOST_POINTS + 2);
    for stretch in points.chunks(points.len().div_ceil(MOST_POINTS / 2)) {
        let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let mut ends: Vec<(f64, f64)> =
            [stretch.iter().min_by(by_value), stretch.iter().max_by(by_value)].into_iter().flatten().copied().collect();
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        out.extend(ends);
    }
    out
}

/// About `count` round numbers from `low` to `high`.
fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let rough = (high - low) / count.max(2) as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|unit| unit * power).find(|step| *step >= rough * 0.999);
    let step = step.unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    (0..20).map(|index| (first + index) as f64 * step).take_while(|tick| *tick <= high + step * 1e-9).collect()
}

/// A number in few characters.
pub fn short(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 {
        "0".into()
    } else if !(1e-3..1e6).contains(&size) {
        // 0.0002 is written 2e-4.
        let text = format!("{value:.1e}");
        text.replace(".0e", "e")
    } else {
        let decimals = (3 - size.log10().floor() as i32).clamp(0, 4) as usize;
        let text = format!("{value:.decimals$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 10.0, 5), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(1.13, 3.4, 5), [1.5, 2.0, 2.5, 3.0]);
        assert_eq!(ticks(0.0, 2.1e-4, 4).len(), 3);
        assert_eq!(ticks(-1.0, 1.0, 2), [-1.0, 0.0, 1.0]);
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (2e-4, "2e-4"),
            (1.5, "1.5"),
            (0.25, "0.25"),
            (1234.0, "1234"),
            (-3.0, "-3"),
            (2.5e7, "2.5e7"),
            (100.0, "100"),
        ] {
            assert_eq!(short(value), text);
        }
    }

    #[test]
    fn thinning_keeps_spikes() {
        let points: Vec<(f64, f64)> = (0..10_000).map(|i| (f64::from(i), if i == 7777 { 9.0 } else { 1.0 })).collect();
        let thin = thin(&points);
        assert!(thin.len() <= MOST_POINTS + 2 && thin.contains(&(7777.0, 9.0)));
        assert!(thin.windows(2).all(|pair| pair[0].0 <= pair[1].0));
    }
}
