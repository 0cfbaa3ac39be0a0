//! Opens what an export reads.

use std::os::fd::{BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::export_error::ExportError;

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
