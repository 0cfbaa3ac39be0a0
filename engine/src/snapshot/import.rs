//! A snapshot filled from a layer or a raw copy.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use containerd_client::services::v1::snapshots::Kind as SnapshotKind;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use transship_containerd::Containerd;
use transship_containerd::labels::GC_ROOT;
use transship_layer::{
    ImportOptions, ImportStats, LayerFormat, OverlayStack, decompress, import_into_upperdir,
    remove_contents,
};

use super::{Opened, Snapshot, default_snapshotter, find, kept, raw};
use crate::error::{Context, Error, Result};
use crate::interrupt::Interrupt;
use crate::room::{KEEP_FREE, require_room};

/// How often a reader that nothing comes to looks whether it is still wanted, in milliseconds.
const LOOK_UP_MS: u8 = 200;
/// Bytes of an unpacked layer from one look at the room to the next.
const BETWEEN_LOOKS: usize = 16 << 20;

/// What to fill a snapshot from.
#[derive(Debug)]
pub enum Source {
    /// A layer, plain or compressed.
    Layer(File),
    /// A directory of `export --raw`.
    Raw(PathBuf),
}

/// The snapshot to fill.
#[derive(Debug)]
pub struct Target<'a> {
    /// Its key, or the container whose snapshot it is.
    pub key: &'a str,
    /// Makes it on top of this one; the empty name is no parent.
    pub parent: Option<&'a str>,
    /// Its snapshotter, where that is not the default one or the container's.
    pub snapshotter: Option<&'a str>,
}

/// Fills a snapshot, which is made first if the target has a parent, and is gone if that fails. Only a
/// layer is counted.
///
/// # Errors
/// [`crate::Kind::Refused`] for a snapshot that is in use or not empty, or what fails.
pub async fn import(
    node: &Containerd,
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
            node.snapshotter(&snapshotter)
                .prepare(target.key, parent, &[(GC_ROOT, &kept())])
                .await?;
            Some(snapshotter)
        }
        None => None,
    };
    let snapshotter = made.as_deref().or(target.snapshotter);
    let imported = fill_existing(
        node,
        target.key,
        snapshotter,
        source,
        made.is_some(),
        interrupt,
    )
    .await;
    if let (Err(_), Some(snapshotter)) = (&imported, &made) {
        node.snapshotter(snapshotter)
            .remove_if_exists(target.key)
            .await?;
    }
    imported
}

async fn fill_existing(
    node: &Containerd,
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
        ));
    }
    if let Some(id) = snapshot.container.as_deref() {
        match node.task(id).await {
            Err(error) if error.is_not_found() => {}
            // Nothing is written below a mount that may be in use.
            Err(error) => {
                let why = format!("whether the container {id:?} runs on it cannot be known");
                return Err(refused(&snapshot, &why).because(error));
            }
            Ok(_) => {
                let why = format!("the container {id:?} runs on it");
                return Err(refused(&snapshot, &why));
            }
        }
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
        return Err(problem);
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

fn refused(snapshot: &Snapshot, why: &str) -> Error {
    Error::refused(format!(
        "nothing is imported into {:?}: {why}",
        snapshot.key
    ))
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

/// The layer as it unpacks, which little input can make long: ends when the import is given up or the room gets short.
struct Bounded<'a, R> {
    tar: R,
    given_up: &'a AtomicBool,
    top: &'a Path,
    /// Bytes until the next look at the room.
    unlooked: usize,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.given_up.load(Ordering::Relaxed) {
            return Err(io::Error::other("given up"));
        }
        if self.unlooked == 0 {
            require_room(self.top, KEEP_FREE).map_err(io::Error::other)?;
            self.unlooked = BETWEEN_LOOKS;
        }
        let most = buffer.len().min(self.unlooked);
        let read = self.tar.read(&mut buffer[..most])?;
        self.unlooked -= read;
        Ok(read)
    }
}

fn fill(layer: &OverlayStack, input: Input, made: bool) -> Result<ImportStats> {
    let given_up = Arc::clone(&input.given_up);
    let options = ImportOptions {
        format: LayerFormat::Image,
        ..ImportOptions::default()
    };
    let filled = decompress(BufReader::with_capacity(1 << 20, input))
        .context("cannot read the layer")
        .and_then(|tar| {
            let tar = Bounded {
                tar,
                given_up: &given_up,
                top: &layer.top,
                unlooked: 0,
            };
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
