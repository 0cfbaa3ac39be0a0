//! Export: an overlay upperdir becomes an OCI layer tar.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, PosixFadviseAdvice, open, posix_fadvise, readlinkat};
use nix::sys::stat::{Mode, fstat, fstatat};
use std::os::unix::ffi::OsStrExt;
use tar::EntryType;

use crate::contents::KnownContents;
use crate::directory_listing::DirectoryListing;
pub use crate::export_error::ExportError;
use crate::inode_attributes::{InodeAttributes, InodeType, Timestamp};
use crate::layer_format::{LayerFormat, LiteralNames};
use crate::load::{FileBatch, LoadedDirectory, LoadedFile};
use crate::lower_view::LowerView;
use crate::open_for_export::{open_file, open_listed};
use crate::overlay_marks::{OverlayMarks, read_marks_and_xattrs};
use crate::overlay_stack::OverlayStack;
use crate::path_bytes::{components, push_component, split_last, to_path_buf};
use crate::read_ahead::ReadAhead;
use crate::sparse::{Segment, find_segments};
use crate::tar_write::{EntryHead, TarWriter};
use crate::upper_walk::{LoadedName, NextName, UpperWalk};
use crate::xattrs::{Xattr, XattrHolder, XattrReader};

/// Prefix by which an OCI layer says that a name of a lower layer is deleted.
pub(crate) const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// Name by which an OCI layer says that a directory hides all of the lower layers.
pub(crate) const OPAQUE_NAME: &[u8] = b".wh..wh..opq";

/// Paths that `ExportStats` names as examples, so that it stays small whatever the layer.
const MAX_NOTED_PATHS: usize = 16;
/// Memory for the first names of files with several: a million files a hundred bytes deep. A container can nest thousands of
/// directories, and a path of each file is kept.
const MAX_LINKS_BYTES: usize = 128 << 20;
/// From this size on the kernel is told that a file is read from front to end.
const SEQUENTIAL_READ_BYTES: u64 = 1 << 20;

/// How to export.
#[derive(Debug, Clone, Default)]
pub struct ExportOptions {
    /// Times later than this (seconds since 1970) are written as this, as the `SOURCE_DATE_EPOCH`
    /// specification asks for reproducible builds.
    pub source_date_epoch: Option<u64>,
    /// For whom the layer is.
    pub format: LayerFormat,
    /// What the importer has already; only for a checkpoint.
    pub known: Option<Arc<KnownContents>>,
    /// Whether CRIU dumps the container meanwhile: what it makes there for a moment is nobody's change.
    pub beside_criu: bool,
    /// Whether somebody may write there meanwhile who is not trusted: what is opened is looked at before.
    pub in_use: bool,
}

/// What an export wrote, and what it could not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportStats {
    /// Entries of the tar, whiteouts and opaque markers included.
    pub entries: u64,
    /// Bytes of the tar.
    pub bytes: u64,
    /// Whiteouts (`.wh.x`) written.
    pub whiteouts: u64,
    /// Opaque markers (`.wh..wh..opq`) written.
    pub opaque_directories: u64,
    /// Entries that are links to an earlier one.
    pub hard_links: u64,
    /// Regular files without data, because the importer has it.
    pub known_files: u64,
    /// Regular files written with their holes left out.
    pub sparse_files: u64,
    /// Files whose data came from a lower layer, because the upperdir has only their attributes.
    pub metacopy_files: u64,
    /// Sockets left out, as containerd does: tar has no type for them, and who listens makes them.
    /// Where one hides a file of a lower layer, a whiteout stands for it.
    pub sockets: u64,
    /// Changed files that had further hard links in the lower layer. The container sees these as
    /// separate files since the change, and so will the importer.
    pub broken_lower_links: u64,
    /// Files with inode flags such as `chattr +i`, which a tar cannot carry.
    pub lost_inode_flags: u64,
    /// Attributes named like overlay's own that a program had set; they cannot be carried.
    pub lost_xattrs: u64,
    /// Examples of the paths counted in `broken_lower_links`, `lost_inode_flags`, `lost_xattrs`.
    pub noted_paths: Vec<PathBuf>,
}

