//! Import: an OCI layer tar becomes the content of a fresh upperdir.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{Mode, SFlag, fstat, fstatat, makedev, mknodat};
use nix::unistd::{ftruncate, linkat, symlinkat};

use crate::decompress::Compression;
use crate::directory_stack::open_directory;
use crate::export::{OPAQUE_NAME, WHITEOUT_PREFIX};
use crate::export_error::ExportError;
pub use crate::import_error::ImportError;
use crate::inode_attributes::{InodeAttributes, InodeType};
use crate::layer_format::{LayerFormat, LiteralNames};
use crate::lower_view::LowerView;
use crate::open_for_export::open_regular;
use crate::overlay_marks::read_marks_and_xattrs;
use crate::overlay_stack::OverlayStack;
use crate::path_bytes::{clean_path_into, components, join_cleaned, push_component, split_last};
use crate::remove_tree::remove_name;
use crate::sparse::{Segment, find_segments};
use crate::tar_read::{TarEntry, TarReader, TarType};
use crate::upper_tree::{
    MAX_LINKS, Reached, UpperTree, WantedAttributes, creation_mode, read_link, set_open_times,
};
use crate::user_namespace::in_user_namespace;
use crate::xattrs::XattrReader;

/// Piece in which a file of a lower layer is copied.
const COPY_BYTES: usize = 1 << 20;

/// Memory for names of files that are copied from lower layers.
const MAX_COPIED_BYTES: usize = 8 << 20;

/// How to import, and how much of it.
#[derive(Debug, Clone)]
pub struct ImportOptions {
    /// Where the layer comes from.
    pub format: LayerFormat,
    /// Leaves out (and counts) extended attributes that the file system does not know, as containerd
    /// does for images; otherwise they make the import fail.
    pub skip_unsupported_xattrs: bool,
    /// Most bytes of uncompressed tar that are accepted, with those of files that are copied from lower layers because a
    /// hard link names them. An entry has at least 512, so this bounds their number, too.
    pub max_bytes: u64,
    /// The name, at the top of the upperdir, of the directory of contents that have come before (contents.rs); it is gone
    /// when the layer is applied.
    pub contents: Option<String>,
}

impl Default for ImportOptions {
    fn default() -> Self {
        ImportOptions {
            format: LayerFormat::Checkpoint,
            skip_unsupported_xattrs: false,
            max_bytes: u64::MAX,
            contents: None,
        }
    }
}

/// The most that deflate makes of one byte. zstd can make more of zeros, which no honest layer consists of.
const MAX_EXPANSION: u64 = 1032;

