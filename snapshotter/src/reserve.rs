//! The database file, with room kept behind its end.
//!
//! redb writes changed pages to new places, so even the deletion of a record needs room: on a full disk
//! nothing could be removed any more, and there would never be room again. So the blocks of the next
//! [`RESERVE`] bytes always belong to the file already (fallocate with KEEP_SIZE):
//!
//! ```text
//! |  what redb knows  |  reserve, 1 MiB  |
//! 0              length                    allocated
//! ```
//!
//! When the reserve cannot be refilled, only removals may use it, until it can. Already when the disk has
//! less than [`AMPLE`] left, every transaction is made durable in redb at once (see metadata.rs): so that
//! a full disk never meets a pass of the journal whose pages are still to be written. File systems without
//! fallocate have no reserve and behave as redb does.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::fstatvfs;
use redb::backends::FileBackend;
use redb::{BackendError, DatabaseError, StorageBackend};

/// A removal rewrites a dozen pages of 4 KiB; this is room for many before the first gets its pages
/// back.
const RESERVE: u64 = 1 << 20;

/// Room on the disk at which nothing may be put off: many times what one pass of the journal makes redb
/// write.
const AMPLE: u64 = 64 << 20;

/// Whether the reserve is full. It outlives the database handles that come and go with I/O errors.
#[derive(Debug, Default)]
pub(crate) struct Reserve {
    is_low: AtomicBool,
    file: Mutex<Option<File>>,
    /// Any file on the disk, to ask for its room; without one there always is some.
    watched: OnceLock<File>,
}

impl Reserve {
    /// Watches the disk that `file` lies on.
    ///
    /// # Errors
    /// When the process has no more descriptors.
    pub(crate) fn watch(&self, file: &File) -> io::Result<()> {
        // A second file would be on the same disk.
        drop(self.watched.set(file.try_clone()?));
        Ok(())
    }

    /// Whether the reserve is full and the disk far from it, so that what is written later finds room.
    pub(crate) fn has_ample_room(&self) -> bool {
        if self.is_low.load(Ordering::Acquire) {
            return false;
        }
        let Some(file) = self.watched.get() else {
            return true;
        };
        fstatvfs(file).is_ok_and(|disk| disk.blocks_available() * disk.fragment_size() >= AMPLE)
    }

    /// Refills the reserve if it is not full.
    ///
    /// # Errors
    /// When there is no room.
    pub(crate) fn refill(&self) -> io::Result<()> {
        if !self.is_low.load(Ordering::Acquire) {
            return Ok(());
        }
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = file.as_ref() else {
            return Ok(());
        };
        self.allocate(file, file.metadata()?.len())
    }

    fn allocate(&self, file: &File, length: u64) -> io::Result<()> {
        let end = i64::try_from(length + RESERVE).map_err(|_| Errno::EFBIG)?;
        let outcome = fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, end);
        self.is_low
            .store(outcome == Err(Errno::ENOSPC), Ordering::Release);
        match outcome {
            Ok(()) | Err(Errno::EOPNOTSUPP) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// The database file.
pub(crate) struct ReservingFile {
    inner: FileBackend,
    file: File,
    reserve: Arc<Reserve>,
}

impl fmt::Debug for ReservingFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReservingFile")
            .field("reserve", &self.reserve)
            .finish_non_exhaustive()
    }
}

impl ReservingFile {
    /// Keeps room behind the end of `file`.
    pub(crate) fn new(file: File, reserve: &Arc<Reserve>) -> Result<Self, DatabaseError> {
        let (copy, other) = (file.try_clone()?, file.try_clone()?);
        *reserve.file.lock().unwrap_or_else(PoisonError::into_inner) = Some(other);
        let this = Self {
            inner: FileBackend::new(file)?,
            file: copy,
            reserve: Arc::clone(reserve),
        };
        this.keep_reserve(this.file.metadata()?.len())?;
        Ok(this)
    }

    /// Being without a reserve is no failure of what redb asked for.
    fn keep_reserve(&self, length: u64) -> io::Result<()> {
        match self.reserve.allocate(&self.file, length) {
            Err(error) if error.kind() != io::ErrorKind::StorageFull => Err(error),
            _ => Ok(()),
        }
    }
}

impl StorageBackend for ReservingFile {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.inner.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)?;
        self.keep_reserve(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.inner.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        // The copy shares the file's lock, which would stay as long as the copy.
        *self
            .reserve
            .file
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
        self.inner.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.inner.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.query_lock_range(start, end)
    }
}
