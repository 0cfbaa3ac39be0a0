//! Overlay's private marks on the inodes of a layer, and which attributes belong to them.
//!
//! Linux, `Documentation/filesystems/overlayfs.rst` and `fs/overlayfs/overlayfs.h`; `P` is
//! `trusted.overlay.`, or `user.overlay.` when mounted with `userxattr`:
//!
//! ```text
//! char device 0:0            whiteout: the name is deleted
//! P opaque = "y"  on a dir   nothing of the layers below shows through
//! P opaque = "x"  on a dir   merged as ever, but listed with care: may hold xattr whiteouts (6.7)
//! P whiteout on an empty     whiteout (since 6.7); how a nested overlay's whiteout reaches the disk.
//!   regular file               6.18 takes it as one in every directory, with "x" or without
//! P redirect = "/a" | "b"    directory was renamed (redirect_dir=on), or file data lies there
//! P metacopy                 only the attributes were copied up; the data is in a lower layer
//! P origin                   file handle of the lower inode this one was copied up from
//! P nlink                    link count bookkeeping of index=on
//! P protattr                 inode flags (chattr +i, +a) that overlay shows but does not set
//! P overlay.*                an attribute `P*` that a program set through the mount (since 6.7)
//! ```

use std::io;

use crate::xattrs::{Xattr, XattrHolder, XattrReader};

/// Where an overlay keeps its marks, decided by how it is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OverlayXattrs {
    /// `trusted.overlay.*`: every overlay mounted by root, so every one that containerd mounts
    /// outside of a user namespace.
    #[default]
    Trusted,
    /// `user.overlay.*`: mounted with `userxattr` (rootless).
    User,
}

const TRUSTED: &[u8] = b"trusted.overlay.";
const USER: &[u8] = b"user.overlay.";
/// What the kernel puts behind the prefix of an attribute that a program has set.
const ESCAPED: &[u8] = b"overlay.";

impl OverlayXattrs {
    fn prefix(self) -> &'static [u8] {
        match self {
            OverlayXattrs::Trusted => TRUSTED,
            OverlayXattrs::User => USER,
        }
    }

    /// Name of the attribute that makes an empty file a whiteout.
    pub(crate) fn whiteout_name(self) -> &'static [u8] {
        match self {
            OverlayXattrs::Trusted => b"trusted.overlay.whiteout",
            OverlayXattrs::User => b"user.overlay.whiteout",
        }
    }

    /// Name of the attribute that makes a directory opaque with value `y`.
    pub(crate) fn opaque_name(self) -> &'static [u8] {
        match self {
            OverlayXattrs::Trusted => b"trusted.overlay.opaque",
            OverlayXattrs::User => b"user.overlay.opaque",
        }
    }
}

/// Whether an attribute belongs to an overlay rather than to its files: such a one never leaves a node and
/// is never taken from a layer, where it could redirect a directory anywhere.
///
/// `user.overlay.*` under a mount with `trusted.` marks are attributes like any other; so are those that a
/// program set through the mount, which the kernel keeps as `<prefix>overlay.*`. `trusted.overlay.*` stays
/// overlay's under either way of mounting: the next mount of the same directory may be the other one.
pub(crate) fn is_overlay_private(namespace: OverlayXattrs, name: &[u8]) -> bool {
    let mark = match namespace {
        OverlayXattrs::Trusted => name.strip_prefix(TRUSTED),
        OverlayXattrs::User => name.strip_prefix(USER).or(name.strip_prefix(TRUSTED)),
    };
    mark.is_some_and(|mark| !mark.starts_with(ESCAPED))
}

/// Whether an attribute is worth something only on this host: the SELinux label that the mount
/// gives (container labels carry categories of one container), and the EVM hash keyed to the host.
pub(crate) fn is_host_bound(name: &[u8]) -> bool {
    name == b"security.selinux" || name == b"security.evm"
}

/// What overlay's attributes say of one inode.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct OverlayMarks {
    pub(crate) opaque: bool,
    pub(crate) xattr_whiteout: bool,
    pub(crate) redirect: Option<Vec<u8>>,
    pub(crate) metacopy: bool,
    pub(crate) copied_up: bool,
    pub(crate) indexed_links: bool,
    pub(crate) inode_flags: bool,
    /// Attributes that look like overlay's and are none that is known, so they cannot be carried.
    pub(crate) uncarried: u64,
}

impl OverlayMarks {
    fn take(&mut self, namespace: OverlayXattrs, name: &[u8], value: &[u8]) {
        let Some(mark) = name.strip_prefix(namespace.prefix()) else {
            self.uncarried += 1;
            return;
        };
        match mark {
            b"opaque" => self.opaque = value == b"y",
            b"whiteout" => self.xattr_whiteout = true,
            b"redirect" => self.redirect = Some(value.to_vec()),
            b"metacopy" => self.metacopy = true,
            b"origin" => self.copied_up = true,
            b"nlink" => self.indexed_links = true,
            b"protattr" => self.inode_flags = true,
            b"impure" | b"uuid" | b"upper" => {}
            _ => self.uncarried += 1,
        }
    }
}

/// Reads all attributes of an inode, sorted apart: overlay's marks, and those that a program sees.
/// `xattrs` is cleared and then filled, sorted by name.
pub(crate) fn read_marks_and_xattrs(
    reader: &mut XattrReader,
    holder: XattrHolder<'_>,
    namespace: OverlayXattrs,
    xattrs: &mut Vec<Xattr>,
) -> io::Result<OverlayMarks> {
    let mut marks = OverlayMarks::default();
    xattrs.clear();
    let is_wanted = |name: &[u8]| {
        if is_overlay_private(namespace, name) {
            // Of the others the presence says it all; `origin` is on nearly every file.
            name.ends_with(b".opaque") || name.ends_with(b".redirect")
        } else {
            !is_host_bound(name)
        }
    };
    reader.for_each(holder, is_wanted, |name, value| {
        if is_overlay_private(namespace, name) {
            marks.take(namespace, name, value);
        } else if !is_host_bound(name) {
            xattrs.push(Xattr {
                name: name.to_vec(),
                value: value.to_vec(),
            });
        }
    })?;
    xattrs.sort_unstable();
    Ok(marks)
}