impl ImportOptions {
    /// For a checkpoint's layer in a file of `file_len` bytes: what comes from elsewhere makes no more of it
    /// than it is, or, when it is compressed, than its compression does.
    pub fn for_checkpoint(file_len: u64, compression: Compression) -> Self {
        let expansion = match compression {
            Compression::None => 1,
            Compression::Gzip | Compression::Zstd => MAX_EXPANSION,
        };
        ImportOptions {
            max_bytes: file_len.saturating_mul(expansion),
            ..ImportOptions::default()
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
    /// Entries that were skipped: device nodes in a user namespace, what lies below a deleted name, and deletions whose name leads
    /// through a symlink or a file of the same layer (see docs/layers.md).
    pub skipped_entries: u64,
}

/// Applies an uncompressed OCI layer tar to the topmost directory of a stack, which is fresh and not
/// mounted.
///
/// Deletions become overlay's: `.wh.x` a whiteout, `.wh..wh..opq` an opaque directory. The stack must have
/// all the lowerdirs that the directory will be mounted over: a whiteout is made only for what a lower
/// layer has, a parent directory without an entry gets the attributes it has below, and a hard link to a lower file makes a copy of it.
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
    let tree = UpperTree::open(stack, lower, options.format, skip)?;
    let contents = { options.contents.as_deref() }
        .map(|name| open_directory(tree.root(), name.as_bytes()))
        .transpose()
        .map_err(|errno| ImportError::io("open the contents for", b"", errno))?;
    let mut import = Import {
        tar: TarReader::new(tar),
        tree,
        stats: ImportStats::default(),
        root_is_opaque: false,
        contents,
        copied: HashSet::new(),
        copied_bytes: 0,
        copied_data: 0,
        max_bytes: options.max_bytes,
    };
    let mut entry = TarEntry::default();
    let mut path = Vec::new();
    while import.tar.next_entry(&mut entry)? {
        import.stats.entries += 1;
        import.check_limit()?;
        clean_path_into(&entry.path, &mut path);
        import.apply(&entry, &path)?;
    }
    import.tar.drain(u64::MAX)?;
    import.finish(options)
}

/// What of the symlinks in a path was followed.
enum Followed {
    /// One; this is the path now.
    Link(Vec<u8>),
    /// There is none; this is the path, without `.` and `..`.
    None(Vec<u8>),
}

struct Import<R> {
    tar: TarReader<R>,
    tree: UpperTree,
    stats: ImportStats,
    root_is_opaque: bool,
    contents: Option<OwnedFd>,
    /// Files that were copied from the lower layers.
    copied: HashSet<Vec<u8>>,
    copied_bytes: usize,
    copied_data: u64,
    max_bytes: u64,
}

impl<R: Read> Import<R> {
    fn check_limit(&self) -> Result<(), ImportError> {
        let (tar, limit) = (self.tar.offset(), self.max_bytes);
        let all = tar
            .saturating_add(self.tar.data_left())
            .saturating_add(self.copied_data);
        match all > limit {
            true => Err(ImportError::TooLarge { limit }),
            false => Ok(()),
        }
    }

    fn apply(&mut self, entry: &TarEntry, path: &[u8]) -> Result<(), ImportError> {
        let (parent, name) = split_last(path);
        let literal = entry
            .literal_names
            .filter(|_| self.tree.format == LayerFormat::Checkpoint);
        let is_marker = |component: &[u8]| component.starts_with(WHITEOUT_PREFIX);
        if literal.is_none() && components(parent).any(is_marker) {
            self.stats.skipped_entries += 1;
            return Ok(());
        }
        if is_marker(name) && literal != Some(LiteralNames::All) {
            if name == OPAQUE_NAME {
                return self.hide_directory(parent);
            }
            // aufs' own names in old layers of Docker (`.wh..wh.plnk`) are deletions of what nobody has.
            return self.delete_name(parent, &name[WHITEOUT_PREFIX.len()..], path);
        }
        let wanted = WantedAttributes {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            // As containerd: the later one.
            atime: entry
                .atime
                .map_or(entry.mtime, |atime| atime.max(entry.mtime)),
            xattrs: &entry.xattrs,
        };
        if path.is_empty() {
            return self.apply_root(entry.tar_type, wanted);
        }
        if entry.tar_type == TarType::HardLink {
            return self.make_hard_link(parent, name, path, &entry.link, wanted);
        }
        let led_path;
        let path = if self.tree.enter(parent)? {
            led_path = self.tree.path_of(name);
            &led_path[..]
        } else {
            path
        };
        let inode_type = match entry.tar_type {
            TarType::Regular | TarType::HardLink => {
                return self.make_file(name, path, entry, wanted);
            }
            TarType::Directory => return self.tree.make_directory(name, path, wanted),
            TarType::CharDevice if entry.device == (0, 0) => {
                return self.make_whiteout_of_device(name, path);
            }
            TarType::Symlink => InodeType::Symlink,
            TarType::CharDevice => InodeType::CharDevice,
            TarType::BlockDevice => InodeType::BlockDevice,
            TarType::Fifo => InodeType::Fifo,
        };
        self.make_special(name, path, inode_type, &entry.link, entry.device, wanted)
    }

    /// What an image says of `/` is not the container's root directory: that belongs to the snapshot, and
    /// as containerd does.
    fn apply_root(
        &mut self,
        tar_type: TarType,
        wanted: WantedAttributes<'_>,
    ) -> Result<(), ImportError> {
        match (self.tree.format, tar_type) {
            (LayerFormat::Image, _) => Ok(()),
            (LayerFormat::Checkpoint, TarType::Directory) => {
                self.tree.enter(b"")?;
                self.tree.set_directory_attributes(b"", wanted, false)
            }
            (LayerFormat::Checkpoint, _) => {
                Err(ImportError::refused(b"", "the root is no directory"))
            }
        }
    }

