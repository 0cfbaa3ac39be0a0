//! Where open files are: on mounts that are covered or that nobody sees, behind paths that are too long, below a root that
//! is no mount.
//!
//! ```text
//!  statx(2) of /proc/PID/fd/N, cwd, root, exe     the number of the mount that it was opened on
//!  /proc/PID/mountinfo    30 25 0:40 / /data rw     number, number of the parent, ..., mount point
//!                         31 25 0:41 / /data rw     a later one at the same place, or above it: 30 is covered
//!                         32 30 0:42 / /data rw     so it is by one that is mounted on it
//!  readlink(2)            ENAMETOOLONG              more than a page
//!  readlink of /proc/PID/root    /                  where its mount namespace begins, too
//! ```
//!
//! The first process with another root is refused by CRIU (get_mntns_root of its mount.c); without a line for `/` that root
//! is no mount, and CRIU makes nothing of the others. It asks the same of what is mapped,
//! which is left to it.

use std::cell::LazyCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statfs::{FsType, statfs};
use procfs::process::{FDTarget, MountInfo};
use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

use super::open_files::is_memory;
use super::processes::{Processes, Seen};
use super::{Hit, Subject};
use crate::process_files;

/// From `ipc/mqueue.c`. CRIU dumps no queue, wherever it was opened: that is a condition of its own.
const MQUEUE_MAGIC: FsType = FsType(0x1980_0202);
/// What a process has beside its descriptors.
const PLACES: [&str; 3] = ["cwd", "root", "exe"];

/// More mounts of one namespace, and more namespaces, than this are not looked at.
const MOUNTS: usize = 4096;
const NAMESPACES: usize = 64;

/// The mounts that are seen from the root of one process, by their numbers.
#[derive(Debug, Default)]
struct Mounts {
    all: BTreeSet<i32>,
    /// Those that nothing covers.
    open: BTreeSet<i32>,
}

/// What a look at the mounts of a process gives.
enum Look {
    Mounts(Mounts),
    /// Its root is no mount.
    Changed,
    TooMany,
    /// It has ended.
    Gone,
}

pub(super) fn hits(subject: &Subject, processes: &Processes) -> Vec<Hit> {
    let mut hits: Vec<Hit> = processes.tree.iter().filter_map(too_long).collect();
    let unseen = || ("unseen", "mounts".to_owned());
    let root = fs::read_link(format!("/proc/{}/root", subject.init));
    if root.is_ok_and(|root| root != Path::new("/")) {
        hits.push(("chroot", String::new()));
        return hits;
    }
    let mut is_any_unseen = false;
    let first = match look(subject.init) {
        Look::Mounts(first) => first,
        Look::Gone => return hits,
        Look::Changed => {
            hits.push(("chroot", String::new()));
            return hits;
        }
        Look::TooMany => {
            hits.push(unseen());
            return hits;
        }
    };
    let others = LazyCell::new(|| of_other_namespaces(subject.init, processes));
    for seen in &processes.tree {
        hits.extend(files(seen).filter_map(|(link, shown)| {
            let number = mount_of(&link)?;
            if first.open.contains(&number) {
                return None;
            }
            let Some(others) = &*others else {
                is_any_unseen = true;
                return None;
            };
            let mut tables = [&first].into_iter().chain(others);
            if tables.clone().any(|table| table.open.contains(&number)) {
                return None;
            }
            let name = match tables.any(|table| table.all.contains(&number)) {
                true => "overmounted",
                false if is_queue(&link) => return None,
                false => "hidden-mount",
            };
            let shown = shown.display().to_string();
            let what = format!("{} of {}", shown.escape_debug(), seen.called());
            Some((name, what))
        }));
    }
    hits.extend(is_any_unseen.then(unseen));
    hits
}

