//! The record of a migration that arrives: what its source may believe when it has not heard the answer
//! to `Commit`.
//!
//! ```text
//! /var/lib/transship/arrivals/<migration>     JSON: Arrival; <migration> is 32 hexadecimal digits
//! /run/transship/arrivals/<migration>         locked (flock) by whoever works on it: `receive`, its
//!                                             guard, or who answers the source's question
//!
//!              Commit heard   let go       written out
//!  arriving ───> committed ───> runs ───> durable
//!      │             └───> aborting
//!      └───────────────────────┴───> aborted
//! ```
//!
//! Each state is on the disk before anybody hears of it, and `committed` before the copy is let go.
//! Whoever finds a record that is not locked brings it to its end ([`super::settle`]). A source that finds no record
//! takes the migration for `aborted`: so that is forgotten after 30 days, and `durable` never by age, which a clock that
//! is set tells wrongly.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::types::Descriptor;
use serde::{Deserialize, Serialize};
use transship_checkpoint::annotations::{MIGRATION_DIGITS, is_migration};

use super::held_process::HeldProcess;
use crate::durable_record;
use crate::error::{Context, Error, Kind, Result};
use crate::locks::Lock;
use crate::node_id::{boot_id, random_digits};

/// Where records of arrivals are.
const ARRIVALS: &str = "/var/lib/transship/arrivals";
/// Where their locks are.
const LOCKS: &str = "/run/transship/arrivals";
/// How long a migration is remembered that was aborted.
const REMEMBERED: Duration = Duration::from_secs(30 * 24 * 3600);

/// How far a migration has come here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// The copy is being made, or held.
    Arriving,
    /// The source has committed itself; the copy is being let go.
    Committed,
    /// The copy has been let go.
    Runs,
    /// The same, and all of it is on the disk.
    Durable,
    /// It has never run although the source has committed itself, and never will: what there is of it is being removed.
    Aborting,
    /// It has never run, and nothing of it is left.
    Aborted,
}

/// What there is of the copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// How far it has come.
    pub state: State,
    /// The boot of this node in which it came; what was not written out then may be lost. Empty: not known.
    #[serde(default)]
    pub boot: String,
    /// containerd's namespace.
    pub namespace: String,
    /// Id of the container.
    pub container: String,
    /// Its name in the checkpoint.
    pub name: String,
    /// Its snapshotter; the snapshot has the container's id.
    pub snapshotter: String,
    /// The word of the restore, which its record and its snapshot carry.
    #[serde(default)]
    pub made_by: String,
    /// The checkpoint in the store that it is restored from.
    pub checkpoint: String,
    /// Where its files are, once there are some.
    #[serde(default)]
    pub upperdir: Option<PathBuf>,
    /// Whether pages of its memory are still on the source, so that it cannot run on without `receive`.
    #[serde(default)]
    pub lacks_memory: bool,
    /// The image that its record will name, unless the node has it by a name.
    #[serde(default)]
    pub image: Option<ImageToName>,
    /// The pod that it is; then `container` is what people call it, and the fields about a container are empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<ArrivingPod>,
}

/// What there is of a pod. Each thing is written down before it is made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrivingPod {
    /// Its uid here.
    pub uid: String,
    /// Its sandbox, where somebody else has made it.
    #[serde(default)]
    pub sandbox: Option<String>,
    /// Names of its containers.
    pub containers: Vec<String>,
    /// Their ids, when all are made.
    pub ids: Vec<String>,
    /// Their first processes, when all are held.
    #[serde(default)]
    pub held: Vec<HeldProcess>,
    /// Images that this node had not, by the digests of their configs.
    pub images: Vec<String>,
    /// Directories that were not there.
    pub directories: Vec<PathBuf>,
    /// Directories in its emptyDirs, for contents of files that come before the freeze.
    #[serde(default)]
    pub contents: Vec<PathBuf>,
    /// Whether somebody else makes it, and ends it: then nothing but these is made that would have to be removed.
    #[serde(default)]
    pub waits: bool,
    /// Where its files are: upperdirs and emptyDirs.
    pub files: Vec<PathBuf>,
}

