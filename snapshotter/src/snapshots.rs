//! The snapshots: Prepare, View, Commit, Remove and the rest, with the order of their steps.
//!
//! Two things must agree, the database and the directories. The order of the steps is chosen so that
//! the process can die between any two of them:
//!
//! ```text
//! Prepare, View    1 allocate an id (never given out before, so nothing of it is on disk)
//! (data first)     2 make new-<id>: fs, work, owner
//!                  3 describe it (copy of the record)
//!                  4 rename new-<id> to <id>
//!                  5 record it in the database, durable             <- from here on it exists
//!
//! Commit           1 count its disk use, 2 syncfs, as durable_commit.rs says
//!                  3 record it under its name, durable              <- from here on it is committed
//!                  4 describe it anew
//!
//! Remove           1 delete its record, durable                     <- from here on it does not exist
//! (metadata first) 2 rename <id> to gone-<id>
//!                  3 delete gone-<id> (in the background unless sync_remove)
//!
//! Update           1 record the labels, durable; 2 describe it anew
//! ```
//!
//! So: what the database knows has its directory, and a directory that the database does not know
//! never was or no longer is a snapshot. At start ([`Snapshots::open`]) everything that the database
//! does not know is retired to gone-* and deleted, with new-* and older gone-*. The database alone
//! decides; the description on a directory may lag behind by one step and is used only by
//! `fsck --repair` when the database is lost.
//!
//! A power failure may in addition lose directories whose record survived, as file systems order the
//! two as they like: an active snapshot or view gets its (empty) directory again at start; a committed
//! layer that is missing is reported. `durable_commit` prevents that for the layers that it covers.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::background::Background;
use crate::disk::{self, Entry};
use crate::dispatch::Work;
use crate::durable_commit::DurableCommit;
use transship_path_error::During as _;

use crate::error::{Result, SnapshotError, one_line};
use crate::fault::{Faults, Step};
use crate::filter::Filter;
use crate::labels;
use crate::metadata::{Metadata, Walk};
use crate::mounts::{self, Mount, SnapshotPaths};
use crate::record::{Info, Kind, Record, Usage};
use crate::usage;

/// How snapshots behave; the configuration file's part of it is documented in `config.rs`.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Options of every overlay mount, as configured and probed (`probe.rs`).
    pub overlay_options: Vec<String>,
    /// Pass the id mapping labels on as mount options.
    pub remap_ids: bool,
    /// Show the label with the upperdir's path.
    pub upperdir_label: bool,
    /// Delete directories before Remove answers.
    pub sync_remove: bool,
    /// Before which answers of Commit the file system is synced.
    pub durable_commit: DurableCommit,
}

/// All snapshots of one root directory. Every call blocks until its work is done and durable.
#[derive(Debug)]
pub struct Snapshots {
    paths: SnapshotPaths,
    metadata: Metadata,
    options: Options,
    background: Background,
    faults: Faults,
}

/// How many snapshots there are and what they take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Count {
    /// Snapshots of each kind.
    pub by_kind: BTreeMap<Kind, u64>,
    /// Disk use of the layers that have been counted, each without its parents.
    pub layer_bytes: u64,
}

impl Default for Count {
    fn default() -> Self {
        let none = [Kind::View, Kind::Active, Kind::Committed].map(|kind| (kind, 0));
        Self {
            by_kind: none.into(),
            layer_bytes: 0,
        }
    }
}

/// Commit counts at most this many entries itself (some milliseconds); containerd holds its own
/// database's write lock meanwhile. Larger layers are counted after the answer.
const COMMIT_COUNT_LIMIT: usize = 2000;

impl Snapshots {
    /// Takes over what is on disk below `paths` and mends what a crash left.
    ///
    /// # Errors
    /// I/O errors, and snapshot directories without a database that knows them.
    pub fn open(
        paths: SnapshotPaths,
        metadata: Metadata,
        options: Options,
        faults: Faults,
    ) -> Result<Self> {
        disk::create_private_dir(paths.snapshots())?;
        let background = Background::start()?;
        let snapshots = Self {
            paths,
            metadata,
            options,
            background,
            faults,
        };
        snapshots.mend()?;
        Ok(snapshots)
    }

