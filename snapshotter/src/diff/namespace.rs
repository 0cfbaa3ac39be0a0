//! In which of containerd's namespaces a call is meant.
//!
//! Calls from within containerd (the CRI's) carry the namespace, and from 2.0 on those that containerd
//! hands on for its clients do. containerd 1.7 hands on no headers (containerd pull request 6130,
//! issue 12328): there the namespace is the one that has the blob to be applied, or the snapshot whose
//! mounts are to be compared. The directories of a snapshot belong to one namespace alone.

use std::time::Duration;

use containerd_client::tonic::Code;
use containerd_client::types::Mount;
use tokio::time::timeout;
use transship_containerd::{Containerd, ContainerdError};

use super::error::DiffError;
use super::plan::NotOurs;
use super::store::Connection;

/// How long one snapshotter may take to tell what it has mounted.
const SNAPSHOTTER_PATIENCE: Duration = Duration::from_secs(20);

/// A namespace that has the blob; the content of a blob is the same in all of them.
pub(super) async fn with_blob(connection: &Connection, digest: &str) -> Result<String, DiffError> {
    for namespace in connection.namespaces().await? {
        let containerd = connection.in_namespace(&namespace).await?;
        if containerd.blob(digest).await?.is_some() {
            return Ok(namespace);
        }
    }
    Err(NotOurs::because(format!("no namespace has the blob {digest}")).into())
}

/// The namespace of the snapshot that is mounted like this.
pub(super) async fn with_mounts(
    connection: &Connection,
    mounts: &[Mount],
) -> Result<String, DiffError> {
    let mut failed = None;
    for namespace in connection.namespaces().await? {
        let containerd = connection.in_namespace(&namespace).await?;
        for snapshotter in containerd.snapshotters().await? {
            let found = has_mounts(&containerd, &snapshotter, mounts);
            // Another one that is down, or hangs, has not made these mounts.
            match timeout(SNAPSHOTTER_PATIENCE, found).await {
                Ok(Ok(true)) => return Ok(namespace),
                Ok(Ok(false)) | Err(_) => {}
                Ok(Err(error)) => failed = Some(error),
            }
        }
    }
    Err(match failed {
        Some(error) => error.into(),
        None => NotOurs::because("no namespace has a snapshot with these mounts").into(),
    })
}

async fn has_mounts(
    containerd: &Containerd,
    snapshotter: &str,
    mounts: &[Mount],
) -> Result<bool, ContainerdError> {
    let snapshots = containerd.snapshotter(snapshotter);
    // Committed snapshots have no mounts: they are compared through views.
    let mut pages = snapshots
        .list_pages(&["kind==active", "kind==view"])
        .await?;
    while let Some(page) = pages.next().await? {
        for snapshot in page {
            match snapshots.mounts(&snapshot.name).await {
                Ok(found) if found == mounts => return Ok(true),
                Ok(_) => {}
                // It was removed meanwhile, or it is of a kind that has none.
                Err(error) if matches!(error.code(), Code::NotFound | Code::FailedPrecondition) => {
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(false)
}
