//! Checks that database and directories agree, and mends what can be mended.
//!
//! ```text
//! what                                              with --repair
//! database missing or unreadable                    moved aside; rebuilt from the directories
//! record damaged                                    taken from its directory, else dropped
//! record whose parent or chain is wrong             left: its files are not what it says
//! directory of an active snapshot or view missing   made anew, empty
//! directory of a layer missing                      left: remove the image and pull it again
//! copy of the record on a directory out of date     written anew
//! directory without a record                        deleted (it is the rest of a removal)
//! directory that a rebuild cannot place             moved to <root>/lost/<id>
//! ```
//!
//! A rebuild takes the records from the extended attributes of `snapshots/<id>` (record.rs). A copy may
//! be one step behind: when others are built on a snapshot whose copy still says "active", it is the
//! committed layer that they name. Of two directories with the same key the younger one wins.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;

use transship_path_error::During as _;

use crate::disk::{self, Entry};
use crate::error::{Result, SnapshotError, one_line};
use crate::from_redb;
use crate::metadata::{self, Metadata};
use crate::mounts::SnapshotPaths;
use crate::record::{Kind, Record};

/// Ids that a rebuild leaves out: how many snapshots were removed after the youngest one that is left
/// is not known.
const REBUILD_GAP: u64 = 1 << 20;

/// Bytes of page cache while the whole file is read.
const CHECK_CACHE: usize = 64 << 20;

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong, with the key or path.
    pub what: String,
    /// Whether it was mended.
    pub mended: bool,
}

/// What was found, a line each, and how much of it is left.
#[must_use]
pub fn report(problems: &[Problem]) -> String {
    let line = |problem: &Problem| {
        let act = if problem.mended { "mended" } else { "FOUND" };
        format!("{act}: {}\n", problem.what)
    };
    let left = problems.iter().filter(|problem| !problem.mended).count();
    let lines: String = problems.iter().map(line).collect();
    format!("{lines}{} problems, {left} left\n", problems.len())
}

/// As those of fsck(8): 0 clean, 1 mended, 4 something is left, 8 nothing could be checked (none).
#[must_use]
pub fn exit_code(problems: Option<&[Problem]>) -> u8 {
    let Some(problems) = problems else {
        return 8;
    };
    if problems.iter().any(|problem| !problem.mended) {
        4
    } else {
        u8::from(!problems.is_empty())
    }
}

/// Checks the root directory of a daemon that is not running (the caller holds its lock).
///
/// # Errors
/// I/O errors that prevent the check itself.
pub fn check(root: &Path, repair: bool) -> Result<Vec<Problem>> {
    let paths = SnapshotPaths::below(root)?;
    disk::create_private_dir(paths.snapshots())?;
    let mut check = Check {
        paths: &paths,
        repair,
        problems: Vec::new(),
    };
    let database = root.join(metadata::FILE);
    let entries = disk::list(&paths)?;
    let ids: BTreeSet<u64> = entries
        .iter()
        .filter_map(|(_, entry)| {
            if let Entry::Snapshot(id) = entry {
                Some(*id)
            } else {
                None
            }
        })
        .collect();
    if !repair && from_redb::is_in(root)? {
        let what = "the metadata is that of an earlier release: the next start, or --repair, takes it over";
        check.note(what.to_owned(), false);
        return Ok(check.problems);
    }
    let metadata = match open_database(root, &database) {
        Ok(metadata) if metadata.is_fresh() && !ids.is_empty() => {
            check.note(
                format!("{} is new, but there are snapshots", database.display()),
                repair,
            );
            repair.then_some(metadata)
        }
        Ok(metadata) => {
            check.compare(&metadata, &entries)?;
            return Ok(check.problems);
        }
        Err(Unusable::Now(error)) => return Err(error),
        Err(Unusable::Lost(why)) => {
            check.note(
                format!("{} cannot be used: {why}", database.display()),
                repair,
            );
            if repair && database.try_exists().during("look for", &database)? {
                move_aside(&database)?;
            }
            repair
                .then(|| Metadata::open_checked(&database, CHECK_CACHE))
                .transpose()?
        }
    };
    if let Some(metadata) = metadata {
        check.rebuild(&metadata, &ids, root)?;
        check.compare(&metadata, &disk::list(&paths)?)?;
    }
    Ok(check.problems)
}

/// Why a database is of no use.
enum Unusable {
    /// It is damaged or missing, and can be rebuilt from the directories.
    Lost(String),
    /// It could not be read this time (a full disk, too many open files), or a later release has written it: what it says
    /// is more than the directories know.
    Now(SnapshotError),
}

