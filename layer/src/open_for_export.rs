//! Opens what an export reads, of a directory that a container may be writing to.

use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, fstat};

use crate::directory_stack::DIRECTORY_FLAGS;
use crate::export_error::ExportError;
use crate::inode_attributes::{InodeAttributes, InodeType};

/// Opens what was a regular file a moment ago, without following it or waiting for it.
pub(crate) fn open_file(
    directory: BorrowedFd<'_>,
    name: &[u8],
    path: &[u8],
    in_use: bool,
) -> Result<OwnedFd, ExportError> {
    if in_use {
        return open_regular(directory, name, path);
    }
    let flags = OFlag::O_RDONLY
        | OFlag::O_NOFOLLOW
        | OFlag::O_NONBLOCK
        | OFlag::O_NOCTTY
        | OFlag::O_CLOEXEC;
    let open = |flags| openat(directory, name, flags, Mode::empty());
    without_time(flags, open).map_err(|errno| failed_to_open(path, errno))
}

/// Opens a regular file of a directory that is in use. What is something else by now is not opened at all: that alone does
/// something with some devices (a watchdog, a tape), whatever the flags, and a container can make every device that it may
/// not open. It takes three calls in the place of one.
pub(crate) fn open_regular(
    directory: BorrowedFd<'_>,
    name: &[u8],
    path: &[u8],
) -> Result<OwnedFd, ExportError> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let failed = |errno| failed_to_open(path, errno);
    let found = openat(directory, name, flags, Mode::empty()).map_err(failed)?;
    let attributes = InodeAttributes::from(fstat(&found).map_err(failed)?);
    if attributes.inode_type != InodeType::Regular {
        return Err(ExportError::changed(path));
    }
    let found = format!("/proc/self/fd/{}", found.as_raw_fd());
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    // It is regular: whatever keeps it from being opened is no change of its type.
    without_time(flags, |flags| open(found.as_str(), flags, Mode::empty()))
        .map_err(|errno| ExportError::io("open", path, errno))
}

/// Opens a directory, and nothing else: the kernel looks at that before it opens anything.
pub(crate) fn open_listed(
    directory: BorrowedFd<'_>,
    name: &[u8],
    path: &[u8],
) -> Result<OwnedFd, ExportError> {
    let open = |flags| openat(directory, name, flags, Mode::empty());
    without_time(DIRECTORY_FLAGS, open).map_err(|errno| failed_to_open(path, errno))
}

/// `O_NOATIME` keeps the export from changing what it reads; the kernel grants it to the owner and to
/// root in the file system's user namespace, others do without.
fn without_time(
    flags: OFlag,
    open: impl Fn(OFlag) -> nix::Result<OwnedFd>,
) -> nix::Result<OwnedFd> {
    match open(flags | OFlag::O_NOATIME) {
        Err(Errno::EPERM) => open(flags),
        opened => opened,
    }
}

fn failed_to_open(path: &[u8], errno: Errno) -> ExportError {
    match errno {
        // The directory told another type a moment ago.
        Errno::ENOENT | Errno::ELOOP | Errno::ENOTDIR | Errno::ENXIO => ExportError::changed(path),
        errno => ExportError::io("open", path, errno),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd as _;

    use nix::sys::stat::{SFlag, makedev, mknod};

    use super::*;
    use crate::overlay_tests::have_root;

    /// A device of no driver cannot be opened, which another error than that of its type tells.
    #[test]
    fn root_a_device_in_the_place_of_a_file_is_not_opened() {
        if !have_root() {
            return;
        }
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        for (name, kind, number) in [
            ("null", SFlag::S_IFCHR, makedev(1, 3)),
            ("none", SFlag::S_IFCHR, makedev(4000, 77)),
            ("disk", SFlag::S_IFBLK, makedev(4000, 77)),
            ("fifo", SFlag::S_IFIFO, 0),
        ] {
            let (path, mode) = (dir.path().join(name), Mode::S_IRUSR);
            mknod(&path, kind, mode, number).unwrap();
        }
        std::os::unix::fs::symlink("/dev/null", dir.path().join("link")).unwrap();
        std::fs::write(dir.path().join("file"), "data").unwrap();
        let directory = File::open(dir.path()).unwrap();
        let open = |name: &str| open_regular(directory.as_fd(), name.as_bytes(), b"d/f");
        for name in ["null", "none", "disk", "fifo", "link", "gone"] {
            let error = open(name).unwrap_err();
            assert!(
                matches!(&error, ExportError::Changed { path } if path.ends_with("f")),
                "{name}: {error}"
            );
        }
        open("file").unwrap();
    }
}
