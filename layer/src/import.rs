//! Import: an OCI layer tar becomes the content of a fresh upperdir.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, fstatat, makedev, mknodat, utimensat,
};
use nix::unistd::{Gid, Uid, fchownat, ftruncate, linkat, symlinkat};

use crate::export::{OPAQUE_NAME, WHITEOUT_PREFIX};
pub use crate::import_error::ImportError;
use crate::inode_attributes::{InodeAttributes, InodeType};
use crate::lower_view::LowerView;
use crate::overlay_marks::{OverlayXattrs, read_marks_and_xattrs};
use crate::overlay_stack::OverlayStack;
use crate::path_bytes::{components, push_component, split_last};
use crate::sparse::{Segment, find_segments};
use crate::tar_read::{TarEntry, TarReader, TarType};
use crate::upper_tree::{UpperTree, WantedAttributes, creation_mode, set_open_times, time_spec};
use crate::xattrs::{XattrHolder, XattrReader};

/// Prefix of names that aufs kept for itself and that old Docker layers can contain.
const AUFS_PREFIX: &[u8] = b".wh..wh.";
/// Piece in which a file of a lower layer is copied.
const COPY_BYTES: usize = 1 << 20;

/// How to import, and how much of it.
#[derive(Debug, Clone)]
pub struct ImportOptions {
    /// Leaves out (and counts) extended attributes that the file system does not know, as containerd
    /// does for images; otherwise they make the import fail.
    pub skip_unsupported_xattrs: bool,
    /// Most entries that are accepted.
    pub max_entries: u64,
    /// Most bytes of uncompressed tar that are accepted.
    pub max_bytes: u64,
}

impl Default for ImportOptions {
    fn default() -> Self {
        ImportOptions {
            skip_unsupported_xattrs: false,
            max_entries: u64::MAX,
            max_bytes: u64::MAX,
        }
    }
}

/// What an import made, and what it left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImportStats {
    /// Entries of the tar, whiteouts and opaque markers included.
    pub entries: u64,
    /// Bytes of the tar, to the end of the stream.
    pub bytes: u64,
    /// Overlay whiteouts made.
    pub whiteouts: u64,
    /// Whiteouts of the tar for which nothing was to be made, because no lower layer has the name.
    pub needless_whiteouts: u64,
    /// Directories made opaque by a marker.
    pub opaque_directories: u64,
    /// Hard links made.
    pub hard_links: u64,
    /// Files copied from a lower layer because the tar has a hard link to them.
    pub copied_up_files: u64,
    /// Directories that the tar has no entry for and that were made for an entry below them.
    pub implied_directories: u64,
    /// Overlay's own attributes that the tar carried; they are never set.
    pub dropped_xattrs: u64,
    /// Attributes left out because of `skip_unsupported_xattrs`.
    pub unsupported_xattrs: u64,
    /// Entries of aufs' own that were skipped.
    pub aufs_entries: u64,
}

/// Applies an uncompressed OCI layer tar to the topmost directory of a stack, which is fresh and not
/// mounted.
///
/// Deletions become overlay's: `.wh.x` a whiteout, `.wh..wh..opq` an opaque directory. The stack must have
/// all the lowerdirs that the directory will be mounted over: a whiteout is made only for what a lower layer has, a parent directory without an entry
/// gets the attributes it has below, and a hard link to a lower file makes a copy of it.
///
/// The tar is not trusted: no entry reaches outside of the directory, through no name, symlink or hard
/// link; sizes are bounded before memory is taken; overlay's own attributes are not set.
///
/// # Errors
/// See [`ImportError`]. The directory is then half filled and must be thrown away.
pub fn import_into_upperdir<R: Read>(
    tar: R,
    stack: &OverlayStack,
    options: &ImportOptions,
) -> Result<ImportStats, ImportError> {
    let lower = LowerView::open(&stack.lowerdirs, stack.overlay_xattrs)?;
    let skip = options.skip_unsupported_xattrs;
    let mut import = Import {
        tar: TarReader::new(tar),
        tree: UpperTree::open(stack, lower, skip)?,
        stats: ImportStats::default(),
        root_is_opaque: false,
    };
    let mut entry = TarEntry::default();
    let mut path = Vec::new();
    while import.tar.next_entry(&mut entry)? {
        import.stats.entries += 1;
        import.check_limits(options)?;
        clean_path(&entry.path, &mut path)?;
        import.apply(&entry, &path)?;
    }
    import.tar.drain()?;
    import.finish(options)
}