/// What CRIU finds again by its mount, by the links that lead there.
fn files(seen: &Seen) -> impl Iterator<Item = (String, PathBuf)> {
    let descriptors = seen.descriptors.iter();
    let descriptors = descriptors.filter_map(|(number, target)| match target {
        FDTarget::Path(path) => Some((seen.descriptor(*number), path.clone())),
        _ => None,
    });
    let places = PLACES.iter().filter_map(|place| {
        let link = format!("/proc/{}/{place}", seen.pid);
        let target = fs::read_link(&link).ok()?;
        target.is_absolute().then_some((link, target))
    });
    descriptors
        .chain(places)
        .filter(|(_, path)| !is_memory(path))
}

/// The number of the mount of a file or directory; none of anything else, and none before Linux 5.8.
fn mount_of(link: &str) -> Option<i32> {
    // Nobody is asked over a network.
    let flags = AtFlags::STATX_DONT_SYNC;
    let found = statx(CWD, link, flags, StatxFlags::MNT_ID | StatxFlags::TYPE).ok()?;
    let kind = FileType::from_raw_mode(found.stx_mode.into());
    let has_place = matches!(
        kind,
        FileType::RegularFile | FileType::Directory | FileType::Fifo
    );
    let is_known = found.stx_mask & StatxFlags::MNT_ID.bits() != 0;
    let number = found.stx_mnt_id.try_into().ok();
    number.filter(|_| has_place && is_known)
}

fn is_queue(link: &str) -> bool {
    statfs(link).is_ok_and(|it| it.filesystem_type() == MQUEUE_MAGIC)
}

fn look(pid: u32) -> Look {
    let Ok(mounts) = process_files::mountinfo(pid) else {
        return Look::Gone;
    };
    let mounts: Vec<MountInfo> = mounts.into_iter().take(MOUNTS + 1).collect();
    let is_root = |mount: &MountInfo| mount.mount_point == Path::new("/");
    match mounts.len() > MOUNTS {
        true => Look::TooMany,
        false if !mounts.iter().any(is_root) => Look::Changed,
        false => Look::Mounts(Mounts::of(&mounts)),
    }
}

/// The mounts of processes that have left the mount namespace of the first one; none where there are too many.
fn of_other_namespaces(init: u32, processes: &Processes) -> Option<Vec<Mounts>> {
    let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let mut known = BTreeSet::from([namespace(init)]);
    let mut others = Vec::new();
    for seen in &processes.tree {
        let own = namespace(seen.pid);
        if known.contains(&own) {
            continue;
        }
        match look(seen.pid) {
            Look::Mounts(mounts) if others.len() < NAMESPACES => others.push(mounts),
            Look::Mounts(_) | Look::TooMany => return None,
            // Another one may see them.
            Look::Changed | Look::Gone => continue,
        }
        known.insert(own);
    }
    Some(others)
}

impl Mounts {
    /// What is covered is known as CRIU has it (`mnt_is_overmounted`): by one that is mounted on it, or by a sibling at or
    /// above its place or that of one that it is mounted in.
    fn of(mounts: &[MountInfo]) -> Self {
        let all: BTreeSet<i32> = mounts.iter().map(|mount| mount.mnt_id).collect();
        let mut children: BTreeMap<i32, Vec<&MountInfo>> = BTreeMap::new();
        let (mut reached, mut open) = (Vec::new(), BTreeSet::new());
        for mount in mounts {
            match all.contains(&mount.pid) && mount.pid != mount.mnt_id {
                true => children.entry(mount.pid).or_default().push(mount),
                false => reached.push((mount, false)),
            }
        }
        while let Some((mount, is_hidden)) = reached.pop() {
            let on_it = children
                .get(&mount.mnt_id)
                .map(Vec::as_slice)
                .unwrap_or_default();
            let is_covered = on_it.iter().any(|it| it.mount_point == mount.mount_point);
            if !is_hidden && !is_covered {
                open.insert(mount.mnt_id);
            }
            let mut places: BTreeMap<&Path, usize> = BTreeMap::new();
            for child in on_it {
                *places.entry(&child.mount_point).or_default() += 1;
            }
            for child in on_it {
                let mut places_above = child.mount_point.ancestors();
                let is_below = places_above.any(|at| {
                    // At its own place it is one of them itself.
                    let itself = usize::from(at == child.mount_point);
                    places.get(at).is_some_and(|mounts| *mounts > itself)
                });
                reached.push((child, is_hidden || is_below));
            }
        }
        Self { all, open }
    }
}

