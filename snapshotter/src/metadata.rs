//! The metadata database: which snapshots there are.
//!
//! One SQLite database in WAL mode, `metadata.sqlite` (with `-wal` beside it while the daemon runs):
//!
//! ```text
//! snapshots   key TEXT, primary      parent INTEGER            record BLOB
//!             the name               id of the parent          drawn in record.rs
//!                                    NULL: none; indexed
//! counters    name TEXT, primary     value INTEGER
//!             "next_id"              ids below it were or may have been given out; higher ones never
//! user_version  0: nothing was ever stored; 3: this layout (1 and 2 were redb's, see from_redb.rs)
//! ```
//!
//! Every write is durable before its caller goes on, and transactions are shared (group_commit.rs): one is an append
//! to the WAL and one sync (`synchronous=FULL`). Every 1000 pages SQLite copies the WAL into the
//! database and begins it anew, in blocks that it has already.
//!
//! Reads have connections of their own: they see the last transaction that is durable, and never wait for a sync.
//! While a List goes on the WAL cannot begin anew, and grows.
//!
//! When the disk fails in the middle of a COMMIT, nobody can tell whether the transaction is in the WAL, and SQLite
//! would take it up at the next start. So the connection is closed then and the WAL read anew, and the caller hears
//! that the outcome is unknown.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::vec;

use rusqlite::{Connection, ErrorCode, OpenFlags};

use transship_path_error::During as _;

use crate::batch::{Batch, Change, FORMAT, decode, find};
use crate::error::{Result, SnapshotError};
use crate::group_commit::{Apply, Deliver, GroupCommit};
use crate::record::Record;
use crate::reserve::Reserve;

/// Name of the database in the root directory.
pub const FILE: &str = "metadata.sqlite";
/// How many ids one write of "next_id" makes available.
const ID_RESERVE: u64 = 4096;
/// Pages of 4 KiB in the WAL at which it is copied into the database.
const CHECKPOINT_PAGES: u32 = 1000;
/// KiB of page cache of a connection that reads.
const READ_CACHE: usize = 256;
/// The connections are those of one process, and the WAL's index is in its memory. Else it would be a file that SQLite has mapped:
/// on a full btrfs, which gives each page that is written to a new place, that ends the process (SIGBUS).
const IN_ONE_PROCESS: &str = "unix-excl";
/// Records that [`Walk`] reads at a time.
const WALK_STEP: u32 = 256;

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS snapshots
        (key TEXT PRIMARY KEY, parent INTEGER, record BLOB NOT NULL) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS children ON snapshots (parent) WHERE parent IS NOT NULL;
    CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
";

/// The database of snapshots. Shared by reference between threads.
pub struct Metadata {
    path: PathBuf,
    cache_bytes: usize,
    /// `None` after an error that leaves the outcome of a transaction unknown.
    writer: Mutex<Option<Connection>>,
    reader: Mutex<Option<Connection>>,
    queue: GroupCommit,
    next_id: AtomicU64,
    reserved_id: AtomicU64,
    reserve: Reserve,
    is_fresh: bool,
    batch_observer: Box<dyn Fn(usize) + Send + Sync>,
}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metadata")
            .field("path", &self.path)
            .field("next_id", &self.next_id)
            .finish_non_exhaustive()
    }
}

impl Metadata {
    /// Opens the database file at `path`, creating it when missing, with a page cache of
    /// `cache_bytes`.
    ///
    /// # Errors
    /// I/O errors, a damaged file, or a layout written by a newer version.
    pub fn open(path: &Path, cache_bytes: usize) -> Result<Self> {
        let reserve = Reserve::beside(path)?;
        let open = || open_writer(path, cache_bytes);
        let writer = match open() {
            // On a full disk snapshots must be removable: the WAL and its index need some blocks.
            Err(error) if is_full(&error, &reserve) && reserve.give_up()? => open()?,
            outcome => outcome?,
        };
        let format: u32 = writer
            .pragma_query_value(None, "user_version", |row| row.get(0))
            .map_err(|error| SnapshotError::database("open", error))?;
        if format > FORMAT {
            return Err(SnapshotError::Invalid {
                reason: format!(
                    "the metadata has layout {format}, this version knows only {FORMAT}"
                ),
            });
        }
        let mut metadata = Self {
            path: path.to_path_buf(),
            cache_bytes,
            writer: Mutex::new(Some(writer)),
            reader: Mutex::new(None),
            queue: GroupCommit::default(),
            next_id: AtomicU64::new(0),
            reserved_id: AtomicU64::new(0),
            reserve,
            is_fresh: format == 0,
            batch_observer: Box::new(|_| {}),
        };
        let next_id = metadata.write_urgently(|batch| {
            let next_id = batch.counter("next_id")?.max(1);
            batch.set_counter("next_id", next_id + ID_RESERVE)?;
            Ok(Ok(next_id))
        })?;
        *metadata.next_id.get_mut() = next_id;
        *metadata.reserved_id.get_mut() = next_id + ID_RESERVE;
        // Opens the files that reads need, while there are descriptors.
        metadata.get("")?;
        Ok(metadata)
    }

