//! Memory that has the files of a checkpoint: of one that must not come onto a disk in clear, and of a migration, whose
//! files nobody needs when it is done.
//!
//! ```text
//!  sealed               a tmpfs that is never swapped out, or it is refused
//!  migrate, receive     a tmpfs where half of the memory that is available is enough, else the store
//! ```
//!
//! Where they are is drawn in `sandbox/src/opened.rs`. What a process that is killed leaves there is removed by its guard
//! and by the next one ([`remove_unused`]).

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use transship_checkpoint::store::{DEFAULT_OPENED, Store};
use transship_sandbox::opened::{Holds, InMemory, left_to_runtimes, remove_all_unused};
use transship_sandbox::{DEFAULT_RUN_DIR, SandboxError};

use crate::error::{Error, Result, one_line};
use crate::machine::free_memory;
use crate::timeline::human_bytes;

/// How long memory may be in use after the process whose it was has gone.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a runtime is waited for whose caller was killed.
const RUNTIME_PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(100);
/// How much room is made before it is needed, at most, in bytes: what takes longer would not be there any more.
const MOST_ROOM: u64 = 1 << 30;
const PIECE: usize = 1 << 20;

/// Memory that is left when this is dropped.
#[derive(Debug)]
pub(crate) struct Memory(Option<InMemory>);

impl Memory {
    /// Memory where this store opens its checkpoints; what nobody uses there goes before.
    ///
    /// # Errors
    /// The store has no such place, or `make` fails.
    pub(crate) fn of_store(
        store: &Store,
        make: impl FnOnce(&Path) -> Result<InMemory, SandboxError>,
    ) -> Result<Self> {
        let opened = store.opened().ok_or_else(|| {
            Error::refused("this store has no place where a checkpoint can be opened")
        })?;
        remove_unused();
        Ok(Self(Some(make(opened)?)))
    }

    /// The directory.
    pub(crate) fn dir(&self) -> &InMemory {
        self.0.as_ref().expect("it is let go with this")
    }

    /// Lets it go, and what is in it stay: somebody else keeps it.
    pub(crate) fn stay(mut self) {
        self.0 = None;
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(memory) = self.0.take()
            && let Err(error) = memory.leave(Path::new(DEFAULT_RUN_DIR))
        {
            tracing::warn!("memory of a checkpoint is left: {error}");
        }
    }
}

/// Half of the memory that is available, when `bytes` fit in it.
///
/// # Errors
/// [`crate::Kind::Refused`]: they do not.
pub(crate) fn room(bytes: u64, what: &str) -> Result<u64> {
    let most = free_memory() / 2;
    if bytes > most {
        let message = format!(
            "{what}, the checkpoint would take about {} of memory, and {} may be used, half of what is available",
            human_bytes(bytes),
            human_bytes(most)
        );
        return Err(Error::refused(message).hint("free memory on this node"));
    }
    Ok(most)
}

/// Has so many bytes of memory found for a store that is in memory, at most [`MOST_ROOM`], before they are needed: the
/// kernel drops files from its cache for them now, and in a virtual machine the hypervisor, which may have lent to others
/// what had been free for two seconds, provides it (seen: 2 ms for each megabyte, beside 0.05).
pub(crate) fn make_room_in_memory(store: &Path, bytes: u64) -> io::Result<()> {
    if !store.starts_with(DEFAULT_OPENED) {
        return Ok(());
    }
    // Without a name, so it goes with this process.
    let mut room = OpenOptions::new()
        .write(true)
        .custom_flags(nix::libc::O_TMPFILE)
        .open(store)?;
    let zeros = vec![0; PIECE];
    for _ in 0..bytes.min(MOST_ROOM).div_ceil(PIECE as u64) {
        room.write_all(&zeros)?;
    }
    Ok(())
}

/// Where the files of a migration are as long as it lasts.
#[derive(Debug)]
pub(crate) struct MigrationFiles {
    /// What they are a checkpoint of.
    pub(crate) store: Store,
    _memory: Option<Memory>,
}

impl MigrationFiles {
    /// Memory for `bytes` where there is enough, else `store`; gives also why it is not memory.
    pub(crate) fn choose(
        store: &Store,
        (bytes, holds): (u64, Holds),
        make: impl FnOnce(&Path) -> Result<InMemory, SandboxError>,
    ) -> (Self, Option<Error>) {
        let memory = || -> Result<Memory> {
            let most = room(bytes, "with the migration's files in memory")?;
            let memory = Memory::of_store(store, make)?;
            memory.dir().mount(most, holds)?;
            Ok(memory)
        };
        match memory() {
            Ok(memory) => {
                let store = memory.dir().store();
                let _memory = Some(memory);
                (Self { store, _memory }, None)
            }
            Err(error) => {
                let store = store.clone();
                let _memory = None;
                (Self { store, _memory }, Some(error))
            }
        }
    }
}

/// Removes the memory that `inside` is in, when whoever still reads it has ended: it belonged to a process that was killed.
/// What is in use for too long is left for the next one.
pub(crate) async fn remove_when_unused(inside: &Path) {
    let opened = Path::new(DEFAULT_OPENED);
    let key = { inside.strip_prefix(opened) }
        .ok()
        .and_then(|inside| inside.components().next());
    let Some(key) = key else { return };
    let dir = opened.join(key);
    let deadline = Instant::now() + PATIENCE;
    loop {
        remove_unused();
        if !dir.try_exists().unwrap_or(true) || Instant::now() > deadline {
            return;
        }
        sleep(PAUSE).await;
    }
}

/// Removes what processes that were killed have left in memory. What cannot be removed keeps nobody from what he does.
pub fn remove_unused() {
    let (run_dir, opened) = (Path::new(DEFAULT_RUN_DIR), Path::new(DEFAULT_OPENED));
    if let Err(error) = remove_all_unused(run_dir, opened) {
        let error = one_line(&error);
        tracing::warn!("memory that nobody uses is left in {DEFAULT_OPENED}: {error}");
    }
}

/// The same, and what a runtime still works in whose caller was killed, as soon as that one has ended: it sees that nobody
/// lets it go on. It is waited for a moment, and told of then.
pub async fn remove_unused_at_last() {
    let deadline = Instant::now() + RUNTIME_PATIENCE;
    let mut left = left_to_runtimes(Path::new(DEFAULT_OPENED));
    while !left.is_empty() && Instant::now() < deadline {
        sleep(PAUSE).await;
        left = left_to_runtimes(Path::new(DEFAULT_OPENED));
    }
    for dir in left {
        tracing::warn!(
            "an OCI runtime whose caller was killed still works in {}, which is removed when it has ended",
            dir.display()
        );
    }
    remove_unused();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn what_does_not_fit_into_memory_is_refused() {
        let refused = room(u64::MAX, "dumped").unwrap_err();
        assert_eq!(refused.kind(), Kind::Refused);
        let line = refused.one_line();
        assert!(line.contains("half of what is available"), "{line}");
        assert!(room(0, "dumped").is_ok());
    }

    #[test]
    fn a_migration_that_does_not_fit_is_on_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path()).opened_at(dir.path().join("opened"));
        let (files, why) =
            MigrationFiles::choose(&store, (u64::MAX, Holds::Dump), InMemory::for_dump);
        assert_eq!(files.store.root(), dir.path());
        assert!(
            why.unwrap()
                .one_line()
                .contains("half of what is available")
        );
    }
}
