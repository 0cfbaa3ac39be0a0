//! `transship snapshot diff A B`

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result};
use containerd_client::services::v1::DiffRequest;
use containerd_client::services::v1::snapshots::Kind as SnapshotKind;

use super::sink::Sink;
use super::{Opened, Paused, Snapshot, export, find};
use crate::args::{Global, SnapshotDiffArgs};
use crate::commands::connect;
use transship_containerd::Node;
use transship_engine::interrupt::Interrupt;

/// An uncompressed layer.
const PLAIN_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// How long the layer is kept in the content store should nobody come to let it go.
const LAYER_LIFETIME: Duration = Duration::from_secs(24 * 3600);

pub(super) async fn run(global: &Global, args: SnapshotDiffArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let node = connect(global).await?;
    let old = find(&node, &args.old, args.snapshotter.as_deref()).await?;
    let new = find(&node, &args.new, args.snapshotter.as_deref()).await?;
    let sink = Sink::open(&args.output)?;
    // A child's own directory is the difference.
    let is_child = old.info.kind() == SnapshotKind::Committed
        && new.info.parent == old.key
        && new.snapshotter == old.snapshotter;
    if is_child {
        let stats = export::export(&node, &new, sink, args.no_pause, &interrupt).await?;
        return export::report(global, &stats);
    }
    let node = node.with_lease(LAYER_LIFETIME).await?;
    let compared = compare(&node, &old, &new, sink, args.no_pause, &interrupt).await;
    node.drop_lease().await?;
    compared
}

/// Lets containerd compare the two file by file.
async fn compare(
    node: &Node,
    old: &Snapshot,
    new: &Snapshot,
    mut sink: Sink,
    no_pause: bool,
    interrupt: &Interrupt,
) -> Result<()> {
    let left = Opened::open(node, old).await?;
    let right = Opened::open(node, new).await?;
    let container = new.container.as_deref().filter(|_| !no_pause);
    let paused = Paused::pause(node, container).await?;
    let request = DiffRequest {
        left: left.mounts.clone(),
        right: right.mounts.clone(),
        media_type: PLAIN_LAYER.to_owned(),
        r#ref: format!("transship-diff-{}", transship_containerd::unique()),
        ..DiffRequest::default()
    };
    let layer = tokio::select! {
        layer = node.diff(request) => layer.map_err(Into::into),
        interrupted = interrupt.wait() => Err(anyhow::Error::from(interrupted)),
    };
    paused.resume().await?;
    left.close().await?;
    right.close().await?;
    let mut pieces = node.read_blob(&layer?.digest).await?;
    while let Some(piece) = pieces.next().await? {
        interrupt.check()?;
        sink.write_all(&piece).context("cannot write the layer")?;
    }
    sink.finish()
}
