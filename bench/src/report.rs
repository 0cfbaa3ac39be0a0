//! Rows of figures, and the two files that they become.
//!
//! results.json, for programs (the table in results.md says the same):
//!
//! ```text
//! {"runs": {"front": {"machine": "2 CPUs, ...", "load_before": "0.12", "seconds": 12}, ...},
//!  "rows": [{"part": "front", "name": "...", "unit": "ms", "ours": 1.0, "peer": "runc",
//!            "peer_value": 0.9, "ratio": 0.9, "goal": "<= 3 ms", "met": true, "note": null}, ...]}
//! ```
//!
//! why.toml, written by hand: for a goal that is not reached, the reason as far as it was found.
//!
//! ```text
//! [part]
//! "name of the row" = "why"
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::statistics::median;

/// One figure beside the peer's.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Row {
    part: String,
    name: String,
    unit: String,
    /// `None`: could not be measured; the note says why.
    ours: Option<f64>,
    peer: Option<String>,
    peer_value: Option<f64>,
    /// How many times better than the peer ours is; see [`Better`].
    ratio: Option<f64>,
    goal: Option<String>,
    met: Option<bool>,
    note: Option<String>,
}

/// How a ratio is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    /// A rate: ours / the peer's.
    More,
    /// A time or a size: the peer's / ours.
    Less,
    /// A figure of ours beside another of ours: this one / the other.
    Growth,
}

impl Better {
    fn ratio(self, ours: f64, theirs: f64) -> Option<f64> {
        let ratio = match self {
            Better::More | Better::Growth => ours / theirs,
            Better::Less => theirs / ours,
        };
        Some(ratio).filter(|ratio| ratio.is_finite())
    }
}

/// What a figure is to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Goal {
    /// The ratio at least this.
    RatioAtLeast(f64),
    /// The ratio at most this.
    RatioAtMost(f64),
    /// Our figure at most this.
    AtMost(f64),
}

impl Row {
    /// A figure of ours alone.
    pub(crate) fn new(name: impl Into<String>, unit: &str, ours: f64) -> Row {
        Row {
            part: String::new(),
            name: name.into(),
            unit: unit.to_owned(),
            ours: Some(ours).filter(|ours| ours.is_finite()),
            peer: None,
            peer_value: None,
            ratio: None,
            goal: None,
            met: None,
            note: None,
        }
    }

    /// A figure that could not be taken.
    pub(crate) fn missing(name: impl Into<String>, unit: &str, why: &str) -> Row {
        Row::new(name, unit, f64::NAN).note(why)
    }

    /// The peer's figure and the ratio of the two.
    pub(crate) fn beside(mut self, peer: &str, value: f64, better: Better) -> Row {
        self.peer = Some(peer.to_owned());
        self.peer_value = Some(value).filter(|value| value.is_finite());
        self.ratio =
            (self.ours.zip(self.peer_value)).and_then(|(ours, value)| better.ratio(ours, value));
        self
    }

    /// Figures of turns that ours and a peer took by turns: the medians, and as the ratio the median of
    /// the ratios of the pairs, as what a machine does to one turn it mostly does to its neighbour.
    pub(crate) fn of_pairs(
        name: impl Into<String>,
        unit: &str,
        ours: &[f64],
        peer: &str,
        theirs: &[f64],
        better: Better,
    ) -> Row {
        let middle = |values: &[f64]| median(values).unwrap_or(f64::NAN);
        let ratios: Vec<f64> = (ours.iter().zip(theirs))
            .filter_map(|(own, other)| better.ratio(*own, *other))
            .collect();
        Row {
            ratio: median(&ratios),
            ..Row::new(name, unit, middle(ours)).beside(peer, middle(theirs), better)
        }
    }

    /// What the figure is to be. Put it last: it looks at the ratio.
    pub(crate) fn goal(mut self, goal: Goal) -> Row {
        let (text, met) = match goal {
            Goal::RatioAtLeast(least) => {
                (format!(">= {least} x"), self.ratio.map(|it| it >= least))
            }
            Goal::RatioAtMost(most) => (format!("<= {most} x"), self.ratio.map(|it| it <= most)),
            Goal::AtMost(most) => (
                format!("<= {most} {}", self.unit),
                self.ours.map(|it| it <= most),
            ),
        };
        self.goal = Some(text);
        self.met = Some(met.unwrap_or(false));
        self
    }

