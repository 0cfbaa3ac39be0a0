//! `kill ID SIGNAL` of a held restore: its end, before it executes anything.
//!
//! runc (1.1.5 to 1.3.6) sends SIGKILL to the first process alone where the container has a pid namespace of
//! its own, and thaws the freezer of cgroup v1: the other processes would run until the kernel takes the
//! namespace down.

use super::bundle::Phase;
use super::{Front, FrontError, Outcome};
use crate::descendants::{Process, kill_if_same};

impl Front<'_> {
    pub(super) fn kill(&self, id: &str, signal: &str) -> Result<Option<Outcome>, FrontError> {
        if !matches!(signal, "9" | "KILL" | "SIGKILL") {
            return Ok(None);
        }
        let Some(bundle) = self.bundle_of(id) else {
            return Ok(None);
        };
        match bundle.marker()? {
            Some(marker) if matches!(marker.phase, Phase::Held | Phase::Awaiting) => {
                kill_if_same(marker.pid, marker.start_time);
                Ok(Some(Outcome::Exit(0)))
            }
            _ => Ok(None),
        }
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
