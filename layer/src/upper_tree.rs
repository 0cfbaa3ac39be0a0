//! The upperdir while a layer is being imported into it.
//!
//! A stack of open directories leads to the place of the current entry; every system call names one
//! component below the innermost. Components are opened with `O_NOFOLLOW` and are never `..`, so no
//! entry leaves the tree, whatever symlinks earlier entries made or somebody else makes meanwhile. A
//! symlink that earlier entries have put in the way is read, and its text followed by hand as if the
//! upperdir were the root of all files, which is how containerd takes such entries:
//!
//! ```text
//! lib -> usr/lib      entry lib/x    goes to usr/lib/x
//! opt -> /srv         entry opt/x    goes to srv/x
//! up  -> ../../etc    entry up/x     goes to etc/x
//! ```
//!
//! A directory gets its times, and its default ACL, when the stack leaves it: each file made inside
//! would change the times, and would inherit the ACL. When a tar comes back to a directory that was
//! left, both are read from the disk and put back afterwards, so nothing is remembered per directory
//! and memory does not grow with the layer.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, readlinkat};
use nix::sys::stat::{Mode, fstat, fstatat, mkdirat};
use std::os::unix::ffi::OsStrExt;

use crate::directory_stack::{DirectoryStack, LeaveError, open_directory};
use crate::import_error::ImportError;
use crate::inode_attributes::{InodeAttributes, Timestamp};
use crate::layer_format::LayerFormat;
use crate::lower_view::{LowerInode, LowerView};
use crate::overlay_marks::{OverlayXattrs, read_marks_and_xattrs};
use crate::overlay_stack::OverlayStack;
use crate::path_bytes::{components, join_cleaned, push_component};
use crate::remove_tree::{remove_name, remove_whiteouts};
use crate::xattrs::{XattrHolder, XattrReader, remove_xattr, set_xattr};

mod set_attributes;

use self::set_attributes::DEFAULT_ACL;
pub(crate) use self::set_attributes::{WantedAttributes, creation_mode, set_open_times};

/// Deepest nesting that is accepted: what the stack may grow to. Far above any path that can be named
/// in one system call (2 048 levels).
const MAX_DEPTH: usize = 65_536;
/// Most bytes of default ACLs that wait for their directories to be left: an honest one has some
/// hundred bytes, Linux allows 64 KiB, and a layer can nest `MAX_DEPTH` directories.
const MAX_WAITING_ACL_BYTES: usize = 1 << 20;
/// Most bytes of names that are remembered as deleted because the layer has a file there.
const MAX_DELETED_BYTES: usize = 1 << 20;
/// Most names that are looked at below directories that become opaque, for all of a layer: each marker may have all of it looked
/// at again.
const MAX_NAMES: u64 = 20_000_000;
/// Symlinks that one name may lead through, as containerd counts them.
pub(crate) const MAX_LINKS: usize = 255;

/// What is to be done when a directory is left.
#[derive(Debug)]
struct OpenDirectory {
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

/// How far a path led without following symlinks.
enum Way {
    Whole,
    /// To a symlink: where that leads, and what of the path comes after it.
    Link(Vec<u8>, Vec<u8>),
    Blocked,
}

/// Where a step down has led.
enum Step {
    Entered,
    /// There is a symlink, with this text.
    Link(Vec<u8>),
    /// There is something else that nothing lies below.
    Blocked,
}

/// How a directory was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reached {
    /// By its own path.
    Directly,
    /// Through a symlink of the upperdir; `path` tells where it is.
    ThroughLink,
    /// Not at all: the upperdir has something on the way that is no directory and leads to none.
    Not,
}

#[derive(Debug)]
pub(crate) struct UpperTree {
    root: OwnedFd,
    names: Vec<Vec<u8>>,
    /// Of the innermost directory.
    path: Vec<u8>,
    directories: DirectoryStack<OpenDirectory>,
    waiting_acl_bytes: usize,
    pub(crate) lower: LowerView,
    pub(crate) namespace: OverlayXattrs,
    has_idmapped_lowers: bool,
    pub(crate) format: LayerFormat,
    pub(crate) skip_unsupported_xattrs: bool,
    pub(crate) xattr_reader: XattrReader,
    /// Deletions that nothing on the disk tells, because the layer has a file of the same name: a directory that comes in
    /// its place hides what the lower layers have there. Honest layers have none.
    deleted: BTreeSet<Vec<u8>>,
    deleted_bytes: usize,
    /// Names that may still be looked at below directories that become opaque.
    names_left: u64,
    pub(crate) counts: TreeCounts,
}