    /// [`Row::goal`] where there is one.
    pub(crate) fn goal_if(self, goal: Option<Goal>) -> Row {
        match goal {
            Some(goal) => self.goal(goal),
            None => self,
        }
    }

    /// Words beside the figures.
    pub(crate) fn note(mut self, note: impl Into<String>) -> Row {
        self.note = Some(note.into());
        self
    }
}

/// How one part was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Run {
    machine: String,
    /// Load average before: what else the machine was busy with.
    load_before: String,
    seconds: u64,
}

impl Run {
    /// A run that begins now.
    pub(crate) fn begin() -> Result<Run> {
        let load = fs::read_to_string("/proc/loadavg").context("cannot read /proc/loadavg")?;
        Ok(Run {
            machine: machine()?,
            load_before: load.split(' ').next().unwrap_or_default().to_owned(),
            seconds: 0,
        })
    }

    /// The same run, ended.
    pub(crate) fn took(self, time: Duration) -> Run {
        Run {
            seconds: time.as_secs(),
            ..self
        }
    }
}

/// All figures, the latest of each part.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Results {
    runs: BTreeMap<String, Run>,
    rows: Vec<Row>,
}

/// Reasons by part and name of the row.
type Reasons = BTreeMap<String, BTreeMap<String, String>>;

