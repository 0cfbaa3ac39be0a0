//! The processes of a container, read from `/proc` once for all probes.
//!
//! CRIU dumps the first process and all that descend from it, also what somebody has brought there from another cgroup.
//! What has come by exec is in the cgroup, but descends from the shim.

use std::collections::{BTreeMap, BTreeSet};

use procfs::ProcResult;
use procfs::process::{FDTarget, Process, Status};
use transship_sandbox::children;

use super::Hit;
use crate::process_files;

/// More threads of one process than this are not looked at.
pub(super) const THREADS: usize = 1 << 16;
/// More processes than this are not looked at.
const PROCESSES: usize = 8192;
/// More descriptors than this, of all processes, are not looked at.
const DESCRIPTORS: usize = 1 << 20;

/// What CRIU would dump, and what it would leave out.
#[derive(Debug, Default)]
pub(crate) struct Processes {
    /// The first process and its descendants.
    pub(crate) tree: Vec<Seen>,
    /// The others of the cgroup.
    pub(crate) others: Vec<Seen>,
    /// What there are more of than are looked at.
    beyond: Vec<&'static str>,
}

/// One process.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) pid: u32,
    pub(crate) status: Status,
    pub(crate) descriptors: Vec<(i32, FDTarget)>,
}

impl Seen {
    /// What people call it.
    pub(crate) fn called(&self) -> String {
        format!("{} ({})", self.pid, self.status.name.escape_debug())
    }

    /// The path of a descriptor's file.
    pub(crate) fn descriptor(&self, number: i32) -> String {
        format!("/proc/{}/fd/{number}", self.pid)
    }

    fn read(pid: u32) -> Option<Self> {
        let status = process_files::status(pid).ok()?;
        Some(Self {
            pid,
            status,
            descriptors: Vec::new(),
        })
    }

    /// Its directory in `/proc`, which is open until this is dropped: there may be more processes than descriptors.
    ///
    /// # Errors
    /// It has ended.
    pub(crate) fn process(&self) -> ProcResult<Process> {
        Process::new(self.pid.cast_signed())
    }

    pub(crate) fn parent(&self) -> u32 {
        self.status.ppid.cast_unsigned()
    }
}

impl Processes {
    /// Reads those that are there; one that has ended is none.
    pub(crate) fn read(init: u32, pids: &[u32]) -> Self {
        let pids = pids.iter().copied();
        let pids: BTreeSet<u32> = pids.chain(descendants(init)).collect();
        let mut beyond = Vec::new();
        if pids.len() > PROCESSES {
            beyond.push("processes");
        }
        let seen = pids.into_iter().take(PROCESSES).filter_map(Seen::read);
        let parents: BTreeMap<u32, Seen> = seen.map(|seen| (seen.pid, seen)).collect();
        let in_tree: BTreeSet<u32> = parents
            .keys()
            .copied()
            .filter(|pid| descends(*pid, init, &parents))
            .collect();
        let mut room = DESCRIPTORS;
        let mut processes = Self {
            beyond,
            ..Self::default()
        };
        for (pid, mut seen) in parents {
            if in_tree.contains(&pid) {
                let open = seen.process().and_then(|it| it.fd());
                let open = open.into_iter().flatten().flatten().take(room);
                seen.descriptors = open.map(|open| (open.fd, open.target)).collect();
                room -= seen.descriptors.len();
                processes.tree.push(seen);
            } else {
                processes.others.push(seen);
            }
        }
        if room == 0 {
            processes.beyond.push("descriptors");
        }
        processes
    }

    /// What is not looked at, because there is too much of it.
    pub(super) fn unseen(&self) -> impl Iterator<Item = Hit> {
        let many = |seen: &&Seen| seen.status.threads > THREADS as u64;
        let threads = self.tree.iter().filter(many);
        let threads = threads.map(|seen| ("unseen", format!("threads of {}", seen.called())));
        let beyond = self.beyond.iter();
        let beyond = beyond.map(|what| ("unseen", (*what).to_owned()));
        beyond.chain(threads)
    }

    /// All descriptors of the tree.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = (&Seen, i32, &FDTarget)> {
        self.tree.iter().flat_map(|seen| {
            let open = seen.descriptors.iter();
            open.map(move |(number, target)| (seen, *number, target))
        })
    }
}

/// A process and all below it, as far as they are looked at.
fn descendants(init: u32) -> Vec<u32> {
    let mut found = vec![init];
    let mut seen = 0;
    while let Some(parent) = found
        .get(seen)
        .copied()
        .filter(|_| found.len() <= PROCESSES)
    {
        seen += 1;
        // One that has ended has none.
        let below = children(parent.cast_signed()).unwrap_or_default();
        found.extend(below.into_iter().map(i32::cast_unsigned));
    }
    found
}

fn descends(pid: u32, init: u32, all: &BTreeMap<u32, Seen>) -> bool {
    let mut at = pid;
    // A chain is no longer than there are processes.
    for _ in 0..=all.len() {
        if at == init {
            return true;
        }
        match all.get(&at) {
            Some(seen) => at = seen.parent(),
            None => return false,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_descend_from_the_first_process_is_apart() {
        let spawn = || {
            std::process::Command::new("sleep")
                .arg("1000")
                .spawn()
                .unwrap()
        };
        let (mut first, mut second) = (spawn(), spawn());
        let processes = Processes::read(first.id(), &[first.id(), second.id(), u32::MAX]);
        for child in [&mut first, &mut second] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(processes.unseen().count(), 0);
        let pids = |seen: &[Seen]| seen.iter().map(|it| it.pid).collect::<Vec<_>>();
        assert_eq!(pids(&processes.tree), [first.id()]);
        assert_eq!(pids(&processes.others), [second.id()]);
    }

    #[test]
    fn more_processes_than_descriptors_are_seen() {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        let mut shell = std::process::Command::new("sh")
            .args(["-c", "for i in $(seq 60); do sleep 1000 & done; echo; wait"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0];
        std::io::Read::read_exact(shell.stdout.as_mut().unwrap(), &mut line).unwrap();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 40, hard).unwrap();
        let processes = Processes::read(shell.id(), &[]);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        for seen in processes.tree.iter().rev() {
            let pid = nix::unistd::Pid::from_raw(seen.pid.cast_signed());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        }
        shell.wait().unwrap();
        assert_eq!(processes.tree.len(), 61);
        assert!(processes.tree.iter().all(|it| !it.descriptors.is_empty()));
    }
}