/// An image without a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageToName {
    /// What it will be called.
    pub name: String,
    digest: String,
    media_type: String,
    size: i64,
}

impl ImageToName {
    pub(super) fn new(name: &str, target: &Descriptor) -> Self {
        Self {
            name: name.to_owned(),
            digest: target.digest.clone(),
            media_type: target.media_type.clone(),
            size: target.size,
        }
    }

    pub(super) fn target(&self) -> Descriptor {
        Descriptor {
            digest: self.digest.clone(),
            media_type: self.media_type.clone(),
            size: self.size,
            ..Descriptor::default()
        }
    }
}

/// A record and its lock.
#[derive(Debug)]
pub struct Locked {
    path: PathBuf,
    /// What the record says.
    pub arrival: Arrival,
    _lock: Lock,
}

/// What is found of a migration.
#[derive(Debug)]
pub enum Found {
    /// Nothing: it has not come so far, or was aborted a month ago.
    Nothing,
    /// Somebody works on it.
    Busy,
    /// Its record.
    Record(Box<Locked>),
}

/// The records of a node.
#[derive(Debug, Clone)]
pub struct Arrivals {
    records: PathBuf,
    locks: PathBuf,
}

impl Default for Arrivals {
    fn default() -> Self {
        Self::at(Path::new(ARRIVALS), Path::new(LOCKS))
    }
}

impl Arrivals {
    /// Records in `records`, locks in `locks`.
    pub fn at(records: &Path, locks: &Path) -> Self {
        Self {
            records: records.to_path_buf(),
            locks: locks.to_path_buf(),
        }
    }

    /// Begins the record of a migration.
    ///
    /// # Errors
    /// There is one already, or it cannot be written.
    pub(super) fn begin(&self, migration: &str, arrival: Arrival) -> Result<Locked> {
        check_id(migration)?;
        let arrival = Arrival {
            boot: boot_id()?,
            ..arrival
        };
        let lock = self.lock(migration)?;
        let path = self.records.join(migration);
        let is_there = path.try_exists();
        let is_there = is_there.with_context(|| format!("cannot look for {}", path.display()))?;
        let lock = lock.filter(|_| !is_there).ok_or_else(|| {
            Error::refused(format!("the migration {migration} has been here before"))
        })?;
        // What is too old stays until the next one comes.
        drop(self.forget_old());
        let mut locked = Locked {
            path,
            arrival,
            _lock: lock,
        };
        let state = locked.arrival.state;
        locked.set(state)?;
        Ok(locked)
    }

