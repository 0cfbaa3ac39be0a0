//! The metadata database: which snapshots there are.
//!
//! One redb file, `metadata.redb`, with three tables:
//!
//! ```text
//! snapshots   key (str)             -> record (bytes, drawn in record.rs)
//! children    (parent id, child id) -> ()          is anything built on this snapshot?
//! counters    "format"   -> 2                      version of this layout
//!             "next_id"  -> ids below it were or may have been given out; higher ones never
//!             "batch"    -> number of the last write transaction
//!             "journal"  -> what the journal's records call this database
//! ```
//!
//! and beside it the journal of what redb does not have on disk yet (journal.rs).
//!
//! Every write is durable before its caller goes on, and transactions are shared: while one is being
//! synced, the changes of other threads queue up and become the next one (group commit). A transaction
//! is synced once, in the journal, and made in redb without durability, where others see it only then;
//! one for which the journal has no room is made durable in redb, and with it all before. (There too one
//! sync is enough: redb's commit slot carries a checksum of all that it points to, so a torn one is
//! recognised and the one before holds. Two-phase commit with quick repair syncs twice and writes half as
//! much again; what it spares after a crash is one walk over the file, a second per million snapshots.)
//! At opening, what the journal has and redb has not is made durable in redb, before anything is read.
//! Without a journal (no room for one) each transaction is made durable in redb, and so it is when the disk
//! is nearly full, as what redb holds back needs room later. There is no writer thread; the first caller to find nobody writing leads a batch
//! and then hands the lead to the first caller of the next. A change that is refused ("already
//! exists") writes nothing and disturbs no other change of its batch.
//!
//! redb gives up a database handle at its first I/O error, and so does this after one of the journal. Then
//! the handle is replaced by a newly opened one, and the number of the last transaction found tells
//! whether the one that failed had reached the disk.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, Hasher};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use prost::Message;
use redb::{
    Database, DatabaseError, Durability, ReadOnlyTable, ReadableDatabase, ReadableTable,
    ReadableTableMetadata, StorageBackend, Table, TableDefinition, WriteTransaction,
};

use transship_path_error::During as _;

use crate::error::{Result, SnapshotError};
use crate::journal::{AnyChange, Changes, Counter, Journal, JournalFile, Link, Put, TableChange};
use crate::record::Record;
use crate::reserve::{Reserve, ReservingFile};

const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
const CHILDREN: TableDefinition<'_, (u64, u64), ()> = TableDefinition::new("children");
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters");

/// 2 brought the journal, without which transactions are lost.
const FORMAT: u64 = 2;
/// How many ids one write of "next_id" makes available.
const ID_RESERVE: u64 = 4096;
/// Upper bound of a batch, so that its first callers do not wait for a crowd.
const BATCH_LIMIT: usize = 256;
/// Page cache while every page is verified.
const CHECK_CACHE: usize = 64 << 20;

type Opener = dyn Fn() -> std::result::Result<Database, DatabaseError> + Send + Sync;

/// The database of snapshots. Shared by reference between threads.
pub struct Metadata {
    opener: Box<Opener>,
    /// `None` after an I/O error until reopening succeeds.
    database: RwLock<Option<Database>>,
    /// Held by who writes; never before `database`.
    journal: Mutex<Option<Journal>>,
    /// Number of the last transaction that was on disk when the database was opened.
    recovered: AtomicU64,
    queue: Mutex<Queue>,
    next_id: AtomicU64,
    reserved_id: AtomicU64,
    reserve: Arc<Reserve>,
    fresh: bool,
    batch_observer: Box<dyn Fn(usize) + Send + Sync>,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Job>,
    led: bool,
}

/// A change waiting for its transaction.
struct Job {
    apply: Apply,
    promote: Box<dyn Fn() + Send>,
    fail: Box<dyn Fn(SnapshotError) + Send>,
}

