//! What a person sees while it goes on: bars on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use transship_checkpoint::shown_text::printable;

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

    fn show(&self, what: &str, style: &str, total: Option<u64>) {
        if self.lines {
            eprintln!("transship: {}", printable(what));
        }
        self.bar.set_position(0);
        self.bar.set_length(total.unwrap_or(0));
        if let Ok(style) = ProgressStyle::with_template(style) {
            self.bar.set_style(style);
        }
        self.bar.set_message(printable(what));
    }
}

impl transship_engine::Progress for Progress {
    fn step(&self, what: &str) {
        self.show(what, "{spinner} {msg}", None);
    }

    fn bytes(&self, what: &str, total: u64) {
        let style = "{spinner} {msg:<24} {bar:28} {decimal_bytes:>10} of {decimal_total_bytes} {decimal_bytes_per_sec}";
        self.show(what, style, Some(total));
    }

    fn tell(&self, line: &str) {
        let line = printable(line);
        self.bar.suspend(|| eprintln!("transship: {line}"));
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