    /// Finds the record of a migration, and locks it.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open(&self, migration: &str) -> Result<Found> {
        check_id(migration)?;
        let Some(lock) = self.lock(migration)? else {
            return Ok(Found::Busy);
        };
        let path = self.records.join(migration);
        let Some(arrival) = durable_record::read::<Arrival>(&path)? else {
            return Ok(Found::Nothing);
        };
        Ok(Found::Record(Box::new(Locked {
            path,
            arrival,
            _lock: lock,
        })))
    }

    /// The state of a migration, whoever works on it.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn state(&self, migration: &str) -> Result<Option<State>> {
        check_id(migration)?;
        Ok(
            durable_record::read::<Arrival>(&self.records.join(migration))?
                .map(|arrival| arrival.state),
        )
    }

    /// Whether there is nothing left to be done for a migration.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn has_ended(&self, migration: &str) -> Result<bool> {
        let state = self.state(migration)?;
        Ok(state.is_none_or(|state| matches!(state, State::Durable | State::Aborted)))
    }

    /// The migrations that have not come to their end, also those whose records cannot be read. Of a record whose writer
    /// was killed at it only the one before is left.
    ///
    /// # Errors
    /// The records cannot be listed.
    pub fn unfinished(&self) -> Result<Vec<String>> {
        durable_record::remove_unfinished(&self.records, &self.locks)?;
        let mut found = Vec::new();
        for migration in self.all()? {
            if !self.has_ended(&migration).unwrap_or(false) {
                found.push(migration);
            }
        }
        Ok(found)
    }

    /// The migrations of pods that were made here and have never run.
    ///
    /// # Errors
    /// The records cannot be listed.
    pub(super) fn aborted_pods(&self) -> Result<BTreeSet<String>> {
        let is_one = |arrival: &Arrival| {
            arrival.state == State::Aborted && { arrival.pod.as_ref() }.is_some_and(|it| !it.waits)
        };
        let mut found = self.all()?;
        found.retain(|migration| {
            let read = durable_record::read::<Arrival>(&self.records.join(migration));
            matches!(read, Ok(Some(arrival)) if is_one(&arrival))
        });
        Ok(found.into_iter().collect())
    }

    fn all(&self) -> Result<Vec<String>> {
        let paths = durable_record::list(&self.records)?;
        let names = paths.iter().filter_map(|path| path.file_name()?.to_str());
        Ok(names
            .filter(|name| is_migration(name))
            .map(str::to_owned)
            .collect())
    }

    fn forget_old(&self) -> Result<()> {
        for migration in self.all()? {
            let path = self.records.join(&migration);
            let age = fs::metadata(&path).and_then(|meta| meta.modified());
            let age = age.ok().and_then(|modified| modified.elapsed().ok());
            let state = self.state(&migration).unwrap_or_default();
            if age.is_some_and(|age| age > REMEMBERED) && state == Some(State::Aborted) {
                fs::remove_file(&path)
                    .with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        Ok(())
    }

    /// None when somebody has it.
    fn lock(&self, migration: &str) -> Result<Option<Lock>> {
        durable_record::lock(&self.records, &self.locks, migration)
    }
}

impl Locked {
    /// Writes down how far the migration has come; on the disk when this returns.
    ///
    /// # Errors
    /// A system call failed; the record is as it was.
    pub(super) fn set(&mut self, state: State) -> Result<()> {
        let arrival = Arrival {
            state,
            ..self.arrival.clone()
        };
        durable_record::write(&self.path, &arrival)?;
        self.arrival = arrival;
        Ok(())
    }

    /// Writes down that it has never run, and nothing of it is left. A disk that is full keeps no source standing still: no
    /// record says the same, and needs no room. One that stays is found by who comes next, and what it names may be
    /// another attempt's by then.
    pub(super) fn set_aborted(&mut self) {
        if let Err(error) = self.set(State::Aborted) {
            tracing::warn!("{}", error.one_line());
            if let Err(error) = fs::remove_file(&self.path) {
                tracing::warn!("cannot remove {}: {error}", self.path.display());
            }
            self.arrival.state = State::Aborted;
        }
    }

    /// Writes down that the source has committed itself.
    ///
    /// # Errors
    /// [`Kind::Uncertain`]: whether the word is on the disk is not known.
    pub(super) fn commit(&mut self) -> Result<()> {
        self.set(State::Committed).map_err(|error| {
            let message = "whether the commitment is written down is not known";
            Error::new(Kind::Uncertain, message).because(error)
        })
    }

    /// Whether this node was down since then: what was not written out may be lost.
    ///
    /// # Errors
    /// The kernel does not say which boot this is.
    pub(super) fn is_of_another_boot(&self) -> Result<bool> {
        let boot = &self.arrival.boot;
        Ok(!boot.is_empty() && *boot != boot_id()?)
    }

    /// Writes down what has been added to [`Self::arrival`].
    ///
    /// # Errors
    /// A system call failed; the record is as it was.
    pub(super) fn write(&self) -> Result<()> {
        durable_record::write(&self.path, &self.arrival)
    }

    /// The migration.
    pub(super) fn migration(&self) -> String {
        let name = self.path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }
}

/// A name for a migration that nobody guesses.
///
/// # Errors
/// The kernel gives no random bytes.
pub fn new_migration() -> Result<String> {
    random_digits::<{ MIGRATION_DIGITS / 2 }>()
}

/// It becomes the name of a file.
fn check_id(migration: &str) -> Result<()> {
    match is_migration(migration) {
        true => Ok(()),
        false => Err(Error::refused("the name of the migration is no such name")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival() -> Arrival {
        Arrival {
            state: State::Arriving,
            boot: String::new(),
            namespace: "default".into(),
            container: "web".into(),
            name: "web".into(),
            snapshotter: "transship".into(),
            made_by: "18eb-0".into(),
            checkpoint: "migration-web-1".into(),
            upperdir: None,
            lacks_memory: false,
            image: None,
            pod: None,
        }
    }

    #[test]
    fn a_record_is_one_migrations_and_one_workers() {
        let dir = tempfile::tempdir().unwrap();
        let arrivals = Arrivals::at(&dir.path().join("records"), &dir.path().join("locks"));
        let id = new_migration().unwrap();
        assert!(matches!(arrivals.open(&id).unwrap(), Found::Nothing));
        let mut locked = arrivals.begin(&id, arrival()).unwrap();
        assert!(matches!(arrivals.open(&id).unwrap(), Found::Busy));
        assert!(arrivals.begin(&id, arrival()).is_err());
        assert_eq!(arrivals.unfinished().unwrap(), std::slice::from_ref(&id));
        locked.set(State::Committed).unwrap();
        drop(locked);
        let Found::Record(mut locked) = arrivals.open(&id).unwrap() else {
            panic!("there is a record");
        };
        assert_eq!(locked.arrival.state, State::Committed);
        locked.set(State::Durable).unwrap();
        drop(locked);
        assert!(arrivals.unfinished().unwrap().is_empty());
        assert!(arrivals.begin(&id, arrival()).is_err(), "once");
        assert_ne!(new_migration().unwrap(), id);
    }

    #[test]
    fn that_a_copy_runs_is_never_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let arrivals = Arrivals::at(&dir.path().join("records"), &dir.path().join("locks"));
        let end = |state| {
            let id = new_migration().unwrap();
            arrivals.begin(&id, arrival()).unwrap().set(state).unwrap();
            let record = fs::File::open(arrivals.records.join(&id)).unwrap();
            record.set_modified(std::time::UNIX_EPOCH).unwrap();
            id
        };
        let (durable, aborted) = (end(State::Durable), end(State::Aborted));
        end(State::Arriving);
        assert_eq!(arrivals.state(&durable).unwrap(), Some(State::Durable));
        assert_eq!(arrivals.state(&aborted).unwrap(), None);
    }

    #[test]
    fn what_cannot_be_written_down_has_ended_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let arrivals = Arrivals::at(&dir.path().join("records"), &dir.path().join("locks"));
        let migration = "0".repeat(MIGRATION_DIGITS);
        let mut locked = arrivals.begin(&migration, arrival()).unwrap();
        // Where the record would be written.
        fs::create_dir(dir.path().join("records").join(format!("{migration}~"))).unwrap();
        let refused = locked.commit().unwrap_err();
        assert_eq!(refused.kind(), Kind::Uncertain, "the source asks");
        locked.set_aborted();
        assert_eq!(locked.arrival.state, State::Aborted);
        // Who comes next finds nothing to abort.
        assert_eq!(arrivals.state(&migration).unwrap(), None);
    }

    #[test]
    fn a_name_leads_nowhere_else() {
        let arrivals = Arrivals::at(Path::new("/nowhere"), Path::new("/nowhere"));
        for name in [
            "",
            "x",
            "../../../../../../etc/passwd/12345",
            &"g".repeat(32),
        ] {
            assert!(arrivals.open(name).is_err(), "{name}");
        }
    }
}