/// Makes the change inside the transaction.
type Apply = Box<dyn FnOnce(&mut Batch<'_>) -> Result<Deliver, redb::Error> + Send>;

/// Tells a caller how its transaction ended.
type Deliver = Box<dyn FnOnce() + Send>;

enum Signal<T> {
    /// Nobody leads any more: lead the next batch, which holds this caller's change.
    Lead,
    Done(Result<T>),
}

/// The tables inside a write transaction.
pub(crate) struct Batch<'t> {
    snapshots: Table<'t, &'static str, &'static [u8]>,
    children: Table<'t, (u64, u64), ()>,
    counters: Table<'t, &'static str, u64>,
    /// What was done so far.
    changes: Changes,
}

/// How a change ended inside its transaction, before the transaction is durable.
pub(crate) type Change<T> = Result<Result<T>, redb::Error>;

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metadata")
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
        Self::open_path(path, cache_bytes, false)
    }

    /// As [`Metadata::open`], and verifies every checksum of the file.
    ///
    /// # Errors
    /// As [`Metadata::open`].
    pub fn open_checked(path: &Path) -> Result<Self> {
        Self::open_path(path, CHECK_CACHE, true)
    }

    fn open_path(path: &Path, cache_bytes: usize, checked: bool) -> Result<Self> {
        let open_file = |path: &Path| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)
        };
        let reserve = Arc::new(Reserve::default());
        let of_file = Arc::clone(&reserve);
        let journal_path = path.with_extension("journal");
        let journal = open_file(&journal_path).during("open", &journal_path)?;
        reserve.watch(&journal).during("look at", &journal_path)?;
        let path = path.to_path_buf();
        let open_database = move || {
            Database::builder()
                .set_cache_size(cache_bytes)
                .set_check_integrity_on_open(checked)
                .create_with_backend(ReservingFile::new(open_file(&path)?, &of_file)?)
        };
        let journal: Box<dyn StorageBackend> = Box::new(JournalFile(journal));
        let mut metadata = Self::open_with(open_database, Some(journal))?;
        metadata.reserve = reserve;
        // The names of both files, before anything relies on them.
        let dir = journal_path.parent().unwrap_or(Path::new("/"));
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .during("sync", dir)?;
        Ok(metadata)
    }

    /// Refuses when the disk is so full that what is left is kept for removals.
    ///
    /// # Errors
    /// A full disk.
    pub fn require_room(&self) -> Result<()> {
        self.reserve
            .refill()
            .map_err(|error| SnapshotError::database("reserve room for", redb::Error::Io(error)))
    }

    /// Opens the database that `opener` yields; it is called again after an I/O error. Crash tests
    /// pass storage backends of their own. Without a journal every transaction is made durable in the
    /// database.
    ///
    /// # Errors
    /// As [`Metadata::open`].
    pub fn open_with(
        opener: impl Fn() -> std::result::Result<Database, DatabaseError> + Send + Sync + 'static,
        journal: Option<Box<dyn StorageBackend>>,
    ) -> Result<Self> {
        let journal = journal.and_then(|file| match Journal::open(file) {
            Ok(journal) => Some(journal),
            Err(error) => {
                // Snapshots must be removable on a full disk.
                tracing::warn!(error = %error, "going on without a journal, more slowly");
                None
            }
        });
        let mut metadata = Self {
            opener: Box::new(opener),
            database: RwLock::new(None),
            journal: Mutex::new(journal),
            recovered: AtomicU64::new(0),
            queue: Mutex::default(),
            next_id: AtomicU64::new(0),
            reserved_id: AtomicU64::new(0),
            reserve: Arc::default(),
            fresh: false,
            batch_observer: Box::new(|_| {}),
        };
        metadata.reopen("open")?;
        let (format, next_id) = metadata.write(|batch| {
            let format = batch.counter("format")?;
            let next_id = batch.counter("next_id")?.max(1);
            batch.set_counter("next_id", next_id + ID_RESERVE)?;
            Ok(Ok((format, next_id)))
        })?;
        metadata.fresh = format == 0;
        metadata.next_id.store(next_id, Ordering::Relaxed);
        metadata
            .reserved_id
            .store(next_id + ID_RESERVE, Ordering::Relaxed);
        Ok(metadata)
    }

    /// Whether the file was created by this opening (or one that never came to
    /// [`Metadata::mark_used`]).
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// Notes that the database is the one that belongs to the snapshot directories.
    ///
    /// # Errors
    /// When the change cannot be written.
    pub fn mark_used(&self) -> Result<()> {
        if !self.fresh {
            return Ok(());
        }
        self.write(|batch| {
            batch.set_counter("format", FORMAT)?;
            Ok(Ok(()))
        })
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
        self.read(|database| {
            let snapshots = database.begin_read()?.open_table(SNAPSHOTS)?;
            Ok(snapshots
                .get(key)?
                .map(|value| Record::decode(value.value())))
        })?
        .transpose()
        .map_err(|e| damaged(key, &e))
    }

    /// All records in the order of their keys, as they are now, whatever is written meanwhile.
    ///
    /// # Errors
    /// I/O errors; the iterator yields those that happen later, and damaged records.
    pub fn walk(&self) -> Result<Walk> {
        let snapshots = self.read(|db| Ok(db.begin_read()?.open_table(SNAPSHOTS)?))?;
        let range = snapshots
            .range::<&str>(..)
            .map_err(|e| SnapshotError::database("read", e))?;
        Ok(Walk {
            range,
            _snapshots: snapshots,
        })
    }

    /// Number of snapshots.
    ///
    /// # Errors
    /// I/O errors.
    pub fn len(&self) -> Result<u64> {
        self.read(|database| Ok(database.begin_read()?.open_table(SNAPSHOTS)?.len()?))
    }

    /// Whether there is no snapshot at all.
    ///
    /// # Errors
    /// I/O errors.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Every (parent id, child id) that the index of children holds, for `fsck`.
    ///
    /// # Errors
    /// I/O errors.
    pub fn children(&self) -> Result<Vec<(u64, u64)>> {
        self.read(|database| {
            let children = database.begin_read()?.open_table(CHILDREN)?;
            let mut pairs = Vec::new();
            for entry in children.iter()? {
                pairs.push(entry?.0.value());
            }
            Ok(pairs)
        })
    }

    fn read<T>(&self, act: impl Fn(&Database) -> Result<T, redb::Error>) -> Result<T> {
        for attempt in 0.. {
            let guard = self.database.read().unwrap_or_else(PoisonError::into_inner);
            let outcome = match guard.as_ref() {
                Some(database) => act(database),
                None => Err(redb::Error::PreviousIo),
            };
            drop(guard);
            match outcome {
                Err(error) if attempt == 0 && gave_up(&error) => self.reopen("read")?,
                outcome => return outcome.map_err(|e| SnapshotError::database("read", e)),
            }
        }
        unreachable!("the loop returns at its second turn")
    }

    /// Runs `change` inside a write transaction that other callers may share, and returns when it is
    /// durable. A refusal (the inner error) must be decided before anything is written.
    pub(crate) fn write<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Batch<'_>) -> Change<T> + Send + 'static,
    ) -> Result<T> {
        let (sender, receiver) = sync_channel(2);
        let lead = {
            let mut queue = self.lock_queue();
            queue.waiting.push(Job::new(change, sender));
            !std::mem::replace(&mut queue.led, true)
        };
        if lead {
            self.lead_batch();
        }
        self.wait(&receiver)
    }

    fn wait<T>(&self, receiver: &Receiver<Signal<T>>) -> Result<T> {
        loop {
            match receiver.recv() {
                Ok(Signal::Lead) => self.lead_batch(),
                Ok(Signal::Done(result)) => return result,
                // The leader's thread died in the middle of the batch.
                Err(_) => return Err(SnapshotError::database("write", redb::Error::PreviousIo)),
            }
        }
    }

    fn lead_batch(&self) {
        // Hands the lead on even when the transaction panics: others must not wait for ever.
        struct HandOver<'a>(&'a Metadata);
        impl Drop for HandOver<'_> {
            fn drop(&mut self) {
                let mut queue = self.0.lock_queue();
                match queue.waiting.first() {
                    Some(next) => (next.promote)(),
                    None => queue.led = false,
                }
            }
        }
        let jobs = {
            let mut queue = self.lock_queue();
            let count = queue.waiting.len().min(BATCH_LIMIT);
            queue.waiting.drain(..count).collect::<Vec<_>>()
        };
        let _hand_over = HandOver(self);
        (self.batch_observer)(jobs.len());
        let (applies, fails): (Vec<_>, Vec<_>) =
            jobs.into_iter().map(|job| (job.apply, job.fail)).unzip();
        match self.run_batch(applies) {
            Ok(deliveries) => deliveries.into_iter().for_each(|deliver| deliver()),
            Err(error) => fails.into_iter().for_each(|fail| fail(error.clone())),
        }
    }

    fn run_batch(&self, applies: Vec<Apply>) -> Result<Vec<Deliver>> {
        if self
            .database
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .is_none()
        {
            self.reopen("write")?;
        }
        let mut deliveries = Vec::with_capacity(applies.len());
        let (mut number, mut is_in_journal) = (u64::MAX, false);
        let outcome = {
            let guard = self.database.read().unwrap_or_else(PoisonError::into_inner);
            let database = guard.as_ref();
            database.map_or(Err(redb::Error::PreviousIo), |database| {
                let mut transaction = database.begin_write()?;
                let mut batch = Batch::of(&transaction)?;
                for apply in applies {
                    deliveries.push(apply(&mut batch)?);
                }
                // Nothing but refusals: nothing to make durable.
                if batch.changes.changes.is_empty() {
                    return Ok(());
                }
                number = batch.counter("batch")? + 1;
                batch.set_counter("batch", number)?;
                let changes = batch.into_changes();
                let mut journal = self.lock_journal();
                let journal = journal.as_mut();
                match journal {
                    // A durable transaction of redb needs room for all that was not durable before.
                    Some(journal) if self.reserve.has_ample_room() => {
                        is_in_journal = true;
                        is_in_journal = journal.append(number, &changes)?;
                        if is_in_journal {
                            transaction
                                .set_durability(Durability::None)
                                .map_err(redb::Error::from)?;
                            return Ok(transaction.commit()?);
                        }
                        transaction.commit()?;
                        journal.restart(number);
                    }
                    Some(journal) => {
                        transaction.commit()?;
                        journal.restart(number);
                    }
                    None => transaction.commit()?,
                }
                Ok(())
            })
        };
        let Err(error) = outcome else {
            return Ok(deliveries);
        };
        if !gave_up(&error) && !is_in_journal {
            return Err(SnapshotError::database("write", error));
        }
        // It may have reached the disk all the same; only the disk knows.
        self.give_up();
        if self.reopen("write").is_err() {
            return Err(SnapshotError::UnknownOutcome {
                source: Arc::new(error),
            });
        }
        if self.recovered.load(Ordering::Acquire) >= number {
            Ok(deliveries)
        } else {
            Err(SnapshotError::database("write", error))
        }
    }

    /// Has the database opened anew before it is used again.
    fn give_up(&self) {
        let mut guard = (self.database.write()).unwrap_or_else(PoisonError::into_inner);
        *guard = None;
    }

    /// Replaces a database handle that redb or [`Metadata::give_up`] has given up.
    fn reopen(&self, act: &'static str) -> Result<()> {
        let mut guard = self
            .database
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(database) = guard.as_ref() {
            // Another thread may have been faster.
            match database.begin_read().and_then(|read| {
                read.open_table(COUNTERS)
                    .map(drop)
                    .map_err(|_| redb::StorageError::PreviousIo.into())
            }) {
                Ok(()) if database.try_begin_write().is_ok() => return Ok(()),
                _ => {}
            }
        }
        // The file lock of the old handle must go before the new one is opened.
        *guard = None;
        let database = (self.opener)().map_err(|e| SnapshotError::database(act, e))?;
        self.recover(&database)
            .map_err(|e| SnapshotError::database(act, e))??;
        *guard = Some(database);
        Ok(())
    }

    /// Brings a database that was just opened up to date with the journal, and begins the journal anew.
    fn recover(&self, database: &Database) -> Change<()> {
        let mut journal = self.lock_journal();
        let transaction = database.begin_write()?;
        let mut batch = Batch::of(&transaction)?;
        let format = batch.counter("format")?;
        if format > FORMAT {
            return Ok(Err(SnapshotError::Invalid {
                reason: format!(
                    "the metadata has layout {format}, this version knows only {FORMAT}"
                ),
            }));
        }
        if format > 0 {
            batch.set_counter("format", FORMAT)?;
        }
        let mut last = batch.counter("batch")?;
        let mut name = batch.counter("journal")?;
        if name == 0 {
            // Any number that no other database has; the hasher's keys are random.
            name = RandomState::new().build_hasher().finish() | 1;
            batch.set_counter("journal", name)?;
        } else if let Some(journal) = journal.as_ref() {
            let (transactions, newest) = journal.read(name, last).map_err(redb::Error::Io)?;
            for changes in transactions {
                batch.repeat(changes)?;
            }
            last = newest;
        }
        // A number of its own: with it, all records of the journal are of an earlier pass.
        batch.set_counter("batch", last + 1)?;
        drop(batch);
        transaction.commit()?;
        if let Some(journal) = journal.as_mut() {
            journal.begin(name, last + 1);
        }
        self.recovered.store(last, Ordering::Release);
        Ok(Ok(()))
    }

    fn lock_journal(&self) -> MutexGuard<'_, Option<Journal>> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Job {
    fn new<T: Send + 'static>(
        change: impl FnOnce(&mut Batch<'_>) -> Change<T> + Send + 'static,
        sender: SyncSender<Signal<T>>,
    ) -> Self {
        // A send fails only when the caller is gone, and then nobody wants to know.
        let (promoter, failer) = (sender.clone(), sender.clone());
        Self {
            apply: Box::new(move |batch| {
                let result = change(batch)?;
                Ok(Box::new(move || drop(sender.send(Signal::Done(result)))))
            }),
            promote: Box::new(move || drop(promoter.send(Signal::Lead))),
            fail: Box::new(move |error| drop(failer.send(Signal::Done(Err(error))))),
        }
    }
}