    fn make_file(
        &mut self,
        name: &[u8],
        path: &[u8],
        entry: &TarEntry,
        wanted: WantedAttributes<'_>,
    ) -> Result<(), ImportError> {
        // In an image it means nothing.
        let content = entry
            .content
            .filter(|_| self.tree.format == LayerFormat::Checkpoint);
        if let Some(number) = content {
            let file = self.place_content(name, path, number)?;
            self.tree.set_open_attributes(file.as_fd(), path, wanted)?;
            return set_open_times(file.as_fd(), path, wanted.atime, wanted.mtime);
        }
        let file = File::from(create_file(&mut self.tree, name, path, wanted.mode)?);
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

    /// Gives a content that has come before its place, once. It stays among the contents until all is there: an import that
    /// breaks off can be begun anew.
    fn place_content(
        &mut self,
        name: &[u8],
        path: &[u8],
        number: u64,
    ) -> Result<File, ImportError> {
        let absent = || ImportError::refused(path, "its content has not come before");
        let contents = self.contents.as_ref().ok_or_else(absent)?;
        let number = number.to_string();
        // Somebody who has the emptyDir may have put a device in its place, and opening one does something.
        let file = match open_regular(contents.as_fd(), number.as_bytes(), path) {
            Err(ExportError::Changed { .. }) => return Err(absent()),
            opened => {
                opened.map_err(|error| ImportError::io("open", path, io::Error::other(error)))?
            }
        };
        let found = fstat(&file).map_err(|errno| ImportError::io("look at", path, errno))?;
        if found.st_nlink != 1 {
            return Err(absent());
        }
        replacing(&mut self.tree, name, path, |tree| {
            let flags = AtFlags::empty();
            linkat(contents, number.as_str(), tree.directory(), name, flags)
        })?;
        Ok(file.into())
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
        let mut is_left_out = false;
        let is_device = matches!(inode_type, InodeType::CharDevice | InodeType::BlockDevice);
        let may_lack_devices = is_device && self.tree.format != LayerFormat::Checkpoint;
        let make = |tree: &UpperTree| {
            let directory = tree.directory();
            let mode = Mode::S_IRUSR | Mode::S_IWUSR;
            let number = makedev(device.0, device.1);
            let made = match inode_type {
                InodeType::Symlink => symlinkat(link, directory, name),
                InodeType::CharDevice => mknodat(directory, name, SFlag::S_IFCHR, mode, number),
                InodeType::BlockDevice => mknodat(directory, name, SFlag::S_IFBLK, mode, number),
                _ => mknodat(directory, name, SFlag::S_IFIFO, mode, 0),
            };
            match made {
                // No root of a user namespace may make one, and containerd leaves it out there as well.
                Err(Errno::EPERM) if may_lack_devices && in_user_namespace().unwrap_or(false) => {
                    is_left_out = true;
                    Ok(())
                }
                made => made,
            }
        };
        replacing(&mut self.tree, name, path, make)?;
        if is_left_out {
            self.stats.skipped_entries += 1;
            return Ok(());
        }
        self.tree
            .set_special_attributes(name, path, (inode_type, device), wanted)
    }

    fn make_hard_link(
        &mut self,
        parent: &[u8],
        name: &[u8],
        path: &[u8],
        link: &[u8],
        wanted: WantedAttributes<'_>,
    ) -> Result<(), ImportError> {
        let impossible = || ImportError::refused(path, "it is a hard link to what cannot be one");
        let target = self.resolve_link(link)?;
        let target_name = split_last(&target).1;
        if target_name.is_empty() {
            return Err(impossible());
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
            return Err(impossible());
        }
        self.tree.enter(parent)?;
        if self.tree.path_of(name) == target {
            // The replaced name would be the last one of the file.
            return Err(impossible());
        }
        self.stats.hard_links += 1;
        replacing(&mut self.tree, name, path, |tree| {
            linkat(
                &target_directory,
                target_name,
                tree.directory(),
                name,
                AtFlags::empty(),
            )
        })?;
        self.tree
            .set_link_attributes((&target_directory, target_name), path, attributes, wanted)
    }

    /// The path that a hard link's target means: symlinks before its last component are followed inside of
    /// the upperdir, and `..` leads up from where they have led, as containerd has it.
    fn resolve_link(&self, link: &[u8]) -> Result<Vec<u8>, ImportError> {
        let mut path = link.to_vec();
        for _ in 0..MAX_LINKS {
            match self.follow_first_link(&path)? {
                Followed::Link(led) => path = led,
                Followed::None(resolved) => return Ok(resolved),
            }
        }
        Err(ImportError::refused(
            link,
            "it leads through too many symlinks",
        ))
    }

    /// Where a path leads, if one of its components but the last is a symlink of the upperdir.
    fn follow_first_link(&self, path: &[u8]) -> Result<Followed, ImportError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut directories: Vec<Option<OwnedFd>> = Vec::new();
        let mut done = Vec::new();
        let mut rest = components(path)
            .filter(|component| *component != b".")
            .peekable();
        while let Some(component) = rest.next() {
            if component == b".." {
                done.truncate(split_last(&done).0.len());
                directories.pop();
                continue;
            }
            if rest.peek().is_none() {
                push_component(&mut done, component);
                break;
            }
            let above = match directories.last() {
                None => Some(self.tree.root()),
                Some(directory) => directory.as_ref().map(AsFd::as_fd),
            };
            let opened = above.map(|above| openat(above, component, flags, Mode::empty()));
            match (above, opened) {
                (_, Some(Ok(fd))) => directories.push(Some(fd)),
                // What is not there is no symlink.
                (None, _) | (_, None | Some(Err(Errno::ENOENT))) => directories.push(None),
                (Some(above), Some(Err(Errno::ENOTDIR | Errno::ELOOP))) => {
                    let Some(target) = read_link(above, component, path)? else {
                        return Err(ImportError::refused(
                            path,
                            "a hard link leads through what is no directory",
                        ));
                    };
                    let mut led = join_cleaned(&done, &target);
                    rest.for_each(|component| push_component(&mut led, component));
                    return Ok(Followed::Link(led));
                }
                (_, Some(Err(errno))) => return Err(ImportError::io("open", path, errno)),
            }
            push_component(&mut done, component);
        }
        Ok(Followed::None(done))
    }