impl UpperTree {
    pub(crate) fn open(
        stack: &OverlayStack,
        lower: LowerView,
        format: LayerFormat,
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
            path: Vec::new(),
            directories: DirectoryStack::new(),
            waiting_acl_bytes: 0,
            lower,
            namespace: stack.overlay_xattrs,
            has_idmapped_lowers: stack.has_idmapped_lowers,
            format,
            skip_unsupported_xattrs,
            xattr_reader: XattrReader::new(),
            deleted: BTreeSet::new(),
            deleted_bytes: 0,
            names_left: MAX_NAMES,
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
        self.directories.fd()
    }

    /// Its path, in which no component is a symlink.
    pub(crate) fn path(&self) -> &[u8] {
        &self.path
    }

    /// Path of a name in it.
    pub(crate) fn path_of(&self, name: &[u8]) -> Vec<u8> {
        let mut path = self.path.clone();
        push_component(&mut path, name);
        path
    }

    fn innermost(&self) -> Arc<OwnedFd> {
        let innermost = self.directories.innermost();
        Arc::clone(innermost.expect("the root stays on the stack until the end"))
    }

    fn innermost_mut(&mut self) -> &mut OpenDirectory {
        let note = self.directories.note_mut();
        note.expect("the root stays on the stack until the end")
    }