/// Whether a link of the process is longer than the kernel shows.
fn too_long(seen: &Seen) -> Option<Hit> {
    let read: BTreeSet<i32> = seen.descriptors.iter().map(|(number, _)| *number).collect();
    let known = |name: &str| name.parse().is_ok_and(|number| read.contains(&number));
    let descriptors = fs::read_dir(format!("/proc/{}/fd", seen.pid));
    // Those that were read have a name.
    let unread = { descriptors.into_iter().flatten().flatten() }
        .filter(|it| !it.file_name().to_str().is_some_and(known))
        .map(|it| it.path());
    let places = PLACES.map(|place| PathBuf::from(format!("/proc/{}/{place}", seen.pid)));
    let mut links = unread.chain(places);
    let is_long = |link: PathBuf| {
        let read = fs::read_link(link);
        read.is_err_and(|error| error.raw_os_error() == Some(Errno::ENAMETOOLONG as i32))
    };
    links.any(is_long).then(|| ("long-path", seen.called()))
}

#[cfg(test)]
mod tests {
    use transship_checkpoint::criu_options::CriuOptions;
    use transship_checkpoint::spec::Spec;

    use super::*;

    #[test]
    fn what_is_covered_is_known_from_the_tree_of_mounts() {
        let lines = "\
25 1 0:30 / / rw - overlay overlay rw
30 25 0:40 / /data rw - tmpfs tmpfs rw
31 30 0:41 / /data/deep rw - tmpfs tmpfs rw
32 25 0:42 / /data rw - tmpfs tmpfs rw
33 25 0:43 / /own rw - tmpfs tmpfs rw
34 33 0:44 / /own rw - tmpfs tmpfs rw
35 25 0:45 / /database rw - tmpfs tmpfs rw";
        let mounts: Vec<MountInfo> = { lines.lines() }
            .map(|line| MountInfo::from_line(line).unwrap())
            .collect();
        let mounts = Mounts::of(&mounts);
        // Of two at one place the kernel does not say which is above: CRIU takes neither.
        let covered: Vec<i32> = mounts.all.difference(&mounts.open).copied().collect();
        assert_eq!(covered, [30, 31, 32, 33]);
        assert!(mounts.open.contains(&35) && !mounts.all.contains(&36));
    }

    #[test]
    fn files_of_this_program_are_where_they_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let _file = fs::File::create(dir.path().join("x")).unwrap();
        let own = std::process::id();
        let processes = Processes::read(own, &[own]);
        let subject = Subject {
            id: String::new(),
            init: own,
            pids: vec![own],
            spec: Spec::parse(b"{}").unwrap(),
            criu: CriuOptions::default(),
        };
        let hits = hits(&subject, &processes);
        assert!(hits.is_empty(), "{hits:?}");
    }

    #[test]
    fn a_directory_with_too_long_a_path_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let name = "d".repeat(200);
        // A shell for each level: none of them need know where it is.
        let deep = format!(
            "[ $1 = 0 ] && echo && exec sleep 1000; mkdir {name}; exec env -C {name} sh -c \"$0\" \"$0\" $(($1 - 1))"
        );
        let mut shell = std::process::Command::new("sh")
            .args(["-c", &deep, &deep, "22"])
            .current_dir(dir.path())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0];
        std::io::Read::read_exact(shell.stdout.as_mut().unwrap(), &mut line).unwrap();
        let processes = Processes::read(shell.id(), &[]);
        let hit = too_long(&processes.tree[0]);
        shell.kill().unwrap();
        shell.wait().unwrap();
        assert_eq!(hit.unwrap().0, "long-path");
    }
}
