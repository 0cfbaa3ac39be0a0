//! What has come of an artifact so far: a transfer that is cut off is gone on with, by whoever asks for the same one.
//!
//! ```text
//! <store>/.pulls/<digest of the artifact's manifest>/     0700; locked (flock) by who fills it
//!     .done                  a line for each layer that is in its place: its number in the manifest
//!     <container>/<path>     the files of the checkpoint, as long as the manifest says, with holes; of one that is
//!                            encrypted sealed.age, the package, instead
//! ```
//!
//! It is a draft that nobody works on: it becomes the checkpoint, is removed with the first error that another
//! attempt would not change (a disk that is full is one that it may), and a day after its last one. What a power cut has spoilt is found when all files are
//! compared with the manifest.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use transship_checkpoint::store::{Draft, Store};
use transship_path_error::{During as _, PathError};

use super::digests::check_digest;
use crate::error::PackageError;
use crate::new_file::OF_ROOM;

const PULLS: &str = ".pulls";
const DONE: &str = ".done";
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// The files of an artifact that are there; of one that is encrypted the package. Removed when it is dropped, unless it is kept.
#[derive(Debug)]
pub(super) struct Partial {
    dir: PathBuf,
    lock: Option<Flock<File>>,
    done: BTreeSet<usize>,
    journal: Mutex<File>,
    is_kept: bool,
}

impl Partial {
    /// What is there of the artifact whose manifest has this digest.
    ///
    /// # Errors
    /// Somebody else fills it at this moment, or a system call failed.
    pub(super) fn open(store: &Store, digest: &str) -> Result<Self, PackageError> {
        let pulls = store.root().join(PULLS);
        store.make_root()?;
        let dir = pulls.join(check_digest(digest)?);
        let lock = loop {
            let mut builder = DirBuilder::new();
            builder.recursive(true).mode(0o700);
            builder.create(&dir).during("make", &dir)?;
            if let Some(lock) = lock(&dir)? {
                break lock;
            }
        };
        let path = dir.join(DONE);
        let mut open = OpenOptions::new();
        open.read(true).append(true).create(true).mode(0o600);
        open.custom_flags(nix::libc::O_NOFOLLOW);
        let journal = open.open(&path).during("open", &path)?;
        let text = fs::read_to_string(&path).during("read", &path)?;
        // It may have been cut off in the middle of a number.
        let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
        journal.set_len(whole.len() as u64).during("cut", &path)?;
        Ok(Self {
            done: whole.lines().filter_map(|it| it.parse().ok()).collect(),
            journal: Mutex::new(journal),
            lock: Some(lock),
            is_kept: false,
            dir,
        })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn is_done(&self, layer: usize) -> bool {
        self.done.contains(&layer)
    }

    /// The layer is in its place.
    pub(super) fn set_done(&self, layer: usize) -> Result<(), PathError> {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let line = format!("{layer}\n");
        journal
            .write_all(line.as_bytes())
            .during("write", self.dir.join(DONE))
    }

    /// Leaves it for the next attempt, where that may go well: for now the registry cannot be had, or there is no room
    /// for what is missing.
    pub(super) fn keep_after(mut self, error: &PackageError) {
        self.is_kept = match error {
            PackageError::TooLarge { of, .. } => *of == OF_ROOM && !self.done.is_empty(),
            error => error.is_passing(),
        };
    }

    /// Makes a draft of it, called `name`.
    pub(super) fn into_draft(mut self, store: &Store, name: &str) -> Result<Draft, PackageError> {
        let path = self.dir.join(DONE);
        fs::remove_file(&path).during("remove", &path)?;
        let lock = self.lock.take().expect("it is taken here alone");
        let draft = store.draft_of(name, &self.dir, lock)?;
        self.is_kept = true;
        self.remove_place();
        Ok(draft)
    }

    /// The directory of all, when this was the last one.
    fn remove_place(&self) {
        if let Some(pulls) = self.dir.parent() {
            drop(fs::remove_dir(pulls));
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.is_kept {
            // What cannot be removed now goes in a day.
            drop(fs::remove_dir_all(&self.dir));
            self.remove_place();
        }
    }
}

/// Removes what nobody has gone on with for a day.
///
/// # Errors
/// The directory cannot be listed.
pub fn remove_abandoned(store: &Store) -> Result<(), PackageError> {
    let pulls = store.root().join(PULLS);
    let entries = match fs::read_dir(&pulls) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.during("list", &pulls)?,
    };
    for entry in entries {
        let dir = entry.during("list", &pulls)?.path();
        let touched = [dir.join(DONE), dir.clone()]
            .into_iter()
            .find_map(|path| fs::metadata(path).ok()?.modified().ok());
        let age = touched.and_then(|it| SystemTime::now().duration_since(it).ok());
        if age.is_none_or(|age| age < KEPT) {
            continue;
        }
        // Another process may be faster, or goes on with it.
        if let Ok(Some(_lock)) = lock(&dir) {
            drop(fs::remove_dir_all(&dir));
        }
    }
    drop(fs::remove_dir(&pulls));
    Ok(())
}

/// None: the directory was removed meanwhile.
fn lock(dir: &Path) -> Result<Option<Flock<File>>, PackageError> {
    let file = match File::open(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file.during("open", dir)?,
    };
    let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Err((_, Errno::EWOULDBLOCK)) => return Err(PackageError::InTransfer),
        lock => lock.map_err(|(_, errno)| errno).during("lock", dir)?,
    };
    let ours = lock.metadata().during("look at", dir)?;
    let there = fs::symlink_metadata(dir).ok();
    let is_there = there.is_some_and(|it| (it.dev(), it.ino()) == (ours.dev(), ours.ino()));
    Ok(is_there.then_some(lock))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::OF_MAX_SIZE;

    #[test]
    fn a_full_disk_takes_nothing_that_has_come() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::at(root.path());
        let digest = format!("sha256:{}", "0".repeat(64));
        let open = || Partial::open(&store, &digest).unwrap();
        let too_large = |of| PackageError::TooLarge {
            bytes: 2,
            limit: 1,
            of,
        };
        let pulls = root.path().join(PULLS);
        // Nothing has come.
        open().keep_after(&too_large(OF_ROOM));
        assert!(!pulls.try_exists().unwrap());
        fs::create_dir_all(pulls.join("0".repeat(64))).unwrap();
        fs::write(pulls.join("0".repeat(64)).join(DONE), "3\n").unwrap();
        open().keep_after(&too_large(OF_ROOM));
        let partial = open();
        assert!(partial.is_done(3));
        partial.keep_after(&too_large(OF_MAX_SIZE));
        assert!(!pulls.try_exists().unwrap());
    }
}
