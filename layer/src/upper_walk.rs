//! A walk of an upperdir by directory descriptors, in the order of the tar.
//!
//! Not walkdir: it works with whole paths, which the kernel refuses beyond 4 096 bytes and resolves
//! again for every file, and it would leave no descriptor for `fstatat` and the xattr calls. Paths
//! here are only text for the tar; each system call names one component below an open directory, so
//! nothing that a running container does to its tree leads the walk out of it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sys::stat::fstat;

use crate::directory_listing::DirectoryListing;
use crate::directory_stack::{DirectoryStack, LeaveError};
use crate::export_error::ExportError;
use crate::inode_attributes::{InodeAttributes, InodeType};
use crate::load::{BATCH_NAMES, FileBatch, LoadedDirectory, LoadedFile};
use crate::read_ahead::{Job, Loaded, ReadAhead};

/// A directory that is being walked.
#[derive(Debug)]
struct WalkedDirectory {
    listing: Arc<DirectoryListing>,
    next: usize,
    /// Names before this one are loaded, are being loaded, or are left to the writer.
    scheduled: usize,
    /// In the order of the names.
    jobs: VecDeque<Arc<Job>>,
    /// The files that were loaded last.
    batch: FileBatch,
    /// Length of its path in the walk's current path.
    path_len: usize,
    attributes: InodeAttributes,
    /// Where in the lower layers the directory has its lower half, when that is another place than
    /// its own path: it or one above it was renamed with `redirect_dir=on`.
    lower_path: Option<Vec<u8>>,
}

/// Where the walk stands. Depth first; `path` is that of the name handed out last.
#[derive(Debug)]
pub(crate) struct UpperWalk {
    directories: DirectoryStack<WalkedDirectory>,
    path: Vec<u8>,
    read_ahead: ReadAhead,
    /// Whether CRIU dumps the container meanwhile.
    beside_criu: bool,
}

impl UpperWalk {
    pub(crate) fn new(read_ahead: ReadAhead, beside_criu: bool) -> Self {
        UpperWalk {
            directories: DirectoryStack::new(),
            path: Vec::new(),
            read_ahead,
            beside_criu,
        }
    }

    /// Path of the name handed out last; empty for the root.
    pub(crate) fn path(&self) -> &[u8] {
        &self.path
    }

    /// The directory that holds that name. Present between `next_name` and `enter`.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directories.fd()
    }

    /// Path of the lower half of the directory that holds that name, when it was renamed.
    pub(crate) fn lower_path(&self) -> Option<&[u8]> {
        self.directories.note()?.lower_path.as_deref()
    }

    /// Whether the innermost directory of the upperdir has a name, deleted ones included.
    pub(crate) fn innermost_has(&self, name: &[u8]) -> bool {
        self.directories
            .note()
            .is_some_and(|directory| directory.listing.has(name))
    }

    /// Goes on with the names in a directory: the root, or the one named last. Its marks and
    /// attributes have been written.
    pub(crate) fn enter(&mut self, directory: LoadedDirectory, lower_path: Option<Vec<u8>>) {
        let identity = directory.attributes.identity;
        let walked = WalkedDirectory {
            listing: Arc::new(directory.listing),
            next: 0,
            scheduled: directory.first_files.names.end,
            jobs: VecDeque::new(),
            batch: directory.first_files,
            path_len: self.path.len(),
            attributes: directory.attributes,
            lower_path,
        };
        self.directories.push(directory.fd, identity, walked);
    }

    /// Steps to the next name and returns its type as the directory tells it. None at the end.
    pub(crate) fn next_name(&mut self) -> Result<Option<NextName>, ExportError> {
        while let Some((fd, innermost)) = self.directories.innermost_mut() {
            self.path.truncate(innermost.path_len);
            innermost.read_on(fd, &mut self.read_ahead);
            let position = innermost.next;
            if let Some((name, inode_type)) = innermost.listing.get(position) {
                innermost.next += 1;
                if self.beside_criu && is_place_of_criu(&self.path, name) {
                    drop(innermost.take_loaded(position, &mut self.read_ahead));
                    continue;
                }
                crate::path_bytes::push_component(&mut self.path, name);
                return Ok(Some(NextName {
                    name_len: name.len(),
                    inode_type,
                    loaded: innermost.take_loaded(position, &mut self.read_ahead),
                }));
            }
            self.leave()?;
        }
        Ok(None)
    }

    /// Leaves the innermost directory, which must be what it was when its names were read.
    fn leave(&mut self) -> Result<(), ExportError> {
        let Some((fd, left)) = self.directories.innermost_mut() else {
            return Ok(());
        };
        for job in &left.jobs {
            self.read_ahead.forget(job);
        }
        let now = fstat(fd).map_err(|errno| ExportError::io("stat", &self.path, errno))?;
        if !left.attributes.unchanged_in(&now.into()) {
            let by_criu = self.beside_criu && { left.changed_by_criu(fd, &self.path, &now.into()) }
                .map_err(|error| ExportError::io("list", &self.path, error))?;
            if !by_criu {
                return Err(ExportError::changed(&self.path));
            }
        }
        self.directories.leave().map_err(|error| match error {
            LeaveError::Moved => ExportError::changed(&self.path),
            LeaveError::Io(error) => ExportError::io("open the parent of", &self.path, error),
        })
    }
}

