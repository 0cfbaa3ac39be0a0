//! The process that finds out which copy runs when the command that was about to send `Commit`, or has sent it, cannot:
//! killed with SIGKILL, it must not leave a source standing still that nobody asks about.
//!
//! ```text
//!  migrate ──── pipe ────> PROGRAM commit-guard         (see guard_process)
//!     └ end of file             a record is there: asks the target until it answers, and does what it says
//! ```
//!
//! Until then the guard of the freeze lets the source run. A command that ends by itself leaves an open record to
//! `transship recover`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use transship_checkpoint::store::Store;
use transship_containerd::Containerd;

use super::record::{self, Pending};
use super::recover::{Decision, recover};
use super::{LOCKS, RECORDS};
use crate::durable_record;
use crate::error::{Kind, Result};
use crate::guard_process::{self, GuardProcess};
use crate::interrupt::Interrupt;
use crate::memory_dir::remove_unused;

/// The first argument of the guard's process.
const ARGUMENT: &str = "commit-guard";
/// How long it goes on when containerd does not answer; `transship recover` does it later.
const PATIENCE: Duration = Duration::from_secs(600);
const PAUSE: Duration = Duration::from_secs(2);

/// What the guard is told.
#[derive(Debug, Serialize, Deserialize)]
struct Orders {
    /// containerd's socket.
    address: PathBuf,
    /// The store's directory.
    store: PathBuf,
    /// What moves; its record says the rest.
    pending: Pending,
}

/// Asks should this process vanish, or drop it without [`Self::stand_down`].
#[derive(Debug)]
pub(super) struct CommitGuard(GuardProcess);

impl CommitGuard {
    /// # Errors
    /// The process cannot be started.
    pub(super) fn start(node: &Containerd, store: &Store, pending: &Pending) -> Result<Self> {
        let orders = Orders {
            address: node.address().to_path_buf(),
            store: store.root().to_path_buf(),
            pending: pending.clone(),
        };
        GuardProcess::start(ARGUMENT, &orders).map(Self)
    }

    /// What is open has been told.
    pub(super) fn stand_down(self) {
        self.0.stand_down();
    }
}

/// The guard's own life, with its orders on stdin; one that is not `alone` yet starts the one that is.
///
/// # Errors
/// Which copy runs is for a person to decide, or containerd does not answer.
pub async fn run(alone: bool) -> Result<()> {
    let Some(Orders {
        address,
        store,
        pending,
    }) = guard_process::orders(ARGUMENT, alone).await?
    else {
        return Ok(());
    };
    let records = Path::new(RECORDS);
    // One that was being written is nobody's any more.
    drop(durable_record::remove_unfinished(records, Path::new(LOCKS)));
    if !record::is_open(records, &pending) {
        // The guard of the freeze, where there is one, waits for the dump.
        return Ok(());
    }
    let decided = decide(&address, &pending).await;
    // The files of the dump, which its command has left.
    remove_unused();
    Store::at(&store).remove_orphans()?;
    decided
}

async fn decide(address: &Path, pending: &Pending) -> Result<()> {
    let mut failing = None;
    while record::is_open(Path::new(RECORDS), pending) {
        let began = Instant::now();
        let decide = async {
            let node = Containerd::connect(address, &pending.namespace).await?;
            let asks = Decision::Ask(None);
            recover(&node, pending, asks, &Interrupt::never()).await
        };
        let Err(error) = decide.await else {
            return Ok(());
        };
        if began.elapsed() > PATIENCE {
            // It has been asking until now.
            failing = None;
        }
        let since: Instant = *failing.get_or_insert_with(Instant::now);
        if error.kind() == Kind::Uncertain || since.elapsed() > PATIENCE {
            return Err(error);
        }
        sleep(PAUSE).await;
    }
    Ok(())
}
