//! Where open files are: on mounts that are covered or that nobody sees, behind paths that are too long, below a root that
//! is no mount.
//!
//! ```text
//!  statx(2) of /proc/PID/fd/N, cwd, root, exe     the number of the mount that it was opened on
//!  /proc/PID/mountinfo    30 25 0:40 / /data rw     number, number of the parent, ..., mount point
//!                         31 25 0:41 / /data rw     a later one at the same place, or above it: 30 is covered
//!                         32 30 0:42 / /data rw     so it is by one that is mounted on it
//!  readlink(2)            ENAMETOOLONG              more than a page
//! ```
//!
//! Without a line for `/` the root is no mount, and CRIU makes nothing of the others. It asks the same of what is mapped,
//! which is left to it.

use std::cell::LazyCell;
use std::collections::BTreeMap;
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

/// What is seen from the root of one process, by the numbers of the mounts.
type Mounts = BTreeMap<i32, MountInfo>;

pub(super) fn hits(subject: &Subject, processes: &Processes) -> Vec<Hit> {
    let mut hits: Vec<Hit> = processes.tree.iter().filter_map(too_long).collect();
    let Some(first) = mounts_of(subject.init) else {
        // It has ended.
        return hits;
    };
    let is_root = |mount: &MountInfo| mount.mount_point == Path::new("/");
    if !first.values().any(is_root) {
        hits.push(("chroot", String::new()));
        return hits;
    }
    let others = LazyCell::new(|| of_other_namespaces(subject.init, processes));
    for seen in &processes.tree {
        hits.extend(files(seen).filter_map(|(link, shown)| {
            let number = mount_of(&link)?;
            if is_seen(number, &first) {
                return None;
            }
            let mut tables = [&first].into_iter().chain(others.iter());
            if tables.clone().any(|table| is_seen(number, table)) {
                return None;
            }
            let name = match tables.any(|table| table.contains_key(&number)) {
                true => "overmounted",
                false if is_queue(&link) => return None,
                false => "hidden-mount",
            };
            let shown = shown.display().to_string();
            let what = format!("{} of {}", shown.escape_debug(), seen.called());
            Some((name, what))
        }));
    }
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

/// None of a process that has ended; no mounts are those of one below whose root there is none.
fn mounts_of(pid: u32) -> Option<Mounts> {
    let mounts = process_files::mountinfo(pid).ok()?.into_iter();
    Some(mounts.map(|mount| (mount.mnt_id, mount)).collect())
}

/// The mounts of processes that have left the mount namespace of the first one.
fn of_other_namespaces(init: u32, processes: &Processes) -> Vec<Mounts> {
    let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let first = namespace(init);
    let others = processes.tree.iter().map(|seen| seen.pid);
    others
        .filter(|pid| namespace(*pid) != first)
        .filter_map(mounts_of)
        .collect()
}

fn is_seen(number: i32, mounts: &Mounts) -> bool {
    let mount = mounts.get(&number);
    mount.is_some_and(|mount| !is_covered(mount, mounts))
}

/// As CRIU has it (`mnt_is_overmounted`): by one that is mounted on it, or by a sibling at or above the place of it or of
/// one that it is mounted in.
fn is_covered(mount: &MountInfo, mounts: &Mounts) -> bool {
    let mut children = mounts.values().filter(|it| it.pid == mount.mnt_id);
    if children.any(|child| child.mount_point == mount.mount_point) {
        return true;
    }
    let mut at = mount;
    // A chain is no longer than there are mounts.
    for _ in 0..mounts.len() {
        let Some(parent) = mounts.get(&at.pid).filter(|it| it.mnt_id != at.mnt_id) else {
            return false;
        };
        let mut siblings = { mounts.values() }
            .filter(|it| it.pid == parent.mnt_id && it.mnt_id != at.mnt_id && it.mnt_id != it.pid);
        if siblings.any(|sibling| at.mount_point.starts_with(&sibling.mount_point)) {
            return true;
        }
        at = parent;
    }
    false
}

/// Whether a link of the process is longer than the kernel shows.
fn too_long(seen: &Seen) -> Option<Hit> {
    let known = |name: &str| {
        let number = name.parse::<i32>().ok();
        number.is_some_and(|number| seen.descriptors.iter().any(|(it, _)| *it == number))
    };
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
        let mounts: Mounts = { lines.lines() }
            .map(|line| MountInfo::from_line(line).unwrap())
            .map(|mount| (mount.mnt_id, mount))
            .collect();
        let covered: Vec<i32> = { mounts.values() }
            .filter(|mount| is_covered(mount, &mounts))
            .map(|mount| mount.mnt_id)
            .collect();
        // Of two at one place the kernel does not say which is above: CRIU takes neither.
        assert_eq!(covered, [30, 31, 32, 33]);
        assert!(is_seen(35, &mounts) && !is_seen(36, &mounts));
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
