//! What the export needs of an inode, taken in one go: descriptor, attributes, marks, small data.
//!
//! Several threads do this at once (read_ahead.rs), so nothing here fails: what cannot be loaded, for
//! whatever reason, is left to the thread that writes. It looks itself and finds the same, or the
//! error that it tells.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::sys::stat::fstat;

use crate::directory_listing::DirectoryListing;
use crate::inode_attributes::{InodeAttributes, InodeType};
use crate::open_for_export::{open_file, open_listed};
use crate::overlay_marks::{OverlayMarks, OverlayXattrs, read_marks_and_xattrs};
use crate::sparse::find_segments;
use crate::xattrs::{Xattr, XattrHolder, XattrReader};

/// Names that are loaded together: some 100 us of work, against 1 us for handing it over. In tests so
/// few that their small trees are several batches.
pub(crate) const BATCH_NAMES: usize = if cfg!(test) { 3 } else { 64 };
/// Largest file that is loaded. Reading a larger one costs more than all the other calls for it, and
/// the writer reads it without a copy.
const MAX_FILE_BYTES: u64 = 32 * 1024;
/// Most data of a batch; this and `MAX_OUTSTANDING` of read_ahead.rs bound the memory.
const MAX_BATCH_BYTES: usize = 256 * 1024;

/// A small regular file with its data, unchanged from before the first byte until after the last.
#[derive(Debug)]
pub(crate) struct LoadedFile {
    pub(crate) attributes: InodeAttributes,
    pub(crate) marks: OverlayMarks,
    pub(crate) xattrs: Vec<Xattr>,
    pub(crate) data: Range<usize>,
}

/// Successive names of one directory.
#[derive(Debug, Default)]
pub(crate) struct FileBatch {
    /// Positions in the listing.
    pub(crate) names: Range<usize>,
    /// By position from the start of `names`; None: to be looked at by the writer.
    pub(crate) files: Vec<Option<LoadedFile>>,
    pub(crate) data: Arc<Vec<u8>>,
}

/// An open directory, its names, and the files that come first in it.
#[derive(Debug)]
pub(crate) struct LoadedDirectory {
    pub(crate) fd: OwnedFd,
    pub(crate) attributes: InodeAttributes,
    pub(crate) marks: OverlayMarks,
    pub(crate) xattrs: Vec<Xattr>,
    pub(crate) listing: DirectoryListing,
    pub(crate) first_files: FileBatch,
}

/// How to load; one for each thread, because of its buffers.
#[derive(Debug)]
pub(crate) struct Loader {
    pub(crate) reader: XattrReader,
    pub(crate) namespace: OverlayXattrs,
    pub(crate) fill_holes: bool,
    pub(crate) in_use: bool,
}

impl Loader {
    pub(crate) fn new(namespace: OverlayXattrs, fill_holes: bool, in_use: bool) -> Self {
        Loader {
            reader: XattrReader::new(),
            namespace,
            fill_holes,
            in_use,
        }
    }

    /// Loads the regular files among some names of a directory.
    pub(crate) fn load_files(
        &mut self,
        directory: BorrowedFd<'_>,
        listing: &DirectoryListing,
        names: Range<usize>,
    ) -> FileBatch {
        let mut data = Vec::new();
        let files = names.clone().map(|position| {
            let (name, inode_type) = listing.get(position)?;
            if inode_type != Some(InodeType::Regular) {
                return None;
            }
            let start = data.len();
            let loaded = self.load_file(directory, name, &mut data);
            if loaded.is_none() {
                data.truncate(start);
            }
            loaded
        });
        FileBatch {
            files: files.collect(),
            names,
            data: Arc::new(data),
        }
    }

    fn load_file(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &[u8],
        data: &mut Vec<u8>,
    ) -> Option<LoadedFile> {
        let file = File::from(open_file(directory, name, name, self.in_use).ok()?);
        let attributes = InodeAttributes::from(fstat(&file).ok()?);
        let start = data.len();
        let end = start + usize::try_from(attributes.size).ok()?;
        if attributes.inode_type != InodeType::Regular
            || attributes.size > MAX_FILE_BYTES
            || end > MAX_BATCH_BYTES
        {
            return None;
        }
        let (marks, xattrs) = self.read_marks(file.as_fd()).ok()?;
        // Files that are not what they look like.
        if marks.xattr_whiteout || marks.metacopy || marks.indexed_links {
            return None;
        }
        if !self.fill_holes && find_segments(&file, attributes.size).ok()?.is_some() {
            return None;
        }
        data.resize(end, 0);
        file.read_exact_at(&mut data[start..], 0).ok()?;
        let after = InodeAttributes::from(fstat(&file).ok()?);
        attributes.unchanged_in(&after).then_some(LoadedFile {
            attributes,
            marks,
            xattrs,
            data: start..end,
        })
    }

    /// Opens a directory and loads what comes before its first subdirectory.
    pub(crate) fn load_directory(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
    ) -> Option<LoadedDirectory> {
        let fd = open_listed(parent, name, name).ok()?;
        let attributes = InodeAttributes::from(fstat(&fd).ok()?);
        let (marks, xattrs) = self.read_marks(fd.as_fd()).ok()?;
        let mut listing = DirectoryListing::default();
        listing.read(fd.as_fd()).ok()?;
        let first_files = self.load_files(fd.as_fd(), &listing, listing.files_from(0, BATCH_NAMES));
        Some(LoadedDirectory {
            fd,
            attributes,
            marks,
            xattrs,
            listing,
            first_files,
        })
    }

    fn read_marks(&mut self, fd: BorrowedFd<'_>) -> io::Result<(OverlayMarks, Vec<Xattr>)> {
        let mut xattrs = Vec::new();
        let holder = XattrHolder::Open(fd);
        let marks = read_marks_and_xattrs(&mut self.reader, holder, self.namespace, &mut xattrs)?;
        Ok((marks, xattrs))
    }
}
