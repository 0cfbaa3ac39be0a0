//! `transship snapshot import KEY [FILE]`

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use containerd_client::services::v1::snapshots::Kind as SnapshotKind;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use transship_layer::{
    ImportOptions, ImportStats, LayerFormat, OverlayStack, decompress, import_into_upperdir,
    remove_contents,
};

use super::{Opened, Snapshot, default_snapshotter, find, kept, raw};
use crate::args::{Global, SnapshotImportArgs};
use crate::commands::{connect, print};
use transship_containerd::Node;
use transship_engine::interrupt::Interrupt;
use transship_engine::problem::{Kind, Problem};
use transship_engine::timeline::human_bytes;

/// How often a reader that nothing comes to looks whether it is still wanted, in milliseconds.
const LOOK_UP_MS: u8 = 200;

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

pub(super) async fn run(global: &Global, args: SnapshotImportArgs) -> Result<()> {
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
    let (snapshot, stats) = make_and_fill(&node, &target, source, &interrupt).await?;
    let imported = Imported {
        snapshotter: snapshot.snapshotter,
        key: snapshot.key,
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

/// What to fill a snapshot from.
#[derive(Debug)]
pub(super) enum Source {
    /// A layer, plain or compressed.
    Layer(File),
    /// A directory of `export --raw`.
    Raw(PathBuf),
}

/// The snapshot to fill.
#[derive(Debug)]
pub(super) struct Target<'a> {
    pub(super) key: &'a str,
    /// Makes it on top of this one.
    pub(super) parent: Option<&'a str>,
    pub(super) snapshotter: Option<&'a str>,
}

/// Fills a snapshot, which is made first if the target has a parent. Only a layer is counted.
pub(super) async fn make_and_fill(
    node: &Node,
    target: &Target<'_>,
    source: Source,
    interrupt: &Interrupt,
) -> Result<(Snapshot, Option<ImportStats>)> {
    let made = match target.parent {
        Some(parent) => {
            let snapshotter = match target.snapshotter {
                Some(snapshotter) => snapshotter.to_owned(),
                None => default_snapshotter(node).await?,
            };
            node.prepare(&snapshotter, target.key, parent, kept())
                .await?;
            Some(snapshotter)
        }
        None => None,
    };
    let snapshotter = made.as_deref().or(target.snapshotter);
    let imported = import(
        node,
        target.key,
        snapshotter,
        source,
        made.is_some(),
        interrupt,
    )
    .await;
    if let (Err(_), Some(snapshotter)) = (&imported, &made) {
        node.remove_snapshot(snapshotter, target.key).await?;
    }
    imported
}

async fn import(
    node: &Node,
    key: &str,
    snapshotter: Option<&str>,
    source: Source,
    made: bool,
    interrupt: &Interrupt,
) -> Result<(Snapshot, Option<ImportStats>)> {
    let snapshot = find(node, key, snapshotter).await?;
    if snapshot.info.kind() != SnapshotKind::Active {
        return Err(refused(
            &snapshot,
            "it is not active, so nothing can be written to it",
        )
        .into());
    }
    if let Some(id) = snapshot.container.as_deref()
        && node.task(id).await.is_ok()
    {
        return Err(refused(&snapshot, &format!("the container {id:?} runs on it")).into());
    }
    let layer = Opened::open(node, &snapshot).await?.layer(&snapshot)?;
    let mut entries =
        fs::read_dir(&layer.top).with_context(|| format!("cannot list {}", layer.top.display()))?;
    if entries.next().is_some() {
        let problem = refused(
            &snapshot,
            "it has changes of its own, and two layers do not mix",
        )
        .hint("--parent NAME makes a new snapshot KEY on top of NAME");
        return Err(problem.into());
    }
    let file = match source {
        Source::Layer(file) => file,
        Source::Raw(dir) => {
            raw::copy_tree(&dir, &layer.top, interrupt).await?;
            return Ok((snapshot, None));
        }
    };
    let given_up = Arc::new(AtomicBool::new(false));
    let input = Input {
        file,
        given_up: Arc::clone(&given_up),
    };
    let mut filling = tokio::task::spawn_blocking(move || fill(&layer, input, made));
    let stats = tokio::select! {
        filled = &mut filling => filled??,
        interrupted = interrupt.wait() => {
            given_up.store(true, Ordering::Relaxed);
            drop(filling.await);
            return Err(interrupted.into());
        }
    };
    Ok((snapshot, Some(stats)))
}

fn refused(snapshot: &Snapshot, why: &str) -> Problem {
    Problem::new(
        Kind::Refused,
        format!("nothing is imported into {:?}: {why}", snapshot.key),
    )
}

fn open(file: &Path) -> Result<File> {
    let opened = if file == Path::new("-") {
        io::stdin().as_fd().try_clone_to_owned().map(File::from)
    } else {
        File::open(file)
    };
    opened.with_context(|| format!("cannot open {}", file.display()))
}

/// Fails when the import is given up, even while nothing comes.
struct Input {
    file: File,
    given_up: Arc<AtomicBool>,
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.given_up.load(Ordering::Relaxed) {
                return Err(io::Error::other("given up"));
            }
            let mut ready = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, PollTimeout::from(LOOK_UP_MS)) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return self.file.read(buffer),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

fn fill(layer: &OverlayStack, input: Input, made: bool) -> Result<ImportStats> {
    let options = ImportOptions {
        format: LayerFormat::Image,
        ..ImportOptions::default()
    };
    let filled = decompress(BufReader::with_capacity(1 << 20, input))
        .context("cannot read the layer")
        .and_then(|tar| {
            import_into_upperdir(tar, layer, &options)
                .with_context(|| format!("cannot import into {}", layer.top.display()))
        });
    if filled.is_err() && !made {
        // The snapshot was there before, and empty.
        remove_contents(&layer.top)
            .with_context(|| format!("cannot empty {}", layer.top.display()))?;
    }
    filled
}
