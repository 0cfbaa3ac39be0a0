//! Owner, permissions, times and extended attributes of what an import makes.
//!
//! All of them are set through a descriptor of the inode that was made, never through its name: in a
//! directory that somebody else can write to, the name may be another file by now.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat, fstat, futimens};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchown, fchownat};
use rustix::fs::{Timespec, Timestamps, utimensat};

use super::UpperTree;
use crate::import_error::ImportError;
use crate::inode_attributes::{InodeAttributes, InodeType, Timestamp};
use crate::layer_format::LayerFormat;
use crate::overlay_marks::{is_host_bound, is_overlay_private};
use crate::xattrs::{Xattr, XattrHolder, remove_xattr, set_xattr};

/// Kept back until a directory is left.
pub(crate) const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";

/// Owner, permissions, times and attributes that an inode is to have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WantedAttributes<'a> {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    pub(crate) atime: Timestamp,
    pub(crate) xattrs: &'a [Xattr],
}

impl UpperTree {
    /// Sets owner, mode and extended attributes, in the order in which none undoes another: a change
    /// of owner clears setuid and capabilities, and an ACL carries the group bits of the mode.
    ///
    /// What is right already is not set again: on ext4 a `fchown` or `fchmod` to the same costs ten
    /// times the `fstat` that tells.
    pub(crate) fn set_open_attributes(
        &mut self,
        fd: BorrowedFd<'_>,
        path: &[u8],
        wanted: WantedAttributes<'_>,
    ) -> Result<(), ImportError> {
        let stat = fstat(fd).map_err(|errno| ImportError::io("stat", path, errno))?;
        let made = InodeAttributes::from(stat);
        let is_owner_right = (made.uid, made.gid) == (wanted.uid, wanted.gid);
        if !is_owner_right {
            let (uid, gid) = (Uid::from_raw(wanted.uid), Gid::from_raw(wanted.gid));
            fchown(fd, Some(uid), Some(gid))
                .map_err(|errno| ImportError::io("change the owner of", path, errno))?;
        }
        if !is_owner_right || made.mode != wanted.mode {
            fchmod(fd, Mode::from_bits_truncate(wanted.mode))
                .map_err(|errno| ImportError::io("change the mode of", path, errno))?;
        }
        self.set_xattrs(XattrHolder::Open(fd), path, wanted.xattrs)
    }

    /// Sets all attributes of a symlink, device node or FIFO that was just made in the current
    /// directory.
    pub(crate) fn set_special_attributes(
        &mut self,
        name: &[u8],
        path: &[u8],
        (inode_type, device): (InodeType, (u64, u64)),
        wanted: WantedAttributes<'_>,
    ) -> Result<(), ImportError> {
        // A descriptor that stands for the inode and opens nothing: no device is touched, no FIFO waits.
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(self.directory(), name, flags, Mode::empty())
            .map_err(|errno| ImportError::io("open", path, errno))?;
        let stat = fstat(&fd).map_err(|errno| ImportError::io("stat", path, errno))?;
        let made = InodeAttributes::from(stat);
        // Another inode of the same type may stand there by now, made by who can make one there himself.
        if made.inode_type != inode_type || made.device != device || made.links != 1 {
            return Err(ImportError::refused(path, "somebody else has replaced it"));
        }
        let (uid, gid) = (Uid::from_raw(wanted.uid), Gid::from_raw(wanted.gid));
        fchownat(&fd, c"", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)
            .map_err(|errno| ImportError::io("change the owner of", path, errno))?;
        if inode_type != InodeType::Symlink {
            chmod_by_descriptor(fd.as_fd(), path, wanted.mode)?;
        }
        self.set_xattrs(XattrHolder::Path(fd.as_fd()), path, wanted.xattrs)?;
        set_times_by_descriptor(fd.as_fd(), path, wanted)
    }

    /// Sets the attributes that the entry of a further hard link gives its file, as containerd and Docker
    /// do. What is right already is not set again: a change of the owner, even to the same, takes
    /// capabilities away.
    pub(crate) fn set_link_attributes(
        &mut self,
        (directory, name): (impl AsFd, &[u8]),
        path: &[u8],
        linked: InodeAttributes,
        wanted: WantedAttributes<'_>,
    ) -> Result<(), ImportError> {
        let is_symlink = linked.inode_type == InodeType::Symlink;
        let is_owner_right = (linked.uid, linked.gid) == (wanted.uid, wanted.gid);
        let is_mode_right = is_symlink || linked.mode == wanted.mode;
        let are_times_right = linked.mtime == wanted.mtime;
        if is_owner_right && is_mode_right && are_times_right && wanted.xattrs.is_empty() {
            return Ok(());
        }
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(directory, name, flags, Mode::empty())
            .map_err(|errno| ImportError::io("open", path, errno))?;
        let found = fstat(&fd).map_err(|errno| ImportError::io("stat", path, errno))?;
        if InodeAttributes::from(found).identity != linked.identity {
            return Err(ImportError::refused(path, "somebody else has replaced it"));
        }
        if !is_owner_right {
            let (uid, gid) = (Uid::from_raw(wanted.uid), Gid::from_raw(wanted.gid));
            fchownat(&fd, c"", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)
                .map_err(|errno| ImportError::io("change the owner of", path, errno))?;
        }
        if !(is_symlink || is_owner_right && is_mode_right) {
            chmod_by_descriptor(fd.as_fd(), path, wanted.mode)?;
        }
        self.set_xattrs(XattrHolder::Path(fd.as_fd()), path, wanted.xattrs)?;
        set_times_by_descriptor(fd.as_fd(), path, wanted)
    }

