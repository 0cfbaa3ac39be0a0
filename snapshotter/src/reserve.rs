//! Room on the disk for removals.
//!
//! Even the deletion of a record needs room, in SQLite's WAL: on a full disk nothing could be removed any more,
//! and there would never be room again. So a file `metadata.reserve` of [`LENGTH`] bytes lies beside the database.
//! When a removal, or the start of the daemon, finds the disk full, it is deleted; then nothing new is made until
//! it can be made again. File systems without fallocate have no reserve.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use transship_path_error::During as _;

use crate::error::Result;

/// Many removals, each of which makes room, and what the WAL holds when it is copied into the database.
const LENGTH: u32 = 1 << 20;
/// What is written to see whether it may be: more than a file system keeps in an inode.
const PROBE: usize = 64 << 10;

/// The file that keeps the room.
#[derive(Debug)]
pub(crate) struct Reserve {
    path: PathBuf,
    is_low: AtomicBool,
}

impl Reserve {
    /// Takes the reserve of the database at `path`; it is made if there is room.
    ///
    /// # Errors
    /// I/O errors other than a full disk.
    pub(crate) fn beside(path: &Path) -> Result<Self> {
        let reserve = Self {
            path: path.with_extension("reserve"),
            is_low: AtomicBool::new(true),
        };
        match reserve.refill() {
            Err(error) if !error.is_disk_full() => Err(error),
            _ => Ok(reserve),
        }
    }

    /// Makes the reserve if it is not there.
    ///
    /// # Errors
    /// When there is no room.
    pub(crate) fn refill(&self) -> Result<()> {
        if !self.is_low.load(Ordering::Acquire) {
            return Ok(());
        }
        let make = || {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&self.path)?;
            match fallocate(file, FallocateFlags::empty(), 0, i64::from(LENGTH)) {
                Ok(()) | Err(Errno::EOPNOTSUPP) => Ok(()),
                Err(error) => Err(io::Error::from(error)),
            }
        };
        make().during("reserve room in", &self.path)?;
        self.is_low.store(false, Ordering::Release);
        Ok(())
    }

    /// Whether nothing more may be written by whom this daemon is counted to. SQLite knows a full disk alone, and takes
    /// that for a write that has failed.
    pub(crate) fn is_over_quota(&self) -> bool {
        let path = self.path.with_extension("probe");
        let write = || {
            let mut open = OpenOptions::new();
            let open = open.write(true).create(true).truncate(true).mode(0o600);
            let mut file = open.open(&path)?;
            file.write_all(&[1; PROBE])?;
            file.sync_all()
        };
        let written = write();
        // It goes with the next one.
        drop(fs::remove_file(&path));
        written.is_err_and(|error| error.kind() == io::ErrorKind::QuotaExceeded)
    }

    /// Gives the room back to the disk; `false`: there was none.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn give_up(&self) -> Result<bool> {
        self.is_low.store(true, Ordering::Release);
        match fs::remove_file(&self.path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Ok(Err(error).during("delete", &self.path)?),
        }
    }
}
