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
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt as _;

use nix::libc::{EPOLLIN, EPOLLOUT};
use procfs::process::FDTarget;

use super::Hit;
use super::processes::{Processes, Seen};

/// More that epolls wait for than this is not looked at.
const TARGETS: usize = 1 << 18;
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

/// The sockets and pipes of all processes, by process and inode.
type AllOpen = BTreeMap<(u32, u64), Vec<Open>>;

pub(super) fn hits(processes: &Processes) -> Vec<Hit> {
    let mut epolls: BTreeMap<BTreeSet<Target>, Vec<u32>> = BTreeMap::new();
    let mut room = TARGETS;
    for (seen, number, target) in processes.descriptors() {
        let FDTarget::AnonInode(kind) = target else {
            continue;
        };
        if kind != "[eventpoll]" {
            continue;
        }
        // One that was closed meanwhile is none.
        let Ok(information) = File::open(format!("/proc/{}/fdinfo/{number}", seen.pid)) else {
            continue;
        };
        let targets = targets(BufReader::new(information), room);
        room = room.saturating_sub(1 + targets.len());
        if room == 0 {
            return vec![("unseen", "what epolls wait for".to_owned())];
        }
        epolls.entry(targets).or_default().push(seen.pid);
    }
    if epolls.is_empty() {
        return Vec::new();
    }
    let mut open = AllOpen::new();
    let mut inodes: BTreeMap<u64, Vec<Open>> = BTreeMap::new();
    for seen in &processes.tree {
        for it in opened(seen) {
            open.entry((seen.pid, it.inode)).or_default().push(it);
            inodes.entry(it.inode).or_default().push(it);
        }
    }
    let parents: BTreeMap<u32, u32> = { processes.tree.iter() }
        .map(|seen| (seen.pid, seen.parent()))
        .collect();
    let lacks = |targets: &BTreeSet<Target>, owners: &[u32]| {
        let owners = first_of(owners, &parents);
        let among = |open: Option<&Vec<Open>>, target: &Target| {
            open.is_some_and(|open| open.iter().any(|it| it.may_be(target)))
        };
        targets.iter().any(|target| {
            let mut own = owners.iter().map(|pid| open.get(&(*pid, target.inode)));
            !own.any(|open| among(open, target)) && among(inodes.get(&target.inode), target)
        })
    };
    let lacking: BTreeSet<u32> = { epolls.iter() }
        .filter(|(targets, owners)| lacks(targets, owners))
        .filter_map(|(_, owners)| owners.first().copied())
        .collect();
    let told = processes
        .tree
        .iter()
        .filter(|seen| lacking.contains(&seen.pid));
    told.map(|seen| ("epoll-target", seen.called())).collect()
}

/// Those that no other one of them is above.
fn first_of(owners: &[u32], parents: &BTreeMap<u32, u32>) -> BTreeSet<u32> {
    let owners: BTreeSet<u32> = owners.iter().copied().collect();
    let is_below = |pid: &u32| {
        // A chain is no longer than there are processes.
        let above = std::iter::successors(parents.get(pid), |pid| parents.get(pid));
        above.take(parents.len()).any(|pid| owners.contains(pid))
    };
    owners
        .iter()
        .copied()
        .filter(|pid| !is_below(pid))
        .collect()
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

/// No more than `most`.
fn targets(information: impl BufRead, most: usize) -> BTreeSet<Target> {
    let lines = information.lines().map_while(Result::ok);
    lines
        .filter(|line| line.starts_with("tfd:"))
        .take(most)
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
        assert_eq!(targets(information.as_bytes(), 9), [read, written].into());
        assert_eq!(targets(information.as_bytes(), 1).len(), 1);
        assert!(targets(&b"pos:\t0\n"[..], 9).is_empty());
        // A child that was forked has the epoll, too; CRIU asks its parent.
        let parents = [(1, 0), (2, 1), (3, 2), (4, 0)].into();
        assert_eq!(first_of(&[3, 1, 4], &parents), [1, 4].into());
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