    fn mend(&self) -> Result<()> {
        let mut known = BTreeMap::new();
        for entry in self.metadata.walk()? {
            let (key, record) = entry?;
            known.insert(
                record.id,
                (key, record.kind(), record.ancestors.first().copied()),
            );
        }
        let mut present = HashSet::new();
        let mut unknown = Vec::new();
        let mut leftovers = Vec::new();
        for (name, entry) in disk::list(&self.paths)? {
            match entry {
                Entry::Snapshot(id) if known.contains_key(&id) => drop(present.insert(id)),
                Entry::Snapshot(id) => unknown.push(id),
                Entry::New(id) => leftovers.push(id),
                Entry::Gone(id) => self.delete_gone(id),
                Entry::Foreign => tracing::warn!(name, "not a snapshot directory, left alone"),
            }
        }
        if !unknown.is_empty() && self.metadata.is_fresh() {
            return Err(SnapshotError::Invalid {
                reason: format!(
                    "{} holds {} snapshots but the metadata database is new: run `transship-snapshotter \
                     fsck --repair` to rebuild it from them, or move them away",
                    self.paths.snapshots().display(),
                    unknown.len()
                ),
            });
        }
        self.metadata.mark_used()?;
        for id in &unknown {
            tracing::info!(
                id,
                "deleting the directory of a snapshot that does not exist"
            );
            self.retire(*id, self.paths.dir(*id));
        }
        for id in leftovers {
            tracing::info!(id, "deleting a half made snapshot");
            let dir = self.paths.new_dir(id);
            if known.contains_key(&id) {
                // Recorded, but a power failure undid the rename: below it is made anew.
                disk::delete_tree(&dir)?;
            } else {
                self.retire(id, dir);
            }
        }
        for (id, (key, kind, parent)) in &known {
            if present.contains(id) {
                if *kind == Some(Kind::Active) {
                    self.mend_work(key, *id);
                }
                continue;
            }
            match kind {
                Some(Kind::Active | Kind::View) => {
                    tracing::warn!(key, id, "the directory was lost: making an empty one");
                    let owner = parent.map_or(Ok((0, 0)), |id| disk::owner(&self.paths, id));
                    disk::create_new(
                        &self.paths,
                        *id,
                        *kind == Some(Kind::Active),
                        owner.unwrap_or((0, 0)),
                    )?;
                    disk::publish(&self.paths, *id)?;
                    if let Some(record) = self.metadata.get(key)? {
                        self.describe(key, &record);
                    }
                }
                _ => tracing::error!(key, id, "the directory of this layer is lost; see fsck"),
            }
        }
        let highest = known.keys().chain(&unknown).max().copied().unwrap_or(0);
        self.metadata.skip_ids_through(highest)
    }

    /// Makes a workdir that somebody has removed, as the kernel's documentation says after a crash of a volatile overlay:
    /// without one no container starts on the snapshot.
    fn mend_work(&self, key: &str, id: u64) {
        let dir = self.paths.dir(id);
        let is_missing = |name| {
            let stat = std::fs::symlink_metadata(dir.join(name));
            stat.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
        };
        if is_missing("fs") || !is_missing("work") {
            return;
        }
        match disk::create_work(&dir) {
            Ok(()) => tracing::warn!(key, id, "the workdir was lost: made a new one"),
            // Snapshots must be removable on a full disk.
            Err(error) => tracing::error!(error = one_line(&error), key, id, "no workdir"),
        }
    }

    /// The directory below which layers are on the disk when they are committed, if any are.
    #[must_use]
    pub fn durable_below(&self) -> Option<&Path> {
        (self.options.durable_commit != DurableCommit::Never).then(|| self.paths.snapshots())
    }

    /// What [`Snapshots::commit`] of `key` has to do.
    #[must_use]
    pub fn work_of_commit(&self, key: &str) -> Work {
        long_if(self.options.durable_commit.covers(key))
    }

    /// What [`Snapshots::remove`] has to do.
    #[must_use]
    pub fn work_of_remove(&self) -> Work {
        long_if(self.options.sync_remove)
    }

    /// Makes a writable snapshot on top of `parent` (empty: on nothing).
    ///
    /// # Errors
    /// A missing or uncommitted parent, a key that is taken, I/O errors.
    pub fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<Mount>> {
        self.create(Kind::Active, key, parent, labels)
    }

