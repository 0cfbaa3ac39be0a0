//! The first process of a container that is held, which somebody may kill meanwhile: then none of the pod may be let go.

use procfs::process::Process;
use serde::{Deserialize, Serialize};
use transship_sandbox::read_proc;

use crate::error::{Error, Result};

/// The bit of SIGKILL in the masks of `/proc/PID/status`.
const KILL: u64 = 1 << (nix::libc::SIGKILL - 1);

/// A process that is not another one that has its id now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldProcess {
    pid: i32,
    /// As in `/proc/PID/stat`.
    start: u64,
}

impl HeldProcess {
    /// A process that lives, and that started at this moment, in clock ticks since boot.
    ///
    /// # Errors
    /// It has ended.
    pub(super) fn of(pid: i32, start: u64) -> Result<Self> {
        let this = Self { pid, start };
        match this.lives() {
            true => Ok(this),
            false => Err(Error::failed(format!(
                "the process {pid} of a container has ended while it was held"
            ))),
        }
    }

    /// Whether it is there, and will be when it is let go: a signal that ends it waits as long as a freezer of cgroup v1
    /// has it.
    pub(super) fn lives(self) -> bool {
        let stat = Process::new(self.pid).and_then(|process| process.stat());
        let status = read_proc(format!("/proc/{}/status", self.pid));
        let (Ok(stat), Ok(status)) = (stat, status) else {
            return false;
        };
        stat.starttime == self.start && !matches!(stat.state, 'Z' | 'X') && !is_killed(&status)
    }
}

/// Whether SIGKILL is pending, for the thread or for all of them.
fn is_killed(status: &str) -> bool {
    let mut lines = status.lines();
    lines.any(|line| {
        let pending = line.strip_prefix("SigPnd:");
        let pending = pending.or_else(|| line.strip_prefix("ShdPnd:"));
        let pending = pending.map(|mask| u64::from_str_radix(mask.trim(), 16));
        matches!(pending, Some(Ok(mask)) if mask & KILL != 0)
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_signal_that_waits_is_seen() {
        let status = "Name:\tx\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000100\n";
        assert!(is_killed(status));
        assert!(!is_killed(&status.replace('1', "2")));
        assert!(!is_killed("SigBlk:\t0000000000000100\n"));
    }

    #[test]
    fn who_has_ended_is_seen() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id().cast_signed();
        let start = Process::new(pid).unwrap().stat().unwrap().starttime;
        let held = HeldProcess::of(pid, start).unwrap();
        assert!(held.lives());
        let other = HeldProcess {
            start: held.start + 1,
            ..held
        };
        assert!(!other.lives());
        child.kill().unwrap();
        // Nobody has waited for it.
        while held.lives() {
            std::thread::yield_now();
        }
        assert!(HeldProcess::of(pid, start).is_err());
        child.wait().unwrap();
        assert!(!held.lives());
    }
}
