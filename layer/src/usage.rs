//! How much an upperdir takes, counted as containerd's overlayfs snapshotter counts.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, open};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};

use crate::directory_names::{DirectoryNames, Given, KEPT_PIECES};
use crate::directory_stack::{DIRECTORY_FLAGS, DirectoryStack, open_directory};
use crate::inode_attributes::InodeAttributes;

/// What a tree takes on its file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Inodes, the root's included; a file with several names counts once.
    pub inodes: u64,
    /// Bytes allocated (512 for each of `st_blocks`).
    pub size: u64,
}

/// Why a tree could not be counted.
#[derive(Debug, thiserror::Error)]
#[error("cannot count what {path} takes")]
pub struct UsageError {
    /// The tree or the place in it.
    pub path: PathBuf,
    /// What the kernel said.
    pub source: io::Error,
}

/// Counts inodes and allocated bytes of a tree, as containerd reports them for an active snapshot
/// (continuity `fs.DiskUsage`). What disappears while it counts, in a running container, is left out.
///
/// # Errors
/// The first system call that fails for another reason.
pub fn upperdir_usage(dir: &Path) -> Result<Usage, UsageError> {
    let failed = |source: io::Error| UsageError {
        path: dir.to_path_buf(),
        source,
    };
    let root = open(dir, DIRECTORY_FLAGS, Mode::empty()).map_err(|errno| failed(errno.into()))?;
    count_tree(root).map_err(failed)
}

fn count_tree(root: OwnedFd) -> io::Result<Usage> {
    let mut usage = Usage::default();
    let mut linked = HashSet::new();
    let mut stack = DirectoryStack::new();
    count(&fstat(&root)?, &mut usage, &mut linked);
    enter(&mut stack, root)?;
    while let Some((fd, level)) = stack.innermost_mut() {
        let name = match level.next(fd.as_fd()) {
            // The directory itself is gone.
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => None,
            next => next?,
        };
        let Some((name, _)) = name else {
            stack.leave()?;
            continue;
        };
        let stat = match fstatat(fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => continue,
            stat => stat?,
        };
        count(&stat, &mut usage, &mut linked);
        if InodeAttributes::from(stat).is_directory() {
            match open_directory(fd, name) {
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {}
                directory => enter(&mut stack, directory?)?,
            }
        }
    }
    Ok(usage)
}

fn enter(stack: &mut DirectoryStack<DirectoryNames>, directory: OwnedFd) -> io::Result<()> {
    let identity = InodeAttributes::from(fstat(&directory)?).identity;
    let names = match DirectoryNames::begin(directory.as_fd(), Given::Stay) {
        // It was removed when it had been opened.
        Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => return Ok(()),
        names => names?,
    };
    if stack.depth() > KEPT_PIECES
        && let Some(outer) = stack.note_mut()
    {
        outer.forget();
    }
    stack.push(directory, identity, names);
    Ok(())
}

fn count(stat: &FileStat, usage: &mut Usage, linked: &mut HashSet<(u64, u64)>) {
    let attributes = InodeAttributes::from(*stat);
    // Only a file with several names can be met twice; remembering the others would cost memory
    // in proportion to the tree.
    let may_repeat = attributes.links > 1 && !attributes.is_directory();
    if may_repeat && !linked.insert(attributes.identity) {
        return;
    }
    usage.inodes += 1;
    usage.size += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
}