    /// Makes a read-only look at `parent` (empty: at nothing).
    ///
    /// # Errors
    /// As [`Snapshots::prepare`].
    pub fn view(
        &self,
        key: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<Mount>> {
        self.create(Kind::View, key, parent, labels)
    }

    fn create(
        &self,
        kind: Kind,
        key: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<Vec<Mount>> {
        require_key(key)?;
        self.metadata.require_room()?;
        let labels = labels::accepted(key, labels);
        // Asked again inside the transaction; here it spares the disk a doomed request.
        let parent_record = self.usable_parent(parent)?;
        if self.metadata.get(key)?.is_some() {
            return Err(SnapshotError::AlreadyExists {
                key: key.to_owned(),
            });
        }
        let ancestors = parent_record.as_ref().map_or_else(Vec::new, |parent| {
            let mut ids = Vec::with_capacity(parent.ancestors.len() + 1);
            ids.push(parent.id);
            ids.extend_from_slice(&parent.ancestors);
            ids
        });
        let owner = match (labels::mapped_root(&labels)?, ancestors.first()) {
            (Some(owner), _) => owner,
            (None, Some(parent)) => disk::owner(&self.paths, *parent)?,
            (None, None) => (0, 0),
        };
        let now = now();
        let record = Record {
            id: self.metadata.allocate_id()?,
            kind_number: kind as u32,
            parent: parent.to_owned(),
            ancestors,
            created: now,
            updated: now,
            labels,
            usage: None,
            key: String::new(),
        };
        let id = record.id;
        self.faults.reach(Step("prepare:id-allocated"));
        disk::create_new(&self.paths, id, kind == Kind::Active, owner)?;
        self.faults.reach(Step("prepare:directory-made"));
        disk::write_copy(&self.paths.new_dir(id), key, &record)
            .inspect_err(|_| disk::discard_new(&self.paths, id))?;
        self.faults.reach(Step("prepare:described"));
        disk::publish(&self.paths, id).inspect_err(|_| disk::discard_new(&self.paths, id))?;
        self.faults.reach(Step("prepare:published"));
        if let Err(error) = self.metadata.create(key, record.clone()) {
            // With an unknown outcome the directory may be needed; the next start decides.
            if !matches!(error, SnapshotError::UnknownOutcome { .. }) {
                self.retire(id, self.paths.dir(id));
            }
            return Err(error);
        }
        self.faults.reach(Step("prepare:recorded"));
        Ok(vec![self.plan_mount(&record, kind)])
    }

    fn usable_parent(&self, parent: &str) -> Result<Option<Record>> {
        if parent.is_empty() {
            return Ok(None);
        }
        let record = self
            .metadata
            .get(parent)?
            .ok_or_else(|| SnapshotError::ParentNotFound {
                parent: parent.to_owned(),
            })?;
        if record.kind() != Some(Kind::Committed) {
            return Err(SnapshotError::ParentNotCommitted {
                parent: parent.to_owned(),
            });
        }
        Ok(Some(record))
    }

    /// The mounts of an active snapshot or view.
    ///
    /// # Errors
    /// A missing or committed snapshot, I/O errors.
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let (record, kind) = self.existing(key)?;
        if kind == Kind::Committed {
            return Err(SnapshotError::NoMounts {
                key: key.to_owned(),
            });
        }
        Ok(vec![self.plan_mount(&record, kind)])
    }

    /// Finishes the active snapshot `key` as the layer `name`; its labels are replaced.
    ///
    /// # Errors
    /// A missing or not active snapshot, a name that is taken, I/O errors.
    pub fn commit(
        self: &Arc<Self>,
        name: &str,
        key: &str,
        labels: BTreeMap<String, String>,
    ) -> Result<()> {
        require_key(name)?;
        let (record, kind) = self.existing(key)?;
        if self.metadata.get(name)?.is_some() {
            return Err(SnapshotError::AlreadyExists {
                key: name.to_owned(),
            });
        }
        if kind != Kind::Active {
            return Err(SnapshotError::NotActive {
                key: key.to_owned(),
            });
        }
        let fs = self.paths.fs(record.id);
        let usage = usage::count_small(Path::new(&fs), COMMIT_COUNT_LIMIT);
        self.faults.reach(Step("commit:counted"));
        if self.options.durable_commit.covers(key) {
            let dir = File::open(&fs).during("open", &fs)?;
            nix::unistd::syncfs(&dir).during("sync", &fs)?;
        }
        self.faults.reach(Step("commit:synced"));
        let labels = labels::accepted(key, labels);
        let committed = self
            .metadata
            .commit(key, name, record.id, usage, labels, now())?;
        self.faults.reach(Step("commit:recorded"));
        self.describe(name, &committed);
        self.faults.reach(Step("commit:described"));
        if usage.is_none() {
            // Weak: the thread must not keep the snapshots alive that own it.
            let (this, name) = (Arc::downgrade(self), name.to_owned());
            self.background
                .order(move || this.upgrade().map_or(Ok(()), |s| s.usage(&name).map(drop)));
        }
        Ok(())
    }

    /// For a Commit that names a parent, as containerd 2.2 does for a snapshotter with the capability `rebase`: lets it
    /// pass where it names the one that `key` was prepared on.
    ///
    /// # Errors
    /// A missing snapshot, or one that was prepared on something else.
    pub fn require_parent(&self, key: &str, parent: &str) -> Result<()> {
        let (record, _) = self.existing(key)?;
        if record.parent == parent {
            return Ok(());
        }
        Err(SnapshotError::ParentAtCommit {
            key: key.to_owned(),
            parent: parent.to_owned(),
        })
    }

    /// Takes a snapshot away.
    ///
    /// # Errors
    /// A missing snapshot, one with children, I/O errors.
    pub fn remove(&self, key: &str) -> Result<()> {
        let id = self.metadata.remove(key)?;
        self.faults.reach(Step("remove:recorded"));
        self.retire(id, self.paths.dir(id));
        self.faults.reach(Step("remove:deleted"));
        Ok(())
    }

    /// Moves the directory of a snapshot out of the way and has it deleted. What fails is not the caller's concern, as
    /// the snapshot itself is gone already.
    fn retire(&self, id: u64, dir: PathBuf) {
        let outcome = disk::retire(&self.paths, id, &dir).and_then(|()| {
            self.faults.reach(Step("remove:retired"));
            if self.options.sync_remove {
                return disk::delete_tree(&self.paths.gone_dir(id));
            }
            self.delete_gone(id);
            Ok(())
        });
        if let Err(error) = outcome {
            // On a full disk the directory may have no room for another name. No other snapshot will
            // ever have this one.
            tracing::warn!(error = one_line(&error), "deleting a snapshot where it is");
            self.background.order(move || disk::delete_tree(&dir));
        }
    }

    fn delete_gone(&self, id: u64) {
        let dir = self.paths.gone_dir(id);
        self.background.order(move || disk::delete_tree(&dir));
    }

    /// What is known about a snapshot.
    ///
    /// # Errors
    /// A missing snapshot, I/O errors.
    pub fn stat(&self, key: &str) -> Result<Info> {
        let (record, kind) = self.existing(key)?;
        Ok(self.show(key, record, kind))
    }

    /// Replaces labels: all of them without `fields`, else those named by `labels` (all) and
    /// `labels.<key>` (one; an empty or missing value deletes it).
    ///
    /// # Errors
    /// A missing snapshot, a field that cannot change, I/O errors.
    pub fn update(
        &self,
        key: &str,
        labels: BTreeMap<String, String>,
        fields: &[String],
    ) -> Result<Info> {
        let record = self.metadata.update(key, labels, fields.to_vec(), now())?;
        self.faults.reach(Step("update:recorded"));
        self.describe(key, &record);
        let kind = known_kind(key, &record)?;
        Ok(self.show(key, record, kind))
    }

    /// Disk use of a snapshot without its parents.
    ///
    /// # Errors
    /// A missing snapshot, I/O errors.
    pub fn usage(&self, key: &str) -> Result<Usage> {
        let (record, kind) = self.existing(key)?;
        match (kind, record.usage) {
            (Kind::View, _) => Ok(Usage::default()),
            (Kind::Committed, Some(usage)) => Ok(usage),
            (Kind::Committed, None) => {
                let usage = usage::count(Path::new(&self.paths.fs(record.id)))?;
                self.metadata.set_usage(key, record.id, usage)?;
                Ok(usage)
            }
            (Kind::Active, _) => usage::count(Path::new(&self.paths.fs(record.id))),
        }
    }

    /// The snapshots that `filter` lets through, as they are now; no lock is held while the iterator
    /// lives.
    ///
    /// # Errors
    /// I/O errors.
    pub fn list(self: &Arc<Self>, filter: Filter) -> Result<impl Iterator<Item = Result<Info>>> {
        let this = Arc::clone(self);
        let walk: Walk = self.metadata.walk()?;
        Ok(walk.filter_map(move |entry| {
            let shown = entry.and_then(|(key, record)| {
                let kind = known_kind(&key, &record)?;
                // Filters do not see the upperdir label, as in containerd.
                let matches = filter.matches(&key, kind, &record);
                Ok(matches.then(|| this.show(&key, record, kind)))
            });
            shown.transpose()
        }))
    }

    /// Deletes every directory that waits for it, before returning.
    ///
    /// # Errors
    /// When `snapshots/` cannot be read. What resists deletion is logged and stays.
    pub fn cleanup(&self) -> Result<()> {
        let entries = disk::list(&self.paths)?;
        self.faults.reach(Step("cleanup:listed"));
        for (_, entry) in entries {
            if let Entry::Gone(id) = entry
                && let Err(error) = disk::delete_tree(&self.paths.gone_dir(id))
            {
                tracing::warn!(error = one_line(&error), "will be deleted later");
            }
        }
        Ok(())
    }

    /// Counts the snapshots, by reading all of them.
    ///
    /// # Errors
    /// I/O errors or a damaged record.
    pub fn count(&self) -> Result<Count> {
        let mut count = Count::default();
        for entry in self.metadata.walk()? {
            let (key, record) = entry?;
            *count.by_kind.entry(known_kind(&key, &record)?).or_default() += 1;
            count.layer_bytes += record.usage.map_or(0, |usage| usage.size);
        }
        Ok(count)
    }

    /// Deletions and counts that are still to be done.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.background.backlog()
    }

