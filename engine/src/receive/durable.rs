//! A copy that a power cut of this node does not lose: its files, records and image are on the disk
//! before the source is told to remove its own.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use transship_containerd::Containerd;

use crate::error::{Context, Result};

/// Writes out every file system that holds something of the container: that of its upperdir, and
/// that of containerd's content and metadata.
pub(super) async fn sync(node: &Containerd, upperdir: &Path) -> Result<()> {
    let mut places = vec![upperdir.to_path_buf()];
    places.extend(node.content_root().await?);
    tokio::task::spawn_blocking(move || sync_file_systems(&places)).await?
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
