//! What a person sees while it goes on: bars on a terminal, plain lines elsewhere.

use std::io::{IsTerminal, Write as _};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use transship_checkpoint::shown_text::printable;

/// A step.
const STEP: &str = "{spinner} {msg}";
/// A step that moves bytes.
const BYTES: &str = "{spinner} {msg:<24} {bar:28} {decimal_bytes:>10} of {decimal_total_bytes} \
                     {decimal_bytes_per_sec:>12}, {eta} left";

/// One line on stderr. Who reads it may have gone, with the link or the terminal, which ends nothing that is under way.
pub(crate) fn say(line: &str) {
    drop(writeln!(std::io::stderr(), "{line}"));
}

/// The current step.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    lines: bool,
}

impl Progress {
    /// Bars when stderr is a terminal, lines when it is not, nothing when `quiet`.
    pub(crate) fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if quiet || !terminal {
            ProgressBar::hidden()
        } else {
            ProgressBar::no_length()
        };
        if !quiet && terminal {
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Self {
            bar,
            lines: !quiet && !terminal,
        }
    }

    /// `style` is one of those below.
    fn show(&self, what: &str, style: &str, total: Option<u64>) {
        if self.lines {
            say(&format!("transship: {}", printable(what)));
        }
        // Rate and time left are those of this step.
        self.bar.reset();
        self.bar.set_length(total.unwrap_or(0));
        if let Ok(style) = ProgressStyle::with_template(style) {
            self.bar.set_style(style);
        }
        self.bar.set_message(printable(what));
    }
}

impl transship_engine::Progress for Progress {
    fn step(&self, what: &str) {
        self.show(what, STEP, None);
    }

    fn bytes(&self, what: &str, total: u64) {
        self.show(what, BYTES, Some(total));
    }

    fn tell(&self, line: &str) {
        let line = printable(line);
        self.bar.suspend(|| say(&format!("transship: {line}")));
    }

    fn counter(&self) -> Box<dyn FnMut(u64) + Send> {
        let bar = self.bar.clone();
        Box::new(move |bytes| bar.inc(bytes))
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_shows_rate_and_time_left() {
        for style in [STEP, BYTES] {
            assert!(ProgressStyle::with_template(style).is_ok(), "{style}");
        }
        assert!(BYTES.contains("per_sec") && BYTES.contains("{eta} left"));
        let shown = Progress::new(true);
        shown.show("dump", BYTES, Some(100));
        let mut count = transship_engine::Progress::counter(&shown);
        count(60);
        assert_eq!((shown.bar.position(), shown.bar.length()), (60, Some(100)));
        // What came before counts for nothing.
        shown.show("transfer", BYTES, Some(7));
        assert_eq!((shown.bar.position(), shown.bar.length()), (0, Some(7)));
    }
}