/// Opens the database, with the structure of the whole file checked; that of an earlier release is taken over.
fn open_database(root: &Path, path: &Path) -> Result<Metadata, Unusable> {
    let is_there = path.try_exists().during("look for", path);
    let is_there = is_there.map_err(|error| Unusable::Now(error.into()))?;
    if !is_there && !from_redb::is_in(root).map_err(Unusable::Now)? {
        return Err(Unusable::Lost("it does not exist".to_owned()));
    }
    let open = || {
        let mut metadata = Metadata::open_checked(path, CHECK_CACHE)?;
        from_redb::take_over(root, &mut metadata)?;
        Ok(metadata)
    };
    open().map_err(|error: SnapshotError| match error.is_damage() {
        true => Unusable::Lost(one_line(&error)),
        false => Unusable::Now(error),
    })
}

/// Renames a damaged database and its WAL, which must not meet another database.
fn move_aside(database: &Path) -> Result<()> {
    for suffix in ["", "-wal", "-shm"] {
        let mut path = database.as_os_str().to_owned();
        path.push(suffix);
        let mut aside = path.clone();
        aside.push(".damaged");
        match fs::rename(&path, &aside) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            outcome => outcome.during("rename", path)?,
        }
    }
    Ok(())
}

struct Check<'a> {
    paths: &'a SnapshotPaths,
    repair: bool,
    problems: Vec<Problem>,
}

