//! Files that an epoll waits for and that its process has closed: CRIU looks for them among the descriptors of the process
//! whose epoll it dumps.
//!
//! ```text
//!  /proc/PID/fdinfo/N  of anon_inode:[eventpoll]
//!     tfd:        4 events:       19 data:                4  pos:0 ino:1234 sdev:8
//!         the number that it was added by                    the inode of a socket or a pipe is that of its link
//! ```
//!
//! Processes that have one epoll see the same of it, and CRIU asks the first of them, parents before children. Told is of what another process of
//! the container has open for certain: what has gone from all of them the kernel takes out of the epoll.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;

use nix::libc::{EPOLLIN, EPOLLOUT};
use procfs::process::FDTarget;

use super::Hit;
use super::processes::{Processes, Seen};

/// Bits of the link in `/proc/PID/fd`: what the descriptor was opened for.
const READABLE: u32 = 0o400;
const WRITABLE: u32 = 0o200;

/// What an epoll waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Target {
    /// The number that it was added by.
    number: i32,
    inode: u64,
    events: u32,
}

/// A socket or a pipe: of others the number does not tell one from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Open {
    number: i32,
    inode: u64,
    /// What an end of a pipe is for; a socket has one end.
    mode: u32,
}

pub(super) fn hits(processes: &Processes) -> Vec<Hit> {
    let mut epolls: BTreeMap<BTreeSet<Target>, Vec<&Seen>> = BTreeMap::new();
    for (seen, number, target) in processes.descriptors() {
        let FDTarget::AnonInode(kind) = target else {
            continue;
        };
        let information = || fs::read_to_string(format!("/proc/{}/fdinfo/{number}", seen.pid));
        // One that was closed meanwhile is none.
        if kind == "[eventpoll]"
            && let Ok(information) = information()
        {
            let owners = epolls.entry(targets(&information)).or_default();
            owners.push(seen);
        }
    }
    if epolls.is_empty() {
        return Vec::new();
    }
    let open: BTreeMap<u32, Vec<Open>> = { processes.tree.iter() }
        .map(|seen| (seen.pid, opened(seen)))
        .collect();
    let mut hits = Vec::new();
    for (targets, owners) in epolls {
        let owners = first_of(&owners, processes);
        let has = |target: &Target| {
            let mut of_owners = owners
                .iter()
                .filter_map(|seen| open.get(&seen.pid))
                .flatten();
            of_owners.any(|open| open.may_be(target))
        };
        let is_elsewhere = |target: &Target| {
            let mut of_all = open.values().flatten();
            of_all.any(|open| open.may_be(target))
        };
        if targets
            .iter()
            .any(|target| !has(target) && is_elsewhere(target))
        {
            hits.extend(owners.first().map(|seen| ("epoll-target", seen.called())));
        }
    }
    hits
}

/// Those that no other one of them is above.
fn first_of<'s>(owners: &[&'s Seen], processes: &Processes) -> Vec<&'s Seen> {
    let pids: BTreeSet<u32> = owners.iter().map(|seen| seen.pid).collect();
    let parents: BTreeMap<u32, u32> = { processes.tree.iter() }
        .map(|seen| (seen.pid, seen.parent()))
        .collect();
    let is_below = |seen: &&&Seen| {
        // A chain is no longer than there are processes.
        let above = std::iter::successors(parents.get(&seen.pid), |pid| parents.get(pid));
        above.take(parents.len()).any(|pid| pids.contains(pid))
    };
    let first = owners.iter().filter(|seen| !is_below(seen));
    first.copied().collect()
}

impl Open {
    /// Whether an epoll may wait for this: who waits for input waits for the end of a pipe that can be read.
    fn may_be(&self, target: &Target) -> bool {
        let waits_for = |event: i32| target.events & event.cast_unsigned() != 0;
        let fits = match (waits_for(EPOLLIN), waits_for(EPOLLOUT)) {
            (true, _) => self.mode & READABLE != 0,
            (false, true) => self.mode & WRITABLE != 0,
            (false, false) => true,
        };
        self.inode == target.inode && (fits || self.number == target.number)
    }
}

fn targets(information: &str) -> BTreeSet<Target> {
    let lines = information.lines().filter(|line| line.starts_with("tfd:"));
    lines
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let number = words.nth(1)?.parse().ok()?;
            let events = u32::from_str_radix(words.nth(1)?, 16).ok()?;
            let inode = words.find_map(|word| word.strip_prefix("ino:"))?;
            Some(Target {
                number,
                inode: u64::from_str_radix(inode, 16).ok()?,
                events,
            })
        })
        .collect()
}

fn opened(seen: &Seen) -> Vec<Open> {
    let descriptors = seen.descriptors.iter();
    descriptors
        .filter_map(|(number, target)| {
            let (inode, mode) = match target {
                FDTarget::Socket(inode) => (*inode, READABLE | WRITABLE),
                FDTarget::Pipe(inode) => {
                    let link = fs::symlink_metadata(seen.descriptor(*number)).ok()?;
                    (*inode, link.mode())
                }
                _ => return None,
            };
            let number = *number;
            Some(Open {
                number,
                inode,
                mode,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_epoll_waits_for_is_read() {
        let information = "pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t1040\n\
            tfd:        4 events:       19 data:                4  pos:0 ino:4d2 sdev:8\n\
            tfd:       17 events: 80000004 data: ffffffffffffffff  pos:0 ino:10 sdev:e\n";
        let read = Target {
            number: 4,
            inode: 1234,
            events: 0x19,
        };
        let written = Target {
            number: 17,
            inode: 16,
            events: 0x8000_0004,
        };
        assert_eq!(targets(information), [read, written].into());
        assert!(targets("pos:\t0\n").is_empty());
        // The other end of the pipe is another file, but where it has the number.
        let end = |number, inode, mode| Open {
            number,
            inode,
            mode,
        };
        assert!(end(9, 1234, 0o500).may_be(&read) && !end(9, 1234, 0o300).may_be(&read));
        assert!(end(4, 1234, 0o300).may_be(&read) && !end(4, 1235, 0o500).may_be(&read));
        assert!(end(9, 16, 0o300).may_be(&written) && !end(9, 16, 0o500).may_be(&written));
    }
}
