//! Room on the file systems that something is written to: looked at before, and while what nobody knows the size of comes.

use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use tokio::time::timeout;
use transship_containerd::Containerd;

use crate::error::{Context, Error, Result};
use crate::timeline::human_bytes;

/// Bytes of the store's file system that stay free.
pub const KEEP_FREE: u64 = 64 << 20;
/// How often the room is looked at while containerd unpacks: a disk writes less than [`KEEP_FREE`] meanwhile.
const ROOM_PAUSE: Duration = Duration::from_millis(50);

/// What memory and files may grow between the offer of a migration and the freeze, in bytes, beside three times of them.
const SLACK: u64 = 1 << 30;

/// How many bytes the target of a migration takes, before the freeze and in it, where so many were estimated in the offer.
/// What a program writes meanwhile comes more than once.
pub(crate) fn most_bytes(estimate: u64) -> u64 {
    estimate.saturating_mul(3).saturating_add(SLACK)
}

/// Refuses what has no room below `dir`.
///
/// # Errors
/// There are fewer bytes free than `needed`.
pub(crate) fn require_room(dir: &Path, needed: u64) -> Result<()> {
    let free = free_bytes(dir)?;
    if free < needed {
        return Err(Error::refused(format!(
            "not enough room below {}: {} free, about {} needed",
            dir.display(),
            human_bytes(free),
            human_bytes(needed)
        )));
    }
    Ok(())
}

/// Does `work`, in which containerd unpacks with this snapshotter, and ends it when too little room is left there: what a
/// layer unpacks to is known to nobody before.
///
/// # Errors
/// Those of `work`; or [`crate::Kind::Refused`], and it has been dropped.
pub(crate) async fn while_room<T>(
    node: &Containerd,
    snapshotter: &str,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let own = node.snapshotter_root(snapshotter).await?;
    let content = node.content_root().await?;
    let mut work = pin!(work);
    loop {
        for dir in own.iter().chain(&content) {
            require_room(dir, KEEP_FREE)?;
        }
        if let Ok(done) = timeout(ROOM_PAUSE, &mut work).await {
            return done;
        }
    }
}

/// Free bytes of the file system that `path` is or will be on.
fn free_bytes(path: &Path) -> Result<u64> {
    let there = path
        .ancestors()
        .find(|path| path.symlink_metadata().is_ok());
    let there = there.unwrap_or(Path::new("/"));
    let stat = nix::sys::statvfs::statvfs(there)
        .with_context(|| format!("cannot ask for the free space of {}", there.display()))?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}