/// Brings a name into the form of path_bytes.rs. Absolute names count from the root of the layer,
/// as every reader takes them; `..` has no honest use in a layer.
fn clean_path(raw: &[u8], path: &mut Vec<u8>) -> Result<(), ImportError> {
    path.clear();
    if raw.is_empty() {
        return Err(ImportError::refused(raw, "its name is empty"));
    }
    for component in components(raw) {
        match component {
            b"." => {}
            b".." => return Err(ImportError::refused(raw, "its name contains \"..\"")),
            component => push_component(path, component),
        }
    }
    Ok(())
}

struct Import<R> {
    tar: TarReader<R>,
    tree: UpperTree,
    stats: ImportStats,
    root_is_opaque: bool,
}

impl<R: Read> Import<R> {
    fn check_limits(&self, options: &ImportOptions) -> Result<(), ImportError> {
        if self.stats.entries > options.max_entries {
            return Err(ImportError::TooLarge {
                what: "entries",
                limit: options.max_entries,
            });
        }
        if self.tar.offset().saturating_add(self.tar.data_left()) > options.max_bytes {
            return Err(ImportError::TooLarge {
                what: "bytes",
                limit: options.max_bytes,
            });
        }
        Ok(())
    }

    fn apply(&mut self, entry: &TarEntry, path: &[u8]) -> Result<(), ImportError> {
        let (parent, name) = split_last(path);
        if components(parent).any(|component| component.starts_with(WHITEOUT_PREFIX)) {
            if components(parent).any(|component| component.starts_with(AUFS_PREFIX)) {
                self.stats.aufs_entries += 1;
                return Ok(());
            }
            return Err(ImportError::refused(path, "it lies below a deleted name"));
        }
        if name == OPAQUE_NAME {
            return self.hide_directory(parent);
        }
        if name.starts_with(AUFS_PREFIX) {
            self.stats.aufs_entries += 1;
            return Ok(());
        }
        if let Some(deleted) = name.strip_prefix(WHITEOUT_PREFIX) {
            return self.delete_name(parent, deleted, path);
        }
        let wanted = WantedAttributes {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            atime: entry.atime.unwrap_or(entry.mtime),
            xattrs: &entry.xattrs,
        };
        if path.is_empty() {
            if entry.tar_type != TarType::Directory {
                return Err(ImportError::refused(path, "the root is no directory"));
            }
            self.tree.enter(path)?;
            return self.tree.set_directory_attributes(path, wanted, false);
        }
        let inode_type = match entry.tar_type {
            TarType::HardLink => return self.make_hard_link(parent, name, path, &entry.link),
            TarType::Regular => InodeType::Regular,
            TarType::Symlink => InodeType::Symlink,
            TarType::CharDevice => InodeType::CharDevice,
            TarType::BlockDevice => InodeType::BlockDevice,
            TarType::Directory => InodeType::Directory,
            TarType::Fifo => InodeType::Fifo,
        };
        self.tree.enter(parent)?;
        match inode_type {
            InodeType::Directory => self.tree.make_directory(name, path, wanted),
            InodeType::Regular => self.make_file(name, path, entry, wanted),
            _ => self.make_special(name, path, inode_type, &entry.link, entry.device, wanted),
        }
    }

    fn make_file(
        &mut self,
        name: &[u8],
        path: &[u8],
        entry: &TarEntry,
        wanted: WantedAttributes<'_>,
    ) -> Result<(), ImportError> {
        let file = File::from(create_file(&self.tree, name, path, wanted.mode)?);
        match &entry.segments {
            None => self.write_data(&file, path, None)?,
            Some(segments) => {
                for segment in segments {
                    self.write_data(&file, path, Some(*segment))?;
                }
                set_len(&file, path, entry.size)?;
            }
        }
        self.tree.set_open_attributes(file.as_fd(), path, wanted)?;
        set_open_times(file.as_fd(), path, wanted.atime, wanted.mtime)
    }

