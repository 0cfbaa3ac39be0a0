//! `transship snapshot export|import|diff`

use std::fs::File;
use std::io::{self, IsTerminal as _};
use std::os::fd::AsFd as _;
use std::path::Path;

use serde::Serialize;
use transship_checkpoint::manifest::Losses;
use transship_checkpoint::shown_text::printable;
use transship_engine::interrupt::Interrupt;
use transship_engine::snapshot::{self, Sink, Source, Target, WhileRead};
use transship_engine::source;
use transship_engine::timeline::human_bytes;
use transship_engine::{Context as _, Error, Result};
use transship_layer::ExportStats;

use super::{connect, print};
use crate::args::{
    Global, SnapshotCommand, SnapshotDiffArgs, SnapshotExportArgs, SnapshotImportArgs,
};
use crate::progress::say;

pub(crate) async fn run(global: &Global, command: SnapshotCommand) -> Result<()> {
    match command {
        SnapshotCommand::Export(args) => export(global, args).await,
        SnapshotCommand::Import(args) => import(global, args).await,
        SnapshotCommand::Diff(args) => diff(global, args).await,
    }
}

async fn export(global: &Global, args: SnapshotExportArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let node = connect(global).await?;
    let found = snapshot::find(&node, &args.name, args.snapshotter.as_deref()).await?;
    if let Some(dir) = &args.raw {
        return snapshot::export_raw(&node, &found, dir, &interrupt).await;
    }
    let (sink, while_read) = (sink(&args.output)?, while_read(args.no_pause));
    let stats = snapshot::export(&node, &found, sink, while_read, &interrupt).await?;
    report(global, &stats)
}

async fn diff(global: &Global, args: SnapshotDiffArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let node = connect(global).await?;
    let snapshotter = args.snapshotter.as_deref();
    let old = snapshot::find(&node, &args.old, snapshotter).await?;
    let new = snapshot::find(&node, &args.new, snapshotter).await?;
    let (sink, while_read) = (sink(&args.output)?, while_read(args.no_pause));
    match snapshot::diff(&node, &old, &new, sink, while_read, &interrupt).await? {
        Some(stats) => report(global, &stats),
        None => Ok(()),
    }
}

fn while_read(no_pause: bool) -> WhileRead {
    if no_pause {
        WhileRead::Running
    } else {
        WhileRead::Frozen
    }
}

/// `-` is stdout, which must not be a terminal.
fn sink(path: &Path) -> Result<Sink> {
    if path != Path::new("-") {
        return Sink::file(path);
    }
    if io::stdout().is_terminal() {
        return Err(Error::refused("a layer cannot be written to a terminal")
            .hint("transship snapshot export ... -o FILE, or into a pipe"));
    }
    Ok(Sink::stdout())
}

#[derive(Serialize)]
struct Exported {
    entries: u64,
    bytes: u64,
    whiteouts: u64,
    opaque_directories: u64,
    sockets_left_out: u64,
    /// What a layer cannot say.
    #[serde(skip_serializing_if = "Losses::is_empty")]
    losses: Losses,
}

/// Says on stderr what was written: stdout may be the layer.
fn report(global: &Global, stats: &ExportStats) -> Result<()> {
    let exported = Exported {
        entries: stats.entries,
        bytes: stats.bytes,
        whiteouts: stats.whiteouts,
        opaque_directories: stats.opaque_directories,
        sockets_left_out: stats.sockets,
        losses: source::losses(stats),
    };
    if global.json {
        say(&super::json(&exported)?);
        return Ok(());
    }
    let bytes = human_bytes(exported.bytes);
    say(&format!("{} entries, {bytes}", exported.entries));
    for path in &stats.noted_paths {
        say(&format!(
            "note: {} has hard links in the image, inode flags or attributes that a layer cannot say",
            printable(&path.to_string_lossy())
        ));
    }
    Ok(())
}

#[derive(Serialize)]
struct Imported {
    snapshotter: String,
    key: String,
    #[serde(flatten)]
    layer: Option<ImportedLayer>,
}

#[derive(Serialize)]
struct ImportedLayer {
    entries: u64,
    bytes: u64,
}

async fn import(global: &Global, args: SnapshotImportArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let node = connect(global).await?;
    let target = Target {
        key: &args.key,
        parent: args.parent.as_deref(),
        snapshotter: args.snapshotter.as_deref(),
    };
    let source = match args.raw {
        Some(dir) => Source::Raw(dir),
        None => Source::Layer(open(&args.file)?),
    };
    let (filled, stats) = snapshot::import(&node, &target, source, &interrupt).await?;
    let imported = Imported {
        snapshotter: filled.snapshotter,
        key: filled.key,
        layer: stats.map(|stats| ImportedLayer {
            entries: stats.entries,
            bytes: stats.bytes,
        }),
    };
    print(global, &imported, || {
        let what = match &imported.layer {
            Some(layer) => format!("{} entries, {}", layer.entries, human_bytes(layer.bytes)),
            None => "copied".to_owned(),
        };
        format!("{} of {}: {what}\n", imported.key, imported.snapshotter)
    })
}

/// `-` is stdin.
fn open(file: &Path) -> Result<File> {
    let opened = if file == Path::new("-") {
        io::stdin().as_fd().try_clone_to_owned().map(File::from)
    } else {
        File::open(file)
    };
    opened.with_context(|| format!("cannot open {}", file.display()))
}
