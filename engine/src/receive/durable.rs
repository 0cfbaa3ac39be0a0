//! A copy that a power cut of this node does not lose: its files, records and image are on the disk
//! before the source is told to remove its own.
//!
//! What comes before the freeze, into upperdirs and emptyDirs, is written out as it comes. In the freeze others wait for the disk:
//! containerd's records and ours are synced, which on ext4 writes out what has been written to other files as well, and a root
//! file system that is unmounted (front/rootfs.rs) writes out all that its upperdir's has.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use transship_containerd::Containerd;

use crate::error::{Context, Result};

/// Between one time and the next, at least; and as long as the one took, so that a slow disk has half of its time for others.
const PAUSE: Duration = Duration::from_secs(1);

/// Writes out every file system that holds something of the container: that of its upperdir, and
/// that of containerd's content and metadata.
pub(super) async fn sync(node: &Containerd, upperdir: &Path) -> Result<()> {
    let mut places = vec![upperdir.to_path_buf()];
    places.extend(node.content_root().await?);
    tokio::task::spawn_blocking(move || sync_file_systems(&places)).await?
}

/// Writes file systems out, again and again until it is ended.
#[derive(Debug)]
pub(super) struct WriteOut(JoinHandle<Result<()>>);

impl WriteOut {
    /// Begins with those that hold these places.
    pub(super) fn begin(places: Vec<PathBuf>) -> Self {
        let places = Arc::new(places);
        Self(tokio::spawn(async move {
            loop {
                let places = Arc::clone(&places);
                let began = Instant::now();
                tokio::task::spawn_blocking(move || sync_file_systems(&places)).await??;
                sleep(PAUSE.max(began.elapsed())).await;
            }
        }))
    }

    /// Ends it.
    ///
    /// # Errors
    /// What could not be written: the kernel tells that once, and nobody who syncs later.
    pub(super) async fn end(mut self) -> Result<()> {
        match self.0.is_finished() {
            true => (&mut self.0).await?,
            false => Ok(()),
        }
    }
}

impl Drop for WriteOut {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn sync_file_systems(places: &[PathBuf]) -> Result<()> {
    let mut done = BTreeSet::new();
    for place in places {
        let failed = || format!("cannot write out the file system of {}", place.display());
        let dir = File::open(place).with_context(failed)?;
        let device = dir.metadata().with_context(failed)?.dev();
        if done.insert(device) {
            nix::unistd::syncfs(&dir).with_context(failed)?;
        }
    }
    Ok(())
}
