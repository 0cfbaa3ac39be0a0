//! Locks of names, which end with the process that has them.
//!
//! ```text
//! <directory>/<name>                            locked (flock): somebody has it. Who is done removes the file
//! /run/transship/dumps/<namespace>:<container>  who takes a checkpoint of the container, or moves it; the guard of
//!                                               a freeze whose command was killed, while it looks a last time
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::time::{Instant, sleep};

use crate::error::{Context as _, Error, Result};

const DUMPS: &str = "/run/transship/dumps";
/// How long a command waits for the lock: the guard of a killed command has it only while it looks whether the
/// container runs, some seconds after that command's death.
const TURN: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(50);

/// A name that nobody else has as long as this is there.
#[derive(Debug)]
pub(crate) struct Lock {
    path: PathBuf,
    _file: Flock<File>,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is locked: who has opened it meanwhile sees that it has no name any more. What stays is no harm.
        drop(fs::remove_file(&self.path));
    }
}

/// Locks the name in the directory, which is made first. None when somebody has it.
///
/// # Errors
/// A system call failed.
pub(crate) fn lock(dir: &Path, name: &str) -> Result<Option<Lock>> {
    make_private(dir)?;
    let path = dir.join(name);
    let failed = || format!("cannot lock {}", path.display());
    loop {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(&path)
            .with_context(failed)?;
        let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(errno).with_context(failed),
        };
        // The one before has removed it in between: the name is another file's now, or nobody's.
        if file.metadata().with_context(failed)?.nlink() > 0 {
            return Ok(Some(Lock { path, _file: file }));
        }
    }
}

/// Makes a directory that is root's alone.
pub(crate) fn make_private(dir: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot make {}", dir.display()))
}

/// Locks the container for a dump; who has it for a moment is waited for.
///
/// # Errors
/// [`crate::Kind::Refused`]: somebody takes a checkpoint of it, or moves it.
pub(crate) async fn lock_for_dump(namespace: &str, id: &str) -> Result<Lock> {
    lock_within(Path::new(DUMPS), &dump_of(namespace, id), TURN)
        .await?
        .ok_or_else(|| {
            Error::refused(format!(
                "another checkpoint or migration of {id:?} is under way"
            ))
        })
}

/// Locks the container for a dump, if nobody has it now.
///
/// # Errors
/// A system call failed.
pub(crate) fn lock_if_free_for_dump(namespace: &str, id: &str) -> Result<Option<Lock>> {
    lock(Path::new(DUMPS), &dump_of(namespace, id))
}

fn dump_of(namespace: &str, id: &str) -> String {
    format!("{namespace}:{id}")
}

async fn lock_within(dir: &Path, name: &str, patience: Duration) -> Result<Option<Lock>> {
    let deadline = Instant::now() + patience;
    loop {
        let locked = lock(dir, name)?;
        if locked.is_some() || Instant::now() > deadline {
            return Ok(locked);
        }
        sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_a_name_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let locks = dir.path().join("locks");
        let first = lock(&locks, "a").unwrap().unwrap();
        assert!(lock(&locks, "a").unwrap().is_none());
        let other = lock(&locks, "b").unwrap().unwrap();
        drop(first);
        drop(lock(&locks, "a").unwrap().unwrap());
        drop(other);
        assert_eq!(fs::read_dir(&locks).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn who_has_it_for_a_moment_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path(), "a").unwrap().unwrap();
        let second = lock_within(dir.path(), "a", Duration::ZERO).await.unwrap();
        assert!(second.is_none());
        let waits = lock_within(dir.path(), "a", Duration::from_secs(60));
        let ends = async {
            sleep(PAUSE * 4).await;
            drop(first);
        };
        let (second, ()) = tokio::join!(waits, ends);
        assert!(second.unwrap().is_some());
    }

    #[test]
    fn never_two_at_once() {
        use std::sync::atomic::{AtomicU32, Ordering};
        let dir = tempfile::tempdir().unwrap();
        let (has, had) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        if let Some(lock) = lock(dir.path(), "a").unwrap() {
                            assert_eq!(has.fetch_add(1, Ordering::SeqCst), 0);
                            std::thread::yield_now();
                            had.fetch_add(1, Ordering::SeqCst);
                            has.fetch_sub(1, Ordering::SeqCst);
                            drop(lock);
                        }
                    }
                });
            }
        });
        assert!(had.load(Ordering::SeqCst) > 0);
    }
}
