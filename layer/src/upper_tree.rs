//! The upperdir while a layer is being imported into it.
//!
//! A stack of open directories leads to the place of the current entry; every system call names one
//! component below the innermost. Components are opened with `O_NOFOLLOW` and are never `..`, so no
//! entry leaves the tree, whatever symlinks earlier entries made.
//!
//! A directory gets its times, and its default ACL, when the stack leaves it: each file made inside
//! would change the times, and would inherit the ACL. When a tar comes back to a directory that was
//! left, both are read from the disk and put back afterwards, so nothing is remembered per directory
//! and memory does not grow with the layer.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, fchmod, fstat, fstatat, futimens, mkdirat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchown};

use crate::import_error::ImportError;
use crate::inode_attributes::{InodeAttributes, Timestamp};
use crate::lower_view::{LowerInode, LowerView};
use crate::overlay_marks::{
    OverlayXattrs, is_host_bound, is_overlay_private, read_marks_and_xattrs,
};
use crate::overlay_stack::OverlayStack;
use crate::path_bytes::components;
use crate::remove_tree::{remove_name, remove_whiteouts};
use crate::xattrs::{Xattr, XattrHolder, XattrReader, remove_xattr, set_xattr};

/// Directories that are kept open at most; in a deeper tree the outer ones are closed and found
/// again through `..`.
const MAX_OPEN_DIRECTORIES: usize = 256;
/// Deepest nesting that is accepted: what the stack may grow to. Far above any path that can be named
/// in one system call (2 048 levels).
const MAX_DEPTH: usize = 65_536;

const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";

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

#[derive(Debug)]
struct OpenDirectory {
    fd: Option<OwnedFd>,
    identity: (u64, u64),
    mtime: Timestamp,
    atime: Timestamp,
    default_acl: Option<Vec<u8>>,
    /// Nothing of the lower layers shows through here.
    hides_lower: bool,
}

/// What was done on the way.
#[derive(Debug, Default)]
pub(crate) struct TreeCounts {
    pub(crate) implied_directories: u64,
    pub(crate) dropped_xattrs: u64,
    pub(crate) unsupported_xattrs: u64,
    pub(crate) whiteouts_made: u64,
}

#[derive(Debug)]
pub(crate) struct UpperTree {
    root: OwnedFd,
    names: Vec<Vec<u8>>,
    directories: Vec<OpenDirectory>,
    pub(crate) lower: LowerView,
    namespace: OverlayXattrs,
    has_idmapped_lowers: bool,
    skip_unsupported_xattrs: bool,
    pub(crate) xattr_reader: XattrReader,
    pub(crate) counts: TreeCounts,
}