    /// Finds a file of the upperdir by its resolved path, and the directory that holds it.
    fn find_link_target(
        &self,
        target: &[u8],
    ) -> Result<Option<(InodeAttributes, OwnedFd)>, ImportError> {
        let (parent, name) = split_last(target);
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut directory = self
            .tree
            .root()
            .try_clone_to_owned()
            .map_err(|error| ImportError::io("open", b"", error))?;
        for component in components(parent) {
            match openat(&directory, component, flags, Mode::empty()) {
                Ok(fd) => directory = fd,
                Err(Errno::ENOENT) => return Ok(None),
                Err(errno) => return Err(ImportError::io("open", target, errno)),
            }
        }
        match fstatat(&directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some((stat.into(), directory))),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(ImportError::io("stat", target, errno)),
        }
    }

    /// Copies a file of a lower layer into the upperdir, as overlay would before it links it.
    fn copy_up(&mut self, target: &[u8], path: &[u8]) -> Result<(), ImportError> {
        // A few headers of a layer could have a large file copied again and again, and removed in between.
        if !self.copied.insert(target.to_vec()) {
            return Err(ImportError::refused(
                target,
                "it is copied from the lower layers a second time",
            ));
        }
        self.copied_bytes += target.len() + size_of::<Vec<u8>>();
        if self.copied_bytes > MAX_COPIED_BYTES {
            return Err(ImportError::refused(
                target,
                "too many files of the lower layers are linked",
            ));
        }
        let (parent, name) = split_last(target);
        self.tree.enter(parent)?;
        let mut reader = XattrReader::new();
        let mut xattrs = Vec::new();
        let mut link = Vec::new();
        let namespace = self.tree.namespace;
        let Some(inode) = self.tree.look_below_to_copy(target)? else {
            return Err(ImportError::refused(
                path,
                "it is a hard link to what does not exist",
            ));
        };
        let attributes = inode.attributes;
        let holder = inode.holder();
        read_marks_and_xattrs(&mut reader, holder, namespace, &mut xattrs)
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
        let whole = vec![Segment {
            offset: 0,
            len: size,
        }];
        let segments = find_segments(&source, size)
            .map_err(|error| ImportError::io("find the holes of", target, error))?
            .unwrap_or(whole);
        // A few headers could have all of the lower layers copied.
        let data = segments.iter().map(|segment| segment.len);
        self.copied_data = data.fold(self.copied_data, u64::saturating_add);
        self.check_limit()?;
        let file = File::from(create_file(&mut self.tree, name, target, wanted.mode)?);
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
        if !self.tree.enter_own(parent)? {
            // It means a directory that this layer has replaced, by a file or by a symlink; what lies where
            // that leads is another one, of which nothing is deleted.
            self.stats.skipped_entries += 1;
            return Ok(());
        }
        let mut deleted = parent.to_vec();
        push_component(&mut deleted, name);
        match self.tree.stat_name(name, &deleted)? {
            Some(inode) if inode.is_directory() => {
                self.tree.enter(&deleted)?;
                self.tree.set_opaque(&deleted, true)
            }
            Some(inode) if inode.is_whiteout_device() => Ok(()),
            Some(_) if self.tree.look_below(&deleted)?.is_none() => Ok(()),
            Some(_) => self.tree.note_deleted(&deleted),
            None if self.tree.look_below(&deleted)?.is_none() => {
                self.stats.needless_whiteouts += 1;
                Ok(())
            }
            None => self.make_whiteout(name, &deleted),
        }
    }

