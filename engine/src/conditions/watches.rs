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
//!
//! By a mount of a file it opens no handle either. Where a directory of the same file system is mounted too, it opens
//! the handle by that mount, finds no path, and says nothing of one, unless `force-irmap` makes it look for the inode.

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

/// CRIU's options.
const SCAN_PATH: &str = "irmap-scan-path";
const LOOK_ALWAYS: &str = "force-irmap";
/// File systems whose files have no handles that can be opened.
const NO_HANDLES: [&str; 2] = ["proc", "sysfs"];
/// More of a descriptor's information than this is not read.
const INFORMATION: u64 = 4 << 20;
/// More files than this are not compared.
const FILES: usize = 4 << 20;

/// What CRIU is told of what is watched, and what there is that it cannot be told.
pub(super) fn find(subject: &Subject, processes: &Processes) -> (Vec<ConfigLine>, Vec<Hit>) {
    let root = format!("/proc/{}/root/", subject.init);
    let Ok(device) = fs::metadata(&root).map(|root| root.dev()) else {
        return (Vec::new(), Vec::new());
    };
    let watching = processes.descriptors().filter(|(_, _, target)| {
        matches!(target, FDTarget::AnonInode(kind) if kind == "inotify" || kind == "[fanotify]")
    });
    let mut wanted = BTreeMap::new();
    let mut mounted = BTreeMap::new();
    let mut lost = Vec::new();
    let mut places = None;
    for (seen, number, _) in watching {
        let information = read(&format!("/proc/{}/fdinfo/{number}", seen.pid));
        for inode in watched(&information, device) {
            wanted.insert(inode, seen.called());
        }
        let (never, files) = places
            .get_or_insert_with(|| (without_handles(subject.init), mounted_files(subject.init)));
        for (device, place) in &*never {
            let watches = watched(&information, *device).len();
            if watches > 0 {
                let by = seen.called();
                lost.push(("watch", format!("{watches} below {place} by {by}")));
            }
        }
        for file in &*files {
            if watched(&information, file.device).contains(&file.inode) {
                mounted.insert(file.clone(), seen.called());
            }
        }
    }
    let mut told = Told::default();
    for (file, by) in mounted {
        told.look_at(&file.place, &by, &mut lost);
        told.always |= file.has_directory;
    }
    if !wanted.is_empty() && is_overlay(&root) {
        let found = paths_of_inodes(Path::new(&root), device, &wanted.keys().copied().collect());
        for (inode, by) in wanted {
            match found.get(&inode) {
                Some(path) => told.look_at(path, &by, &mut lost),
                None => lost.push(("watch", format!("inode {inode} by {by}"))),
            }
        }
    }
    (told.lines(), lost)
}

/// Where CRIU is to look.
#[derive(Default)]
struct Told {
    paths: Vec<ConfigLine>,
    /// Whether it looks there for what it has opened, too.
    always: bool,
}

impl Told {
    fn look_at(&mut self, path: &str, by: &str, lost: &mut Vec<Hit>) {
        if let Ok(line) = ConfigLine::with(SCAN_PATH, path) {
            self.paths.push(line);
            return;
        }
        let shown = path.escape_debug();
        let what = format!("{shown} by {by}, which has a blank or the like");
        lost.push(("watch", what));
    }

    fn lines(self) -> Vec<ConfigLine> {
        let always = self.always.then(|| ConfigLine::switch(LOOK_ALWAYS));
        self.paths.into_iter().chain(always).collect()
    }
}

/// A file that is a mount of its own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct MountedFile {
    place: String,
    device: u64,
    inode: u64,
    /// Whether a directory of its file system is mounted, too.
    has_directory: bool,
}

/// Those that can be seen at their places.
fn mounted_files(pid: u32) -> Vec<MountedFile> {
    let mounts = process_files::mountinfo(pid).into_iter().flatten();
    let seen: Vec<_> = mounts
        .filter_map(|mount| {
            let place = mount.mount_point.to_str()?.to_owned();
            let below = place.trim_start_matches('/');
            // Never a link: the kernel says what is mounted where, and nothing is mounted on one.
            let it = fs::symlink_metadata(format!("/proc/{pid}/root/{below}")).ok()?;
            Some((place, it))
        })
        .collect();
    let has_directory =
        |device| { seen.iter() }.any(|(_, other)| other.is_dir() && other.dev() == device);
    { seen.iter() }
        .filter(|(_, it)| it.is_file())
        .map(|(place, it)| MountedFile {
            place: place.clone(),
            device: it.dev(),
            inode: it.ino(),
            has_directory: has_directory(it.dev()),
        })
        .collect()
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
    fn a_path_that_cannot_be_told_is_lost() {
        let (mut told, mut lost) = (Told::default(), Vec::new());
        told.look_at("/app/app.conf", "7 (x)", &mut lost);
        told.look_at("/app/a b", "7 (x)", &mut lost);
        assert_eq!(lost.len(), 1, "{lost:?}");
        told.always = true;
        let text = ConfigLine::to_text(&told.lines());
        assert_eq!(text, "irmap-scan-path /app/app.conf\nforce-irmap\n");
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