    /// What the lower layers show at `path` in the directory that `enter` led to.
    pub(crate) fn look_below<'a>(
        &'a mut self,
        path: &'a [u8],
    ) -> Result<Option<LowerInode<'a>>, ImportError> {
        let is_hidden = self.directories.note().is_none_or(|note| note.hides_lower);
        if is_hidden {
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

    /// Goes to a directory, following symlinks inside of the upperdir and making what does not exist:
    /// like the lower layer's, or else plain. Returns whether a symlink was followed; `path` tells where it
    /// has led.
    pub(crate) fn enter(&mut self, path: &[u8]) -> Result<bool, ImportError> {
        match self.reach(path)? {
            Reached::Directly => Ok(false),
            Reached::ThroughLink => Ok(true),
            Reached::Not => Err(ImportError::refused(
                path,
                "something on the way to it is no directory and leads to none",
            )),
        }
    }

    /// The same, where it is no fault that there is no such directory.
    pub(crate) fn reach(&mut self, path: &[u8]) -> Result<Reached, ImportError> {
        let mut reached = Reached::Directly;
        let mut wanted = path.to_vec();
        for _ in 0..MAX_LINKS {
            match self.enter_until_link(&wanted)? {
                Way::Whole => return Ok(reached),
                Way::Blocked => return Ok(Reached::Not),
                Way::Link(led, rest) => {
                    wanted = led;
                    if !rest.is_empty() {
                        push_component(&mut wanted, &rest);
                    }
                    reached = Reached::ThroughLink;
                }
            }
        }
        // In a circle, for example.
        Ok(Reached::Not)
    }

    /// Goes to a directory, making what does not exist, unless a symlink or a file of the upperdir is in the way.
    /// Nothing is made then.
    pub(crate) fn enter_own(&mut self, path: &[u8]) -> Result<bool, ImportError> {
        Ok(matches!(self.enter_until_link(path)?, Way::Whole))
    }

    /// Goes down until the end, or until something is in the way.
    fn enter_until_link(&mut self, path: &[u8]) -> Result<Way, ImportError> {
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
            match self.enter_name(name, &path[..end])? {
                Step::Entered => end += 1,
                Step::Blocked => return Ok(Way::Blocked),
                Step::Link(target) => {
                    let rest = path[end..].strip_prefix(b"/").unwrap_or_default();
                    return Ok(Way::Link(join_cleaned(&self.path, &target), rest.to_vec()));
                }
            }
        }
        Ok(Way::Whole)
    }

    fn enter_name(&mut self, name: &[u8], path: &[u8]) -> Result<Step, ImportError> {
        match open_directory(self.directory(), name) {
            Ok(fd) => {
                self.push_existing(fd, name)?;
                return Ok(Step::Entered);
            }
            Err(Errno::ENOENT) => {}
            Err(Errno::ENOTDIR | Errno::ELOOP) => {
                if let Some(target) = read_link(self.directory(), name, path)? {
                    return Ok(Step::Link(target));
                }
                let inode = self.stat_name(name, path)?;
                if !inode.is_some_and(|inode| inode.is_whiteout_device()) {
                    return Ok(Step::Blocked);
                }
            }
            Err(errno) => return Err(ImportError::io("open", path, errno)),
        }
        self.counts.implied_directories += 1;
        let mut xattrs = Vec::new();
        let below = match self.look_below_to_copy(path)? {
            Some(inode) if inode.attributes.is_directory() => {
                let attributes = inode.attributes;
                let fd = open_directory(inode.directory(), name)
                    .map_err(|errno| ImportError::io("open", path, errno))?;
                let mut reader = XattrReader::new();
                let holder = XattrHolder::Open(fd.as_fd());
                read_marks_and_xattrs(&mut reader, holder, self.namespace, &mut xattrs)
                    .map_err(|error| ImportError::io("read the attributes of", path, error))?;
                Some(attributes)
            }
            _ => None,
        };
        let Some(below) = below else {
            // Nobody says what it is like; its time is that of being made, its group that of a setgid directory
            // around it, as containerd's have.
            self.open_new_directory(name, path, 0o755)?;
            let fd = self.innermost();
            let made = fstat(&fd).map_err(|errno| ImportError::io("stat", path, errno))?;
            let made = InodeAttributes::from(made);
            let wanted = WantedAttributes {
                mode: 0o755,
                uid: 0,
                gid: made.gid,
                mtime: made.mtime,
                atime: made.atime,
                xattrs: &[],
            };
            self.set_directory_attributes(path, wanted, true)?;
            return Ok(Step::Entered);
        };
        let wanted = WantedAttributes {
            mode: below.mode,
            uid: below.uid,
            gid: below.gid,
            mtime: below.mtime,
            atime: below.atime,
            xattrs: &xattrs,
        };
        self.make_directory(name, path, wanted)?;
        Ok(Step::Entered)
    }

    /// Makes a directory in the current one, or takes the one that is there, gives it its attributes
    /// and enters it.
    pub(crate) fn make_directory(
        &mut self,
        name: &[u8],
        path: &[u8],
        wanted: WantedAttributes<'_>,
    ) -> Result<(), ImportError> {
        let is_new = self.open_new_directory(name, path, wanted.mode)?;
        self.set_directory_attributes(path, wanted, is_new)
    }

    /// Makes a directory in the current one, or takes the one that is there, and enters it. Returns
    /// whether it is new.
    fn open_new_directory(
        &mut self,
        name: &[u8],
        path: &[u8],
        mode: u32,
    ) -> Result<bool, ImportError> {
        let mut was_whiteout = false;
        let mut is_new = true;
        loop {
            match mkdirat(self.directory(), name, creation_mode(mode)) {
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
        let fd = open_directory(self.directory(), name)
            .map_err(|errno| ImportError::io("open", path, errno))?;
        self.push_existing(fd, name)?;
        if was_whiteout || is_new && self.deleted.contains(path) {
            // Deleted, then made anew: nothing of the old one shows through.
            self.set_opaque(path, false)?;
        }
        Ok(is_new)
    }

    /// Gives the current directory its attributes; times and default ACL come when it is left.
    pub(crate) fn set_directory_attributes(
        &mut self,
        path: &[u8],
        wanted: WantedAttributes<'_>,
        is_new: bool,
    ) -> Result<(), ImportError> {
        let fd = self.innermost();
        if !is_new {
            self.remove_other_xattrs(fd.as_fd(), path, wanted.xattrs)?;
        }
        let default_acl = wanted
            .xattrs
            .iter()
            .rfind(|xattr| xattr.name == DEFAULT_ACL)
            .map(|xattr| xattr.value.clone());
        self.hold_acl(path, default_acl)?;
        let innermost = self.innermost_mut();
        innermost.mtime = wanted.mtime;
        innermost.atime = wanted.atime;
        self.set_open_attributes(fd.as_fd(), path, wanted)
    }

    /// Keeps the default ACL of the current directory until it is left.
    fn hold_acl(&mut self, path: &[u8], acl: Option<Vec<u8>>) -> Result<(), ImportError> {
        let len_of = |acl: &Option<Vec<u8>>| acl.as_ref().map_or(0, Vec::len);
        self.waiting_acl_bytes += len_of(&acl);
        let before = std::mem::replace(&mut self.innermost_mut().default_acl, acl);
        self.waiting_acl_bytes -= len_of(&before);
        if self.waiting_acl_bytes > MAX_WAITING_ACL_BYTES {
            return Err(ImportError::refused(
                path,
                "the directories on the way to it have default ACLs of too many bytes",
            ));
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
            let mut left = self.names_left;
            let removed = remove_whiteouts(fd, &mut left);
            self.names_left = left;
            removed.map_err(|error| match left {
                0 => ImportError::refused(path, "too many names lie below opaque directories"),
                _ => ImportError::io("remove whiteouts from", path, error),
            })?;
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

    /// Remembers that a name is deleted, where the layer has a file.
    pub(crate) fn note_deleted(&mut self, path: &[u8]) -> Result<(), ImportError> {
        if self.deleted.insert(path.to_vec()) {
            self.deleted_bytes += path.len() + size_of::<Vec<u8>>();
        }
        if self.deleted_bytes > MAX_DELETED_BYTES {
            return Err(ImportError::refused(
                path,
                "too many names are deleted and have a file in the same layer",
            ));
        }
        Ok(())
    }

    /// Removes a name from the current directory for something that is no directory. That the name is deleted in
    /// the lower layers, by a whiteout or an opaque directory, is remembered.
    pub(crate) fn replace(&mut self, name: &[u8], path: &[u8]) -> Result<(), ImportError> {
        let is_deleted = match self.stat_name(name, path)? {
            Some(inode) if inode.is_directory() => self.is_opaque(name, path)?,
            Some(inode) => inode.is_whiteout_device(),
            None => false,
        };
        if is_deleted {
            self.note_deleted(path)?;
        }
        self.remove(name, path)
    }

    fn is_opaque(&mut self, name: &[u8], path: &[u8]) -> Result<bool, ImportError> {
        let unreadable = |error| ImportError::io("read the attributes of", path, error);
        let fd = open_directory(self.directory(), name);
        let fd = fd.map_err(|errno| ImportError::io("open", path, errno))?;
        let holder = XattrHolder::Open(fd.as_fd());
        let opaque = self
            .xattr_reader
            .value(holder, self.namespace.opaque_name());
        Ok(opaque.map_err(unreadable)? == Some(b"y"))
    }

    /// Removes a name from the current directory, with all below it.
    pub(crate) fn remove(&self, name: &[u8], path: &[u8]) -> Result<(), ImportError> {
        remove_name(self.directory(), name).map_err(|error| ImportError::io("replace", path, error))
    }

    /// Puts a directory on the stack with the times and the default ACL that it has on the disk.
    fn push_existing(&mut self, fd: OwnedFd, name: &[u8]) -> Result<(), ImportError> {
        let path = name;
        if self.directories.depth() >= MAX_DEPTH {
            return Err(ImportError::refused(path, "it lies too deep"));
        }
        let stat = fstat(&fd).map_err(|errno| ImportError::io("stat", path, errno))?;
        let attributes = InodeAttributes::from(stat);
        let unreadable = |error| ImportError::io("read the attributes of", path, error);
        let holder = XattrHolder::Open(fd.as_fd());
        let opaque = self
            .xattr_reader
            .value(holder, self.namespace.opaque_name());
        let is_opaque = opaque.map_err(unreadable)? == Some(b"y");
        let default_acl = self.xattr_reader.value(holder, DEFAULT_ACL);
        let default_acl = default_acl.map_err(unreadable)?.map(<[u8]>::to_vec);
        if default_acl.is_some() {
            remove_xattr(fd.as_fd(), DEFAULT_ACL)
                .map_err(|error| ImportError::io("remove an attribute of", path, error))?;
        }
        let outer_hides = self
            .directories
            .note()
            .is_some_and(|outer| outer.hides_lower);
        if self.directories.depth() > 0 {
            self.names.push(name.to_vec());
            push_component(&mut self.path, name);
        }
        let note = OpenDirectory {
            mtime: attributes.mtime,
            atime: attributes.atime,
            default_acl: None,
            hides_lower: outer_hides || is_opaque,
        };
        self.directories.push(fd, attributes.identity, note);
        self.hold_acl(path, default_acl)
    }

    /// Gives the innermost directory its default ACL and its times and takes it off the stack.
    fn leave(&mut self) -> Result<(), ImportError> {
        let name = self.names.pop().unwrap_or_default();
        let parent_len = self.path.len().saturating_sub(name.len() + 1);
        self.path.truncate(parent_len);
        let fd = self.innermost();
        let note = self.innermost_mut();
        let (atime, mtime) = (note.atime, note.mtime);
        if let Some(acl) = note.default_acl.take() {
            self.waiting_acl_bytes -= acl.len();
            self.set_one_xattr(XattrHolder::Open(fd.as_fd()), &name, DEFAULT_ACL, &acl)?;
        }
        set_open_times(fd.as_fd(), &name, atime, mtime)?;
        self.directories.leave().map_err(|error| match error {
            LeaveError::Io(error) => ImportError::io("open the parent of", &name, error),
            LeaveError::Moved => ImportError::refused(&name, "its directory was moved meanwhile"),
        })
    }

    /// Leaves all directories. Nothing may be imported after it.
    pub(crate) fn finish(&mut self) -> Result<(), ImportError> {
        while self.directories.depth() > 0 {
            self.leave()?;
        }
        Ok(())
    }
}

/// The text of a symlink; None when it is none.
pub(crate) fn read_link(
    directory: BorrowedFd<'_>,
    name: &[u8],
    path: &[u8],
) -> Result<Option<Vec<u8>>, ImportError> {
    match readlinkat(directory, name) {
        Ok(target) => Ok(Some(target.as_bytes().to_vec())),
        Err(Errno::EINVAL | Errno::ENOENT) => Ok(None),
        Err(errno) => Err(ImportError::io("read the symlink", path, errno)),
    }
}
