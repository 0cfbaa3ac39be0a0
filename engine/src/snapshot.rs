//! The files that a snapshot changes, as a layer, out and in.
//!
//! ```text
//!  KEY or CONTAINER --find--> Snapshot --open--> Opened { dir, lowerdirs } --> export, diff --> Sink
//!                                                                          <-- import <-- Source
//! ```
//!
//! Any snapshotter whose mounts name its directories will do: ours, containerd's overlayfs, others
//! that mount overlays.

use std::time::Duration;

use containerd_client::services::v1::snapshots::{Info, Kind as SnapshotKind};
use containerd_client::types::Mount;
use containerd_client::types::v1::Status;
use transship_containerd::Containerd;
use transship_layer::OverlayStack;

use crate::error::{Error, Result};
use crate::frozen::{Frozen, TaskToFreeze};
use crate::overlay_mounts::overlay_stack;

mod diff;
mod export;
mod import;
mod raw;
mod sink;

pub use diff::diff;
pub use export::{export, export_raw};
pub use import::{Source, Target, import};
pub use sink::Sink;

/// How long a view of a committed snapshot is kept should nobody come to remove it.
const VIEW_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Whether a container that runs on the snapshot is frozen while its files are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhileRead {
    /// It stands still.
    Frozen,
    /// It runs; if it changes what is being read, the export fails.
    Running,
}

/// A snapshot that exists.
#[derive(Debug)]
pub struct Snapshot {
    /// Name of its snapshotter.
    pub snapshotter: String,
    /// Its key there.
    pub key: String,
    info: Info,
    /// The container of which it is the writable layer.
    container: Option<String>,
}

/// The snapshotter that is meant when none is named: ours where the node has it.
async fn default_snapshotter(node: &Containerd) -> Result<String> {
    let names = node.snapshotters().await?;
    let ours = names.into_iter().find(|name| name == "transship");
    Ok(ours.unwrap_or_else(|| "overlayfs".to_owned()))
}

/// Finds a container's snapshot, or a snapshot by its key.
///
/// # Errors
/// [`crate::Kind::NotFound`], or what containerd answers.
pub async fn find(node: &Containerd, name: &str, snapshotter: Option<&str>) -> Result<Snapshot> {
    let container = match node.container(name).await {
        Err(error) if error.is_not_found() => None,
        container => Some(container?),
    };
    let container = container.filter(|container| {
        snapshotter.is_none_or(|snapshotter| container.snapshotter == snapshotter)
    });
    let (snapshotter, key) = match (&container, snapshotter) {
        (Some(container), _) => (
            container.snapshotter.clone(),
            container.snapshot_key.clone(),
        ),
        (None, Some(snapshotter)) => (snapshotter.to_owned(), name.to_owned()),
        (None, None) => (default_snapshotter(node).await?, name.to_owned()),
    };
    let info = match node.snapshotter(&snapshotter).stat(&key).await {
        Err(error) if error.is_not_found() => {
            let namespace = node.namespace();
            return Err(Error::not_found(format!(
                "there is no container and no snapshot {name:?} of {snapshotter} in the namespace \
                 {namespace:?}"
            ))
            .hint(format!(
                "ctr -n {namespace} snapshots --snapshotter {snapshotter} ls"
            )));
        }
        info => info?,
    };
    let container = match container {
        Some(container) => Some(container.id),
        // A key that is no container's id may still be a container's key.
        None => node
            .all_containers()
            .await?
            .into_iter()
            .find(|container| container.snapshotter == snapshotter && container.snapshot_key == key)
            .map(|container| container.id),
    };
    Ok(Snapshot {
        snapshotter,
        key,
        info,
        container,
    })
}

/// A snapshot's mounts; those of a committed one are a view's, which is to be closed.
struct Opened {
    mounts: Vec<Mount>,
    view: Option<(Containerd, String, String)>,
}

impl Opened {
    async fn open(node: &Containerd, snapshot: &Snapshot) -> Result<Self> {
        let Snapshot {
            snapshotter, key, ..
        } = snapshot;
        if snapshot.info.kind() != SnapshotKind::Committed {
            let mounts = node.snapshotter(snapshotter).mounts(key).await?;
            return Ok(Self { mounts, view: None });
        }
        let leased = node.with_lease(VIEW_LIFETIME).await?;
        let view = format!("transship-view-{}", transship_containerd::unique());
        match leased.snapshotter(snapshotter).view(&view, key, &[]).await {
            Ok(mounts) => Ok(Self {
                mounts,
                view: Some((leased, snapshotter.clone(), view)),
            }),
            Err(error) => {
                drop(leased.end_lease().await);
                Err(error.into())
            }
        }
    }

    async fn close(self) -> Result<()> {
        if let Some((leased, snapshotter, view)) = self.view {
            leased
                .snapshotter(&snapshotter)
                .remove_if_exists(&view)
                .await?;
            leased.end_lease().await?;
        }
        Ok(())
    }

    /// The snapshot's own directory, and those below it.
    fn layer(&self, snapshot: &Snapshot) -> Result<OverlayStack> {
        overlay_stack(&self.mounts).map_err(|error| {
            let message = format!(
                "the directory with the changes of {:?} is not known from the mounts of the \
                 snapshotter {:?}",
                snapshot.key, snapshot.snapshotter
            );
            Error::refused(message)
                .because(error)
                .hint("ctr snapshots diff compares the files of any two snapshots")
        })
    }
}

/// Freezes the container of the snapshot. None: nothing runs on it.
async fn freeze(node: &Containerd, snapshot: &Snapshot) -> Result<Option<Frozen>> {
    let Some(id) = &snapshot.container else {
        return Ok(None);
    };
    let task = match node.task(id).await {
        Err(error) if error.is_not_found() => return Ok(None),
        task => task?,
    };
    if task.status() != Status::Running {
        return Ok(None);
    }
    let record = node.container(id).await?;
    let task = TaskToFreeze {
        // As of a checkpoint.
        hides_policy: true,
        ..TaskToFreeze::of(node, &record, &task)
    };
    let tasks = vec![task];
    Frozen::freeze(node, tasks, None).await.map(Some)
}

/// Does `read` while the container of the snapshot stands still, if that is wanted, and lets it run
/// again whatever came of it.
async fn while_frozen<T>(
    node: &Containerd,
    snapshot: &Snapshot,
    while_read: WhileRead,
    read: impl Future<Output = Result<T>>,
) -> Result<T> {
    let frozen = match while_read {
        WhileRead::Frozen => freeze(node, snapshot).await?,
        WhileRead::Running => None,
    };
    let done = read.await;
    match (frozen, done) {
        (None, done) => done,
        (Some(frozen), Ok(done)) => frozen.thaw().await.map(|()| done),
        (Some(frozen), Err(error)) => Err(frozen.thaw_after(error).await),
    }
}

/// Value of the label that keeps a snapshot without a container: since when.
fn kept() -> String {
    transship_containerd::rfc3339(std::time::SystemTime::now())
}