    /// Finishes the background work before the process ends.
    pub fn stop(&self) {
        self.background.stop();
        if let Err(error) = self.metadata.return_unused_ids() {
            tracing::warn!(
                error = one_line(&error),
                "ids will be skipped at the next start"
            );
        }
    }

    fn existing(&self, key: &str) -> Result<(Record, Kind)> {
        let record = self
            .metadata
            .get(key)?
            .ok_or_else(|| SnapshotError::NotFound {
                key: key.to_owned(),
            })?;
        let kind = known_kind(key, &record)?;
        Ok((record, kind))
    }

    fn plan_mount(&self, record: &Record, kind: Kind) -> Mount {
        let Options {
            overlay_options,
            remap_ids,
            ..
        } = &self.options;
        mounts::plan(&self.paths, record, kind, overlay_options, *remap_ids)
    }

    fn show(&self, key: &str, record: Record, kind: Kind) -> Info {
        let mut labels = record.labels;
        if self.options.upperdir_label {
            labels.insert(labels::UPPERDIR.to_owned(), self.paths.fs(record.id));
        }
        Info {
            name: key.to_owned(),
            kind,
            parent: record.parent,
            labels,
            created: record.created,
            updated: record.updated,
        }
    }

    /// Brings the copy of the record up to date. It only matters if the database gets lost, so a
    /// failure is no reason to fail what is already durable.
    fn describe(&self, key: &str, record: &Record) {
        if let Err(error) = disk::write_copy(&self.paths.dir(record.id), key, record) {
            tracing::warn!(
                key,
                error = one_line(&error),
                "fsck could not rebuild this snapshot"
            );
        }
    }
}

fn long_if(is_long: bool) -> Work {
    if is_long {
        Work::LongWrite
    } else {
        Work::Write
    }
}

fn known_kind(key: &str, record: &Record) -> Result<Kind> {
    record.kind().ok_or_else(|| SnapshotError::Damaged {
        key: key.to_owned(),
        reason: format!("unknown kind {}", record.kind_number),
    })
}

fn require_key(key: &str) -> Result<()> {
    if key.is_empty() {
        return Err(SnapshotError::Invalid {
            reason: "the snapshot key is empty".to_owned(),
        });
    }
    Ok(())
}

fn now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
