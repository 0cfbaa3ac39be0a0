//! The layers below an upperdir, seen as overlay would show them merged, one name at a time.
//!
//! A look-up costs one `fstatat` per layer; the directories on the way to the last one asked for
//! stay open, so look-ups in tree order do not walk from the root again. The tree is never listed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{Mode, fstatat};

use crate::directory_listing::DirectoryListing;
use crate::inode_attributes::{InodeAttributes, InodeType};
use crate::overlay_marks::{OverlayMarks, OverlayXattrs, read_marks_and_xattrs};
use crate::path_bytes::{components, push_component, split_last, to_path_buf};
use crate::xattrs::{Xattr, XattrHolder, XattrReader};

/// Open directories that are kept at most, so that a deep tree over many layers stays far from the
/// usual limit of 1024 descriptors.
const MAX_KEPT_DIRECTORIES: usize = 256;

/// Why the layers below could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LowerError {
    /// A system call on a lowerdir failed.
    #[error("cannot {act} {path:?} in the lower layers")]
    Io {
        /// What was being done.
        act: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A lower layer was itself made with `redirect_dir=on`.
    #[error("{path:?} was renamed in a lower layer (overlay redirect), which is not followed")]
    Redirected {
        /// The directory with the redirect.
        path: PathBuf,
    },
}

impl LowerError {
    fn io(act: &'static str, path: &[u8], source: impl Into<io::Error>) -> Self {
        LowerError::Io {
            act,
            path: to_path_buf(path),
            source: source.into(),
        }
    }
}

/// What the layers below have under a name.
#[derive(Debug)]
pub(crate) struct LowerInode<'a> {
    pub(crate) attributes: InodeAttributes,
    directory: BorrowedFd<'a>,
    name: &'a [u8],
}

impl<'a> LowerInode<'a> {
    pub(crate) fn holder(&self) -> XattrHolder<'a> {
        XattrHolder::Named {
            directory: self.directory,
            name: self.name,
        }
    }

    pub(crate) fn directory(&self) -> BorrowedFd<'a> {
        self.directory
    }
}

/// The merged view of the lowerdirs, nearest first.
#[derive(Debug)]
pub(crate) struct LowerView {
    namespace: OverlayXattrs,
    reader: XattrReader,
    /// The directories on the path looked up last: names, and per depth the layers' directories.
    /// `levels[0]` are the roots; None where they were closed to save descriptors.
    names: Vec<Vec<u8>>,
    levels: Vec<Option<Vec<OwnedFd>>>,
    unused_xattrs: Vec<Xattr>,
}

impl LowerView {
    pub(crate) fn open(
        lowerdirs: &[PathBuf],
        namespace: OverlayXattrs,
    ) -> Result<Self, LowerError> {
        let mut roots = Vec::with_capacity(lowerdirs.len());
        for lowerdir in lowerdirs {
            roots.push(open_root(lowerdir)?);
        }
        Ok(LowerView {
            namespace,
            reader: XattrReader::new(),
            names: Vec::new(),
            levels: vec![Some(roots)],
            unused_xattrs: Vec::new(),
        })
    }