    /// Writes the next data of the tar to its place, or all that is left of it from the start.
    fn write_data(
        &mut self,
        file: &File,
        path: &[u8],
        segment: Option<Segment>,
    ) -> Result<(), ImportError> {
        let Segment {
            offset: mut position,
            len: mut left,
        } = segment.unwrap_or(Segment {
            offset: 0,
            len: u64::MAX,
        });
        while left > 0 {
            let data = self.tar.data(left)?;
            let len = data.len();
            if len == 0 {
                return Ok(());
            }
            let mut out = file;
            let written = match segment {
                None => out.write_all(data),
                Some(_) => out.write_all_at(data, position),
            };
            written.map_err(|error| ImportError::io("write", path, error))?;
            self.tar.consume(len);
            position += len as u64;
            left -= len as u64;
        }
        Ok(())
    }

    /// Makes a symlink, device node or FIFO in the current directory.
    fn make_special(
        &mut self,
        name: &[u8],
        path: &[u8],
        inode_type: InodeType,
        link: &[u8],
        device: (u64, u64),
        wanted: WantedAttributes<'_>,
    ) -> Result<(), ImportError> {
        if inode_type == InodeType::CharDevice && device == (0, 0) {
            return Err(ImportError::refused(
                path,
                "a character device 0:0 is overlay's whiteout",
            ));
        }
        let make = |tree: &UpperTree| {
            let directory = tree.directory();
            let mode = Mode::S_IRUSR | Mode::S_IWUSR;
            let number = makedev(device.0, device.1);
            match inode_type {
                InodeType::Symlink => symlinkat(link, directory, name),
                InodeType::CharDevice => mknodat(directory, name, SFlag::S_IFCHR, mode, number),
                InodeType::BlockDevice => mknodat(directory, name, SFlag::S_IFBLK, mode, number),
                _ => mknodat(directory, name, SFlag::S_IFIFO, mode, 0),
            }
        };
        replacing(&self.tree, name, path, make)?;
        let directory = self.tree.directory();
        fchownat(
            directory,
            name,
            Some(Uid::from_raw(wanted.uid)),
            Some(Gid::from_raw(wanted.gid)),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )
        .map_err(|errno| ImportError::io("change the owner of", path, errno))?;
        if inode_type != InodeType::Symlink {
            // It was made just now and is no symlink.
            let mode = Mode::from_bits_truncate(wanted.mode);
            fchmodat(directory, name, mode, FchmodatFlags::FollowSymlink)
                .map_err(|errno| ImportError::io("change the mode of", path, errno))?;
        }
        if !wanted.xattrs.is_empty() {
            let directory = directory
                .try_clone_to_owned()
                .map_err(|error| ImportError::io("open the directory of", path, error))?;
            let holder = XattrHolder::Named {
                directory: directory.as_fd(),
                name,
            };
            self.tree.set_xattrs(holder, path, wanted.xattrs)?;
        }
        utimensat(
            self.tree.directory(),
            name,
            &time_spec(wanted.atime),
            &time_spec(wanted.mtime),
            UtimensatFlags::NoFollowSymlink,
        )
        .map_err(|errno| ImportError::io("set the times of", path, errno))
    }

    fn make_hard_link(
        &mut self,
        parent: &[u8],
        name: &[u8],
        path: &[u8],
        link: &[u8],
    ) -> Result<(), ImportError> {
        let mut target = Vec::new();
        clean_path(link, &mut target)?;
        let target_name = split_last(&target).1;
        if target == path || target_name.is_empty() || target_name.starts_with(WHITEOUT_PREFIX) {
            return Err(ImportError::refused(
                path,
                "it is a hard link to what cannot be one",
            ));
        }
        let mut found = self.find_link_target(&target)?;
        if found.is_none() {
            self.copy_up(&target, path)?;
            found = self.find_link_target(&target)?;
        }
        let Some((attributes, target_directory)) = found else {
            return Err(ImportError::refused(
                path,
                "it is a hard link to what does not exist",
            ));
        };
        if attributes.is_directory() || attributes.is_whiteout_device() {
            return Err(ImportError::refused(
                path,
                "it is a hard link to what cannot be one",
            ));
        }
        self.tree.enter(parent)?;
        self.stats.hard_links += 1;
        replacing(&self.tree, name, path, |tree| {
            linkat(
                &target_directory,
                target_name,
                tree.directory(),
                name,
                AtFlags::empty(),
            )
        })
    }