impl<'t> Batch<'t> {
    fn of(transaction: &'t WriteTransaction) -> Result<Self, redb::Error> {
        Ok(Self {
            snapshots: transaction.open_table(SNAPSHOTS)?,
            children: transaction.open_table(CHILDREN)?,
            counters: transaction.open_table(COUNTERS)?,
            changes: Changes::default(),
        })
    }

    /// Closes the tables.
    fn into_changes(self) -> Changes {
        self.changes
    }

    fn note(&mut self, change: TableChange) {
        let change = Some(change);
        self.changes.changes.push(AnyChange { change });
    }

    /// Does again what another batch did.
    fn repeat(&mut self, changes: Changes) -> Result<(), redb::Error> {
        for change in changes.changes {
            match change.change {
                Some(TableChange::Put(put)) => {
                    (self.snapshots).insert(put.key.as_str(), put.record.as_slice())?;
                }
                Some(TableChange::Delete(key)) => drop(self.snapshots.remove(key.as_str())?),
                Some(TableChange::Link(link)) => {
                    (self.children).insert((link.parent, link.child), ())?;
                }
                Some(TableChange::Unlink(link)) => {
                    drop(self.children.remove((link.parent, link.child))?);
                }
                Some(TableChange::Counter(counter)) => {
                    (self.counters).insert(counter.name.as_str(), counter.value)?;
                }
                None => {}
            }
        }
        Ok(())
    }

