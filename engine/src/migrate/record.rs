//! The lock and the record of a migration that is under way.
//!
//! ```text
//! /run/transship/migrations/<namespace>:<container>        locked (flock): a migration is under way
//! /var/lib/transship/migrations/<namespace>:<container>    Commit has been sent: the command that leads
//!                                                          to the target, and the time. Left behind
//!                                                          with the container paused: nobody knows
//!                                                          which copy runs
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::error::{Context, Error, Result};

/// As much of a record as is read, in bytes.
const LIMIT: u64 = 4096;

/// The record of one migration, whose lock is held as long as this is there.
#[derive(Debug)]
pub(super) struct Record {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Record {
    /// Locks the migration of the container. Records are in `records`, locks in `locks`.
    ///
    /// # Errors
    /// Another migration has it.
    pub(super) fn take(records: &Path, locks: &Path, namespace: &str, id: &str) -> Result<Self> {
        for dir in [records, locks] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let name = format!("{namespace}:{id}");
        let path = locks.join(&name);
        let failed = || format!("cannot lock {}", path.display());
        // It stays until the node boots: who removed it would take it from the next one.
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(&path)
            .with_context(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self {
                path: records.join(name),
                _lock: lock,
            }),
            Err((_, Errno::EWOULDBLOCK)) => Err(Error::refused(format!(
                "another migration of {id:?} is under way"
            ))),
            Err((_, errno)) => Err(errno).with_context(failed),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// # Errors
    /// An earlier migration of the container, which is paused, has not been decided.
    pub(super) fn check_clear(&self, id: &str, namespace: &str) -> Result<()> {
        let file = match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file,
        };
        let mut text = String::new();
        file.and_then(|file| file.take(LIMIT).read_to_string(&mut text))
            .with_context(|| format!("cannot read {}", self.path.display()))?;
        let to = text.lines().next().unwrap_or_default();
        Err(Error::refused(format!(
            "an earlier migration of {id:?} by {to:?} has not been decided: it may run there"
        ))
        .hint("if it does not, let it go on here first:")
        .hint(format!("  ctr -n {namespace} tasks resume {id}")))
    }

    /// Writes down that the target is told to let the copy run.
    pub(super) fn write(&self, to: &str) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |since| since.as_secs());
        let written = || {
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&self.path)?;
            file.write_all(format!("{}\n{now}\n", to.escape_debug()).as_bytes())?;
            file.sync_all()?;
            let dir = self.path.parent().unwrap_or(Path::new("/"));
            File::open(dir)?.sync_all()
        };
        written().with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// It is known which copy runs.
    pub(super) fn clear(&self) -> Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.with_context(|| format!("cannot remove {}", self.path.display())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn take(dir: &Path, namespace: &str) -> Result<Record> {
        Record::take(&dir.join("records"), &dir.join("locks"), namespace, "web")
    }

    #[test]
    fn one_migration_of_a_container_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let record = take(dir.path(), "default").unwrap();
        let error = take(dir.path(), "default").unwrap_err();
        assert_eq!(error.kind(), Kind::Refused);
        take(dir.path(), "moved").unwrap();
        drop(record);
        take(dir.path(), "default").unwrap();
    }

    #[test]
    fn what_is_not_decided_stays_on_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let record = take(dir.path(), "default").unwrap();
        record.check_clear("web", "default").unwrap();
        record.write("ssh node-b").unwrap();
        drop(record);
        let record = take(dir.path(), "default").unwrap();
        let error = record.check_clear("web", "default").unwrap_err();
        assert!(error.to_string().contains("ssh node-b"), "{error}");
        record.clear().unwrap();
        record.check_clear("web", "default").unwrap();
        assert_eq!(fs::read_dir(dir.path().join("records")).unwrap().count(), 0);
    }
}
