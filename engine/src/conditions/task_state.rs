//! What single threads have, and how processes were made: CRIU restores all threads of a process alike, and all
//! processes as children of fork.
//!
//! ```text
//!  /proc/PID/stat                   exit_signal 10              clone(2) with SIGUSR1 in place of SIGCHLD
//!  /proc/PID/task/TID/stat          policy 6                    SCHED_DEADLINE, whose budget CRIU does not ask for
//!  /proc/PID/task/TID/cwd, root                                 unshare(CLONE_FS) of one thread
//!  /proc/PID/task/TID/fd                                        unshare(CLONE_FILES) of one thread
//!  /proc/PID/task/TID/status        Umask: 0055                 as cwd
//!                                   Speculation_Store_Bypass: thread force mitigated     prctl(2)
//! ```
//!
//! A program goes on while it is looked at: what differs between threads counts when each of both has shown
//! the same before and after.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use transship_sandbox::{TaskStat, TaskStatus};

use super::Hit;
use super::processes::{Processes, Seen};
use super::programs::threads;

/// More descriptors of all threads than this are not looked at.
const DESCRIPTORS: usize = 1 << 20;
const SIGCHLD: i32 = 17;
/// `SCHED_OTHER`, `SCHED_FIFO`, `SCHED_RR`, `SCHED_BATCH`, `SCHED_IDLE`.
const RESTORED_POLICIES: [u32; 5] = [0, 1, 2, 3, 5];
const MITIGATIONS: [&str; 2] = ["Speculation_Store_Bypass", "SpeculationIndirectBranch"];
/// Whether the kernel mitigates for all that has a seccomp filter, which CRIU restores.
const STORE_BYPASS: &str = "/sys/devices/system/cpu/vulnerabilities/spec_store_bypass";

/// What a thread shares with the others of its process, unless it has left them.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    directory: PathBuf,
    root: PathBuf,
    umask: String,
}

pub(super) fn hits(init: u32, processes: &Processes) -> Vec<Hit> {
    let mut room = DESCRIPTORS;
    let usual = Mitigations::usual();
    let mut hits = Vec::new();
    for seen in &processes.tree {
        let signal = seen.process().and_then(|it| it.stat());
        let signal = signal.ok().and_then(|stat| stat.exit_signal);
        // The first process is no child of the container's.
        if seen.pid != init && signal.is_some_and(|signal| signal >= 0 && signal != SIGCHLD) {
            hits.push(("exit-signal", seen.called()));
        }
        let mitigated = |thread: String| {
            usual
                .are_less_than(&TaskStatus::of(thread).ok()?)
                .then_some(())
        };
        if threads(seen).any(|thread| mitigated(thread).is_some()) {
            hits.push(("speculation", seen.called()));
        }
        let policies = || threads(seen).filter_map(|thread| policy(&thread));
        if policies().any(|policy| !RESTORED_POLICIES.contains(&policy)) {
            hits.push(("scheduling", seen.called()));
        }
        let first = format!("/proc/{0}/task/{0}", seen.pid);
        if any_differs(&first, others(seen), place) {
            hits.push(("thread-directory", seen.called()));
        }
        let mut open = |thread: &str| descriptors(thread, &mut room);
        if any_differs(&first, others(seen), &mut open) {
            hits.push(("thread-descriptors", seen.called()));
        }
    }
    if room == 0 {
        hits.push(("unseen", "descriptors of threads".to_owned()));
    }
    hits
}

/// How a thread is scheduled; none of one that has ended.
fn policy(thread: &str) -> Option<u32> {
    TaskStat::of(thread).ok()?.policy()
}

/// All threads but the first.
fn others(seen: &Seen) -> impl Iterator<Item = String> {
    let first = format!("/{}", seen.pid);
    threads(seen).filter(move |thread| !thread.ends_with(&first))
}

/// Whether one of the threads differs from the first, which is read again only where one seems to.
fn any_differs<T: PartialEq>(
    first: &str,
    mut others: impl Iterator<Item = String>,
    mut look: impl FnMut(&str) -> Option<T>,
) -> bool {
    let mut before = None;
    others.any(|other| {
        if before.is_none() {
            before = look(first);
        }
        let seems = before.is_some() && look(&other).is_some_and(|it| Some(it) != before);
        seems && differ(first, &other, &mut look) == Some(true)
    })
}

/// Whether both show something else, the same each time; none where one has ended.
fn differ<T: PartialEq>(
    first: &str,
    other: &str,
    mut look: impl FnMut(&str) -> Option<T>,
) -> Option<bool> {
    let before = (look(first)?, look(other)?);
    if before.0 == before.1 {
        return Some(false);
    }
    Some((look(first)?, look(other)?) == before)
}

