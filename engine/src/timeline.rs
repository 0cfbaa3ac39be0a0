//! What took how long, drawn for people, as a picture, and listed for programs.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use serde::Serialize;

mod svg;

/// Width of the drawn time axis, in characters.
const AXIS: usize = 36;

/// The steps of one operation.
#[derive(Debug)]
pub struct Timeline {
    began: Instant,
    steps: Vec<Step>,
    frozen: Option<(Duration, Option<Duration>)>,
}

#[derive(Debug)]
struct Step {
    name: &'static str,
    from: Duration,
    to: Duration,
    bytes: Option<u64>,
    note: String,
}

/// Writes a timeline as its [`Report`].
///
/// # Errors
/// Those of the serializer.
pub fn serialize<S: serde::Serializer>(timeline: &Timeline, to: S) -> Result<S::Ok, S::Error> {
    timeline.report().serialize(to)
}

/// A timeline for programs: seconds since the beginning, and bytes.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Seconds from the first step to the last.
    pub total_seconds: f64,
    /// Seconds in which no copy of the container ran.
    pub frozen_seconds: Option<f64>,
    /// The steps in their order.
    pub steps: Vec<StepReport>,
}

/// One step for programs.
#[derive(Debug, Serialize)]
pub struct StepReport {
    /// Its name.
    pub name: &'static str,
    /// Seconds from the beginning to its start.
    pub from_seconds: f64,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Bytes that it has moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
}

impl Timeline {
    /// The timeline of an operation that begins now.
    pub fn begin() -> Self {
        Self {
            began: Instant::now(),
            steps: Vec::new(),
            frozen: None,
        }
    }

    /// Time since the beginning.
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// A moment as time since the beginning.
    pub fn since(&self, moment: Instant) -> Duration {
        moment.saturating_duration_since(self.began)
    }

    /// Adds a step that began at `from` and ends now.
    pub fn step(&mut self, name: &'static str, from: Duration, bytes: Option<u64>) {
        let to = self.now();
        self.steps.push(Step {
            name,
            from,
            to,
            bytes,
            note: String::new(),
        });
    }

    /// Adds a step that ran beside others.
    pub fn step_of(
        &mut self,
        name: &'static str,
        from: Duration,
        length: Duration,
        bytes: Option<u64>,
    ) {
        self.steps.push(Step {
            name,
            from,
            to: from + length,
            bytes,
            note: String::new(),
        });
    }

    /// The last step ends now, not before.
    pub fn end_step(&mut self) {
        let now = self.now();
        if let Some(step) = self.steps.last_mut() {
            step.to = now;
        }
    }

    /// Puts the steps in the order in which they began; of those that began together the one that was added last comes
    /// first.
    pub fn sort(&mut self) {
        self.steps.reverse();
        self.steps.sort_by_key(|step| step.from);
    }

    /// Adds words to the last step.
    pub fn note(&mut self, note: impl Into<String>) {
        if let Some(step) = self.steps.last_mut() {
            step.note = note.into();
        }
    }

    /// From `since` on no copy of the container runs.
    pub fn freeze(&mut self, since: Instant) {
        self.frozen = Some((self.since(since), None));
    }

    /// From now on one runs.
    pub fn thaw(&mut self) {
        let now = self.now();
        if let Some((_, to)) = &mut self.frozen {
            *to = Some(now);
        }
    }

    fn frozen_for(&self) -> Option<Duration> {
        self.frozen
            .map(|(from, to)| to.unwrap_or(self.now()) - from)
    }

    fn total(&self) -> Duration {
        self.steps
            .iter()
            .map(|step| step.to)
            .max()
            .unwrap_or_default()
    }

    /// For programs.
    pub fn report(&self) -> Report {
        Report {
            total_seconds: self.total().as_secs_f64(),
            frozen_seconds: self.frozen_for().map(|time| time.as_secs_f64()),
            steps: self
                .steps
                .iter()
                .map(|step| StepReport {
                    name: step.name,
                    from_seconds: step.from.as_secs_f64(),
                    seconds: (step.to - step.from).as_secs_f64(),
                    bytes: step.bytes,
                })
                .collect(),
        }
    }

    /// The same as a picture, a whole SVG file.
    pub fn svg(&self) -> String {
        let total = self.total();
        let frozen = self.frozen.map(|(from, to)| (from, to.unwrap_or(total)));
        svg::draw(&self.steps, frozen, total)
    }

    /// The drawing: one bar a step on a common axis, the freeze below.
    pub fn draw(&self) -> String {
        let total = self.total();
        let mut text = String::new();
        for step in &self.steps {
            let bytes = step.bytes.map(human_bytes).unwrap_or_default();
            let line = format!(
                "  {:<10}{}{:>9}{:>11}  {}",
                step.name,
                bar(step.from, step.to, total, '█'),
                human_time(step.to - step.from),
                bytes,
                step.note
            );
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{}", line.trim_end());
        }
        if let Some((from, to)) = self.frozen {
            let to = to.unwrap_or(total);
            let _ = writeln!(
                text,
                "  {:<10}{}{:>9}",
                "frozen",
                bar(from, to, total, '─'),
                human_time(to - from)
            );
        }
        let _ = writeln!(
            text,
            "  {:<10}{}{:>9}",
            "total",
            " ".repeat(AXIS),
            human_time(total)
        );
        text
    }
}

fn bar(from: Duration, to: Duration, total: Duration, fill: char) -> String {
    let place = |time: Duration| {
        let share = time.as_secs_f64() / total.as_secs_f64().max(f64::EPSILON);
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of the axis is between 0 and its width"
        )]
        let place = (share.clamp(0.0, 1.0) * AXIS as f64).round() as usize;
        place
    };
    let start = place(from).min(AXIS - 1);
    let end = place(to).clamp(start + 1, AXIS);
    let filled: String = std::iter::repeat_n(fill, end - start).collect();
    format!("{}{filled}{}", " ".repeat(start), " ".repeat(AXIS - end))
}

/// Milliseconds below one second, else seconds.
pub fn human_time(time: Duration) -> String {
    match time.as_millis() {
        millis @ 0..1000 => format!("{millis} ms"),
        _ => format!("{:.2} s", time.as_secs_f64()),
    }
}

/// Bytes with a decimal prefix.
pub fn human_bytes(bytes: u64) -> String {
    indicatif::DecimalBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_in_the_order_in_which_they_began() {
        let mut timeline = Timeline::begin();
        let [zero, second] = [Duration::ZERO, Duration::from_secs(1)];
        for (name, from) in [("transfer", zero), ("restore", second), ("dump", zero)] {
            timeline.step_of(name, from, second, None);
        }
        timeline.sort();
        let names = timeline.steps.iter().map(|step| step.name);
        assert_eq!(names.collect::<Vec<_>>(), ["dump", "transfer", "restore"]);
    }

    #[test]
    fn every_step_is_seen_however_short() {
        let second = Duration::from_secs(1);
        assert_eq!(bar(second, second, second, '#').trim_start(), "#");
        assert_eq!(
            bar(Duration::ZERO, Duration::ZERO, second, '#')
                .chars()
                .next(),
            Some('#')
        );
        assert_eq!(bar(Duration::ZERO, second, second, '#'), "#".repeat(AXIS));
        let whole = bar(second, second * 2, second * 4, '#');
        assert_eq!(whole.chars().count(), AXIS);
    }

    #[test]
    fn times_are_short() {
        assert_eq!(human_time(Duration::from_millis(999)), "999 ms");
        assert_eq!(human_time(Duration::from_millis(1234)), "1.23 s");
    }
}
