//! Sessions whose leader is not among what CRIU dumps: what somebody outside has put into the container.
//!
//! ```text
//!  /proc/PID/stat      session 4711, tty_nr 34816     a leader outside, and its terminal
//!  /proc/PID/status    NSsid: 4711  0                 a leader that the container has no number for
//! ```
//!
//! A leader that has ended is none to CRIU: it makes another one.

use std::collections::BTreeSet;

use super::processes::{Processes, Seen};
use super::{Hit, Subject};

pub(super) fn hits(subject: &Subject, processes: &Processes) -> Vec<Hit> {
    let tree: BTreeSet<i32> = { processes.tree.iter() }
        .map(|seen| seen.status.pid)
        .collect();
    let is_outside = |seen: &&Seen| {
        // One that has ended is in none.
        let stat = seen.process().and_then(|it| it.stat()).ok();
        stat.is_some_and(|stat| {
            let inner = seen.status.nssid.as_ref().and_then(|ids| ids.last());
            let leader_is_outside = !tree.contains(&stat.session);
            // CRIU takes none of a process that has ended and that nobody has waited for.
            let holds_terminal = stat.tty_nr != 0 && stat.state != 'Z' && !subject.criu.shell_job;
            inner == Some(&0) || leader_is_outside && holds_terminal
        })
    };
    let outside = processes.tree.iter().filter(is_outside);
    outside
        .map(|seen| ("outside-session", seen.called()))
        .collect()
}