fn place(thread: &str) -> Option<Place> {
    let link = |name| fs::read_link(format!("{thread}/{name}")).ok();
    Some(Place {
        directory: link("cwd")?,
        root: link("root")?,
        umask: value(&TaskStatus::of(thread).ok()?, "Umask").to_owned(),
    })
}

fn descriptors(thread: &str, room: &mut usize) -> Option<BTreeSet<std::ffi::OsString>> {
    let entries = fs::read_dir(format!("{thread}/fd")).ok()?.take(*room);
    let names: BTreeSet<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    *room -= names.len();
    // What may have been cut off is no answer.
    (*room > 0).then_some(names)
}

fn value<'status>(status: &'status TaskStatus, name: &str) -> &'status str {
    status.field(name).unwrap_or_default()
}

/// What this program has itself, as all that are started on the node have, and a restored one.
struct Mitigations {
    own: TaskStatus,
    come_by_seccomp: bool,
}

impl Mitigations {
    fn usual() -> Self {
        let kernel = fs::read_to_string(STORE_BYPASS).unwrap_or_default();
        Self {
            own: TaskStatus::of("/proc/thread-self").unwrap_or_default(),
            come_by_seccomp: kernel.contains("seccomp"),
        }
    }

    fn are_less_than(&self, status: &TaskStatus) -> bool {
        let is_filtered = value(status, "Seccomp") != "0";
        if self.come_by_seccomp && is_filtered {
            return false;
        }
        MITIGATIONS.iter().any(|name| {
            let mitigation = value(status, name);
            // A filter of seccomp brings it, where the kernel is told so (spectre_v2_user=seccomp).
            let by_seccomp = is_filtered && mitigation == "conditional force disabled";
            is_asked_for(mitigation) && !by_seccomp && mitigation != value(&self.own, name)
        })
    }
}

/// Whether a thread has asked for it: the kernel's words begin otherwise where it mitigates for all or none.
fn is_asked_for(mitigation: &str) -> bool {
    mitigation.starts_with("thread ") && mitigation.ends_with("mitigated")
        || mitigation.starts_with("conditional ") && mitigation.ends_with("disabled")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_policy_is_an_ordinary_one() {
        let own = policy("/proc/thread-self");
        assert!(own.is_some_and(|policy| RESTORED_POLICIES.contains(&policy)));
    }

    #[test]
    fn what_a_thread_has_asked_for_is_told_from_what_all_have() {
        for (mitigation, asked) in [
            ("thread force mitigated", true),
            ("thread mitigated", true),
            ("conditional force disabled", true),
            ("conditional disabled", true),
            ("thread vulnerable", false),
            ("globally mitigated", false),
            ("not vulnerable", false),
            ("conditional enabled", false),
            ("always disabled", false),
            ("", false),
        ] {
            assert_eq!(is_asked_for(mitigation), asked, "{mitigation}");
        }
        let text = |seccomp: u32, it: &str| {
            TaskStatus::from(format!(
                "Seccomp:\t{seccomp}\nSpeculation_Store_Bypass:\t{it}\n"
            ))
        };
        let usual = |own: &'static str, come_by_seccomp| Mitigations {
            own: text(0, own),
            come_by_seccomp,
        };
        let mitigated = text(2, "thread force mitigated");
        assert!(usual("thread vulnerable", false).are_less_than(&mitigated));
        assert!(!usual("thread vulnerable", true).are_less_than(&mitigated));
        assert!(!usual("thread force mitigated", false).are_less_than(&mitigated));
    }

    #[test]
    fn what_changes_while_it_is_looked_at_does_not_differ() {
        let mut count = 0;
        let mut changing = |_: &str| {
            count += 1;
            Some(count)
        };
        assert_eq!(differ("a", "b", &mut changing), Some(false));
        assert_eq!(differ("a", "b", |who: &str| Some(who.len())), Some(false));
        assert_eq!(differ("a", "bb", |who: &str| Some(who.len())), Some(true));
        assert_eq!(differ("a", "b", |_| Some(())), Some(false));
        assert_eq!(differ::<()>("a", "b", |_| None), None);
    }

    #[test]
    fn the_first_thread_is_read_once() {
        let mut read = Vec::new();
        let others = || (0..9).map(|at| at.to_string());
        assert!(!any_differs("first", others(), |who| {
            read.push(who.to_owned());
            Some(())
        }));
        let of_first = read.iter().filter(|who| *who == "first").count();
        assert_eq!((of_first, read.len()), (1, 10));
        assert!(any_differs("first", others(), |who| Some(who == "7")));
        assert!(!any_differs::<()>("first", others(), |_| None));
    }

    #[test]
    fn a_program_has_none_of_them() {
        let own = std::process::id();
        assert_eq!(hits(own, &Processes::read(own, &[own])), Vec::new());
    }
}
