//! What the restored processes have open, before they run: files of the container's own mounts and no others, and none
//! that they could not have opened.
//!
//! CRIU finds files by names, in volumes that others write to meanwhile and in file systems whose links are known when
//! it has made them. So that a name has led elsewhere shows in what it has led to. A file knows its mount, whatever kind of
//! file it is and however it was opened, and a mount is in one namespace alone:
//!
//! ```text
//! /proc/<pid>/mountinfo      <id> <parent> <device> ...      the mounts of the container
//! /proc/<pid>/fdinfo/<n>     mnt_id: <id>                    the mount of an open file
//! ```
//!
//! A process that has changed its root (chroot) is shown the mounts below it alone, so all processes of a namespace are asked.
//!
//! Of some files of `/proc` and `/sys` the kernel asks which capabilities those have who opened them, and of nobody who
//! reads them later (`sandbox/src/privileged_files.rs`). CRIU has them all. Nor does the kernel ask again which devices the
//! container may open (`sandbox/src/device_rules.rs`).
//!
//! The root itself is read-only where the spec says so: CRIU 4.0 and 4.1 forget it.
//!
//! Pipes, sockets and what else has no path are no files of a mount. The standard streams are the runtime's.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::statvfs::{FsFlags, statvfs};
use serde_json::Value;
use transship_checkpoint::spec::Spec;
use transship_path_error::During as _;
use transship_sandbox::device_rules::DeviceRules;
use transship_sandbox::privileged_files::{self, OwnProcesses};

use super::{FrontError, RestoreError};
use crate::descendants;

/// Of the spec.
const READ_ONLY: &str = "/root/readonly";
/// Links that are files of the kernel, whose mount nobody has.
const OF_KERNEL: [&[u8]; 6] = [
    b"/memfd:",
    b"/dev/zero (deleted)",
    b"/SYSV",
    b"/[aio]",
    b"/anon_hugepage",
    b"/secretmem",
];

/// Refuses a restored container of which a process has a file that is not its own, or whose root can be written and should
/// not; `pid` is its first process.
///
/// # Errors
/// It has one, or `/proc` cannot be read.
pub(super) fn check(id: &str, pid: i32, spec: &Spec) -> Result<(), FrontError> {
    let id = id.to_owned();
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let flags = statvfs(&root).during("look at", &root)?.flags();
    if spec.get(READ_ONLY) == Some(&Value::Bool(true)) && !flags.contains(FsFlags::ST_RDONLY) {
        return Err(RestoreError::WritableRoot { id }.into());
    }
    match unfit(pid, spec).during("look at", format!("/proc/{pid}"))? {
        Some((path, Unfit::Foreign)) => Err(RestoreError::ForeignFile { id, path }.into()),
        Some((path, Unfit::Closed)) => Err(RestoreError::ClosedDevice { id, path }.into()),
        Some((path, Unfit::Takes(needed))) => {
            Err(RestoreError::PrivilegedFile { id, path, needed }.into())
        }
        None => Ok(()),
    }
}

/// What is wrong with a file that is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unfit {
    /// It is in none of the process' mounts.
    Foreign,
    /// It is a device that the container may not open.
    Closed,
    /// Opening it takes this capability, which the process cannot have.
    Takes(&'static str),
}

/// The first file of any kind that the process `root`, or one below it, has open, mapped, or for its root, and that
/// is in none of its mounts, or could not be opened by it.
///
/// # Errors
/// `/proc` cannot be read.
fn unfit(root: i32, spec: &Spec) -> io::Result<Option<(PathBuf, Unfit)>> {
    let tree = descendants::tree(root)?;
    let container = Container {
        rules: DeviceRules::of(spec),
        own: OwnProcesses::of(tree.iter().copied())?,
        streams: streams(),
    };
    let mut mounts: BTreeMap<PathBuf, BTreeSet<u64>> = BTreeMap::new();
    let mut processes = Vec::new();
    for pid in tree {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let seen = match mounts_seen_by(&proc) {
            // A zombie is in no mount namespace.
            Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => continue,
            seen => unless_gone(seen)?,
        };
        if let Some((namespace, seen)) = seen {
            mounts.entry(namespace.clone()).or_default().extend(seen);
            processes.push((proc, namespace));
        }
    }
    for (proc, namespace) in processes {
        let mounts = &mounts[&namespace];
        let Some(bounds) = unless_gone(privileged_files::attainable(&proc))? else {
            continue;
        };
        for link in links(&proc)? {
            let found = unless_gone(container.look_at(&link, &proc, mounts, bounds))?.flatten();
            if let Some(unfit) = found {
                return fs::read_link(&link).map(|path| Some((path, unfit)));
            }
        }
    }
    Ok(None)
}

/// Device and inode of what the runtime gives to the container for its standard streams: terminals and `/dev/null` of
/// the node among them.
fn streams() -> Vec<(u64, u64)> {
    let streams = (0..3).filter_map(|number| fs::metadata(format!("/proc/self/fd/{number}")).ok());
    let streams = streams.filter(|found| !found.is_dir());
    streams.map(|found| (found.dev(), found.ino())).collect()
}