    /// As [`Metadata::open`], and checks the structure of the whole file.
    ///
    /// # Errors
    /// As [`Metadata::open`].
    pub fn open_checked(path: &Path, cache_bytes: usize) -> Result<Self> {
        let metadata = Self::open(path, cache_bytes)?;
        let fault: String = metadata.read(|connection| {
            connection.query_row("PRAGMA integrity_check(1)", (), |row| row.get(0))
        })?;
        if fault != "ok" {
            let path = path.to_path_buf();
            return Err(SnapshotError::DamagedDatabase { path, fault });
        }
        Ok(metadata)
    }

    /// Refuses when the disk is so full that what is left is kept for removals.
    ///
    /// # Errors
    /// A full disk.
    pub fn require_room(&self) -> Result<()> {
        self.reserve.refill()
    }

    /// Whether the file was created by this opening (or one that never came to
    /// [`Metadata::mark_used`]).
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.is_fresh
    }

    /// Notes that the database is the one that belongs to the snapshot directories.
    ///
    /// # Errors
    /// When the change cannot be written.
    pub fn mark_used(&self) -> Result<()> {
        if !self.is_fresh {
            return Ok(());
        }
        self.write(|batch| {
            batch.set_format()?;
            Ok(Ok(()))
        })
    }

    /// Fills the empty database with records and the first free id, and notes that it is the one that belongs to
    /// the snapshot directories: all or nothing.
    pub(crate) fn fill(&mut self, records: Vec<(String, Record)>, next_id: u64) -> Result<()> {
        let reserved = next_id + ID_RESERVE;
        self.write(move |batch| {
            for (key, record) in &records {
                batch.put(key, record)?;
            }
            batch.set_counter("next_id", reserved)?;
            batch.set_format()?;
            Ok(Ok(()))
        })?;
        (*self.next_id.get_mut(), *self.reserved_id.get_mut()) = (next_id, reserved);
        self.is_fresh = false;
        Ok(())
    }

    /// Has `observe` called with the number of changes of each batch, before the callers go on.
    #[must_use]
    pub fn observed_by(mut self, observe: impl Fn(usize) + Send + Sync + 'static) -> Self {
        self.batch_observer = Box::new(observe);
        self
    }

    /// Gives out an id that was never given out before, not even before a crash.
    ///
    /// # Errors
    /// When the reservation of further ids cannot be written.
    pub fn allocate_id(&self) -> Result<u64> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        while id >= self.reserved_id.load(Ordering::Acquire) {
            let reserved = self.write(move |batch| {
                let next_id = batch.counter("next_id")?.max(id + 1);
                batch.set_counter("next_id", next_id + ID_RESERVE)?;
                Ok(Ok(next_id + ID_RESERVE))
            })?;
            self.reserved_id.fetch_max(reserved, Ordering::AcqRel);
        }
        Ok(id)
    }

    /// Makes sure that ids up to `id` are not given out (again).
    ///
    /// # Errors
    /// When the change cannot be written.
    pub fn skip_ids_through(&self, id: u64) -> Result<()> {
        let next_id = self.next_id.fetch_max(id + 1, Ordering::AcqRel).max(id + 1);
        if next_id < self.reserved_id.load(Ordering::Acquire) {
            return Ok(());
        }
        let reserved = self.write(move |batch| {
            let reserved = batch.counter("next_id")?.max(next_id + ID_RESERVE);
            batch.set_counter("next_id", reserved)?;
            Ok(Ok(reserved))
        })?;
        self.reserved_id.fetch_max(reserved, Ordering::AcqRel);
        Ok(())
    }

    /// Gives back the ids that were reserved and not used, so that a clean stop leaves no gap.
    ///
    /// # Errors
    /// When the change cannot be written; nothing is lost then but numbers.
    pub fn return_unused_ids(&self) -> Result<()> {
        let next_id = self.next_id.load(Ordering::Acquire);
        self.reserved_id.store(next_id, Ordering::Release);
        self.write(move |batch| {
            batch.set_counter("next_id", next_id)?;
            Ok(Ok(()))
        })
    }

    /// The record under `key`.
    ///
    /// # Errors
    /// I/O errors or a damaged record.
    pub fn get(&self, key: &str) -> Result<Option<Record>> {
        self.read(|connection| find(connection, key))?
            .map(|bytes| decode(key, &bytes))
            .transpose()
    }

    /// All records in the order of their keys, as they are now, whatever is written meanwhile.
    ///
    /// # Errors
    /// I/O errors; the iterator yields those that happen later, and damaged records.
    pub fn walk(&self) -> Result<Walk> {
        let connection = open_reader(&self.path)?;
        // Without a statement the transaction would begin at the first step.
        let begin = "BEGIN; SELECT 1 FROM snapshots LIMIT 1";
        (connection.execute_batch(begin)).map_err(|e| SnapshotError::database("read", e))?;
        Ok(Walk {
            connection,
            last: String::new(),
            step: Vec::new().into_iter(),
            is_over: false,
        })
    }

    fn read<T>(&self, act: impl Fn(&Connection) -> Result<T, rusqlite::Error>) -> Result<T> {
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let connection = match reader.take() {
            Some(connection) => connection,
            None => open_reader(&self.path)?,
        };
        // One that failed is not used again.
        let found = act(&connection).map_err(|e| SnapshotError::database("read", e))?;
        *reader = Some(connection);
        Ok(found)
    }

    /// Runs `change` inside a write transaction that other callers may share, and returns when it is
    /// durable. A refusal (the inner error) must be decided before anything is written.
    pub(crate) fn write<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Batch<'_>) -> Change<T> + Send + 'static,
    ) -> Result<T> {
        self.queue.write(change, |applies| self.run_batch(applies))
    }

    /// As [`Metadata::write`], with the room of the reserve when the disk is full.
    pub(crate) fn write_urgently<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Batch<'_>) -> Change<T> + Clone + Send + 'static,
    ) -> Result<T> {
        match self.write(change.clone()) {
            Err(error) if error.is_disk_full() => {
                self.reserve.give_up()?;
                self.empty_wal();
                self.write(change)
            }
            outcome => outcome,
        }
    }

    /// Copies the WAL into the database, so that it begins anew in the blocks that it has.
    fn empty_wal(&self) {
        if let Some(connection) = self.lock_writer().as_ref()
            && let Err(error) = connection.execute_batch("PRAGMA wal_checkpoint")
        {
            tracing::warn!(%error, "cannot copy the WAL into the database");
        }
    }

    fn run_batch(&self, applies: Vec<Apply>) -> Result<Vec<Deliver>> {
        (self.batch_observer)(applies.len());
        let mut writer = self.lock_writer();
        let connection = match writer.take() {
            Some(connection) => connection,
            None => open_writer(&self.path, self.cache_bytes)?,
        };
        let outcome = run_transaction(&connection, applies, &self.reserve);
        match &outcome {
            // What the WAL holds is read anew, by both connections.
            Err(SnapshotError::UnknownOutcome { .. }) => {
                *self.reader.lock().unwrap_or_else(PoisonError::into_inner) = None;
            }
            _ => *writer = Some(connection),
        }
        outcome
    }

    fn lock_writer(&self) -> MutexGuard<'_, Option<Connection>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether there is no room for what was to be written.
