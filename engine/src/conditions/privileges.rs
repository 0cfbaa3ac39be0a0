//! What CRIU may not do to a process: read its limits, trace it; and what it does not come to.

use procfs::process::Status;
use transship_sandbox::read_proc;

use super::Hit;
use super::processes::{Processes, Seen};
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
        if status.tracerpid != 0 {
            let by = format!("{} by {}", seen.called(), status.tracerpid);
            hits.push(("traced", by));
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

/// What is in the container and no descendant of its first process.
pub(super) fn exec(processes: &Processes) -> impl Iterator<Item = Hit> {
    let others = processes.others.iter();
    let alive = others.filter(|seen| !seen.status.state.starts_with('Z'));
    alive.map(|seen| ("exec", seen.called()))
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
            .process
            .tasks()
            .is_ok_and(|tasks| tasks.flatten().count() > 1)
}