    pub(crate) fn set_xattrs(
        &mut self,
        holder: XattrHolder<'_>,
        path: &[u8],
        xattrs: &[Xattr],
    ) -> Result<(), ImportError> {
        for xattr in xattrs {
            // containerd sets none of an image's `trusted.` attributes either: they steer file systems
            // (Lustre, Gluster) and daemons of the host.
            let is_trusted =
                self.format == LayerFormat::Image && xattr.name.starts_with(b"trusted.");
            if is_trusted || is_overlay_private(self.namespace, &xattr.name) {
                self.counts.dropped_xattrs += 1;
                continue;
            }
            if xattr.name != DEFAULT_ACL {
                self.set_one_xattr(holder, path, &xattr.name, &xattr.value)?;
            }
        }
        Ok(())
    }

    pub(crate) fn set_one_xattr(
        &mut self,
        holder: XattrHolder<'_>,
        path: &[u8],
        name: &[u8],
        value: &[u8],
    ) -> Result<(), ImportError> {
        match set_xattr(holder, name, value) {
            Ok(()) => Ok(()),
            // Not known to this file system, or (EPERM) a user attribute on a symlink or device.
            Err(error)
                if self.skip_unsupported_xattrs
                    && matches!(
                        error.kind(),
                        io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied
                    ) =>
            {
                self.counts.unsupported_xattrs += 1;
                Ok(())
            }
            Err(source) => Err(ImportError::Xattr {
                path: crate::path_bytes::to_path_buf(path),
                name: String::from_utf8_lossy(name).into_owned(),
                source,
            }),
        }
    }

    /// Removes the attributes of an open directory that its new entry does not have.
    pub(crate) fn remove_other_xattrs(
        &mut self,
        fd: BorrowedFd<'_>,
        path: &[u8],
        kept: &[Xattr],
    ) -> Result<(), ImportError> {
        let mut stale = Vec::new();
        let namespace = self.namespace;
        let holder = XattrHolder::Open(fd);
        let none_wanted = |_: &[u8]| false;
        self.xattr_reader
            .for_each(holder, none_wanted, |name, _| {
                let is_kept = kept.iter().any(|xattr| xattr.name == name);
                if !is_kept && !is_overlay_private(namespace, name) && !is_host_bound(name) {
                    stale.push(name.to_vec());
                }
            })
            .map_err(|error| ImportError::io("read the attributes of", path, error))?;
        for name in stale {
            remove_xattr(fd, &name)
                .map_err(|error| ImportError::io("remove an attribute of", path, error))?;
        }
        Ok(())
    }
}

/// Sets the times of an open file.
pub(crate) fn set_open_times(
    fd: BorrowedFd<'_>,
    path: &[u8],
    atime: Timestamp,
    mtime: Timestamp,
) -> Result<(), ImportError> {
    let time = |time: Timestamp| TimeSpec::new(time.secs, i64::from(time.nanos));
    futimens(fd, &time(atime), &time(mtime))
        .map_err(|errno| ImportError::io("set the times of", path, errno))
}

/// Sets the mode of what an `O_PATH` descriptor stands for. fchmodat2 with AT_EMPTY_PATH came with Linux 6.6;
/// this link of /proc leads to the inode of the descriptor and nowhere else.
fn chmod_by_descriptor(fd: BorrowedFd<'_>, path: &[u8], mode: u32) -> Result<(), ImportError> {
    let by_descriptor = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let mode = Mode::from_bits_truncate(mode);
    let flags = FchmodatFlags::FollowSymlink;
    fchmodat(AT_FDCWD, &*by_descriptor, mode, flags)
        .map_err(|errno| ImportError::io("change the mode of", path, errno))
}

/// Sets the times of what an `O_PATH` descriptor stands for.
fn set_times_by_descriptor(
    fd: BorrowedFd<'_>,
    path: &[u8],
    wanted: WantedAttributes<'_>,
) -> Result<(), ImportError> {
    let times = Timestamps {
        last_access: rustix_time(wanted.atime),
        last_modification: rustix_time(wanted.mtime),
    };
    utimensat(fd, c"", &times, rustix::fs::AtFlags::EMPTY_PATH)
        .map_err(|errno| ImportError::io("set the times of", path, io::Error::from(errno)))
}

fn rustix_time(time: Timestamp) -> Timespec {
    Timespec {
        tv_sec: time.secs,
        tv_nsec: time.nanos.into(),
    }
}

/// The mode to create with: what is wanted, as far as the umask lets it; the rest is set afterwards.
pub(crate) fn creation_mode(wanted: u32) -> Mode {
    Mode::from_bits_truncate(wanted & 0o777)
}
