//! `transship snapshot`: the files that a snapshot changes, as a layer, out and in.
//!
//! ```text
//!  KEY or CONTAINER --find--> Snapshot --open--> Opened { dir, lowerdirs } --> export, diff
//!                                                                          <-- import
//! ```
//!
//! Any snapshotter whose mounts name its directories will do: ours, containerd's overlayfs, others
//! that mount overlays.

use std::collections::HashMap;
use std::fs::File;
use std::io::PipeWriter;
use std::time::Duration;

use anyhow::{Context, Result};
use containerd_client::services::v1::snapshots::{Info, Kind as SnapshotKind};
use containerd_client::types::Mount;
use containerd_client::types::v1::Status;
use transship_layer::{ExportStats, ImportStats, OverlayStack};

use self::sink::Sink;
use crate::args::{Global, SnapshotCommand};
use transship_containerd::Containerd;
use transship_engine::freeze_guard::FreezeGuard;
use transship_engine::interrupt::Interrupt;
use transship_engine::overlay_mounts::overlay_stack;
use transship_engine::problem::{Kind, Problem};

mod diff;
mod export;
mod import;
mod raw;
mod sink;

/// How long a view of a committed snapshot is kept should nobody come to remove it.
const VIEW_LIFETIME: Duration = Duration::from_secs(24 * 3600);

pub(crate) async fn run(global: &Global, command: SnapshotCommand) -> Result<()> {
    match command {
        SnapshotCommand::Export(args) => export::run(global, args).await,
        SnapshotCommand::Import(args) => import::run(global, args).await,
        SnapshotCommand::Diff(args) => diff::run(global, args).await,
    }
}

/// Writes what a snapshot changes into a pipe; its container, if one runs, stands still meanwhile.
pub(crate) async fn export_into_pipe(
    node: &Containerd,
    snapshot: &Snapshot,
    pipe: PipeWriter,
    interrupt: &Interrupt,
) -> Result<ExportStats> {
    export::export(node, snapshot, Sink::pipe(pipe), false, interrupt).await
}

/// Fills a snapshot from a file; with a parent it is made, and gone if that fails.
pub(crate) async fn import_from_file(
    node: &Containerd,
    key: &str,
    parent: Option<&str>,
    snapshotter: Option<&str>,
    file: File,
    interrupt: &Interrupt,
) -> Result<ImportStats> {
    let target = import::Target {
        key,
        parent,
        snapshotter,
    };
    let source = import::Source::Layer(file);
    let imported = import::make_and_fill(node, &target, source, interrupt).await?;
    Ok(imported.1.unwrap_or_default())
}

/// A snapshot that exists.
#[derive(Debug)]
pub(crate) struct Snapshot {
    snapshotter: String,
    key: String,
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
pub(crate) async fn find(
    node: &Containerd,
    name: &str,
    snapshotter: Option<&str>,
) -> Result<Snapshot> {
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
    let info = match node.snapshot(&snapshotter, &key).await {
        Err(error) if error.is_not_found() => {
            return Err(Problem::new(
                Kind::NotFound,
                format!(
                    "there is no container and no snapshot {name:?} of {snapshotter} in the \
                     namespace {:?}",
                    node.namespace()
                ),
            )
            .hint(format!(
                "ctr -n {} snapshots --snapshotter {snapshotter} ls",
                node.namespace()
            ))
            .into());
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
            let mounts = node.mounts(snapshotter, key).await?;
            return Ok(Self { mounts, view: None });
        }
        let leased = node.with_lease(VIEW_LIFETIME).await?;
        let view = format!("transship-view-{}", transship_containerd::unique());
        match leased.view(snapshotter, &view, key).await {
            Ok(mounts) => Ok(Self {
                mounts,
                view: Some((leased, snapshotter.clone(), view)),
            }),
            Err(error) => {
                drop(leased.drop_lease().await);
                Err(error.into())
            }
        }
    }

    async fn close(self) -> Result<()> {
        if let Some((leased, snapshotter, view)) = self.view {
            leased.remove_snapshot(&snapshotter, &view).await?;
            leased.drop_lease().await?;
        }
        Ok(())
    }

    /// The snapshot's own directory, and those below it.
    fn layer(&self, snapshot: &Snapshot) -> Result<OverlayStack> {
        overlay_stack(&self.mounts).map_err(|error| {
            let message = format!(
                "the directory with the changes of {:?} is not known from the mounts of the \
                 snapshotter {:?}: {error}",
                snapshot.key, snapshot.snapshotter
            );
            Problem::new(Kind::Refused, message)
                .hint("ctr snapshots diff compares the files of any two snapshots")
                .into()
        })
    }
}

/// A container that stands still, until it is let go; a container that does not run stands still.
struct Paused<'n>(Option<(&'n Containerd, String, FreezeGuard)>);

impl<'n> Paused<'n> {
    async fn pause(node: &'n Containerd, container: Option<&str>) -> Result<Self> {
        let Some(id) = container else {
            return Ok(Self(None));
        };
        match node.task(id).await {
            Err(error) if error.is_not_found() => Ok(Self(None)),
            task if task
                .as_ref()
                .is_ok_and(|task| task.status() != Status::Running) =>
            {
                Ok(Self(None))
            }
            task => {
                task?;
                let guard = FreezeGuard::start(node, &[id], None)?;
                node.pause(id).await?;
                Ok(Self(Some((node, id.to_owned(), guard))))
            }
        }
    }

    async fn resume(self) -> Result<()> {
        let Some((node, id, guard)) = self.0 else {
            return Ok(());
        };
        let resumed = node.resume(&id).await;
        guard.stand_down();
        resumed
            .with_context(|| format!("{id:?} is still paused; ctr tasks resume {id:?} lets it run"))
    }
}

/// Labels of a snapshot that is to stay without a container.
fn kept() -> HashMap<String, String> {
    let now = transship_containerd::rfc3339(std::time::SystemTime::now());
    [("containerd.io/gc.root".to_owned(), now)].into()
}