fn is_full(error: &SnapshotError, reserve: &Reserve) -> bool {
    let is_unwritten = match error {
        SnapshotError::Database { source, .. } => is_unwritten(source),
        _ => false,
    };
    error.is_disk_full() || is_unwritten && reserve.is_over_quota()
}

/// Whether a write has failed, for whatever reason.
fn is_unwritten(error: &rusqlite::Error) -> bool {
    use rusqlite::ffi::SQLITE_IOERR_WRITE;
    { error.sqlite_error() }.is_some_and(|it| it.extended_code == SQLITE_IOERR_WRITE)
}

fn run_transaction(
    connection: &Connection,
    applies: Vec<Apply>,
    reserve: &Reserve,
) -> Result<Vec<Deliver>> {
    let fail = |error| match is_unwritten(&error) && reserve.is_over_quota() {
        true => SnapshotError::OverQuota,
        false => SnapshotError::database("write", error),
    };
    let begin = || connection.prepare_cached("BEGIN IMMEDIATE")?.execute(());
    begin().map_err(fail)?;
    let roll_back = || {
        // SQLite has done it already after some errors.
        if !connection.is_autocommit()
            && let Err(error) = connection.execute_batch("ROLLBACK")
        {
            tracing::warn!(%error, "cannot roll back");
        }
    };
    let mut batch = Batch::of(connection);
    let deliveries: Result<Vec<_>, _> =
        applies.into_iter().map(|apply| apply(&mut batch)).collect();
    let deliveries = deliveries.map_err(|error| {
        roll_back();
        fail(error)
    })?;
    if !batch.has_changes {
        roll_back();
        return Ok(deliveries);
    }
    let commit = || connection.prepare_cached("COMMIT")?.execute(());
    match commit() {
        Ok(_) => Ok(deliveries),
        // The record that ends a transaction is the last of its frames: without room it was not written.
        Err(error)
            if error.sqlite_error_code() == Some(ErrorCode::DiskFull)
                || is_unwritten(&error) && reserve.is_over_quota() =>
        {
            roll_back();
            Err(fail(error))
        }
        Err(source) => Err(SnapshotError::UnknownOutcome {
            source: Arc::new(source),
        }),
    }
}