    /// Finds a file of the upperdir, symlinks not followed, and the directory that holds it.
    fn find_link_target(
        &self,
        target: &[u8],
    ) -> Result<Option<(InodeAttributes, OwnedFd)>, ImportError> {
        let (parent, name) = split_last(target);
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut directory: Option<OwnedFd> = None;
        for component in components(parent) {
            let above = directory.as_ref().map_or(self.tree.root(), |fd| fd.as_fd());
            match openat(above, component, flags, Mode::empty()) {
                Ok(fd) => directory = Some(fd),
                Err(Errno::ENOENT) => return Ok(None),
                Err(Errno::ENOTDIR | Errno::ELOOP) => {
                    return Err(ImportError::refused(
                        target,
                        "a hard link leads through what is no directory",
                    ));
                }
                Err(errno) => return Err(ImportError::io("open", target, errno)),
            }
        }
        let directory = match directory {
            Some(fd) => fd,
            None => self
                .tree
                .root()
                .try_clone_to_owned()
                .map_err(|error| ImportError::io("open", b"", error))?,
        };
        match fstatat(&directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some((stat.into(), directory))),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(ImportError::io("stat", target, errno)),
        }
    }

    /// Copies a file of a lower layer into the upperdir, as overlay would before it links it.
    fn copy_up(&mut self, target: &[u8], path: &[u8]) -> Result<(), ImportError> {
        let (parent, name) = split_last(target);
        self.tree.enter(parent)?;
        let mut reader = XattrReader::new();
        let mut xattrs = Vec::new();
        let mut link = Vec::new();
        let Some(inode) = self.tree.look_below_to_copy(target)? else {
            return Err(ImportError::refused(
                path,
                "it is a hard link to what does not exist",
            ));
        };
        let attributes = inode.attributes;
        read_marks_and_xattrs(
            &mut reader,
            inode.holder(),
            OverlayXattrs::default(),
            &mut xattrs,
        )
        .map_err(|error| ImportError::io("read the attributes of", target, error))?;
        if attributes.inode_type == InodeType::Symlink {
            let read = readlinkat(inode.directory(), name)
                .map_err(|errno| ImportError::io("read the symlink", target, errno))?;
            link = read.as_bytes().to_vec();
        }
        let wanted = WantedAttributes {
            mode: attributes.mode,
            uid: attributes.uid,
            gid: attributes.gid,
            mtime: attributes.mtime,
            atime: attributes.atime,
            xattrs: &xattrs,
        };
        self.stats.copied_up_files += 1;
        match attributes.inode_type {
            InodeType::Directory | InodeType::Socket => Err(ImportError::refused(
                path,
                "it is a hard link to what cannot be one",
            )),
            InodeType::Regular => self.copy_up_regular(name, target, wanted),
            inode_type => {
                self.make_special(name, target, inode_type, &link, attributes.device, wanted)
            }
        }
    }

    fn copy_up_regular(
        &mut self,
        name: &[u8],
        target: &[u8],
        wanted: WantedAttributes<'_>,
    ) -> Result<(), ImportError> {
        let Some(source) = self.tree.lower.open_data(target)? else {
            return Err(ImportError::refused(
                target,
                "its data is missing from the lower layers",
            ));
        };
        let size = source
            .metadata()
            .map_err(|error| ImportError::io("stat", target, error))?
            .len();
        let file = File::from(create_file(&self.tree, name, target, wanted.mode)?);
        let whole = vec![Segment {
            offset: 0,
            len: size,
        }];
        let segments = find_segments(&source, size)
            .map_err(|error| ImportError::io("find the holes of", target, error))?
            .unwrap_or(whole);
        let mut buffer = vec![0; COPY_BYTES];
        for segment in segments {
            let (mut position, end) = (segment.offset, segment.offset + segment.len);
            while position < end {
                let len = usize::try_from(end - position)
                    .unwrap_or(usize::MAX)
                    .min(COPY_BYTES);
                source
                    .read_exact_at(&mut buffer[..len], position)
                    .map_err(|error| ImportError::io("read", target, error))?;
                file.write_all_at(&buffer[..len], position)
                    .map_err(|error| ImportError::io("write", target, error))?;
                position += len as u64;
            }
        }
        set_len(&file, target, size)?;
        self.tree
            .set_open_attributes(file.as_fd(), target, wanted)?;
        set_open_times(file.as_fd(), target, wanted.atime, wanted.mtime)
    }

    /// `.wh.x`: nothing of the lower layers is to show at x. What this layer itself has there stays,
    /// whether its entry came before or comes later.
    fn delete_name(&mut self, parent: &[u8], name: &[u8], path: &[u8]) -> Result<(), ImportError> {
        if matches!(name, b"" | b"." | b"..") {
            return Err(ImportError::refused(path, "it deletes what is no name"));
        }
        self.tree.enter(parent)?;
        let mut deleted = parent.to_vec();
        push_component(&mut deleted, name);
        match self.tree.stat_name(name, &deleted)? {
            Some(inode) if inode.is_directory() => {
                self.tree.enter(&deleted)?;
                self.tree.set_opaque(&deleted, true)
            }
            Some(_) => Ok(()),
            None if self.tree.look_below(&deleted)?.is_none() => {
                self.stats.needless_whiteouts += 1;
                Ok(())
            }
            None => self.make_whiteout(name, &deleted),
        }
    }

    /// Makes an overlay whiteout in the current directory.
    fn make_whiteout(&mut self, name: &[u8], path: &[u8]) -> Result<(), ImportError> {
        let number = makedev(0, 0);
        mknodat(
            self.tree.directory(),
            name,
            SFlag::S_IFCHR,
            Mode::empty(),
            number,
        )
        .map_err(|errno| ImportError::io("make the whiteout", path, errno))?;
        self.stats.whiteouts += 1;
        self.tree.counts.whiteouts_made += 1;
        Ok(())
    }

    /// `.wh..wh..opq`: nothing of the lower layers is to show in this directory.
    fn hide_directory(&mut self, path: &[u8]) -> Result<(), ImportError> {
        self.stats.opaque_directories += 1;
        if path.is_empty() {
            self.root_is_opaque = true;
            return Ok(());
        }
        self.tree.enter(path)?;
        self.tree.set_opaque(path, true)
    }

    /// Overlay always merges the root, so an opaque one is made of whiteouts.
    fn hide_lower_root(&mut self) -> Result<(), ImportError> {
        for name in self.tree.lower.list(b"")? {
            self.tree.enter(b"")?;
            match self.tree.stat_name(&name, &name)? {
                None => self.make_whiteout(&name, &name)?,
                Some(inode) if inode.is_directory() => {
                    self.tree.enter(&name)?;
                    self.tree.set_opaque(&name, true)?;
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn finish(mut self, options: &ImportOptions) -> Result<ImportStats, ImportError> {
        if self.root_is_opaque {
            self.hide_lower_root()?;
        }
        self.tree.finish()?;
        self.stats.bytes = self.tar.offset();
        self.stats.implied_directories = self.tree.counts.implied_directories;
        self.stats.dropped_xattrs = self.tree.counts.dropped_xattrs;
        self.stats.unsupported_xattrs = self.tree.counts.unsupported_xattrs;
        self.check_limits(options)?;
        Ok(self.stats)
    }
}

/// Makes something under a name, in the place of what an earlier entry made there.
fn replacing(
    tree: &UpperTree,
    name: &[u8],
    path: &[u8],
    mut make: impl FnMut(&UpperTree) -> nix::Result<()>,
) -> Result<(), ImportError> {
    let made = match make(tree) {
        Err(Errno::EEXIST) => {
            tree.remove(name, path)?;
            make(tree)
        }
        made => made,
    };
    made.map_err(|errno| ImportError::io("make", path, errno))
}

fn create_file(
    tree: &UpperTree,
    name: &[u8],
    path: &[u8],
    mode: u32,
) -> Result<OwnedFd, ImportError> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let mut created = None;
    replacing(tree, name, path, |tree| {
        let mode = creation_mode(mode);
        created = Some(openat(
            tree.directory(),
            name,
            flags | OFlag::O_NOFOLLOW,
            mode,
        )?);
        Ok(())
    })?;
    Ok(created.expect("set by the call that succeeded"))
}

fn set_len(file: &File, path: &[u8], size: u64) -> Result<(), ImportError> {
    let size = i64::try_from(size)
        .map_err(|_| ImportError::refused(path, "its size is beyond all files"))?;
    ftruncate(file, size).map_err(|errno| ImportError::io("set the size of", path, errno))
}