    /// The record under `key`.
    pub(crate) fn get(&self, key: &str) -> Change<Option<Record>> {
        let value = self.snapshots.get(key)?;
        Ok(value
            .map(|value| Record::decode(value.value()))
            .transpose()
            .map_err(|e| damaged(key, &e)))
    }

    /// Whether `key` is taken.
    pub(crate) fn contains(&self, key: &str) -> Result<bool, redb::Error> {
        Ok(self.snapshots.get(key)?.is_some())
    }

    /// Stores `record` under `key`.
    pub(crate) fn put(&mut self, key: &str, record: &Record) -> Result<(), redb::Error> {
        let record = record.encode_to_vec();
        self.snapshots.insert(key, record.as_slice())?;
        let key = key.to_owned();
        self.note(TableChange::Put(Put { key, record }));
        Ok(())
    }

    /// Removes the record under `key`.
    pub(crate) fn delete(&mut self, key: &str) -> Result<(), redb::Error> {
        self.snapshots.remove(key)?;
        self.note(TableChange::Delete(key.to_owned()));
        Ok(())
    }

    /// Notes that `child` is built on `parent`.
    pub(crate) fn link(&mut self, parent: u64, child: u64) -> Result<(), redb::Error> {
        self.children.insert((parent, child), ())?;
        self.note(TableChange::Link(Link { parent, child }));
        Ok(())
    }