impl Check<'_> {
    fn note(&mut self, what: String, mended: bool) {
        self.problems.push(Problem { what, mended });
    }

    /// Notes a problem and mends it if that is wanted.
    fn mend(&mut self, what: String, mend: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.repair {
            mend()?;
        }
        self.note(what, self.repair);
        Ok(())
    }

    fn compare(&mut self, metadata: &Metadata, entries: &[(String, Entry)]) -> Result<()> {
        let records = self.readable_records(metadata, entries)?;
        let by_id: HashMap<u64, &str> = records
            .iter()
            .map(|(key, record)| (record.id, key.as_str()))
            .collect();
        for (key, record) in &records {
            if by_id[&record.id] != key {
                let other = by_id[&record.id];
                self.note(
                    format!("{key:?} and {other:?} have the same id {}", record.id),
                    false,
                );
            }
            let parent = records.get(&record.parent);
            let chain = parent.map_or_else(Vec::new, |parent| {
                std::iter::once(parent.id)
                    .chain(parent.ancestors.iter().copied())
                    .collect()
            });
            if record.kind().is_none() {
                self.note(
                    format!("{key:?} has the unknown kind {}", record.kind_number),
                    false,
                );
            }
            if !record.parent.is_empty()
                && parent.is_none_or(|parent| parent.kind() != Some(Kind::Committed))
            {
                self.note(
                    format!("{key:?}: no layer {:?} to stand on", record.parent),
                    false,
                );
            } else if chain != record.ancestors {
                self.note(
                    format!("{key:?} is not on top of the layers it names"),
                    false,
                );
            }
            self.compare_directory(key, record)?;
        }
        for (name, entry) in entries {
            let dir = self.paths.snapshots().join(name);
            match entry {
                Entry::Snapshot(id) if by_id.contains_key(id) => {}
                Entry::Snapshot(_) | Entry::New(_) | Entry::Gone(_) => {
                    let what = format!("{} belongs to no snapshot", dir.display());
                    self.mend(what, || disk::delete_tree(&dir))?;
                }
                Entry::Foreign => {
                    self.note(
                        format!("{} was not made by the snapshotter", dir.display()),
                        false,
                    );
                }
            }
        }
        let highest = entries.iter().filter_map(|(_, entry)| match entry {
            Entry::Snapshot(id) | Entry::New(id) | Entry::Gone(id) => Some(*id),
            Entry::Foreign => None,
        });
        metadata.skip_ids_through(highest.chain(by_id.keys().copied()).max().unwrap_or(0))
    }

    fn readable_records(
        &mut self,
        metadata: &Metadata,
        entries: &[(String, Entry)],
    ) -> Result<BTreeMap<String, Record>> {
        let mut records = BTreeMap::new();
        for entry in metadata.walk()? {
            match entry {
                Ok((key, record)) => drop(records.insert(key, record)),
                Err(SnapshotError::Damaged { key, reason }) => {
                    let copy = self.find_copy(entries, &key)?;
                    let what = match &copy {
                        Some(_) => format!("the record of {key:?} is damaged: {reason}"),
                        None => {
                            format!("the record of {key:?} is damaged and has no copy: {reason}")
                        }
                    };
                    self.mend(what, || match copy.clone() {
                        Some(copy) => metadata.restore(vec![(key.clone(), copy)]),
                        None => metadata.forget(&key),
                    })?;
                    records.extend(copy.map(|copy| (key, copy)));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(records)
    }

    fn find_copy(&self, entries: &[(String, Entry)], key: &str) -> Result<Option<Record>> {
        for (_, entry) in entries {
            if let Entry::Snapshot(id) = entry
                && let Some(copy) = disk::read_copy(&self.paths.dir(*id))?
                && copy.key == key
            {
                return Ok(Some(Record {
                    key: String::new(),
                    ..copy
                }));
            }
        }
        Ok(None)
    }

    fn compare_directory(&mut self, key: &str, record: &Record) -> Result<()> {
        let (dir, id) = (self.paths.dir(record.id), record.id);
        let is_active = record.kind() == Some(Kind::Active);
        if is_active && is_dir(&dir.join("fs"))? && !is_dir(&dir.join("work"))? {
            // Somebody has removed it, as the kernel's documentation says after a crash of a volatile overlay. What the
            // container has written is in the other one.
            let what = format!("{key:?} has no workdir in {}", dir.display());
            self.mend(what, || disk::create_work(&dir))?;
        } else if !is_dir(&dir.join("fs"))? {
            let what = format!("{key:?} has no directory {}", dir.display());
            if record.kind() == Some(Kind::Committed) {
                self.note(what, false);
                return Ok(());
            }
            let paths = self.paths.clone();
            let parent = record.ancestors.first().copied();
            self.mend(what, || {
                disk::delete_tree(&dir)?;
                disk::delete_tree(&paths.new_dir(id))?;
                let owner = parent.map_or(Ok((0, 0)), |parent| disk::owner(&paths, parent))?;
                disk::create_new(&paths, id, is_active, owner)?;
                disk::write_copy(&paths.new_dir(id), key, record)?;
                disk::publish(&paths, id)
            })?;
            return Ok(());
        }
        let copy = disk::read_copy(&dir)?;
        let same = copy.is_some_and(|copy| {
            // Labels may have been left out, and usage follows later.
            let labels_fit = copy.labels == record.labels || copy.labels.is_empty();
            let without = |record: &Record| Record {
                labels: BTreeMap::new(),
                usage: None,
                key: String::new(),
                ..record.clone()
            };
            labels_fit && copy.key == key && without(&copy) == without(record)
        });
        if !same {
            let what = format!("{} describes itself wrongly, it is {key:?}", dir.display());
            self.mend(what, || disk::write_copy(&dir, key, record))?;
        }
        Ok(())
    }

    /// Fills the empty database from the copies on the directories `ids`.
    fn rebuild(&mut self, metadata: &Metadata, ids: &BTreeSet<u64>, root: &Path) -> Result<()> {
        let mut copies = BTreeMap::new();
        for id in ids {
            if let Some(copy) = disk::read_copy(&self.paths.dir(*id))?
                && copy.id == *id
                && copy.kind().is_some()
                && !copy.key.is_empty()
            {
                copies.insert(*id, copy);
            }
        }
        let records = place_copies(copies);
        let placed: BTreeSet<u64> = records.values().map(|record| record.id).collect();
        for id in ids.difference(&placed) {
            let (dir, lost) = (self.paths.dir(*id), root.join("lost"));
            disk::create_private_dir(&lost)?;
            fs::rename(&dir, lost.join(id.to_string())).during("rename", &dir)?;
            self.note(
                format!(
                    "{} cannot be placed; it is in {}",
                    dir.display(),
                    lost.display()
                ),
                false,
            );
        }
        let count = records.len();
        metadata.restore(records.into_iter().collect())?;
        metadata.skip_ids_through(ids.last().copied().unwrap_or(0) + REBUILD_GAP)?;
        metadata.mark_used()?;
        self.note(
            format!("{count} snapshots of {} were found again", ids.len()),
            true,
        );
        Ok(())
    }
}

/// Decides which copies make a consistent set of records, oldest first: a parent is always older.
fn place_copies(mut copies: BTreeMap<u64, Record>) -> BTreeMap<String, Record> {
    // Whoever is built upon is the committed layer that its children name.
    let named: Vec<(u64, String)> = copies
        .values()
        .filter_map(|copy| Some((*copy.ancestors.first()?, copy.parent.clone())))
        .collect();
    for (id, name) in named {
        if let Some(parent) = copies.get_mut(&id)
            && parent.kind() == Some(Kind::Active)
        {
            parent.kind_number = Kind::Committed as u32;
            parent.key = name;
        }
    }
    let mut records: BTreeMap<String, Record> = BTreeMap::new();
    for copy in copies.into_values() {
        let parent = records.get(&copy.parent);
        let chain: Vec<u64> = parent
            .map(|parent| std::iter::once(parent.id).chain(parent.ancestors.iter().copied()))
            .map_or_else(Vec::new, Iterator::collect);
        let stands = copy.parent.is_empty()
            || parent.is_some_and(|parent| parent.kind() == Some(Kind::Committed));
        if stands && chain == copy.ancestors {
            records.insert(
                copy.key.clone(),
                Record {
                    key: String::new(),
                    ..copy
                },
            );
        }
    }
    records
}

fn is_dir(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(metadata.is_dir()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Ok(Err(error).during("stat", path)?),
    }
}
