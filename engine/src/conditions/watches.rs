//! Files that are watched with inotify or fanotify.
//!
//! ```text
//!  /proc/PID/fdinfo/N   inotify wd:1 ino:9e7e sdev:39 mask:... fhandle-bytes:...
//!                       fanotify ino:9e7e sdev:39 mflags:... mask:...
//!                       device as the kernel has it: major << 20 | minor, in hexadecimal
//! ```
//!
//! No handle of a file in `/proc` and `/sys` can be opened, and CRIU has no other way to them.
//!
//! CRIU finds a watched file by its handle, and on an overlay, which opens no handles, by its inode
//! below some well-known directories, and below those that `irmap-scan-path` names. So the inodes are
//! looked for here, while the container runs, and CRIU is told where they are.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::stat::{major, makedev, minor};
use procfs::process::FDTarget;
use transship_checkpoint::criu_options::ConfigLine;
use walkdir::WalkDir;

use super::processes::Processes;
use super::{Hit, Subject};
use crate::process_files;

/// CRIU's option.
pub(crate) const SCAN_PATH: &str = "irmap-scan-path";
/// File systems whose files have no handles that can be opened.
const NO_HANDLES: [&str; 2] = ["proc", "sysfs"];
/// More of a descriptor's information than this is not read.
const INFORMATION: u64 = 4 << 20;
/// More files than this are not compared.
const FILES: usize = 4 << 20;

/// The paths of what is watched on the container's root, and what has none that CRIU can be told.
pub(super) fn find(subject: &Subject, processes: &Processes) -> (Vec<String>, Vec<Hit>) {
    let root = format!("/proc/{}/root/", subject.init);
    let Ok(device) = fs::metadata(&root).map(|root| root.dev()) else {
        return (Vec::new(), Vec::new());
    };
    let watching = processes.descriptors().filter(|(_, _, target)| {
        matches!(target, FDTarget::AnonInode(kind) if kind == "inotify" || kind == "[fanotify]")
    });
    let mut wanted = BTreeMap::new();
    let mut lost = Vec::new();
    let mut never = None;
    for (seen, number, _) in watching {
        let information = read(&format!("/proc/{}/fdinfo/{number}", seen.pid));
        for inode in watched(&information, device) {
            wanted.insert(inode, seen.called());
        }
        for (device, place) in never.get_or_insert_with(|| without_handles(subject.init)) {
            let watches = watched(&information, *device).len();
            if watches > 0 {
                let by = seen.called();
                lost.push(("watch", format!("{watches} below {place} by {by}")));
            }
        }
    }
    if wanted.is_empty() || !is_overlay(&root) {
        return (Vec::new(), lost);
    }
    let found = paths_of_inodes(Path::new(&root), device, &wanted.keys().copied().collect());
    let mut told = Vec::new();
    for (inode, by) in wanted {
        match found.get(&inode) {
            Some(path) if ConfigLine::with(SCAN_PATH, path).is_ok() => told.push(path.clone()),
            Some(path) => {
                let shown = path.escape_debug();
                lost.push((
                    "watch",
                    format!("{shown} by {by}, which has a blank or the like"),
                ));
            }
            None => lost.push(("watch", format!("inode {inode} by {by}"))),
        }
    }
    (told, lost)
}

/// The devices of file systems whose files CRIU does not find again, and where they are.
fn without_handles(init: u32) -> BTreeMap<u64, String> {
    let mounts = process_files::mountinfo(init);
    let mounts = mounts.into_iter().flatten();
    let without = mounts.filter(|mount| NO_HANDLES.contains(&mount.fs_type.as_str()));
    let devices = without.filter_map(|mount| {
        let (major, minor) = mount.majmin.split_once(':')?;
        let device = makedev(major.parse().ok()?, minor.parse().ok()?);
        Some((device, mount.mount_point.display().to_string()))
    });
    let mut places = BTreeMap::new();
    for (device, place) in devices {
        // /proc, not /proc/bus of the same.
        places.entry(device).or_insert(place);
    }
    places
}