/// Writes the OCI layer tar, uncompressed, of the topmost directory of an overlay.
///
/// The lowerdirs are asked only by name and only where that makes the layer exact or
/// smaller: whether an opaque directory or a socket hides anything, for the data of `metacopy`
/// files, and for notes about hard links. The stack may have none: markers are then written
/// without asking, and `metacopy` files are refused. The cost is O(changes), never O(image).
///
/// The directory must not change meanwhile. When it does, the export fails with
/// [`ExportError::Changed`]; it never writes a torn file without a word.
///
/// # Errors
/// See [`ExportError`]. What was written to `out` before it is not a layer.
pub fn export_upperdir<W: Write>(
    stack: &OverlayStack,
    out: W,
    options: &ExportOptions,
) -> Result<ExportStats, ExportError> {
    export_to(stack, TarWriter::new(out), options)
}

/// Writes the same tar as [`export_upperdir`] to a regular file, at its position, and lets the kernel
/// copy large files into it: half the time, where nobody needs to see the bytes.
///
/// # Errors
/// As [`export_upperdir`].
pub fn export_upperdir_to_file(
    stack: &OverlayStack,
    out: &File,
    options: &ExportOptions,
) -> Result<ExportStats, ExportError> {
    let mut tar = TarWriter::new(out);
    // Anything else than a regular file would keep references to the pages of the source.
    if out.metadata().is_ok_and(|metadata| metadata.is_file())
        && let Ok(target) = out.try_clone()
    {
        tar = tar.with_copy_target(target.into());
    }
    export_to(stack, tar, options)
}

fn export_to<W: Write>(
    stack: &OverlayStack,
    tar: TarWriter<W>,
    options: &ExportOptions,
) -> Result<ExportStats, ExportError> {
    let fill_holes = options.format == LayerFormat::Image;
    let read_ahead = ReadAhead::new(stack.overlay_xattrs, fill_holes, options.in_use);
    export_with(stack, tar, options, read_ahead)
}

pub(crate) fn export_with<W: Write>(
    stack: &OverlayStack,
    tar: TarWriter<W>,
    options: &ExportOptions,
    read_ahead: ReadAhead,
) -> Result<ExportStats, ExportError> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = open(&stack.top, flags, Mode::empty()).map_err(|errno| ExportError::Io {
        act: "open",
        path: stack.top.clone(),
        source: errno.into(),
    })?;
    let mut export = Export {
        tar,
        lower: LowerView::open(&stack.lowerdirs, stack.overlay_xattrs)?,
        stack,
        options,
        stats: ExportStats::default(),
        links: HashMap::new(),
        links_bytes: 0,
        xattr_reader: XattrReader::new(),
        xattrs: Vec::new(),
    };
    let mut walk = UpperWalk::new(read_ahead, options.beside_criu);
    let root = export.look_into(root, b"")?;
    export.write_directory(&mut walk, root)?;
    while let Some(next) = walk.next_name()? {
        export.write_name(&mut walk, next)?;
    }
    export.stats.bytes = export.tar.finish()?;
    Ok(export.stats)
}

/// The first name of an inode with several, and how many names are still to come.
struct FirstLink {
    path: Vec<u8>,
    left: u64,
}

/// Where the data of an entry is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Data<'a> {
    /// All of it behind the header, or there is none.
    Follows,
    /// These parts of it, behind the header.
    Sparse(&'a [Segment]),
    /// The importer has it, by this number (contents.rs).
    Known(u64),
}

pub(crate) struct Export<'o, W> {
    pub(crate) tar: TarWriter<W>,
    pub(crate) lower: LowerView,
    pub(crate) stack: &'o OverlayStack,
    pub(crate) options: &'o ExportOptions,
    pub(crate) stats: ExportStats,
    /// Inodes with more names than were met yet. An entry goes when its last name is written.
    links: HashMap<(u64, u64), FirstLink>,
    /// Bytes of their paths.
    links_bytes: usize,
    pub(crate) xattr_reader: XattrReader,
    /// Attributes of the current inode.
    pub(crate) xattrs: Vec<Xattr>,
}

