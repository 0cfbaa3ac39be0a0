//! What CRIU may not do to a process: read its limits, trace it; and what it does not come to.

use std::time::Duration;

use procfs::process::Status;
use procfs::{Current as _, Uptime};
use transship_sandbox::{TaskStatus, read_proc};

use super::processes::{Processes, Seen};
use super::programs::threads;
use super::{Hit, MOMENTS};
use crate::process_files;

/// `CAP_SYS_RESOURCE` in a mask of capabilities.
const SYS_RESOURCE: u64 = 1 << 24;

pub(super) fn hits(processes: &Processes) -> Vec<Hit> {
    let mut hits = Vec::new();
    let may_read_limits = of_runtime(processes).is_none_or(|by| by.capeff & SYS_RESOURCE != 0);
    for seen in &processes.tree {
        let status = &seen.status;
        if !may_read_limits && !is_roots(status) {
            let (uid, gid) = (status.ruid, status.rgid);
            hits.push(("rlimit", format!("{} as {uid}:{gid}", seen.called())));
        }
        let mut tracers = threads(seen).filter_map(|thread| tracer(&thread));
        if let Some(tracer) = tracers.next() {
            hits.push(("traced", format!("{} by {tracer}", seen.called())));
        }
        if status.state.starts_with('T') && is_below_freezer(status.pid) {
            hits.push(("stopped", seen.called()));
        }
        if is_dead_leader(seen) {
            hits.push(("dead-leader", seen.called()));
        }
    }
    hits
}

/// Who traces a thread: each has a tracer of its own.
fn tracer(thread: &str) -> Option<u32> {
    let status = TaskStatus::of(thread).ok()?;
    let tracer = status.field("TracerPid")?.parse().ok()?;
    (tracer != 0).then_some(tracer)
}

/// What is in the container and no descendant of its first process.
pub(super) fn exec(processes: &Processes) -> impl Iterator<Item = Hit> {
    exec_of(processes).map(|seen| ("exec", seen.called()))
}

/// The same, but for those that may be about to end.
pub(super) fn lasting_exec(processes: &Processes) -> impl Iterator<Item = Hit> {
    lasting_exec_of(processes, MOMENTS.iter().sum())
}

fn lasting_exec_of(processes: &Processes, given: Duration) -> impl Iterator<Item = Hit> {
    let alive = exec_of(processes).filter(move |seen| age(seen).is_some_and(|age| age > given));
    alive.map(|seen| ("exec", seen.called()))
}

fn exec_of(processes: &Processes) -> impl Iterator<Item = &Seen> {
    let others = processes.others.iter();
    others.filter(|seen| !seen.status.state.starts_with('Z'))
}

/// For how long there is a process; none of one that has ended.
fn age(seen: &Seen) -> Option<Duration> {
    let stat = seen.process().and_then(|it| it.stat()).ok()?;
    let ticks = stat.starttime;
    let began = Duration::from_millis(ticks * 1000 / procfs::ticks_per_second());
    let now = Uptime::current().ok()?.uptime_duration();
    Some(now.saturating_sub(began))
}

/// Whether the freezer of cgroup v1 freezes it: `ptrace(PTRACE_SEIZE)` of a task that is stopped and frozen by that one does
/// not come back (seen on Linux 6.18 in `ptrace_attach`).
fn is_below_freezer(pid: i32) -> bool {
    let cgroups = read_proc(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    // "7:freezer:/default/web", cgroups(7).
    let mut controllers = { cgroups.lines() }.filter_map(|line| line.split(':').nth(1));
    controllers.any(|list| list.split(',').any(|controller| controller == "freezer"))
}

/// Who will run CRIU has the capabilities of the shim, which is the parent of the first process.
fn of_runtime(processes: &Processes) -> Option<Status> {
    let in_tree = |pid: i32| processes.tree.iter().any(|it| it.status.pid == pid);
    let first = processes.tree.iter().find(|it| !in_tree(it.status.ppid))?;
    process_files::status(first.parent()).ok()
}

/// Whether `prlimit` of root needs no capability (`check_prlimit_permission` of the kernel).
fn is_roots(status: &Status) -> bool {
    let users = [status.ruid, status.euid, status.suid];
    let groups = [status.rgid, status.egid, status.sgid];
    users.into_iter().chain(groups).all(|id| id == 0)
}

/// Whether the first thread has ended and others go on.
fn is_dead_leader(seen: &Seen) -> bool {
    seen.status.state.starts_with('Z')
        && seen
            .process()
            .and_then(|it| it.tasks())
            .is_ok_and(|tasks| tasks.flatten().count() > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_just_come_may_be_about_to_end() {
        let sleeps = || {
            let mut sleep = std::process::Command::new("sleep");
            sleep.arg("1000").spawn().unwrap()
        };
        let (mut first, mut probe) = (sleeps(), sleeps());
        let processes = Processes::read(first.id(), &[first.id(), probe.id()]);
        assert_eq!(exec(&processes).count(), 1);
        // The clock of /proc has ticks of 10 ms.
        std::thread::sleep(Duration::from_millis(50));
        let lasting = |given| lasting_exec_of(&processes, given).count();
        assert_eq!(lasting(Duration::from_secs(24 * 3600)), 0);
        assert_eq!(lasting(Duration::ZERO), 1);
        for child in [&mut first, &mut probe] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
