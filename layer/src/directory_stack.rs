//! The open directories on the way down a tree, however deep it is.
//!
//! ```text
//! root ── a ── b ── ... ── y ── z         innermost: the place of the next system call
//! closed ....closed│ 256 open ones │
//! ```
//!
//! The outer directories are closed when there are too many, and opened again by `..` when the walk
//! comes back to them. In between somebody else may have moved one away: what `..` leads to must be the
//! same inode as before.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fstat};

use crate::inode_attributes::InodeAttributes;

/// Directories that are kept open at most: far from the usual limit of 1024 descriptors.
const MAX_OPEN_DIRECTORIES: usize = 256;

/// How a directory is opened for reading and as a place for other calls.
pub(crate) const DIRECTORY_FLAGS: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

/// Opens a directory by its name in another one, following no symlink.
pub(crate) fn open_directory(directory: impl AsFd, name: &[u8]) -> nix::Result<OwnedFd> {
    openat(directory, name, DIRECTORY_FLAGS, Mode::empty())
}

/// Why the way back up failed.
#[derive(Debug)]
pub(crate) enum LeaveError {
    /// A system call failed.
    Io(io::Error),
    /// The directory lies elsewhere than it did on the way down.
    Moved,
}

impl From<LeaveError> for io::Error {
    fn from(error: LeaveError) -> Self {
        match error {
            LeaveError::Io(error) => error,
            LeaveError::Moved => io::Error::other("a directory was moved away meanwhile"),
        }
    }
}

#[derive(Debug)]
struct Level<T> {
    /// Shared with threads that read ahead. None: closed to save descriptors.
    fd: Option<Arc<OwnedFd>>,
    identity: (u64, u64),
    note: T,
}

/// A stack of directories, each with a note of type T.
#[derive(Debug)]
pub(crate) struct DirectoryStack<T> {
    levels: Vec<Level<T>>,
}

impl<T> DirectoryStack<T> {
    pub(crate) fn new() -> Self {
        DirectoryStack { levels: Vec::new() }
    }

    /// How many directories there are, closed ones included.
    pub(crate) fn depth(&self) -> usize {
        self.levels.len()
    }

    /// Goes into a directory whose identity is known.
    pub(crate) fn push(&mut self, fd: OwnedFd, identity: (u64, u64), note: T) {
        if let Some(outer) = self.levels.len().checked_sub(MAX_OPEN_DIRECTORIES) {
            self.levels[outer].fd = None;
        }
        self.levels.push(Level {
            fd: Some(Arc::new(fd)),
            identity,
            note,
        });
    }

    /// The innermost directory; None when the stack is empty.
    pub(crate) fn innermost(&self) -> Option<&Arc<OwnedFd>> {
        let level = self.levels.last()?;
        Some(
            level
                .fd
                .as_ref()
                .expect("the innermost directory is open: `leave` opens it again"),
        )
    }

    /// The descriptor of the innermost directory of a stack that is not empty.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.innermost()
            .expect("the stack has a directory until the walk is over")
            .as_fd()
    }

    /// The note of the innermost directory.
    pub(crate) fn note(&self) -> Option<&T> {
        self.levels.last().map(|level| &level.note)
    }

    /// The same, to change it.
    pub(crate) fn note_mut(&mut self) -> Option<&mut T> {
        self.levels.last_mut().map(|level| &mut level.note)
    }

    /// Descriptor and note of the innermost directory.
    pub(crate) fn innermost_mut(&mut self) -> Option<(&Arc<OwnedFd>, &mut T)> {
        let level = self.levels.last_mut()?;
        let fd = level.fd.as_ref();
        let fd = fd.expect("the innermost directory is open: `leave` opens it again");
        Some((fd, &mut level.note))
    }

    /// Takes the innermost directory off, whose note the caller is done with, and opens the one
    /// above it if it was closed.
    pub(crate) fn leave(&mut self) -> Result<(), LeaveError> {
        let left = self.levels.pop();
        let (Some(left), Some(outer)) = (left.and_then(|left| left.fd), self.levels.last_mut())
        else {
            return Ok(());
        };
        if outer.fd.is_none() {
            let failed = |errno: nix::errno::Errno| LeaveError::Io(errno.into());
            let reopened = open_directory(&left, b"..").map_err(failed)?;
            let now = InodeAttributes::from(fstat(&reopened).map_err(failed)?);
            if now.identity != outer.identity {
                return Err(LeaveError::Moved);
            }
            outer.fd = Some(Arc::new(reopened));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::mkdirat;

    fn descend(stack: &mut DirectoryStack<usize>, levels: usize) {
        for _ in 0..levels {
            mkdirat(stack.fd(), c"d", Mode::S_IRWXU).unwrap();
            push(stack, b"d");
        }
    }

    fn push(stack: &mut DirectoryStack<usize>, name: &[u8]) {
        let fd = open_directory(stack.fd(), name).unwrap();
        let identity = InodeAttributes::from(fstat(&fd).unwrap()).identity;
        stack.push(fd, identity, stack.depth());
    }

    fn at(dir: &std::path::Path) -> DirectoryStack<usize> {
        let fd = nix::fcntl::open(dir, DIRECTORY_FLAGS, Mode::empty()).unwrap();
        let identity = InodeAttributes::from(fstat(&fd).unwrap()).identity;
        let mut stack = DirectoryStack::new();
        stack.push(fd, identity, 0);
        stack
    }

    #[test]
    fn outer_directories_are_closed_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut stack = at(dir.path());
        descend(&mut stack, 1000);
        let open = stack.levels.iter().filter(|level| level.fd.is_some());
        assert_eq!(open.count(), MAX_OPEN_DIRECTORIES);
        while stack.depth() > 1 {
            assert_eq!(stack.note(), Some(&(stack.depth() - 1)));
            stack.leave().unwrap();
        }
        let identity = InodeAttributes::from(fstat(stack.fd()).unwrap()).identity;
        assert_eq!(identity, stack.levels[0].identity);
    }

    #[test]
    fn a_directory_that_was_moved_away_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("tree")).unwrap();
        let mut stack = at(&dir.path().join("tree"));
        descend(&mut stack, MAX_OPEN_DIRECTORIES);
        std::fs::rename(dir.path().join("tree/d"), dir.path().join("away")).unwrap();
        while stack.depth() > 2 {
            stack.leave().unwrap();
        }
        assert!(matches!(stack.leave(), Err(LeaveError::Moved)));
    }
}
