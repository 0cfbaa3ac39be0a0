//! `transship snapshot export KEY|CONTAINER`

use std::fs;
use std::io::BufWriter;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use transship_layer::{
    ExportError, ExportOptions, ExportStats, LayerFormat, OverlayStack, export_upperdir,
};

use super::sink::Sink;
use super::{Opened, Paused, Snapshot, find, raw};
use crate::args::{Global, SnapshotExportArgs};
use crate::commands::connect;
use transship_containerd::Node;
use transship_engine::interrupt::Interrupt;
use transship_engine::problem::{Kind, Problem};
use transship_engine::timeline::human_bytes;

/// How long an export that was given up may take to notice.
const GIVE_UP_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Exported {
    entries: u64,
    bytes: u64,
    whiteouts: u64,
    opaque_directories: u64,
    sockets_left_out: u64,
}

pub(super) async fn run(global: &Global, args: SnapshotExportArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let node = connect(global).await?;
    let snapshot = find(&node, &args.name, args.snapshotter.as_deref()).await?;
    if let Some(dir) = &args.raw {
        return export_raw(&node, &snapshot, dir, &interrupt).await;
    }
    let sink = Sink::open(&args.output)?;
    let stats = export(&node, &snapshot, sink, args.no_pause, &interrupt).await?;
    report(global, &stats)
}

/// Exports the snapshot while its container, if one runs on it, stands still.
pub(super) async fn export(
    node: &Node,
    snapshot: &Snapshot,
    sink: Sink,
    no_pause: bool,
    interrupt: &Interrupt,
) -> Result<ExportStats> {
    let opened = Opened::open(node, snapshot).await?;
    let exported = match opened.layer(snapshot) {
        Ok(layer) => {
            let container = snapshot.container.as_deref().filter(|_| !no_pause);
            let paused = Paused::pause(node, container).await?;
            let exported = write_layer(layer, sink, interrupt).await;
            paused.resume().await?;
            exported
        }
        Err(error) => Err(error),
    };
    opened.close().await?;
    exported
}

/// Makes `dir` a copy of the snapshot's directory, or nothing.
async fn export_raw(
    node: &Node,
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

/// Copies the snapshot's directory while its container stands still.
async fn copy_into(
    node: &Node,
    snapshot: &Snapshot,
    dir: &Path,
    interrupt: &Interrupt,
) -> Result<()> {
    let opened = Opened::open(node, snapshot).await?;
    let copied = match opened.layer(snapshot) {
        Ok(layer) => {
            let paused = Paused::pause(node, snapshot.container.as_deref()).await?;
            let copied = raw::copy_tree(&layer.top, dir, interrupt).await;
            paused.resume().await?;
            copied
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
        let mut out = BufWriter::with_capacity(1 << 20, sink);
        let options = ExportOptions {
            // For whatever tool, as `ctr snapshots diff` writes it.
            format: LayerFormat::Image,
            ..ExportOptions::default()
        };
        let stats = export_upperdir(&layer, &mut out, &options)
            .map_err(|error| with_hint(error, &layer))?;
        let sink = out
            .into_inner()
            .map_err(|error| error.into_error())
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

fn with_hint(error: ExportError, layer: &OverlayStack) -> anyhow::Error {
    let context = format!("cannot export {}", layer.top.display());
    match error {
        ExportError::Changed { .. } => anyhow::Error::from(error).context(
            Problem::new(Kind::Refused, context)
                .hint("without --no-pause the container stands still meanwhile"),
        ),
        error => anyhow::Error::from(error).context(context),
    }
}

/// Says on stderr what was written: stdout may be the layer.
pub(super) fn report(global: &Global, stats: &ExportStats) -> Result<()> {
    let exported = Exported {
        entries: stats.entries,
        bytes: stats.bytes,
        whiteouts: stats.whiteouts,
        opaque_directories: stats.opaque_directories,
        sockets_left_out: stats.sockets,
    };
    if global.json {
        eprintln!("{}", serde_json::to_string_pretty(&exported)?);
    } else {
        eprintln!(
            "{} entries, {}",
            exported.entries,
            human_bytes(exported.bytes)
        );
    }
    for path in &stats.noted_paths {
        eprintln!(
            "note: {} has hard links in the image, inode flags or attributes that a layer cannot say",
            path.display()
        );
    }
    Ok(())
}