impl<W: Write> Export<'_, W> {
    fn write_name(&mut self, walk: &mut UpperWalk, next: NextName) -> Result<(), ExportError> {
        let path = walk.path();
        let name = &path[path.len() - next.name_len..];
        let inode_type = match next.inode_type {
            Some(inode_type) => inode_type,
            None => stat_name(walk, name)?.inode_type,
        };
        match inode_type {
            InodeType::Directory => {
                let directory = if let LoadedName::Directory(directory) = next.loaded {
                    *directory
                } else {
                    let fd = open_listed(walk.directory(), name, path)?;
                    self.look_into(fd, path)?
                };
                self.write_directory(walk, directory)
            }
            InodeType::Regular => {
                if let LoadedName::File { file, data } = next.loaded {
                    return self.write_loaded(path, file, &data);
                }
                let fd = open_file(walk.directory(), name, path, self.options.in_use)?;
                self.write_regular(walk, path, File::from(fd))
            }
            InodeType::Socket => self.write_socket(walk, path),
            InodeType::Symlink
            | InodeType::CharDevice
            | InodeType::BlockDevice
            | InodeType::Fifo => self.write_special(walk, path, name),
        }
    }

    /// Reads what an open directory is and has.
    fn look_into(&mut self, fd: OwnedFd, path: &[u8]) -> Result<LoadedDirectory, ExportError> {
        let attributes = stat_open(&fd, path)?;
        let marks = self.read_marks(XattrHolder::Open(fd.as_fd()), path)?;
        let mut listing = DirectoryListing::default();
        listing
            .read(fd.as_fd())
            .map_err(|error| ExportError::io("list", path, error))?;
        Ok(LoadedDirectory {
            fd,
            attributes,
            marks,
            xattrs: std::mem::take(&mut self.xattrs),
            listing,
            first_files: FileBatch::default(),
        })
    }

    /// Writes the entry of a directory and its opaque marker, and walks on inside it.
    fn write_directory(
        &mut self,
        walk: &mut UpperWalk,
        mut directory: LoadedDirectory,
    ) -> Result<(), ExportError> {
        let path = walk.path();
        let marks = std::mem::take(&mut directory.marks);
        self.xattrs = std::mem::take(&mut directory.xattrs);
        self.note_marks(&marks, path)?;
        let lower_path = self.lower_path_of(walk, &marks)?;
        // An image's `/` belongs to the snapshot; containerd writes no entry for it either, and the layer of
        // an unchanged container has the digest that tools know as that of the empty layer.
        if !path.is_empty() || self.options.format == LayerFormat::Checkpoint {
            self.write_directory_entry(path, &directory.attributes)?;
        }
        // Overlay never looks at `opaque` on the root: the root is always merged.
        let is_opaque = marks.opaque && !path.is_empty() || marks.redirect.is_some();
        if is_opaque && self.hides_directory(path)? {
            let mut marker = path.to_vec();
            push_component(&mut marker, OPAQUE_NAME);
            self.write_marker(&marker)?;
            self.stats.opaque_directories += 1;
        }
        let is_renamed = lower_path.is_some();
        walk.enter(directory, lower_path);
        if is_renamed {
            self.write_lower_half(walk)
        } else {
            Ok(())
        }
    }

    /// Writes the entry of a directory with the attributes in `self.xattrs`.
    pub(crate) fn write_directory_entry(
        &mut self,
        path: &[u8],
        attributes: &InodeAttributes,
    ) -> Result<(), ExportError> {
        let path = if path.is_empty() { &b"."[..] } else { path };
        self.write_entry(
            &[path, b"/"].concat(),
            EntryType::Directory,
            attributes,
            b"",
            Data::Follows,
        )
    }

    /// Whether an opaque directory hides one of the lower layers. With index or metacopy on, overlay
    /// marks each new directory in a merged one (`ovl_create_upper`), which hides nothing.
    fn hides_directory(&mut self, path: &[u8]) -> Result<bool, ExportError> {
        if self.lower.is_empty() {
            return Ok(true);
        }
        let below = self.lower.look_up(path)?;
        Ok(below.is_some_and(|inode| inode.attributes.is_directory()))
    }

    fn write_regular(
        &mut self,
        walk: &UpperWalk,
        path: &[u8],
        file: File,
    ) -> Result<(), ExportError> {
        let attributes = stat_open(&file, path)?;
        if attributes.inode_type != InodeType::Regular {
            return Err(ExportError::changed(path));
        }
        let marks = self.read_marks(XattrHolder::Open(file.as_fd()), path)?;
        self.note_marks(&marks, path)?;
        if marks.xattr_whiteout && attributes.size == 0 {
            return self.write_whiteout(walk, path);
        }
        if self.write_hard_link(path, &attributes, &marks)? {
            return Ok(());
        }
        if marks.metacopy {
            return self.write_metacopy(walk, path, &attributes, &marks);
        }
        let known = self.options.known.as_ref();
        if let Some(number) = known.and_then(|known| known.number_of(&attributes)) {
            self.stats.known_files += 1;
            return self.write_known(path, &attributes, number);
        }
        self.write_data(path, &attributes, &file)?;
        if attributes.unchanged_in(&stat_open(&file, path)?) {
            Ok(())
        } else {
            Err(ExportError::changed(path))
        }
    }

    /// Writes a file whose content the importer has.
    fn write_known(
        &mut self,
        path: &[u8],
        attributes: &InodeAttributes,
        number: u64,
    ) -> Result<(), ExportError> {
        let mut empty = *attributes;
        empty.size = 0;
        let data = Data::Known(number);
        self.write_entry(path, EntryType::Regular, &empty, b"", data)
    }

    /// Writes a small file that was read before.
    fn write_loaded(
        &mut self,
        path: &[u8],
        file: LoadedFile,
        data: &[u8],
    ) -> Result<(), ExportError> {
        let LoadedFile {
            attributes, marks, ..
        } = file;
        self.xattrs = file.xattrs;
        self.note_marks(&marks, path)?;
        if self.write_hard_link(path, &attributes, &marks)? {
            return Ok(());
        }
        self.write_entry(path, EntryType::Regular, &attributes, b"", Data::Follows)?;
        self.tar.write_bytes(&data[file.data])?;
        self.tar.pad()
    }

    pub(crate) fn write_data(
        &mut self,
        path: &[u8],
        attributes: &InodeAttributes,
        file: &File,
    ) -> Result<(), ExportError> {
        let size = attributes.size;
        if size >= SEQUENTIAL_READ_BYTES {
            // Only advice: a file system without it reads as before.
            let _advised = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL);
        }
        let segments = if self.options.format == LayerFormat::Image {
            None
        } else {
            find_segments(file, size)
                .map_err(|error| ExportError::io("find the holes of", path, error))?
        };
        self.write_entry(
            path,
            EntryType::Regular,
            attributes,
            b"",
            segments.as_deref().map_or(Data::Follows, Data::Sparse),
        )?;
        let whole = [Segment {
            offset: 0,
            len: size,
        }];
        for segment in segments.as_deref().unwrap_or(&whole) {
            if !self
                .tar
                .write_segment(file, path, segment.offset, segment.len)?
            {
                return Err(ExportError::changed(path));
            }
        }
        self.tar.pad()
    }

    /// Writes what has no data: symlinks, device nodes, FIFOs; and whiteouts, which are devices.
    fn write_special(
        &mut self,
        walk: &UpperWalk,
        path: &[u8],
        name: &[u8],
    ) -> Result<(), ExportError> {
        let attributes = stat_name(walk, name)?;
        if attributes.is_whiteout_device() {
            return self.write_whiteout(walk, path);
        }
        let directory = walk.directory();
        let marks = self.read_marks(XattrHolder::Named { directory, name }, path)?;
        self.note_marks(&marks, path)?;
        if self.write_hard_link(path, &attributes, &marks)? {
            return Ok(());
        }
        let entry_type = match attributes.inode_type {
            InodeType::Symlink => {
                let target = readlinkat(directory, name)
                    .map_err(|errno| ExportError::io("read the symlink", path, errno))?;
                let target = target.as_bytes();
                return self.write_entry(
                    path,
                    EntryType::Symlink,
                    &attributes,
                    target,
                    Data::Follows,
                );
            }
            InodeType::CharDevice => EntryType::Char,
            InodeType::BlockDevice => EntryType::Block,
            InodeType::Fifo => EntryType::Fifo,
            InodeType::Regular | InodeType::Directory | InodeType::Socket => {
                return Err(ExportError::changed(path));
            }
        };
        self.write_entry(path, entry_type, &attributes, b"", Data::Follows)
    }

    fn write_socket(&mut self, walk: &UpperWalk, path: &[u8]) -> Result<(), ExportError> {
        self.stats.sockets += 1;
        // Without lower layers to ask, the whiteout is the safe side: it does no harm.
        if self.lower.is_empty() || self.lower.look_up(path)?.is_some() {
            return self.write_whiteout(walk, path);
        }
        Ok(())
    }

    fn write_whiteout(&mut self, walk: &UpperWalk, path: &[u8]) -> Result<(), ExportError> {
        if walk.lower_path().is_some() {
            // In a renamed directory all that is to show is written; what is not, is gone.
            return Ok(());
        }
        let (parent, name) = split_last(path);
        let marker = [WHITEOUT_PREFIX, name].concat();
        if marker == OPAQUE_NAME {
            // The one name that a deletion cannot be told of: it would be an opaque directory.
            return Err(ExportError::reserved_name(path));
        }
        let mut whiteout = parent.to_vec();
        push_component(&mut whiteout, &marker);
        self.stats.whiteouts += 1;
        self.write_marker(&whiteout)
    }

    /// Writes an empty file that means something by its name. Its attributes mean nothing and are
    /// constant, so that equal trees give equal bytes.
    fn write_marker(&mut self, path: &[u8]) -> Result<(), ExportError> {
        self.stats.entries += 1;
        self.tar.write_head(&EntryHead {
            path,
            entry_type: EntryType::Regular,
            mode: 0,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: Timestamp::default(),
            link: b"",
            device: (0, 0),
            xattrs: &[],
            segments: None,
            content: None,
            literal_names: self.literal_names(path, marker_names(path))?,
        })
    }

    /// Writes a link if the inode was written under another name before. Otherwise, when it has
    /// more names, remembers this one as the first.
    pub(crate) fn write_hard_link(
        &mut self,
        path: &[u8],
        attributes: &InodeAttributes,
        marks: &OverlayMarks,
    ) -> Result<bool, ExportError> {
        if marks.indexed_links {
            return Err(ExportError::inexact(
                path,
                "index=on: hard links in a lower layer show this file under names that the upperdir \
                 does not have; mount with index=off, as containerd does",
            ));
        }
        if let Some(first) = self.links.get_mut(&attributes.identity) {
            first.left = first.left.saturating_sub(1);
            let (target, is_last) = (first.path.clone(), first.left == 0);
            if is_last {
                self.links.remove(&attributes.identity);
                self.links_bytes -= target.len();
            }
            // With its extended attributes: containerd gives the file those of each of its entries anew, and a
            // change of the owner takes the capabilities away.
            self.write_entry(path, EntryType::Link, attributes, &target, Data::Follows)?;
            self.stats.hard_links += 1;
            return Ok(true);
        }
        if attributes.links > 1 {
            self.links_bytes += path.len();
            if self.links_bytes > MAX_LINKS_BYTES {
                return Err(ExportError::inexact(
                    path,
                    "too many files here have further names, which were not met yet",
                ));
            }
            let first = FirstLink {
                path: path.to_vec(),
                left: attributes.links - 1,
            };
            self.links.insert(attributes.identity, first);
        }
        // A copy of a file with several names below has no `origin`: overlay breaks the link.
        let may_break_links = attributes.inode_type == InodeType::Regular && !marks.copied_up;
        if may_break_links && !self.lower.is_empty() {
            let below = self.lower.look_up(path)?;
            if below.is_some_and(|inode| inode.attributes.links > 1) {
                self.stats.broken_lower_links += 1;
                self.note(path);
            }
        }
        Ok(false)
    }

    /// Writes the header of an entry with the attributes in `self.xattrs`.
    pub(crate) fn write_entry(
        &mut self,
        path: &[u8],
        entry_type: EntryType,
        attributes: &InodeAttributes,
        link: &[u8],
        data: Data<'_>,
    ) -> Result<(), ExportError> {
        let (segments, content) = match data {
            Data::Follows => (None, None),
            Data::Sparse(segments) => (Some(segments), None),
            Data::Known(number) => (None, Some(number)),
        };
        let is_device = matches!(entry_type, EntryType::Char | EntryType::Block);
        self.leave_out_trusted(path);
        let literal_names = components(path)
            .any(|component| component.starts_with(WHITEOUT_PREFIX))
            .then_some(LiteralNames::All);
        let literal_names = self.literal_names(path, literal_names)?;
        self.stats.entries += 1;
        self.stats.sparse_files += u64::from(segments.is_some());
        self.tar.write_head(&EntryHead {
            path,
            entry_type,
            mode: attributes.mode,
            uid: attributes.uid,
            gid: attributes.gid,
            size: if entry_type == EntryType::Regular {
                attributes.size
            } else {
                0
            },
            mtime: self.clamp(attributes.mtime),
            link,
            device: if is_device { attributes.device } else { (0, 0) },
            xattrs: &self.xattrs,
            segments,
            literal_names,
            content,
        })
    }

    /// Passes on how a name that looks like a marker is to be read, if the format can say it.
    fn literal_names(
        &self,
        path: &[u8],
        literal: Option<LiteralNames>,
    ) -> Result<Option<LiteralNames>, ExportError> {
        match literal {
            Some(_) if self.options.format == LayerFormat::Image => {
                Err(ExportError::reserved_name(path))
            }
            literal => Ok(literal),
        }
    }

    /// Leaves out of `self.xattrs` what an image does not carry.
    fn leave_out_trusted(&mut self, path: &[u8]) {
        if self.options.format == LayerFormat::Image {
            let all = self.xattrs.len();
            self.xattrs
                .retain(|xattr| !xattr.name.starts_with(b"trusted."));
            let lost = all - self.xattrs.len();
            if lost > 0 {
                self.stats.lost_xattrs += lost as u64;
                self.note(path);
            }
        }
    }

    fn clamp(&self, time: Timestamp) -> Timestamp {
        let epoch = self
            .options
            .source_date_epoch
            .and_then(|epoch| i64::try_from(epoch).ok());
        epoch.map_or(time, |secs| time.min(Timestamp { secs, nanos: 0 }))
    }

    /// Reads the attributes of the current inode into `self.xattrs` and returns overlay's marks.
    fn read_marks(
        &mut self,
        holder: XattrHolder<'_>,
        path: &[u8],
    ) -> Result<OverlayMarks, ExportError> {
        let namespace = self.stack.overlay_xattrs;
        read_marks_and_xattrs(&mut self.xattr_reader, holder, namespace, &mut self.xattrs)
            .map_err(|error| ExportError::io("read the attributes of", path, error))
    }

    /// Counts what the layer cannot carry of an inode, and refuses what it would say wrongly.
    fn note_marks(&mut self, marks: &OverlayMarks, path: &[u8]) -> Result<(), ExportError> {
        if marks.inode_flags || marks.uncarried > 0 {
            self.stats.lost_inode_flags += u64::from(marks.inode_flags);
            self.stats.lost_xattrs += marks.uncarried;
            self.note(path);
        }
        Ok(())
    }

    fn note(&mut self, path: &[u8]) {
        if self.stats.noted_paths.len() < MAX_NOTED_PATHS {
            self.stats.noted_paths.push(to_path_buf(path));
        }
    }
}

/// For a marker: whether a component before it, or the name that it deletes, looks like another one.
fn marker_names(path: &[u8]) -> Option<LiteralNames> {
    let (parent, marker) = split_last(path);
    let looks_like_marker = |component: &[u8]| component.starts_with(WHITEOUT_PREFIX);
    let deletes_such = marker != OPAQUE_NAME && looks_like_marker(&marker[WHITEOUT_PREFIX.len()..]);
    (deletes_such || components(parent).any(looks_like_marker)).then_some(LiteralNames::Parents)
}

pub(crate) fn stat_open(fd: impl AsFd, path: &[u8]) -> Result<InodeAttributes, ExportError> {
    Ok(fstat(fd)
        .map_err(|errno| ExportError::io("stat", path, errno))?
        .into())
}

fn stat_name(walk: &UpperWalk, name: &[u8]) -> Result<InodeAttributes, ExportError> {
    match fstatat(walk.directory(), name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(stat.into()),
        Err(Errno::ENOENT) => Err(ExportError::changed(walk.path())),
        Err(errno) => Err(ExportError::io("stat", walk.path(), errno)),
    }
}
