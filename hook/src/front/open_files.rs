//! What the restored processes have open, before they run: files of the container's own mounts and no others, and none
//! that they could not have opened.
//!
//! CRIU finds files by names, in volumes that others write to meanwhile and in file systems whose links are known when
//! it has made them. So that a name has led elsewhere shows in what it has led to. A file knows its mount, and a mount is
//! in one namespace alone:
//!
//! ```text
//! /proc/<pid>/mountinfo      <id> <parent> <device> ...      the mounts of the container
//! /proc/<pid>/fdinfo/<n>     mnt_id: <id>                    the mount of an open file
//! ```
//!
//! Of some files of `/proc` and `/sys` the kernel asks which capabilities those have who opened them, and of nobody who
//! reads them later (`sandbox/src/privileged_files.rs`). CRIU has them all.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use transship_path_error::During as _;
use transship_sandbox::privileged_files;

use super::{FrontError, RestoreError};
use crate::descendants;

/// Links that are files of the kernel, whose mount nobody has.
const OF_KERNEL: [&[u8]; 6] = [
    b"/memfd:",
    b"/dev/zero (deleted)",
    b"/SYSV",
    b"/[aio]",
    b"/anon_hugepage",
    b"/secretmem",
];

/// Refuses a restored container of which a process has a file of no mount of its own; `pid` is its first process.
///
/// # Errors
/// It has one, or `/proc` cannot be read.
pub(super) fn check(id: &str, pid: i32) -> Result<(), FrontError> {
    let id = id.to_owned();
    match unfit(pid).during("look at", format!("/proc/{pid}"))? {
        Some((path, Unfit::Foreign)) => Err(RestoreError::ForeignFile { id, path }.into()),
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
    /// Opening it takes this capability, which the process cannot have.
    Takes(&'static str),
}

/// The first file or directory that the process `root`, or one below it, has open, mapped, or for its root, and that
/// is in none of its mounts, or could not be opened by it. Descriptors of pipes, sockets, terminals and devices may be
/// the runtime's.
///
/// # Errors
/// `/proc` cannot be read.
fn unfit(root: i32) -> io::Result<Option<(PathBuf, Unfit)>> {
    for pid in descendants::tree(root)? {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let mounts = match mounts(&proc) {
            // A zombie is in no mount namespace.
            Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => continue,
            mounts => unless_gone(mounts)?,
        };
        let Some(mounts) = mounts else {
            continue;
        };
        let Some(bounds) = unless_gone(privileged_files::attainable(&proc))? else {
            continue;
        };
        for link in links(&proc)? {
            let found = unless_gone(look_at(&link, &proc, &mounts, bounds))?.flatten();
            if let Some(unfit) = found {
                return fs::read_link(&link).map(|path| Some((path, unfit)));
            }
        }
    }
    Ok(None)
}

fn mounts(proc: &Path) -> io::Result<BTreeSet<u64>> {
    let text = fs::read(proc.join("mountinfo"))?;
    let lines = text.split(|byte| *byte == b'\n');
    let ids = lines.filter_map(|line| line.split(|byte| *byte == b' ').next());
    Ok(ids
        .filter_map(|id| std::str::from_utf8(id).ok()?.parse().ok())
        .collect())
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

/// What is wrong with the file that a link of the process at `proc` leads to.
fn look_at(
    link: &Path,
    proc: &Path,
    mounts: &BTreeSet<u64>,
    bounds: u64,
) -> io::Result<Option<Unfit>> {
    let target = fs::read_link(link)?;
    let bytes = target.as_os_str().as_bytes();
    if !bytes.starts_with(b"/") || OF_KERNEL.iter().any(|it| bytes.starts_with(it)) {
        return Ok(None);
    }
    let found = fs::metadata(link)?;
    let is_device = found.file_type().is_char_device();
    if !found.is_file() && !found.is_dir() && !is_device {
        return Ok(None);
    }
    if !is_device && is_foreign(link, proc, mounts)? {
        return Ok(Some(Unfit::Foreign));
    }
    let needed = privileged_files::taken_to_open(link, &target, &found)?;
    let lacking = needed.filter(|needed| bounds & needed.bit == 0);
    Ok(lacking.map(|needed| Unfit::Takes(needed.name)))
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
        let link = proc.join(format!("fd/{}", file.as_raw_fd()));
        let own = mounts(proc).unwrap();
        let none = BTreeSet::new();
        let look_at = |link: &Path, mounts| look_at(link, proc, mounts, 0).unwrap();
        assert_eq!(look_at(&link, &own), None);
        assert_eq!(look_at(&link, &none), Some(Unfit::Foreign));
        let exe = proc.join("exe");
        assert_eq!(look_at(&exe, &none), Some(Unfit::Foreign));
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        let pipe = proc.join(format!("fd/{}", pipe.as_raw_fd()));
        assert_eq!(look_at(&pipe, &none), None);
    }
}