/// Whether a name is that of a directory which CRIU makes for a moment, to mount a tmpfs of the container on it: `mkdtemp`
/// of `/tmp/cr-tmpfs.XXXXXX`, or of `/cr-tmpfs.XXXXXX` where there is no `/tmp` (`get_clean_mnt` of `criu/mount.c`).
fn is_place_of_criu(directory: &[u8], name: &[u8]) -> bool {
    let random = name.strip_prefix(b"cr-tmpfs.");
    let is_made = |random: &[u8]| random.len() == 6 && random.iter().all(u8::is_ascii_alphanumeric);
    matches!(directory, b"" | b"tmp") && random.is_some_and(is_made)
}

impl WalkedDirectory {
    /// Whether only CRIU has changed the directory at `path`: it has made its place there and removed it, and for that
    /// overlayfs has copied `/tmp` up.
    fn changed_by_criu(
        &self,
        fd: &Arc<OwnedFd>,
        path: &[u8],
        now: &InodeAttributes,
    ) -> io::Result<bool> {
        let then = &self.attributes;
        let same = then.identity == now.identity
            && (then.mode, then.uid, then.gid) == (now.mode, now.uid, now.gid);
        if !same || !matches!(path, b"" | b"tmp") {
            return Ok(false);
        }
        let mut listing = DirectoryListing::default();
        listing.read(fd.as_fd())?;
        let others = |name: &&[u8]| !is_place_of_criu(path, name);
        let then = { self.listing.iter() }.map(|(name, _)| name).filter(others);
        let copied_up = path.is_empty() && !self.listing.has(b"tmp");
        let now = { listing.iter() }
            .map(|(name, _)| name)
            .filter(others)
            .filter(|name| !(copied_up && *name == b"tmp"));
        Ok(now.eq(then))
    }

    /// Has what comes next loaded, as far as there is room.
    fn read_on(&mut self, fd: &Arc<OwnedFd>, read_ahead: &mut ReadAhead) {
        while read_ahead.has_room(self.jobs.len()) {
            let Some((_, inode_type)) = self.listing.get(self.scheduled) else {
                return;
            };
            let names = if inode_type == Some(InodeType::Directory) {
                self.scheduled..self.scheduled + 1
            } else {
                self.listing.files_from(self.scheduled, BATCH_NAMES)
            };
            self.scheduled = names.end;
            let job = read_ahead.begin(fd, &self.listing, names);
            self.jobs.push_back(job);
        }
    }

    /// What was loaded of a name. Each is asked for once, in order.
    fn take_loaded(&mut self, position: usize, read_ahead: &mut ReadAhead) -> LoadedName {
        let is_due = |job: &Arc<Job>| job.names().start <= position;
        if self.jobs.front().is_some_and(is_due)
            && let Some(job) = self.jobs.pop_front()
        {
            match read_ahead.redeem(&job) {
                Loaded::Files(batch) => self.batch = batch,
                Loaded::Directory(directory) => return LoadedName::Directory(directory),
                Loaded::Nothing => {}
            }
        }
        let batch = &mut self.batch;
        let at = position.checked_sub(batch.names.start);
        let file = at.and_then(|at| batch.files.get_mut(at)?.take());
        file.map_or(LoadedName::Nothing, |file| LoadedName::File {
            file,
            data: Arc::clone(&batch.data),
        })
    }
}

/// A step of the walk.
#[derive(Debug)]
pub(crate) struct NextName {
    /// The name is that many last bytes of the path.
    pub(crate) name_len: usize,
    pub(crate) inode_type: Option<InodeType>,
    pub(crate) loaded: LoadedName,
}

/// What has been loaded of a name before the walk came to it.
#[derive(Debug)]
pub(crate) enum LoadedName {
    Nothing,
    File {
        file: LoadedFile,
        /// What `LoadedFile::data` is a part of.
        data: Arc<Vec<u8>>,
    },
    Directory(Box<LoadedDirectory>),
}
