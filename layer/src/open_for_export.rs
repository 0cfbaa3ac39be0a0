//! Opens what an export reads.

use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, fstat};

use crate::export_error::ExportError;
use crate::inode_attributes::{InodeAttributes, InodeType};

/// Opens a regular file of a directory that is in use. What is something else by now is not opened at all: that alone does
/// something with some devices (a watchdog, a tape).
pub(crate) fn open_regular(directory: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, ExportError> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let failed = |errno| ExportError::io("open", name, errno);
    let found = openat(directory, name, flags, Mode::empty()).map_err(failed)?;
    let attributes = InodeAttributes::from(fstat(&found).map_err(failed)?);
    if attributes.inode_type != InodeType::Regular {
        return Err(ExportError::changed(name));
    }
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let opened = match open(path.as_str(), flags | OFlag::O_NOATIME, Mode::empty()) {
        Err(Errno::EPERM) => open(path.as_str(), flags, Mode::empty()),
        opened => opened,
    };
    opened.map_err(failed)
}

/// Opens a name of the upperdir for reading without following it or waiting for it.
///
/// `O_NOATIME` keeps the export from changing what it reads; the kernel grants it to the owner and to
/// root in the file system's user namespace, others do without.
pub(crate) fn open_for_export(
    directory: BorrowedFd<'_>,
    name: &[u8],
    path: &[u8],
    extra: OFlag,
) -> Result<OwnedFd, ExportError> {
    let flags = OFlag::O_RDONLY
        | OFlag::O_NOFOLLOW
        | OFlag::O_NONBLOCK
        | OFlag::O_NOCTTY
        | OFlag::O_CLOEXEC
        | extra;
    let opened = match openat(directory, name, flags | OFlag::O_NOATIME, Mode::empty()) {
        Err(Errno::EPERM) => openat(directory, name, flags, Mode::empty()),
        opened => opened,
    };
    opened.map_err(|errno| match errno {
        // The directory told another type a moment ago.
        Errno::ENOENT | Errno::ELOOP | Errno::ENOTDIR | Errno::ENXIO => ExportError::changed(path),
        errno => ExportError::io("open", path, errno),
    })
}