fn open_writer(path: &Path, cache_bytes: usize) -> Result<Connection> {
    // SQLite would make it readable for all; what is beside it gets the mode of the database.
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .during("open", path)?;
    let open = || {
        let connection = connect(path, cache_bytes >> 10)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        // NORMAL syncs only when the WAL is copied: a power failure would take back what was acknowledged.
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
        connection.execute_batch(SCHEMA)?;
        Ok(connection)
    };
    let connection = open().map_err(|error| SnapshotError::database("open", error))?;
    // The name of the database: SQLite syncs that of the WAL alone.
    let dir = path.parent().unwrap_or(Path::new("/"));
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .during("sync", dir)?;
    Ok(connection)
}

fn open_reader(path: &Path) -> Result<Connection> {
    connect(path, READ_CACHE).map_err(|error| SnapshotError::database("open", error))
}

fn connect(path: &Path, cache_kib: usize) -> Result<Connection, rusqlite::Error> {
    // No mutex of SQLite's own: no two threads use a connection at the same time.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags_and_vfs(path, flags, IN_ONE_PROCESS)?;
    connection.pragma_update(None, "cache_size", format!("-{cache_kib}"))?;
    Ok(connection)
}

/// Iterates over all records of one moment; see [`Metadata::walk`].
#[derive(Debug)]
pub struct Walk {
    /// In a transaction, which ends with the connection.
    connection: Connection,
    last: String,
    step: vec::IntoIter<(String, Vec<u8>)>,
    is_over: bool,
}

impl Walk {
    fn read_step(&mut self) -> Result<(), rusqlite::Error> {
        let rows: Vec<_> = self
            .connection
            .prepare_cached(
                "SELECT key, record FROM snapshots WHERE key > ?1 ORDER BY key LIMIT ?2",
            )?
            .query_map((&self.last, WALK_STEP), |row| {
                Ok((row.get(0)?, row.get(1)?))
            })?
            .collect::<Result<_, _>>()?;
        self.is_over = rows.len() < WALK_STEP as usize;
        if let Some((key, _)) = rows.last() {
            self.last.clone_from(key);
        }
        self.step = rows.into_iter();
        Ok(())
    }
}

impl Iterator for Walk {
    type Item = Result<(String, Record)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.step.as_slice().is_empty()
            && !self.is_over
            && let Err(error) = self.read_step()
        {
            self.is_over = true;
            return Some(Err(SnapshotError::database("read", error)));
        }
        let (key, bytes) = self.step.next()?;
        Some(decode(&key, &bytes).map(|record| (key, record)))
    }
}
