//! The files of a package where they come to lie, and whether the disk has room for them.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use transship_checkpoint::manifest::check_name;
use transship_path_error::During as _;

use crate::error::PackageError;

/// Pages of zeros are left out of what is written: the file system has holes for them.
const HOLE: usize = 4096;
/// Bytes of the file system that stay free.
const KEPT_FREE: u64 = 64 << 20;

/// What limits a package: the disk.
pub const OF_ROOM: &str = "what is free on the disk, but for 64 MiB";

/// The disk has room for what the manifest claims, or nothing is written.
pub(crate) fn check_room(dir: &Path, bytes: u64) -> Result<(), PackageError> {
    check_fits(bytes, room(dir)?)
}

/// How many bytes there is room for on the disk.
///
/// # Errors
/// The kernel does not say.
pub fn room(dir: &Path) -> Result<u64, PackageError> {
    let stat = nix::sys::statvfs::statvfs(dir).during("ask for the free space of", dir)?;
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    Ok(free.saturating_sub(KEPT_FREE))
}

/// So many bytes fit into a room of `limit`.
pub(crate) fn check_fits(bytes: u64, limit: u64) -> Result<(), PackageError> {
    match bytes > limit {
        true => Err(PackageError::TooLarge {
            bytes,
            limit,
            of: OF_ROOM,
        }),
        false => Ok(()),
    }
}

/// A file that is made anew, with holes where it has pages of zeros.
pub(crate) struct NewFile {
    file: File,
    path: PathBuf,
    /// Bytes that came.
    pub(crate) length: u64,
    /// The page that is not whole yet.
    page: Vec<u8>,
}

impl NewFile {
    /// Makes it below `dir`; no part of `path` leads elsewhere.
    pub(crate) fn create(dir: &Path, path: &str) -> Result<Self, PackageError> {
        let mut full = dir.to_path_buf();
        let mut parts = path.split('/').peekable();
        while let Some(part) = parts.next() {
            check_name("the member's path", part)?;
            full.push(part);
            if parts.peek().is_some() {
                match DirBuilder::new().mode(0o700).create(&full) {
                    Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                        return Ok(Err(error).during("make", &full)?);
                    }
                    _ => {}
                }
            }
        }
        let mut open = OpenOptions::new();
        // Never through a link, never over a file that came before.
        open.write(true).create_new(true).mode(0o600);
        Ok(Self {
            file: open.open(&full).during("make", &full)?,
            path: full,
            length: 0,
            page: Vec::with_capacity(HOLE),
        })
    }

    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> Result<(), PackageError> {
        self.length += bytes.len() as u64;
        if !self.page.is_empty() {
            let missing = (HOLE - self.page.len()).min(bytes.len());
            self.page.extend_from_slice(&bytes[..missing]);
            bytes = &bytes[missing..];
            if self.page.len() < HOLE {
                return Ok(());
            }
            let page = std::mem::take(&mut self.page);
            self.put(&page)?;
            self.page = page;
            self.page.clear();
        }
        let whole = bytes.len() - bytes.len() % HOLE;
        self.put(&bytes[..whole])?;
        self.page.extend_from_slice(&bytes[whole..]);
        Ok(())
    }

    /// Writes whole pages: runs of data, and holes between them.
    fn put(&mut self, pages: &[u8]) -> Result<(), PackageError> {
        let is_hole = |page: &[u8]| page.iter().all(|byte| *byte == 0);
        let mut rest = pages;
        while !rest.is_empty() {
            let hole = is_hole(&rest[..HOLE]);
            let same = rest.chunks(HOLE).take_while(|page| is_hole(page) == hole);
            let length: usize = same.map(<[u8]>::len).sum();
            match hole {
                true => {
                    let by = i64::try_from(length).unwrap_or_default();
                    self.file
                        .seek(SeekFrom::Current(by))
                        .during("seek in", &self.path)?;
                }
                false => self
                    .file
                    .write_all(&rest[..length])
                    .during("write", &self.path)?,
            }
            rest = &rest[length..];
        }
        Ok(())
    }

    /// Writes what is left.
    pub(crate) fn finish(&mut self) -> Result<(), PackageError> {
        self.file
            .write_all(&self.page)
            .during("write", &self.path)?;
        Ok(self.file.set_len(self.length).during("write", &self.path)?)
    }
}