impl UpperTree {
    pub(crate) fn open(
        stack: &OverlayStack,
        lower: LowerView,
        skip_unsupported_xattrs: bool,
    ) -> Result<Self, ImportError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = open(&stack.top, flags, Mode::empty()).map_err(|errno| ImportError::Io {
            act: "open",
            path: stack.top.clone(),
            source: errno.into(),
        })?;
        let again = root
            .try_clone()
            .map_err(|error| ImportError::io("open", b"", error))?;
        let mut tree = UpperTree {
            root: again,
            names: Vec::new(),
            directories: Vec::new(),
            lower,
            namespace: stack.overlay_xattrs,
            has_idmapped_lowers: stack.has_idmapped_lowers,
            skip_unsupported_xattrs,
            xattr_reader: XattrReader::new(),
            counts: TreeCounts::default(),
        };
        tree.push_existing(root, b"")?;
        // Overlay never looks at `opaque` on the root.
        tree.innermost_mut().hides_lower = false;
        Ok(tree)
    }

    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// The directory that `enter` led to.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        let innermost = self
            .directories
            .last()
            .and_then(|directory| directory.fd.as_ref());
        innermost.expect("the innermost directory is open").as_fd()
    }

    fn innermost_mut(&mut self) -> &mut OpenDirectory {
        self.directories
            .last_mut()
            .expect("the root stays on the stack until the end")
    }

    /// What the lower layers show at `path` in the directory that `enter` led to.
    pub(crate) fn look_below<'a>(
        &'a mut self,
        path: &'a [u8],
    ) -> Result<Option<LowerInode<'a>>, ImportError> {
        if self
            .directories
            .last()
            .is_none_or(|directory| directory.hides_lower)
        {
            return Ok(None);
        }
        Ok(self.lower.look_up(path)?)
    }

    /// The same, when its owner is to be copied into the upperdir.
    pub(crate) fn look_below_to_copy<'a>(
        &'a mut self,
        path: &'a [u8],
    ) -> Result<Option<LowerInode<'a>>, ImportError> {
        let is_idmapped = self.has_idmapped_lowers;
        match self.look_below(path)? {
            Some(_) if is_idmapped => Err(ImportError::refused(
                path,
                "it needs the owner that a lower layer shows through an id mapping",
            )),
            below => Ok(below),
        }
    }

    /// Goes to a directory, making what does not exist: like the lower layer's, or else plain.
    pub(crate) fn enter(&mut self, path: &[u8]) -> Result<(), ImportError> {
        let shared = components(path)
            .zip(&self.names)
            .take_while(|(wanted, open)| *wanted == open.as_slice())
            .count();
        while self.names.len() > shared {
            self.leave()?;
        }
        // Where the component that is being entered ends in `path`.
        let mut end = components(path)
            .take(shared)
            .map(|name| name.len() + 1)
            .sum::<usize>();
        for name in components(path).skip(shared) {
            end += name.len();
            self.enter_name(name, &path[..end])?;
            end += 1;
        }
        Ok(())
    }

    fn enter_name(&mut self, name: &[u8], path: &[u8]) -> Result<(), ImportError> {
        match openat(self.directory(), name, directory_flags(), Mode::empty()) {
            Ok(fd) => {
                self.push_existing(fd, name)?;
                return Ok(());
            }
            Err(Errno::ENOENT) => {}
            Err(Errno::ENOTDIR | Errno::ELOOP) => {
                if !self
                    .stat_name(name, path)?
                    .is_some_and(|inode| inode.is_whiteout_device())
                {
                    return Err(ImportError::refused(
                        path,
                        "other entries lie below it, and it is no directory",
                    ));
                }
            }
            Err(errno) => return Err(ImportError::io("open", path, errno)),
        }
        self.counts.implied_directories += 1;
        let mut xattrs = Vec::new();
        let below = match self.look_below_to_copy(path)? {
            Some(inode) if inode.attributes.is_directory() => {
                let (attributes, directory) = (inode.attributes, inode.directory());
                let mut reader = XattrReader::new();
                let fd = openat(directory, name, directory_flags(), Mode::empty())
                    .map_err(|errno| ImportError::io("open", path, errno))?;
                let holder = XattrHolder::Open(fd.as_fd());
                read_marks_and_xattrs(&mut reader, holder, OverlayXattrs::default(), &mut xattrs)
                    .map_err(|error| ImportError::io("read the attributes of", path, error))?;
                Some(attributes)
            }
            _ => None,
        };
        let wanted = WantedAttributes {
            mode: below.map_or(0o755, |inode| inode.mode),
            uid: below.map_or(0, |inode| inode.uid),
            gid: below.map_or(0, |inode| inode.gid),
            mtime: below.map_or(Timestamp::default(), |inode| inode.mtime),
            atime: below.map_or(Timestamp::default(), |inode| inode.atime),
            xattrs: &xattrs,
        };
        self.make_directory(name, path, wanted)
    }

    /// Makes a directory in the current one, or takes the one that is there, gives it its attributes
    /// and enters it.
    pub(crate) fn make_directory(
        &mut self,
        name: &[u8],
        path: &[u8],
        wanted: WantedAttributes<'_>,
    ) -> Result<(), ImportError> {
        let mut was_whiteout = false;
        let mut is_new = true;
        loop {
            match mkdirat(self.directory(), name, creation_mode(wanted.mode)) {
                Ok(()) => break,
                Err(Errno::EEXIST) => {}
                Err(errno) => return Err(ImportError::io("make the directory", path, errno)),
            }
            match self.stat_name(name, path)? {
                Some(inode) if inode.is_directory() => {
                    is_new = false;
                    break;
                }
                Some(inode) => {
                    was_whiteout |= inode.is_whiteout_device();
                    self.remove(name, path)?;
                }
                None => {}
            }
        }
        let fd = openat(self.directory(), name, directory_flags(), Mode::empty())
            .map_err(|errno| ImportError::io("open", path, errno))?;
        self.push_existing(fd, name)?;
        if was_whiteout {
            // Deleted, then made anew: nothing of the old one shows through.
            self.set_opaque(path, false)?;
        }
        self.set_directory_attributes(path, wanted, is_new)
    }

    /// Gives the current directory its attributes; times and default ACL come when it is left.
    pub(crate) fn set_directory_attributes(
        &mut self,
        path: &[u8],
        wanted: WantedAttributes<'_>,
        is_new: bool,
    ) -> Result<(), ImportError> {
        if !is_new {
            self.remove_other_xattrs(path, wanted.xattrs)?;
        }
        let default_acl = wanted
            .xattrs
            .iter()
            .rfind(|xattr| xattr.name == DEFAULT_ACL);
        let innermost = self.innermost_mut();
        innermost.default_acl = default_acl.map(|xattr| xattr.value.clone());
        innermost.mtime = wanted.mtime;
        innermost.atime = wanted.atime;
        let fd = innermost
            .fd
            .take()
            .expect("the innermost directory is open");
        let set = self.set_open_attributes(fd.as_fd(), path, wanted);
        self.innermost_mut().fd = Some(fd);
        set
    }

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
            fchown(
                fd,
                Some(Uid::from_raw(wanted.uid)),
                Some(Gid::from_raw(wanted.gid)),
            )
            .map_err(|errno| ImportError::io("change the owner of", path, errno))?;
        }
        if !is_owner_right || made.mode != wanted.mode {
            fchmod(fd, Mode::from_bits_truncate(wanted.mode))
                .map_err(|errno| ImportError::io("change the mode of", path, errno))?;
        }
        self.set_xattrs(XattrHolder::Open(fd), path, wanted.xattrs)
    }

    pub(crate) fn set_xattrs(
        &mut self,
        holder: XattrHolder<'_>,
        path: &[u8],
        xattrs: &[Xattr],
    ) -> Result<(), ImportError> {
        for xattr in xattrs {
            if is_overlay_private(&xattr.name) {
                self.counts.dropped_xattrs += 1;
                continue;
            }
            if xattr.name != DEFAULT_ACL {
                self.set_one_xattr(holder, path, &xattr.name, &xattr.value)?;
            }
        }
        Ok(())
    }

    fn set_one_xattr(
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

    fn remove_other_xattrs(&mut self, path: &[u8], kept: &[Xattr]) -> Result<(), ImportError> {
        let mut stale = Vec::new();
        let fd = self
            .directories
            .last()
            .and_then(|directory| directory.fd.as_ref());
        let fd = fd.expect("the innermost directory is open").as_fd();
        self.xattr_reader
            .for_each(
                XattrHolder::Open(fd),
                |_| false,
                |name, _| {
                    let is_kept = kept.iter().any(|xattr| xattr.name == name);
                    if !is_kept && !is_overlay_private(name) && !is_host_bound(name) {
                        stale.push(name.to_vec());
                    }
                },
            )
            .map_err(|error| ImportError::io("read the attributes of", path, error))?;
        for name in stale {
            remove_xattr(fd, &name)
                .map_err(|error| ImportError::io("remove an attribute of", path, error))?;
        }
        Ok(())
    }

    /// Makes the current directory hide the lower layers. `may_hold_whiteouts`: it is not new.
    pub(crate) fn set_opaque(
        &mut self,
        path: &[u8],
        may_hold_whiteouts: bool,
    ) -> Result<(), ImportError> {
        let fd = self.directory();
        set_xattr(XattrHolder::Open(fd), self.namespace.opaque_name(), b"y")
            .map_err(|error| ImportError::io("make opaque", path, error))?;
        // Overlay lists a directory with nothing below it as it is: a whiteout in it would show as
        // a name that cannot be opened.
        if may_hold_whiteouts && self.counts.whiteouts_made > 0 {
            remove_whiteouts(fd)
                .map_err(|error| ImportError::io("remove whiteouts from", path, error))?;
        }
        self.innermost_mut().hides_lower = true;
        Ok(())
    }

    /// Attributes of a name in the current directory.
    pub(crate) fn stat_name(
        &self,
        name: &[u8],
        path: &[u8],
    ) -> Result<Option<InodeAttributes>, ImportError> {
        match fstatat(self.directory(), name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat.into())),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(ImportError::io("stat", path, errno)),
        }
    }

    /// Removes a name from the current directory, with all below it.
    pub(crate) fn remove(&self, name: &[u8], path: &[u8]) -> Result<(), ImportError> {
        remove_name(self.directory(), name).map_err(|error| ImportError::io("replace", path, error))
    }

    /// Puts a directory on the stack with the times and the default ACL that it has on the disk.
    fn push_existing(&mut self, fd: OwnedFd, name: &[u8]) -> Result<(), ImportError> {
        let path = name;
        if self.directories.len() >= MAX_DEPTH {
            return Err(ImportError::refused(path, "it lies too deep"));
        }
        let stat: FileStat = fstat(&fd).map_err(|errno| ImportError::io("stat", path, errno))?;
        let attributes = InodeAttributes::from(stat);
        let unreadable = |error| ImportError::io("read the attributes of", path, error);
        let holder = XattrHolder::Open(fd.as_fd());
        let opaque_name = self.namespace.opaque_name();
        let opaque = self
            .xattr_reader
            .value(holder, opaque_name)
            .map_err(unreadable)?;
        let is_opaque = opaque == Some(b"y");
        let default_acl = self
            .xattr_reader
            .value(holder, DEFAULT_ACL)
            .map_err(unreadable)?;
        let default_acl = default_acl.map(<[u8]>::to_vec);
        if default_acl.is_some() {
            remove_xattr(fd.as_fd(), DEFAULT_ACL)
                .map_err(|error| ImportError::io("remove an attribute of", path, error))?;
        }
        let outer_hides = self
            .directories
            .last()
            .is_some_and(|outer| outer.hides_lower);
        if self.directories.len() >= MAX_OPEN_DIRECTORIES {
            let outer = self.directories.len() - MAX_OPEN_DIRECTORIES;
            self.directories[outer].fd = None;
        }
        if !self.directories.is_empty() {
            self.names.push(name.to_vec());
        }
        self.directories.push(OpenDirectory {
            fd: Some(fd),
            identity: attributes.identity,
            mtime: attributes.mtime,
            atime: attributes.atime,
            default_acl,
            hides_lower: outer_hides || is_opaque,
        });
        Ok(())
    }

    /// Gives the innermost directory its default ACL and its times and takes it off the stack.
    fn leave(&mut self) -> Result<(), ImportError> {
        let name = self.names.pop().unwrap_or_default();
        let Some(left) = self.directories.pop() else {
            return Ok(());
        };
        let fd = left.fd.expect("the innermost directory is open");
        if let Some(acl) = &left.default_acl {
            self.set_one_xattr(XattrHolder::Open(fd.as_fd()), &name, DEFAULT_ACL, acl)?;
        }
        set_open_times(fd.as_fd(), &name, left.atime, left.mtime)?;
        if let Some(outer) = self
            .directories
            .last_mut()
            .filter(|outer| outer.fd.is_none())
        {
            let reopened = openat(&fd, c"..", directory_flags(), Mode::empty())
                .map_err(|errno| ImportError::io("open the parent of", &name, errno))?;
            let now = fstat(&reopened).map_err(|errno| ImportError::io("stat", &name, errno))?;
            if InodeAttributes::from(now).identity != outer.identity {
                return Err(ImportError::refused(
                    &name,
                    "its directory was moved meanwhile",
                ));
            }
            outer.fd = Some(reopened);
        }
        Ok(())
    }

    /// Leaves all directories. Nothing may be imported after it.
    pub(crate) fn finish(&mut self) -> Result<(), ImportError> {
        while !self.directories.is_empty() {
            self.leave()?;
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
    futimens(fd, &time_spec(atime), &time_spec(mtime))
        .map_err(|errno| ImportError::io("set the times of", path, errno))
}

pub(crate) fn time_spec(time: Timestamp) -> TimeSpec {
    TimeSpec::new(time.secs, i64::from(time.nanos))
}

/// The mode to create with: what is wanted, as far as the umask lets it; the rest is set afterwards.
pub(crate) fn creation_mode(wanted: u32) -> Mode {
    Mode::from_bits_truncate(wanted & 0o777)
}

fn directory_flags() -> OFlag {
    OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC
}
