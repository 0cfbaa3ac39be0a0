//! Watches that CRIU has dumped without the path of what is watched.
//!
//! The restore finds nothing by them but deleted files that it makes again, and the admission refuses all others. So
//! the dump is refused, while the container is still there.

use std::path::Path;

use transship_checkpoint::criu_images::named_files::remaps;
use transship_checkpoint::criu_images::watches::watches;

use crate::conditions::Found;
use crate::error::{Context, Error, Result};

/// Refuses images that have such watches, of the container that is `called` so.
///
/// # Errors
/// They have, or cannot be read.
pub(crate) async fn refuse(images: &Path, called: &str) -> Result<()> {
    let dir = images.to_path_buf();
    let read = move || {
        let watched = watches(&dir)?.inodes;
        match watched.is_empty() {
            true => Ok(watched),
            false => remaps(&dir).map(|remaps| {
                let of_ghost = |it: &(u32, u64)| {
                    let mut ghosts = remaps.iter().filter_map(|remap| remap.ghost);
                    ghosts.any(|ghost| ghost.is_found_by(*it))
                };
                watched.into_iter().filter(|it| !of_ghost(it)).collect()
            }),
        }
    };
    let lost = tokio::task::spawn_blocking(read).await?;
    let failed = || format!("cannot read the watches in {}", images.display());
    let lost = lost.map_err(Error::caused_by).with_context(failed)?;
    if lost.is_empty() {
        return Ok(());
    }
    let on = { lost.iter() }.map(|(device, inode)| format!("inode {inode} of device {device:#x}"));
    let found = Found::new("watch", on);
    Err(Error::refused(format!("{called}: {}", found.line())))
}