/// A mount namespace, and the mounts that are seen from the root of one of its processes.
fn mounts_seen_by(proc: &Path) -> io::Result<(PathBuf, BTreeSet<u64>)> {
    let namespace = fs::read_link(proc.join("ns/mnt"))?;
    let text = fs::read(proc.join("mountinfo"))?;
    let lines = text.split(|byte| *byte == b'\n');
    let ids = lines.filter_map(|line| line.split(|byte| *byte == b' ').next());
    let ids = ids.filter_map(|id| std::str::from_utf8(id).ok()?.parse().ok());
    Ok((namespace, ids.collect()))
}

fn links(proc: &Path) -> io::Result<Vec<PathBuf>> {
    let mut links = ["cwd", "root", "exe"].map(|name| proc.join(name)).to_vec();
    for dir in ["fd", "map_files"] {
        let Some(entries) = unless_gone(fs::read_dir(proc.join(dir)))? else {
            continue;
        };
        for entry in entries {
            links.push(entry?.path());
        }
    }
    Ok(links)
}

/// What a restored container may have open.
struct Container {
    rules: DeviceRules,
    own: OwnProcesses,
    streams: Vec<(u64, u64)>,
}

impl Container {
    /// What is wrong with the file that a link of the process at `proc` leads to.
    fn look_at(
        &self,
        link: &Path,
        proc: &Path,
        mounts: &BTreeSet<u64>,
        bounds: u64,
    ) -> io::Result<Option<Unfit>> {
        let target = fs::read_link(link)?;
        let found = fs::metadata(link)?;
        let bytes = target.as_os_str().as_bytes();
        let has_path = bytes.starts_with(b"/") && !OF_KERNEL.iter().any(|it| bytes.starts_with(it));
        let is_stream = self.streams.contains(&(found.dev(), found.ino()));
        if has_path && !is_stream && is_foreign(link, proc, mounts)? {
            return Ok(Some(Unfit::Foreign));
        }
        if !is_stream && !self.rules.allow(&found, privileged_files::flags(link)?) {
            return Ok(Some(Unfit::Closed));
        }
        let file = (target.as_path(), &found);
        let lacking = privileged_files::lacking_to_open(link, file, &self.own, bounds)?;
        Ok(lacking.map(|needed| Unfit::Takes(needed.name)))
    }
}

fn is_foreign(link: &Path, proc: &Path, mounts: &BTreeSet<u64>) -> io::Result<bool> {
    let info = match link.parent().is_some_and(|dir| dir.ends_with("fd")) {
        true => {
            let number = link.file_name().unwrap_or_default();
            fs::read_to_string(proc.join("fdinfo").join(number))?
        }
        // Of these the mount is told by a descriptor of our own, which opens nothing.
        false => {
            let file = open(link, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
            fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?
        }
    };
    let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    let mount = mount.and_then(|id| id.trim().parse::<u64>().ok());
    Ok(mount.is_none_or(|id| !mounts.contains(&id)))
}

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_no_mount_of_its_own_is_told() {
        let proc = Path::new("/proc/self");
        let file = tempfile::tempfile().unwrap();
        let link = |file: &dyn AsRawFd| proc.join(format!("fd/{}", file.as_raw_fd()));
        let (_, own) = mounts_seen_by(proc).unwrap();
        let none = BTreeSet::new();
        let closed = br#"{"linux":{"resources":{"devices":[{"allow":false,"access":"rwm"}]}}}"#;
        let mut container = Container {
            rules: DeviceRules::of(&Spec::parse(closed).unwrap()),
            own: OwnProcesses::of([std::process::id().cast_signed()]).unwrap(),
            streams: Vec::new(),
        };
        let look_at = |container: &Container, link: &Path, mounts| {
            container.look_at(link, proc, mounts, 0).unwrap()
        };
        assert_eq!(look_at(&container, &link(&file), &own), None);
        let foreign = Some(Unfit::Foreign);
        assert_eq!(look_at(&container, &link(&file), &none), foreign);
        let exe = proc.join("exe");
        assert_eq!(look_at(&container, &exe, &none), foreign);
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert_eq!(look_at(&container, &link(&pipe), &none), None);
        // What is no regular file, and what is only named.
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _bound = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let named = open(&socket, OFlag::O_PATH, Mode::empty()).unwrap();
        assert_eq!(look_at(&container, &link(&named), &own), None);
        assert_eq!(look_at(&container, &link(&named), &none), foreign);
        let null = fs::File::open("/dev/null").unwrap();
        assert_eq!(look_at(&container, &link(&null), &none), foreign);
        assert_eq!(look_at(&container, &link(&null), &own), None);
        let found = null.metadata().unwrap();
        container.streams = vec![(found.dev(), found.ino())];
        assert_eq!(look_at(&container, &link(&null), &none), None);
    }
}
