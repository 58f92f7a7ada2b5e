//! Progress bars on standard error. Where that is no terminal, a line at the beginning is all.

use crate::output;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kinglet_models::pull::Progress;
use std::io::IsTerminal;
use std::time::Duration;

/// A bar over bytes, for pulls.
#[derive(Default)]
pub struct Download {
    bar: Option<ProgressBar>,
    named: String,
}

impl Progress for Download {
    fn begin(&mut self, what: &str, total: u64) {
        if !std::io::stderr().is_terminal() {
            if self.named != what && total > 0 {
                eprintln!("{what} ({})", output::bytes(total));
                self.named = what.into();
            }
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let style = "{msg} {bar:30} {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {eta} left";
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(style_of(style));
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        bar.set_length(total);
        bar.set_position(0);
        bar.reset_eta();
        bar.set_message(what.to_string());
    }

    fn advance(&mut self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
    }

    fn message(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.abandon();
        }
    }
}

/// A bar over `total` steps called `what`, gone when it is done.
pub fn steps(what: &'static str, total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    bar.set_style(style_of("{prefix} {bar:30} {pos}/{len}  {eta} left  {msg}"));
    bar.set_prefix(what);
    bar
}

/// A bar over the steps of a training, with room for what a step came to.
pub fn training(total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    bar.set_style(style_of("step {pos}/{len} {bar:20}  {msg}  {eta} left"));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// A line above the bar, or where none is shown, just the line.
pub fn say(bar: &ProgressBar, text: &str) {
    bar.suspend(|| eprintln!("{text}"));
}

fn style_of(template: &str) -> ProgressStyle {
    // The templates are constants of this file; the default bar is as good an answer to a slip as any.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸─")
}
