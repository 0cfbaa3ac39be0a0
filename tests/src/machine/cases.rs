//! Which cases still have to run in a machine, and the verdicts so far; a kernel that panics takes
//! one case with it, not the others.
//!
//! The machine says, each on a line of its own on the port of the tests:
//!
//! ```text
//! transship-vm: begins CASE        then the output of the case
//! transship-vm: ends CASE CODE     the exit code of the test program
//! transship-vm: all done
//! ```

use std::collections::VecDeque;

/// Begins the line before the output of a case.
pub(super) const BEGINS: &str = "transship-vm: begins ";
/// Begins the line after the output of a case.
pub(super) const ENDS: &str = "transship-vm: ends ";
/// The line after the last case.
pub(super) const ALL_DONE: &str = "transship-vm: all done";

/// How often a case may end its machine before that is its verdict.
const BOOTS_PER_CASE: u32 = 2;

/// The verdict on a case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It passed.
    Passed,
    /// It failed.
    Failed,
    /// It has none: the machine ended during the case, each time; why, as far as its console tells.
    Lost(String),
}

/// The cases of one machine, over all its boots.
#[derive(Debug)]
pub(super) struct Cases {
    waiting: VecDeque<(String, u32)>,
    running: Option<(String, u32)>,
    output: Vec<String>,
    pub(super) verdicts: Vec<(String, Verdict)>,
    pub(super) are_done: bool,
}

impl Cases {
    pub(super) fn new(names: impl IntoIterator<Item = String>) -> Cases {
        Cases {
            waiting: names.into_iter().map(|name| (name, 0)).collect(),
            running: None,
            output: Vec::new(),
            verdicts: Vec::new(),
            are_done: false,
        }
    }

    /// Names of the cases that the next boot has to run, in this order.
    pub(super) fn waiting(&self) -> impl Iterator<Item = &str> {
        self.waiting.iter().map(|(name, _)| name.as_str())
    }

    /// Takes a line of the machine; gives what a person should see now.
    pub(super) fn take(&mut self, line: &str) -> Option<String> {
        if let Some(name) = line.strip_prefix(BEGINS) {
            let at = self.waiting.iter().position(|(other, _)| other == name);
            self.running = at.and_then(|at| self.waiting.remove(at));
            self.output.clear();
            None
        } else if let Some(end) = line.strip_prefix(ENDS) {
            let (name, _) = self.running.take()?;
            let passed = end.strip_prefix(&name).map(str::trim) == Some("0");
            let verdict = if passed {
                Verdict::Passed
            } else {
                Verdict::Failed
            };
            self.verdicts.push((name, verdict));
            Some(std::mem::take(&mut self.output).join("\n"))
        } else if line == ALL_DONE {
            self.are_done = true;
            None
        } else if self.running.is_some() {
            self.output.push(line.to_owned());
            None
        } else {
            Some(line.to_owned())
        }
    }

    /// The machine has ended, by `reason`, before all cases had: the one that ran runs once more, after
    /// the others. Gives its name and what it had said.
    pub(super) fn machine_ended(&mut self, reason: &str) -> Option<(String, String)> {
        let (name, boots) = self.running.take()?;
        let said = std::mem::take(&mut self.output).join("\n");
        if boots + 1 < BOOTS_PER_CASE {
            self.waiting.push_back((name.clone(), boots + 1));
        } else {
            let lost = Verdict::Lost(reason.to_owned());
            self.verdicts.push((name.clone(), lost));
        }
        Some((name, said))
    }

    /// Gives up: whatever has no verdict is lost, by `reason`.
    pub(super) fn give_up(mut self, reason: &str) -> Vec<(String, Verdict)> {
        let left = self.running.into_iter().chain(self.waiting);
        let lost = left.map(|(name, _)| (name, Verdict::Lost(reason.to_owned())));
        self.verdicts.extend(lost);
        self.verdicts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cases() -> Cases {
        Cases::new(["vm_a", "vm_b", "vm_c"].map(str::to_owned))
    }

    #[test]
    fn the_verdicts_of_a_whole_run() {
        let mut cases = cases();
        assert_eq!(cases.take("mounted").as_deref(), Some("mounted"));
        for (name, code, said) in [("vm_a", 0, "fine"), ("vm_b", 101, "not fine")] {
            assert_eq!(cases.take(&format!("{BEGINS}{name}")), None);
            assert_eq!(cases.take(said), None);
            assert_eq!(
                cases.take(&format!("{ENDS}{name} {code}")).as_deref(),
                Some(said)
            );
        }
        assert_eq!(cases.waiting().collect::<Vec<_>>(), ["vm_c"]);
        assert_eq!(cases.take(ALL_DONE), None);
        assert!(cases.are_done);
        let verdicts = [Verdict::Passed, Verdict::Failed];
        assert!(cases.verdicts.iter().map(|(_, it)| it).eq(&verdicts));
    }

    #[test]
    fn a_case_that_ends_its_machine_runs_once_more_after_the_others() {
        let mut cases = cases();
        for boots in 1..=2 {
            cases.take("transship-vm: begins vm_a");
            cases.take("half a line");
            let (name, said) = cases.machine_ended("Kernel panic").unwrap();
            assert_eq!((name.as_str(), said.as_str()), ("vm_a", "half a line"));
            let left: Vec<_> = cases.waiting().collect();
            let expected: &[_] = match boots {
                1 => &["vm_b", "vm_c", "vm_a"],
                _ => &["vm_b", "vm_c"],
            };
            assert_eq!(left, expected);
        }
        assert_eq!(cases.machine_ended("between two cases"), None);
        let verdicts = cases.give_up("no time");
        let lost = |reason: &str| Verdict::Lost(reason.to_owned());
        let expected = [
            ("vm_a".to_owned(), lost("Kernel panic")),
            ("vm_b".to_owned(), lost("no time")),
            ("vm_c".to_owned(), lost("no time")),
        ];
        assert_eq!(verdicts, expected);
    }
}
