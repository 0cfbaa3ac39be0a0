//! A directory that takes contents of files before their layer comes. It may lie in a volume, beside somebody who works
//! there: it is known by its descriptor alone, as a link can take the place of its name at any time.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, mkdirat};
use nix::sys::statvfs::{Statvfs, fstatvfs};

/// An open directory for contents.
#[derive(Debug)]
pub struct ContentsDir {
    path: PathBuf,
    dir: OwnedFd,
}

impl ContentsDir {
    /// Makes it, 0700.
    ///
    /// # Errors
    /// There is one of this name, or a system call failed.
    pub fn make(parent: &Path, name: &str) -> io::Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let above = open(parent, flags, Mode::empty())?;
        mkdirat(&above, name, Mode::S_IRWXU)?;
        Ok(Self {
            path: parent.join(name),
            dir: openat(&above, name, flags, Mode::empty())?,
        })
    }

    /// Where it was made.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a file in it, 0600, never through a link and never over another.
    pub(super) fn make_file(&self, name: &str) -> io::Result<File> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let made = openat(&self.dir, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
        Ok(made.into())
    }

    /// Bytes that are free there.
    pub(super) fn free_bytes(&self) -> io::Result<u64> {
        Ok(free_of(&fstatvfs(&self.dir)?))
    }
}

/// Bytes of a file system that are free to everybody.
pub(super) fn free_of(stat: &Statvfs) -> u64 {
    stat.blocks_available().saturating_mul(stat.fragment_size())
}
