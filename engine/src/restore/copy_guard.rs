//! The process that removes a copy whose command was killed (SIGKILL) while it made it, held it or let it go.
//!
//! ```text
//!  restore, checkpoint --verify-restore ──── pipe ────> PROGRAM copy-guard        (see guard_process)
//!     └ end of file             has not run  -> its task, record and snapshot are removed, and its lease ended
//!                               has run      -> a container like any other
//! ```
//!
//! What containerd was asked for goes on without the one who has asked, so it looks more than once.

use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::types::v1::Status;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use transship_checkpoint::manifest::IMAGES_DIR;
use transship_checkpoint::store::Checkpoint;
use transship_containerd::Containerd;
use transship_sandbox::consumed::{Consumed, DEFAULT_CONSUMED_DIR, Owner};
use transship_sandbox::linked_images::remove_orphans;
use transship_sandbox::{DEFAULT_RUN_DIR, PodDir};

use super::{Copy, Plan, settle};
use crate::error::{Context, Result};
use crate::guard_process::{self, GuardProcess};
use crate::overlay_mounts::overlay_stack;

/// The first argument of the guard's process.
const ARGUMENT: &str = "copy-guard";
/// How long it goes on when containerd does not answer.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long a call of containerd that nobody waits for any more may go on.
const LATE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(200);

/// What the guard is told.
#[derive(Debug, Serialize, Deserialize)]
struct Orders {
    /// containerd's socket.
    address: PathBuf,
    /// containerd's namespace.
    namespace: String,
    /// The copy; see [`Copy`].
    id: String,
    snapshotter: String,
    made_by: String,
    /// The checkpoint, and the name of the container in it.
    checkpoint: String,
    container: String,
    /// Its images, beside which the runtime front makes links to them.
    images: PathBuf,
    /// The lease that it is made under.
    lease: Option<String>,
}

/// Removes the copy should this process vanish, or drop it without a word.
#[derive(Debug)]
pub(super) struct CopyGuard {
    process: GuardProcess,
    node: Containerd,
    orders: Orders,
}

impl CopyGuard {
    /// Starts the guard of what the restore of this plan makes. `node` has a lease.
    ///
    /// # Errors
    /// The process cannot be started.
    pub(super) fn start(node: &Containerd, plan: &Plan, checkpoint: &Checkpoint) -> Result<Self> {
        let orders = Orders {
            address: node.address().to_path_buf(),
            namespace: node.namespace().to_owned(),
            id: plan.id.clone(),
            snapshotter: plan.snapshotter.clone(),
            made_by: plan.made_by.clone(),
            checkpoint: checkpoint.manifest.name.clone(),
            container: plan.container.name.clone(),
            images: checkpoint.dir.join(&plan.container.name).join(IMAGES_DIR),
            lease: node.lease_id().map(str::to_owned),
        };
        Ok(Self {
            process: GuardProcess::start(ARGUMENT, &orders)?,
            node: node.clone(),
            orders,
        })
    }

    /// The copy runs and is like any other; or, after an error, nothing may be left of it, and what is left is the guard's.
    pub(super) async fn stand_down<T>(self, done: &Result<T>) {
        let is_left = match done {
            Ok(_) => Ok(false),
            Err(_) => self.orders.copy().is_to_be_removed(&self.node).await,
        };
        if let Ok(false) = is_left {
            self.process.stand_down();
        }
    }
}

impl Orders {
    fn copy(&self) -> Copy<'_> {
        Copy {
            id: &self.id,
            snapshotter: &self.snapshotter,
            made_by: &self.made_by,
        }
    }

    /// Whether the runtime front has let it go: it writes that down before the first instruction.
    async fn has_run(&self, node: &Containerd) -> Result<bool> {
        let mounts = match { node.snapshotter(&self.snapshotter) }
            .mounts(&self.id)
            .await
        {
            Err(error) if error.is_not_found() => return Ok(false),
            mounts => mounts?,
        };
        let upperdir = overlay_stack(&mounts)
            .context("its upperdir is not known")?
            .top;
        let consumed = Consumed::by(Path::new(DEFAULT_CONSUMED_DIR), &Owner::Layer(upperdir))?;
        Ok({ consumed.container(&self.checkpoint, &self.container) }.is_some())
    }
}

/// The guard's own life, with its orders on stdin; one that is not `alone` yet starts the one that is.
///
/// # Errors
/// What is left of the copy could not be removed in time.
pub async fn run(alone: bool) -> Result<()> {
    let Some(orders) = guard_process::orders::<Orders>(ARGUMENT, alone).await? else {
        return Ok(());
    };
    let began = Instant::now();
    let mut gone_since = began;
    loop {
        let end = async {
            let node = Containerd::connect(&orders.address, &orders.namespace).await?;
            end_once(&node, &orders, began.elapsed() > LATE).await
        };
        match end.await {
            Ok(End::Nothing) if gone_since.elapsed() > LATE => return Ok(()),
            Ok(End::Nothing) => {}
            Ok(End::Runs) => return Ok(()),
            Err(error) if began.elapsed() > PATIENCE => return Err(error),
            Ok(End::Something) | Err(_) => gone_since = Instant::now(),
        }
        sleep(PAUSE).await;
    }
}

/// What was found of the copy.
enum End {
    /// There is nothing of it.
    Nothing,
    /// There was something, or is: to be looked at again.
    Something,
    /// It has run, and is a container like any other.
    Runs,
}

/// Brings it one step nearer to its end. `late`: no call of the command goes on any more.
async fn end_once(node: &Containerd, orders: &Orders, late: bool) -> Result<End> {
    let copy = orders.copy();
    if !copy.is_to_be_removed(node).await? {
        if let Err(error) = node.container(copy.id).await {
            if !error.is_not_found() {
                return Err(error.into());
            }
            // What the runtime front had of it, if it was killed, too.
            if !PodDir::at(Path::new(DEFAULT_RUN_DIR), copy.id)?.remove_unless_restored()? {
                return Ok(End::Something);
            }
            // The checkpoint may have been removed.
            drop(remove_orphans(&orders.images));
        }
        if let Some(lease) = &orders.lease {
            node.end_lease_called(lease).await?;
        }
        return Ok(End::Nothing);
    }
    if copy.has_record(node).await? {
        // Its command may have asked for its start, which is then on its way.
        if !late && copy.status(node).await? == Status::Created {
            return Ok(End::Something);
        }
        if !orders.has_run(node).await? {
            // The end of it first, and then the last look.
            node.kill_task(copy.id).await?;
        }
        if orders.has_run(node).await? {
            if copy.status(node).await? == Status::Created {
                // The front that was letting it go is gone, too, and goes on when it is asked again.
                node.start_task(copy.id).await?;
            }
            settle(node, copy.id).await?;
            if let Some(lease) = &orders.lease {
                node.end_lease_called(lease).await?;
            }
            return Ok(End::Runs);
        }
    }
    copy.remove(node).await?;
    Ok(End::Something)
}
