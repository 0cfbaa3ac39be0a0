//! `kill ID SIGNAL` of what stands still: its end, before it executes anything.
//!
//! runc (1.1.5 to 1.3.6) sends SIGKILL to the first process alone where the container has a pid namespace of
//! its own, and thaws the freezer of cgroup v1: the other processes would run until the kernel takes the
//! namespace down. A frozen container may have a copy that runs, so all of its processes are killed while they are
//! frozen, whoever has made it. Of what is not frozen the runtime alone is asked.

use std::fs;
use std::path::PathBuf;

use rustix::process::Signal;
use serde::Deserialize;
use transship_sandbox::{KnownProcess, TaskStat};

use super::bundle::Phase;
use super::{Front, FrontError, Outcome, create_aside};
use crate::descendants::{Process, kill_if_same};
use crate::freezer::Freezer;

impl Front<'_> {
    pub(super) fn kill(&self, id: &str, signal: &str) -> Result<Option<Outcome>, FrontError> {
        if !is_kill(signal) {
            return Ok(None);
        }
        let bundle = self.bundle_of(id);
        if let Some(bundle) = &bundle {
            create_aside::end(&bundle.path("work"));
        }
        if let Some(bundle) = bundle
            && let Some(mut marker) = bundle.marker()?
        {
            if marker.stands_still() {
                // So that who deletes it knows that it has not run.
                marker.phase = Phase::Held;
                bundle.write_marker(&marker)?;
            }
            if matches!(marker.phase, Phase::Held | Phase::Awaiting) {
                kill_if_same(marker.pid, marker.start_time);
                return Ok(Some(Outcome::Exit(0)));
            }
        }
        match self.kill_frozen(id) {
            Some(Killed::Ending) => Ok(Some(Outcome::Exit(0))),
            Some(Killed::Waiting) | None => Ok(None),
        }
    }

    /// Kills all processes of a frozen container; none when it is not frozen. What fails is left to the runtime.
    pub(super) fn kill_frozen(&self, id: &str) -> Option<Killed> {
        let freezer = Freezer::at(&self.frozen_cgroup(id)?);
        let members = freezer.members().ok()?;
        for pid in &members {
            // Frozen, it makes no other, and its number is no other's.
            let known = KnownProcess::with_number(*pid).ok().flatten();
            if let Some(process) = known.and_then(|known| known.open().ok().flatten()) {
                drop(process.signal(Signal::KILL));
            }
        }
        Some(match freezer.ends_frozen() {
            true => Killed::Ending,
            false => Killed::Waiting,
        })
    }

    /// The cgroup of a container by what its runtime has written down, if all of it is frozen. The runtime itself is not
    /// asked: nothing is started for a container that is not ours.
    fn frozen_cgroup(&self, id: &str) -> Option<PathBuf> {
        let dir = self.state_dir(id)?;
        let cgroup = match fs::read(dir.join("state.json")) {
            Ok(json) => cgroup_of_runc(&json)?,
            Err(_) => {
                let first = FirstOfCrun::read(&fs::read(dir.join("status")).ok()?)?;
                let freezer = Freezer::around(&[first.pid]).ok()?;
                // Its number may have been another's.
                first.is_alive().then(|| freezer.dir().to_path_buf())?
            }
        };
        let is_frozen = Freezer::at(&cgroup).is_frozen();
        is_frozen.unwrap_or_default().then_some(cgroup)
    }

    /// Kills all processes of a container that has been restored and not been started.
    pub(super) fn kill_held(&self, id: &str) {
        let state = self.env.runtime.state(self.globals.root.as_deref(), id);
        let pid = state.ok().flatten().map_or(0, |state| state.pid);
        if pid > 0
            && let Ok(process) = Process::open(pid)
        {
            // What cannot be listed is left to the runtime.
            drop(process.kill_tree());
        }
    }
}

/// What becomes of processes that were killed while they were frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Killed {
    /// They end as they are (cgroup v2).
    Ending,
    /// They end when the freezer lets them go, which the runtime does (cgroup v1).
    Waiting,
}

/// As runc reads it: with `SIG` or without, in whatever case.
fn is_kill(signal: &str) -> bool {
    let name = signal.to_ascii_uppercase();
    matches!(name.strip_prefix("SIG").unwrap_or(&name), "KILL" | "9")
}

/// runc's `state.json`: a directory for each controller of v1, and one without a name for v2.
fn cgroup_of_runc(json: &[u8]) -> Option<PathBuf> {
    #[derive(Deserialize)]
    struct State {
        cgroup_paths: std::collections::BTreeMap<String, PathBuf>,
    }
    let mut paths = serde_json::from_slice::<State>(json).ok()?.cgroup_paths;
    { paths.remove("freezer") }
        .or_else(|| paths.remove(""))
        .filter(|dir| dir.is_absolute())
}

/// The first process of a container in crun's `status`.
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct FirstOfCrun {
    pid: i32,
    /// An older crun does not write it.
    process_start_time: Option<u64>,
}

impl FirstOfCrun {
    fn read(json: &[u8]) -> Option<Self> {
        serde_json::from_slice::<Self>(json)
            .ok()
            .filter(|it| it.pid > 0)
    }

    fn is_alive(&self) -> bool {
        let stat = TaskStat::of(format!("/proc/{}", self.pid)).ok();
        let started = stat.and_then(|stat| stat.start_time());
        self.process_start_time
            .is_none_or(|time| started == Some(time))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn each_way_to_say_kill_is_known() {
        for signal in ["9", "KILL", "SIGKILL", "kill", "SigKill"] {
            assert!(is_kill(signal), "{signal}");
        }
        for signal in ["15", "TERM", "SIGTERM", "19", ""] {
            assert!(!is_kill(signal), "{signal}");
        }
    }

    #[test]
    fn the_cgroup_is_found_where_its_runtime_keeps_it() {
        let one = br#"{"cgroup_paths":{"cpu":"/cpu/a","freezer":"/freezer/a"}}"#;
        assert_eq!(
            cgroup_of_runc(one).as_deref(),
            Some(Path::new("/freezer/a"))
        );
        let two = br#"{"cgroup_paths":{"":"/sys/fs/cgroup/a"}}"#;
        let two = cgroup_of_runc(two);
        assert_eq!(two.as_deref(), Some(Path::new("/sys/fs/cgroup/a")));
        assert_eq!(cgroup_of_runc(br#"{"cgroup_paths":{}}"#), None);
        assert_eq!(cgroup_of_runc(b"{}"), None);
    }

    #[test]
    fn a_number_of_crun_is_that_of_its_process() {
        let pid = std::process::id().cast_signed();
        let start_time = TaskStat::of("/proc/self").unwrap().start_time().unwrap();
        let read = |pid: i32, time: u64| {
            let status = format!(r#"{{"pid":{pid},"process-start-time":{time},"bundle":"/b"}}"#);
            FirstOfCrun::read(status.as_bytes())
        };
        assert!(read(pid, start_time).unwrap().is_alive());
        assert!(!read(pid, start_time + 1).unwrap().is_alive());
        assert_eq!(read(0, start_time), None);
        assert_eq!(FirstOfCrun::read(b"{}"), None);
        let older = FirstOfCrun::read(format!(r#"{{"pid":{pid}}}"#).as_bytes());
        assert!(older.unwrap().is_alive());
    }
}
