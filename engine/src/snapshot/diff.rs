//! What one snapshot changes of another one.

use std::io::Write as _;
use std::time::Duration;

use containerd_client::services::v1::DiffRequest;
use containerd_client::services::v1::snapshots::Kind as SnapshotKind;
use transship_containerd::Containerd;
use transship_layer::ExportStats;

use super::sink::Sink;
use super::{Opened, Snapshot, WhileRead, export, while_frozen};
use crate::error::{Context, Error, Result};
use crate::interrupt::Interrupt;

/// An uncompressed layer.
const PLAIN_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// How long the layer is kept in the content store should nobody come to let it go.
const LAYER_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Writes the layer that makes `new` of `old`. There are figures where `new` lies directly on `old`;
/// else containerd compares the files of both.
///
/// # Errors
/// When one of them cannot be read, or the layer cannot be written.
pub async fn diff(
    node: &Containerd,
    old: &Snapshot,
    new: &Snapshot,
    sink: Sink,
    while_read: WhileRead,
    interrupt: &Interrupt,
) -> Result<Option<ExportStats>> {
    // A child's own directory is the difference.
    let is_child = old.info.kind() == SnapshotKind::Committed
        && new.info.parent == old.key
        && new.snapshotter == old.snapshotter;
    if is_child {
        let stats = export::export(node, new, sink, while_read, interrupt).await?;
        return Ok(Some(stats));
    }
    let node = node.with_lease(LAYER_LIFETIME).await?;
    let compared = compare(&node, old, new, sink, while_read, interrupt).await;
    let ended = node.end_lease().await;
    compared?;
    ended?;
    Ok(None)
}

/// Lets containerd compare the two file by file.
async fn compare(
    node: &Containerd,
    old: &Snapshot,
    new: &Snapshot,
    mut sink: Sink,
    while_read: WhileRead,
    interrupt: &Interrupt,
) -> Result<()> {
    let left = Opened::open(node, old).await?;
    let right = match Opened::open(node, new).await {
        Ok(right) => right,
        Err(error) => {
            // What is left of it goes with its lease.
            drop(left.close().await);
            return Err(error);
        }
    };
    let request = DiffRequest {
        left: left.mounts.clone(),
        right: right.mounts.clone(),
        media_type: PLAIN_LAYER.to_owned(),
        r#ref: format!("transship-diff-{}", transship_containerd::unique()),
        ..DiffRequest::default()
    };
    let read = async {
        tokio::select! {
            layer = node.diff(request) => layer.map_err(Error::from),
            interrupted = interrupt.wait() => Err(Error::from(interrupted)),
        }
    };
    let layer = while_frozen(node, new, while_read, read).await;
    let closed = [left.close().await, right.close().await];
    closed.into_iter().collect::<Result<()>>()?;
    let mut pieces = node.read_blob(&layer?.digest).await?;
    while let Some(piece) = pieces.next().await? {
        interrupt.check()?;
        sink.write_all(&piece).context("cannot write the layer")?;
    }
    sink.finish()
}