    /// Forgets that `child` is built on `parent`.
    pub(crate) fn unlink(&mut self, parent: u64, child: u64) -> Result<(), redb::Error> {
        self.children.remove((parent, child))?;
        self.note(TableChange::Unlink(Link { parent, child }));
        Ok(())
    }

    /// Whether anything is built on `parent`.
    pub(crate) fn has_children(&self, parent: u64) -> Result<bool, redb::Error> {
        Ok(self
            .children
            .range((parent, 0)..=(parent, u64::MAX))?
            .next()
            .transpose()?
            .is_some())
    }

    fn counter(&self, name: &str) -> Result<u64, redb::Error> {
        Ok(self.counters.get(name)?.map_or(0, |value| value.value()))
    }

    fn set_counter(&mut self, name: &str, value: u64) -> Result<(), redb::Error> {
        self.counters.insert(name, value)?;
        let name = name.to_owned();
        self.note(TableChange::Counter(Counter { name, value }));
        Ok(())
    }
}

/// Iterates over all records of one moment; see [`Metadata::walk`].
pub struct Walk {
    range: redb::Range<'static, &'static str, &'static [u8]>,
    // The range reads from the transaction that this table keeps alive.
    _snapshots: ReadOnlyTable<&'static str, &'static [u8]>,
}

impl fmt::Debug for Walk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Walk").finish_non_exhaustive()
    }
}

impl Iterator for Walk {
    type Item = Result<(String, Record)>;

    fn next(&mut self) -> Option<Self::Item> {
        let entry = self.range.next()?;
        Some(
            entry
                .map_err(|e| SnapshotError::database("read", e))
                .and_then(|(key, value)| {
                    let key = key.value().to_owned();
                    let record = Record::decode(value.value()).map_err(|e| damaged(&key, &e))?;
                    Ok((key, record))
                }),
        )
    }
}

fn damaged(key: &str, error: &prost::DecodeError) -> SnapshotError {
    SnapshotError::Damaged {
        key: key.to_owned(),
        reason: error.to_string(),
    }
}

/// Whether redb refuses all further work on the handle after this error.
fn gave_up(error: &redb::Error) -> bool {
    matches!(
        error,
        redb::Error::Io(_) | redb::Error::PreviousIo | redb::Error::DatabaseClosed
    )
}