fn is_overlay(root: &str) -> bool {
    nix::sys::statfs::statfs(root)
        .is_ok_and(|it| it.filesystem_type() == nix::sys::statfs::OVERLAYFS_SUPER_MAGIC)
}

fn read(path: &str) -> String {
    let mut text = String::new();
    // One that was closed watches nothing.
    if let Ok(file) = File::open(path) {
        drop(file.take(INFORMATION).read_to_string(&mut text));
    }
    text
}

/// The inodes on the device that a process watches.
pub(crate) fn watched_inodes(pid: u32, device: u64) -> BTreeSet<u64> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fdinfo"));
    let descriptors = descriptors.into_iter().flatten().flatten();
    descriptors
        .flat_map(|entry| watched(&read(&entry.path().display().to_string()), device))
        .collect()
}

/// The inodes on the device.
fn watched(information: &str, device: u64) -> BTreeSet<u64> {
    let wanted = major(device) << 20 | minor(device);
    let number = |line: &str, key: &str| {
        let mut words = line.split_whitespace();
        let value = words.find_map(|word| word.strip_prefix(key))?;
        u64::from_str_radix(value, 16).ok()
    };
    information
        .lines()
        .filter(|line| line.starts_with("inotify ") || line.starts_with("fanotify ino:"))
        .filter(|line| number(line, "sdev:") == Some(wanted))
        .filter_map(|line| number(line, "ino:"))
        .collect()
}

/// The path of each inode below `root`, as it is seen there.
pub(crate) fn paths_of_inodes(
    root: &Path,
    device: u64,
    wanted: &BTreeSet<u64>,
) -> BTreeMap<u64, String> {
    let mut found = BTreeMap::new();
    if wanted.is_empty() {
        return found;
    }
    let walk = WalkDir::new(root)
        .follow_links(false)
        .same_file_system(true);
    for entry in walk.into_iter().flatten().take(FILES) {
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        if metadata.dev() != device || !wanted.contains(&metadata.ino()) {
            continue;
        }
        let below = entry.path().strip_prefix(root).ok().and_then(Path::to_str);
        if let Some(below) = below {
            found.insert(metadata.ino(), format!("/{below}"));
        }
        if found.len() == wanted.len() {
            break;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_watched_elsewhere_is_left_to_criu() {
        let information = "pos:\t0\nflags:\t02004000\n\
            inotify wd:2 ino:9e7e sdev:39 mask:10 ignored_mask:0 fhandle-bytes:8\n\
            inotify wd:1 ino:1f sdev:fe00000 mask:10 ignored_mask:0\n\
            fanotify flags:0 event-flags:0\nfanotify ino:7 sdev:39 mflags:0 mask:2\n\
            fanotify mnt_id:3 mflags:0 mask:2\n";
        let overlay = nix::sys::stat::makedev(0, 0x39);
        assert_eq!(watched(information, overlay), BTreeSet::from([0x9e7e, 7]));
        let disk = nix::sys::stat::makedev(254, 0);
        assert_eq!(watched(information, disk), BTreeSet::from([0x1f]));
    }

    #[test]
    fn proc_has_no_handles() {
        let device = fs::metadata("/proc/self/status").unwrap().dev();
        let places = without_handles(std::process::id());
        assert_eq!(places.get(&device).map(String::as_str), Some("/proc"));
    }

    #[test]
    fn an_inode_is_found_by_its_path() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("usr/bin")).unwrap();
        fs::write(dir.path().join("usr/bin/x"), "x").unwrap();
        let inode = |path: &str| fs::metadata(dir.path().join(path)).unwrap().ino();
        let device = fs::metadata(dir.path()).unwrap().dev();
        let wanted = BTreeSet::from([inode("usr/bin"), inode("usr/bin/x"), inode("")]);
        let found = paths_of_inodes(dir.path(), device, &wanted);
        assert_eq!(found[&inode("usr/bin")], "/usr/bin");
        assert_eq!(found[&inode("usr/bin/x")], "/usr/bin/x");
        assert_eq!(found[&inode("")], "/");
    }
}
