//! Processes that came into a container by exec do not come along: CRIU dumps the tree below the first
//! process, and theirs is the shim.

use std::collections::BTreeSet;

use procfs::process::Process;
use transship_containerd::Containerd;

use crate::error::{Error, Result};
use crate::source::SourceContainer;

/// Refuses a container with such processes, unless they may be lost.
pub(super) async fn check(
    node: &Containerd,
    container: &SourceContainer,
    may_be_lost: bool,
) -> Result<()> {
    if may_be_lost {
        return Ok(());
    }
    let processes = node.pids(container.id()).await?.into_iter();
    let processes: Vec<_> = processes.filter_map(Seen::of).collect();
    let lost = outside(&processes, container.pid.cast_signed());
    if lost.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = lost
        .iter()
        .map(|it| format!("{} ({})", it.pid, it.comm))
        .collect();
    Err(Error::refused(format!(
        "{:?} has processes that came into it by exec, which would end with it here: {}; end them, or \
         let it lose them (--allow-lost exec)",
        container.id(),
        names.join(", ")
    )))
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    pid: i32,
    parent: i32,
    comm: String,
}

impl Seen {
    /// None for one that has ended.
    fn of(pid: u32) -> Option<Self> {
        let stat = Process::new(pid.cast_signed()).ok()?.stat().ok()?;
        (stat.state != 'Z').then_some(Self {
            pid: stat.pid,
            parent: stat.ppid,
            comm: stat.comm,
        })
    }
}

/// Those that are not below `root`.
fn outside(processes: &[Seen], root: i32) -> Vec<&Seen> {
    let mut below = BTreeSet::from([root]);
    loop {
        let new = processes
            .iter()
            .filter(|it| below.contains(&it.parent) && !below.contains(&it.pid));
        let new: Vec<i32> = new.map(|it| it.pid).collect();
        if new.is_empty() {
            break;
        }
        below.extend(new);
    }
    processes
        .iter()
        .filter(|it| !below.contains(&it.pid))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_below_the_first_process_came_by_exec() {
        let seen = |pid, parent| Seen {
            pid,
            parent,
            comm: "x".into(),
        };
        let processes = [
            seen(12, 11),
            seen(10, 1),
            seen(11, 10),
            seen(20, 1),
            seen(21, 20),
        ];
        let pids: Vec<i32> = outside(&processes, 10).iter().map(|it| it.pid).collect();
        assert_eq!(pids, [20, 21]);
    }
}
