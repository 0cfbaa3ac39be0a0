//! The layer of a snapshot, or a raw copy of its directory.

use std::fs;
use std::io::BufWriter;
use std::path::Path;
use std::time::Duration;

use transship_containerd::Containerd;
use transship_layer::{
    ExportError, ExportOptions, ExportStats, LayerFormat, OverlayStack, export_upperdir,
};

use super::sink::Sink;
use super::{Opened, Snapshot, WhileRead, raw, while_frozen};
use crate::error::{Context, Error, Result};
use crate::interrupt::Interrupt;

/// How long an export that was given up may take to notice.
const GIVE_UP_PATIENCE: Duration = Duration::from_secs(5);

/// Writes what the snapshot changes as an OCI layer.
///
/// # Errors
/// When it cannot be read or written; a container that was frozen for it runs again, unless the error
/// says that it is still paused.
pub async fn export(
    node: &Containerd,
    snapshot: &Snapshot,
    sink: Sink,
    while_read: WhileRead,
    interrupt: &Interrupt,
) -> Result<ExportStats> {
    let opened = Opened::open(node, snapshot).await?;
    let exported = match opened.layer(snapshot) {
        Ok(layer) => {
            let write = write_layer(layer, sink, interrupt);
            while_frozen(node, snapshot, while_read, write).await
        }
        Err(error) => Err(error),
    };
    opened.close().await?;
    exported
}

/// Makes `dir` a copy of the snapshot's directory by reflink, or nothing.
///
/// # Errors
/// As [`export`], and [`crate::Kind::Refused`] where the file system shares no blocks.
pub async fn export_raw(
    node: &Containerd,
    snapshot: &Snapshot,
    dir: &Path,
    interrupt: &Interrupt,
) -> Result<()> {
    fs::create_dir(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let copied = copy_into(node, snapshot, dir, interrupt).await;
    if copied.is_err() {
        fs::remove_dir(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    copied
}

async fn copy_into(
    node: &Containerd,
    snapshot: &Snapshot,
    dir: &Path,
    interrupt: &Interrupt,
) -> Result<()> {
    let opened = Opened::open(node, snapshot).await?;
    let copied = match opened.layer(snapshot) {
        Ok(layer) => {
            let copy = raw::copy_tree(&layer.top, dir, interrupt);
            while_frozen(node, snapshot, WhileRead::Frozen, copy).await
        }
        Err(error) => Err(error),
    };
    opened.close().await?;
    copied
}

async fn write_layer(
    layer: OverlayStack,
    sink: Sink,
    interrupt: &Interrupt,
) -> Result<ExportStats> {
    let give_up = sink.give_up();
    let mut export = tokio::task::spawn_blocking(move || -> Result<ExportStats> {
        let options = ExportOptions {
            // For whatever tool, as `ctr snapshots diff` writes it.
            format: LayerFormat::Image,
            // A container that is frozen is not alone: one that did not run may be started meanwhile, and another one of
            // its pod reaches its files through /proc.
            in_use: true,
            ..ExportOptions::default()
        };
        let mut out = BufWriter::with_capacity(1 << 20, sink);
        let stats = export_upperdir(&layer, &mut out, &options)
            .map_err(|error| explained(error, &layer))?;
        let sink = out
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)
            .context("cannot write the layer")?;
        sink.finish()?;
        Ok(stats)
    });
    tokio::select! {
        exported = &mut export => exported?,
        interrupted = interrupt.wait() => {
            give_up.now();
            // So that a file goes; a pipe that nobody reads may hold the thread for ever.
            drop(tokio::time::timeout(GIVE_UP_PATIENCE, export).await);
            Err(interrupted.into())
        }
    }
}

fn explained(error: ExportError, layer: &OverlayStack) -> Error {
    let message = format!("cannot export {}", layer.top.display());
    match error {
        ExportError::Changed { .. } => Error::refused(message)
            .because(error)
            .hint("without --no-pause the container stands still meanwhile"),
        error => Error::failed(message).because(error),
    }
}