    /// A character device 0:0 is how overlay, and whoever packs an upperdir as it lies on the disk, says that
    /// a name is deleted.
    fn make_whiteout_of_device(&mut self, name: &[u8], path: &[u8]) -> Result<(), ImportError> {
        if self.tree.stat_name(name, path)?.is_some() {
            self.tree.remove(name, path)?;
        }
        if self.tree.look_below(path)?.is_none() {
            self.stats.needless_whiteouts += 1;
            return Ok(());
        }
        self.make_whiteout(name, path)
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
        if self.tree.reach(path)? == Reached::Not {
            self.stats.skipped_entries += 1;
            return Ok(());
        }
        self.stats.opaque_directories += 1;
        let path = self.tree.path().to_vec();
        if path.is_empty() {
            self.root_is_opaque = true;
            return Ok(());
        }
        self.tree.set_opaque(&path, true)
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
        if let Some(name) = &options.contents {
            // Before the root gets its times.
            remove_name(self.tree.root(), name.as_bytes())
                .map_err(|error| ImportError::io("remove the contents for", b"", error))?;
        }
        self.tree.finish()?;
        self.stats.bytes = self.tar.offset();
        self.stats.implied_directories = self.tree.counts.implied_directories;
        self.stats.dropped_xattrs = self.tree.counts.dropped_xattrs;
        self.stats.unsupported_xattrs = self.tree.counts.unsupported_xattrs;
        self.check_limit()?;
        Ok(self.stats)
    }
}

/// Makes something under a name, in the place of what an earlier entry made there.
fn replacing(
    tree: &mut UpperTree,
    name: &[u8],
    path: &[u8],
    mut make: impl FnMut(&UpperTree) -> nix::Result<()>,
) -> Result<(), ImportError> {
    let made = match make(tree) {
        Err(Errno::EEXIST) => {
            tree.replace(name, path)?;
            make(tree)
        }
        made => made,
    };
    made.map_err(|errno| ImportError::io("make", path, errno))
}

fn create_file(
    tree: &mut UpperTree,
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