    /// Whether there are no layers below at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.levels[0].as_ref().is_none_or(Vec::is_empty)
    }

    /// What the merged layers show at `path`, which is not the root.
    pub(crate) fn look_up<'a>(
        &'a mut self,
        path: &'a [u8],
    ) -> Result<Option<LowerInode<'a>>, LowerError> {
        if self.is_empty() {
            return Ok(None);
        }
        let (parent, name) = split_last(path);
        self.enter(parent)?;
        let directories = self
            .levels
            .last()
            .and_then(Option::as_ref)
            .map_or(&[][..], |level| level);
        for directory in directories {
            match examine(&mut self.reader, self.namespace, directory, name, path)? {
                Examined::Nothing => {}
                Examined::Whiteout => return Ok(None),
                Examined::Inode(attributes) => {
                    return Ok(Some(LowerInode {
                        attributes,
                        directory: directory.as_fd(),
                        name,
                    }));
                }
            }
        }
        Ok(None)
    }

    /// Opens the nearest file at `path` that has its data, passing by those whose layer has only
    /// the attributes (metacopy).
    pub(crate) fn open_data(&mut self, path: &[u8]) -> Result<Option<File>, LowerError> {
        let (parent, name) = split_last(path);
        self.enter(parent)?;
        let directories = self
            .levels
            .last()
            .and_then(Option::as_ref)
            .map_or(&[][..], |level| level);
        for directory in directories {
            match examine(&mut self.reader, self.namespace, directory, name, path)? {
                Examined::Nothing => {}
                Examined::Inode(attributes) if attributes.inode_type == InodeType::Regular => {
                    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                    let fd = openat(directory, name, flags | OFlag::O_NONBLOCK, Mode::empty())
                        .map_err(|errno| LowerError::io("open", path, errno))?;
                    let marks = marks_of(
                        &mut self.reader,
                        fd.as_fd(),
                        self.namespace,
                        &mut self.unused_xattrs,
                        path,
                    )?;
                    if !marks.metacopy {
                        return Ok(Some(File::from(fd)));
                    }
                    if marks.redirect.is_some() {
                        return Err(LowerError::Redirected {
                            path: to_path_buf(path),
                        });
                    }
                }
                Examined::Whiteout | Examined::Inode(_) => return Ok(None),
            }
        }
        Ok(None)
    }

    /// Names that the merged directory `path` shows, sorted.
    pub(crate) fn list(&mut self, path: &[u8]) -> Result<Vec<Vec<u8>>, LowerError> {
        self.enter(path)?;
        let mut listing = DirectoryListing::default();
        let mut names = Vec::new();
        let level = self
            .levels
            .last()
            .and_then(Option::as_ref)
            .map_or(&[][..], |level| level);
        for directory in level {
            listing
                .read(directory.as_fd())
                .map_err(|error| LowerError::io("list", path, error))?;
            names.extend(listing.iter().map(|(name, _)| name.to_vec()));
        }
        names.sort_unstable();
        names.dedup();
        let mut shown = Vec::with_capacity(names.len());
        for name in names {
            let mut below = path.to_vec();
            push_component(&mut below, &name);
            if self.look_up(&below)?.is_some() {
                shown.push(name);
            }
        }
        Ok(shown)
    }

    /// Makes the last level that of the directory `path`.
    fn enter(&mut self, path: &[u8]) -> Result<(), LowerError> {
        let shared = components(path)
            .zip(&self.names)
            .take_while(|(wanted, kept)| *wanted == kept.as_slice())
            .count();
        self.names.truncate(shared);
        self.levels.truncate(shared + 1);
        // A level that was closed is found again from the deepest open one above it.
        let open = self.levels.iter().rposition(Option::is_some).unwrap_or(0);
        self.names.truncate(open);
        self.levels.truncate(open + 1);
        for component in components(path).skip(open) {
            let level = self.descend(component, path)?;
            let kept: usize = self.levels.iter().flatten().map(Vec::len).sum();
            if kept + level.len() > MAX_KEPT_DIRECTORIES {
                self.levels
                    .iter_mut()
                    .skip(1)
                    .for_each(|level| *level = None);
            }
            self.names.push(component.to_vec());
            self.levels.push(Some(level));
        }
        Ok(())
    }

    /// The layers' directories under a name of the last level.
    fn descend(&mut self, name: &[u8], path: &[u8]) -> Result<Vec<OwnedFd>, LowerError> {
        let mut level = Vec::new();
        let above = self
            .levels
            .last()
            .and_then(Option::as_ref)
            .map_or(&[][..], |level| level);
        for directory in above {
            match examine(&mut self.reader, self.namespace, directory, name, path)? {
                Examined::Nothing => {}
                Examined::Inode(attributes) if attributes.is_directory() => {
                    let fd = openat(directory, name, directory_flags(), Mode::empty())
                        .map_err(|errno| LowerError::io("open", path, errno))?;
                    let marks = marks_of(
                        &mut self.reader,
                        fd.as_fd(),
                        self.namespace,
                        &mut self.unused_xattrs,
                        path,
                    )?;
                    if marks.redirect.is_some() {
                        return Err(LowerError::Redirected {
                            path: to_path_buf(path),
                        });
                    }
                    level.push(fd);
                    if marks.opaque {
                        break;
                    }
                }
                Examined::Whiteout | Examined::Inode(_) => break,
            }
        }
        Ok(level)
    }
}

enum Examined {
    Nothing,
    Whiteout,
    Inode(InodeAttributes),
}

fn examine(
    reader: &mut XattrReader,
    namespace: OverlayXattrs,
    directory: &OwnedFd,
    name: &[u8],
    path: &[u8],
) -> Result<Examined, LowerError> {
    let attributes: InodeAttributes = match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => stat.into(),
        Err(Errno::ENOENT) => return Ok(Examined::Nothing),
        Err(errno) => return Err(LowerError::io("stat", path, errno)),
    };
    if attributes.is_whiteout_device() {
        return Ok(Examined::Whiteout);
    }
    if attributes.inode_type == InodeType::Regular && attributes.size == 0 {
        let holder = XattrHolder::Named {
            directory: directory.as_fd(),
            name,
        };
        let mark = reader
            .value(holder, namespace.whiteout_name())
            .map_err(|error| LowerError::io("read the attributes of", path, error))?;
        if mark.is_some() {
            return Ok(Examined::Whiteout);
        }
    }
    Ok(Examined::Inode(attributes))
}

fn marks_of(
    reader: &mut XattrReader,
    fd: BorrowedFd<'_>,
    namespace: OverlayXattrs,
    unused: &mut Vec<Xattr>,
    path: &[u8],
) -> Result<OverlayMarks, LowerError> {
    read_marks_and_xattrs(reader, XattrHolder::Open(fd), namespace, unused)
        .map_err(|error| LowerError::io("read the attributes of", path, error))
}

fn directory_flags() -> OFlag {
    OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC
}

fn open_root(lowerdir: &Path) -> Result<OwnedFd, LowerError> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(lowerdir, flags, Mode::empty()).map_err(|errno| LowerError::Io {
        act: "open",
        path: lowerdir.to_path_buf(),
        source: errno.into(),
    })
}