impl Results {
    /// The results in `dir`; none if there are no files yet.
    pub(crate) fn read(dir: &Path) -> Result<Results> {
        let path = dir.join("results.json");
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .with_context(|| format!("cannot parse {}", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Results::default()),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Puts the rows of a part in place of those of an earlier run.
    pub(crate) fn replace(&mut self, part: &str, run: Run, rows: Vec<Row>) {
        self.runs.insert(part.to_owned(), run);
        self.rows.retain(|row| row.part != part);
        self.rows.extend(rows.into_iter().map(|row| Row {
            part: part.to_owned(),
            ..row
        }));
    }

    /// Writes both files.
    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        let write = |name: &str, text: String| {
            let path = dir.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        write("results.json", serde_json::to_string_pretty(self)? + "\n")?;
        write("results.md", self.document(&reasons()?))
    }

    /// The table of one part.
    pub(crate) fn table(&self, part: &str) -> String {
        let mut text = "| what | unit | ours | peer | ratio | goal | reached |\n|---|---|--:|---|--:|---|---|\n".to_owned();
        for row in self.rows.iter().filter(|row| row.part == part) {
            let peer = match (&row.peer, row.peer_value) {
                (Some(peer), Some(value)) => format!("{} ({peer})", figure(value)),
                (Some(peer), None) => format!("? ({peer})"),
                (None, _) => String::new(),
            };
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "| {} | {} | {} | {peer} | {} | {} | {} |",
                row.name,
                row.unit,
                row.ours.map_or("?".to_owned(), figure),
                row.ratio.map_or(String::new(), figure),
                row.goal.as_deref().unwrap_or_default(),
                match row.met {
                    Some(true) => "yes",
                    Some(false) => "**no**",
                    None => "",
                },
            );
        }
        text
    }

    fn document(&self, reasons: &Reasons) -> String {
        let goals = self.rows.iter().filter(|row| row.goal.is_some()).count();
        let met = self.rows.iter().filter(|row| row.met == Some(true)).count();
        let mut text = format!(
            "# Measured\n\n\
             Written by `make bench`; the same for programs is in results.json. Ours and the peer's \
             are medians of turns\ntaken in one run on one disk; compare figures of one table only.\n\n\
             *ratio* is how many times better ours is: for rates ours / peer, for times and sizes \
             peer / ours. In rows that\nset a figure of ours beside another of ours (growth) it is \
             the first / the second. Where both took many short turns\none after the other, it is \
             the median of the ratios of neighbouring turns.\n\n\
             {met} of {goals} goals are reached.\n"
        );
        for (part, run) in &self.runs {
            let table = self.table(part);
            // Writing to a String cannot fail.
            let _ = write!(
                text,
                "\n## {part}\n\n{}; load average before {}; {} s.\n\n{table}",
                run.machine, run.load_before, run.seconds
            );
            let why = |row: &Row| {
                let found = reasons.get(part).and_then(|names| names.get(&row.name));
                match (row.met, found, &row.note) {
                    (Some(false), Some(why), Some(note)) => Some(format!("{why} ({note})")),
                    (Some(false), Some(why), None) => Some(why.clone()),
                    (Some(false), None, None) => Some("not looked into yet".to_owned()),
                    (_, _, note) => note.clone(),
                }
            };
            let notes: Vec<String> = self
                .rows
                .iter()
                .filter(|row| row.part == *part)
                .filter_map(|row| {
                    let mark = if row.met == Some(false) {
                        "not reached: "
                    } else {
                        ""
                    };
                    Some(format!("- {}: {mark}{}\n", row.name, why(row)?))
                })
                .collect();
            if !notes.is_empty() {
                text += "\n";
                text += &notes.concat();
            }
        }
        text
    }
}

fn reasons() -> Result<Reasons> {
    toml::from_str(include_str!("../why.toml")).context("cannot parse why.toml")
}

/// Three digits that say something.
fn figure(value: f64) -> String {
    match value.abs() {
        magnitude if magnitude >= 99.95 => format!("{value:.0}"),
        magnitude if magnitude >= 9.995 => format!("{value:.1}"),
        magnitude if magnitude >= 0.0995 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// What the figures depend on, as far as it can be told in a line.
fn machine() -> Result<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown model", |(_, model)| model);
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = nix::sys::utsname::uname().context("cannot ask for the kernel's version")?;
    Ok(format!(
        "{count} CPUs ({model}), Linux {}",
        kernel.release().to_string_lossy()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_above_one_is_better_than_the_peer() {
        for (better, ours, peer, ratio) in [
            (Better::More, 8.0, 2.0, 4.0),
            (Better::Less, 2.0, 8.0, 4.0),
            (Better::Growth, 2.0, 8.0, 0.25),
        ] {
            let row = Row::new("x", "s", ours).beside("peer", peer, better);
            assert_eq!(row.ratio, Some(ratio));
        }
    }

    #[test]
    fn pairs_are_compared_one_by_one() {
        // The machine became three times slower in the middle; ours took half as long all the time.
        let (ours, theirs) = ([1.0, 1.0, 3.0], [2.0, 2.0, 6.0]);
        let row = Row::of_pairs("x", "ms", &ours, "peer", &theirs, Better::Less);
        assert_eq!(row.ratio, Some(2.0));
        let (ours, theirs) = ([1.0, 3.0, 3.0], [2.0, 2.0, 6.0]);
        let row = Row::of_pairs("x", "ms", &ours, "peer", &theirs, Better::Less);
        assert_eq!(
            (row.ours, row.peer_value, row.ratio),
            (Some(3.0), Some(2.0), Some(2.0))
        );
    }

    #[test]
    fn a_goal_says_whether_it_is_met() {
        let row = || Row::new("x", "ms", 2.0).beside("peer", 8.0, Better::Less);
        for (goal, met, text) in [
            (Goal::RatioAtLeast(4.0), true, ">= 4 x"),
            (Goal::RatioAtLeast(4.1), false, ">= 4.1 x"),
            (Goal::RatioAtMost(1.2), false, "<= 1.2 x"),
            (Goal::AtMost(2.0), true, "<= 2 ms"),
        ] {
            let row = row().goal(goal);
            assert_eq!((row.met, row.goal.as_deref()), (Some(met), Some(text)));
        }
        assert_eq!(
            Row::missing("x", "s", "why").goal(Goal::AtMost(1.0)).met,
            Some(false)
        );
    }

    #[test]
    fn a_missed_goal_stands_in_the_document_with_its_reason() {
        let mut results = Results::default();
        let row = Row::new("slow", "ms", 9.0).goal(Goal::AtMost(3.0));
        results.replace("front", Run::begin().unwrap(), vec![row]);
        let reasons = toml::from_str("[front]\nslow = \"it waits\"").unwrap();
        let text = results.document(&reasons);
        assert!(text.contains("0 of 1 goals"), "{text}");
        assert!(text.contains("- slow: not reached: it waits\n"), "{text}");
        let back: Results =
            serde_json::from_str(&serde_json::to_string(&results).unwrap()).unwrap();
        assert_eq!(back.document(&reasons), text);
    }

    #[test]
    fn reasons_can_be_read() {
        reasons().unwrap();
    }

    #[test]
    fn figures_have_three_digits() {
        for (value, text) in [
            (1234.5, "1234"),
            (99.96, "100"),
            (12.34, "12.3"),
            (0.5, "0.50"),
            (0.004, "0.004"),
        ] {
            assert_eq!(figure(value), text);
        }
    }
}
